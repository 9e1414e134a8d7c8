"""Shifts of blocks of one image against another, and the similarity that they add up to.

Both images show nuclei only (``shift.nuclei``). Points are (y, x) in pixels of the ``moving`` image, the markers; the
``still`` image is the haematoxylin density. Nuclei have no detail finer than a few pixels, so blocks are compared on
every second pixel (``thinned``), and the correlation is interpolated between them.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from orion_unet.registration.transform import Affine, Field, grid_points, sampling_grid, within

# Side of the blocks whose shifts are measured, and how far they are looked for [pixels].
BLOCK, REACH = 128, 8
# Pixels from one that is compared to the next.
STEP = 2
# Blocks that are compared at once; bounds the memory.
AT_ONCE = 64
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


def thinned(image: torch.Tensor) -> torch.Tensor:
    """Every STEP-th pixel of an image (H, W) along each axis."""
    return image[::STEP, ::STEP]


def block_shifts(still: torch.Tensor, moving: torch.Tensor, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The shift (n, 2) of each block of ``moving`` that fits ``still`` best, and its correlation as a weight (n,).

    Both images (H, W) show nuclei only (``shift.nuclei``), and are ``thinned``; points and shifts are in pixels of the
    full images. The weight is 0 where the correlation is under LEAST_BLOCK_CORRELATION, or the best shift is as far as
    was looked for.
    """
    inner, reach = BLOCK // STEP, REACH // STEP
    side = inner + 2 * reach
    # Zeros beyond the border correlate with nothing.
    padded, other = (F.pad(image[None, None], (side // 2,) * 4)[0, 0] for image in (still, moving))
    windows, blocks = padded.unfold(0, side, 1).unfold(1, side, 1), other.unfold(0, side, 1).unfold(1, side, 1)
    energies = _box_sums(padded.square(), inner).unfold(0, 2 * reach + 1, 1).unfold(1, 2 * reach + 1, 1)
    down, across = _waves(torch.fft.fftfreq(side)), _waves(torch.fft.rfftfreq(side)).T.clone()
    # rfft leaves out the negative frequencies of a real image: count all but the first and the last twice.
    across[1:-1] *= 2
    places = torch.from_numpy(np.rint(points / STEP).astype(np.int64))
    found = []
    for y, x in (part.unbind(1) for part in places.split(AT_ONCE)):
        block = blocks[y, x]
        for axis in (1, 2):
            block.narrow(axis, 0, reach).zero_()
            block.narrow(axis, side - reach, reach).zero_()
        spectrum = torch.fft.rfft2(windows[y, x]) * torch.fft.rfft2(block).conj()
        matched = (down @ (spectrum.flatten(0, 1) @ across).unflatten(0, (-1, side))).real / side**2
        energy = F.interpolate(energies[y, x][None], size=matched.shape[1:], mode="bilinear", align_corners=True)[0]
        energy = energy.clamp_min(1e-12) * block.square().sum((1, 2), keepdim=True).clamp_min(1e-12)
        found.append(matched / energy.sqrt())
    return _peaks(torch.cat(found).double().numpy()) if found else (np.zeros((0, 2)), np.zeros(0))


def _waves(frequencies: torch.Tensor) -> torch.Tensor:
    """Waves (shifts, frequencies) of these frequencies [per compared pixel] at every whole shift up to REACH."""
    phase = 2 * np.pi * frequencies * torch.arange(-REACH, REACH + 1)[:, None] / STEP
    return torch.complex(phase.cos(), phase.sin())


def _box_sums(image: torch.Tensor, side: int) -> torch.Tensor:
    """Sums over all squares of this side inside an image (H, W), by their upper left corners."""
    sums = F.pad(image.double(), (1, 0, 1, 0)).cumsum(0).cumsum(1)
    across = sums[:, side:] - sums[:, :-side]
    return (across[side:] - across[:-side]).float()


def _peaks(correlations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The shifts (n, 2) at which correlations (n, side, side) are highest, and these highest ones (n,).

    Both are 0 where the highest is too low or at the edge. Between pixels, the maximum is that of the parabolas through
    the neighbours along each axis.
    """
    count, side, _ = correlations.shape
    each = np.arange(count)
    best = np.stack(np.divmod(correlations.reshape(count, -1).argmax(1), side), axis=1)
    height = correlations[each, best[:, 0], best[:, 1]]
    trusted = (height >= LEAST_BLOCK_CORRELATION) & (best > 0).all(1) & (best < side - 1).all(1)
    each, best, weights = each[trusted], best[trusted], np.where(trusted, height, 0.0)
    shifts = np.zeros((count, 2))
    for axis, (down, right) in enumerate(((1, 0), (0, 1))):
        before, at, after = (correlations[each, best[:, 0] + sign * down, best[:, 1] + sign * right]
                             for sign in (-1, 0, 1))  # fmt: skip
        bend = before - 2 * at + after
        curved = bend < 0
        between = np.where(curved, 0.5 * (before - after) / np.where(curved, bend, 1.0), 0.0)
        shifts[each, axis] = best[:, axis] + between - REACH
    return shifts, weights


def agreeing(points: np.ndarray, shifts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The blocks (n,) bool that were measured and agree with the median of their measured neighbours."""
    kept = weights > 0
    measured = np.flatnonzero(kept)
    for first in range(0, len(measured), AT_ONCE):
        some = measured[first : first + AT_ONCE]
        near = (np.abs(points[some, None] - points[measured]) <= BLOCK).all(-1)
        count = near.sum(1)
        order = np.argsort(~near, axis=1, kind="stable")[:, : count.max()]
        absent = np.arange(order.shape[1]) >= count[:, None]
        around = np.where(absent[..., None], np.inf, shifts[measured[order]])
        around.sort(axis=1)
        each = np.arange(len(some))
        middle = (around[each, (count - 1) // 2] + around[each, count // 2]) / 2
        kept[some] = np.linalg.norm(shifts[some] - middle, axis=1) <= LARGEST_DEVIATION
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
    image: torch.Tensor,
    shape: tuple[int, ...],
    affine: Affine,
    field: Field | None = None,
    outside: float = 0.0,
    step: int = 1,
) -> torch.Tensor:
    """The image (h, w) at every ``step``-th point of a region of this shape (H, W), bilinearly; ``outside`` beyond its
    border."""
    rows, columns = (np.arange(0, side, step, dtype=np.float64) for side in shape)
    points = grid_points(affine, field, rows, columns)
    grid = sampling_grid(points, (image.shape[0], image.shape[1]))
    found = F.grid_sample(image[None, None], grid, mode="bilinear", padding_mode="border", align_corners=True)[0, 0]
    return found.masked_fill_(torch.from_numpy(~within(points, image.shape)), outside)
