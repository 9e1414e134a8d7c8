"""The alignment of one region at full resolution: a similarity, and a smooth field of small displacements."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from orion_unet.registration.blocks import (
    BLOCK,
    LEAST_BLOCKS,
    STEP,
    agreeing,
    block_centres,
    block_shifts,
    sampled,
    similarity,
    thinned,
)
from orion_unet.registration.shift import LEAST_PEAK, LEAST_SIDE, Registration, correlate, nuclei, register, spectrum
from orion_unet.registration.transform import Affine, Field

# A match with a lower peak is compared with all other ways round. Of 540 foreign and mirrored real pairs, the highest
# peak was 8.7.
SURE_PEAK = 14.0
# A region that would have to turn or be scaled by more is moved only.
LARGEST_ROTATION_DEG, LARGEST_SCALING = 6.0, 0.06
# Standard deviation of the Gaussian that smooths the field, in blocks; weight of "no displacement" against one block.
SMOOTHING, PRIOR = 1.0, 0.3
# The longest displacement of the field [pixels]: nuclei are moved and never stretched.
LARGEST_DISPLACEMENT = 4.0
ROUNDS = 3
# A round that moves 95 % of the blocks by less is the last [pixels]: the next one would move them by a fifth of that.
SETTLED = 0.25


@dataclass(frozen=True)
class Fine:
    """How a region's markers lie on its H&E.

    ``affine`` and ``field`` take a point of the region to a point of the density image, ``field`` first. Correlations
    are Pearson's r of haematoxylin density and nuclear marker, before and after. ``residual_px`` and
    ``residual_95_px`` are the median and the 95 % quantile of the shifts that remain, measured on blocks that lie
    between those that the field was made from, and agree with their neighbours: a lower bound. NaN where no block can
    be measured. ``peak`` is that of ``shift.Registration``. ``reason`` says why the result is not to be trusted; it is
    empty where it is.
    """

    affine: Affine
    field: Field | None
    correlation_before: float
    correlation: float
    residual_px: float
    residual_95_px: float
    peak: float
    blocks: int
    reason: str = ""

    @property
    def trusted(self) -> bool:
        """Whether the alignment may be used."""
        return not self.reason

    def followed_by(self, affine: Affine, y: int, x: int) -> Affine:
        """The affine map from points of the whole marker image to the H&E, where ``affine`` made the density image of
        the region whose upper left corner is (y, x)."""
        return Affine.shift(-y, -x).then(self.affine).then(Affine.shift(y, x)).then(affine)


def refine(density: np.ndarray, marker: np.ndarray) -> Fine:
    """Align the nuclear marker (H, W) of a region with its haematoxylin density (H, W), of equal size.

    The whole region's shift comes from ``shift.register``. Then the shifts of blocks are measured by normalised
    cross-correlation, to fractions of a pixel; a similarity is fitted to them, and what is left becomes the field.
    """
    spectra = spectrum(density), spectrum(marker)
    whole = register(density, marker, spectra)
    reason = _doubt(whole, density.shape) or _better_otherwise(whole, density, marker)
    if reason or whole.shift is None:
        shift = (0.0, 0.0) if whole.shift is None else whole.shift
        nowhere = (np.nan, np.nan, whole.peak, 0, reason or "no shift could be found")
        return Fine(Affine.shift(*shift), None, whole.correlation, whole.best_correlation, *nowhere)
    still, moving = nuclei(density, spectra[0]), thinned(nuclei(marker, spectra[1]))
    affine, field = Affine.shift(*whole.shift), None
    centres = block_centres(marker.shape)
    points = centres.reshape(-1, 2)
    for _ in range(ROUNDS):
        # What remains is measured on the images as they lie now, and added to what was found before.
        shifts, weights = block_shifts(sampled(still, marker.shape, affine, field, step=STEP), moving, points)
        kept = agreeing(points, shifts, weights)
        if kept.sum() < LEAST_BLOCKS:
            break
        before = points if field is None else points + field.of(points)
        wanted = affine.points(before + shifts)[kept]
        before = affine.points(before)
        affine = _within_bounds(similarity(points[kept], wanted, weights[kept]), points[kept], wanted)
        left = affine.inverse().points(wanted) - points[kept]
        field = _smooth_field(centres, points[kept], left, weights[kept])
        moved_by = np.linalg.norm(affine.points(points + field.of(points)) - before, axis=1)
        if np.quantile(moved_by, 0.95) < SETTLED:
            break
    between = block_centres(marker.shape, offset=BLOCK // 4).reshape(-1, 2)
    moved = sampled(still, marker.shape, affine, field, step=STEP)
    shifts, weights = block_shifts(moved, moving, between)
    # Where the tissue is still off, neighbours are off alike; a block that stands alone was measured wrongly.
    lengths = np.linalg.norm(shifts[agreeing(between, shifts, weights)], axis=1)
    residuals = np.quantile(lengths, [0.5, 0.95]) if len(lengths) else (np.nan, np.nan)
    plain = sampled(
        torch.from_numpy(np.ascontiguousarray(density, np.float32)), marker.shape, affine, field, np.nan
    ).numpy()
    covered = np.isfinite(plain)
    after = correlate(plain[covered], marker[covered]) if covered.any() else np.nan
    return Fine(
        affine, field, whole.correlation, after, float(residuals[0]), float(residuals[1]), whole.peak, len(lengths)
    )


def _doubt(whole: Registration, shape: tuple[int, ...]) -> str:
    if min(shape) < LEAST_SIDE:
        return f"too small: {shape[0]} x {shape[1]} pixels, at least {LEAST_SIDE} are needed"
    if not np.isfinite(whole.peak):
        return "no nuclei: the density or the marker is constant"
    if whole.peak < LEAST_PEAK:
        return f"no match: the peak of {whole.peak:.1f} may be chance, {LEAST_PEAK:g} is needed"
    return ""


def _better_otherwise(whole: Registration, density: np.ndarray, marker: np.ndarray) -> str:
    """A reason against a weak match: the density fits better mirrored or turned. Empty for a clear match."""
    if whole.peak >= SURE_PEAK:
        return ""
    turns = range(4) if density.shape[0] == density.shape[1] else (0, 2)
    others = [np.rot90(image, turn) for image in (density, density[:, ::-1]) for turn in turns][1:]
    best = max(register(np.ascontiguousarray(other), marker).peak for other in others)
    if best <= whole.peak:
        return ""
    return f"no match: mirrored or turned it fits better (peak {best:.1f}) than as it is ({whole.peak:.1f})"


def _within_bounds(found: Affine, points: np.ndarray, wanted: np.ndarray) -> Affine:
    """The similarity, or the median shift where it turns or scales more than a region can."""
    if abs(found.rotation_deg) <= LARGEST_ROTATION_DEG and abs(found.scale - 1) <= LARGEST_SCALING:
        return found
    return Affine.shift(*np.median(wanted - points, axis=0))


def _smooth_field(centres: np.ndarray, points: np.ndarray, left: np.ndarray, weights: np.ndarray) -> Field:
    """The field whose nodes are the block centres: a weighted mean of the displacements ``left`` (n, 2) nearby."""
    width = SMOOTHING * BLOCK / 2
    distance = np.square(centres.reshape(-1, 1, 2) - points).sum(-1)
    bell = np.exp(-0.5 * distance / width**2) * weights
    nodes = (bell @ left) / (bell.sum(1, keepdims=True) + PRIOR * weights.mean())
    length = np.linalg.norm(nodes, axis=1, keepdims=True)
    nodes *= np.minimum(1.0, LARGEST_DISPLACEMENT / np.maximum(length, 1e-9))
    return Field(nodes.reshape(centres.shape), float(centres[0, 0, 0]), BLOCK / 2)
