"""The small pictures of an overview: averages over boxes of an H&E and of its prediction, read by bands."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

# Longest side of a thumbnail. Of a box's rows only every few are read, at least so many: enough for a picture.
LONGEST_SIDE, ROWS_PER_BOX = 1000, 4
BAND_PIXELS = 1 << 21


def box_size(shape: tuple[int, int]) -> int:
    """Side of the boxes, in pixels, that bring an image (H, W) down to a thumbnail."""
    return max(1, -(-max(shape) // LONGEST_SIDE))


def thumbnail(read: Callable[[slice], np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """Means over boxes, (h, w, ...) float32, of an image that ``read`` gives by rows, (n, W, ...).

    Rows and columns that fill no box are left out, but for an image smaller than one.
    """
    high, wide = (min(box_size(shape), side) for side in shape)
    rows, columns = shape[0] // high, shape[1] // wide
    at_once = max(1, BAND_PIXELS // (high * shape[1]))
    bands = []
    for row in range(0, rows, at_once):
        count = min(at_once, rows - row)
        band = read(slice(row * high, (row + count) * high))[:, : columns * wide]
        boxes = band.reshape(count, high, columns, wide, *band.shape[2:])
        bands.append(boxes[:, :: max(1, high // ROWS_PER_BOX)].mean(axis=(1, 3), dtype=np.float32))
    return np.concatenate(bands)
