"""Reads the lines of a file while a writer appends to it, in bounded memory."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from orion_unet.run_log import open_regular

MAX_LINE_BYTES = 4 << 20

_CHUNK_BYTES = 1 << 20
_MARK_BYTES = 64


class GrowingLog(ABC):
    """The lines of a growing file, handed to ``_line`` of the subclass.

    ``poll`` reads only what was appended since the last call. An incomplete last line waits for its rest; lines over
    MAX_LINE_BYTES are skipped and counted as damaged; a file that was replaced, shortened or rewritten is read again
    from its start.
    """

    damaged_lines: int
    _identity: tuple[int, int] | None
    _offset: int
    _head: bytes
    _tail: bytes
    _pending: bytearray
    _skipping: bool

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reset()

    def poll(self) -> None:
        """Read what is new. Raises OSError where the file cannot be read; a missing file is an empty log."""
        try:
            file = open_regular(self.path)
        except FileNotFoundError:
            self._reset()
            return
        with file:
            status = os.fstat(file.fileno())
            identity = (status.st_dev, status.st_ino)
            if self._identity is not None and (identity != self._identity or not self._continues(file, status.st_size)):
                self._reset()
            self._identity = identity
            self._skip_ahead(file, status.st_size)
            file.seek(self._offset)
            while chunk := file.read(_CHUNK_BYTES):
                self._offset += len(chunk)
                self._head = (self._head + chunk[:_MARK_BYTES])[:_MARK_BYTES]
                self._tail = (self._tail + chunk[-_MARK_BYTES:])[-_MARK_BYTES:]
                self._split(chunk)
        # Not every writer ends its last line: what parses as an object is complete.
        if self._pending.endswith(b"}") and self._unended_line(bytes(self._pending)):
            self._pending.clear()

    def _reset(self) -> None:
        """Forget everything that was read."""
        self.damaged_lines = 0
        self._identity = None
        self._offset = 0
        self._head = b""
        self._tail = b""
        self._pending = bytearray()
        self._skipping = False

    @abstractmethod
    def _line(self, line: bytes) -> None:
        """Take a whole line, without its end; never called with one that is too long."""

    @abstractmethod
    def _unended_line(self, line: bytes) -> bool:
        """Take the last line of the file, which has no end yet; False if it is not complete."""

    def _skip_ahead(self, file: Any, size: int) -> None:
        """Called before what is new in a file of ``size`` bytes is read; may call ``_jump``. By default, reads on."""
        return

    def _jump(self, file: Any, offset: int) -> None:
        """Go on reading with the first line that begins after ``offset``."""
        file.seek(0)
        self._head = file.read(_MARK_BYTES)
        file.seek(offset - _MARK_BYTES)
        self._tail = file.read(_MARK_BYTES)
        self._offset = offset
        self._pending.clear()
        self._skipping = True

    def _continues(self, file: Any, size: int) -> bool:
        """Whether the part that was read before still begins and ends as it did."""
        if size < self._offset:
            return False
        file.seek(0)
        if file.read(len(self._head)) != self._head:
            return False
        file.seek(self._offset - len(self._tail))
        return bool(file.read(len(self._tail)) == self._tail)

    def _split(self, chunk: bytes) -> None:
        start = 0
        while (end := chunk.find(b"\n", start)) >= 0:
            if self._skipping:
                self._skipping = False
            elif self._pending or end - start > MAX_LINE_BYTES:
                self._pending += chunk[start:end]
                self._whole(bytes(self._pending))
            else:
                self._whole(chunk[start:end])
            self._pending.clear()
            start = end + 1
        if not self._skipping:
            self._pending += chunk[start:]
            if len(self._pending) > MAX_LINE_BYTES:
                self._pending.clear()
                self._skipping = True
                self.damaged_lines += 1

    def _whole(self, line: bytes) -> None:
        line = line.strip()
        if len(line) > MAX_LINE_BYTES:
            self.damaged_lines += 1
        elif line:
            self._line(line)
