"""Chooses patches and copies them out of memory maps and tiles: whole batches, as stored, into one buffer."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from orion_unet.config import DataOptions
from orion_unet.data.page_cache import ask_for, expect_single_rows, fits_page_cache
from orion_unet.data.pairs import PairTable
from orion_unet.data.randomness import SAMPLE, VALIDATION, counter_rng
from orion_unet.data.scale import Scales
from orion_unet.data.tissue import tissue_fraction
from orion_unet.slides.remote import image_pool, is_remote
from orion_unet.slides.tiles import Place, TileCache, TiledArray

# Largest number of open memory maps per process. Each uses a file descriptor, often limited to 1,024.
OPEN_MAPS = 128
# The same of objects on object storage: they use no descriptor, and each new one costs several requests.
OPEN_OBJECTS = 1024
# Decoded tiles that a process keeps, where nothing else is asked for [bytes].
CACHE_BYTES = 256_000_000
# A training crop is drawn up to this many times, until at least this fraction of it is tissue.
TISSUE_TRIES = 8
TISSUE_FRACTION = 0.25

Stored = np.ndarray | TiledArray


class RawBatch(NamedTuple):
    """A batch as stored: bytes are copied and nothing is computed.

    ``he`` and ``orion`` are (B, P, P, C) or (B, C, P, P) in the folder's dtypes. ``core`` (B,) int64 is the index of
    the core, ``geometry`` (B, 3) bool (flip rows, flip columns, transpose), ``colour`` (B, 8) float32 the drawn jitter
    (zeros: none).
    """

    he: torch.Tensor
    orion: torch.Tensor
    core: torch.Tensor
    geometry: torch.Tensor
    colour: torch.Tensor

    @classmethod
    def of(cls, buffers: dict[str, np.ndarray], described: tuple[np.ndarray, ...]) -> RawBatch:
        """The batch in the first rows of the buffers, without a copy; ``described`` is the result of ``describe``."""
        count = len(described[0])
        stored = [torch.from_numpy(buffers[modality][:count]) for modality in ("he", "orion")]
        return cls(*stored, *map(torch.from_numpy, described))


@dataclass(frozen=True)
class PatchPlace:
    """A crop: index of the core, upper left corner, and the augmentation drawn for it."""

    core: int
    y: int
    x: int
    geometry: tuple[bool, bool, bool] = (False, False, False)
    colour: tuple[float, ...] = (0.0,) * 8


def describe(places: list[PatchPlace]) -> tuple[np.ndarray, ...]:
    """The fields of a RawBatch other than the images: core, geometry, colour."""
    return (
        np.array([place.core for place in places], np.int64),
        np.array([place.geometry for place in places], bool).reshape(-1, 3),
        np.array([place.colour for place in places], np.float32).reshape(-1, 8),
    )


@dataclass(frozen=True)
class StoredFormat:
    """How batches of one modality are stored: dtype, axis order, and the value of full intensity."""

    dtype: np.dtype
    layout: str
    white: float


def stored_format(table: PairTable, scales: Scales, modality: str) -> StoredFormat:
    """The folder's own dtype and axis order; float32 in [0, 1] if its files have different dtypes."""
    rows = getattr(table, modality)
    dtypes = {np.dtype(text).newbyteorder("=") for text in set(rows["dtype"].tolist())}
    layout = str(rows["layout"][0])
    if len(dtypes) == 1:
        dtype = dtypes.pop()
        return StoredFormat(dtype, layout, scales.white(modality, dtype))
    return StoredFormat(np.dtype(np.float32), layout, 1.0)


