"""Optimiser groups and skipped steps, the learning rate of every step, early stopping, averaged weights."""

import copy
import io
import math
import random

import pytest
import torch
from torch import nn

from orion_unet.config import OptimisationOptions
from orion_unet.models.unet import SpatialUNet
from orion_unet.training.averages import ModelEma, RunningStatistics
from orion_unet.training.optim import (
    EarlyStopping,
    LearningRateSchedule,
    align_moments,
    automatic_rate,
    build_optimizer,
)

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def tiny_model():
    return SpatialUNet(2, base_features=2, depth=1)


def random_gradients(model):
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)


def snapshot(model, optimizer):
    state = [value for slot in optimizer.state.values() for value in slot.values()]
    return [tensor.detach().clone() for tensor in [*model.parameters(), *state]]


def through_a_checkpoint(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("saved_as", [torch.contiguous_format, torch.channels_last])
def test_moments_saved_in_another_order_in_memory_go_with_the_right_weights(saved_as):
    start = SpatialUNet(2, base_features=4, depth=2)
    models = [copy.deepcopy(start).to(memory_format=form) for form in (saved_as, torch.channels_last)]
    optimizers = [build_optimizer(model, OptimisationOptions(learning_rate=1e-2), CPU) for model in models]

    def step():
        for values in zip(*(model.parameters() for model in models), strict=True):
            gradient = torch.randn(values[0].shape)
            for value in values:
                value.grad = torch.empty_like(value).copy_(gradient)
        for optimizer in optimizers:
            optimizer.step()

    step()
    optimizers[1].load_state_dict(through_a_checkpoint(optimizers[0].state_dict()))
    align_moments(optimizers[1])
    step()
    for first, second in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(first, second)


def test_an_automatic_rate_lets_a_weight_travel_equally_far_in_runs_of_any_usual_length():
    assert automatic_rate(1000) == pytest.approx(8e-3)
    assert automatic_rate(4000) * 4000 == automatic_rate(2000) * 2000 == automatic_rate(1000) * 1000
    assert [automatic_rate(steps) for steps in (1, 800, 10**5, 10**7)] == [1e-2, 1e-2, 1e-4, 1e-4]


def test_a_rate_that_is_not_known_yet_cannot_be_used():
    with pytest.raises(ValueError, match="not been worked out"):
        build_optimizer(tiny_model(), OptimisationOptions(learning_rate=None), CPU)


def test_only_kernels_decay_and_every_parameter_is_optimised_once():
    model = tiny_model()
    optimizer = build_optimizer(model, OptimisationOptions(weight_decay=0.3, learning_rate=2e-3), CPU)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            kernel = name == "weight" and isinstance(module, nn.Conv2d | nn.ConvTranspose2d)
            assert decay[id(parameter)] == (0.3 if kernel else 0.0)
    assert {group["lr"] for group in optimizer.param_groups} == {2e-3}


def test_frozen_parameters_are_left_out():
    model = tiny_model()
    model.head.requires_grad_(False)
    optimizer = build_optimizer(model, OptimisationOptions(), CPU)
    assert not any(p is model.head.weight for group in optimizer.param_groups for p in group["params"])


def test_found_inf_leaves_weights_moments_and_step_counts_unchanged():
    model = tiny_model()
    optimizer = build_optimizer(model, OptimisationOptions(), CPU)
    random_gradients(model)
    optimizer.step()
    before = snapshot(model, optimizer)
    model.head.weight.grad.fill_(math.nan)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    after = snapshot(model, optimizer)
    assert len(before) == 4 * len(list(model.parameters()))
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_with_found_inf_zero_it_steps_like_plain_adamw():
    model = tiny_model()
    twin = copy.deepcopy(model)
    options = OptimisationOptions(weight_decay=0.1, learning_rate=1e-2)
    optimizer = build_optimizer(model, options, CPU)
    optimizer.found_inf = torch.zeros(())
    kernels = [p for p in twin.parameters() if p.ndim >= 2]
    others = [p for p in twin.parameters() if p.ndim < 2]
    plain = torch.optim.AdamW(
        [{"params": kernels, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=1e-2,
        foreach=False,
        fused=False,
    )
    for _ in range(5):
        random_gradients(model)
        for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
            other.grad = parameter.grad.clone()
        optimizer.step()
        plain.step()
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-6, atol=1e-6)
    assert {int(slot["step"]) for slot in optimizer.state.values()} == {5}


def test_constant_rate_without_warmup_is_the_option():
    schedule = LearningRateSchedule(OptimisationOptions(scheduler="constant", learning_rate=3e-4), 7)
    assert {schedule.at(epoch, step) for epoch in range(3) for step in range(7)} == {3e-4}
    assert not schedule.end_epoch(1.0)


@pytest.mark.parametrize("scheduler", ["constant", "cosine", "plateau"])
def test_warmup_rises_linearly_to_the_peak_over_fractional_epochs(scheduler):
    options = OptimisationOptions(scheduler=scheduler, learning_rate=1e-3, warmup_epochs=1.5, epochs=10)
    schedule = LearningRateSchedule(options, 4)
    rates = [schedule.at(*divmod(position, 4)) for position in range(7)]
    assert rates == pytest.approx([1e-3 * n / 6 for n in (1, 2, 3, 4, 5, 6, 6)])


def test_cosine_equals_torchs_own_and_ends_at_zero():
    options = OptimisationOptions(scheduler="cosine", learning_rate=1e-3, epochs=5)
    schedule = LearningRateSchedule(options, 4)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-3)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=19)
    for position in range(20):
        expected = optimizer.param_groups[0]["lr"]
        assert schedule.at(*divmod(position, 4)) == pytest.approx(expected, rel=1e-9, abs=1e-15)
        optimizer.step()
        reference.step()
    assert schedule.at(4, 3) == 0


