"""Statistics of every channel, from a sample of pixels of all cores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

QUANTILES = (0.01, 0.50, 0.99, 0.999)
# A pixel is positive above the background: the median plus this many standard deviations of the pixels below it.
BACKGROUND_SD = 5.0
# Pixels at the largest value count as saturated if there are at least this many, and this share of all pixels.
PLATEAU, PLATEAU_SHARE = 10, 1e-5


@dataclass(frozen=True)
class ChannelRow:
    """One channel over all cores, measured on the sample; intensities are stored values / full scale.

    ``low`` and ``high`` are the smallest and largest value, ``quantiles`` those of ``QUANTILES``. ``positive`` is the
    share of pixels above ``threshold``: the median + 5 standard deviations of the background, estimated from the pixels
    below the median. That works for markers positive in less than half of the pixels, even very sparse ones, and gives
    nearly 0 for pure noise; Otsu's threshold, which looks for two classes of similar size, falls into the background
    of a sparse marker. ``saturated`` is the share of pixels at the largest value, if enough pixels share it. ``state``
    is ``empty`` (all 0), ``constant``, ``noise`` (nothing above the background, or nothing but camera noise by the
    ``evidence`` of ``data/camera_noise.py``) or an empty string.
    """

    name: str
    low: float
    high: float
    quantiles: tuple[float, ...]
    mean: float
    threshold: float
    positive: float
    saturated: float
    state: str
    evidence: dict[str, Any]


def describe_channel(name: str, values: np.ndarray, step: float, evidence: dict[str, Any] | None = None) -> ChannelRow:
    """Statistics of one channel from a sample (N,) of its intensities, and the evidence on whether it is noise.

    ``step`` is the smallest intensity above 0 that the file can store; 0 for floats.
    """
    evidence = evidence or {}
    low, high = float(values.min()), float(values.max())
    quantiles = tuple(np.quantile(values, QUANTILES).tolist())
    median = quantiles[1]
    below = values[values <= median].astype(np.float64)
    # The lower half of a normal distribution, mirrored at the median, has the same standard deviation. It is 0 where
    # half of the pixels share one value; then the noise is at least half a stored step.
    spread = max(float(np.sqrt(np.mean((median - below) ** 2))), step / 2)
    threshold = median + BACKGROUND_SD * spread
    positive = float(np.mean(values > threshold))
    at_top = int(np.count_nonzero(values == high))
    state = ""
    if high == low:
        state = "empty" if high == 0 else "constant"
    elif positive == 0 or evidence.get("noise"):
        state = "noise"
    plateau = not state and high > threshold and at_top >= max(PLATEAU, PLATEAU_SHARE * values.size)
    saturated = at_top / values.size if plateau else 0.0
    mean = float(values.mean(dtype=np.float64))
    return ChannelRow(name, low, high, quantiles, mean, threshold, positive, saturated, state, evidence)


def most_varied(names: Sequence[str], sample: np.ndarray) -> str:
    """The channel of a sample (C, N) that varies most for its range: it shows tissue best, after a nuclear one.

    Values are NaN where a channel was not measured.
    """
    spread = np.nanstd(sample, axis=1) / np.maximum(np.nanquantile(sample, 0.999, axis=1), 1e-12)
    return names[int(spread.argmax())]
