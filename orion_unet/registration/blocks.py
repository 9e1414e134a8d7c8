"""Shifts of blocks of one image against another, and the similarity that they add up to.

Both images show nuclei only (``shift.nuclei``). Points are (y, x) in pixels of the ``moving`` image, the markers; the
``still`` image is the haematoxylin density.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from orion_unet.registration.transform import Affine, Field

# Side of the blocks whose shifts are measured, and how far they are looked for [pixels].
BLOCK, REACH = 128, 8
# A block whose nuclei correlate less has too few of them, or others.
LEAST_BLOCK_CORRELATION = 0.25
# A block that differs by more than this from its neighbours' median is an outlier [pixels].
LARGEST_DEVIATION = 2.5
# A similarity has four unknowns, and needs more blocks than that.
LEAST_BLOCKS = 6


def block_centres(shape: tuple[int, ...], offset: int = 0) -> np.ndarray:
    """Centres (rows, columns, 2) of blocks that overlap by half; ``offset`` moves them down and right."""
    first = BLOCK / 2 if min(shape) >= BLOCK else min(shape) / 2
    places = [np.arange(first + offset, max(side - first, first + offset) + 1, BLOCK / 2) for side in shape]
    return np.stack(np.meshgrid(*places, indexing="ij"), axis=-1)


def block_shifts(still: torch.Tensor, moving: torch.Tensor, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The shift (n, 2) of each block of ``moving`` that fits ``still`` best, and its correlation as a weight (n,).

    Both images (H, W) show nuclei only (``shift.nuclei``). The weight is 0 where the correlation is under
    LEAST_BLOCK_CORRELATION, or the best shift is as far as was looked for.
    """
    side = BLOCK + 2 * REACH
    half = side // 2
    # Nothing beyond the border is like anything.
    padded = [F.pad(image[None, None], (half, half, half, half))[0, 0] for image in (still, moving)]
    inner = torch.zeros(side, side)
    inner[REACH:-REACH, REACH:-REACH] = 1.0
    shifts, weights = np.zeros((len(points), 2)), np.zeros(len(points))
    for index, (y, x) in enumerate(np.rint(points).astype(int)):
        window, block = (image[y : y + side, x : x + side] for image in padded)
        if window.shape != inner.shape:
            continue
        block = block * inner
        matched = torch.fft.irfft2(torch.fft.rfft2(window) * torch.fft.rfft2(block).conj(), s=(side, side))
        energy = torch.fft.irfft2(torch.fft.rfft2(window**2) * torch.fft.rfft2(inner).conj(), s=(side, side))
        scale = (energy.clamp_min(1e-12) * (block**2).sum().clamp_min(1e-12)).sqrt()
        shown = torch.roll(matched / scale, (REACH, REACH), (0, 1))[: 2 * REACH + 1, : 2 * REACH + 1].numpy()
        best = np.unravel_index(shown.argmax(), shown.shape)
        if shown[best] < LEAST_BLOCK_CORRELATION or min(best) == 0 or max(best) == 2 * REACH:
            continue
        shifts[index] = _between_pixels(shown, best) - REACH
        weights[index] = shown[best]
    return shifts, weights


def _between_pixels(values: np.ndarray, best: tuple[np.intp, ...]) -> np.ndarray:
    """The maximum (2,) of the parabolas through the best value and its neighbours, along each axis."""
    found = []
    for axis in range(2):
        step = np.eye(2, dtype=int)[axis]
        before, at, after = (float(values[tuple(best + sign * step)]) for sign in (-1, 0, 1))
        bend = before - 2 * at + after
        found.append(best[axis] + (0.5 * (before - after) / bend if bend < 0 else 0.0))
    return np.array(found)


def agreeing(points: np.ndarray, shifts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The blocks (n,) bool that were measured and agree with the median of their measured neighbours."""
    kept = weights > 0
    near = np.abs(points[:, None] - points).max(-1) <= BLOCK
    for index in np.flatnonzero(kept):
        around = shifts[near[index] & (weights > 0)]
        if np.linalg.norm(shifts[index] - np.median(around, axis=0)) > LARGEST_DEVIATION:
            kept[index] = False
    return kept


def similarity(points: np.ndarray, wanted: np.ndarray, weights: np.ndarray) -> Affine:
    """The similarity that takes points (n, 2) nearest to the wanted ones, in the mean of weighted squares (Umeyama,
    IEEE TPAMI 1991); it never mirrors."""
    share = weights / weights.sum()
    centre, target = share @ points, share @ wanted
    a, b = points - centre, wanted - target
    spread = share @ (a**2).sum(1)
    along = share @ (a * b).sum(1)
    across = share @ (a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0])
    scale = np.hypot(along, across) / spread
    angle = np.arctan2(across, along)
    turned = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return Affine(np.column_stack([turned, target - turned @ centre]))


def sampled(
    image: torch.Tensor, shape: tuple[int, ...], affine: Affine, field: Field | None = None, outside: float = 0.0
) -> torch.Tensor:
    """The image (h, w) at the points of a region of this shape (H, W), bilinearly; ``outside`` beyond its border."""
    height, width = shape
    rows, columns = np.arange(height, dtype=np.float64), np.arange(width, dtype=np.float64)
    points = np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1)
    if field is not None:
        points += field.at(rows, columns)
    points = affine.points(points)
    limit = np.maximum(np.array(image.shape) - 1, 1)
    grid = torch.from_numpy((2 * points / limit - 1)[None, ..., ::-1].astype(np.float32))
    found = F.grid_sample(image[None, None], grid, mode="bilinear", padding_mode="border", align_corners=True)[0, 0]
    beyond = torch.from_numpy(((points < 0) | (points > limit)).any(-1))
    return found.masked_fill(beyond, outside)
