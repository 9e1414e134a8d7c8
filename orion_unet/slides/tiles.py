"""Images stored in tiles: decoded one tile at a time, kept in a bounded cache, read like a memory map."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from orion_unet.errors import InputError, RunError
from orion_unet.slides.remote import is_remote, reading_pool

# Row, group of channels and column of a tile; other numbers where a class of tiles says so.
Place = tuple[int, ...]
# A larger tile, strip or chunk means that the slide is one compressed piece, which cannot be read by region [bytes].
LARGEST_SEGMENT = 1 << 29
# Cache of an array that is opened for itself [bytes].
OWN_CACHE_BYTES = 32 << 20


class Tiles(ABC):
    """One level of an image that is stored in tiles (or strips) of ``side`` (rows, columns) and ``depth`` channels.

    ``shape`` is (H, W), ``channels`` their number. Tiles that the file leaves out have the value ``blank``.
    """

    def __init__(self, path: Path, level: int, blank: float) -> None:
        self.path, self.level, self.blank = path, level, blank
        self.shape: tuple[int, int]
        self.channels: int
        self.dtype: np.dtype[Any]
        self.side: tuple[int, int]
        self.depth: int
        # Whether several are fetched at a time: each is waited for, and costs little meanwhile.
        self.remote = is_remote(path)

    @property
    def nbytes(self) -> int:
        """Bytes of a decoded tile."""
        return self.side[0] * self.side[1] * self.depth * self.dtype.itemsize

    @abstractmethod
    def tile(self, place: Place) -> np.ndarray | None:
        """A decoded tile (h, w, depth), which may reach beyond the image; None if the file leaves it out.

        Raises InputError if it is damaged.
        """

    def fetched(self, places: Sequence[Place]) -> dict[Place, np.ndarray | None]:
        """Several tiles, as ``tile`` gives each, fetched at the same time."""
        return dict(zip(places, reading_pool().map(self.tile, places), strict=True))

    @abstractmethod
    def expect_single_tiles(self) -> None:
        """Switch off read-ahead, which reads several times a tile around each one of a set larger than memory."""

    def damaged(self, place: Place, error: Exception) -> InputError | RunError:
        """What to raise for a tile that cannot be decoded, or that its store does not give."""
        row, _, column = place
        where = f"level {self.level}, row {row * self.side[0]}, column {column * self.side[1]}"
        if isinstance(error, InputError | RunError):
            return type(error)(f"{error} [{where}]")
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return InputError(f"{self.path}: is damaged or truncated at {where} ({reason})")


class Group(NamedTuple):
    """Channels that are stored together, the ``number``-th of them: their places in a region and in the tile."""

    number: int
    in_region: slice | list[int]
    in_tile: slice | list[int]


def groups(channels: Sequence[int], depth: int) -> list[Group]:
    """The groups of ``depth`` stored channels in which the given ones are."""
    found: dict[int, tuple[list[int], list[int]]] = {}
    for place, channel in enumerate(channels):
        in_region, in_tile = found.setdefault(channel // depth, ([], []))
        in_region.append(place)
        in_tile.append(channel % depth)
    return [Group(index, _run(in_region), _run(in_tile)) for index, (in_region, in_tile) in found.items()]


def _run(places: list[int]) -> slice | list[int]:
    """Consecutive places as a slice, which copies faster."""
    consecutive = places == list(range(places[0], places[0] + len(places)))
    return slice(places[0], places[-1] + 1) if consecutive else places


def touched(tiles: Tiles, y: int, x: int, height: int, width: int) -> tuple[range, range]:
    """Rows and columns of the tiles that a region touches."""
    return (
        range(y // tiles.side[0], -(-(y + height) // tiles.side[0])),
        range(x // tiles.side[1], -(-(x + width) // tiles.side[1])),
    )


class Overlap(NamedTuple):
    """Rows and columns that a tile and a region have in common, in the region and in the tile."""

    in_region: tuple[slice, slice]
    in_tile: tuple[slice, slice]


def overlap(tiles: Tiles, row: int, column: int, y: int, x: int, height: int, width: int) -> Overlap:
    """What a tile has of a region that begins at row ``y`` and column ``x``."""
    top, left = row * tiles.side[0], column * tiles.side[1]
    up, down = max(top, y), min(top + tiles.side[0], y + height)
    start, end = max(left, x), min(left + tiles.side[1], x + width)
    return Overlap(
        (slice(up - y, down - y), slice(start - x, end - x)),
        (slice(up - top, down - top), slice(start - left, end - left)),
    )


def paste(tiles: Tiles, pixels: np.ndarray | None, common: Overlap, group: Group, region: np.ndarray) -> None:
    """Copy what a tile has of a region (h, w, C)."""
    target = (*common.in_region, group.in_region)
    region[target] = tiles.blank if pixels is None else pixels[(*common.in_tile, group.in_tile)]


class TileCache:
    """The decoded tiles that were used last, at most ``limit`` bytes of them; ``decoded_bytes`` were decoded so far."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.decoded_bytes = 0
        self._held = 0
        self._tiles: OrderedDict[tuple[Hashable, Place], np.ndarray | None] = OrderedDict()

    @property
    def kept(self) -> list[tuple[Hashable, Place]]:
        """Owner and place of every tile."""
        return list(self._tiles)

    def clear(self) -> None:
        """Forget every tile."""
        self._tiles.clear()
        self._held = 0

    def get(self, owner: Hashable, tiles: Tiles, place: Place) -> np.ndarray | None:
        """A tile of ``tiles``, known here as ``owner``: kept, or decoded now."""
        key = (owner, place)
        if key in self._tiles:
            self._tiles.move_to_end(key)
            return self._tiles[key]
        return self.keep(owner, place, tiles.tile(place))

    def get_all(self, owner: Hashable, tiles: Tiles, places: Sequence[Place]) -> dict[Place, np.ndarray | None]:
        """The same for several tiles; those that are not kept are fetched and decoded at the same time."""
        missing = [place for place in places if not self.has(owner, place)]
        if len(missing) < 2:
            return {place: self.get(owner, tiles, place) for place in places}
        fetched = tiles.fetched(missing)
        kept = {place: self.get(owner, tiles, place) for place in places if place not in fetched}
        return kept | {place: self.keep(owner, place, pixels) for place, pixels in fetched.items()}

    def has(self, owner: Hashable, place: Place) -> bool:
        """Whether a tile is kept."""
        return (owner, place) in self._tiles

    def keep(self, owner: Hashable, place: Place, pixels: np.ndarray | None) -> np.ndarray | None:
        """Keep a tile that is new here; returns it."""
        key = (owner, place)
        size = 0 if pixels is None else pixels.nbytes
        self.decoded_bytes += size
        self._tiles[key] = pixels
        self._held += size
        while self._held > self.limit and len(self._tiles) > 1:
            dropped = self._tiles.popitem(last=False)[1]
            self._held -= 0 if dropped is None else dropped.nbytes
        return pixels


