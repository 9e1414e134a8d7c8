"""Outlines of cells along the edges of their pixels, found band by band, as rings that GeoJSON can hold."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

Ring = list[tuple[int, int]]
# A polygon is its outer ring and its holes.
Polygon = list[Ring]


class OutlineTracer:
    """Collects the corners of cells from bands of a label image, and gives the polygons of the cells that end there.

    A corner depends on the 2 x 2 pixels around it alone, so that cells of any size are exact, wherever bands meet.
    Coordinates are pixels, (0, 0) the upper left corner of the first one. ``last`` (n,) is the band in which each
    cell ends.
    """

    def __init__(self, last: np.ndarray) -> None:
        self._last = last
        self._band = 0
        # Label, y, x of every corner of the cells that have not ended, and on which side of it the cell's pixel is.
        self._open = np.empty((5, 0), np.int32)

    def add(self, band: np.ndarray, above: np.ndarray, top: int, is_last: bool) -> Iterator[tuple[int, list[Polygon]]]:
        """Add the next band (h, W) of labels 1 to n, given the row (W,) above it (zeros over the first one).

        Yields the cells that end in it, each with its number and its polygons: one for each 4-connected part.
        """
        pixels = np.pad(np.concatenate([above[None], band]), ((0, int(is_last)), (1, 1)))
        corners = np.concatenate([self._open, _corners(pixels, top)], axis=1)
        # A cell whose last row is the last of this band has corners below it, which the next band brings.
        bottom = np.unique(band[-1]) if not is_last else np.empty(0, band.dtype)
        ended = (self._last[corners[0] - 1] <= self._band) & ~np.isin(corners[0], bottom)
        self._open = corners[:, ~ended]
        self._band += 1
        yield from _polygons(corners[:, ended])


def _corners(pixels: np.ndarray, top: int) -> np.ndarray:
    """Corners (5, k): label, y, x, whether the cell's side is east, whether it is south.

    ``pixels`` (h + 1, w + 2) have a column of zeros at each side; between the first two rows is the line y = ``top``.
    """
    parts = []
    for south in (False, True):
        for east in (False, True):
            own, beside = _quarter(pixels, south, east), _quarter(pixels, south, not east)
            over, across = _quarter(pixels, not south, east), _quarter(pixels, not south, not east)
            convex = (own > 0) & (beside != own) & (over != own)
            concave = (across > 0) & (beside == across) & (over == across) & (own != across)
            for found, label, is_east, is_south in (
                (convex, own, east, south),
                (concave, across, not east, not south),
            ):
                y, x = np.nonzero(found)
                sides = np.broadcast_to(np.array([[is_east], [is_south]], np.int32), (2, len(y)))
                parts.append(np.concatenate([np.stack([label[y, x], y + top, x]), sides]).astype(np.int32))
    return np.concatenate(parts, axis=1)


def _quarter(pixels: np.ndarray, south: bool, east: bool) -> np.ndarray:
    """Of the four pixels around every inner corner, the one on that side."""
    rows = slice(1, None) if south else slice(None, -1)
    columns = slice(1, None) if east else slice(None, -1)
    return pixels[rows, columns]


def _polygons(corners: np.ndarray) -> Iterator[tuple[int, list[Polygon]]]:
    """The polygons of each label, from all of its corners.

    On a line of the grid, the outline of a cell runs from its first corner to the second, from its third to the
    fourth, and so on. Where two of its pixels touch at a corner only, that corner counts twice, once for each, and
    the sides say which comes first: the outline stays with its pixel.
    """
    label, y, x, east, south = corners
    across = np.lexsort((east, x, y, label))
    down = np.lexsort((south, y, x, label))
    beside, below = np.empty(len(label), np.int64), np.empty(len(label), np.int64)
    for mate, order in ((beside, across), (below, down)):
        mate[order[::2]], mate[order[1::2]] = order[1::2], order[::2]
    beside_of, below_of = beside.tolist(), below.tolist()
    labels, ys, xs = label.tolist(), y.tolist(), x.tolist()
    done = bytearray(len(labels))
    of_label: dict[int, list[Ring]] = {}
    for first in np.argsort(label, kind="stable").tolist():
        if done[first]:
            continue
        ring: Ring = []
        corner = first
        while not done[corner]:
            other = beside_of[corner]
            done[corner] = done[other] = 1
            ring += [(xs[corner], ys[corner]), (xs[other], ys[other])]
            corner = below_of[other]
        of_label.setdefault(labels[first], []).append(ring)
    for number, rings in of_label.items():
        yield number, _nested([part for ring in rings for part in _simple(ring)])


def _simple(ring: Ring) -> list[Ring]:
    """A ring cut into rings that pass every corner once."""
    if len(set(ring)) == len(ring):
        return [ring]
    parts: list[Ring] = []
    path: Ring = []
    places: dict[tuple[int, int], int] = {}
    for corner in ring:
        if corner in places:
            start = places[corner]
            parts.append(path[start:])
            for left in path[start + 1 :]:
                del places[left]
            del path[start + 1 :]
        else:
            places[corner] = len(path)
            path.append(corner)
    return [*parts, path]


def signed_area(ring: Ring) -> float:
    """Area of a ring, positive where it runs counter-clockwise in coordinates (x, y)."""
    total = sum(x * below - right * y for (x, y), (right, below) in zip(ring, [*ring[1:], ring[0]], strict=True))
    return total / 2


def _nested(rings: list[Ring]) -> list[Polygon]:
    """Rings put together: each hole in the outer ring around it, outer rings counter-clockwise, holes clockwise."""
    if len(rings) == 1:
        return [[_turned(rings[0], True)]]
    by_size = sorted(rings, key=lambda ring: -abs(signed_area(ring)))
    polygons: list[Polygon] = []
    for ring in by_size:
        # A point inside the ring, beside its first corner; it is in a hole where the rings around it are odd in number.
        around = [polygon for polygon in polygons if _contains(polygon[0], _inner_point(ring))]
        owner = min(around, key=lambda polygon: abs(signed_area(polygon[0])), default=None)
        if owner is None or any(_contains(hole, _inner_point(ring)) for hole in owner[1:]):
            polygons.append([_turned(ring, True)])
        else:
            owner.append(_turned(ring, False))
    return polygons


def _turned(ring: Ring, counter_clockwise: bool) -> Ring:
    return ring if (signed_area(ring) > 0) == counter_clockwise else ring[::-1]


def _inner_point(ring: Ring) -> tuple[float, float]:
    """A point inside a ring: the middle of the pixel below its topmost, then leftmost corner."""
    x, y = min(ring, key=lambda corner: (corner[1], corner[0]))
    return x + 0.5, y + 0.5


def _contains(ring: Ring, point: tuple[float, float]) -> bool:
    """Whether a point that is on no line of the grid lies in a ring: an odd number of its edges are to the right."""
    x, y = point
    edges = zip(ring, [*ring[1:], ring[0]], strict=True)
    return sum(x0 == x1 and x0 > x and min(y0, y1) < y < max(y0, y1) for (x0, y0), (x1, y1) in edges) % 2 == 1
