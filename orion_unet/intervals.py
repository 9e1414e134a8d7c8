"""95 % confidence intervals from leaving out one unit at a time: a core, or a patient or slide with all its cores.

Student's t with the standard error of the jackknife (Tukey, 1958; Efron and Tibshirani, An Introduction to the
Bootstrap, 1993, chapter 11), on a scale without bounds. In simulations it covers the truth more often than bootstrap
percentiles or BCa, at every number of units: ``benchmarks/coverage.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LEVEL = 0.95
# With fewer units than this, how much other tissue would differ is as good as unknown.
LEAST_UNITS = 8
COVERAGE = "nominally 95 %; in simulations 88 to 96 % (benchmarks/results/coverage.md)"
# How near to its bounds a score may come before it is taken to be there.
NEAREST = 1e-6


def leave_one_out(groups: Sequence[str]) -> np.ndarray:
    """How often each of K cores counts when one of the U units is left out, (U, K) float64 of 0 and 1."""
    unit_of = np.unique(list(groups), return_inverse=True)[1]
    return (unit_of != np.arange(unit_of.max() + 1)[:, None]).astype(np.float64)


def why_no_interval(groups: Sequence[str], grouped: bool) -> str:
    """A sentence where there are too few units for an interval, else nothing."""
    units = len(set(groups))
    if units >= LEAST_UNITS:
        return ""
    return f"too few {'groups' if grouped else 'cores'} ({units}) for an interval: it needs at least {LEAST_UNITS}"


def interval(
    value: np.ndarray | float,
    without: np.ndarray,
    bounds: tuple[float, float] | None = None,
    units: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper end (...) of the interval around ``value`` (...), of which ``without`` (U, ...) is what it would
    be without each of U units.

    ``bounds`` are the smallest and largest value there can be; the ends lie between them. NaN where the value is
    undefined, with or without any of the units: what one unit alone shows has no interval. ``units`` (U, ...) bool are
    those that have the value at all; the others count for nothing, and there must be LEAST_UNITS. None: all have it.
    """
    from scipy.stats import t

    centre, moved = (_unbounded(np.asarray(values, np.float64), bounds) for values in (value, without))
    count: int | np.ndarray = len(without)
    variance = moved.var(axis=0, ddof=1)
    if units is not None:
        count = np.maximum(units.sum(axis=0), 2)
        variance = _variance(moved, units)
    error = np.sqrt((count - 1) ** 2 / count * variance)
    reach = t.ppf((1 + LEVEL) / 2, count - 1) * error
    # The value itself may be nearer to its bound than the transform goes.
    low, high = (_bounded(end, bounds) for end in (centre - reach, centre + reach))
    return np.minimum(low, value), np.maximum(high, value)


def _variance(values: np.ndarray, units: np.ndarray) -> np.ndarray:
    """Variance over the first axis of those values (U, ...) that count; NaN where they are fewer than LEAST_UNITS."""
    count = units.sum(axis=0)
    mean = np.where(units, values, 0.0).sum(axis=0) / np.maximum(count, 1)
    squares = np.where(units, (values - mean) ** 2, 0.0).sum(axis=0)
    return np.where(count >= LEAST_UNITS, squares / np.maximum(count - 1, 1), np.nan)


def _unbounded(values: np.ndarray, bounds: tuple[float, float] | None) -> np.ndarray:
    """Fisher's transform, so that an interval near a bound is as lopsided as it should be."""
    if bounds is None:
        return values
    low, high = bounds
    return np.arctanh((2 * (values - low) / (high - low) - 1).clip(NEAREST - 1, 1 - NEAREST))


def _bounded(values: np.ndarray, bounds: tuple[float, float] | None) -> np.ndarray:
    if bounds is None:
        return values
    low, high = bounds
    return low + (np.tanh(values) + 1) / 2 * (high - low)
