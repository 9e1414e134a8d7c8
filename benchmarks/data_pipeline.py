"""Does the data path deliver patches as fast as a memory copy?

    python benchmarks/data_pipeline.py --pairs_dir D --patch_size 256 --json
    python benchmarks/data_pipeline.py               # makes four sets: float32 and uint16, (H, W, C) and (C, H, W)

Compares the trainer's loader (random crops that prefer tissue, whole batches assembled in worker processes) with two
plain copies of the same crops from memory maps, in one process, from the page cache:

- raw_copy: NumPy copies each crop to its place in an existing batch, the least that a loader must do;
- raw_crop: NumPy copies each crop to memory that is reused at once, so that nothing leaves the processor's cache.

With --formats, compares the formats that pairs may have instead (benchmarks/formats.py, where they are listed).

With --cold, also reads from the disk: each pass starts with an empty page cache, once with the system's default
read-ahead, and once as the trainer reads sets larger than memory.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from formats import bytes_read, formats_table, measure_formats, measure_start, measure_zarr, start_table

from orion_unet.cli.arguments import Parser, run_command
from orion_unet.config import DataOptions
from orion_unet.data.loaders import BatchLoader, TrainingOrder, TrainingSamples
from orion_unet.data.pairs import PairTable, find_pairs
from orion_unet.data.patches import PatchReader
from orion_unet.data.scale import Scales, measure_scales
from orion_unet.distributed import usable_cores

SEED = 0


def main(argv: list[str]) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs_dir", metavar="DIR", help="folder to measure; default: four generated sets")
    parser.add_argument("--patch_size", type=int, default=256, metavar="N", help="side of a patch; default: 256")
    parser.add_argument("--batch_size", type=int, default=12, metavar="N", help="patches per batch; default: 12")
    parser.add_argument("--patches", type=int, default=240, metavar="N", help="patches per pass; default: 240")
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="passes; reports medians; default: 7")
    parser.add_argument("--num_workers", type=int, metavar="N", help="n in 'n workers'; default: the usable cores")
    parser.add_argument("--cores", type=int, default=4, metavar="N", help="cores per generated set; default: 4")
    parser.add_argument("--size", type=int, default=2048, metavar="N", help="side of a generated core; default: 2048")
    parser.add_argument("--channels", type=int, default=20, metavar="N", help="channels of such a core; default: 20")
    parser.add_argument(
        "--formats", nargs="?", const="all", metavar="NAME;...", help="compare formats of pairs; default: all of them"
    )
    parser.add_argument(
        "--mixed_cores", type=int, default=4, metavar="N", help="as in training; with --formats; default: 4"
    )
    parser.add_argument("--cache_mb", type=float, default=512, metavar="X", help="as in training; default: 512")
    parser.add_argument("--start_up", type=int, metavar="N", help="with --formats: only the headers of so many cores")
    parser.add_argument("--cold", action="store_true", help="also read from the disk")
    parser.add_argument("--json", action="store_true", help="print JSON only")
    options = parser.parse_args(argv)
    if options.formats == "zarr":
        print(json.dumps(measure_zarr(options), indent=2))
        return 0
    if options.formats and options.start_up:
        rows = measure_start(options)
        print(json.dumps(rows, indent=2) if options.json else start_table(rows))
        return 0
    if options.formats:
        rows = measure_formats(options)
        print(json.dumps(rows, indent=2) if options.json else formats_table(rows))
        return 0
    if options.pairs_dir:
        results = {"pairs_dir": options.pairs_dir, **measure(options.pairs_dir, options)}
    else:
        results = {"sets": measure_made(options)}
    print(json.dumps(results, indent=2) if options.json else table(results))
    return 0


def measure_made(options: argparse.Namespace) -> dict[str, Any]:
    """Generate and measure every stored form, one after the other to save disk space."""
    found = {}
    for dtype in ("float32", "uint16"):
        for layout in ("hwc", "chw"):
            with tempfile.TemporaryDirectory(prefix="orion_pipeline_", dir=os.environ.get("TMPDIR")) as folder:
                make_set(Path(folder), dtype, layout, options)
                found[f"{dtype} {layout}"] = measure(folder, options)
    return found


def make_set(folder: Path, dtype: str, layout: str, options: argparse.Namespace) -> None:
    """Write cores of noise that counts as tissue."""
    rng = np.random.default_rng(SEED)
    for core in range(options.cores):
        he = rng.integers(60, 200, (options.size, options.size, 3), dtype=np.uint8)
        orion = rng.integers(0, 60_000, (options.size, options.size, options.channels), dtype=np.uint16)
        if dtype == "float32":
            he, orion = he / np.float32(255), orion / np.float32(65535)
        for kind, array in (("HE", he), ("ORION", orion)):
            np.save(folder / f"core_{core}_{kind}.npy", array if layout == "hwc" else array.transpose(2, 0, 1).copy())


def measure(folder: str, options: argparse.Namespace) -> dict[str, Any]:
    """Patches per second of the loader and the plain copies, measured in turns."""
    data = DataOptions(pairs_dir=folder, patch_size=options.patch_size)
    table = find_pairs(data)
    scales = measure_scales(table, False)
    each = -(-options.patches // len(table))
    order = TrainingOrder(each * len(table), options.batch_size, 0, 1, SEED)
    count = order.steps * options.batch_size

    # First, while no memory map keeps pages of the set in memory.
    cold = measure_cold(table, scales, options) if options.cold else {}
    samples = TrainingSamples(
        PatchReader(table, scales, options.patch_size), np.arange(len(table)), each, SEED, augment=True
    )
    reader = samples.reader
    places = [samples.places(request) for request in order]
    buffers = [
        {
            name: np.empty(reader.batch_shape(name, options.batch_size), form.dtype)
            for name, form in reader.formats.items()
        }
        for _ in range(4)
    ]
    workers = options.num_workers or usable_cores()
    loaders = {1: BatchLoader(samples, order, options.batch_size, 1)}
    loaders.setdefault(workers, BatchLoader(samples, order, options.batch_size, workers))

    def raw_copy() -> None:
        for batch, buffer in zip(places, (buffers * len(places)), strict=False):
            for row, place in enumerate(batch):
                for name in ("he", "orion"):
                    buffer[name][row] = reader.crop(name, place.core, place.y, place.x)

    def raw_crop() -> None:
        for place in (place for batch in places for place in batch):
            for name in ("he", "orion"):
                np.array(reader.crop(name, place.core, place.y, place.x))

    def load(loader: BatchLoader) -> Callable[[], None]:
        def run() -> None:
            for _ in loader:
                pass

        return run

    subjects: dict[str, Callable[[], None]] = {"raw_copy": raw_copy, "raw_crop": raw_crop}
    subjects |= {f"{number} worker{'s' * (number > 1)}": load(loader) for number, loader in loaders.items()}
    rates = interleaved(subjects, count, options.repeats)
    for loader in loaders.values():
        loader.close()
    one, many = rates["1 worker"], rates[f"{workers} worker{'s' * (workers > 1)}"]
    result: dict[str, Any] = {
        "patch_size": options.patch_size,
        "batch_size": options.batch_size,
        "patch_bytes": sum(buffer.nbytes for buffer in buffers[0].values()) // options.batch_size,
        "patches_per_s": one,
        "raw_copy_patches_per_s": rates["raw_copy"],
        "raw_crop_patches_per_s": rates["raw_crop"],
        "fraction_of_raw_copy": one / rates["raw_copy"],
        "fraction_of_raw_crop": one / rates["raw_crop"],
        "n_workers": workers,
        "n_workers_patches_per_s": many,
    }
    return result | cold


def interleaved(subjects: dict[str, Callable[[], None]], count: int, repeats: int) -> dict[str, float]:
    """Median rate of each subject over passes in turns; the first pass of each is a warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    for repeat in range(repeats + 1):
        for name, subject in subjects.items():
            started = time.perf_counter()
            subject()
            if repeat:
                seconds[name].append(time.perf_counter() - started)
    return {name: count / median(taken) for name, taken in seconds.items()}


