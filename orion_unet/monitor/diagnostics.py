"""Finds what goes wrong in a run from its loss curves: pure functions, arrays in, findings out.

L is the training loss, V the validation loss. Curves are float arrays in order of epoch; nan means not measured, inf
not finite (a loss written as null).

Absolute thresholds are made for the recipe's loss, which starts at about 1 or below. Where the training loss starts
higher, they are multiplied by that start: in a run that starts at 10, a noise of 0.05 does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from orion_unet.findings import NOTICE, WARNING, Finding, Lines
from orion_unet.monitor import advice
from orion_unet.monitor.noise import WINDOW, noise_window, recent_level, validation_noise
from orion_unet.options import option
from orion_unet.run_log import METRICS_FILE

# How much higher the limit for the noise is where few epochs make the estimate uncertain.
FEW_EPOCHS = 0.7


def _threshold(default: float, text: str) -> Any:
    return option(default, text, minimum=0)


@dataclass(frozen=True)
class Thresholds:
    """thresholds: the numbers above or below which the monitor warns"""

    max_noise: float = _threshold(0.05, "unstable_validation: noise of the validation loss [loss]")
    max_noise_of_loss: float = _threshold(
        0.03, "unstable_validation at any scale: noise as a fraction of the validation loss, and ..."
    )
    max_noise_of_gain: float = _threshold(0.045, "... as a fraction of what the validation loss has gained so far")
    min_improvement: float = _threshold(
        0.05, "slow_convergence: improvement of the training loss over 5 epochs [loss], and ..."
    )
    min_relative_improvement: float = _threshold(0.10, "... the same as a fraction of the loss, and ...")
    min_total_improvement: float = _threshold(0.25, "... improvement since epoch 1, as a fraction")
    max_gap: float = _threshold(0.10, "overfitting: validation minus training loss [loss]; or ...")
    max_relative_gap: float = _threshold(
        0.25, "... the gap as a fraction of the validation loss, when that rises and the gap widens"
    )
    max_error_of_mean: float = _threshold(
        2.0, "worse_than_mean: squared error as a multiple of the means' error, in 5 epochs running"
    )
    divergence_factor: float = _threshold(
        3.0, "diverged: validation loss as a multiple of its best, in two epochs running"
    )
    max_rise: float = _threshold(
        0.10, "rising_steps: rise of the loss of the steps over their last third, as a fraction"
    )
    max_gradient_growth: float = _threshold(10.0, "growing_gradients: gradient norm as a multiple of the earlier one")
    max_non_finite: float = _threshold(0.01, "non_finite_steps: fraction of the recent steps")
    max_skipped: float = _threshold(0.05, "skipped_steps: fraction of the recent steps that overflowed in float16")
    max_data_wait: float = _threshold(0.20, "starving: fraction of the training time spent waiting for data")
    max_memory: float = _threshold(0.95, "memory: fraction of the device's memory")
    stalled_after: float = _threshold(
        30.0, "stalled: age of the heartbeat, or time without progress if steps are short [s]"
    )


def diagnose(
    epochs: np.ndarray,
    train: np.ndarray,
    val: np.ndarray,
    thresholds: Thresholds | None = None,
    options: Mapping[str, Any] | None = None,
    r2: np.ndarray | None = None,
    rate: np.ndarray | None = None,
) -> list[Finding]:
    """Judge the curves of a run (each of shape (E,)); returns the findings, the worst first.

    ``options`` are the run's own, with ``automatic_learning_rate`` where it is known: advice does not name what the
    run already does. ``r2`` (E,) is the share of the markers' variance that the predictions explain in validation,
    ``rate`` (E,) the learning rate.
    """
    limits = thresholds or Thresholds()
    options = options or {}
    r2 = np.full(len(val), np.nan) if r2 is None else r2
    rate = np.full(len(val), np.nan) if rate is None else rate
    found = [_diverged(epochs, train, val, limits, options), _unstable(epochs, train, val, limits, options)]
    calm = found[0] is None and found[1] is None
    found.append(_worse_than_mean(epochs, r2, limits, options, calm))
    found.append(_overfitting(epochs, train, val, limits, options))
    falling = options.get("scheduler") == "cosine"
    slow = None if falling and _nearly_over(rate) else _slow(epochs, train, r2, limits, options, calm)
    # A plateau waits for smaller steps, and a falling rate brings them.
    found.append(None if falling and slow is not None and slow.code == "plateau" else slow)
    return [finding for finding in found if finding is not None]


def noise_and_limit(train: np.ndarray, val: np.ndarray, limits: Thresholds) -> tuple[float, float]:
    """Noise of V and the limit for it, both in units of the loss; nan where there are too few epochs."""
    noise, now = validation_noise(val, train), recent_level(val)
    if not (math.isfinite(noise) and math.isfinite(now)):
        return math.nan, math.nan
    relative = max(limits.max_noise_of_loss * abs(now), limits.max_noise_of_gain * _gain(val))
    # Few epochs make an uncertain estimate: the limit is 23 % higher at eight epochs, 3 % higher at thirty.
    relative *= 1 + FEW_EPOCHS / (len(noise_window(val)) - 3)
    return noise, min(limits.max_noise * loss_scale(train), relative)


def loss_scale(train: np.ndarray) -> float:
    """What absolute thresholds are multiplied by: the first training loss, but at least 1."""
    finite = train[np.isfinite(train)]
    return max(1.0, abs(float(finite[0]))) if len(finite) else 1.0


def _gain(val: np.ndarray) -> float:
    """How far V has fallen, from the median of its first three epochs to that of its last five; at least 0."""
    first = val[:3][np.isfinite(val[:3])]
    return max(float(np.median(first)) - recent_level(val), 0.0) if len(first) else math.nan


def _diverged(
    epochs: np.ndarray, train: np.ndarray, val: np.ndarray, limits: Thresholds, options: Mapping[str, Any]
) -> Finding | None:
    for name, values in (("training", train), ("validation", val)):
        broken = np.flatnonzero(np.isinf(values[-WINDOW:]))
        if len(broken):
            epoch = int(epochs[-WINDOW:][broken[0]])
            return Finding(
                "diverged",
                WARNING,
                f"the {name} loss of epoch {epoch} is not finite",
                advice=advice.diverged(options),
                lines=_lines(epochs[-WINDOW:]),
            )
    finite = np.isfinite(val)
    epochs, val = epochs[finite], val[finite]
    if len(val) < 3:
        return None
    best = np.minimum.accumulate(val)
    high = (best > 0) & (val > limits.divergence_factor * best)
    running = np.flatnonzero(high[-WINDOW:][1:] & high[-WINDOW:][:-1])
    if not len(running):
        return None
    at = len(val) - len(high[-WINDOW:]) + int(running[-1]) + 1
    factor = float(val[at] / best[at])
    return Finding(
        "diverged",
        WARNING,
        f"validation loss {val[at - 1]:.4g} and {val[at]:.4g} in epochs {int(epochs[at - 1])} and "
        f"{int(epochs[at])}, {factor:.3g} times its best ({best[at]:.4g})",
        factor,
        limits.divergence_factor,
        advice.diverged(options),
        _lines(epochs[int(val[: at + 1].argmin()) : at + 1]),
    )


def _unstable(
    epochs: np.ndarray, train: np.ndarray, val: np.ndarray, limits: Thresholds, options: Mapping[str, Any]
) -> Finding | None:
    noise, threshold = noise_and_limit(train, val, limits)
    if not noise > threshold:
        return None
    level, gain = abs(recent_level(val)), _gain(val)
    recent = val[-WINDOW:][np.isfinite(val[-WINDOW:])]
    of_gain = f"{noise / gain:.0%} of what it has gained" if gain > noise else "as much as it has gained"
    share = f"{noise / level:.0%} of it, {of_gain}" if level > 0 else of_gain
    return Finding(
        "unstable_validation",
        WARNING,
        f"validation loss jumps around its trend by {noise:.2g} (standard deviation; {share}), between "
        f"{recent.min():.4g} and {recent.max():.4g} in epochs {_span(epochs)}",
        noise,
        threshold,
        advice.unstable(options),
        _lines(epochs[-len(noise_window(val)) :]),
    )


def _overfitting(
    epochs: np.ndarray, train: np.ndarray, val: np.ndarray, limits: Thresholds, options: Mapping[str, Any]
) -> Finding | None:
    both = np.isfinite(train) & np.isfinite(val)
    epochs, train, val = epochs[both], train[both], val[both]
    if len(val) < WINDOW or epochs[-1] < WINDOW:
        return None
    # The first two epochs are left out: V is often poor then, and L averages over the steepest descent.
    first = max(2, len(val) - WINDOW)
    level, gap = _centre(val[first:]), _centre((val - train)[first:])
    threshold = limits.max_gap * loss_scale(train)
    if gap > threshold:
        message = f"validation loss {level:.4g} is {gap:.3g} above the training loss in epochs {_span(epochs[first:])}"
        lines = _lines(epochs[first:])
        return Finding("overfitting", WARNING, message, gap, threshold, advice.overfitting(options), lines)
    smooth = _median3(val)
    gaps = smooth - _median3(train)
    now, gap, best = float(smooth[-1]), float(gaps[-1]), int(smooth.argmin())
    if now <= 0 or gap <= limits.max_relative_gap * now:
        return None
    # V must have risen, and the gap widened, by more than the noise of a median of three epochs.
    noise = validation_noise(val, train)
    margin = max(0.04 * now, min(2 * noise, 0.12 * now) if math.isfinite(noise) else 0.0)
    if len(smooth) - best < 3 or now - smooth[best] < margin or gap - gaps[best] < margin:
        return None
    return Finding(
        "overfitting",
        WARNING,
        f"validation loss {now:.4g} is {gap:.3g} above the training loss ({gap / now:.0%} of it) and rises: "
        f"around epoch {int(epochs[best + 1])} it was {smooth[best]:.4g}, {gaps[best]:.3g} above",
        gap,
        limits.max_relative_gap * now,
        advice.overfitting(options),
        _lines(epochs[best:]),
    )


def _worse_than_mean(
    epochs: np.ndarray, r2: np.ndarray, limits: Thresholds, options: Mapping[str, Any], calm: bool
) -> Finding | None:
    """From epoch 6 on, and even if the loss falls: one number per marker would predict better."""
    error = 1 - r2[-WINDOW:]
    if len(r2) < WINDOW or epochs[-1] <= WINDOW or not (np.isfinite(error) & (error > limits.max_error_of_mean)).all():
        return None
    return Finding(
        "worse_than_mean",
        WARNING,
        f"squared error {error.min():.3g} to {error.max():.3g} times that of predicting each marker's mean in epochs "
        f"{_span(epochs)}: the network has learnt nothing useful yet",
        float(error[-1]),
        limits.max_error_of_mean,
        advice.worse_than_mean(options, calm),
        _lines(epochs[-WINDOW:]),
    )


def _centre(values: np.ndarray) -> float:
    """The mean without the highest and the lowest value: one epoch cannot decide, and alternating jumps cancel."""
    return float(np.sort(values)[1:-1].mean())


def _median3(values: np.ndarray) -> np.ndarray:
    """Running median of three epochs, (E - 2,)."""
    before, here, after = values[:-2], values[1:-1], values[2:]
    return np.maximum(np.minimum(before, here), np.minimum(np.maximum(before, here), after))


def _nearly_over(rate: np.ndarray) -> bool:
    """Whether the learning rate has fallen below a tenth of its highest."""
    known = rate[np.isfinite(rate)]
    return len(known) > 0 and bool(known[-1] < 0.1 * known.max())


def _slow(
    epochs: np.ndarray, train: np.ndarray, r2: np.ndarray, limits: Thresholds, options: Mapping[str, Any], calm: bool
) -> Finding | None:
    # A network that starts at the markers' means has learnt what it explains of their variance, even if most of that
    # happened within epoch 1, where the loss curve cannot show it.
    explained = recent_level(r2)
    finite = np.isfinite(train)
    epochs, train = epochs[finite], train[finite]
    if len(train) <= WINDOW or epochs[-1] <= WINDOW:
        return None
    recent = train[-WINDOW - 1 :]
    # A least-squares line through six epochs: the difference of two epochs alone would be as noisy as they are.
    gained = -float(np.polyfit(np.arange(WINDOW + 1), recent, 1)[0]) * WINDOW
    before = float(recent.mean()) + gained / 2
    scale = max(abs(before), 1e-12)
    total = (float(train[0]) - float(train.min())) / max(abs(float(train[0])), 1e-12)
    threshold = limits.min_improvement * loss_scale(train)
    if gained >= threshold or gained / scale >= limits.min_relative_improvement:
        return None
    change = (
        f"training loss improved by {max(gained, 0.0):.2g} ({max(gained / scale, 0.0):.1%}) in epochs "
        f"{int(epochs[-WINDOW - 1])} to {int(epochs[-1])}, by {total:.0%} since epoch {int(epochs[0])}"
    )
    lines = _lines(epochs[-WINDOW - 1 :])
    if total >= limits.min_total_improvement or explained >= limits.min_total_improvement:
        message = f"converged, or waiting for a lower rate: {change}"
        return Finding("plateau", NOTICE, message, gained, threshold, lines=lines)
    return Finding("slow_convergence", WARNING, change, gained, threshold, advice.slow(options, calm), lines)


def _lines(epochs: np.ndarray) -> Lines:
    """The lines of these epochs, from the first to the last."""
    return Lines(METRICS_FILE, (int(epochs[0]),), (int(epochs[-1]),))


def _span(epochs: np.ndarray) -> str:
    recent = epochs[-WINDOW:]
    return f"{int(recent[0])} to {int(recent[-1])}"
