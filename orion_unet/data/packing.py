"""Rewrites a folder of pairs once into the layout that reads fastest from a disk.

That layout is plain (H, W, C) .npy in C order, with values and dtype unchanged: each row of a patch is contiguous in
the file. In (C, H, W), a patch of 20 channels has 20 times as many pieces, each a few hundred bytes of a page of 4,096.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from orion_unet.config import DataOptions
from orion_unet.data.channels import NAMES_FILE
from orion_unet.data.dataset import DATASET_FILE, dataset_document, pixel_size
from orion_unet.data.headers import NPY
from orion_unet.data.measured import file_state
from orion_unet.data.pairs import PairTable, find_pairs, pair_file
from orion_unet.data.panels import PANELS_FILE, panel_files
from orion_unet.data.split import GROUPS_FILE
from orion_unet.data.zarr_writing import write_zarr
from orion_unet.errors import InputError, RunError
from orion_unet.extras import needed
from orion_unet.run_log import append_line, fsync_folder, parse_object, write_atomic
from orion_unet.slides.stored import stored_image
from orion_unet.slides.tiles import TiledArray

RECORD_FILE = "packed.jsonl"
"""File in the packed folder with one line per packed file, which names its source."""
CARRIED = (NAMES_FILE, GROUPS_FILE, DATASET_FILE)
# Rows are read and written in bands of this size, and transposed in blocks that fit the processor's cache.
BAND_BYTES = 32 << 20
BLOCK_BYTES = 512 << 10


@dataclass(frozen=True)
class PackedFolder:
    """Result of ``pack``: number of cores, of files written and of files found complete, and bytes of all files."""

    cores: int
    written: int
    found: int
    nbytes: int
    warnings: list[str]


@dataclass(frozen=True)
class _Job:
    """One array to pack: its row in the table, its target file, and its shape and dtype there."""

    core: int
    modality: str
    source: Path
    target: Path
    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    origin: dict[str, Any]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    @property
    def zarr(self) -> bool:
        """Whether it becomes OME-Zarr."""
        return self.target.suffix == ".zarr"

    @property
    def most_bytes(self) -> int:
        """Room for it on the disk; compressed, it is about as large as a compressed source."""
        return min(self.nbytes, int(self.origin["bytes"])) if self.zarr else self.nbytes

    @property
    def temporary(self) -> Path:
        """Path while it is being written, the same in every call: the next one removes what a killed one left."""
        return self.target.with_name(f".{self.target.name}.partial")


def pack(options: DataOptions, output: Path, overwrite: bool = False, form: str = "npy") -> PackedFolder:
    """Rewrite the pairs of ``options.pairs_dir`` into ``output`` as (H, W, C) in C order, little-endian, same dtype.

    With ``form`` ome-zarr, as OME-Zarr of zstd chunks in shards. The values are equal bit for bit; channel_names.txt,
    groups.csv, dataset.json and the panels are copied. A file appears under its name only when it is complete. Files
    that an earlier call has packed from unchanged sources are kept, so the same call continues an interrupted one.
    ``overwrite`` replaces files of the same names.

    Raises InputError for pairs that training would refuse, for a folder that cannot be used or has other files, and if
    a source changes meanwhile; RunError if the disk is too small or fails.
    """
    table = find_pairs(options)
    if form == "ome-zarr":
        needed("zarr")
    jobs = [_job(table, output, core, modality, form) for core in range(len(table)) for modality in ("he", "orion")]
    try:
        output.mkdir(parents=True, exist_ok=True)
        itself = table.folder.samefile(output)
        handle = os.open(output, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"--output_dir {output}: cannot be used ({error.strerror or error})") from None
    try:
        if itself:
            raise InputError(f"--output_dir {output}: is the folder of the pairs itself; choose another one")
        _lock(handle, output)
        record = _read_record(output)
        missing = [job for job in jobs if record.get(job.target.name) != job.origin or not _is_whole(job)]
        carried = carried_files(table, output)
        _refuse_others(output, jobs, missing, carried, overwrite)
        _check_space(output, missing)
        _pack_all(table, missing, carried, output)
    finally:
        os.close(handle)
    return PackedFolder(
        len(table), len(missing), len(jobs) - len(missing), sum(map(_stored_bytes, jobs)), table.warnings
    )


def _job(table: PairTable, output: Path, core: int, modality: str, form: str) -> _Job:
    row = getattr(table, modality)[core]
    source = table.path(core, modality)
    origin = {"source": str(source.resolve()), "layout": str(row["layout"]), **_state(source)}
    if table.level:
        origin["level"] = table.level
    shape = (int(row["height"]), int(row["width"]), int(row["channels"]))
    dtype = np.dtype(str(row["dtype"])).newbyteorder("<")
    name = table.npy_name(core, modality)
    if form == "ome-zarr":
        name = f"{name.removesuffix(NPY)}.ome.zarr"
        origin["pixel_size_um"] = pixel_size(table, None)
    return _Job(core, modality, source, output / name, shape, dtype, origin)


def _stored_bytes(job: _Job) -> int:
    return file_state(job.target)[0] if job.zarr else job.nbytes


def _state(source: Path) -> dict[str, int]:
    """Size and modification time, by which a changed source is recognised."""
    size, modified_ns, _ = file_state(source)
    return {"bytes": size, "modified_ns": modified_ns}


def _lock(handle: int, folder: Path) -> None:
    """Lock the open folder; raises InputError if another pack has locked it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(
            f"--output_dir {folder}: another pack is writing here; wait for it or choose another folder"
        ) from None
    except OSError:
        # The file system has no locks, so another pack cannot be detected.
        return