def measure_cold(table: PairTable, scales: Scales, options: argparse.Namespace) -> dict[str, Any]:
    """Rates and bytes read with an empty page cache, with and without the trainer's method for very large sets.

    Draws as many patches per core as an epoch does by default: more of them would read the whole core either way.
    """
    each = DataOptions().patches_per_image
    order = TrainingOrder(each * len(table), options.batch_size, 0, 1, SEED)
    count = order.steps * options.batch_size
    found = {}
    for name, from_disk in (("cold_default", False), ("cold", True)):
        rates, read = [], []
        for _ in range(5):
            reader = PatchReader(table, scales, options.patch_size)
            reader.from_disk = from_disk
            samples = TrainingSamples(reader, np.arange(len(table)), each, SEED, augment=True)
            forget(reader)
            before, started = bytes_read(), time.perf_counter()
            for request in order:
                reader.read(samples.places(request))
            rates.append(count / (time.perf_counter() - started))
            read.append((bytes_read() - before) / count)
        found |= {f"{name}_patches_per_s": median(rates), f"{name}_bytes_read_per_patch": median(read)}
    return found


def forget(reader: PatchReader) -> None:
    """Drop the files of a set from the page cache."""
    for core in range(len(reader.table)):
        for modality in ("he", "orion"):
            with open(reader.table.path(core, modality), "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def table(results: dict[str, Any]) -> str:
    """The results as a text table."""
    lines = [f"{'':<14}{'1 worker':>10}{'raw copy':>10}{'fraction':>10}{'raw crop':>10}{'n workers':>11}"]
    for name, found in results.get("sets", {results.get("pairs_dir", ""): results}).items():
        lines.append(
            f"{name[-13:]:<14}{found['patches_per_s']:>10.0f}{found['raw_copy_patches_per_s']:>10.0f}"
            f"{found['fraction_of_raw_copy']:>10.2f}{found['raw_crop_patches_per_s']:>10.0f}"
            f"{found['n_workers_patches_per_s']:>11.0f}"
        )
        if "cold_patches_per_s" in found:
            for kind in ("cold_default", "cold"):
                lines.append(
                    f"{'':<4}{kind.replace('_', ', '):<16}{found[f'{kind}_patches_per_s']:>6.0f} patches/s, "
                    f"{found[f'{kind}_bytes_read_per_patch'] / 1e6:.1f} MB read for a patch of "
                    f"{found['patch_bytes'] / 1e6:.1f} MB"
                )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_command(main))
