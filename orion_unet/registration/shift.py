"""Whether H&E and nuclear marker lie on each other: their correlation, and the shift that would raise it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Side of the window that is compared, and the longest shift that is looked for, in pixels.
WINDOW, LONGEST_SHIFT = 1024, 64
# Nuclei are a few to a few tens of pixels wide: finer is noise, coarser is the outline of the tissue, which
# correlates over any shift. Standard deviations of the two Gaussians whose difference lets nuclei pass, in pixels.
FINEST, COARSEST = 1.5, 12.0


@dataclass(frozen=True)
class Registration:
    """How well haematoxylin and nuclear marker agree in one core.

    ``correlation`` is Pearson's r as they lie, ``best_correlation`` after the marker has been moved by ``shift``
    (pixels down, pixels right). ``peak`` says how far the best shift stands out among all shifts that were tried,
    in standard deviations: under about 6 it is chance. NaN where either image is constant.
    """

    correlation: float
    best_correlation: float
    shift: tuple[int, int]
    peak: float


def register(density: np.ndarray, marker: np.ndarray) -> Registration:
    """Compare the haematoxylin density (H, W) with the nuclear marker (H, W) of the same window.

    The shift maximises the cross-correlation of both images, each reduced to the size of nuclei by a difference of
    Gaussians; the correlations are of the images as they are, over what overlaps. Shifts up to 64 pixels, and at
    most a quarter of the window, are looked for.
    """
    plain = pearson(density, marker)
    if not np.isfinite(plain):
        return Registration(np.nan, np.nan, (0, 0), np.nan)
    reach = min(LONGEST_SHIFT, min(density.shape) // 4)
    size = [side + reach for side in density.shape]
    rows = np.fft.fftfreq(size[0])[:, None]
    columns = np.fft.rfftfreq(size[1])
    frequency = (rows**2 + columns**2).astype(np.float32)
    nuclei = np.exp(-2 * (np.pi * FINEST) ** 2 * frequency) - np.exp(-2 * (np.pi * COARSEST) ** 2 * frequency)
    first, second = (np.fft.rfft2(image - image.mean(), s=size) * nuclei for image in (density, marker))
    # At (dy, dx) this is the sum of density(y + dy, x + dx) * marker(y, x): the marker moved by (dy, dx).
    matched = np.fft.irfft2(first * second.conj(), s=size)
    offsets = np.arange(-reach, reach + 1)
    map_ = matched[np.ix_(offsets, offsets)]
    down, right = (int(offsets[index]) for index in np.unravel_index(map_.argmax(), map_.shape))
    # The spread away from the peak, which is itself as wide as a nucleus.
    away = (np.abs(offsets[:, None] - down) > COARSEST) | (np.abs(offsets - right) > COARSEST)
    spread = float(map_[away].std()) if away.any() else 0.0
    peak = float(map_.max() - map_[away].mean()) / spread if spread > 0 else np.nan
    return Registration(plain, pearson(*overlap(density, marker, down, right)), (down, right), peak)


def overlap(still: np.ndarray, moved: np.ndarray, down: int, right: int) -> tuple[np.ndarray, np.ndarray]:
    """The parts of two images of one size that lie on each other once the second is moved down and right."""
    height, width = still.shape
    rows, columns = slice(max(0, down), height + min(0, down)), slice(max(0, right), width + min(0, right))
    back_rows, back_columns = (
        slice(max(0, -down), height + min(0, -down)),
        slice(max(0, -right), width + min(0, -right)),
    )
    return still[rows, columns], moved[back_rows, back_columns]


def pearson(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson's r of two images; NaN where one is constant."""
    first, second = (image.astype(np.float64) - image.mean(dtype=np.float64) for image in (first, second))
    scale = float(np.sqrt((first**2).sum() * (second**2).sum()))
    return float((first * second).sum()) / scale if scale > 0 else np.nan
