"""Drawing primitives of the demo data: smooth noise, fibres, wavy outlines and cells, with NumPy only.

Lengths are in pixels of about 0.75 um whatever the size of the image, so that a lymphocyte is 8 pixels wide. No loop
runs over pixels or cells, and memory is bounded by a few maps of the image.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]
Rows = NDArray[np.bool_] | NDArray[np.intp]

FAR = 1000.0
"""A distance larger than any that matters, pixels."""
_WINDOW = 26
"""Half the side of the largest window a cell is drawn in, pixels."""
_MARGIN = 45
"""Distance from an outline up to which distances are measured, pixels."""


class Kind(NamedTuple):
    """Shape of the nuclei of one cell type, or of small bodies that are drawn like nuclei."""

    length: float
    """half the long axis, pixels"""
    width: float
    """half the short axis, pixels"""
    spread: float
    """relative standard deviation of the size"""
    bend: float
    """how far the long axis is bent, as a fraction of the width"""
    reach: float
    """how far the cell extends beyond its nucleus, pixels"""
    chromatin: float
    """haematoxylin optical density of the nucleus"""
    clumps: float
    """contrast of its chromatin texture"""


EPITHELIUM, FIBROBLAST, MUSCLE, ENDOTHELIUM, T_CELL, B_CELL, CENTROBLAST, MACROPHAGE = range(8)
ERYTHROCYTE, GOBLET, NUCLEOLUS = range(8, 11)
KINDS = (  # in the order of the names above
    Kind(5.8, 3.3, 0.14, 0.15, 10.0, 0.37, 0.34),
    Kind(7.0, 1.7, 0.22, 0.50, 2.0, 0.42, 0.20),
    Kind(7.6, 1.5, 0.12, 0.25, 2.5, 0.38, 0.15),
    Kind(4.2, 1.3, 0.15, 0.40, 1.5, 0.46, 0.15),
    Kind(3.6, 3.2, 0.10, 0.10, 2.2, 0.66, 0.24),
    Kind(3.8, 3.4, 0.10, 0.10, 2.2, 0.60, 0.26),
    Kind(4.8, 4.1, 0.13, 0.12, 2.6, 0.38, 0.44),
    Kind(5.0, 3.3, 0.15, 0.45, 5.5, 0.34, 0.30),
    Kind(3.4, 3.1, 0.07, 0.10, 1.0, 0.00, 0.00),
    Kind(6.0, 4.2, 0.15, 0.05, 1.0, 0.00, 0.00),
    Kind(1.2, 1.1, 0.15, 0.00, 1.0, 0.00, 0.00),
)


@dataclass(frozen=True)
class Cells:
    """One row per cell, (N,) each: centre and half axes in pixels, angle of the long axis in radians."""

    y: Floats
    x: Floats
    angle: Floats
    kind: Ints
    length: Floats
    width: Floats
    bend: Floats
    taper: Floats

    def select(self, rows: Rows) -> Cells:
        """The given rows, in their order."""
        return Cells(*(getattr(self, f.name)[rows] for f in fields(self)))

    @staticmethod
    def join(parts: list[Cells]) -> Cells:
        """All rows of several tables."""
        return Cells(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Cells)))


@dataclass(frozen=True)
class Outline:
    """A closed wavy curve: the edge of a gland, of a vessel's lumen or of a follicle. Lengths in pixels."""

    y: float
    x: float
    radius: float
    stretch: float
    """long axis over short axis"""
    angle: float
    waves: Floats
    """amplitudes (K,) of waves with 2, 3, ... periods around the curve, as fractions of the radius"""
    phases: Floats
    band: float
    """thickness of the epithelium inside, or of the vessel's wall outside"""

    def radii(self, theta: Floats) -> Floats:
        """Radius at the angles ``theta``, in the curve's own frame before stretching."""
        total = np.ones_like(theta)
        for order, (wave, phase) in enumerate(zip(self.waves, self.phases, strict=True), start=2):
            total += wave * np.cos(order * theta + phase)
        return np.float32(self.radius) * total

    def along(self, depth: float, spacing: float) -> tuple[Floats, Floats, Floats]:
        """Points (y, x) every ``spacing`` pixels along the curve, ``depth`` inside it, and the outward angle."""
        theta = np.linspace(0, 2 * np.pi, 361, dtype=np.float32)
        radius = np.maximum(self.radii(theta) - depth, 0)
        u = radius * np.cos(theta) * np.sqrt(self.stretch)
        v = radius * np.sin(theta) / np.sqrt(self.stretch)
        x = self.x + u * np.cos(self.angle) - v * np.sin(self.angle)
        y = self.y + u * np.sin(self.angle) + v * np.cos(self.angle)
        steps = np.hypot(np.diff(x), np.diff(y))
        length = np.concatenate([[0], np.cumsum(steps)])
        at = np.arange(int(length[-1] / spacing)) * spacing
        tangent = np.arctan2(np.gradient(y), np.gradient(x))
        outward = np.interp(at, length, np.unwrap(tangent)) - np.pi / 2
        return np.interp(at, length, y).astype("f4"), np.interp(at, length, x).astype("f4"), outward.astype("f4")


