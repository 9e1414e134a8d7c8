"""Each rule of the monitor at its threshold, on curves whose right answer is known."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from monitor_runs import former_losses, healthy_losses

from orion_unet.monitor import advice
from orion_unet.monitor.advice import judge_config
from orion_unet.monitor.diagnostics import Thresholds, diagnose
from orion_unet.monitor.noise import validation_noise
from orion_unet.training import optim

DATA = Path(os.environ.get("ORION_SHARED_DATA", Path(__file__).parents[2] / "../shared/data"))


def find(train, val, **thresholds):
    epochs = np.arange(1, len(val) + 1)
    found = diagnose(epochs, np.array(train, float), np.array(val, float), Thresholds(**thresholds))
    return {finding.code: finding for finding in found}


def warnings(train, val):
    return sorted(code for code, finding in find(train, val).items() if finding.severity == "warning")


def test_a_healthy_run_stays_silent_at_every_epoch():
    train, val = healthy_losses(25)
    assert [warnings(train[:n], val[:n]) for n in range(1, 26)] == [[]] * 25


def test_a_converged_run_is_a_notice():
    train, val = healthy_losses(60)
    found = find(train, val)
    assert list(found) == ["plateau"] and found["plateau"].severity == "notice"


def test_every_fault_of_the_former_run_is_found():
    train, val = former_losses()
    assert warnings(train, val) == ["overfitting", "slow_convergence", "unstable_validation"]
    config = {"options": {"learning_rate": 5e-4}, "global_batch": 12}
    assert [finding.code for finding in judge_config(config)] == ["learning_rate"]


@pytest.mark.parametrize("phase", [0, 1])
@pytest.mark.parametrize("epochs", [20, 21])
def test_alternating_jumps_do_not_hide_the_gap(phase, epochs):
    val = [(0.43, 0.54)[(e + phase) % 2] for e in range(epochs)]
    train = [0.422 - 0.077 * e / (epochs - 1) for e in range(epochs)]
    assert warnings(train, val) == ["overfitting", "slow_convergence", "unstable_validation"]


@pytest.mark.parametrize("scale", [0.01, 0.1, 1, 10])
@pytest.mark.parametrize("name", ["healthy", "former"])
def test_the_scale_of_the_loss_does_not_change_what_is_unstable(name, scale):
    train, val = healthy_losses(25) if name == "healthy" else former_losses()
    scaled = find(np.array(train) * scale, np.array(val) * scale)
    assert ("unstable_validation" in scaled) == (name == "former")


def test_noise_is_the_standard_deviation_around_the_trend():
    rng = np.random.default_rng(0)
    trend = 0.3 + 0.4 * np.exp(-np.arange(200) / 8)
    measured = [
        validation_noise((trend * (1 + 0.05 * rng.standard_normal(200)))[:end])
        for end in (40, 80, 120, 200)
        for _ in range(50)
    ]
    # The epoch left out is the farthest, so the estimate is a little low.
    assert np.mean(measured) == pytest.approx(0.05 * 0.3, rel=0.15)


def test_neither_descent_nor_bend_nor_a_single_blip_is_noise():
    steep = 0.05 + 0.95 * np.exp(-np.arange(20) / 4)
    assert validation_noise(steep) < 0.01 * steep[-1]
    blip = steep.copy()
    blip[14] *= 2
    assert validation_noise(blip) == pytest.approx(validation_noise(steep), abs=0.01 * steep[-1])
    assert "unstable_validation" not in find(steep * 0.95, blip)


def test_in_short_runs_what_v_shares_with_the_training_loss_is_no_noise():
    epochs = np.arange(10)
    train = 0.2 + 0.8 * np.exp(-epochs / 4)
    # A fall that no straight line or parabola follows, in both losses, and a slow drift of V alone.
    train[6:] *= 0.8
    val = 1.1 * train**0.9 * np.exp(0.01 * epochs)
    assert validation_noise(val) > 0.02 * val[-1]
    assert validation_noise(val, train) < 1e-9
    # The same by least squares, for every epoch left out once.
    noisy = val * np.exp(0.05 * np.random.default_rng(0).standard_normal(10))
    columns = np.stack([np.ones(8), epochs[2:], np.log(train[2:])], axis=1)
    sums = []
    for out in range(8):
        kept = np.delete(np.arange(8), out)
        sums.append(np.linalg.lstsq(columns[kept], np.log(noisy[2:])[kept], rcond=None)[1][0])
    expected = math.sqrt(min(sums) / 4) * np.median(noisy[-5:])
    assert validation_noise(noisy, train) == pytest.approx(expected)


@pytest.mark.parametrize("loss", [np.nan, np.inf, 0.0, -1.0])
def test_a_training_loss_that_tells_nothing_changes_no_noise(loss):
    rng = np.random.default_rng(1)
    val = 0.5 + 0.03 * rng.standard_normal(11)
    train = np.linspace(1, 0.5, 11)
    train[5] = loss
    assert validation_noise(val, train) == validation_noise(val)
    for straight in (np.full(11, 0.3), np.exp(-np.arange(11.0))):
        assert validation_noise(val, straight) == validation_noise(val)
    longer = np.tile(val, 2)
    assert validation_noise(longer, rng.uniform(0.1, 1, 22)) == validation_noise(longer)


def test_noise_that_has_died_away_is_no_warning():
    rng = np.random.default_rng(3)
    val = 0.3 * (1 + 0.2 * rng.standard_normal(40))
    assert "unstable_validation" in find(val * 0.9, val)
    calm = np.concatenate([val, np.full(10, 0.3) + 0.001 * rng.standard_normal(10)])
    assert "unstable_validation" not in find(calm * 0.9, calm)


def test_noise_above_the_absolute_threshold_is_unstable():
    val = np.array([1.0 + 0.06 * (-1) ** e for e in range(20)])
    train = np.ones(20)
    found = find(train, val, max_noise_of_loss=1.0)
    assert found["unstable_validation"].threshold == 0.05
    assert found["unstable_validation"].value == pytest.approx(0.06, rel=0.2)
    assert "unstable_validation" not in find(train, val, max_noise_of_loss=1.0, max_noise=0.1)


def test_slow_convergence_begins_at_epoch_6_and_needs_all_three_conditions():
    slow = [0.4 - 0.003 * e for e in range(8)]
    assert "slow_convergence" not in find(slow[:5], slow[:5])
    found = find(slow[:6], slow[:6])["slow_convergence"]
    assert found.value == pytest.approx(0.015) and found.threshold == 0.05
    by_tenth = [0.4 * 0.97**e for e in range(8)]
    assert "slow_convergence" not in find(by_tenth, by_tenth)
    by_amount = [0.9 - 0.011 * e for e in range(8)]
    assert "slow_convergence" not in find(by_amount, by_amount)
    before = [0.8, 0.6, *slow]
    assert list(find(before, before)) == ["plateau"]


def test_a_gap_above_a_tenth_is_overfitting_from_epoch_5_on():
    train = [0.4 - 0.02 * e for e in range(8)]
    val = [t + 0.11 for t in train]
    assert "overfitting" not in find(train[:4], val[:4])
    assert find(train[:5], val[:5])["overfitting"].value == pytest.approx(0.11)
    assert "overfitting" not in find(train, [t + 0.09 for t in train])


def test_a_rising_validation_loss_is_overfitting_however_small_the_loss():
    train = np.array([0.01 * 0.88**e for e in range(20)])
    val = np.concatenate([train[:8], train[8] * np.linspace(1, 1.4, 12)])
    assert "overfitting" in find(train, val)
    assert "overfitting" not in find(train, np.concatenate([train[:8], np.full(12, train[8])]))


def test_one_bad_epoch_is_not_overfitting():
    train, val = healthy_losses(20)
    val[-1] *= 3
    assert "overfitting" not in find(train, val)


@pytest.mark.parametrize("where", ["train", "val"])
def test_a_loss_that_is_not_finite_is_divergence_with_its_epoch(where):
    train, val = healthy_losses(10)
    (train if where == "train" else val)[8] = math.inf
    assert "epoch 9" in find(train, val)["diverged"].message


def test_a_loss_not_measured_is_no_divergence():
    train, val = healthy_losses(10)
    val[4:] = [math.nan] * 6
    assert "diverged" not in find(train, val)


def test_two_epochs_above_three_times_the_best_are_divergence_and_one_is_not():
    train, val = healthy_losses(12)
    once = [*val, 3.1 * min(val)]
    assert "diverged" not in find([*train, train[-1]], once)
    found = find([*train, train[-1], train[-1]], [*once, 3.2 * min(val)])["diverged"]
    assert found.value == pytest.approx(3.2) and found.threshold == 3


def test_advice_leaves_out_what_the_run_does_already():
    train, val = former_losses()
    options = {"learning_rate": 4e-5, "batch_size": 16, "variance_weight": 0, "val_split": 0.3, "base_features": 16}
    epochs = np.arange(1, 21)
    found = {f.code: f for f in diagnose(epochs, np.array(train), np.array(val), options=options)}
    assert found["unstable_validation"].advice[0] == "--learning_rate 2e-5"
    assert not any("--batch_size" in item for item in found["unstable_validation"].advice)
    assert found["overfitting"].advice == ("--weight_decay 0.001",)


def test_advice_for_divergence_leaves_out_what_the_run_does_already():
    losses = (np.arange(1, 4), np.full(3, math.inf), np.ones(3))
    (found,) = diagnose(*losses, options={"learning_rate": 1e-5, "grad_clip": 0, "focal_weight": 0.1})
    assert found.advice == ("--grad_clip 1", "--variance_weight 0", "--focal_weight 0")
    (found,) = diagnose(*losses, options={"learning_rate": 1e-5, "grad_clip": 0.5, "variance_weight": 0})
    assert found.advice == ()


@pytest.mark.parametrize(
    ("options", "batch", "code"),
    [
        ({"learning_rate": 5e-4}, 12, "learning_rate"),
        ({}, 7, "global_batch"),
        ({"focal_weight": 0.1}, 12, "focal_weight"),
        ({"variance_weight": 0.31}, 12, "variance_weight"),
        ({"variance_form": "exponential"}, 12, "variance_form"),
        ({"val_split": 0.19}, 12, "val_split"),
        ({"early_stopping_patience": 0}, 12, "early_stopping_patience"),
        ({"epochs": 19}, 12, "epochs"),
    ],
)
def test_each_option_of_concern_is_found_alone(options, batch, code):
    recipe = {"learning_rate": 1e-4, "focal_weight": 0.0, "variance_weight": 0.1, "variance_form": "target"}
    recipe |= {"val_split": 0.2, "early_stopping_patience": 10, "epochs": 30}
    assert judge_config({"options": recipe, "global_batch": 8}) == []
    assert [f.code for f in judge_config({"options": recipe | options, "global_batch": batch})] == [code]


@pytest.mark.parametrize("config", [{}, {"options": 3}, {"options": {"learning_rate": "high", "epochs": True}}])
def test_a_configuration_without_usable_options_gives_no_findings(config):
    assert judge_config(config) == []


@pytest.mark.parametrize(
    ("rate", "said"),
    [(9e-4, "low"), (1e-3, None), (4e-3, None), (3.2e-2, None), (3.3e-2, "high")],
)
def test_a_rate_is_judged_by_the_number_of_steps_if_that_is_known(rate, said):
    known = {"automatic_learning_rate": 8e-3, "optimiser_steps": 1000}
    found = judge_config({"options": {"learning_rate": rate}, **known})
    assert [f.code for f in found] == ([] if said is None else ["learning_rate"])
    if said:
        assert f"learning rate {rate:g} is {said} for the length of the run" in found[0].message
        assert found[0].advice == ("--learning_rate auto",)


def test_a_low_rate_is_no_concern_if_there_are_many_steps():
    known = {"automatic_learning_rate": 1e-4, "optimiser_steps": 1_000_000}
    assert judge_config({"options": {"learning_rate": 1e-5}, **known}) == []


def test_a_run_that_jumps_gets_no_notice_that_its_rate_is_low():
    config = {"options": {"learning_rate": 1e-4}, "automatic_learning_rate": 1e-2, "optimiser_steps": 500}
    assert [f.code for f in judge_config(config)] == ["learning_rate"]
    assert judge_config(config, calm=False) == []


def test_monitor_and_trainer_mean_the_same_by_a_low_rate():
    assert (advice.MUCH_LOWER, advice.LITTLE_TRAVEL) == (optim.MUCH_LOWER, optim.LITTLE_TRAVEL)


@pytest.mark.parametrize("rate", [1e-2, 5e-3, 2e-3, 5e-4])
def test_advice_for_jumps_never_asks_for_a_rate_that_would_be_called_low(rate):
    train, val = former_losses()
    options = {"learning_rate": rate, "automatic_learning_rate": 1e-2, "scheduler": "plateau"}
    found = {f.code: f for f in diagnose(np.arange(1, 21), np.array(train), np.array(val), options=options)}
    advice = found["unstable_validation"].advice
    assert "--ema_decay 0.95" in advice and "--scheduler cosine" in advice
    lower = [float(item.split()[1]) for item in advice if item.startswith("--learning_rate")]
    assert lower == ([pytest.approx(rate / 4, rel=0.3)] if rate >= 5e-3 else [])
    config = {"options": {"learning_rate": lower[0]}} if lower else {}
    assert judge_config(config | {"automatic_learning_rate": 1e-2, "optimiser_steps": 500}) == []


def test_a_run_worse_than_the_means_that_jumps_is_not_advised_a_higher_rate():
    train, val = (np.array(losses) for losses in former_losses())
    options = {"learning_rate": 5e-4, "automatic_learning_rate": 1e-2}
    found = {f.code: f for f in diagnose(np.arange(1, 21), train, val, None, options, np.full(20, -9.0))}
    assert "unstable_validation" in found
    assert "--learning_rate auto" not in found["worse_than_mean"].advice


def test_a_rate_scheduled_to_fall_to_zero_gives_no_plateau():
    train, val = healthy_losses(60)
    curves = (np.arange(1, 61), np.array(train), np.array(val))
    falling = 5e-3 * (1 + np.cos(np.pi * np.arange(60) / 59))
    assert [f.code for f in diagnose(*curves, options={"scheduler": "plateau"}, rate=falling)] == ["plateau"]
    assert diagnose(*curves, options={"scheduler": "cosine"}, rate=falling) == []
    # A run that never learnt is slow while its rate is high; at its end the rate is no longer the cause.
    flat = np.full(60, 0.3)
    for epochs, codes in ((20, ["slow_convergence"]), (60, [])):
        found = diagnose(curves[0][:epochs], flat[:epochs], flat[:epochs], None, {"scheduler": "cosine"}, None,
                         falling[:epochs])  # fmt: skip
        assert [f.code for f in found] == codes


def test_a_network_that_learnt_within_its_first_epoch_is_not_slow():
    epochs, flat = np.arange(1, 13), np.full(12, 0.06)
    assert [f.code for f in diagnose(epochs, flat, flat, r2=np.full(12, 0.24))] == ["slow_convergence"]
    assert [f.code for f in diagnose(epochs, flat, flat, r2=np.full(12, 0.26))] == ["plateau"]


def judged_by_r2(r2, options=None, **thresholds):
    """The codes found in a run whose losses are healthy, and the finding on its error."""
    train, val = (np.array(losses) for losses in healthy_losses(len(r2)))
    epochs = np.arange(1, len(r2) + 1)
    found = {f.code: f for f in diagnose(epochs, train, val, Thresholds(**thresholds), options, np.array(r2))}
    return set(found), found.get("worse_than_mean")


def test_an_error_of_twice_that_of_the_means_is_a_warning_even_if_the_loss_falls():
    codes, found = judged_by_r2([-9.0] * 4 + [-5, -2, -1.5, -1.4, -1.2, -1.1])
    assert codes == {"worse_than_mean"} and found.severity == "warning"
    assert found.value == pytest.approx(2.1) and found.threshold == 2
    assert "2.1 to 3 times" in found.message and "epochs 6 to 10" in found.message
    # No warning if it is as bad as the means, better in one of the last five epochs, too early, or not measured.
    for r2 in ([-0.9] * 10, [-9.0] * 9 + [-0.9], [-9.0] * 5, [-9.0] * 9 + [math.nan]):
        assert judged_by_r2(r2)[0] == set()
    assert judged_by_r2([-0.9] * 10, max_error_of_mean=1.8)[0] == {"worse_than_mean"}


def test_advice_for_a_useless_network_names_only_what_the_run_does_differently():
    former = {"output_start": "half", "variance_form": "exponential", "variance_weight": 0.5, "learning_rate": 5e-4}
    found = judged_by_r2([-9.0] * 10, former | {"automatic_learning_rate": 8e-3})[1]
    assert found.advice[:-1] == ("--output_start mean", "--variance_form target", "--learning_rate auto")
    assert "check-data" in found.advice[-1]
    recipe = {"output_start": "mean", "variance_form": "target", "learning_rate": 8e-3}
    assert judged_by_r2([-9.0] * 10, recipe | {"automatic_learning_rate": 8e-3})[1].advice == found.advice[-1:]


def test_a_slow_run_is_advised_the_automatic_rate_if_that_is_known():
    epochs, flat = np.arange(1, 13), np.full(12, 0.3)
    for known, first in (
        (8e-3, "--learning_rate auto"),
        (1e-4, "--learning_rate 2e-4"),
        (None, "--learning_rate 2e-4"),
    ):
        options = {"learning_rate": 1e-4, "automatic_learning_rate": known}
        assert diagnose(epochs, flat, flat, options=options)[0].advice[0] == first


@pytest.mark.parametrize("name", ["isl_former_0", "isl_stable10_1", "real_former_0", "real_stable10_1"])
def test_labelled_real_curves_are_judged_as_a_person_would(name):
    path = DATA / "curves" / f"{name}.json"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    curve = json.loads(path.read_text())
    assert warnings(curve["train_loss"], curve["val_loss"]) == sorted(curve["expected"])


def test_a_run_of_a_fold_gets_no_advice_on_the_fraction_held_out():
    assert judge_config({"options": {"val_split": 0.15, "fold": "1/5"}}) == []
    train, val = former_losses()
    found = {
        f.code: f
        for f in diagnose(np.arange(1, 21), np.array(train), np.array(val), options={"val_split": 0.2, "fold": "1/5"})
    }
    assert not any("val_split" in item for item in found["overfitting"].advice)