def test_cosine_of_a_run_of_one_step_trains_at_the_peak():
    options = OptimisationOptions(scheduler="cosine", learning_rate=1e-3, epochs=1)
    assert LearningRateSchedule(options, 1).at(0, 0) == 1e-3


def validation_losses(kind):
    draw = random.Random(kind)
    if kind == "noisy":
        return [0.5 / (1 + 0.1 * epoch) + 0.05 * draw.random() for epoch in range(80)]
    if kind == "tiny gains":
        return [0.5 * (1 - 8e-6) ** epoch for epoch in range(60)]
    if kind == "flat":
        return [0.3] * 120
    return [draw.choice([0.4, 0.39, math.nan, 0.5, math.inf]) for _ in range(60)]


@pytest.mark.parametrize("kind", ["noisy", "tiny gains", "flat", "not finite"])
@pytest.mark.parametrize(("factor", "patience"), [(0.5, 5), (0.3, 0), (0.9, 2)])
def test_plateau_equals_torchs_own(kind, factor, patience):
    options = OptimisationOptions(learning_rate=1e-4, lr_factor=factor, lr_patience=patience)
    schedule = LearningRateSchedule(options, 3)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-4)
    reference = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=factor, patience=patience)
    reductions = 0
    for epoch, loss in enumerate(validation_losses(kind)):
        before = optimizer.param_groups[0]["lr"]
        reference.step(loss)
        expected = optimizer.param_groups[0]["lr"]
        reduced = schedule.end_epoch(loss)
        reductions += reduced
        assert reduced == (expected < before)
        assert schedule.at(epoch + 1, 0) == pytest.approx(expected, rel=1e-12)
    assert reductions > 0


def test_an_epoch_without_a_loss_counts_as_no_better():
    schedule = LearningRateSchedule(OptimisationOptions(lr_patience=1), 1)
    assert [schedule.end_epoch(loss) for loss in (0.5, None, None, None, None)] == [False, False, True, False, True]


def test_a_schedule_restored_from_a_checkpoint_goes_on_alike():
    options = OptimisationOptions(lr_patience=2)
    losses = validation_losses("noisy")
    straight = LearningRateSchedule(options, 3)
    expected = [(straight.end_epoch(loss), straight.at(0, 0)) for loss in losses]
    for cut in (0, 5, 33):
        first, second = LearningRateSchedule(options, 3), LearningRateSchedule(options, 3)
        for loss in losses[:cut]:
            first.end_epoch(loss)
        second.load_state_dict(through_a_checkpoint(first.state_dict()))
        assert [(second.end_epoch(loss), second.at(0, 0)) for loss in losses[cut:]] == expected[cut:]


def test_early_stopping_counts_epochs_since_the_best():
    stopping = EarlyStopping(2)
    seen = []
    for epoch, loss in enumerate([0.5, 0.4, 0.41, 0.39, 0.39, 0.6], start=1):
        seen.append((stopping.update(loss, None, epoch), stopping.should_stop))
    assert seen == [(True, False), (True, False), (False, False), (True, False), (False, False), (False, True)]
    assert (stopping.best, stopping.best_epoch) == (0.39, 4)


@pytest.mark.parametrize("loss", [None, math.nan, math.inf, -math.inf])
def test_what_is_not_a_number_is_never_the_best(loss):
    stopping = EarlyStopping(3)
    assert not stopping.update(loss, 0.5, 1)
    assert stopping.best is None
    assert stopping.update(0.7, 0.5, 2)
    assert not stopping.update(loss, 0.9, 3)
    assert (stopping.best, stopping.best_epoch) == (0.7, 2)


MADE = [(0.50, 0.10), (0.40, 0.30), (0.45, 0.60), (0.35, 0.55), (0.36, None), (0.37, 0.60)]


@pytest.mark.parametrize(
    ("best_by", "bests", "value"),
    [
        ("loss", [True, True, False, True, False, False], 0.35),
        ("pearson", [True, True, True, False, False, False], 0.6),
    ],
)
def test_loss_and_pearson_choose_different_epochs(best_by, bests, value):
    stopping = EarlyStopping(3, best_by)
    assert [stopping.update(loss, pearson, epoch) for epoch, (loss, pearson) in enumerate(MADE, 1)] == bests
    chosen = {"loss": 4, "pearson": 3}[best_by]
    assert (stopping.best_epoch, stopping.best, stopping.best_loss) == (chosen, value, MADE[chosen - 1][0])
    # The patience counts epochs without a better one, by the same measure.
    assert stopping.should_stop == (best_by == "pearson")


