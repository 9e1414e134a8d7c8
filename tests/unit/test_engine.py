"""One epoch of training and one of validation on a tiny network, with batches made here."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr

from orion_unet.config import OptimisationOptions
from orion_unet.data.transforms import Batch
from orion_unet.losses import CompositeLoss
from orion_unet.models.unet import SpatialUNet
from orion_unet.training import engine
from orion_unet.training.averages import ModelEma, RunningStatistics
from orion_unet.training.engine import (
    DIVERGED_AFTER,
    Diverged,
    Learner,
    Precision,
    Requests,
    TrainSums,
    ValidationSums,
    batch_norms,
    measure_statistics,
    train_steps,
    validate,
)
from orion_unet.training.optim import build_optimizer

CPU = torch.device("cpu")
MARKERS = ("Hoechst", "CD45")
ALL_TERMS = {"mse": 0.8, "l1": 0.3, "boundary": 0.1, "focal": 0.2, "variance": 0.1, "correlation": 0.3}


def batch(seed, size=2, side=16):
    rng = torch.Generator().manual_seed(seed)
    he = torch.rand(size, 3, side, side, generator=rng)
    target = torch.rand(size, len(MARKERS), side, side, generator=rng)
    boundary = torch.rand(size, 1, side, side, generator=rng) > 0.7
    return Batch(he, target, boundary, torch.arange(size) + 10 * seed)


def joined(batches):
    parts = {name: torch.cat([getattr(b, name) for b in batches]) for name in ("he", "target", "boundary", "core")}
    return Batch(**parts)


class Trained:
    """A network with all that an epoch needs; ``epoch`` trains on some batches."""

    def __init__(self, norm="batch", weights=ALL_TERMS, ema=0.0, seed=0, **options):
        torch.manual_seed(seed)
        self.model = SpatialUNet(len(MARKERS), base_features=4, depth=1, norm=norm)
        self.loss = CompositeLoss(dict(weights))
        options = OptimisationOptions(**{"learning_rate": 1e-2, **options})
        self.rate = options.rate
        self.optimizer = build_optimizer(self.model, options, CPU)
        statistics = RunningStatistics(self.model)
        self.ema = ModelEma(self.model, statistics, ema) if ema else None
        self.learner = Learner(self.model, self.optimizer, statistics, self.ema)
        self.reports = []

    def epoch(self, batches, accumulate_steps=1, grad_clip=0.0, ask=None, sums=None, steps=None, start_step=0, **given):
        """Train; ``ask`` gives (stop, save) before each batch. Returns the sums and the finished steps."""
        self.learner.accumulate_steps, self.learner.grad_clip = accumulate_steps, grad_clip
        sums, requests, done = sums or TrainSums.start(self.loss, CPU), Requests(), []

        def taken():
            for one in batches:
                requests.stop, requests.save = ask() if ask else (False, False)
                yield one

        given = {"start_step": start_step, "requests": requests, **given}
        rates = given.pop("rates", [self.rate] * (steps or len(batches)))
        for step in train_steps(self.learner, taken(), self.loss, sums, rates, **given):
            done.append(step)
            self.reports.append(step)
        return SimpleNamespace(sums=sums, steps=done)

    def validation(self, batches):
        sums, sizes = ValidationSums(MARKERS, CPU), []
        sizes += validate(self.model, batches, self.loss, sums, Precision())
        return sums.reduced(self.loss), sizes

    def state(self):
        """Everything that a skipped step must leave alone, by name; the count of forward passes is no such thing."""
        found = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        if self.ema:
            found |= {f"ema.{name}": value for name, value in self.ema.model.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{index}.{name}": value for name, value in moments.items()}
        return {name: value.clone() for name, value in found.items() if not name.endswith("num_batches_tracked")}

    def gradients(self):
        return {name: p.grad.clone() for name, p in self.model.named_parameters()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert not [name for name in first if not torch.equal(first[name], second[name])]


def test_two_half_batches_accumulated_give_the_gradient_of_the_whole_batch():
    # The masks of the halves differ in size, and a correlation is that of a batch.
    weights = {**ALL_TERMS, "boundary": 0.0, "correlation": 0.0}
    halves = [batch(1, 3), batch(2, 3)]
    split, whole = Trained("group", weights), Trained("group", weights)
    in_parts = split.epoch(halves, accumulate_steps=2)
    at_once = whole.epoch([joined(halves)])
    for name, gradient in split.gradients().items():
        torch.testing.assert_close(gradient, whole.gradients()[name], atol=1e-6, rtol=1e-5)
    assert in_parts.sums.reduced()["grad_norm"] == pytest.approx(at_once.sums.reduced()["grad_norm"], abs=1e-6)
    assert in_parts.sums.reduced()["loss"] == pytest.approx(at_once.sums.reduced()["loss"], abs=1e-6)


def test_an_incomplete_last_window_is_averaged_over_its_own_batches():
    batches = [batch(seed) for seed in range(3)]
    accumulated, plain = Trained("group"), Trained("group")
    accumulated.epoch(batches, accumulate_steps=2)
    # The first two batches, then the third alone: the gradients left behind are the third's.
    plain.epoch(batches[:2], accumulate_steps=2)
    plain.epoch(batches[2:])
    for name, gradient in accumulated.gradients().items():
        torch.testing.assert_close(gradient, plain.gradients()[name], atol=1e-7, rtol=1e-6)


def test_the_reported_loss_and_terms_are_the_means_over_the_batches():
    trained = Trained("group", learning_rate=1e-12)
    batches = [batch(seed) for seed in range(3)]
    with torch.no_grad():
        expected = [trained.loss(trained.model(b.he), b.target, b.boundary) for b in batches]
    found = trained.epoch(batches).sums.reduced()
    assert found["loss"] == pytest.approx(np.mean([float(value) for value, _ in expected]), rel=1e-5)
    for term, value in found["terms"].items():
        assert value == pytest.approx(np.mean([float(terms[term]) for _, terms in expected]), rel=1e-5)


def test_a_term_of_weight_zero_is_reported_as_none():
    found = Trained(weights={"mse": 1.0}).epoch([batch(0)]).sums.reduced()
    assert found["terms"]["mse"] == pytest.approx(found["loss"])
    assert [name for name, value in found["terms"].items() if value is None] == [
        "l1", "boundary", "focal", "variance", "correlation",
    ]  # fmt: skip


def spoiled(seed, where="target"):
    bad = batch(seed)
    getattr(bad, where)[1, 0, 3, 3] = math.nan
    return bad


@pytest.mark.parametrize("where", ["target", "he"])
def test_a_batch_with_nan_changes_nothing_bit_for_bit(where):
    trained = Trained(ema=0.9)
    trained.epoch([batch(seed) for seed in range(4)])
    before = trained.state()
    after = trained.epoch([spoiled(9, where)])
    assert_same(before, trained.state())
    assert after.sums.reduced()["skipped_steps"] == 1
    assert after.sums.reduced()["loss"] is None


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (1, 2, 0)])
def test_one_batch_with_nan_spoils_the_whole_step_it_belongs_to(order):
    trained = Trained(ema=0.9)
    trained.epoch([batch(seed) for seed in range(4)])
    before = trained.state()
    batches = [spoiled(9), batch(5), batch(6)]
    after = trained.epoch([batches[index] for index in order], accumulate_steps=3)
    assert_same(before, trained.state())
    assert after.sums.reduced()["skipped_steps"] == 1
    # What is known of the two good batches is counted.
    assert math.isfinite(after.sums.reduced()["loss"])


def test_training_after_a_skipped_step_goes_on_as_if_it_had_not_been():
    with_bad, without = Trained(ema=0.9), Trained(ema=0.9)
    good = [batch(seed) for seed in range(4)]
    found = with_bad.epoch([*good[:2], spoiled(9), *good[2:]]).sums.reduced()
    expected = without.epoch(good).sums.reduced()
    assert_same(with_bad.state(), without.state())
    assert found == {**expected, "skipped_steps": 1}


def test_a_bad_step_is_reported_with_its_terms_and_cores():
    trained = Trained(weights={"mse": 1.0, "l1": 0.5, "variance": 0.1})
    trained.epoch([batch(0), spoiled(7), batch(1)])
    assert [report.bad for report in trained.reports] == [False, True, False]
    bad = trained.reports[1]
    # A target that is no number spoils what compares with it, and not the spread of the prediction.
    assert (bad.step, set(bad.culprits), bad.cores) == (1, {"mse", "l1"}, (70, 71))
    assert math.isnan(bad.loss)
    assert [math.isfinite(report.loss) for report in trained.reports] == [True, False, True]


def test_a_gradient_that_is_not_finite_skips_the_step_although_the_loss_is():
    trained = Trained(ema=0.9)
    trained.epoch([batch(0)])
    before = trained.state()
    handle = trained.model.head.weight.register_hook(lambda gradient: gradient * math.inf)
    found = trained.epoch([batch(1)])
    handle.remove()
    assert_same(before, trained.state())
    assert trained.reports[-1].bad
    assert math.isfinite(trained.reports[-1].loss)
    assert found.sums.reduced()["skipped_steps"] == 1


def test_an_overflow_of_the_scaled_gradient_is_told_from_a_loss_that_is_not_finite():
    trained = Trained()
    trained.learner.precision = Precision(None, torch.amp.GradScaler("cpu", init_scale=2.0**13))
    handle = trained.model.head.weight.register_hook(lambda gradient: gradient * math.inf)
    trained.epoch([batch(0)])
    handle.remove()
    trained.epoch([batch(1), spoiled(2)])
    overflow, fine, not_finite = trained.reports
    assert (overflow.bad, overflow.overflow) == (True, True)
    assert (fine.bad, fine.overflow) == (False, False)
    assert (not_finite.bad, not_finite.overflow, set(not_finite.culprits) >= {"mse"}) == (True, False, True)
    assert trained.learner.precision.scaler.get_scale() == 2.0**11


def test_ten_bad_steps_in_a_row_are_divergence():
    trained = Trained()
    trained.epoch([spoiled(seed) for seed in range(DIVERGED_AFTER - 1)] + [batch(0)])
    trained.epoch([spoiled(0), batch(0)] * DIVERGED_AFTER)
    before = trained.state()
    with pytest.raises(Diverged, match="10 steps in a row"):
        trained.epoch([spoiled(seed) for seed in range(DIVERGED_AFTER)])
    assert_same(before, trained.state())


def test_bad_steps_in_a_row_are_counted_over_an_interruption():
    trained = Trained()
    bad = [spoiled(seed) for seed in range(12)]
    first = trained.epoch(bad[:6], steps=12)
    with pytest.raises(Diverged):
        trained.epoch(bad[6:], steps=12, start_step=6, sums=first.sums)
    assert len(trained.reports) == DIVERGED_AFTER


@pytest.mark.parametrize("clip", [1e-3, 0.05])
def test_clipping_limits_the_gradient_that_the_optimiser_sees(clip):
    clipped, free = Trained(), Trained()
    norm = clipped.epoch([batch(0)], grad_clip=clip).sums.reduced()["grad_norm"]
    free.epoch([batch(0)])
    flat = torch.cat([gradient.flatten() for gradient in free.gradients().values()])
    assert norm == pytest.approx(float(flat.norm()), rel=1e-5)
    assert norm > clip
    # After one step AdamW's first moment is a tenth of the gradient.
    moments = [clipped.optimizer.state[p]["exp_avg"].flatten() for p in clipped.model.parameters()]
    assert float(torch.cat(moments).norm()) == pytest.approx(0.1 * clip, rel=1e-3)


def test_clipping_leaves_a_small_gradient_alone():
    clipped, free = Trained(), Trained()
    clipped.epoch([batch(0)], grad_clip=1e6)
    free.epoch([batch(0)])
    assert_same(clipped.state(), free.state())


def test_the_average_follows_the_weights_after_every_step():
    trained = Trained("group", ema=0.999)
    start = copy.deepcopy(trained.model.state_dict())
    trained.epoch([batch(0)])
    after_one = copy.deepcopy(trained.model.state_dict())
    trained.epoch([batch(1)])
    after_two = trained.model.state_dict()
    # The first decays are 1/10 and 2/11.
    for name, value in trained.ema.model.state_dict().items():
        first = 0.1 * start[name] + 0.9 * after_one[name]
        torch.testing.assert_close(value, 2 / 11 * first + 9 / 11 * after_two[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("asked_at", "accumulate", "stops_after"), [(0, 1, 1), (3, 1, 4), (2, 2, 4), (4, 3, 6)])
def test_a_request_to_stop_is_met_after_the_optimiser_step(asked_at, accumulate, stops_after):
    asked = iter(range(7))
    ended = Trained().epoch(
        [batch(seed) for seed in range(7)], accumulate, ask=lambda: (next(asked) >= asked_at, False)
    )
    assert [step.stop for step in ended.steps] == [False] * (stops_after - 1) + [True]
    assert ended.sums.values[-2] == math.ceil(stops_after / accumulate)


def test_an_epoch_without_a_request_runs_to_its_end():
    ended = Trained().epoch([batch(seed) for seed in range(3)])
    assert [(step.step, step.stop, step.save) for step in ended.steps] == [(step, False, False) for step in range(3)]


def test_a_request_to_save_is_met_once_after_the_optimiser_step():
    asked = iter([False, True, False, False, False, False])
    ended = Trained().epoch([batch(seed) for seed in range(6)], accumulate_steps=3, ask=lambda: (False, next(asked)))
    assert [step.save for step in ended.steps] == [False, False, True, False, False, False]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_epoch_continued_midway_equals_the_uninterrupted_one(accumulate):
    batches = [batch(seed) for seed in range(6)]
    batches[1] = spoiled(1)
    straight, continued = Trained(ema=0.9), Trained(ema=0.9)
    whole = straight.epoch(batches, accumulate_steps=accumulate, grad_clip=0.1)
    calls = iter(range(6))
    first = continued.epoch(batches, accumulate, 0.1, ask=lambda: (next(calls) >= 3, False))
    done = len(first.steps)
    rest = continued.epoch(batches[done:], accumulate, 0.1, steps=6, start_step=done, sums=first.sums)
    assert 0 < done < 6 == done + len(rest.steps)
    assert_same(straight.state(), continued.state())
    assert torch.equal(whole.sums.values, rest.sums.values)
    assert [report.step for report in continued.reports] == list(range(6))


def test_an_optimiser_step_takes_the_rate_and_the_seed_of_its_first_batch(monkeypatch):
    taken = []
    step = engine._optimizer_step

    def note(learner, parameters):
        taken.append((learner.optimizer.param_groups[0]["lr"], torch.initial_seed()))
        return step(learner, parameters)

    monkeypatch.setattr(engine, "_optimizer_step", note)
    rates, seeds = [step / 100 for step in range(7)], list(range(50, 57))
    Trained().epoch([batch(seed) for seed in range(7)], accumulate_steps=3, rates=rates, seeds=seeds)
    assert taken == [(0.0, 50), (0.03, 53), (0.06, 56)]


def test_validation_over_batches_of_any_size_equals_one_batch():
    trained = Trained()
    patches = [batch(seed, 1) for seed in range(7)]
    uneven = [joined(patches[:3]), patches[3], joined(patches[4:6]), patches[6]]
    parts, sizes = trained.validation(uneven)
    whole, _ = trained.validation([joined(patches)])
    assert sizes == [3, 1, 2, 1]
    assert parts.patches == whole.patches == 7
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
    assert parts.terms == pytest.approx(whole.terms, rel=1e-6)
    assert parts.metrics == pytest.approx(whole.metrics, rel=1e-5)
    for marker in MARKERS:
        assert parts.per_channel[marker] == pytest.approx(whole.per_channel[marker], rel=1e-5)


def test_validation_agrees_with_numpy_and_scipy_and_changes_nothing():
    trained = Trained()
    trained.epoch([batch(0)])
    before = trained.state()
    held_out = batch(5, 4)
    found, _ = trained.validation([held_out])
    assert_same(before, trained.state())
    with torch.no_grad():
        p = trained.model.eval()(held_out.he).double().numpy()
    t, mask = held_out.target.double().numpy(), np.broadcast_to(held_out.boundary.numpy(), p.shape)
    error = p - t
    assert found.terms["mse"] == pytest.approx((error**2).mean(), rel=1e-5)
    assert found.terms["l1"] == pytest.approx(abs(error).mean(), rel=1e-5)
    assert found.terms["boundary"] == pytest.approx((error[mask] ** 2).mean(), rel=1e-5)
    assert found.loss == pytest.approx(sum(ALL_TERMS[name] * found.terms[name] for name in ALL_TERMS), rel=1e-9)
    for index, marker in enumerate(MARKERS):
        expected = pearsonr(p[:, index].ravel(), t[:, index].ravel()).statistic
        assert found.per_channel[marker]["pearson"] == pytest.approx(expected, abs=1e-6)


def test_validation_computes_terms_that_are_not_trained_on():
    trained = Trained(weights={"mse": 1.0})
    found, _ = trained.validation([batch(0)])
    assert found.loss == pytest.approx(found.terms["mse"])
    assert all(value is not None and value > 0 for value in found.terms.values())


def test_a_validation_that_is_not_finite_says_so():
    trained = Trained()
    assert not math.isfinite(trained.validation([spoiled(0)])[0].loss)


def test_measured_statistics_are_those_of_torch_and_nothing_else_changes():
    trained = Trained("batch", seed=3)
    trained.epoch([batch(1), batch(2)])
    batches = [batch(seed, size=3) for seed in (5, 6, 7)]
    judge = copy.deepcopy(trained.model)
    torch.optim.swa_utils.update_bn([one.he for one in batches], judge)
    # Dropout in front of a norm would change what it sees.
    trained.model.bottleneck[1].p = 0.5
    before, statistics = trained.state(), trained.learner.statistics
    statistics.flat.fill_(7.0)
    assert len(list(measure_statistics(trained.model, statistics, batches, Precision(), CPU))) == 3
    after, expected = trained.state(), judge.state_dict()
    running = {name for name in after if name.endswith(("running_mean", "running_var"))}
    assert_same(
        {n: v for n, v in after.items() if n not in running}, {n: v for n, v in before.items() if n not in running}
    )
    for name in running:
        torch.testing.assert_close(after[name], expected[name.removeprefix("model.")], rtol=1e-5, atol=1e-6)
    norms = batch_norms(trained.model)
    assert norms and {norm.momentum for norm in norms} == {0.1} and not any(norm.training for norm in norms)


def test_a_measurement_broken_off_leaves_a_model_that_trains_as_before():
    straight, broken_off = Trained("batch"), Trained("batch")
    measured = measure_statistics(
        broken_off.model, broken_off.learner.statistics, [batch(5), batch(6)], Precision(), CPU
    )
    next(measured)
    measured.close()
    for trained in (straight, broken_off):
        trained.epoch([batch(1), batch(2)])
    assert all(
        torch.equal(p, q) for p, q in zip(straight.model.parameters(), broken_off.model.parameters(), strict=True)
    )
    assert {norm.momentum for norm in batch_norms(broken_off.model)} == {0.1}


def test_only_batch_norms_have_statistics_to_measure():
    assert batch_norms(Trained("group").model) == batch_norms(Trained("instance").model) == []
