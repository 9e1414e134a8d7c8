"""Reads the markers of a TIFF or OME-TIFF: a page per channel or one page of many samples, tiled or striped."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from orion_unet.errors import InputError
from orion_unet.slides.markers import ArrayMarkers, MarkerImage
from orion_unet.slides.pixel_size import UNKNOWN_PIXEL_SIZE, PixelSize
from orion_unet.slides.remote import is_remote
from orion_unet.slides.segments import Segments
from orion_unet.slides.tiff import LOOSE, mapped_array, parsed_tiff, smaller_levels, tiff_pixel_size
from orion_unet.slides.tiff_tiles import TiffTiles


class TiffMarkers(MarkerImage):
    """One level of a TIFF whose channels are pages, or samples of one page."""

    def __init__(
        self,
        path: Path,
        tiff: Any,
        planes: list[Any],
        names: Sequence[str] = (),
        pixel_size: PixelSize = UNKNOWN_PIXEL_SIZE,
        levels: Sequence[list[Any]] = (),
        level: int = 0,
    ) -> None:
        tiles = TiffTiles(path, tiff, planes, 0, level)
        self._segments = Segments(tiles)
        super().__init__(path, (tiles.channels, *tiles.shape), tiles.dtype, names, pixel_size)
        self._tiff, self._levels = tiff, levels
        self._opened: list[Segments] = []

    def read(self, channels: Sequence[int], y: int, x: int, height: int, width: int) -> np.ndarray:
        return np.ascontiguousarray(self._segments.read(channels, y, x, height, width).transpose(2, 0, 1), self.dtype)

    def nearest_level(self, factor: float) -> MarkerImage:
        for number, planes in reversed(list(enumerate(self._levels, 1))):
            if self.shape[1] / planes[0].keyframe.imagelength <= factor * LOOSE:
                with suppress(InputError):
                    level = TiffMarkers(self.path, self._tiff, planes, level=number)
                    self._opened.append(level._segments)
                    return level
        return self

    def close(self) -> None:
        for segments in (self._segments, *self._opened):
            segments.close()
        self._tiff.close()


def open_marker_tiff(path: Path) -> MarkerImage:
    """Open the markers of a TIFF at full resolution; raises InputError if it is damaged or a stack of another kind."""
    return parsed_tiff(path, _open)


def _open(path: Path, tiff: Any, series: Any) -> MarkerImage:
    page, planes = series.keyframe, marker_planes(path, series)
    names = marker_names(tiff, planes)
    pixel_size = tiff_pixel_size(tiff, page)
    levels = smaller_levels(tiff, series, len(planes))
    if series.dataoffset is not None and not levels and not is_remote(path):
        layout, shape = contiguous_shape(planes)
        opener = mapped_array(path, tiff, series, shape)
        tiff.close()
        return ArrayMarkers(path, opener, layout, names, pixel_size)
    return TiffMarkers(path, tiff, planes, names, pixel_size, levels)


def marker_planes(path: Path, series: Any) -> list[Any]:
    """A page per channel, or one page of all channels; raises InputError if it is a stack of another kind."""
    planes = list(series.pages)
    page = series.keyframe
    if page.imagedepth > 1 or None in planes or (len(planes) > 1 and page.samplesperpixel > 1):
        raise InputError(f"{path}: is a stack of shape {series.shape} ({series.axes}), not one image of markers")
    # Axes other than these would be time points, or depths, taken for markers.
    stacked = [axis for axis, side in zip(series.axes, series.shape, strict=True) if axis in "TZ" and side > 1]
    if stacked and (len(stacked) > 1 or "C" in series.axes):
        raise InputError(f"{path}: has axes {series.axes} of shape {series.shape}; markers are one plane per channel")
    return planes


def contiguous_shape(planes: list[Any]) -> tuple[str, tuple[int, int, int]]:
    """Axis order and shape of pixels that are stored in one piece."""
    page = planes[0].keyframe
    count = len(planes) if len(planes) > 1 else int(page.samplesperpixel)
    size = (int(page.imagelength), int(page.imagewidth))
    if len(planes) > 1 or page.planarconfig == 2 or page.samplesperpixel == 1:
        return "chw", (count, *size)
    return "hwc", (*size, count)


def marker_names(tiff: Any, planes: list[Any]) -> list[str]:
    """Names of the channels in the OME-XML; empty where they are not those of the planes."""
    names = _ome_channel_names(tiff.ome_metadata) if tiff.is_ome else []
    count = len(planes) if len(planes) > 1 else int(planes[0].keyframe.samplesperpixel)
    return names if len(names) == count else []


def _ome_channel_names(xml: str | None) -> list[str]:
    """The names of the channels of the first image; empty if one is missing or occurs twice."""
    try:
        root = ElementTree.fromstring(xml or "")
    except ElementTree.ParseError:
        return []
    image = next((element for element in root.iter() if element.tag.rpartition("}")[2] == "Image"), None)
    if image is None:
        return []
    channels = [element for element in image.iter() if element.tag.rpartition("}")[2] == "Channel"]
    names = [(channel.get("Name") or "").strip() for channel in channels]
    return names if all(names) and len(set(names)) == len(names) else []
