"""How a whole H&E lies on its markers: which way round, turned, scaled and shifted, found on thumbnails."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch

from orion_unet.registration.blocks import (
    LEAST_BLOCKS,
    STEP,
    agreeing,
    block_centres,
    block_shifts,
    sampled,
    similarity,
    thinned,
)
from orion_unet.registration.shift import COARSEST, nuclei
from orion_unet.registration.transform import Affine

# Longest sides of the images on which all orientations are tried [pixels]: the next where the one before shows no
# match, as with the discs of a microarray, which are alike until their tissue can be seen.
SEARCHED_SIDES = (192, 384)
# Turns [degrees] and scales tried about each of the eight orientations, then about the best of these.
TURNS, FINER_TURNS = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0), (-1.0, -0.5, 0.0, 0.5, 1.0)
SCALES, FINER_SCALES = (0.95, 1.0, 1.05), (0.975, 1.0, 1.025)
ROUNDS = 5
# A round that moves no block by more is the last [pixels of the thumbnails].
SETTLED = 0.1
# The best of so many attempts reached 16 between foreign images; between images of the same tissue it was 15 to 47.
CLEAR_PEAK = 20.0
# The peak of the orientation found, over that of the best other one, at least; the same for correlations.
LEAST_LEAD = 1.25
# Where no peak is clear, every orientation is refined on images of this longest side [pixels], in which tissue can be
# told from tissue, and the best must correlate at least so much. The discs of a microarray fit any other discs in part.
JUDGED_SIDE, LEAST_CORRELATION = 768, 0.2


@dataclass(frozen=True)
class Coarse:
    """``affine`` takes a point of the marker thumbnail to the density thumbnail.

    ``orientation`` says in words which way round the H&E lies. ``peak`` is the height of its match above all other
    shifts, in standard deviations. ``reason`` says why the result is not to be trusted; it is empty where it is.
    """

    affine: Affine
    peak: float
    orientation: str
    reason: str = ""

    @property
    def trusted(self) -> bool:
        """Whether the alignment may be used."""
        return not self.reason


def find_coarse(density: np.ndarray, marker: np.ndarray, expected_scale: float = 1.0) -> Coarse:
    """Find how thumbnails of haematoxylin density (h, w) and nuclear marker (H, W) fit, of any two sizes.

    ``expected_scale`` is pixels of the density in a pixel of the marker, from the pixel sizes. Every quarter turn is
    tried, plain and mirrored, with turns of up to 7 degrees and scales within 7 % of the expected one.
    """
    if min(np.ptp(density), np.ptp(marker)) <= 0 or min(*density.shape, *marker.shape) < 32:
        return Coarse(Affine.identity(), 0.0, UPRIGHT, "no structure to compare, or images under 32 pixels")
    for searched in SEARCHED_SIDES:
        found = _searched(density, marker, expected_scale, searched)
        if found.trusted:
            break
    return found


def _searched(density: np.ndarray, marker: np.ndarray, expected_scale: float, side: int) -> Coarse:
    """The alignment found on images of this longest side, refined on the thumbnails."""
    longest = max(*marker.shape, *(length / expected_scale for length in density.shape))
    shrink = max(1.0, longest / side)
    still = nuclei(_shrunk(density, shrink * expected_scale))
    moving = nuclei(_shrunk(marker, shrink))
    orientations = dict(_orientations(still.shape))
    first = {name: _best(still, moving, lies, TURNS, SCALES) for name, lies in orientations.items()}
    # The best, and one to compare it with.
    leading = sorted(first, key=lambda name: first[name].peak)[-2:]
    finer = []
    for name in leading:
        turns, scales = [first[name].turn + turn for turn in FINER_TURNS], [first[name].scale * s for s in FINER_SCALES]
        again = _best(still, moving, orientations[name], turns, scales)
        finer.append((max(first[name].peak, again.peak), name, max(first[name], again, key=lambda m: m.peak).affine))
    (others, _, _), (peak, name, affine) = sorted(finer, key=lambda found: found[0])
    reason = ""
    if peak < CLEAR_PEAK or peak < LEAST_LEAD * others:
        closer = max(1.0, longest / JUDGED_SIDE)
        small = _shrunk(density, closer * expected_scale), _shrunk(marker, closer)
        refined = {n: _refined(*small, _grown(shrink / closer, shrink / closer, m.affine)) for n, m in first.items()}
        correlations = {name: _correlation(*small, affine) for name, affine in refined.items()}
        second, name = sorted(correlations, key=lambda name: correlations[name])[-2:]
        best, others = correlations[name], correlations[second]
        affine, peak, shrink = refined[name], first[name].peak, closer
        if best < LEAST_CORRELATION or best < LEAST_LEAD * others:
            reason = (
                f"no match: the best of eight orientations correlates with {best:.2f}, the next one with {others:.2f}"
            )
    # From the small images to the thumbnails: both ends of the map grow, by different factors.
    affine = _grown(shrink, shrink * expected_scale, affine)
    return Coarse(affine if reason else _refined(density, marker, affine), peak, name, reason)


UPRIGHT = "as the markers"


def _orientations(shape: tuple[int, ...]) -> list[tuple[str, Affine]]:
    """Name, and map from an upright image to one of this shape (h, w) that lies otherwise: all eight."""
    height, width = (side - 1 for side in shape)
    # Each is a 2 x 2 matrix of 0 and ±1, and the corner from which the points count.
    turns = {
        UPRIGHT: np.array([[1, 0], [0, 1]]),
        "turned by 90°": np.array([[0, 1], [-1, 0]]),
        "turned by 180°": np.array([[-1, 0], [0, -1]]),
        "turned by 270°": np.array([[0, -1], [1, 0]]),
    }
    found = []
    for mirror, flip in (("", np.eye(2)), ("mirrored left to right", np.diag([1, -1]))):
        for name, turn in turns.items():
            matrix = turn @ flip
            corner = np.where(matrix.sum(1) < 0, (height, width), 0)
            words = mirror if name == UPRIGHT and mirror else f"{mirror} and {name}" if mirror else name
            found.append((words, Affine(np.column_stack([matrix, corner]).astype(float))))
    return found


@dataclass(frozen=True)
class _Match:
    """The best shift at one turn and scale: its peak, and the map that it gives."""

    peak: float
    affine: Affine
    turn: float
    scale: float


def _best(
    still: torch.Tensor, moving: torch.Tensor, orientation: Affine, turns: Sequence[float], scales: Sequence[float]
) -> _Match:
    """The best match of all turns [degrees] and scales about an orientation."""
    # The density, turned upright on a canvas of its own size.
    upright = np.abs(orientation.matrix[:, :2].round().astype(int)).T @ np.array(still.shape)
    # Multiples of 16 are fast to transform.
    size = [-(-(int(a) + b) // 16) * 16 for a, b in zip(upright, moving.shape, strict=True)]
    spectrum = torch.fft.rfft2(moving, s=size).conj()
    centre = (upright - 1) / 2
    found = []
    for turn, scale in product(turns, scales):
        angle = np.radians(turn)
        turned = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        about = Affine(np.column_stack([turned, centre - turned @ centre])).then(orientation)
        image = sampled(still, tuple(int(side) for side in upright), about)
        shown = torch.fft.irfft2(torch.fft.rfft2(image, s=size) * spectrum, s=size)
        place = divmod(int(shown.argmax()), size[1])
        peak = _height(shown, place)
        down, right = (at - side if at >= limit else at for at, side, limit in zip(place, size, upright, strict=True))
        found.append(_Match(peak, Affine.shift(float(down), float(right)).then(about), turn, scale))
    return max(found, key=lambda match: match.peak)


def _height(shown: torch.Tensor, place: tuple[int, int]) -> float:
    """The value at a place of a map (h, w) above the mean of what is beyond a nucleus from it, in standard deviations
    of that. The map goes on around its edges."""
    reach = int(COARSEST)
    near = shown
    for axis, (at, side) in enumerate(zip(place, shown.shape, strict=True)):
        around = torch.arange(at - reach, at + reach + 1) % side
        near = near.index_select(axis, around.unique())
    count = shown.numel() - near.numel()
    mean, square = (float(each.sum() - part.sum()) / count
                    for each, part in ((shown, near), (shown.square(), near.square())))  # fmt: skip
    spread = max(square - mean**2, 0.0) ** 0.5
    return (float(shown[place]) - mean) / max(spread, 1e-12)


def _correlation(density: np.ndarray, marker: np.ndarray, affine: Affine) -> float:
    """Correlation of the marker's image and the density's, moved onto it."""
    moving = nuclei(marker)
    moved = sampled(nuclei(density), moving.shape, affine)
    return float(np.corrcoef(moved.numpy().ravel(), moving.numpy().ravel())[0, 1])


def _grown(marker: float, density: float, affine: Affine) -> Affine:
    """The map between images whose sides are ``marker`` and ``density`` times as long."""
    # The centre of the first pixel of a shrunken image is in the middle of the pixels it was made of.
    down, up = (Affine(np.column_stack([np.eye(2) * factor, np.full(2, (factor - 1) / 2)]))
                for factor in (marker, density))  # fmt: skip
    return down.inverse().then(affine).then(up)


def _shrunk(image: np.ndarray, factor: float) -> np.ndarray:
    """An image (h, w) shrunk by the factor, as means over areas; enlarged where the factor is under 1."""
    size = tuple(max(8, round(side / factor)) for side in image.shape)
    given = torch.from_numpy(np.ascontiguousarray(image, np.float32))[None, None]
    mode = "area" if factor >= 1 else "bilinear"
    return torch.nn.functional.interpolate(given, size=size, mode=mode)[0, 0].numpy()


def _refined(density: np.ndarray, marker: np.ndarray, affine: Affine) -> Affine:
    """The map, made finer by the shifts of blocks of the thumbnails."""
    mirrored = affine.mirrored
    still, moving = nuclei(density), thinned(nuclei(marker))
    points = block_centres(marker.shape).reshape(-1, 2)
    for _ in range(ROUNDS):
        # On the marker's pixels, so that the shifts are in them.
        shifts, weights = block_shifts(sampled(still, marker.shape, affine, step=STEP), moving, points)
        kept = agreeing(points, shifts, weights)
        if kept.sum() < LEAST_BLOCKS:
            break
        closer = similarity(points[kept], points[kept] + shifts[kept], weights[kept])
        affine = closer.then(affine)
        if np.linalg.norm(closer.points(points) - points, axis=1).max() < SETTLED:
            break
    assert affine.mirrored == mirrored
    return affine
