"""A one-time rewrite of a folder of pairs into the layout that reads fastest from a disk.

That is plain (H, W, C) .npy in C order, values and dtype unchanged: each row of a patch is one piece of the file.
From (C, H, W) a patch of 20 channels is 20 times as many pieces, each a few hundred bytes of a page of 4,096.
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
from orion_unet.data.pairs import HE_SUFFIX, ORION_SUFFIX, PairTable, find_pairs
from orion_unet.data.split import GROUPS_FILE
from orion_unet.errors import InputError, RunError
from orion_unet.run_log import fsync_folder, parse_object, write_atomic

RECORD_FILE = "packed.jsonl"
"""In the packed folder: a line for every file that was packed, with the source it came from."""
CARRIED = (NAMES_FILE, GROUPS_FILE)
# Rows are read and written in bands of this size, and turned in blocks that stay in the processor's cache.
BAND_BYTES = 32 << 20
BLOCK_BYTES = 512 << 10


@dataclass(frozen=True)
class PackedFolder:
    """What ``pack`` has done: cores of the folder, files it wrote and found whole, and bytes of all of them."""

    cores: int
    written: int
    found: int
    nbytes: int
    warnings: list[str]


@dataclass(frozen=True)
class _Job:
    """One array to be packed: where it lies in the table, where it goes, and what it will be there."""

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
    def temporary(self) -> Path:
        """Where it grows. The same in every call, so that the next one clears what a killed one has left."""
        return self.target.with_name(f".{self.target.name}.partial")


def pack(options: DataOptions, output: Path, overwrite: bool = False) -> PackedFolder:
    """Rewrite the pairs of ``options.pairs_dir`` into ``output`` as (H, W, C) in C order, little-endian, same dtype.

    The values are equal bit for bit; channel_names.txt and groups.csv are carried over. Each file appears under its
    name only when it is whole. Files that an earlier call has packed from the same, unchanged sources are kept, so
    that an interrupted pack is continued by calling it again. ``overwrite`` replaces files of the same names.

    Raises InputError for pairs that training would refuse, for a folder that cannot be used or holds other files, and
    where a source changes meanwhile; RunError where the disk is too small, or fails.
    """
    table = find_pairs(options)
    jobs = [_job(table, output, core, modality) for core in range(len(table)) for modality in ("he", "orion")]
    try:
        output.mkdir(parents=True, exist_ok=True)
        itself = output.samefile(table.folder)
        handle = os.open(output, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"--output_dir {output}: cannot be used ({error.strerror or error})") from None
    try:
        if itself:
            raise InputError(f"--output_dir {output}: is the folder of the pairs itself; name another one")
        _lock(handle, output)
        record = _read_record(output)
        missing = [job for job in jobs if record.get(job.target.name) != job.origin or not _is_whole(job)]
        carried = _carried(table.folder, output)
        _refuse_others(output, jobs, missing, carried, overwrite)
        _check_space(output, missing)
        _pack_all(table, missing, carried, output)
    finally:
        os.close(handle)
    return PackedFolder(
        len(table), len(missing), len(jobs) - len(missing), sum(job.nbytes for job in jobs), table.warnings
    )


def _job(table: PairTable, output: Path, core: int, modality: str) -> _Job:
    row = getattr(table, modality)[core]
    source = table.path(core, modality)
    origin = {"source": str(source.resolve()), "layout": str(row["layout"]), **_state(source)}
    shape = (int(row["height"]), int(row["width"]), int(row["channels"]))
    dtype = np.dtype(str(row["dtype"])).newbyteorder("<")
    return _Job(core, modality, source, output / source.name, shape, dtype, origin)


def _state(source: Path) -> dict[str, int]:
    """Size and time of the last change, by which a changed source is known."""
    try:
        found = source.stat()
    except OSError as error:
        raise InputError(f"{source}: cannot be read any more ({error.strerror})") from None
    return {"bytes": found.st_size, "modified_ns": found.st_mtime_ns}


def _lock(handle: int, folder: Path) -> None:
    """Hold the open folder against a second pack; raises InputError where there is one."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(
            f"--output_dir {folder}: another pack is writing here; wait for it, or name another folder"
        ) from None
    except OSError:
        # A file system without locks: nothing can be known of others.
        return


def _read_record(output: Path) -> dict[str, Any]:
    """The source of each packed file by its name. A line that a killed writer has left half counts for nothing."""
    try:
        lines = (output / RECORD_FILE).read_bytes().splitlines()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise InputError(f"{output / RECORD_FILE}: cannot be read ({error.strerror})") from None
    found = [parse_object(line) for line in lines]
    return {str(line.get("file")): line.get("origin") for line in found if line is not None}


