"""The noise of a loss curve: how far it jumps around its trend."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from orion_unet.monitor.run_reader import LARGEST

WINDOW = 5
NOISE_WINDOW = 24
MIN_NOISE_EPOCHS = 6


def validation_noise(val: np.ndarray) -> float:
    """Standard deviation of V around its trend, in units of the loss; nan with fewer than 8 epochs.

    The trend is a parabola (from 14 epochs on a cubic) fitted to the logarithm of the last 24 epochs, without the
    first fifth of the run (at least two epochs). Without the logarithm, the bend of an early curve would count as
    noise. The epoch farthest from the trend does not count, so a single bad epoch is no noise; nor does noise that
    has died away within the last 8 epochs. Second differences, a simpler estimate, need twice the epochs for the same
    certainty.
    """
    window = noise_window(val)
    count = len(window)
    if count < MIN_NOISE_EPOCHS:
        return math.nan
    relative = bool(window.min() > 0)
    values = np.log(window) if relative else window
    degree = 3 if count >= 14 else 2
    squares, leverage = _squared_residuals(values, degree)
    # Deleted residuals: the sum of squares of a fit without one point follows from the fit with it.
    rest = float((squares.sum() - squares / (1 - leverage)).min())
    spread = math.sqrt(max(rest, 0.0) / (count - degree - 2))
    recent, _ = _squared_residuals(values[-8:], 2)
    spread = min(spread, 3 * math.sqrt(float(recent.sum()) / (len(recent) - 3)))
    return min(spread * recent_level(val), LARGEST) if relative else spread


def noise_window(val: np.ndarray) -> np.ndarray:
    """The epochs that the noise is measured in: the last 24 finite ones, without the first fifth of the run."""
    window = val[max(2, len(val) // 5) :][-NOISE_WINDOW:]
    return window[np.isfinite(window)]


def _squared_residuals(values: np.ndarray, degree: int) -> tuple[np.ndarray, np.ndarray]:
    """Squared distances (n,) from a fitted polynomial, and the leverage (n,) of each point."""
    projection, leverage = _polynomial(len(values), degree)
    residual = values - projection @ values
    return residual * residual, leverage


@lru_cache(maxsize=2 * NOISE_WINDOW)
def _polynomial(count: int, degree: int) -> tuple[np.ndarray, np.ndarray]:
    """Projection (n, n) onto the polynomials over n equally spaced points, and the leverage (n,) of each point."""
    basis, _ = np.linalg.qr(np.vander(np.linspace(-1, 1, count), degree + 1))
    return basis @ basis.T, (basis * basis).sum(axis=1)


def recent_level(values: np.ndarray, window: int = WINDOW) -> float:
    """The median of the last ``window`` values, leaving out those that are not finite; nan where none is."""
    recent = values[-window:]
    recent = recent[np.isfinite(recent)]
    return float(np.median(recent)) if len(recent) else math.nan
