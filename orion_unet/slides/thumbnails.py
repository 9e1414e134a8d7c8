"""Small copies of large images, made in bounded memory from the nearest level of their pyramid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from orion_unet.slides.images import HeImage
from orion_unet.slides.markers import MarkerImage

# Side of the pieces that are read [pixels of the level].
PIECE = 2048


class Thumbnail(NamedTuple):
    """``pixels`` (h, w, C) float32, each the mean of ``factor`` x ``factor`` pixels of the whole image."""

    pixels: np.ndarray
    factor: float


def he_thumbnail(image: HeImage, side: int) -> Thumbnail:
    """The H&E in [0, 1], (h, w, 3), with a longest side of about ``side`` pixels, never enlarged.

    Raises InputError where the file is damaged.
    """
    factor = max(1.0, max(image.shape) / side)
    level = image.nearest_level(factor)
    found = _means(level.stored, level.shape, image.shape, factor)
    return found._replace(pixels=found.pixels / np.float32(image.white))


def marker_thumbnail(image: MarkerImage, channels: Sequence[int], side: int) -> Thumbnail:
    """Channels as stored, (h, w, len(channels)), with a longest side of about ``side`` pixels, never enlarged.

    Raises InputError where the file is damaged.
    """
    shape = (image.shape[1], image.shape[2])
    factor = max(1.0, max(shape) / side)
    level = image.nearest_level(factor)

    def read(y: int, x: int, height: int, width: int) -> np.ndarray:
        return level.read(channels, y, x, height, width).transpose(1, 2, 0)

    return _means(read, (level.shape[1], level.shape[2]), shape, factor)


def _means(
    read: Callable[[int, int, int, int], np.ndarray], level: tuple[int, int], full: tuple[int, int], factor: float
) -> Thumbnail:
    """Means over whole numbers of pixels of a level, read piece by piece; the last row and column may be cut off."""
    ratio = full[0] / level[0]
    step = max(1, round(factor / ratio))
    height, width = (max(1, side // step) for side in level)
    piece = max(1, PIECE // step)
    pixels: np.ndarray | None = None
    for top in range(0, height, piece):
        for left in range(0, width, piece):
            rows, columns = min(piece, height - top), min(piece, width - left)
            read_rows, read_columns = (
                min(count * step, side) for count, side in ((rows, level[0]), (columns, level[1]))
            )
            region = read(top * step, left * step, read_rows, read_columns)
            blocks = region.reshape(rows, read_rows // rows, columns, read_columns // columns, -1)
            if pixels is None:
                pixels = np.empty((height, width, blocks.shape[-1]), np.float32)
            # Rows first: their pixels are neighbours in memory.
            sums = blocks.sum(1, dtype=np.float32).sum(2)
            pixels[top : top + rows, left : left + columns] = sums / (blocks.shape[1] * blocks.shape[3])
    assert pixels is not None
    return Thumbnail(pixels, ratio * step)