def _is_whole(job: _Job) -> bool:
    """Whether the packed file is there, with the header and the length that it must have."""
    try:
        stored = np.load(job.target, mmap_mode="r", allow_pickle=False)
        return bool(
            (stored.shape, stored.dtype, stored.flags.c_contiguous) == (job.shape, job.dtype, True)
            and job.target.stat().st_size == stored.offset + job.nbytes
        )
    except Exception:
        # NumPy evaluates the header as a Python literal: what a broken one raises can be nearly anything.
        return False


def _carried(folder: Path, output: Path) -> dict[str, bytes]:
    """The small files to be copied: those of the source that the packed folder does not hold alike."""
    files = {}
    for name in CARRIED:
        if (folder / name).is_file():
            try:
                content = (folder / name).read_bytes()
                alike = (output / name).is_file() and (output / name).read_bytes() == content
            except OSError as error:
                raise InputError(f"{error.filename}: cannot be read ({error.strerror})") from None
            if not alike:
                files[name] = content
    return files


def _refuse_others(
    output: Path, jobs: list[_Job], missing: list[_Job], carried: dict[str, bytes], overwrite: bool
) -> None:
    """Raise InputError for files in the packed folder that are not of this set, or not of its present state."""
    there = {path.name for path in output.iterdir()}
    mine = {job.target.name for job in jobs}
    cores = {name for name in there if name.endswith((HE_SUFFIX, ORION_SUFFIX)) and not name.startswith(".")}
    if cores - mine:
        raise InputError.listing(
            f"--output_dir {output} holds cores that the folder of the pairs does not:",
            sorted(cores - mine),
            "Training would take them for part of the set: move them away, or name another folder.",
            limit=5,
        )
    replaced = sorted(there & ({job.target.name for job in missing} | carried.keys()))
    if replaced and not overwrite:
        raise InputError.listing(
            f"--output_dir {output} holds files that are not what packing the present pairs gives:",
            replaced,
            "Add --overwrite to replace them, or name another folder.",
            limit=5,
        )


def _check_space(output: Path, missing: list[_Job]) -> None:
    for job in missing:
        # What a killed call has left takes room that is there again.
        with suppress(OSError):
            job.temporary.unlink(missing_ok=True)
    replaced = [job.target.stat().st_size for job in missing if job.target.exists()]
    needed = sum(job.nbytes for job in missing) - sum(replaced)
    if replaced:
        # A file is replaced only when its successor is whole.
        needed += max(job.nbytes for job in missing)
    free = shutil.disk_usage(output).free
    if needed > free:
        with suppress(OSError):
            output.rmdir()
        raise RunError(
            f"--output_dir {output}: too little room on the disk, {needed / 1e9:.1f} GB are needed and "
            f"{free / 1e9:.1f} GB free; make room, or name a folder on another disk"
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
            "were packed and are kept, and the same command goes on from there once this is mended"
        ) from error


def _pack_file(table: PairTable, job: _Job, output: Path, bar: tqdm[Any]) -> None:
    """Write one array under a temporary name, note its source, and give it its name."""
    try:
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
        if any(job.origin[key] != value for key, value in _state(job.source).items()):
            raise InputError(f"{job.source}: has changed while it was packed; pack again when nothing writes to it")
        # A file under its final name is always the one on record: the old one goes first, the record before the new.
        job.target.unlink(missing_ok=True)
        _note(output, job)
        os.replace(job.temporary, job.target)
        fsync_folder(output)
    finally:
        with suppress(OSError):
            job.temporary.unlink(missing_ok=True)


def _note(output: Path, job: _Job) -> None:
    line = json.dumps({"file": job.target.name, "origin": job.origin}) + "\n"
    with open(output / RECORD_FILE, "ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            # A killed writer has left half a line: close it off.
            if file.read(1) != b"\n":
                line = "\n" + line
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def _bands(table: PairTable, job: _Job) -> Iterator[np.ndarray]:
    """The array from top to bottom in bands (h, W, C) of ``BAND_BYTES`` or a row; each is overwritten by the next."""
    height = job.shape[0]
    row_bytes = job.nbytes // height
    rows, block = max(1, BAND_BYTES // row_bytes), max(1, BLOCK_BYTES // row_bytes)
    buffer = np.empty((min(rows, height), *job.shape[1:]), job.dtype)
    for top in range(0, height, rows):
        # A map of its own for each band, whose pages go with it.
        stored = np.asarray(table.open(job.core, job.modality))
        if job.origin["layout"] == "chw":
            stored = stored.transpose(1, 2, 0)
        band = buffer[: min(rows, height - top)]
        for first in range(0, len(band), block):
            part = band[first : first + block]
            part[:] = stored[top + first : top + first + len(part)]
        yield band
