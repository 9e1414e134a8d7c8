"""Where each point of a marker image lies in its H&E, and the H&E moved there, region by region.

Points are (y, x) in pixels; the centre of the first pixel is (0, 0).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from orion_unet.slides.intensity import WHITE

# Pixels around a region that bicubic interpolation needs.
MARGIN = 3
# An H&E that is finer by less than this is not smoothed: its neighbouring pixels would weigh under 0.02 %.
LEAST_SMOOTHED = 1.45
# Moved at once; bounds the memory of the coordinates, and the sides of what is read.
ROWS, COLUMNS = 512, 2048
# Points are rounded to this fraction of a pixel, so that they are exact in float32 whatever part of an image is read.
FRACTION = 1024


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
        """Displacements (2, rows, columns), down and right, of the grid of points with these coordinates.

        The same bits for a point whatever grid it is in, which a product of matrices would not give.
        """
        found = self.nodes.transpose(2, 0, 1)
        for axis, places in ((1, rows), (2, columns)):
            index = np.clip((places - self.first) / self.step, 0, found.shape[axis] - 1)
            before = index.astype(np.int64)
            shares = np.expand_dims(index - before, tuple({0, 1, 2} - {axis}))
            # The last node has none after it: there, the share is 0.
            steps = np.diff(found, axis=axis, append=0).take(before, axis)
            steps *= shares
            steps += found.take(before, axis)
            found = steps
        return found

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
        down, across = down + moved[0], across + moved[1]
    found = []
    for turn in affine.matrix:
        places = np.multiply(across, turn[1], out=np.empty((len(rows), len(columns))))
        places += turn[2]
        places += turn[0] * down
        found.append(places)
    return found[0], found[1]


Reader = Callable[[int, int, int, int], np.ndarray]
Part = tuple[int, int, int, int]


def move(
    read: Reader,
    he_shape: tuple[int, int],
    affine: Affine,
    field: Field | None,
    region: Part,
    mode: str = "bicubic",
) -> tuple[np.ndarray, np.ndarray]:
    """The H&E as it lies on a region (y, x, height, width) of the marker image.

    ``read`` returns regions (y, x, height, width) of the H&E as stored, (h, w, 3); only what is needed is read. The
    ``field`` counts from the same point as ``affine``. Interpolation is bicubic (Keys, IEEE Transactions on Acoustics,
    Speech, and Signal Processing 1981), or with the ``mode`` bilinear, which is faster; where the H&E is finer than the
    markers, it is smoothed first.

    Returns the moved region (h, w, 3) in the dtype that was read, and where it is inside the H&E (h, w) bool. Outside
    is white for integers, and 1 for floats. A pixel has the same bits whatever region it is moved in.
    """
    moved: np.ndarray | None = None
    inside = np.zeros(region[2:], bool)
    for top, left, piece in _pieces(region):
        points = _points(affine, field, piece)
        pixels, covered = _sampled(read, he_shape, points, affine.scale, mode)
        if moved is None:
            moved = np.empty((*region[2:], 3), pixels.dtype)
        place = np.s_[top : top + piece[2], left : left + piece[3]]
        moved[place], inside[place] = pixels, covered
    assert moved is not None
    return moved, inside


def covered(he_shape: tuple[int, int], affine: Affine, field: Field | None, region: Part) -> np.ndarray:
    """Where a region is inside the H&E, (h, w) bool, as ``move`` returns it; reads no pixels."""
    inside = np.zeros(region[2:], bool)
    for top, left, piece in _pieces(region):
        found = within(_points(affine, field, piece), he_shape, 0.5)
        inside[top : top + piece[2], left : left + piece[3]] = found
    return inside


def _pieces(region: Part) -> Iterator[tuple[int, int, Part]]:
    """The region in pieces: where each begins in it, and its place."""
    y, x, height, width = region
    for top in range(0, height, ROWS):
        for left in range(0, width, COLUMNS):
            yield top, left, (y + top, x + left, min(ROWS, height - top), min(COLUMNS, width - left))


def _points(affine: Affine, field: Field | None, piece: Part) -> tuple[np.ndarray, np.ndarray]:
    """Where the pixels of a piece lie in the H&E, y and x, rounded."""
    y, x, height, width = piece
    rows, columns = np.arange(y, y + height, dtype=np.float64), np.arange(x, x + width, dtype=np.float64)
    points = grid_points(affine, field, rows, columns)
    for places in points:
        places *= FRACTION
        np.rint(places, out=places)
        places /= FRACTION
    return points


def _sampled(
    read: Reader, he_shape: tuple[int, int], points: tuple[np.ndarray, np.ndarray], scale: float, mode: str
) -> tuple[np.ndarray, np.ndarray]:
    """The H&E (h, w, 3) at rounded points of it (y and x, (h, w) each), and which of them are inside."""
    low, high = ([float(limit(places)) for places in points] for limit in (np.min, np.max))
    everywhere = min(low) >= -0.5 and all(most <= side - 0.5 for most, side in zip(high, he_shape, strict=True))
    inside = np.ones(points[0].shape, bool) if everywhere else within(points, he_shape, 0.5)
    sigma = (scale - 1) / 2 if scale > LEAST_SMOOTHED else 0.0
    margin = MARGIN + math.ceil(3 * sigma)
    if not inside.any():
        dtype = read(0, 0, 1, 1).dtype
        return np.full((*inside.shape, 3), _white(dtype), dtype), inside
    corner = [min(max(math.floor(least) - margin, 0), side - 1) for least, side in zip(low, he_shape, strict=True)]
    end = [min(max(math.ceil(most) + margin, 0), side - 1) + 1 for most, side in zip(high, he_shape, strict=True)]
    stored = read(corner[0], corner[1], end[0] - corner[0], end[1] - corner[1])
    dtype = stored.dtype
    image = _canvas(stored, sigma)
    for places, start, size in zip(points, corner, stored.shape, strict=False):
        places -= start
        # What is outside the H&E becomes white, and must not lead outside of what was read.
        np.clip(places, 0, size - 1, out=places)
    grid = sampling_grid(points, (image.shape[-2], image.shape[-1]))
    found = F.grid_sample(image, grid, mode=mode, padding_mode="border", align_corners=True)[0]
    if dtype.kind in "iu":
        found = found.clamp_(0, np.iinfo(dtype).max).round_()
    moved = found.permute(1, 2, 0).numpy().astype(dtype, order="C")
    if not everywhere:
        moved[~inside] = _white(dtype)
    return moved, inside


def _canvas(stored: np.ndarray, sigma: float) -> torch.Tensor:
    """Pixels (h, w, 3) as a larger image (1, 3, H, W), its sides one more than powers of two, smoothed.

    grid_sample counts from -1 to 1: on such sides it finds rounded points exactly. Beyond the pixels are as many
    copies of the last ones as interpolation reaches.
    """
    height, width = stored.shape[:2]
    sides = [(1 << (side + MARGIN - 2).bit_length()) + 1 for side in (height, width)]
    image = np.zeros((1, 3, *sides), np.float32)
    inner = image[0, :, :height, :width]
    inner[:] = _smoothed(stored.transpose(2, 0, 1), sigma) if sigma > 0 else stored.transpose(2, 0, 1)
    image[0, :, height : height + MARGIN, :width] = inner[:, -1:]
    image[0, :, :, width : width + MARGIN] = image[0, :, :, width - 1 : width]
    return torch.from_numpy(image)


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


def _smoothed(image: np.ndarray, sigma: float) -> np.ndarray:
    """A Gaussian filter of (3, H, W), edges replicated; float32."""
    reach = math.ceil(3 * sigma)
    bell = [math.exp(-0.5 * (offset / sigma) ** 2) for offset in range(-reach, reach + 1)]
    wide = np.empty((3, *(side + 2 * reach for side in image.shape[1:])), np.float32)
    rows = wide[:, :, reach:-reach]
    rows[:, reach:-reach] = image
    rows[:, :reach], rows[:, -reach:] = image[:, :1], image[:, -1:]
    wide[:, :, :reach], wide[:, :, -reach:] = rows[:, :, :1], rows[:, :, -1:]
    padded = torch.from_numpy(wide)
    for axis in (-2, -1):
        # The sum of shifted images: far faster here than a convolution by channel.
        length = padded.shape[axis] - 2 * reach
        smooth = padded.narrow(axis, reach, length) * (bell[reach] / sum(bell))
        both = torch.empty_like(smooth)
        for offset in range(reach):
            torch.add(padded.narrow(axis, offset, length), padded.narrow(axis, 2 * reach - offset, length), out=both)
            # Not add_(alpha=): a processor that multiplies and adds at once may round parts of a row otherwise.
            smooth.add_(both.mul_(bell[offset] / sum(bell)))
        padded = smooth
    return padded.numpy()


def _white(dtype: np.dtype) -> float:
    return WHITE.get(dtype.newbyteorder("=").name, 1.0)
