"""The cells of one image with all that was measured, from files or from arrays in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from orion_unet import segmentation
from orion_unet.data.stain import StainJudgement
from orion_unet.errors import InputError
from orion_unet.quantification.cell_labels import CellLabels
from orion_unet.quantification.measure import CellGeometry, CellMeans, measure_geometry, measure_means
from orion_unet.quantification.nuclei import find_nuclei, own_range
from orion_unet.slides.markers import ArrayMarkers

# What to do where no marker is named like a nuclear stain.
INSTEAD = "give the cells with --labels"


@dataclass(frozen=True)
class ImageCells:
    """Cells of an image. ``measured`` has the columns ``measured_columns`` of the image's markers.

    ``stain`` compares the H&E that the image was predicted from with those of the training; None if unknown.
    """

    name: str
    path: Path
    source: str
    shape: tuple[int, int]
    pixel_size_um: float | None
    numbers: np.ndarray
    geometry: CellGeometry
    means: CellMeans
    measured: CellMeans | None
    measured_columns: tuple[int, ...]
    stain: StainJudgement | None = None


@dataclass(frozen=True)
class QuantifiedCells:
    """n cells of an image with C markers.

    ``label`` (n,) is the number of each cell in ``labels`` (H, W). ``y`` and ``x`` (n,) are centroids in pixels, where
    (0, 0) is the centre of the first pixel; ``area`` (n,) is in pixels. ``mean`` (n, C) are means of the markers, in
    the unit of the image. ``ring`` (n, C) are those of the pixels around each cell: None without rings, NaN where a
    cell has no room for one. ``names`` (C,) are the markers.
    """

    names: tuple[str, ...]
    labels: np.ndarray
    label: np.ndarray
    y: np.ndarray
    x: np.ndarray
    area: np.ndarray
    mean: np.ndarray
    ring: np.ndarray | None


def quantify(
    image: np.ndarray,
    labels: np.ndarray | None = None,
    *,
    names: Sequence[str] | None = None,
    nuclear_marker: str | None = None,
    rings: int = 0,
) -> QuantifiedCells:
    """Measure the markers of every cell of an image in memory, as ``python -m orion_unet quantify`` does.

    ``image`` is (C, H, W), of any type of numbers; ``names`` are its C markers, ``channel_00`` and so on by default.
    ``labels`` (H, W) are integers, 0 outside of cells. Without them, nuclei are found in ``nuclear_marker``, by default
    the marker that is named like a nuclear stain. ``rings`` is the width of the ring around each cell, in pixels, 0 for
    none. Raises InputError for arrays of other shapes, and where there is no nuclear marker or no cell.
    """
    array = np.asarray(image)
    if array.ndim != 3 or 0 in array.shape:
        raise InputError(f"image: has shape {array.shape}; markers are (C, H, W)")
    markers = ArrayMarkers(Path("image"), lambda: array, "chw")
    found = tuple(names) if names is not None else tuple(f"channel_{index:02d}" for index in range(len(array)))
    if len(found) != len(array):
        raise InputError(f"names: has {len(found)} names for {len(array)} markers")
    if rings < 0:
        raise InputError(f"rings: is {rings}; must be at least 0")

    def step() -> None:
        pass

    with ExitStack() as stack:
        if labels is None:
            channel = segmentation.nuclear_marker(found, nuclear_marker, "give labels")
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="orion-nuclei-")))
            scaled = own_range(markers, channel)
            plane, _ = find_nuclei(markers, channel, scaled, folder / "nuclei.npy", step)
        else:
            given = np.asarray(labels)
            if given.shape != array.shape[1:] or given.dtype.kind not in "ui":
                raise InputError(
                    f"labels: is {given.dtype} {given.shape}; labels are integers of the image's size {array.shape[1:]}"
                )
            plane = ArrayMarkers(Path("labels"), lambda: given[None], "chw")
        cells = CellLabels(plane, "")
        if not cells.count:
            raise InputError("labels: holds no cell" if labels is not None else "image: shows no nuclei")
        geometry = measure_geometry(cells, step)
        means = measure_means(cells, markers, range(len(array)), rings, None, step)
        own = np.array(plane.read([0], 0, 0, *cells.shape)[0])
    return QuantifiedCells(found, own, cells.numbers, geometry.y, geometry.x, geometry.area, means.mean, means.ring)
