"""Where each point of a marker image lies in its H&E, and the H&E moved there, region by region.

Points are (y, x) in pixels; the centre of the first pixel is (0, 0).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from orion_unet.slides.intensity import WHITE

# Pixels around a region that bicubic interpolation needs.
MARGIN = 3
# An H&E that is finer by less than this is not smoothed: its neighbouring pixels would weigh under 0.02 %.
LEAST_SMOOTHED = 1.45
# Moved at once; bounds the memory of the coordinates.
ROWS = 512


@dataclass(frozen=True)
class Affine:
    """An affine map from points of the marker image to points of the H&E; ``matrix`` (2, 3) float64."""

    matrix: np.ndarray

    @staticmethod
    def identity() -> Affine:
        """Every point stays where it is."""
        return Affine(np.eye(2, 3))

    @staticmethod
    def shift(down: float, right: float) -> Affine:
        """Every point moves down and right."""
        return Affine(np.array([[1.0, 0.0, down], [0.0, 1.0, right]]))

    @staticmethod
    def scaling(factor: float) -> Affine:
        """Every pixel becomes ``factor`` pixels along a side; the outer edges of the images coincide."""
        # Points count from the centre of the first pixel.
        return Affine(np.column_stack([np.eye(2) * factor, np.full(2, (factor - 1) / 2)]))

    def between(self, marker: float, he: float) -> Affine:
        """The map between whole images, of one between thumbnails smaller by the factors ``marker`` and ``he``."""
        return Affine.scaling(marker).inverse().then(self).then(Affine.scaling(he))

    def points(self, points: np.ndarray) -> np.ndarray:
        """Points (..., 2) of the marker image as points (..., 2) of the H&E."""
        return points @ self.matrix[:, :2].T + self.matrix[:, 2]

    def inverse(self) -> Affine:
        """The map back."""
        turned = np.linalg.inv(self.matrix[:, :2])
        return Affine(np.column_stack([turned, -turned @ self.matrix[:, 2]]))

    def then(self, other: Affine) -> Affine:
        """First this map, then the other."""
        turned, offset = other.matrix[:, :2], other.matrix[:, 2]
        return Affine(np.column_stack([turned @ self.matrix[:, :2], turned @ self.matrix[:, 2] + offset]))

    @property
    def scale(self) -> float:
        """Pixels of the H&E in a pixel of the marker image, along a side."""
        return float(math.sqrt(abs(np.linalg.det(self.matrix[:, :2]))))

    @property
    def rotation_deg(self) -> float:
        """Angle in degrees, in (-180, 180], by which the marker image turns from right towards down to fit."""
        down, right = self.matrix[:, 1]
        return math.degrees(math.atan2(down, right))

    @property
    def mirrored(self) -> bool:
        """Whether it fits only after it is flipped."""
        return bool(np.linalg.det(self.matrix[:, :2]) < 0)


@dataclass(frozen=True)
class Field:
    """Small displacements (dy, dx) in pixels of a marker region, to be added to its points before an affine map.

    ``nodes`` (rows, columns, 2) are at ``first`` + ``step`` · index along each axis. Between nodes the displacement
    is interpolated linearly, and outside of them it is that of the nearest node.
    """

    nodes: np.ndarray
    first: float
    step: float

    def at(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Displacements (rows, columns, 2) of the grid of points with these coordinates."""
        sides = self.nodes.shape[:2]
        down, across = (self._shares(places, side) for places, side in zip((rows, columns), sides, strict=True))
        return np.stack([down @ self.nodes[..., axis] @ across.T for axis in range(2)], axis=-1)

    def of(self, points: np.ndarray) -> np.ndarray:
        """Displacements (n, 2) of points (n, 2)."""
        down, across = (self._shares(points[:, axis], self.nodes.shape[axis]) for axis in range(2))
        found: np.ndarray = np.einsum("ni,ijk,nj->nk", down, self.nodes, across, optimize=True)
        return found

    def _shares(self, places: np.ndarray, length: int) -> np.ndarray:
        """Weights (n, length) of the nodes along an axis at these coordinates; each row sums to 1."""
        index = np.clip((places - self.first) / self.step, 0, length - 1)
        found: np.ndarray = np.clip(1 - np.abs(index[:, None] - np.arange(length)), 0, None)
        return found

    @property
    def largest(self) -> float:
        """Length of the largest displacement, in pixels."""
        return float(np.linalg.norm(self.nodes, axis=-1).max())


