"""How fast are patches of the formats that pairs may have? Called by data_pipeline.py --formats.

Writes the same cores in each format and measures, in turns in one process:

- patches/s of one loader worker, and of a plain copy of the same crops from memory maps;
- the bare decoder: every tile that the epoch needs, read and decoded once, nothing else done with it;
- bytes on disk, and bytes read and decoded per epoch, beside those of the tiles it needs and of its patches.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from orion_unet.config import DataOptions
from orion_unet.data.loaders import BatchLoader, TrainingOrder, TrainingSamples
from orion_unet.data.pairs import find_pairs
from orion_unet.data.patches import PatchReader
from orion_unet.data.scale import measure_scales
from orion_unet.slides.tiles import TileCache, Tiles

SEED = 0
# By name: kind, side of a tile or chunk, and what else the writer is told.
FORMATS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "npy": ("npy", 0, {"layout": "chw"}),
    "packed npy": ("npy", 0, {"layout": "hwc"}),
    "tiff zstd 256": ("tiff", 256, {"compression": "zstd"}),
    "tiff deflate 256": ("tiff", 256, {"compression": "zlib"}),
    "zarr zstd 128": ("zarr", 128, {}),
    "zarr zstd 256": ("zarr", 256, {}),
    "zarr zstd 512": ("zarr", 512, {}),
    "zarr zstd 256 shards": ("zarr", 256, {"shards": True}),
    "zarr zstd 256 all channels": ("zarr", 256, {"all_channels": True}),
    "zarr blosc 256 shards": ("zarr", 256, {"shards": True, "codec": "blosc"}),
}


def measure_formats(options: argparse.Namespace) -> dict[str, Any]:
    """A row of results for each of the formats asked for."""
    names = list(FORMATS) if options.formats == "all" else options.formats.split(",")
    found = {}
    with tempfile.TemporaryDirectory(prefix="orion_formats_", dir=os.environ.get("TMPDIR")) as folder:
        source = Path(folder) / "npy"
        make_cores(source, options)
        for name in names:
            kind, side, more = FORMATS[name]
            target = Path(folder) / "set"
            started = time.perf_counter()
            write_set(source, target, kind, side, more)
            row = {"write_s": time.perf_counter() - started}
            found[name] = row | measure_set(target, options)
            shutil.rmtree(target)
    return found


def make_cores(folder: Path, options: argparse.Namespace) -> None:
    """Cores (C, H, W) of generated tissue with the noise of a camera, which is what limits compression."""
    from orion_unet.demo.make import make_core

    folder.mkdir()
    rng = np.random.default_rng(SEED)
    side = 512
    for core in range(options.cores):
        he, orion = make_core(rng, side)
        repeats = -(-options.size // side)
        he = np.tile(he, (repeats, repeats, 1))[: options.size, : options.size]
        channels = [np.tile(orion[..., c % orion.shape[2]], (repeats, repeats)) for c in range(options.channels)]
        np.save(folder / f"core_{core}_HE.npy", he)
        stack = np.stack([channel[: options.size, : options.size] for channel in channels])
        noise = rng.poisson(40, stack.shape).astype(np.uint16)
        np.save(folder / f"core_{core}_ORION.npy", (stack // 8 + noise).astype(np.uint16))
