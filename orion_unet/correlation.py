"""Pearson's correlation, from sums that can be added over pixels, patches, cores and ranks."""

from __future__ import annotations

import numpy as np

# A spread this small against the values themselves is the rounding of a constant, not a signal.
CONSTANT_SPREAD = 1e-5


def moments(p: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Sums (6, ...) of p and t (..., n) over the last axis, in float64: count, Σp, Σt, Σp², Σt², Σpt."""
    p, t = p.astype(np.float64), t.astype(np.float64)
    return np.stack([each.sum(axis=-1) for each in (np.ones_like(p), p, t, p * p, t * t, p * t)])


def spread(count: np.ndarray, total: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """Sum of squares about the mean; 0 where that is the rounding of a constant, NaN where nothing was counted."""
    with np.errstate(divide="ignore", invalid="ignore"):
        found = squares - total * total / count
        return np.where(found <= CONSTANT_SPREAD**2 * squares, 0.0, found)


def pearson(sums: np.ndarray) -> np.ndarray:
    """Pearson's r (..., C) from moments (..., 6, C); NaN where either side is constant or not finite.

    From float64 sums right to 1e-6 down to the spread that counts as constant.
    """
    count, p, t, pp, tt, pt = (sums[..., row, :] for row in range(6))
    spread_p, spread_t = spread(count, p, pp), spread(count, t, tt)
    with np.errstate(divide="ignore", invalid="ignore"):
        r = (pt - p * t / count) / np.sqrt(spread_p) / np.sqrt(spread_t)
    return np.where((spread_p > 0) & (spread_t > 0), r.clip(-1, 1), np.nan)
