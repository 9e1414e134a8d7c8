"""The pixels of one level of a TIFF, decoded one tile or strip at a time."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from orion_unet.distributed import usable_cores
from orion_unet.errors import InputError

# The next region overlaps this one, so some of its decoded tiles are kept. A single tile or strip may exceed
# CACHE_BYTES; above LARGEST_SEGMENT the slide is one compressed piece, which cannot be read by region.
CACHE_BYTES, LARGEST_SEGMENT = 1 << 27, 1 << 29
# TIFF's codes for compressions whose tables are kept apart from the tiles.
JPEGS = (6, 7, 34892, 33007)

Place = tuple[int, int, int]


class Segments:
    """Pixels in one page (interleaved or planar), or in one page per channel.

    ``shape`` is (H, W), ``channels`` their number. Tiles that the file leaves out have the value ``blank``. ``level``
    is the number of this level in its pyramid, 0 for full resolution.
    """

    def __init__(self, path: Path, tiff: Any, planes: list[Any], blank: float, level: int = 0) -> None:
        page = self._page = planes[0].keyframe
        self.path, self.blank, self.level = path, blank, level
        self.dtype = np.dtype(page.dtype)
        self.shape = (int(page.imagelength), int(page.imagewidth))
        self._tiff, self._planes = tiff, planes
        self._planar = len(planes) > 1 or (page.planarconfig == 2 and page.samplesperpixel > 1)
        self.channels = len(planes) if len(planes) > 1 else int(page.samplesperpixel)
        if page.is_tiled:
            self._side = (page.tilelength, page.tilewidth)
        else:
            self._side = (min(page.rowsperstrip, page.imagelength), page.imagewidth)
        self._grid = tuple(-(-length // side) for length, side in zip(self.shape, self._side, strict=True))
        self._check()
        self._kept: dict[Place, np.ndarray] = {}
        self._decoders = ThreadPoolExecutor(max_workers=min(8, usable_cores()))

    def _check(self) -> None:
        """Raise InputError if reading would need unbounded memory, or if the file ends before its pixels do."""
        samples = 1 if self._planar else self._page.samplesperpixel
        segment = self._side[0] * self._side[1] * samples * self._page.dtype.itemsize
        if segment > LARGEST_SEGMENT:
            raise InputError(
                f"{self.path}: its pixels are compressed in pieces of {segment / 1e9:.1f} GB, too large to be read by "
                "region: save it as a tiled TIFF"
            )
        per_page = self._grid[0] * self._grid[1] * (self.channels if self._planar and len(self._planes) == 1 else 1)
        size = self._tiff.filehandle.size
        for plane in self._planes:
            offsets, counts = plane.dataoffsets, plane.databytecounts
            if min(len(offsets), len(counts)) < per_page:
                raise InputError(f"{self.path}: is damaged, it lists {len(offsets)} of its {per_page} tiles or strips")
            ends = map(sum, zip(offsets, counts, strict=False))
            if (cut := next((index for index, end in enumerate(ends) if end > size), None)) is not None:
                row, column = divmod(cut % (self._grid[0] * self._grid[1]), self._grid[1])
                raise InputError(
                    f"{self.path}: is truncated, its pixels continue past the end of the file from "
                    f"{self._words(row, column)} on"
                )

    def read(self, channels: Sequence[int], y: int, x: int, height: int, width: int) -> np.ndarray:
        """A region inside the image as stored, (h, w, len(channels)); raises InputError if it is damaged."""
        region = np.full((height, width, len(channels)), self.blank, self._page.dtype)
        if 0 in region.shape:
            return region
        rows = range(y // self._side[0], -(-(y + height) // self._side[0]))
        columns = range(x // self._side[1], -(-(x + width) // self._side[1]))
        wanted = {channel: index for index, channel in enumerate(channels)}
        places = list(product(rows, wanted if self._planar else (0,), columns))
        decoded: dict[Place, np.ndarray] = {}
        for place, pixels in zip(places, self._decoders.map(self._segment, places), strict=True):
            if pixels is None:
                continue
            decoded[place] = pixels
            row, channel, column = place
            top, left = row * self._side[0], column * self._side[1]
            up, down = max(top, y), min(top + pixels.shape[0], y + height)
            start, end = max(left, x), min(left + pixels.shape[1], x + width)
            part = pixels[up - top : down - top, start - left : end - left]
            if self._planar:
                region[up - y : down - y, start - x : end - x, wanted[channel]] = part[..., 0]
            else:
                region[up - y : down - y, start - x : end - x] = part[..., list(channels)]
        self._keep(decoded)
        return region

    def _segment(self, place: Place) -> np.ndarray | None:
        """Decoded tile or strip (h, w, samples) at (row, channel, column); None if the file leaves it out."""
        if place in self._kept:
            return self._kept[place]
        row, channel, column = place
        one_page = len(self._planes) == 1
        plane = self._planes[0 if one_page else channel]
        index = row * self._grid[1] + column
        if one_page:
            index += channel * self._grid[0] * self._grid[1]
        offset, count = plane.dataoffsets[index], plane.databytecounts[index]
        if not count:
            return None
        tables = {"jpegtables": plane.jpegtables, "jpegheader": self._page.jpegheader}
        try:
            data = os.pread(self._tiff.filehandle.fileno(), count, offset)
            if len(data) < count:
                raise ValueError("the file ends here")
            pixels = self._page.decode(data, index, **(tables if self._page.compression in JPEGS else {}))[0]
        except Exception as error:
            # On damaged bytes a decoder can raise almost anything.
            raise InputError(
                f"{self.path}: is damaged or truncated at {self._words(row, column)} "
                f"({str(error).splitlines()[0] if str(error) else type(error).__name__})"
            ) from None
        return None if pixels is None else pixels[0]

    def _words(self, row: int, column: int) -> str:
        """The place of a tile or strip, in pixels of its level."""
        return f"level {self.level}, row {row * self._side[0]}, column {column * self._side[1]}"

    def _keep(self, decoded: dict[Place, np.ndarray]) -> None:
        """Keep the lowest tiles of this region, at least one: the next region begins among them."""
        self._kept, held = {}, 0
        for place, pixels in reversed(decoded.items()):
            held += pixels.nbytes
            if held > CACHE_BYTES and self._kept:
                break
            self._kept[place] = pixels

    def close(self) -> None:
        """End the decoding threads; the file is closed by whoever opened it."""
        self._decoders.shutdown()
