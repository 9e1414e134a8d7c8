"""Reads whole slides in scanners' own formats (NDPI, MRXS, SCN and others) with OpenSlide."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from orion_unet.distributed import usable_cores
from orion_unet.errors import InputError
from orion_unet.slides.images import HeImage
from orion_unet.slides.pixel_size import UNKNOWN_PIXEL_SIZE, positive, square_pixel
from orion_unet.slides.tiff import LOOSE

# Decoded tiles that OpenSlide keeps for the next region. OpenSlide returns four bytes a pixel, so wide regions are read
# in pieces.
CACHE_BYTES, LARGEST_WIDTH = 1 << 27, 4096


class WholeSlide(HeImage):
    """A level of a slide, cropped to the part that was scanned; gaps inside it are white.

    QuPath crops to the same bounds, so that predictions match the image pixel by pixel.
    """

    is_slide = True

    def __init__(self, path: Path, slide: Any, level: int = 0) -> None:
        self._slide, self._level = slide, level
        # Level 0 by definition; libraries round the others.
        self._factor = float(slide.level_downsamples[level]) if level else 1.0
        properties = slide.properties
        width, height = slide.dimensions
        bounds = [properties.get(f"openslide.bounds-{side}") for side in ("x", "y", "width", "height")]
        left, top, width, height = (
            int(found or otherwise) for found, otherwise in zip(bounds, (0, 0, width, height), strict=True)
        )
        self._origin = (left, top)
        sides_um = (positive(properties.get(f"openslide.mpp-{axis}")) for axis in "xy")
        shape = (max(1, int(height / self._factor)), max(1, int(width / self._factor)))
        super().__init__(path, shape, 255.0, UNKNOWN_PIXEL_SIZE if level else square_pixel(*sides_um))
        self._decoders = ThreadPoolExecutor(max_workers=min(8, usable_cores()))
        self._opened: list[WholeSlide] = []

    def nearest_level(self, factor: float) -> HeImage:
        for level in reversed(range(1, self._slide.level_count)):
            if self._slide.level_downsamples[level] <= factor * LOOSE:
                self._opened.append(WholeSlide(self.path, self._slide, level))
                return self._opened[-1]
        return self

    def stored(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        region = np.empty((height, width, 3), np.uint8)
        if region.size:
            list(self._decoders.map(lambda left: self._fill(region, y, x, left), range(0, width, LARGEST_WIDTH)))
        return region

    def _fill(self, region: np.ndarray, y: int, x: int, left: int) -> None:
        piece = region[:, left : left + LARGEST_WIDTH]
        # OpenSlide takes the corner in pixels of level 0.
        corner = (self._origin[0] + round((x + left) * self._factor), self._origin[1] + round(y * self._factor))
        try:
            pixels = np.asarray(self._slide.read_region(corner, self._level, (piece.shape[1], piece.shape[0])))
        except Exception as error:
            raise InputError(
                f"{self.path}: is damaged at level {self._level}, rows {y} to {y + piece.shape[0]}, columns "
                f"{x + left} to {x + left + piece.shape[1]} ({error})"
            ) from None
        opacity = pixels[..., 3:].astype(np.uint16)
        piece[:] = (pixels[..., :3] * opacity + 255 * (255 - opacity)) // 255

    def close(self) -> None:
        for image in (self, *self._opened):
            image._decoders.shutdown()
        self._slide.close()


def open_whole_slide(path: Path) -> HeImage:
    """Open a slide at full resolution; raises InputError if it is damaged or OpenSlide cannot read it."""
    import openslide

    try:
        slide = openslide.OpenSlide(path)
    except Exception as error:
        raise InputError(f"{path}: cannot be read by OpenSlide ({error})") from None
    try:
        # Libraries before OpenSlide 4 have no cache of a chosen size.
        with suppress(openslide.OpenSlideVersionError):
            slide.set_cache(openslide.OpenSlideCache(CACHE_BYTES))
        return WholeSlide(path, slide)
    except Exception as error:
        slide.close()
        raise InputError(f"{path}: is damaged ({error})") from None
