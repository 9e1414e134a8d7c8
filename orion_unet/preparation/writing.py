"""Writes one image of a pair in bands, so that memory does not grow with it; complete files only."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from orion_unet.data.headers import NPY
from orion_unet.data.pairs import KINDS
from orion_unet.data.slide_regions import REGION_SUFFIX
from orion_unet.run_log import fsync_folder

# Rows at a time.
BAND = 512
# What the files of a pair end with, by format.
SUFFIXES = {"npy": NPY, "ome-zarr": ".ome.zarr", "none": REGION_SUFFIX}


def pair_paths(folder: Path, core: str, format: str) -> dict[str, Path]:
    """The two files (for ome-zarr: folders) of a pair, by modality."""
    return {modality: folder / f"{core}{kind}{SUFFIXES[format]}" for modality, kind in KINDS.items()}


def write_npy(path: Path, shape: tuple[int, int, int], dtype: np.dtype, bands: Iterator[np.ndarray]) -> None:
    """Write bands of rows (h, W, C) as one array (H, W, C). Raises OSError."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with open(temporary, "wb") as file:
            header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for band in bands:
                file.write(np.ascontiguousarray(band, dtype).data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    fsync_folder(path.parent)


def area_weights(start: float, step: float, count: int, first: int, length: int) -> np.ndarray:
    """Weights (count, length) that average over areas: row i covers [start + i·step, start + (i + 1)·step) of pixels
    whose edges are first, first + 1, ...; each row sums to 1."""
    low = start + step * np.arange(count)[:, None]
    edges = first + np.arange(length)
    overlap = np.clip(np.minimum(low + step, edges + 1) - np.maximum(low, edges), 0, None)
    weights: np.ndarray = (overlap / overlap.sum(1, keepdims=True)).astype(np.float32)
    return weights


Reader = Callable[[int, int, int, int], np.ndarray]


def resampled_bands(
    read: Reader, corner: tuple[float, float], size: tuple[int, int], step: float, limits: tuple[int, int]
) -> Iterator[np.ndarray]:
    """Bands (h, W, C) of an image of ``size`` (H, W) whose pixels cover ``step`` pixels of the source along a side.

    ``read`` gives regions (C, h, w) of the source of size ``limits``. With a step of 1 and a corner at whole pixels
    the values are those stored; otherwise they are means over areas, rounded for integers.
    """
    y, x = corner
    for top in range(0, size[0], BAND):
        rows = min(BAND, size[0] - top)
        start = y + top * step
        if step == 1:
            yield read(round(start), round(x), rows, size[1]).transpose(1, 2, 0)
            continue
        low, high = int(start), min(limits[0], int(np.ceil(start + rows * step)))
        left, right = int(x), min(limits[1], int(np.ceil(x + size[1] * step)))
        source = read(low, left, high - low, right - left)
        down = area_weights(start, step, rows, low, high - low)
        across = area_weights(x, step, size[1], left, right - left)
        means = np.stack([down @ plane.astype(np.float32) @ across.T for plane in source], axis=-1)
        yield (np.rint(means) if source.dtype.kind in "iu" else means).astype(source.dtype)
