"""Which parts of a slide become pairs: squares of tissue, the whole slide in squares."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# A square needs this share of tissue. The search grid is finer than the squares, so that tissue is used well.
LEAST_TISSUE, OFFSETS = 0.5, 4


@dataclass(frozen=True)
class Region:
    """A rectangle of the marker image at full resolution [pixels]; ``tissue_fraction`` is its share of tissue."""

    core: str
    y: int
    x: int
    height: int
    width: int
    tissue_fraction: float


class Areas:
    """Shares of tissue of rectangles of the marker image, from a map of it (h, w) of pixels of side ``factor``."""

    def __init__(self, tissue: np.ndarray, factor: float) -> None:
        self._sums = np.pad(np.cumsum(np.cumsum(tissue, 0, dtype=np.int64), 1), ((1, 0), (1, 0)))
        self._factor = factor

    def share(self, y: int, x: int, height: int, width: int) -> float:
        """Share of tissue in [0, 1]; 0 beyond the map."""
        limits = [side - 1 for side in self._sums.shape]
        top, bottom = (min(max(round(place / self._factor), 0), limits[0]) for place in (y, y + height))
        left, right = (min(max(round(place / self._factor), 0), limits[1]) for place in (x, x + width))
        area = (bottom - top) * (right - left)
        sums = self._sums
        inside = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
        return float(inside / area) if area else 0.0


def tissue_regions(areas: Areas, shape: tuple[int, int], side: int) -> list[tuple[int, int, int, int, float]]:
    """Squares (y, x, side, side, share of tissue) that do not overlap, at least half tissue, on the grid of the offset
    at which the most tissue is used."""
    best: list[tuple[int, int, int, int, float]] = []
    best_tissue = 0.0
    for down in range(OFFSETS):
        for right in range(OFFSETS):
            found = []
            for y in range(down * side // OFFSETS, shape[0] - side + 1, side):
                for x in range(right * side // OFFSETS, shape[1] - side + 1, side):
                    share = areas.share(y, x, side, side)
                    if share >= LEAST_TISSUE:
                        found.append((y, x, side, side, share))
            tissue = sum(place[-1] for place in found)
            if tissue > best_tissue * 1.001:
                best, best_tissue = found, tissue
    return best


def whole_regions(areas: Areas, shape: tuple[int, int], side: int) -> list[tuple[int, int, int, int, float]]:
    """The slide in squares, left out where they have no tissue. At the lower and right edge, what is left over of a
    square stands alone, or belongs to the one before where it is less than half."""
    found = []
    for y, height in _cuts(shape[0], side):
        for x, width in _cuts(shape[1], side):
            share = areas.share(y, x, height, width)
            if share > 0:
                found.append((y, x, height, width, share))
    return found


def _cuts(length: int, side: int) -> list[tuple[int, int]]:
    """Start and length of every piece."""
    starts = list(range(0, length, side))
    if len(starts) > 1 and length - starts[-1] < side / 2:
        starts.pop()
    return [(start, end - start) for start, end in zip(starts, [*starts[1:], length], strict=True)]


def spread(
    places: list[tuple[int, int, int, int, float]], count: int | None, seed: int
) -> list[tuple[int, int, int, int, float]]:
    """At most ``count`` places, far from each other: the first drawn from the seed, each further one the farthest from
    those chosen. In the order of the slide."""
    if count is None or count >= len(places):
        return places
    centres = np.array([(y + h / 2, x + w / 2) for y, x, h, w, _ in places])
    chosen = [int(np.random.default_rng(seed).integers(len(places)))]
    nearest = np.linalg.norm(centres - centres[chosen[0]], axis=1)
    while len(chosen) < count:
        chosen.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, np.linalg.norm(centres - centres[chosen[-1]], axis=1))
    return [places[index] for index in sorted(chosen)]
