"""Measures cells band by band: sums over the pixels of each cell, which are the same however the image is cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from orion_unet.quantification.cell_labels import CellLabels, bands
from orion_unet.slides.markers import MarkerImage

# Values of an image that are in memory at a time, and columns of a block in which rings are found.
VALUES_AT_ONCE, RING_COLUMNS = 1 << 25, 2048

# The fixed range [0, 1] of one channel's stored values.
ToUnit = Callable[[np.ndarray, int], np.ndarray]
Step = Callable[[], None]


@dataclass(frozen=True)
class CellGeometry:
    """Of n cells: ``y`` and ``x`` (n,), the centroid in pixels, where (0, 0) is the centre of the first pixel;
    ``area`` (n,) in pixels; ``last`` (n,), the band of rows in which the cell ends."""

    y: np.ndarray
    x: np.ndarray
    area: np.ndarray
    last: np.ndarray


@dataclass(frozen=True)
class CellMeans:
    """Means (n, C) of the markers in n cells, as stored. ``ring`` (n, C) are those in the rings around the cells, NaN
    where a cell has no room for one; None without rings. ``unit`` (n, C) are means of the values in [0, 1], None where
    no range is known."""

    mean: np.ndarray
    ring: np.ndarray | None = None
    unit: np.ndarray | None = None


def measure_geometry(labels: CellLabels, step: Step) -> CellGeometry:
    """Area and centroid of every cell."""
    size = labels.count + 1
    area, last = np.zeros(size, np.int64), np.zeros(size, np.int64)
    sum_y, sum_x = np.zeros(size), np.zeros(size)
    width = labels.shape[1]
    for band, (top, rows) in enumerate(bands(labels.shape)):
        flat = labels.read(top, rows).ravel()
        inside = np.flatnonzero(flat)
        cell = flat[inside]
        count = np.bincount(cell, minlength=size)
        area += count
        last[count > 0] = band
        y, x = np.divmod(inside, width)
        sum_y += np.bincount(cell, y, size) + count * float(top)
        sum_x += np.bincount(cell, x, size)
        step()
    return CellGeometry(sum_y[1:] / area[1:], sum_x[1:] / area[1:], area[1:], last[1:])


def measure_means(
    labels: CellLabels, image: MarkerImage, channels: Sequence[int], rings: int, to_unit: ToUnit | None, step: Step
) -> CellMeans:
    """Means of the given channels of an image in every cell, and with ``rings`` > 0 in the pixels up to so far from it.

    A pixel is in the ring of the nearest cell only, and never in another cell. ``to_unit`` brings values (n,) of a
    channel into [0, 1]. Raises InputError where the image is damaged.
    """
    size, count = labels.count + 1, len(channels)
    sums = np.zeros((count, size))
    ring_sums = np.zeros((count, size)) if rings else None
    unit_sums = np.zeros((count, size)) if to_unit else None
    area, ring_area = np.zeros(size), np.zeros(size)
    height, width = labels.shape
    for top, rows in bands(labels.shape):
        above, below = min(rings, top), min(rings, height - top - rows)
        around = labels.read(top - above, rows + above + below)
        own = around[above : above + rows].ravel()
        inside = np.flatnonzero(own)
        cell = own[inside]
        area += np.bincount(cell, minlength=size)
        if ring_sums is not None:
            ring = _rings(around, rings)[above : above + rows].ravel()
            near = np.flatnonzero(ring)
            ring_cell = ring[near]
            ring_area += np.bincount(ring_cell, minlength=size)
        at_once = max(1, VALUES_AT_ONCE // own.size)
        for start in range(0, count, at_once):
            chosen = list(channels[start : start + at_once])
            for place, values in enumerate(image.read(chosen, top, 0, rows, width), start):
                flat = values.ravel()
                found = flat[inside].astype(np.float64)
                sums[place] += np.bincount(cell, found, size)
                if unit_sums is not None and to_unit is not None:
                    unit_sums[place] += np.bincount(cell, to_unit(found, channels[place]), size)
                if ring_sums is not None:
                    ring_sums[place] += np.bincount(ring_cell, flat[near].astype(np.float64), size)
        step()
    with np.errstate(invalid="ignore", divide="ignore"):
        return CellMeans(
            (sums / area).T[1:],
            None if ring_sums is None else (ring_sums / ring_area).T[1:],
            None if unit_sums is None else (unit_sums / area).T[1:],
        )


def _rings(labels: np.ndarray, width: int) -> np.ndarray:
    """The rings (h, W) of labels (h, W): the number of the nearest cell up to ``width`` pixels away, 0 in cells."""
    from skimage.segmentation import expand_labels

    ring = np.empty_like(labels)
    for left in range(0, labels.shape[1], RING_COLUMNS):
        start = max(0, left - width)
        block = expand_labels(labels[:, start : left + RING_COLUMNS + width], width)
        ring[:, left : left + RING_COLUMNS] = block[:, left - start : left - start + RING_COLUMNS]
    ring[labels > 0] = 0
    return ring