def _read_record(output: Path) -> dict[str, Any]:
    """The source of each packed file, by file name. Skips a partial line that a killed writer left."""
    try:
        lines = (output / RECORD_FILE).read_bytes().splitlines()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise InputError(f"{output / RECORD_FILE}: cannot be read ({error.strerror})") from None
    found = [parse_object(line) for line in lines]
    return {str(line.get("file")): line.get("origin") for line in found if line is not None}


def _is_whole(job: _Job) -> bool:
    """Whether the packed file exists and has the right header and length."""
    try:
        if job.zarr:
            image = stored_image(job.target, job.modality, 0)
            return (image.shape, np.dtype(image.dtype)) == (job.shape, job.dtype)
        stored = np.load(job.target, mmap_mode="r", allow_pickle=False)
        return bool(
            (stored.shape, stored.dtype, stored.flags.c_contiguous) == (job.shape, job.dtype, True)
            and job.target.stat().st_size == stored.offset + job.nbytes
        )
    except Exception:
        # NumPy evaluates the header as a Python literal, so a broken header can raise almost any exception.
        return False


def carried_files(table: PairTable, output: Path) -> dict[str, bytes]:
    """Content of the small files beside pairs: those that are missing or different in the ``output`` folder.

    dataset.json is made anew where the pairs are of a smaller level, or only their files state a pixel's size;
    channel_names.txt where only the files state the names. Raises InputError for a file that cannot be read.
    """
    folder, files, size_um = table.folder, {}, pixel_size(table, None)
    panels = (PANELS_FILE, *panel_files(folder)) if (folder / PANELS_FILE).is_file() else ()
    made = {}
    if size_um is not None and (table.level > 0 or not (folder / DATASET_FILE).is_file()):
        source = f"made from level {table.level} of {folder.resolve()}"
        made[DATASET_FILE] = json.dumps(dataset_document(size_um, source)).encode()
    if table.stated_names == table.channel_names and not (folder / NAMES_FILE).is_file():
        made[NAMES_FILE] = "".join(f"{name}\n" for name in table.channel_names).encode()
    for name in (*CARRIED, *panels):
        if name in made or (folder / name).is_file():
            try:
                content = made[name] if name in made else (folder / name).read_bytes()
                alike = (output / name).is_file() and (output / name).read_bytes() == content
            except OSError as error:
                raise InputError(f"{error.filename}: cannot be read ({error.strerror})") from None
            if not alike:
                files[name] = content
    return files


def _refuse_others(
    output: Path, jobs: list[_Job], missing: list[_Job], carried: dict[str, bytes], overwrite: bool
) -> None:
    """Raise InputError for files in the packed folder that do not belong to this set or are out of date."""
    there = {path.name for path in output.iterdir()}
    mine = {job.target.name for job in jobs}
    cores = {name for name in there if pair_file(name)}
    if cores - mine:
        raise InputError.listing(
            f"--output_dir {output} has cores that are not in the folder of the pairs:",
            sorted(cores - mine),
            "Training would use them as part of the set: move them away or choose another folder.",
            limit=5,
        )
    replaced = sorted(there & ({job.target.name for job in missing} | carried.keys()))
    if replaced and not overwrite:
        raise InputError.listing(
            f"--output_dir {output} has files that differ from what packing these pairs gives:",
            replaced,
            "Add --overwrite to replace them, or choose another folder.",
            limit=5,
        )


