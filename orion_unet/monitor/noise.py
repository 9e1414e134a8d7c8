"""The noise of a loss curve: how far it jumps around its trend."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from orion_unet.monitor.run_reader import LARGEST

WINDOW = 5
NOISE_WINDOW = 24
MIN_NOISE_EPOCHS = 6


# From so many epochs in the window on, a cubic describes the trend of V better than the training loss does.
CUBIC_EPOCHS = 12


def validation_noise(val: np.ndarray, train: np.ndarray | None = None) -> float:
    """Standard deviation of V around its trend, in units of the loss; nan with fewer than 8 epochs.

    The trend is fitted to the logarithm of the last 24 epochs, without the first fifth of the run (at least two
    epochs). Without the logarithm, the bend of an early curve would count as noise. From 14 epochs on it is a cubic;
    before that a straight line and a multiple of the logarithm of the training loss ``train``, which bends and falls
    where V does, or a parabola where that is not known. The epoch farthest from the trend does not count, so a single
    bad epoch is no noise; nor does noise that has died away within the last 8 epochs. Second differences, a simpler
    estimate, need twice the epochs for the same certainty.
    """
    window = noise_window(val)
    count = len(window)
    if count < MIN_NOISE_EPOCHS:
        return math.nan
    relative = bool(window.min() > 0)
    values = np.log(window) if relative else window
    beside = None if train is None or not relative or count >= CUBIC_EPOCHS else _beside(val, train)
    degree = 3 if count >= CUBIC_EPOCHS else 2
    projection, leverage = _polynomial(count, degree) if beside is None else beside
    squares = (values - projection @ values) ** 2
    # Deleted residuals: the sum of squares of a fit without one point follows from the fit with it.
    rest = float((squares.sum() - squares / (1 - leverage)).min())
    spread = math.sqrt(max(rest, 0.0) / (count - degree - 2))
    recent = values[-8:] - _polynomial(len(values[-8:]), 2)[0] @ values[-8:]
    spread = min(spread, 3 * math.sqrt(float(recent @ recent) / (len(recent) - 3)))
    return min(spread * recent_level(val), LARGEST) if relative else spread


def noise_window(val: np.ndarray) -> np.ndarray:
    """The epochs that the noise is measured in: the last 24 finite ones, without the first fifth of the run."""
    return val[_window(val)]


def _window(val: np.ndarray) -> np.ndarray:
    """Indices of the epochs of ``noise_window``."""
    at = np.arange(len(val))[max(2, len(val) // 5) :][-NOISE_WINDOW:]
    return at[np.isfinite(val[at])]


def _beside(val: np.ndarray, train: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Projection onto straight lines and the logarithm of the training loss, and the leverage of each epoch of the
    window; None where that loss is not known, not positive, or a straight line itself."""
    at = _window(val)
    losses = train[at]
    if not (np.isfinite(losses) & (losses > 0)).all():
        return None
    columns = np.stack([np.ones(len(at)), np.linspace(-1, 1, len(at)), np.log(losses)], axis=1)
    basis, factors = np.linalg.qr(columns)
    leverage = (basis * basis).sum(axis=1)
    # An epoch that alone decides on a parameter has no distance from the fit.
    if abs(factors[2, 2]) < 1e-6 or leverage.max() > 0.999:
        return None
    return basis @ basis.T, leverage


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
