"""Writes one image of a pair in bands, so that memory does not grow with it; complete files only."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from orion_unet.data.pairs import HE_SUFFIX, ORION_SUFFIX
from orion_unet.run_log import fsync_folder

# Rows at a time, and side of the chunks of an OME-Zarr.
BAND = 512
ZARR_SUFFIXES = {"he": "_HE.ome.zarr", "orion": "_ORION.ome.zarr"}


def pair_paths(folder: Path, core: str, format: str) -> dict[str, Path]:
    """The two files (for ome-zarr: folders) of a pair, by modality."""
    suffixes = {"he": HE_SUFFIX, "orion": ORION_SUFFIX} if format == "npy" else ZARR_SUFFIXES
    return {modality: folder / f"{core}{suffix}" for modality, suffix in suffixes.items()}


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


def write_zarr(
    path: Path, shape: tuple[int, int, int], dtype: np.dtype, bands: Iterator[np.ndarray], about: dict[str, Any]
) -> None:
    """Write bands of rows (h, W, C) as an OME-Zarr image (C, H, W) of one level. Raises OSError.

    ``about`` has ``pixel_size_um`` and ``names`` of the channels.
    """
    import zarr

    temporary = path.with_name(f".{path.name}.partial")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        group = zarr.open_group(str(temporary), mode="w", zarr_format=3)
        height, width, channels = shape
        chunks = (1, min(BAND, height), min(BAND, width))
        array = group.create_array("0", shape=(channels, height, width), dtype=dtype, chunks=chunks)
        top = 0
        for band in bands:
            array[:, top : top + len(band)] = band.transpose(2, 0, 1)
            top += len(band)
        group.attrs["ome"] = _ngff(about["pixel_size_um"], about["names"])
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    fsync_folder(path.parent)


def _ngff(side_um: float, names: Sequence[str]) -> dict[str, Any]:
    """Metadata of NGFF 0.5."""
    axes = [{"name": "c", "type": "channel"}, *({"name": n, "type": "space", "unit": "micrometer"} for n in "yx")]
    scale = [{"type": "scale", "scale": [1.0, side_um, side_um]}]
    datasets = [{"path": "0", "coordinateTransformations": scale}]
    labels = {"channels": [{"label": name} for name in names]}
    return {"version": "0.5", "multiscales": [{"axes": axes, "datasets": datasets}], "omero": labels}


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
