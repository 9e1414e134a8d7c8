"""A prediction that grows on disk, row by row, and continues there after an interruption."""

from __future__ import annotations

import fcntl
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np

from orion_unet.errors import InputError, RunError
from orion_unet.run_log import fsync_folder, read_document, write_json


class WorkingFile:
    """The hidden ``.NAME.partial.npy`` of an output, (C, H, W), and ``.NAME.partial.json``: how far it has come.

    Plain writes, because the dirty pages of a memory map would count as this process's memory. Rows are on the disk
    before they are noted. ``finished_rows`` is the number of tile rows from an interrupted call with the same
    ``fingerprint``. A context manager that keeps the file, so that a later call can continue.

    Raises InputError if another process is writing it, RunError if the disk is full or fails.
    """

    def __init__(
        self, folder: Path, name: str, shape: tuple[int, int, int], dtype: str, fingerprint: dict[str, Any]
    ) -> None:
        self.path, self.note = folder / f".{name}.partial.npy", folder / f".{name}.partial.json"
        self.shape, self.dtype, self.fingerprint = shape, np.dtype(dtype), fingerprint
        self._syncing: Future[None] | None = None
        self._syncer = ThreadPoolExecutor(max_workers=1)
        self._offset = 0
        self._file = self._claimed()
        try:
            self.finished_rows = self._begin()
        except BaseException:
            self._file.close()
            raise

    def _claimed(self) -> BinaryIO:
        """The file at this path, opened and locked."""
        while True:
            try:
                handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except OSError as error:
                raise RunError(f"{self.path}: cannot be written ({error.strerror})") from error
            file = os.fdopen(handle, "r+b", buffering=0)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                raise InputError(
                    f"{self.path}: another predict is writing it; wait for it, or name another folder"
                ) from None
            except OSError:
                # This file system has no locks.
                return file
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), self.path.stat()):
                    return file
            # The owner finished between opening and locking: the open file is now its output, or deleted.
            file.close()

    def _begin(self) -> int:
        self._check_space()
        with suppress(OSError):
            noted, _ = read_document(self.note)
            if noted and noted.get("fingerprint") == self.fingerprint and isinstance(noted.get("tile_rows"), int):
                self._file.seek(0)
                if self._read_header() and os.fstat(self._file.fileno()).st_size == self._offset + self._bytes():
                    return int(noted["tile_rows"])
        try:
            self.note.unlink(missing_ok=True)
            self._file.seek(0)
            self._file.truncate(0)
            header = {
                "descr": np.lib.format.dtype_to_descr(self.dtype),
                "fortran_order": False,
                "shape": self.shape,
            }
            np.lib.format.write_array_header_1_0(self._file, header)
            self._offset = self._file.tell()
            self._file.truncate(self._offset + self._bytes())
        except OSError as error:
            raise self._failed(error) from error
        return 0

    def _read_header(self) -> bool:
        try:
            if np.lib.format.read_magic(self._file) != (1, 0):
                return False
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(self._file)
        except ValueError:
            return False
        self._offset = self._file.tell()
        return (shape, fortran, dtype) == (self.shape, False, self.dtype)

    def _bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def _check_space(self) -> None:
        there = os.fstat(self._file.fileno()).st_blocks * 512
        missing, free = self._bytes() - there, shutil.disk_usage(self.path.parent).free
        if missing > free:
            if not there:
                self.path.unlink(missing_ok=True)
            raise RunError(
                f"{self.path.parent}: too little room on the disk, {missing / 1e9:.1f} GB are needed and "
                f"{free / 1e9:.1f} GB free; make room, or ask for fewer markers with --markers"
            )

    def write(self, channel: int, y: int, rows: np.ndarray) -> None:
        """Write finished rows (h, W) of one channel from row ``y`` on."""
        data = np.ascontiguousarray(rows, self.dtype).data.cast("B")
        place = self._offset + (channel * self.shape[1] + y) * self.shape[2] * self.dtype.itemsize
        try:
            while data:
                done = os.pwrite(self._file.fileno(), data, place)
                data, place = data[done:], place + done
        except OSError as error:
            raise self._failed(error) from error

    def finish_row(self, tile_rows: int) -> None:
        """Note the number of finished tile rows as soon as the disk has them; returns before that."""
        self._settle()
        self._syncing = self._syncer.submit(self._sync, tile_rows)

    def _sync(self, tile_rows: int) -> None:
        os.fsync(self._file.fileno())
        write_json(self.note, {"fingerprint": self.fingerprint, "tile_rows": tile_rows})

    def _settle(self) -> None:
        """Wait for the disk; raises RunError if it failed."""
        if self._syncing is not None:
            try:
                self._syncing.result()
            except OSError as error:
                raise self._failed(error) from error
            finally:
                self._syncing = None

    def _failed(self, error: OSError) -> RunError:
        return RunError(
            f"{self.path}: cannot be written ({error.strerror or error}); it is kept, and the same command continues "
            "from its last finished row once there is room"
        )

    def open(self) -> np.ndarray:
        """A memory map (C, H, W) for reading, once all rows are on the disk."""
        self._settle()
        return np.memmap(self.path, self.dtype, "r", self._offset, self.shape)

    def rows(self, channel: int, rows: slice) -> np.ndarray:
        """Finished rows (h, W) of a channel, in a map of their own, so that its pages are released with it."""
        return self.open()[channel, rows]

    def become(self, final: Path) -> None:
        """Rename the complete array to its final name."""
        self._settle()
        try:
            os.fsync(self._file.fileno())
            os.replace(self.path, final)
            self.note.unlink(missing_ok=True)
        except OSError as error:
            raise self._failed(error) from error
        fsync_folder(final.parent)

    def remove(self) -> None:
        """Delete the array and its note."""
        self._settle()
        self.note.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._syncer.shutdown()
        self._file.close()
