"""The tiles or strips of one level of a TIFF."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from orion_unet.errors import InputError
from orion_unet.slides.remote import RemotePath
from orion_unet.slides.tiles import LARGEST_SEGMENT, Place, Tiles

# TIFF's codes for compressions whose tables are kept apart from the tiles.
JPEGS = (6, 7, 34892, 33007)


class TiffTiles(Tiles):
    """Pixels in one page (interleaved or planar), or in one page per channel.

    ``striped`` is True for strips. Has a file handle of its own, which is closed with it: the TIFF may be closed.
    Raises InputError if the file ends before its pixels do, or if they are one piece too large for memory.
    """

    def __init__(self, path: Path, tiff: Any, planes: list[Any], blank: float, level: int = 0) -> None:
        super().__init__(path, level, blank)
        page = planes[0].keyframe
        self.dtype = np.dtype(page.dtype)
        self.shape = (int(page.imagelength), int(page.imagewidth))
        planar = len(planes) > 1 or (page.planarconfig == 2 and page.samplesperpixel > 1)
        self.channels = len(planes) if len(planes) > 1 else int(page.samplesperpixel)
        self.depth = 1 if planar else self.channels
        self.striped = not page.is_tiled
        if page.is_tiled:
            self.side = (int(page.tilelength), int(page.tilewidth))
        else:
            self.side = (int(min(page.rowsperstrip, page.imagelength)), int(page.imagewidth))
        self._grid = tuple(-(-length // side) for length, side in zip(self.shape, self.side, strict=True))
        self._one_page = len(planes) == 1
        self._check(page, planes, tiff.filehandle.size)
        # Arrays: as tuples, those of a slide of 20 channels would take 25 MB in every loader process.
        self._segments = [
            (np.array(plane.dataoffsets, np.int64), np.array(plane.databytecounts, np.int64)) for plane in planes
        ]
        self._tables: list[dict[str, Any]] = [{} for _ in planes]
        if page.compression in JPEGS:
            self._tables = [{"jpegtables": plane.jpegtables, "jpegheader": page.jpegheader} for plane in planes]
        try:
            self._decode = page.decode
            self._decode(None, 0)
        except Exception as error:
            raise InputError(
                f"{path}: is compressed as {_name(page.compression)}, which the installed imagecodecs cannot decode "
                f"({str(error).splitlines()[0] if str(error) else type(error).__name__}): update it with pip install "
                "-U imagecodecs, or save the file with another compression"
            ) from None
        if not isinstance(path, RemotePath):
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def _check(self, page: Any, planes: list[Any], size: int) -> None:
        segment = self.side[0] * self.side[1] * self.depth * self.dtype.itemsize
        if segment > LARGEST_SEGMENT:
            raise InputError(
                f"{self.path}: its pixels are compressed in pieces of {segment / 1e9:.1f} GB, too large to be read by "
                "region: save it as a tiled TIFF"
            )
        per_page = self._grid[0] * self._grid[1] * (self.channels // self.depth if self._one_page else 1)
        for plane in planes:
            offsets, counts = plane.dataoffsets, plane.databytecounts
            if min(len(offsets), len(counts)) < per_page:
                raise InputError(f"{self.path}: is damaged, it lists {len(offsets)} of its {per_page} tiles or strips")
            beyond = next((i for i, end in enumerate(map(sum, zip(offsets, counts, strict=False))) if end > size), None)
            if beyond is not None:
                row, column = divmod(beyond % (self._grid[0] * self._grid[1]), self._grid[1])
                raise InputError(
                    f"{self.path}: is truncated, its pixels continue past the end of the file from level {self.level}, "
                    f"row {row * self.side[0]}, column {column * self.side[1]} on"
                )

    def tile(self, place: Place) -> np.ndarray | None:
        row, channel, column = place
        index = row * self._grid[1] + column
        if self._one_page:
            index += channel * self._grid[0] * self._grid[1]
        plane = 0 if self._one_page else channel
        offsets, counts = self._segments[plane]
        if not counts[index]:
            return None
        try:
            if isinstance(self.path, RemotePath):
                data = self.path.read_range(int(offsets[index]), int(counts[index]))
            else:
                data = os.pread(self._file, int(counts[index]), int(offsets[index]))
            if len(data) < counts[index]:
                raise ValueError("the file ends here")
            pixels = self._decode(data, index, **self._tables[plane])[0]
        except Exception as error:
            # On damaged bytes a decoder can raise almost anything.
            raise self.damaged(place, error) from None
        return None if pixels is None else np.asarray(pixels[0])

    def expect_single_tiles(self) -> None:
        with suppress(AttributeError, OSError):
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_RANDOM)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        # At the end of the interpreter, modules go before their objects.
        if hasattr(self, "_file"):
            close(self._file)


def _name(compression: Any) -> str:
    return str(getattr(compression, "name", compression)).lower()
