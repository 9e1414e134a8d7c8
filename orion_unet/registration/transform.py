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
        by_row = _between(self.nodes, (rows - self.first) / self.step)
        return _between(by_row.transpose(1, 0, 2), (columns - self.first) / self.step).transpose(1, 0, 2)

    def of(self, points: np.ndarray) -> np.ndarray:
        """Displacements (n, 2) of points (n, 2)."""
        return np.concatenate([self.at(point[:1], point[1:])[0] for point in points])

    @property
    def largest(self) -> float:
        """Length of the largest displacement, in pixels."""
        return float(np.linalg.norm(self.nodes, axis=-1).max())


def _between(nodes: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Linear interpolation along the first axis at fractional indices, clamped to the ends."""
    places = np.clip(places, 0, len(nodes) - 1)
    low = np.minimum(places.astype(int), max(len(nodes) - 2, 0))
    share = (places - low).reshape(-1, *[1] * (nodes.ndim - 1))
    return nodes[low] * (1 - share) + nodes[np.minimum(low + 1, len(nodes) - 1)] * share


Reader = Callable[[int, int, int, int], np.ndarray]


def move(
    read: Reader, he_shape: tuple[int, int], affine: Affine, field: Field | None, region: tuple[int, int, int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """The H&E as it lies on a region (y, x, height, width) of the marker image.

    ``read`` returns regions (y, x, height, width) of the H&E as stored, (h, w, 3); only what is needed is read. A
    ``field`` has the upper left corner of the region as its origin. Interpolation is bicubic (Keys, IEEE Transactions
    on Acoustics, Speech, and Signal Processing 1981); where the H&E is finer than the markers, it is smoothed first.

    Returns the moved region (h, w, 3) in the dtype that was read, and where it is inside the H&E (h, w) bool. Outside
    is white for integers, and 1 for floats.
    """
    y, x, height, width = region
    moved: np.ndarray | None = None
    inside = np.zeros((height, width), bool)
    for top in range(0, height, ROWS):
        rows = np.arange(top, min(top + ROWS, height), dtype=np.float64)
        columns = np.arange(width, dtype=np.float64)
        points = np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1)
        if field is not None:
            points += field.at(rows, columns)
        band, within = _sampled(read, he_shape, affine.points(points + np.array([y, x])), affine.scale)
        if moved is None:
            moved = np.empty((height, width, 3), band.dtype)
        moved[top : top + len(rows)], inside[top : top + len(rows)] = band, within
    assert moved is not None
    return moved, inside


def _sampled(
    read: Reader, he_shape: tuple[int, int], points: np.ndarray, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """The H&E (h, w, 3) at points (h, w, 2) of it, and which of them are inside."""
    limit = np.array(he_shape) - 1
    # Half a pixel beyond the outermost centres still belongs to the image.
    inside = np.asarray(((points >= -0.5) & (points <= limit + 0.5)).all(axis=-1))
    sigma = (scale - 1) / 2 if scale > 1 else 0.0
    margin = MARGIN + math.ceil(3 * sigma)
    low = np.clip(np.floor(points.min((0, 1))).astype(int) - margin, 0, limit)
    high = np.clip(np.ceil(points.max((0, 1))).astype(int) + margin, 0, limit)
    if not inside.any():
        dtype = read(0, 0, 1, 1).dtype
        return np.full((*points.shape[:2], 3), _white(dtype), dtype), inside
    stored = read(int(low[0]), int(low[1]), int(high[0] - low[0] + 1), int(high[1] - low[1] + 1))
    dtype = stored.dtype
    image = torch.from_numpy(np.ascontiguousarray(stored.transpose(2, 0, 1), np.float32))[None]
    image = _smoothed(image, sigma)
    # grid_sample counts from -1 to 1, columns first. A side of one pixel has no scale.
    sides = np.maximum(np.array(image.shape[-2:]) - 1, 1)
    grid = torch.from_numpy((2 * (points - low) / sides - 1)[None, ..., ::-1].astype(np.float32))
    found = F.grid_sample(image, grid, mode="bicubic", padding_mode="border", align_corners=True)[0]
    values = found.permute(1, 2, 0).numpy()
    if dtype.kind in "iu":
        values = np.rint(np.clip(values, 0, np.iinfo(dtype).max))
    moved = values.astype(dtype)
    moved[~inside] = _white(dtype)
    return moved, inside


def _smoothed(image: torch.Tensor, sigma: float) -> torch.Tensor:
    """A Gaussian filter of (1, 3, H, W), edges replicated."""
    if sigma <= 0:
        return image
    reach = math.ceil(3 * sigma)
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float32)
    bell = torch.exp(-0.5 * (offsets / sigma) ** 2)
    bell = (bell / bell.sum()).repeat(3, 1)
    image = F.conv2d(F.pad(image, (0, 0, reach, reach), mode="replicate"), bell[:, None, :, None], groups=3)
    return F.conv2d(F.pad(image, (reach, reach, 0, 0), mode="replicate"), bell[:, None, None], groups=3)


def _white(dtype: np.dtype) -> float:
    return WHITE.get(dtype.newbyteorder("=").name, 1.0)