class PatchReader:
    """Copies patches of a PairTable. Picklable: each process opens its own files.

    Of tiles, at most ``cache_bytes`` of those decoded last are kept, and only tiles of kept channels are decoded:
    other channels of their batches are undefined. Where panels differ, channels that were not measured are 0.
    """

    def __init__(self, table: PairTable, scales: Scales, patch_size: int, cache_bytes: int = CACHE_BYTES) -> None:
        self.table = table
        self.cache = TileCache(cache_bytes)
        self.from_disk = not fits_page_cache(table.nbytes)
        self.scales = scales
        self.patch_size = patch_size
        self.formats = {modality: stored_format(table, scales, modality) for modality in ("he", "orion")}
        self._maps: OrderedDict[tuple[str, int], tuple[Stored, Stored]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        # Pickling a memory map copies the whole file.
        return {**self.__dict__, "_maps": OrderedDict(), "cache": TileCache(self.cache.limit)}

    def _map(self, modality: str, core: int, opened: Stored | None = None) -> tuple[Stored, Stored]:
        """The memory map of a core, and the same as a plain array, which is far cheaper to slice; or its tiles.

        ``opened`` is what to keep where the core is not open yet."""
        key = (modality, core)
        found = self._maps.get(key)
        if found is None:
            stored = self.table.open(core, modality, self.cache) if opened is None else opened
            if self.from_disk:
                stored.tiles.expect_single_tiles() if isinstance(stored, TiledArray) else expect_single_rows(stored)
            found = self._maps[key] = (stored, stored if isinstance(stored, TiledArray) else np.asarray(stored))
            if len(self._maps) > (OPEN_OBJECTS if is_remote(self.table.folder) else OPEN_MAPS):
                self._maps.popitem(last=False)
        else:
            self._maps.move_to_end(key)
        return found

    def _ask_for(self, modality: str, places: list[PatchPlace]) -> None:
        """If the set is too large to stay in memory, request all patches of a batch from the disk at once."""
        if self.from_disk:
            for place in places:
                stored = self._map(modality, place.core)[0]
                if isinstance(stored, np.memmap):
                    ask_for(stored, self.crop(modality, place.core, place.y, place.x))

    def crop(self, modality: str, core: int, y: int, x: int) -> np.ndarray:
        """One patch in the axis order of the batch: a view of the memory map, or decoded with all its channels."""
        stored = self._map(modality, core)[1]
        size = self.patch_size
        layout = getattr(self.table, modality)[core]["layout"]
        if layout == "hwc":
            patch = stored[y : y + size, x : x + size]
        else:
            patch = stored[:, y : y + size, x : x + size]
        wanted = self.formats[modality].layout
        if layout == wanted:
            return patch
        return patch.transpose(2, 0, 1) if wanted == "chw" else patch.transpose(1, 2, 0)

    def batch_shape(self, modality: str, count: int) -> tuple[int, int, int, int]:
        """Shape of a stored batch of ``count`` patches."""
        channels = 3 if modality == "he" else len(self.table.channel_names)
        size = self.patch_size
        return (
            (count, size, size, channels) if self.formats[modality].layout == "hwc" else (count, channels, size, size)
        )

    def read(self, places: list[PatchPlace]) -> RawBatch:
        """Copy a whole batch into new memory."""
        buffers = {
            modality: np.empty(self.batch_shape(modality, len(places)), stored.dtype)
            for modality, stored in self.formats.items()
        }
        self.fill(places, buffers)
        return RawBatch.of(buffers, describe(places))

    def fill(self, places: list[PatchPlace], buffers: dict[str, np.ndarray]) -> None:
        """Copy the patches into the first rows of the buffer of each modality."""
        if is_remote(self.table.folder):
            self._fetch(places)
        for modality in buffers:
            self._ask_for(modality, places)
        for modality, target in buffers.items():
            form = self.formats[modality]
            for row, place in enumerate(places):
                stored = self._map(modality, place.core)[1]
                white = self.scales.white(modality, stored.dtype)
                if modality == "orion" and self.table.panels is not None:
                    self._fill_measured(place, target[row], white)
                    continue
                if white == form.white and isinstance(stored, TiledArray):
                    channels = self.table.kept_channels if modality == "orion" else None
                    out = target[row] if form.layout == "hwc" else target[row].transpose(1, 2, 0)
                    stored.read(place.y, place.x, self.patch_size, self.patch_size, channels, out)
                    continue
                patch = self.crop(modality, place.core, place.y, place.x)
                if white == form.white:
                    target[row] = patch
                else:
                    np.divide(patch, np.float32(white), out=target[row])

    def _fetch(self, places: list[PatchPlace]) -> None:
        """Fetch the tiles of a batch from object storage at the same time, as far as half of the cache has room."""
        keys = dict.fromkeys((modality, place.core) for place in places for modality in self.formats)
        new = [key for key in keys if key not in self._maps]
        opened = image_pool().map(lambda key: self.table.open(key[1], key[0], self.cache), new)
        for key, stored in zip(new, opened, strict=True):
            self._map(*key, stored)
        room = self.cache.limit // 2
        wanted: dict[tuple[str, int], dict[Place, None]] = {key: {} for key in keys}
        for place in places:
            of_place = {}
            for modality in self.formats:
                tiles = self._tiles(modality, place.core)
                box = (place.y, place.x, self.patch_size, self.patch_size)
                lacking = tiles.lacking(*box, self._channels(modality, place.core))
                of_place[modality, place.core] = [tile for tile in lacking if tile not in wanted[modality, place.core]]
                room -= len(of_place[modality, place.core]) * tiles.tiles.nbytes
            if room < 0:
                # What does not fit is fetched when it is read.
                break
            for key, found in of_place.items():
                wanted[key] |= dict.fromkeys(found)
        jobs = [(self._tiles(*key), list(of_image)) for key, of_image in wanted.items() if of_image]
        fetched = image_pool().map(lambda job: job[0].tiles.fetched(job[1]), jobs)
        for (tiles, _), decoded in zip(jobs, fetched, strict=True):
            tiles.keep(decoded)

    def _tiles(self, modality: str, core: int) -> TiledArray:
        """An image of which is known that it is tiled."""
        stored = self._map(modality, core)[1]
        assert isinstance(stored, TiledArray)
        return stored

    def _channels(self, modality: str, core: int) -> list[int]:
        """Channels of a core's file that are read."""
        if modality == "he":
            return [0, 1, 2]
        places = self.table.places(core)
        return [int(places[channel]) for channel in self.table.kept_channels if places[channel] >= 0]

    def _fill_measured(self, place: PatchPlace, target: np.ndarray, white: float) -> None:
        """Copy the markers of one patch to their places among those of all panels; the others become 0."""
        form, size = self.formats["orion"], self.patch_size
        out = target if form.layout == "hwc" else target.transpose(1, 2, 0)
        places = self.table.places(place.core)
        wanted = np.array([channel for channel in self.table.kept_channels if places[channel] >= 0], int)
        stored = self._map("orion", place.core)[1]
        if isinstance(stored, TiledArray):
            patch = stored.read(place.y, place.x, size, size, places[wanted].tolist())
        else:
            patch = self.crop("orion", place.core, place.y, place.x)
            patch = (patch if form.layout == "hwc" else patch.transpose(1, 2, 0))[..., places[wanted]]
        out[...] = 0
        out[..., wanted] = patch if white == form.white else patch / np.float32(white)

    def tissue_fraction(self, core: int, y: int, x: int) -> float:
        """Share in [0, 1] of a patch that is not blank glass, estimated on a coarse grid of pixels."""
        self._ask_for("he", [PatchPlace(core, y, x)])
        patch = self.crop("he", core, y, x)
        white = self.scales.white("he", patch.dtype)
        return tissue_fraction(patch, self.formats["he"].layout, white)


def draw_training_patch(reader: PatchReader, core: int, seed: int, epoch: int, index: int, augment: bool) -> PatchPlace:
    """The training sample of (seed, epoch, index): a random crop that prefers tissue, and its augmentation."""
    rng = counter_rng(seed, SAMPLE, epoch, index)
    # Draw the augmentation first, so that it does not depend on the number of crops tried.
    flips = rng.random(3) < 0.5
    colour = rng.uniform(-1.0, 1.0, 8)
    size = reader.table.he[core]
    rows = int(size["height"]) - reader.patch_size + 1
    columns = int(size["width"]) - reader.patch_size + 1
    corners = (rng.random((TISSUE_TRIES, 2)) * (rows, columns)).astype(int)
    best, best_fraction = 0, -1.0
    for attempt, (y, x) in enumerate(corners.tolist()):
        fraction = reader.tissue_fraction(core, y, x)
        if fraction > best_fraction:
            best, best_fraction = attempt, fraction
        if fraction >= TISSUE_FRACTION:
            break
    y, x = corners[best].tolist()
    if not augment:
        return PatchPlace(core, y, x)
    return PatchPlace(core, y, x, (bool(flips[0]), bool(flips[1]), bool(flips[2])), tuple(colour.tolist()))


def grid_starts(length: int, patch_size: int, stride: int) -> list[int]:
    """Starts of patches along one axis: every ``stride`` pixels, and one flush with the end so that it is covered."""
    starts = list(range(0, length - patch_size + 1, stride))
    if starts[-1] + patch_size < length:
        starts.append(length - patch_size)
    return starts


def validation_patches(reader: PatchReader, cores: np.ndarray, options: DataOptions, seed: int) -> np.ndarray:
    """The validation patches, the same in every epoch, as rows (core, y, x): (N, 3).

    The whole grid of every core if ``patches_per_image_val`` is 0, else that many patches per core, drawn from its grid
    in an order that depends on the seed only; patches with tissue come first.
    """
    stride = options.grid_stride or options.patch_size
    rows: list[tuple[int, int, int]] = []
    for core in cores.tolist():
        size = reader.table.he[core]
        ys = grid_starts(int(size["height"]), options.patch_size, stride)
        xs = grid_starts(int(size["width"]), options.patch_size, stride)
        grid = [(core, y, x) for y in ys for x in xs]
        wanted = options.patches_per_image_val
        if 0 < wanted < len(grid):
            order = counter_rng(seed, VALIDATION, core).permutation(len(grid)).tolist()
            chosen: list[int] = []
            blank: list[int] = []
            for index in order:
                shows_tissue = reader.tissue_fraction(*grid[index]) >= TISSUE_FRACTION
                (chosen if shows_tissue else blank).append(index)
                if len(chosen) == wanted:
                    break
            grid = [grid[index] for index in sorted((chosen + blank)[:wanted])]
        rows += grid
    return np.array(rows, dtype=np.int32).reshape(-1, 3)