def grid_points(
    affine: Affine, field: Field | None, rows: np.ndarray, columns: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Where the points of a grid of these coordinates lie in the H&E: their y and x, (rows, columns) each."""
    down: np.ndarray = rows[:, None]
    across: np.ndarray = columns[None]
    if field is not None:
        moved = field.at(rows, columns)
        down, across = down + moved[..., 0], across + moved[..., 1]
    y, x = (turn[0] * down + (turn[1] * across + turn[2]) for turn in affine.matrix)
    return y, x


Reader = Callable[[int, int, int, int], np.ndarray]


def move(
    read: Reader,
    he_shape: tuple[int, int],
    affine: Affine,
    field: Field | None,
    region: tuple[int, int, int, int],
    mode: str = "bicubic",
) -> tuple[np.ndarray, np.ndarray]:
    """The H&E as it lies on a region (y, x, height, width) of the marker image.

    ``read`` returns regions (y, x, height, width) of the H&E as stored, (h, w, 3); only what is needed is read. A
    ``field`` has the upper left corner of the region as its origin. Interpolation is bicubic (Keys, IEEE Transactions
    on Acoustics, Speech, and Signal Processing 1981), or with the ``mode`` bilinear, which is faster; where the H&E is
    finer than the markers, it is smoothed first.

    Returns the moved region (h, w, 3) in the dtype that was read, and where it is inside the H&E (h, w) bool. Outside
    is white for integers, and 1 for floats.
    """
    y, x, height, width = region
    moved: np.ndarray | None = None
    inside = np.zeros((height, width), bool)
    for top in range(0, height, ROWS):
        rows = np.arange(top, min(top + ROWS, height), dtype=np.float64)
        columns = np.arange(width, dtype=np.float64)
        points = grid_points(Affine.shift(y, x).then(affine), field, rows, columns)
        band, covered = _sampled(read, he_shape, points, affine.scale, mode)
        if moved is None:
            moved = np.empty((height, width, 3), band.dtype)
        moved[top : top + len(rows)], inside[top : top + len(rows)] = band, covered
    assert moved is not None
    return moved, inside


def _sampled(
    read: Reader, he_shape: tuple[int, int], points: tuple[np.ndarray, np.ndarray], scale: float, mode: str
) -> tuple[np.ndarray, np.ndarray]:
    """The H&E (h, w, 3) at points of it (y and x, (h, w) each), and which of them are inside."""
    inside = within(points, he_shape, 0.5)
    sigma = (scale - 1) / 2 if scale > LEAST_SMOOTHED else 0.0
    margin = MARGIN + math.ceil(3 * sigma)
    if not inside.any():
        dtype = read(0, 0, 1, 1).dtype
        return np.full((*inside.shape, 3), _white(dtype), dtype), inside
    low, high = [], []
    for places, side in zip(points, he_shape, strict=True):
        low.append(min(max(math.floor(places.min()) - margin, 0), side - 1))
        high.append(min(max(math.ceil(places.max()) + margin, 0), side - 1))
    stored = read(low[0], low[1], high[0] - low[0] + 1, high[1] - low[1] + 1)
    dtype = stored.dtype
    image = torch.from_numpy(stored.transpose(2, 0, 1).astype(np.float32, order="C"))[None]
    image = _smoothed(image, sigma)
    grid = sampling_grid((points[0] - low[0], points[1] - low[1]), (image.shape[-2], image.shape[-1]))
    found = F.grid_sample(image, grid, mode=mode, padding_mode="border", align_corners=True)[0]
    if dtype.kind in "iu":
        found = found.clamp_(0, np.iinfo(dtype).max).round_()
    moved = found.permute(1, 2, 0).numpy().astype(dtype, order="C")
    if not inside.all():
        moved[~inside] = _white(dtype)
    return moved, inside


def within(points: tuple[np.ndarray, np.ndarray], shape: tuple[int, ...], margin: float = 0.0) -> np.ndarray:
    """Which points (y and x, (h, w) each) are inside an image of this shape. With a ``margin`` of half a pixel, what
    lies beyond the outermost centres still belongs to it."""
    found = np.ones(points[0].shape, bool)
    for places, side in zip(points, shape, strict=True):
        found &= (places >= -margin) & (places <= side - 1 + margin)
    return found


def sampling_grid(points: tuple[np.ndarray, np.ndarray], shape: tuple[int, int]) -> torch.Tensor:
    """Points (y and x, (h, w) each) of an image of this shape as grid_sample counts them: (1, h, w, 2) from -1 to 1,
    x first."""
    grid = np.empty((1, *points[0].shape, 2), np.float32)
    for axis, side in enumerate(shape):
        # A side of one pixel has no scale.
        grid[0, ..., 1 - axis] = points[axis] * (2 / max(side - 1, 1)) - 1
    return torch.from_numpy(grid)


def _smoothed(image: torch.Tensor, sigma: float) -> torch.Tensor:
    """A Gaussian filter of (1, 3, H, W), edges replicated."""
    if sigma <= 0:
        return image
    reach = math.ceil(3 * sigma)
    bell = [math.exp(-0.5 * (offset / sigma) ** 2) for offset in range(-reach, reach + 1)]
    padded = F.pad(image, (reach, reach, reach, reach), mode="replicate")
    for axis in (-2, -1):
        # The sum of shifted images: far faster here than a convolution by channel.
        length = padded.shape[axis] - 2 * reach
        smooth = padded.narrow(axis, 0, length) * (bell[0] / sum(bell))
        for offset, weight in enumerate(bell[1:], 1):
            smooth.add_(padded.narrow(axis, offset, length), alpha=weight / sum(bell))
        padded = smooth
    return padded


def _white(dtype: np.dtype) -> float:
    return WHITE.get(dtype.newbyteorder("=").name, 1.0)
