"""Reads an H&E stored as OME-Zarr by region."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from orion_unet.errors import InputError
from orion_unet.slides.images import HeImage
from orion_unet.slides.intensity import WHITE
from orion_unet.slides.marker_zarr import open_marker_zarr
from orion_unet.slides.markers import MarkerImage
from orion_unet.slides.pixel_size import PixelSize


class ZarrHe(HeImage):
    """An OME-Zarr image of three channels, red, green and blue, of integers."""

    def __init__(self, image: MarkerImage) -> None:
        if image.shape[0] != 3:
            raise InputError(f"{image.path}: has {image.shape[0]} channels; an H&E has 3")
        white = WHITE.get(image.dtype.name)
        if white is None:
            raise InputError(f"{image.path}: has dtype {image.dtype}; an H&E as OME-Zarr is uint8 or uint16")
        size = PixelSize(image.pixel_size_um, image.pixel_size_doubt)
        super().__init__(image.path, (image.shape[1], image.shape[2]), white, size)
        self._image = image
        self.is_slide = image.nearest_level(np.inf) is not image

    def stored(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        if height <= 0 or width <= 0:
            return np.empty((max(height, 0), max(width, 0), 3), self._image.dtype)
        return np.ascontiguousarray(self._image.read(range(3), y, x, height, width).transpose(1, 2, 0))

    def nearest_level(self, factor: float) -> HeImage:
        level = self._image.nearest_level(factor)
        return self if level is self._image else ZarrHe(level)

    def close(self) -> None:
        self._image.close()


def open_zarr_he(path: Path) -> HeImage:
    """Open the H&E of an OME-Zarr folder; raises InputError if it is damaged, no image or no H&E."""
    return ZarrHe(open_marker_zarr(path))