def _check_space(output: Path, missing: list[_Job]) -> None:
    for job in missing:
        # Remove what a killed call left, which takes up space.
        _remove(job.temporary)
    replaced = [file_state(job.target)[0] for job in missing if job.target.exists()]
    required = sum(job.most_bytes for job in missing) - sum(replaced)
    if replaced:
        # A file is replaced only when its successor is complete, so both need space for a moment.
        required += max(job.most_bytes for job in missing)
    free = shutil.disk_usage(output).free
    if required > free:
        with suppress(OSError):
            output.rmdir()
        raise RunError(
            f"--output_dir {output}: too little disk space, {required / 1e9:.1f} GB are needed and "
            f"{free / 1e9:.1f} GB free; free some space or choose a folder on another disk"
        )


def _pack_all(table: PairTable, missing: list[_Job], carried: dict[str, bytes], output: Path) -> None:
    total = sum(job.nbytes for job in missing)
    shown = {"unit": "B", "unit_scale": True, "leave": False, "dynamic_ncols": True, "disable": None}
    done = 0
    try:
        for name, content in carried.items():
            write_atomic(output / name, content)
        with tqdm(total=total, desc="packing", **shown) as bar:
            for job in missing:
                _pack_file(table, job, output, bar)
                done += 1
    except OSError as error:
        raise RunError(
            f"--output_dir {output}: cannot be written ({error.strerror or error}); {done} of {len(missing)} files "
            "were packed and are kept; once this is fixed, the same command continues from there"
        ) from error


def _pack_file(table: PairTable, job: _Job, output: Path, bar: tqdm[Any]) -> None:
    """Write one array under a temporary name, record its source, and rename it."""
    try:
        if job.zarr:
            _write_zarr(table, job, bar)
        else:
            _write_npy(table, job, bar)
        if any(job.origin[key] != value for key, value in _state(job.source).items()):
            raise InputError(f"{job.source}: changed while it was being packed; pack again when nothing writes to it")
        # Remove the old file, then update the record, then rename: so a file under its name always matches the record.
        _remove(job.target)
        append_line(output / RECORD_FILE, {"file": job.target.name, "origin": job.origin})
        os.replace(job.temporary, job.target)
        fsync_folder(output)
    finally:
        _remove(job.temporary)


def _write_npy(table: PairTable, job: _Job, bar: tqdm[Any]) -> None:
    with open(job.temporary, "wb") as file:
        header = {
            "descr": np.lib.format.dtype_to_descr(job.dtype),
            "fortran_order": False,
            "shape": job.shape,
        }
        np.lib.format.write_array_header_1_0(file, header)
        for band in _bands(table, job):
            file.write(band.reshape(-1).view(np.uint8).data)
            bar.update(band.nbytes)
        file.flush()
        os.fsync(file.fileno())


def _write_zarr(table: PairTable, job: _Job, bar: tqdm[Any]) -> None:
    def shown() -> Iterator[np.ndarray]:
        for band in _bands(table, job):
            yield band
            bar.update(band.nbytes)

    names = table.stored_names(job.core) if job.modality == "orion" else ("red", "green", "blue")
    about = {"pixel_size_um": job.origin["pixel_size_um"], "names": names}
    write_zarr(job.temporary, job.shape, job.dtype, shown(), about)


def _remove(path: Path) -> None:
    """Remove a file or an OME-Zarr folder, where it is."""
    with suppress(OSError):
        path.unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def _bands(table: PairTable, job: _Job) -> Iterator[np.ndarray]:
    """The array from top to bottom in bands (h, W, C) of ``BAND_BYTES``, one row, or a row of tiles; each may overwrite
    the last."""
    stored = table.open(job.core, job.modality)
    if isinstance(stored, TiledArray):
        yield from (np.ascontiguousarray(band, job.dtype) for band in stored.bands())
        return
    height = job.shape[0]
    row_bytes = job.nbytes // height
    rows, block = max(1, BAND_BYTES // row_bytes), max(1, BLOCK_BYTES // row_bytes)
    buffer = np.empty((min(rows, height), *job.shape[1:]), job.dtype)
    for top in range(0, height, rows):
        # A new memory map per band, so that its pages are released with it.
        stored = np.asarray(table.open(job.core, job.modality))
        if job.origin["layout"] == "chw":
            stored = stored.transpose(1, 2, 0)
        band = buffer[: min(rows, height - top)]
        for first in range(0, len(band), block):
            part = band[first : first + block]
            part[:] = stored[top + first : top + first + len(part)]
        yield band
