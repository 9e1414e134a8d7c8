"""Regions of a TIFF, whose tiles or strips are decoded in threads: for one image that is read from top to bottom."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from orion_unet.distributed import usable_cores
from orion_unet.slides.remote import READERS
from orion_unet.slides.tiff_tiles import TiffTiles
from orion_unet.slides.tiles import Place, groups, overlap, paste, touched

# The next region overlaps this one, so some of its decoded tiles are kept. A single tile or strip may exceed it.
CACHE_BYTES = 1 << 27


class Segments:
    """Reads regions of ``tiles`` and keeps the lowest tiles of the last one."""

    def __init__(self, tiles: TiffTiles) -> None:
        self.tiles = tiles
        self._kept: dict[Place, np.ndarray] = {}
        self._decoders = ThreadPoolExecutor(max_workers=READERS if tiles.remote else min(8, usable_cores()))

    def read(self, channels: Sequence[int], y: int, x: int, height: int, width: int) -> np.ndarray:
        """A region inside the image as stored, (h, w, len(channels)); raises InputError if it is damaged."""
        region = np.full((height, width, len(channels)), self.tiles.blank, self.tiles.dtype)
        if 0 in region.shape:
            return region
        rows, columns = touched(self.tiles, y, x, height, width)
        places = {
            (row, group.number, column): group
            for row in rows
            for group in groups(channels, self.tiles.depth)
            for column in columns
        }
        decoded: dict[Place, np.ndarray] = {}
        for (place, group), pixels in zip(places.items(), self._decoders.map(self._segment, places), strict=True):
            if pixels is not None:
                decoded[place] = pixels
                common = overlap(self.tiles, place[0], place[2], y, x, height, width)
                paste(self.tiles, pixels, common, group, region)
        self._keep(decoded)
        return region

    def _segment(self, place: Place) -> np.ndarray | None:
        kept = self._kept.get(place)
        return self.tiles.tile(place) if kept is None else kept

    def _keep(self, decoded: dict[Place, np.ndarray]) -> None:
        """Keep the lowest tiles of this region, at least one: the next region begins among them."""
        self._kept, held = {}, 0
        for place, pixels in reversed(decoded.items()):
            held += pixels.nbytes
            if held > CACHE_BYTES and self._kept:
                break
            self._kept[place] = pixels

    def close(self) -> None:
        """End the decoding threads."""
        self._decoders.shutdown()
