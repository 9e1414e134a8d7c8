"""How fast are patches of the formats that pairs may have? Called by data_pipeline.py --formats.

Writes the same cores in each format, and measures, in turns in one process:

- patches/s of one loader process that mixes ``--mixed_cores`` cores, its cache empty at first;
- a plain copy of the same crops from .npy;
- the bare decoder: every tile that the epoch needs is read and decoded once, and nothing is done with it (rates of all
  three are per second of processor time, so that other work on the machine changes them little);
- bytes on disk, bytes read from an empty page cache, and how often a tile that is needed is decoded.

With --formats zarr, only how fast chunks are decoded here and through zarr. With --start_up N, only how long it takes
to check the headers of N cores, at first and again.
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
from orion_unet.data.loaders import BatchLoader, BatchRequest, TrainingOrder, TrainingSamples
from orion_unet.data.measured import file_state
from orion_unet.data.pairs import find_pairs
from orion_unet.data.patches import PatchReader
from orion_unet.data.scale import measure_scales
from orion_unet.demo.make import draw_core
from orion_unet.slides.tiles import Place, TiledArray, Tiles
from orion_unet.slides.zarr_tiles import ZarrTiles

SEED = 0
# By name: kind, side of a tile or chunk, further arguments of its writer.
FORMATS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "npy (C, H, W)": ("npy", 0, {"axes": (2, 0, 1)}),
    "npy (H, W, C), packed": ("npy", 0, {"axes": (0, 1, 2)}),
    "OME-TIFF deflate 256": ("tiff", 256, {"compression": "zlib"}),
    "OME-TIFF zstd 256": ("tiff", 256, {"compression": "zstd"}),
    "OME-TIFF zstd 256, predictor": ("tiff", 256, {"compression": "zstd", "predictor": True}),
    "OME-TIFF zstd 128, predictor": ("tiff", 128, {"compression": "zstd", "predictor": True}),
    "OME-Zarr zstd 128, shards": ("zarr", 128, {"shards": True}),
    "OME-Zarr blosc 64, shards": ("zarr", 64, {"shards": True, "blosc": True}),
    "OME-Zarr blosc 128, shards": ("zarr", 128, {"shards": True, "blosc": True}),
    "OME-Zarr blosc 128": ("zarr", 128, {"blosc": True}),
    "OME-Zarr blosc 256, shards": ("zarr", 256, {"shards": True, "blosc": True}),
    "OME-Zarr blosc 512": ("zarr", 512, {"blosc": True}),
}


def measure_formats(options: argparse.Namespace) -> dict[str, Any]:
    """A row of results for each of the formats asked for."""
    names = list(FORMATS) if options.formats == "all" else options.formats.split(";")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="orion_formats_", dir=os.environ.get("TMPDIR")) as folder:
        cores = [draw_stack(core, options) for core in range(options.cores)]
        plain, target = Path(folder) / "plain", Path(folder) / "set"
        write_set(plain, cores, *FORMATS["npy (C, H, W)"])
        copied = samples_of(plain, options)
        for name in names:
            write_set(target, cores, *FORMATS[name])
            found[name] = measure_set(target, copied, options)
            shutil.rmtree(target)
            if not options.json:
                print(formats_table({name: found[name]}).splitlines()[-1], flush=True)
    return found


def measure_zarr(options: argparse.Namespace) -> dict[str, float]:
    """Patches per second of processor time of chunks decoded here and through zarr, the same random crops, uncached."""
    import zarr

    orion = draw_stack(0, options)[1]
    with tempfile.TemporaryDirectory(prefix="orion_formats_", dir=os.environ.get("TMPDIR")) as folder:
        path = Path(folder) / "core_ORION.ome.zarr"
        write_zarr(path, orion, 128, shards=True, blosc=True)
        array: Any = zarr.open_group(str(path), mode="r")["0"]
        tiles, side = ZarrTiles(path, array, "cyx"), options.patch_size
        corners = np.random.default_rng(SEED).integers(0, options.size - side + 1, (12, 2)).tolist()

        def own() -> None:
            for y, x in corners:
                TiledArray(tiles, "chw").read(y, x, side, side)

        def through_zarr() -> None:
            for y, x in corners:
                array[:, y : y + side, x : x + side]

        return processor_rates({"own": own, "zarr": through_zarr}, len(corners), options.repeats)


def measure_start(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds until the headers of ``--start_up`` cores are checked, at first and again, for each format: the same
    core under many names, so that the disk needs room for one."""
    found: dict[str, Any] = {}
    names = list(FORMATS) if options.formats == "all" else options.formats.split(";")
    with tempfile.TemporaryDirectory(prefix="orion_formats_", dir=os.environ.get("TMPDIR")) as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        cores = [draw_stack(0, options)]
        for name in names:
            one, many = Path(folder) / "one", Path(folder) / "many"
            write_set(one, cores, *FORMATS[name])
            many.mkdir()
            for image in one.iterdir():
                for core in range(options.start_up):
                    named = many / image.name.replace("core_0", f"core_{core:05d}")
                    shutil.copytree(image, named, copy_function=os.link) if image.is_dir() else os.link(image, named)
            seconds = []
            for _ in range(2):
                started = time.perf_counter()
                find_pairs(DataOptions(pairs_dir=str(many)))
                seconds.append(time.perf_counter() - started)
            files = sum(1 for path in one.rglob("*") if path.is_file())
            found[name] = {
                "cores": options.start_up,
                "files_per_core": files,
                "first_s": seconds[0],
                "again_s": seconds[1],
            }
            if not options.json:
                print(start_table({name: found[name]}).splitlines()[-1], flush=True)
            for path in (one, many):
                shutil.rmtree(path)
    return found