class TiledArray:
    """Tiles that read like a memory map: ``array[rows, columns]``, ``shape`` and ``dtype`` in the axis order ``layout``
    (``hwc`` or ``chw``), and numpy.asarray() for the whole. The first row is row ``phase`` of its tiles."""

    ndim = 3

    def __init__(
        self,
        tiles: Tiles,
        layout: str,
        channels: int | None = None,
        cache: TileCache | None = None,
        owner: Hashable = None,
        phase: int = 0,
    ) -> None:
        self.tiles, self.layout, self._phase = tiles, layout, phase
        self.channels = channels or tiles.channels
        self.dtype = tiles.dtype
        self._cache, self._owner = cache or TileCache(OWN_CACHE_BYTES), owner

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) or (C, H, W)."""
        height, width = self.tiles.shape
        return (height, width, self.channels) if self.layout == "hwc" else (self.channels, height, width)

    def read(
        self,
        y: int,
        x: int,
        height: int,
        width: int,
        channels: Sequence[int] | None = None,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """A region inside the image as stored, (h, w, C) in memory of the array's axis order, or in ``out``.

        Only the tiles of the given ``channels`` are decoded; with ``out``, which has all of them, the others stay as
        they are. Raises InputError if a tile is damaged.
        """
        chosen = range(self.channels) if channels is None else channels
        if out is None:
            region = self._empty(height, width, len(chosen))
            found = groups(chosen, self.tiles.depth)
        else:
            region = out
            found = [
                Group(group.number, _placed(group, chosen), group.in_tile) for group in groups(chosen, self.tiles.depth)
            ]
        rows, columns = touched(self.tiles, y, x, height, width)
        fetched: dict[Place, np.ndarray | None] = {}
        if self.tiles.remote:
            places = [(row, group.number, column) for row in rows for column in columns for group in found]
            fetched = self._cache.get_all(self._owner, self.tiles, places)
        for row in rows:
            for column in columns:
                common = overlap(self.tiles, row, column, y, x, height, width)
                for group in found:
                    place = (row, group.number, column)
                    pixels = fetched[place] if fetched else self._cache.get(self._owner, self.tiles, place)
                    paste(self.tiles, pixels, common, group, region)
        return region

    def lacking(self, y: int, x: int, height: int, width: int, channels: Sequence[int]) -> list[Place]:
        """The tiles of a region that the cache does not have."""
        rows, columns = touched(self.tiles, y, x, height, width)
        numbers = [group.number for group in groups(channels, self.tiles.depth)]
        places = ((row, number, column) for row in rows for column in columns for number in numbers)
        return [place for place in places if not self._cache.has(self._owner, place)]

    def keep(self, fetched: dict[Place, np.ndarray | None]) -> None:
        """Put tiles into the cache that were fetched from ``tiles``."""
        for place, pixels in fetched.items():
            self._cache.keep(self._owner, place, pixels)

    def rows(self, rows: np.ndarray, channels: Sequence[int]) -> np.ndarray:
        """Whole rows of pixels of some channels, (len(channels), len(rows), W), in the memory of a row of tiles."""
        width = self.tiles.shape[1]
        found = np.empty((len(channels), len(rows), width), self.dtype)
        of_tiles = (rows + self._phase) // self.tiles.side[0]
        for tile_row in np.unique(of_tiles).tolist():
            here = np.flatnonzero(of_tiles == tile_row)
            top, bottom = int(rows[here].min()), int(rows[here].max())
            band = self.read(top, 0, bottom + 1 - top, width, channels)
            found[:, here] = band[rows[here] - top].transpose(2, 0, 1)
        return found

    def bands(self) -> Iterator[np.ndarray]:
        """The whole image (h, W, C), a row of tiles at a time."""
        height, width = self.tiles.shape
        tops = [0, *range(self.tiles.side[0] - self._phase, height, self.tiles.side[0])]
        for top, end in zip(tops, [*tops[1:], height], strict=True):
            yield self.read(top, 0, end - top, width)

    def _empty(self, height: int, width: int, channels: int) -> np.ndarray:
        if self.layout == "hwc":
            return np.empty((height, width, channels), self.dtype)
        return np.empty((channels, height, width), self.dtype).transpose(1, 2, 0)

    def __getitem__(self, index: Any) -> np.ndarray:
        """A box of slices without steps, as of a memory map."""
        index = index if isinstance(index, tuple) else (index,)
        sides = [part.indices(side) for part, side in zip((*index, *[slice(None)] * 3), self.shape, strict=False)]
        if len(index) > 3 or any(step != 1 for _, _, step in sides):
            raise IndexError("tiles are read in boxes: slices without steps")
        y, x, c = (0, 1, 2) if self.layout == "hwc" else (1, 2, 0)
        size = [max(0, stop - start) for start, stop, _ in sides]
        channels = range(sides[c][0], max(sides[c][:2]))
        box = (
            self.read(sides[y][0], sides[x][0], size[y], size[x], channels)
            if min(size)
            else np.empty((size[y], size[x], size[c]), self.dtype)
        )
        return box if self.layout == "hwc" else box.transpose(2, 0, 1)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("tiles cannot be had without a copy")
        whole = self._empty(*self.tiles.shape, self.channels)
        top = 0
        for band in self.bands():
            whole[top : top + len(band)] = band
            top += len(band)
        whole = whole if self.layout == "hwc" else whole.transpose(2, 0, 1)
        return whole if dtype is None else whole.astype(dtype)

    def channels_last(self) -> TiledArray:
        """The same image as (H, W, C)."""
        return TiledArray(self.tiles, "hwc", self.channels, self._cache, self._owner)


def _placed(group: Group, channels: Sequence[int]) -> slice | list[int]:
    """Places of a group in a region that has all channels, of which some are read."""
    places = group.in_region
    if isinstance(places, slice):
        places = list(range(places.start, places.stop))
    return _run([channels[place] for place in places])
