"""The rule of a learning-rate range test: losses at growing rates in, a suggested rate out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Half the width of the smoothing window, as a share of the planned steps, and in steps at least.
# A narrower window leaves the place of the steepest descent to noise.
HALF_WINDOW, SMALLEST_HALF_WINDOW = 1 / 10, 2
# Losses whose mean decides whether the loss has grown, at least.
SMALLEST_RECENT = 4
# The loss has grown well beyond its lowest value above this multiple of it.
GROWN = 1.5
# The smoothed loss must have fallen by so many standard deviations of single losses about it.
CLEAR_FALL = 1.5


@dataclass(frozen=True)
class Suggestion:
    """What a range test says.

    ``rate`` is the rate at the steepest descent of the smoothed loss, ``slope`` the loss per decade of the rate there;
    both None where no rate can be suggested, for the ``reason`` given. ``lowest_rate`` is the rate at the lowest
    smoothed loss, ``tenth_of_diverged`` a tenth of the rate at which the loss had grown or was not finite (None where
    it never was). ``still_falling``: the smoothed loss was lowest at the last rate.
    """

    rate: float | None
    slope: float | None
    lowest_rate: float | None
    tenth_of_diverged: float | None
    still_falling: bool
    reason: str | None


def half_window(steps: int) -> int:
    """Half the width of the smoothing window for a test of so many steps, in steps."""
    return max(SMALLEST_HALF_WINDOW, round(steps * HALF_WINDOW))


def has_grown(losses: Sequence[float], half: int) -> bool:
    """Whether the mean of the last ``half // 2`` losses, at least SMALLEST_RECENT, exceeds GROWN times the lowest such
    mean so far; never before there is a whole window of losses."""
    if len(losses) < 2 * half + 1:
        return False
    recent = max(SMALLEST_RECENT, half // 2)
    means = np.convolve(losses, np.full(recent, 1 / recent), "valid")
    return bool(means[-1] > GROWN * means.min())


def smooth(rates: Sequence[float], losses: Sequence[float], half: int) -> tuple[np.ndarray, np.ndarray]:
    """Smoothed loss, and its slope per decade of the rate, at each of n rates; float64 (n,) each.

    A straight line in log10(rate) is fitted to the up to 2 * half + 1 losses around each rate (Savitzky and Golay,
    1964, of degree 1). Unlike a running average, this does not lag behind.
    """
    x, y = np.log10(np.asarray(rates, np.float64)), np.asarray(losses, np.float64)
    fitted, slopes = np.empty_like(y), np.empty_like(y)
    for at in range(len(y)):
        near = slice(max(0, at - half), at + half + 1)
        along, values = x[near] - x[near].mean(), y[near]
        slopes[at] = (along * (values - values.mean())).sum() / max((along**2).sum(), np.finfo(float).tiny)
        fitted[at] = values.mean() + slopes[at] * (x[at] - x[near].mean())
    return fitted, slopes


def suggest(rates: Sequence[float], losses: Sequence[float], half: int, diverged: float | None) -> Suggestion:
    """The suggestion of n finite losses at growing rates; ``diverged`` is the rate at which the test broke off.

    The rate is the one with the steepest descent among those before the lowest smoothed loss whose window is whole.
    There is none where fewer than two windows of losses are known, or where the loss has not fallen by CLEAR_FALL
    standard deviations of single losses about the smoothed ones.
    """
    tenth = None if diverged is None else diverged / 10
    window = 2 * half + 1
    if len(losses) < 2 * window:
        reason = f"the loss grew or was not finite after {len(losses)} steps: lower --lowest_rate"
        return Suggestion(None, None, None, tenth, False, reason)
    fitted, slopes = smooth(rates, losses, half)
    lowest = int(fitted.argmin())
    scatter = float(np.std((np.asarray(losses) - fitted)[: lowest + 1]))
    fall = float(np.mean(losses[: half + 1]) - fitted[lowest])
    whole = slice(half, min(lowest, len(losses) - 1 - half) + 1)
    if fall <= CLEAR_FALL * scatter or whole.start >= whole.stop or slopes[whole].min() >= 0:
        reason = (
            f"the loss fell by {max(0.0, fall):.3g}, which does not stand out from the scatter of single steps "
            f"({scatter:.3g}): raise --steps, --batch_size or --highest_rate"
        )
        return Suggestion(None, None, None, tenth, False, reason)
    steepest = half + int(slopes[whole].argmin())
    still_falling = diverged is None and lowest == len(losses) - 1
    return Suggestion(float(rates[steepest]), float(slopes[steepest]), float(rates[lowest]), tenth, still_falling, None)
