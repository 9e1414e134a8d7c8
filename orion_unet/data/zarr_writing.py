"""Writes an image as OME-Zarr (NGFF 0.5) in bands, so that memory does not grow with it; complete folders only."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from orion_unet.run_log import fsync_folder

# Side of a chunk, and rows and columns of chunks in a shard, which is one file: benchmarks/results/formats.md.
CHUNK, SHARD = 128, (8, 16)


def write_zarr(
    path: Path, shape: tuple[int, int, int], dtype: np.dtype, bands: Iterator[np.ndarray], about: dict[str, Any]
) -> None:
    """Write bands of rows (h, W, C) as an OME-Zarr image (C, H, W) of one level. Raises OSError.

    Chunks are of one channel, of an image of three channels (the H&E) of all of them, so that training decodes only
    what it keeps; their bytes are shuffled and compressed by zstd (blosc), and they are stored in shards. ``about`` has
    ``pixel_size_um``, None if unknown, and ``names`` of the channels. Memory is that of one row of shards.
    """
    import zarr
    import zarr.codecs

    temporary = path.with_name(f".{path.name}.partial")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        group = zarr.open_group(str(temporary), mode="w", zarr_format=3)
        height, width, channels = shape
        depth = 3 if channels == 3 else 1
        shard = [
            min(CHUNK * most, -(-side // CHUNK) * CHUNK) for side, most in zip((height, width), SHARD, strict=True)
        ]
        array = group.create_array(
            "0",
            shape=(channels, height, width),
            dtype=dtype,
            chunks=(depth, CHUNK, CHUNK),
            shards=(depth, *shard),
            compressors=zarr.codecs.BloscCodec(cname="zstd"),
        )
        top = 0
        for rows in _joined(bands, shard[0]):
            array[:, top : top + len(rows)] = rows.transpose(2, 0, 1)
            top += len(rows)
        group.attrs["ome"] = _ngff(about["pixel_size_um"], about["names"])
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    fsync_folder(path.parent)


def _joined(bands: Iterator[np.ndarray], height: int) -> Iterator[np.ndarray]:
    """The same rows in bands of ``height``: a shard is written once."""
    held: np.ndarray | None = None
    for band in bands:
        # A band may be overwritten by the next one.
        held = band.copy() if held is None else np.concatenate([held, band])
        while len(held) >= height:
            yield held[:height]
            held = held[height:]
    if held is not None and len(held):
        yield held


def _ngff(side_um: float | None, names: Sequence[str]) -> dict[str, Any]:
    """Metadata of NGFF 0.5."""
    unit = {} if side_um is None else {"unit": "micrometer"}
    axes = [{"name": "c", "type": "channel"}, *({"name": name, "type": "space", **unit} for name in "yx")]
    side = 1.0 if side_um is None else side_um
    datasets = [{"path": "0", "coordinateTransformations": [{"type": "scale", "scale": [1.0, side, side]}]}]
    labels = {"channels": [{"label": name} for name in names]}
    return {"version": "0.5", "multiscales": [{"axes": axes, "datasets": datasets}], "omero": labels}
