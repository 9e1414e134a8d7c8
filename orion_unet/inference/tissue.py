"""Finds tissue on an H&E, from every pixel, so that tiles without any can be skipped."""

from __future__ import annotations

import numpy as np

from orion_unet.data.tissue import tissue_pixels

# A cell of CELL x CELL pixels shows tissue if at least half of its pixels do. Fewer are noise or the edge of a fill.
CELL = 4


def tissue_cells(image: np.ndarray, white: float) -> np.ndarray:
    """Which cells of 4 x 4 pixels show tissue: (ceil(H / 4), ceil(W / 4)) bool, of (H, W, 3) as stored.

    ``white`` is the value of full intensity.
    """
    shown = tissue_pixels(image, white)
    shown = np.pad(shown, [(0, -side % CELL) for side in shown.shape], mode="edge")
    height, width = shown.shape
    cells = shown.reshape(height // CELL, CELL, width // CELL, CELL)
    counts: np.ndarray = cells.sum(axis=1, dtype=np.uint8).sum(axis=2, dtype=np.uint8)
    return counts >= CELL * CELL // 2
