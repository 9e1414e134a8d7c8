"""How well H&E and nuclear marker are aligned: their correlation, and the shift that would raise it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from orion_unet.correlation import pearson

# Side of the window that is compared, and the longest shift that is tried, in pixels.
WINDOW, LONGEST_SHIFT = 1024, 64
# Smaller images have too few nuclei, and too few shifts away from the peak, to tell a match from chance. Of crops of
# real pairs, this share is misjudged by a peak of 5, rightly and wrongly paired: 22 and 15 % at 72 pixels, 10 and
# 9 % at 80, 5 and 5 % at 96, 1 and 2 % at 128.
LEAST_SIDE = 96
# Below this height above all other shifts, a match may be chance. Of 8 pairs of 256 pixels and 45 of 512, the lowest
# peak was 11.6; of pairs of foreign images the highest was 4.9, of turned and mirrored ones 6.4.
LEAST_PEAK = 8.0
# Nuclei are a few to a few tens of pixels wide. Finer detail is noise; coarser detail is the outline of the tissue,
# which correlates at any shift. Standard deviations [pixels] of the two Gaussians whose difference passes nuclei.
FINEST, COARSEST = 1.5, 12.0


@dataclass(frozen=True)
class Registration:
    """How well haematoxylin and nuclear marker agree in one core.

    ``correlation`` is Pearson's r of the images as stored, ``best_correlation`` that after moving the marker by
    ``shift`` (pixels down, pixels right). ``peak`` is the height of the best shift above all other shifts, in standard
    deviations; below LEAST_PEAK it may be chance. All are NaN where either image is constant. ``shift`` is None, and
    all but ``correlation`` NaN, where an image is too small to look for one.
    """

    correlation: float
    best_correlation: float
    shift: tuple[int, int] | None
    peak: float


def register(
    density: np.ndarray, marker: np.ndarray, spectra: tuple[torch.Tensor, torch.Tensor] | None = None
) -> Registration:
    """Compare the haematoxylin density (H, W) with the nuclear marker (H, W) of the same window.

    The shift maximises the cross-correlation of the two images after a difference of Gaussians, which passes details
    of the size of nuclei. The correlations are those of the unfiltered images where they overlap. Shifts of up to 64
    pixels and a quarter of the window are tried, in images of at least LEAST_SIDE pixels. ``spectra`` are those of the
    two images, where they are there already.
    """
    plain = correlate(density, marker)
    if min(density.shape) < LEAST_SIDE:
        return Registration(plain, np.nan, None, np.nan)
    if not np.isfinite(plain):
        return Registration(np.nan, np.nan, (0, 0), np.nan)
    reach = min(LONGEST_SHIFT, min(density.shape) // 4)
    first, second = spectra or (spectrum(density), spectrum(marker))
    # At (dy, dx) this is the sum of density(y + dy, x + dx) * marker(y, x): the marker moved by (dy, dx).
    matched = torch.fft.irfft2(first * second.conj(), s=padded_size(density.shape)).numpy()
    offsets = np.arange(-reach, reach + 1)
    map_ = matched[np.ix_(offsets, offsets)]
    down, right = (int(offsets[index]) for index in np.unravel_index(map_.argmax(), map_.shape))
    # The spread is measured away from the peak, which is as wide as a nucleus.
    away = (np.abs(offsets[:, None] - down) > COARSEST) | (np.abs(offsets - right) > COARSEST)
    spread = float(map_[away].std())
    peak = float(map_.max() - map_[away].mean()) / spread if spread > 0 else np.nan
    return Registration(plain, correlate(*overlap(density, marker, down, right)), (down, right), peak)


def nuclei(image: np.ndarray, known: torch.Tensor | None = None) -> torch.Tensor:
    """An image (H, W) with only its details of the size of nuclei: a difference of Gaussians, float32. ``known`` is its
    ``spectrum``, where it is there already."""
    passed = spectrum(image) if known is None else known
    found = torch.fft.irfft2(passed, s=padded_size(image.shape))[: image.shape[0], : image.shape[1]]
    return found.contiguous()


def spectrum(image: np.ndarray) -> torch.Tensor:
    """Spectrum of an image (H, W) padded to ``padded_size`` with its mean, after the difference of Gaussians."""
    size = padded_size(image.shape)
    down, across = torch.fft.fftfreq(size[0])[:, None] ** 2, torch.fft.rfftfreq(size[1]) ** 2
    fine, coarse = (
        torch.exp(-2 * (np.pi * width) ** 2 * down) * torch.exp(-2 * (np.pi * width) ** 2 * across)
        for width in (FINEST, COARSEST)
    )
    centred = torch.from_numpy(np.asarray(image - image.mean(), np.float32))
    return torch.fft.rfft2(centred, s=size) * (fine - coarse)


def padded_size(shape: tuple[int, ...]) -> list[int]:
    """Sides of the padded image: no shift that is tried, and no tail of the Gaussians, reaches around its edge."""
    least = [side + max(min(LONGEST_SHIFT, side // 4), round(3 * COARSEST)) for side in shape]
    # Multiples of 32 are fast to transform, nearly all of them.
    return [-(-side // 32) * 32 for side in least]


def overlap(still: np.ndarray, moved: np.ndarray, down: int, right: int) -> tuple[np.ndarray, np.ndarray]:
    """The parts of two images of equal size that overlap after the second is moved down and right."""
    height, width = still.shape
    rows, columns = slice(max(0, down), height + min(0, down)), slice(max(0, right), width + min(0, right))
    back_rows, back_columns = (
        slice(max(0, -down), height + min(0, -down)),
        slice(max(0, -right), width + min(0, -right)),
    )
    return still[rows, columns], moved[back_rows, back_columns]


def correlate(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson's r of two images; NaN where one is constant."""
    p, t = first.ravel().astype(np.float64), second.ravel().astype(np.float64)
    sums = [p.size, p.sum(), t.sum(), p @ p, t @ t, p @ t]
    return float(pearson(np.array(sums)[:, None])[0])