def soft(depth: Floats, width: float = 1.5) -> Floats:
    """Mask in [0, 1] of the pixels where ``depth`` is negative, with an edge ``width`` pixels wide."""
    return np.clip(0.5 - depth / width, 0, 1)


def noise(rng: np.random.Generator, size: int, wavelength: float) -> Floats:
    """Smooth random field (S, S) of about zero mean and unit variance: a cubic B-spline over a random grid."""
    knots = int(size / wavelength) + 5
    field = rng.standard_normal((knots, knots), dtype=np.float32)
    shift = rng.random(2)
    for axis in (0, 1):
        position = np.arange(size) / wavelength + shift[axis]
        first = position.astype(np.intp)
        t = (position - first).astype(np.float32)
        weights = ((1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3)
        spread = sum((w * field[:, first + k] for k, w in enumerate(weights)), np.float32(0))
        field = np.ascontiguousarray(spread.T, np.float32) / np.float32(6)
    # The spline averages neighbouring knots, which reduces the standard deviation to 0.48.
    return field / np.float32(0.48)


def blur(image: Floats, sigma: float) -> Floats:
    """Gaussian blur (S, S) with replicated border; the kernel is cut at three pixels."""
    offsets = np.arange(-3, 4)
    kernel = np.exp(-0.5 * (offsets / sigma) ** 2)
    for _ in range(2):
        padded = np.pad(image, ((3, 3), (0, 0)), mode="edge")
        taps = (np.float32(w) * padded[k : k + len(image)] for k, w in enumerate(kernel / kernel.sum()))
        image = np.ascontiguousarray(sum(taps, np.float32(0)).T)
    return image


def pick(field: Floats, y: Floats, x: Floats) -> Floats:
    """Values of the field at the pixels nearest to the points; points outside get the value at the border."""
    limit = field.shape[0] - 1
    return field[np.clip(np.rint(y), 0, limit).astype(np.intp), np.clip(np.rint(x), 0, limit).astype(np.intp)]


def scatter(rng: np.random.Generator, size: int, spacing: float) -> tuple[Floats, Floats]:
    """Points (y, x) of a hexagonal grid over the image, with enough jitter to hide the grid."""
    rows, columns = np.mgrid[0 : int(size / (0.866 * spacing)) + 1, 0 : int(size / spacing) + 1]
    y = rows * 0.866 * spacing + rng.uniform(-0.33, 0.33, rows.shape) * spacing
    x = (columns + 0.5 * (rows % 2)) * spacing + rng.uniform(-0.33, 0.33, rows.shape) * spacing
    inside = (y > 0) & (x > 0) & (y < size - 1) & (x < size - 1)
    return y[inside].astype(np.float32), x[inside].astype(np.float32)


def streaks(rng: np.random.Generator, angle_y: Floats, angle_x: Floats, steps: int = 11) -> Floats:
    """Fibres in [0, 1] along a field of unit vectors: noise averaged along its flow lines.

    Cabral and Leedom, "Imaging vector fields using line integral convolution", SIGGRAPH 1993.
    """
    size = angle_y.shape[0]
    grain = noise(rng, size, 1.4) + 0.5 * noise(rng, size, 4.0)
    total = grain.copy()
    rows, columns = np.mgrid[0:size, 0:size].astype(np.float32)
    for sign in (1, -1):
        y, x = rows.copy(), columns.copy()
        for _ in range(steps):
            at = np.rint(y).astype(np.int32) * size + np.rint(x).astype(np.int32)
            y = np.clip(y + np.float32(1.6 * sign) * angle_y.ravel()[at], 0, size - 1)
            x = np.clip(x + np.float32(1.6 * sign) * angle_x.ravel()[at], 0, size - 1)
            total += grain.ravel()[at]
    return np.clip(0.5 + 0.27 * total / total.std(), 0, 1)


def grow(rng: np.random.Generator, kind: int, y: Floats, x: Floats, angle: Floats) -> Cells:
    """Cells of one kind at the given points, with random sizes and shapes."""
    traits, count = KINDS[kind], len(y)
    scale = np.clip(1 + traits.spread * rng.standard_normal((2, count), dtype=np.float32), 0.6, 1.5)
    form = rng.standard_normal((2, count), dtype=np.float32)
    return Cells(
        y=y,
        x=x,
        angle=angle.astype(np.float32),
        kind=np.full(count, kind, np.int32),
        length=traits.length * scale[0],
        width=traits.width * scale[1],
        bend=traits.bend * form[0],
        taper=0.12 * form[1],
    )


def stamp(size: int, cells: Cells) -> tuple[Floats, Ints]:
    """Draw cells: for each pixel (S, S) the signed distance to the nearest outline, and the row of that cell or -1.

    Distances are scaled along the long axis, so that the bodies of tall narrow cells are tall and narrow too.
    """
    side = size + 2 * _WINDOW
    depth = np.full(side * side, FAR, np.float32)
    owner = np.full(side * side, -1, np.int32)
    for kind in np.unique(cells.kind):
        traits = KINDS[kind]
        half = int(min(1.2 * traits.length * (1 + traits.reach / traits.width) + 1, _WINDOW))
        step = np.arange(-half, half + 1)
        offsets = step[:, None] * side + step
        rows = np.flatnonzero(cells.kind == kind)
        # In batches, so that memory does not grow with the number of cells.
        for batch in np.array_split(rows, len(rows) // 512 + 1):
            one = cells.select(batch)
            y0, x0 = np.rint(one.y), np.rint(one.x)
            dy = step.astype(np.float32)[None, :, None] - (one.y - y0)[:, None, None]
            dx = step.astype(np.float32)[None, None, :] - (one.x - x0)[:, None, None]
            cos, sin = np.cos(one.angle)[:, None, None], np.sin(one.angle)[:, None, None]
            u = (dx * cos + dy * sin) / one.length[:, None, None]
            v = (dy * cos - dx * sin) / one.width[:, None, None]
            v = (v + one.bend[:, None, None] * (u * u - 0.4)) * (1 + one.taper[:, None, None] * u)
            outside = (np.sqrt(u * u + v * v) - 1) * one.width[:, None, None]
            near = outside < traits.reach
            start = ((y0 + _WINDOW) * side + x0 + _WINDOW).astype(np.intp)
            pixel = (start[:, None, None] + offsets)[near]
            value = outside[near]
            np.minimum.at(depth, pixel, value)
            won = depth[pixel] == value
            owner[pixel[won]] = np.repeat(batch, near.sum((1, 2)))[won]
    inner = (slice(_WINDOW, -_WINDOW), slice(_WINDOW, -_WINDOW))
    return depth.reshape(side, side)[inner].copy(), owner.reshape(side, side)[inner].copy()


def measure(size: int, outlines: list[Outline]) -> tuple[Floats, Floats]:
    """Signed distance (S, S) to the nearest outline, negative inside, and its band; FAR and 0 if none is near."""
    depth = np.full((size, size), FAR, np.float32)
    band = np.zeros((size, size), np.float32)
    for one in outlines:
        half = int(one.radius * 1.6 * np.sqrt(one.stretch) + _MARGIN)
        top, left = max(int(one.y) - half, 0), max(int(one.x) - half, 0)
        window = (slice(top, int(one.y) + half), slice(left, int(one.x) + half))
        rows, columns = depth[window].shape
        dy = np.arange(top, top + rows, dtype=np.float32)[:, None] - np.float32(one.y)
        dx = np.arange(left, left + columns, dtype=np.float32)[None, :] - np.float32(one.x)
        u = (dx * np.cos(one.angle) + dy * np.sin(one.angle)) / np.sqrt(one.stretch)
        v = (dy * np.cos(one.angle) - dx * np.sin(one.angle)) * np.sqrt(one.stretch)
        distance = np.hypot(u, v).astype(np.float32)
        distance -= one.radii(np.arctan2(v, u).astype(np.float32))
        nearer = distance < depth[window]
        depth[window][nearer] = distance[nearer]
        band[window][nearer] = one.band
    return depth, band
