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
from orion_unet.slides.pixel_size import positive, square_pixel

# Decoded tiles that OpenSlide keeps for the next region. OpenSlide returns four bytes a pixel, so wide regions are read
# in pieces.
CACHE_BYTES, LARGEST_WIDTH = 1 << 27, 4096


class WholeSlide(HeImage):
    """Level 0 of a slide, cropped to the part that was scanned; gaps inside it are white.

    QuPath crops to the same bounds, so that predictions match the image pixel by pixel.
    """

    is_slide = True

    def __init__(self, path: Path, slide: Any) -> None:
        self._slide = slide
        properties = slide.properties
        width, height = slide.dimensions
        bounds = [properties.get(f"openslide.bounds-{side}") for side in ("x", "y", "width", "height")]
        left, top, width, height = (
            int(found or otherwise) for found, otherwise in zip(bounds, (0, 0, width, height), strict=True)
        )
        self._origin = (left, top)
        sides_um = (positive(properties.get(f"openslide.mpp-{axis}")) for axis in "xy")
        super().__init__(path, (height, width), 255.0, square_pixel(*sides_um))
        self._decoders = ThreadPoolExecutor(max_workers=min(8, usable_cores()))

    def stored(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        region = np.empty((height, width, 3), np.uint8)
        if region.size:
            list(self._decoders.map(lambda left: self._fill(region, y, x, left), range(0, width, LARGEST_WIDTH)))
        return region

    def _fill(self, region: np.ndarray, y: int, x: int, left: int) -> None:
        piece = region[:, left : left + LARGEST_WIDTH]
        corner = (self._origin[0] + x + left, self._origin[1] + y)
        try:
            pixels = np.asarray(self._slide.read_region(corner, 0, (piece.shape[1], piece.shape[0])))
        except Exception as error:
            raise InputError(
                f"{self.path}: is damaged at rows {y} to {y + piece.shape[0]}, columns {x + left} to "
                f"{x + left + piece.shape[1]} ({error})"
            ) from None
        opacity = pixels[..., 3:].astype(np.uint16)
        piece[:] = (pixels[..., :3] * opacity + 255 * (255 - opacity)) // 255

    def close(self) -> None:
        self._decoders.shutdown()
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