def start_table(rows: dict[str, Any]) -> str:
    """The results as a table of Markdown."""
    lines = ["| format | cores | files a core | first [s] | again [s] |", "| --- | --- | --- | --- | --- |"]
    for name, row in rows.items():
        lines.append(
            f"| {name} | {row['cores']} | {row['files_per_core']} | {row['first_s']:.1f} | {row['again_s']:.1f} |"
        )
    return "\n".join(lines)


def draw_stack(core: int, options: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """H&E (H, W, 3) and markers (H, W, C) of generated tissue, repeated to the size and number asked for: compressors
    look at one tile at a time, and do not see that it comes again."""
    side = min(512, options.size)
    he, orion = draw_core(SEED + core, side)
    orion = np.stack([orion[..., channel % orion.shape[2]] for channel in range(options.channels)], axis=-1)
    times = -(-options.size // side)
    repeated = [np.tile(image, (times, times, 1))[: options.size, : options.size] for image in (he, orion)]
    return np.ascontiguousarray(repeated[0]), np.ascontiguousarray(repeated[1])


def write_set(
    folder: Path, cores: list[tuple[np.ndarray, np.ndarray]], kind: str, side: int, more: dict[str, Any]
) -> None:
    """Write the cores in one format."""
    folder.mkdir()
    for core, images in enumerate(cores):
        for name, image in zip(("HE", "ORION"), images, strict=True):
            path = folder / f"core_{core}_{name}"
            if kind == "npy":
                np.save(path.with_name(f"{path.name}.npy"), np.ascontiguousarray(image.transpose(more["axes"])))
            elif kind == "tiff":
                write_tiff(path.with_name(f"{path.name}.ome.tif"), image, side, **more)
            else:
                write_zarr(path.with_name(f"{path.name}.ome.zarr"), image, side, **more)


def write_tiff(path: Path, image: np.ndarray, side: int, compression: str, predictor: bool = False) -> None:
    """The H&E interleaved, markers a page each."""
    import tifffile

    he = image.shape[2] == 3
    tifffile.imwrite(
        path,
        image if he else np.ascontiguousarray(image.transpose(2, 0, 1)),
        tile=(side, side),
        compression=compression,
        predictor=predictor,
        photometric="rgb" if he else "minisblack",
        metadata={"axes": "YXS" if he else "CYX"},
        ome=True,
    )


def write_zarr(path: Path, image: np.ndarray, side: int, shards: bool = False, blosc: bool = False) -> None:
    """Chunks of one channel, of the H&E of three."""
    import zarr

    depth = 3 if image.shape[2] == 3 else 1
    height, width = (-(-length // side) * side for length in image.shape[:2])
    group = zarr.open_group(str(path), mode="w", zarr_format=3)
    array = group.create_array(
        "0",
        shape=(image.shape[2], *image.shape[:2]),
        dtype=image.dtype,
        chunks=(depth, side, side),
        shards=(depth, min(1024, height), min(2048, width)) if shards else None,
        compressors=zarr.codecs.BloscCodec(cname="zstd") if blosc else "auto",
    )
    array[:] = image.transpose(2, 0, 1)
    axes = [{"name": name, "type": "channel" if name == "c" else "space"} for name in "cyx"]
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": [{"path": "0"}]}]}


def samples_of(folder: Path, options: argparse.Namespace, cache_bytes: int | None = None) -> TrainingSamples:
    """The samples of an epoch as training draws them by default."""
    table = find_pairs(DataOptions(pairs_dir=str(folder), patch_size=options.patch_size))
    cache_bytes = int(options.cache_mb * 1e6) if cache_bytes is None else cache_bytes
    reader = PatchReader(table, measure_scales(table, False), options.patch_size, cache_bytes)
    return TrainingSamples(reader, np.arange(len(table)), DataOptions().patches_per_image, SEED, augment=True)


def measure_set(folder: Path, copied: TrainingSamples, options: argparse.Namespace) -> dict[str, Any]:
    """One row: rates of one worker, of the bare decoder and of a plain copy, and bytes."""
    samples = samples_of(folder, options)
    reader, per_core = samples.reader, samples.patches_per_image
    order = TrainingOrder(len(samples), options.batch_size, 0, 1, SEED, (per_core, options.mixed_cores))
    batches = [copied.places(request) for request in order]
    count = sum(map(len, batches))
    # First, while no memory map keeps pages of the set in memory.
    cold = read_cold(folder, options, order, count)
    buffers = {
        name: np.empty(copied.reader.batch_shape(name, options.batch_size), form.dtype)
        for name, form in copied.reader.formats.items()
    }
    needed = needed_tiles(samples_of(folder, options, 10**12), order)
    # Loads in this process, so that its cache can be emptied before every pass.
    loader = BatchLoader(samples, order, options.batch_size, 0)

    def copy() -> None:
        for batch in batches:
            copied.reader.fill(batch, buffers)

    def decode() -> None:
        for tiles, places in needed:
            for place in places:
                tiles.tile(place)

    def load() -> None:
        reader.cache.clear()
        for _ in loader:
            pass

    subjects: dict[str, Callable[[], None]] = {"copy": copy, "worker": load, **({"decoder": decode} if needed else {})}
    rates = processor_rates(subjects, count, options.repeats)
    loader.close()
    patch_bytes = sum(buffer[0].nbytes for buffer in buffers.values())
    row: dict[str, Any] = {
        "disk_bytes": sum(file_state(reader.table.path(core, name))[0] for core in samples.cores for name in buffers),
        "raw_bytes": reader.table.nbytes,
        "patches_per_s": rates["worker"],
        "copy_patches_per_s": rates["copy"],
    }
    if needed:
        tile_bytes = sum(tile_size(tiles) * len(places) for tiles, places in needed)
        row |= {"decoder_patches_per_s": rates["decoder"], "tiles_per_patch_byte": tile_bytes / (count * patch_bytes)}
        for alone in (False, True):
            fresh = samples_of(folder, options)
            for request in order:
                for indices in np.split(request.indices, len(request.indices) if alone else 1):
                    # Of a set much larger than the cache, whose cores are all mixed, no tile is still there.
                    if alone:
                        fresh.reader.cache.clear()
                    fresh.reader.read(fresh.places(BatchRequest(request.epoch, indices)))
            row["decoded_alone" if alone else "decoded"] = fresh.reader.cache.decoded_bytes / tile_bytes
    return row | cold


def processor_rates(subjects: dict[str, Callable[[], None]], count: int, repeats: int) -> dict[str, float]:
    """Median rate of each subject per second of processor time, over passes in turns after one to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    for repeat in range(repeats + 1):
        for name, subject in subjects.items():
            started = time.process_time()
            subject()
            if repeat:
                seconds[name].append(time.process_time() - started)
    return {name: count / median(taken) for name, taken in seconds.items()}


def needed_tiles(samples: TrainingSamples, order: TrainingOrder) -> list[tuple[Tiles, list[Place]]]:
    """Every tile of an epoch once, by image: those of its patches, and of the crops that were looked at for tissue.
    The cache of ``samples`` has room for all."""
    for request in order:
        samples.reader.read(samples.places(request))
    found: dict[Any, tuple[Tiles, list[Place]]] = {}
    for (modality, core), place in samples.reader.cache.kept:
        if (modality, core) not in found:
            stored = samples.reader.table.open(core, modality)
            assert isinstance(stored, TiledArray)
            found[modality, core] = (stored.tiles, [])
        found[modality, core][1].append(place)
    return list(found.values())


def tile_size(tiles: Tiles) -> int:
    """Bytes of a decoded tile."""
    return tiles.side[0] * tiles.side[1] * tiles.depth * tiles.dtype.itemsize


def read_cold(folder: Path, options: argparse.Namespace, order: TrainingOrder, count: int) -> dict[str, Any]:
    """Patches per second and bytes read per patch with an empty page cache."""
    rates, read = [], []
    for _ in range(2):
        samples = samples_of(folder, options)
        samples.reader.from_disk = True
        for path in folder.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        before, started = bytes_read(), time.perf_counter()
        for request in order:
            samples.reader.read(samples.places(request))
        rates.append(count / (time.perf_counter() - started))
        read.append((bytes_read() - before) / count)
    return {"cold_patches_per_s": median(rates), "cold_bytes_read_per_patch": median(read)}


def bytes_read() -> int:
    """Bytes that the system has read from storage for this process."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text(encoding="ascii").splitlines())
    return int(fields["read_bytes"])


def formats_table(rows: dict[str, Any]) -> str:
    """The results as a table of Markdown."""
    lines = [
        "| format | size / raw | 1 loader [patches/s] | / plain copy | / decoder | needed / patches | "
        "decoded / needed | decoded / needed, all cores mixed | cold [patches/s] | read / patch [MB] |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in rows.items():
        cells = [f"{row['disk_bytes'] / row['raw_bytes']:.2f}", f"{row['patches_per_s']:.0f}"]
        cells.append(f"{row['patches_per_s'] / row['copy_patches_per_s']:.2f}")
        if "decoder_patches_per_s" in row:
            cells.append(f"{row['patches_per_s'] / row['decoder_patches_per_s']:.2f}")
            cells += [f"{row[key]:.2f}" for key in ("tiles_per_patch_byte", "decoded", "decoded_alone")]
        else:
            cells += ["", "", "", ""]
        cells += [f"{row['cold_patches_per_s']:.0f}", f"{row['cold_bytes_read_per_patch'] / 1e6:.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
