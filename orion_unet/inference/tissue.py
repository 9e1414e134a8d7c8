"""Finds tissue on an H&E, from every pixel, so that tiles without any can be skipped."""

from __future__ import annotations

import numpy as np

from orion_unet.data.tissue import GLASS_LEVEL, GLASS_SATURATION

# A cell of CELL x CELL pixels shows tissue if at least half of its pixels do. Fewer are noise or the edge of a fill.
CELL = 4
# Scanners fill what they have not scanned with black, darker than any ink or pigment.
FILL_LEVEL = 0.04


def tissue_cells(image: np.ndarray, white: float) -> np.ndarray:
    """Which cells of 4 x 4 pixels show tissue: (ceil(H / 4), ceil(W / 4)) bool, of (H, W, 3) as stored.

    Tissue is neither blank glass (bright and unsaturated) nor black fill. ``white`` is the value of full intensity.
    """
    red, green, blue = (np.ascontiguousarray(image[..., channel]) for channel in range(3))
    low = np.minimum(np.minimum(red, green), blue)
    high = np.maximum(np.maximum(red, green), blue)
    # In the stored type: comparing integers with a float would convert all of them.
    level, spread, black = (image.dtype.type(share * white) for share in (GLASS_LEVEL, GLASS_SATURATION, FILL_LEVEL))
    glass = (low > level) & (high - low <= spread)
    shown = ~(glass | (high <= black))
    shown = np.pad(shown, [(0, -side % CELL) for side in shown.shape], mode="edge")
    height, width = shown.shape
    cells = shown.reshape(height // CELL, CELL, width // CELL, CELL)
    counts: np.ndarray = cells.sum(axis=1, dtype=np.uint8).sum(axis=2, dtype=np.uint8)
    return counts >= CELL * CELL // 2
