"""A row of numbers for every channel, from a sample of pixels of all cores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

QUANTILES = (0.01, 0.50, 0.99, 0.999)
# A pixel is positive above background: the median plus so many standard deviations of the pixels below it.
BACKGROUND_SD = 5.0
# Pixels at the largest value count as saturated where so many, and such a share of all, have it; one always does.
PLATEAU, PLATEAU_SHARE = 10, 1e-5


@dataclass(frozen=True)
class ChannelRow:
    """One channel over all cores; intensities are stored values / full scale, all from the sample.

    ``low`` and ``high`` are the smallest and largest value, ``quantiles`` those of ``QUANTILES``. ``positive`` is
    the share of pixels above ``threshold``, the median + 5 sd of the background, the sd being that of the pixels
    below the median: robust for markers positive in less than half of the pixels, however sparse, and close to 0
    for one that is noise alone. (Otsu's threshold, which looks for two classes of like size, falls into the
    background of a sparse marker.) ``saturated`` is the share of pixels at the largest value where that is a
    plateau. ``state`` is empty (all 0), constant, noise (nothing above background) or an empty text.
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


def describe_channel(name: str, values: np.ndarray, step: float) -> ChannelRow:
    """Numbers of one channel from a sample (N,) of its intensities; ``step`` is the smallest one above 0, or 0."""
    low, high = float(values.min()), float(values.max())
    quantiles = tuple(np.quantile(values, QUANTILES).tolist())
    median = quantiles[1]
    below = values[values <= median].astype(np.float64)
    # The lower half of a normal distribution, mirrored at the median, has its standard deviation. Where half of the
    # pixels share one value it is 0: stored steps then are the noise.
    spread = max(float(np.sqrt(np.mean((median - below) ** 2))), step / 2)
    threshold = median + BACKGROUND_SD * spread
    positive = float(np.mean(values > threshold))
    at_top = int(np.count_nonzero(values == high))
    state = ""
    if high == low:
        state = "empty" if high == 0 else "constant"
    elif positive == 0:
        state = "noise"
    plateau = not state and high > threshold and at_top >= max(PLATEAU, PLATEAU_SHARE * values.size)
    saturated = at_top / values.size if plateau else 0.0
    return ChannelRow(
        name, low, high, quantiles, float(values.mean(dtype=np.float64)), threshold, positive, saturated, state
    )


def most_varied(names: Sequence[str], sample: np.ndarray) -> str:
    """The channel of a sample (C, N) that varies most for its range: what shows tissue where no nuclei are stained."""
    spread = sample.std(axis=1) / np.maximum(np.quantile(sample, 0.999, axis=1), 1e-12)
    return names[int(spread.argmax())]
