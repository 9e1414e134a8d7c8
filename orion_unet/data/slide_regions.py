"""Pairs that are regions of slides: a small file says where a region lies, and its pixels come from the slide.

``NAME_ORION.region.json`` names a rectangle of the marker image and the channels that are kept. ``NAME_HE.region.json``
says how the H&E lies on it, and every crop is moved there when it is read. Both name their slide.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from orion_unet.data.slide_files import BAND, SlideFile, SlideImage, open_slide, slide_file
from orion_unet.errors import InputError
from orion_unet.registration.fine import LARGEST_DISPLACEMENT
from orion_unet.registration.transform import Affine, Field, grid_points, move, within
from orion_unet.run_log import open_regular, parse_object, write_json
from orion_unet.slides.remote import is_remote
from orion_unet.slides.stored import StoredImage
from orion_unet.slides.tiles import OWN_CACHE_BYTES, Place, TileCache, TiledArray, Tiles

REGION_SUFFIX = ".region.json"
SCHEMA = 1
# A larger file is no region [bytes].
LARGEST_FILE = 1 << 26
# Scales of an H&E against its markers, and numbers of channels, beyond which a file is damaged.
LARGEST_SCALE, MOST_CHANNELS = 64.0, 4096
# How far beyond the centres of the outermost pixels of the H&E a corner may lie [pixels].
CORNER = 1.0

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class SlideRegion:
    """What a region file says.

    ``place`` (y, x, height, width) is in pixels of the marker image. Of markers, ``channels`` are the places of the
    kept ones in the slide, and ``names`` are theirs. Of an H&E, ``affine`` takes points of the marker image, counted
    from its pixel ``origin`` (y, x), to points of the H&E, after the displacements of ``field`` were added.
    """

    slide: str
    place: Box
    pixel_size_um: float | None
    channels: tuple[int, ...] = ()
    names: tuple[str, ...] = ()
    origin: tuple[int, int] = (0, 0)
    affine: Affine | None = None
    field: Field | None = None

    @property
    def part(self) -> Box:
        """The place, counted from the origin."""
        y, x, height, width = self.place
        return y - self.origin[0], x - self.origin[1], height, width

    def document(self) -> dict[str, Any]:
        """Content of the file."""
        common = {"schema": SCHEMA, "slide": self.slide, "pixel_size_um": self.pixel_size_um, "place": self.place}
        if self.affine is None:
            return {**common, "channels": self.channels, "names": self.names}
        field = self.field
        nodes = field and {"first": field.first, "step": field.step, "nodes": field.nodes.tolist()}
        return {**common, "origin": self.origin, "affine": self.affine.matrix.tolist(), "field": nodes}


def write_region(path: Path, region: SlideRegion) -> None:
    """Write a region file; it appears under its name only when it is complete. Raises OSError."""
    write_json(path, region.document())


def slide_behind(path: Path) -> SlideFile:
    """The image with the pixels of a region; raises InputError if the region file cannot be used."""
    document = _document(path)
    modality = "he" if "affine" in document else "orion"
    return slide_file(path.parent, str(document.get("slide")), modality)


def _document(path: Path) -> dict[str, Any]:
    try:
        if is_remote(path):
            document = parse_object(path.read_bytes())
        else:
            with open_regular(path) as file:
                document = parse_object(file.read(LARGEST_FILE))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    if document is None:
        raise InputError(f"{path}: is damaged, it is not JSON; prepare it again")
    if document.get("schema") != SCHEMA:
        raise InputError(
            f"{path}: says schema {str(document.get('schema'))[:20]}, known is {SCHEMA}; update the toolkit, or "
            "prepare it again"
        )
    return document


def read_region(path: Path, modality: str) -> SlideRegion:
    """Read a region file, of modality ``he`` or ``orion``; raises InputError if it cannot be used."""
    document = _document(path)
    try:
        return (_he if modality == "he" else _markers)(document)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        reason = f"has no {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{path}: is damaged: {reason}; prepare it again") from None


def _common(document: dict[str, Any]) -> tuple[str, Box, float | None]:
    slide, size = document["slide"], document["pixel_size_um"]
    y, x, height, width = _whole(document["place"], "place", 4)
    if not isinstance(slide, str) or not slide:
        raise ValueError("slide is no name")
    if min(y, x) < 0 or min(height, width) < 1:
        raise ValueError(f"place {[y, x, height, width]} is no rectangle")
    return slide, (y, x, height, width), None if size is None else float(_numbers(size, "pixel_size_um", ()))


def _markers(document: dict[str, Any]) -> SlideRegion:
    channels, names = _whole(document["channels"], "channels"), document["names"]
    if not channels or min(channels) < 0 or max(channels) >= MOST_CHANNELS:
        raise ValueError(f"channels are {list(channels[:8])}")
    if not isinstance(names, list) or len(names) != len(channels) or not all(isinstance(name, str) for name in names):
        raise ValueError("names are not one for each channel")
    return SlideRegion(*_common(document), channels, tuple(names))


def _he(document: dict[str, Any]) -> SlideRegion:
    y, x = _whole(document["origin"], "origin", 2)
    affine = Affine(_numbers(document["affine"], "affine", (2, 3)))
    if not 1 / LARGEST_SCALE <= affine.scale <= LARGEST_SCALE:
        raise ValueError(f"affine scales by {affine.scale:g}")
    stored, field = document["field"], None
    if stored is not None:
        first, step = (float(_numbers(stored[name], name, ())) for name in ("first", "step"))
        field = Field(_numbers(stored["nodes"], "nodes", (None, None, 2)), first, step)
        if step <= 0:
            raise ValueError(f"step is {step:g}")
        if field.largest > LARGEST_DISPLACEMENT * (1 + 1e-9):
            raise ValueError(f"field moves by {field.largest:g} pixels, {LARGEST_DISPLACEMENT:g} is the most")
    return SlideRegion(*_common(document), origin=(y, x), affine=affine, field=field)


def _whole(value: Any, name: str, length: int | None = None) -> tuple[int, ...]:
    """Whole numbers, so many if ``length`` is given."""
    if not isinstance(value, list) or length not in (None, len(value)):
        raise ValueError(f"{name} is no list of {'' if length is None else f'{length} '}numbers")
    if any(isinstance(each, bool) or not isinstance(each, int) or abs(each) > 1 << 40 for each in value):
        raise ValueError(f"{name} has something else than whole numbers")
    return tuple(value)


def _numbers(value: Any, name: str, shape: tuple[int | None, ...]) -> np.ndarray:
    """Finite numbers of a shape, in which None is any length."""
    try:
        found = np.array(value)
    except ValueError:
        # Rows of different lengths.
        found = np.array(None)
    fits = found.ndim == len(shape) and found.size and found.dtype.kind in "if" and np.isfinite(found).all()
    if not fits or any(wanted not in (None, side) for wanted, side in zip(shape, found.shape, strict=True)):
        raise ValueError(f"{name} is not made of finite numbers, as many as it needs")
    return found.astype(np.float64)


def region_image(path: Path, modality: str, level: int) -> StoredImage:
    """What the image of a region file is.

    Raises InputError if the file or its slide cannot be used, or if they do not fit each other.
    """
    if level:
        raise InputError(f"{path}: has no level {level}; a region of a slide is read at its own level: use --level 0")
    region, slide = _opened(path, modality)
    layout, channels = ("hwc", 3) if modality == "he" else ("chw", len(region.channels))
    shape = (*region.place[2:], channels)
    dtype = slide.dtype.newbyteorder("=").str
    return StoredImage(dtype, layout, shape, -1, slide.striped, 1.0, region.names, region.pixel_size_um)


def open_region(path: Path, modality: str, cache: TileCache | None = None, owner: Hashable = None) -> TiledArray:
    """The pixels of a region file, which read like those of a tiled image; raises InputError like ``region_image``.

    Decoded tiles of the slide are kept in ``cache``, as are the last crops of an H&E, known there as ``owner``.
    """
    kind = _HeRegion if modality == "he" else _MarkerRegion
    return kind(path, *_opened(path, modality), cache or TileCache(OWN_CACHE_BYTES), owner)


def _opened(path: Path, modality: str) -> tuple[SlideRegion, SlideImage]:
    """A region file and its slide, which fit each other."""
    region = read_region(path, modality)
    file = slide_file(path.parent, region.slide, modality)
    slide = open_slide(file, modality)
    has = f"{file.path} has {slide.shape[0]} x {slide.shape[1]} pixels"
    reason = ""
    if region.affine is not None:
        y, x, height, width = region.part
        ends = np.array([y, y + height - 1], np.float64), np.array([x, x + width - 1], np.float64)
        if not within(grid_points(region.affine, region.field, *ends), slide.shape, CORNER).all():
            reason = f"its transform leads beyond the H&E of slide {region.slide}: {has}"
    else:
        y, x, height, width = region.place
        if y + height > slide.shape[0] or x + width > slide.shape[1]:
            reason = f"its place {list(region.place)} reaches beyond slide {region.slide}: {has}"
        elif max(region.channels) >= slide.channels:
            reason = f"has channel {max(region.channels)}, but {file.path} has {slide.channels} channels, from 0"
    if reason:
        raise InputError(f"{path}: {reason}; correct {file.listed}, or prepare the pairs again")
    return region, slide


class _Window(Tiles):
    """A region as if it were an image of its own."""

    def __init__(
        self, path: Path, region: SlideRegion, slide: SlideImage, channels: int, side: tuple[int, int]
    ) -> None:
        super().__init__(path, 0, 0)
        self.shape, self.channels, self.dtype = region.place[2:], channels, slide.dtype.newbyteorder("=")
        self.side, self.depth = side, channels
        self._slide = slide

    def tile(self, place: Place) -> np.ndarray | None:
        raise TypeError("the tiles are those of the slide, which reads them")

    def expect_single_tiles(self) -> None:
        if self._slide.tiles is not None:
            self._slide.tiles.expect_single_tiles()


class _Moved(_Window):
    """An H&E whose tiles are any boxes (y, x, height, width), each moved onto the markers at once."""

    def __init__(self, path: Path, region: SlideRegion, slide: SlideImage, cache: TileCache) -> None:
        super().__init__(path, region, slide, 3, (BAND, region.place[3]))
        self._region, self._cache = region, cache

    def tile(self, place: Place) -> np.ndarray:
        region, slide = self._region, self._slide
        assert region.affine is not None
        (top, left, *_), (y, x, height, width) = region.part, place

        def read(y: int, x: int, height: int, width: int) -> np.ndarray:
            return slide.read(y, x, height, width, (0, 1, 2), self._cache)

        return move(read, slide.shape, region.affine, region.field, (top + y, left + x, height, width))[0]


class _RegionArray(TiledArray, ABC):
    """A region that reads like tiles, whatever boxes it is made of."""

    def read(
        self,
        y: int,
        x: int,
        height: int,
        width: int,
        channels: Sequence[int] | None = None,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        chosen = list(range(self.channels) if channels is None else channels)
        pixels = self._pixels((y, x, height, width), chosen)
        if out is None:
            return pixels
        out[..., slice(None) if len(chosen) == out.shape[2] else chosen] = pixels
        return out

    @abstractmethod
    def _pixels(self, box: Box, channels: list[int]) -> np.ndarray:
        """A box (h, w, len(channels)) in memory of its own."""

    def channels_last(self) -> TiledArray:
        found = copy.copy(self)
        found.layout = "hwc"
        return found


class _HeRegion(_RegionArray):
    def __init__(self, path: Path, region: SlideRegion, slide: SlideImage, cache: TileCache, owner: Hashable) -> None:
        super().__init__(_Moved(path, region, slide, cache), "hwc", 3, cache, owner)

    def _pixels(self, box: Box, channels: list[int]) -> np.ndarray:
        # A training crop is read twice: to see whether it shows tissue, and for its batch.
        moved = self._cache.get(self._owner, self.tiles, box)
        assert moved is not None
        return moved[..., channels]


class _MarkerRegion(_RegionArray):
    def __init__(self, path: Path, region: SlideRegion, slide: SlideImage, cache: TileCache, owner: Hashable) -> None:
        window = _Window(path, region, slide, len(region.channels), slide.side)
        # Bands of rows begin where tiles of the slide do.
        super().__init__(window, "chw", None, cache, owner, region.place[0] % slide.side[0])
        self._region, self._slide = region, slide

    def _pixels(self, box: Box, channels: list[int]) -> np.ndarray:
        (top, left, *_), (y, x, height, width) = self._region.place, box
        stored = [self._region.channels[channel] for channel in channels]
        return self._slide.read(top + y, left + x, height, width, stored, self._cache)