@pytest.mark.parametrize(("loss", "pearson"), [(0.1, None), (0.1, math.nan), (math.nan, 0.9), (math.inf, 0.9)])
def test_an_epoch_without_pearson_or_loss_is_never_the_best_by_pearson(loss, pearson):
    stopping = EarlyStopping(2, "pearson")
    assert not stopping.update(loss, pearson, 1)
    assert stopping.best is None and stopping.best_epoch is None
    assert stopping.update(0.9, -0.2, 2)


def test_the_state_of_a_run_made_before_best_by_existed_is_that_of_its_loss():
    stopping = EarlyStopping(3)
    stopping.load_state_dict({"best": 0.4, "best_epoch": 2, "bad_epochs": 1})
    assert (stopping.best, stopping.best_loss) == (0.4, 0.4)


def test_patience_zero_never_stops():
    stopping = EarlyStopping(0)
    for epoch in range(1, 50):
        stopping.update(1.0, None, epoch)
    assert not stopping.should_stop


def test_early_stopping_restored_from_a_checkpoint_goes_on_alike():
    stopping, restored = EarlyStopping(3), EarlyStopping(3)
    for epoch, loss in enumerate([0.5, 0.6, 0.6], start=1):
        stopping.update(loss, None, epoch)
    restored.load_state_dict(through_a_checkpoint(stopping.state_dict()))
    for epoch in (4, 5):
        assert restored.update(0.6, None, epoch) == stopping.update(0.6, None, epoch)
        assert restored.should_stop == stopping.should_stop
    assert restored.best == 0.5 and restored.should_stop


def average_of(model, decay):
    return ModelEma(model, RunningStatistics(model), decay)


def test_ema_follows_the_formula_with_its_warmup():
    model = nn.Linear(1, 1)
    nn.init.constant_(model.weight, 2.0)
    ema = average_of(model, decay=0.3)
    average = 2.0
    for updates, weight in enumerate([5.0, -1.0, 0.5, 8.0, 3.0]):
        nn.init.constant_(model.weight, weight)
        ema.update()
        decay = min(0.3, (1 + updates) / (10 + updates))
        average = decay * average + (1 - decay) * weight
        assert ema.model.weight.item() == pytest.approx(average, rel=1e-6)


def test_ema_takes_as_few_operations_for_a_deep_model_as_for_a_flat_one():
    def operations(depth):
        model = SpatialUNet(2, base_features=2, depth=depth)
        ema = average_of(model, decay=0.9)
        with torch.profiler.profile() as profiler:
            ema.update(skip=torch.zeros(()))
        # On a CPU torch splits a group of tensors into single ones, inside the operation that is counted here.
        return sum(event.cpu_parent is None for event in profiler.events())

    assert operations(1) == operations(4) < 40


def test_ema_averages_running_statistics_and_copies_counters():
    norm = nn.BatchNorm2d(2)
    ema = average_of(norm, decay=0.9)
    norm(torch.rand(4, 2, 3, 3))
    ema.update()
    torch.testing.assert_close(ema.model.running_mean, 0.9 * norm.running_mean)
    assert ema.model.num_batches_tracked.item() == 1


def test_ema_of_a_skipped_step_stays_and_is_not_poisoned_by_nan_statistics():
    norm = nn.BatchNorm2d(2)
    ema = average_of(norm, decay=0.9)
    norm(torch.rand(4, 2, 3, 3))
    ema.update(torch.zeros(()))
    before = copy.deepcopy(ema.state_dict())
    nn.init.constant_(norm.weight, 9.0)
    norm(torch.full((4, 2, 3, 3), math.nan))
    ema.update(torch.ones(()))
    after = ema.state_dict()
    assert after["updates"] == before["updates"] == 1
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert torch.equal(after["model"][name], before["model"][name])


def test_ema_model_is_a_separate_copy_that_only_evaluates():
    model = tiny_model().train()
    ema = average_of(model, decay=0.99)
    assert not ema.model.training
    assert not any(p.requires_grad for p in ema.model.parameters())
    before = ema.model.head.weight.clone()
    nn.init.zeros_(model.head.weight)
    assert model.training and torch.equal(ema.model.head.weight, before)


def test_ema_restored_from_a_checkpoint_goes_on_alike():
    model = tiny_model()
    statistics = RunningStatistics(model)
    straight, restored = (ModelEma(model, statistics, decay=0.99) for _ in range(2))
    optimizer = build_optimizer(model, OptimisationOptions(learning_rate=0.1), CPU)
    for step in range(6):
        if step == 3:
            restored.load_state_dict(through_a_checkpoint(straight.state_dict()))
        random_gradients(model)
        optimizer.step()
        straight.update()
        if step >= 3:
            restored.update()
    expected, actual = straight.state_dict(), restored.state_dict()
    assert actual["updates"] == expected["updates"] == 6
    assert all(torch.equal(actual["model"][name], value) for name, value in expected["model"].items())
