"""Opens one image of a pair, OME-TIFF or OME-Zarr, at a level of its pyramid: what it is, and its tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from orion_unet.errors import InputError
from orion_unet.extras import needed
from orion_unet.slides.marker_tiff import contiguous_shape, marker_names, marker_planes
from orion_unet.slides.marker_zarr import zarr_image, zarr_tiles
from orion_unet.slides.pixel_size import PixelSize
from orion_unet.slides.remote import check_openable, is_remote
from orion_unet.slides.tiff import blank_glass, he_planes, mapped_array, parsed_tiff, smaller_levels, tiff_pixel_size
from orion_unet.slides.tiff_tiles import TiffTiles
from orion_unet.slides.tiles import Tiles

TIFF_SUFFIXES = (".ome.tif", ".ome.tiff", ".tif", ".tiff")
ZARR_SUFFIXES = (".ome.zarr", ".zarr")
TILED_SUFFIXES = TIFF_SUFFIXES + ZARR_SUFFIXES


@dataclass(frozen=True)
class StoredImage:
    """How one level of an image is stored.

    ``shape`` is (H, W, C), and the pixels are in the axis order ``layout``. ``offset`` is where they begin in the file
    if they are stored there plainly and in one piece, and -1 if they are tiles. ``striped``: the tiles are strips, as
    wide as the image. A pixel is ``factor`` pixels of level 0 wide, and ``pixel_size_um`` micrometres, None if unknown.
    """

    dtype: str
    layout: str
    shape: tuple[int, int, int]
    offset: int
    striped: bool
    factor: float
    names: tuple[str, ...]
    pixel_size_um: float | None


def require_tiled_readers(names: Sequence[str]) -> None:
    """Raise InputError if a package that one of these files needs is missing."""
    if any(name.endswith(TIFF_SUFFIXES) for name in names):
        needed("tifffile")
        # Without it, tifffile reads only some compressions; the others would look damaged.
        needed("imagecodecs")
    if any(name.endswith(ZARR_SUFFIXES) for name in names):
        needed("zarr")


def stored_image(path: Path, modality: str, level: int) -> StoredImage:
    """What a level of an image is; modality is ``he`` or ``orion``.

    Raises InputError if the file is damaged, of another kind, or has no such level.
    """
    return _opened(path, modality, level)[0]


def open_tiles(path: Path, modality: str, level: int) -> Tiles:
    """The tiles of a level; raises InputError like ``stored_image``, and for pixels that are no tiles."""
    tiles = find_tiles(path, modality, level)
    if tiles is None:
        raise InputError(f"{path}: was changed; its pixels were tiles, and are stored in one piece now")
    return tiles


def find_tiles(path: Path, modality: str, level: int) -> Tiles | None:
    """The tiles of a level, None if its pixels are stored plainly and in one piece; raises like ``stored_image``."""
    return _opened(path, modality, level)[1]


def _opened(path: Path, modality: str, level: int) -> tuple[StoredImage, Tiles | None]:
    if path.name.endswith(ZARR_SUFFIXES):
        # That of a store is listed when it is opened.
        if not is_remote(path) and not path.is_dir():
            raise InputError(f"{path}: cannot be read (no such folder)")
        return _zarr(path, modality, level)
    if not is_remote(path):
        check_openable(path)

    def use(path: Path, tiff: Any, series: Any) -> tuple[StoredImage, Tiles | None]:
        found = _tiff(path, tiff, series, modality, level)
        tiff.close()
        return found

    return parsed_tiff(path, use)


def _tiff(path: Path, tiff: Any, series: Any, modality: str, level: int) -> tuple[StoredImage, Tiles | None]:
    planes = he_planes(path, series) if modality == "he" else marker_planes(path, series)
    names = () if modality == "he" else tuple(marker_names(tiff, planes))
    pixel_size = tiff_pixel_size(tiff, planes[0].keyframe)
    full = int(planes[0].keyframe.imagelength)
    # Later pages are looked at only where they may be wanted.
    levels = [planes, *(smaller_levels(tiff, series, len(planes)) if level else ())]
    planes = _chosen(path, levels, level)
    layout, shape = contiguous_shape(planes)
    page = planes[0].keyframe
    dtype, tiles, offset, striped = np.dtype(page.dtype), None, -1, False
    in_one_piece = series.dataoffset is not None and not is_remote(path)
    if in_one_piece and level == 0 and (modality != "he" or 3 in (len(planes), page.samplesperpixel)):
        mapped_array(path, tiff, series, shape)
        dtype, offset = dtype.newbyteorder(tiff.byteorder), int(series.dataoffset)
    else:
        tiles = TiffTiles(path, tiff, planes, blank_glass(planes) if modality == "he" else 0, level)
        for plane in planes:
            # What decodes the tiles keeps the pages.
            plane.dataoffsets = plane.databytecounts = ()
        striped = tiles.striped
    height, width, channels = shape if layout == "hwc" else (shape[1], shape[2], shape[0])
    size = (height, width, 3 if modality == "he" else channels)
    factor = full / height
    return StoredImage(dtype.str, layout, size, offset, striped, factor, names, _scaled(pixel_size, factor)), tiles


def _zarr(path: Path, modality: str, level: int) -> tuple[StoredImage, Tiles]:
    image = zarr_image(path)
    tiles = zarr_tiles(path, image, _chosen(path, list(range(len(image.arrays))), level))
    if modality == "he" and tiles.channels != 3:
        raise InputError(f"{path}: has {tiles.channels} channels; an H&E has the three channels red, green, blue")
    layout = "hwc" if tiles.channels_last else "chw"
    factor = image.arrays[0].shape[image.axes.index("y")] / tiles.shape[0]
    names = () if modality == "he" else tuple(image.names)
    size = (*tiles.shape, tiles.channels)
    return StoredImage(
        tiles.dtype.str, layout, size, -1, False, factor, names, _scaled(image.pixel_size, factor)
    ), tiles


def _chosen(path: Path, levels: list[Any], level: int) -> Any:
    if level >= len(levels):
        has = "it has level 0 only" if len(levels) == 1 else f"its levels are 0 to {len(levels) - 1}"
        raise InputError(f"{path}: has no level {level}; {has}: choose another --level")
    return levels[level]


def _scaled(pixel_size: PixelSize, factor: float) -> float | None:
    return None if pixel_size.um is None else pixel_size.um * factor
