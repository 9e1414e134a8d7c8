"""Distinguishes tissue from blank glass in an H&E image."""

from __future__ import annotations

import numpy as np

# Glass is bright and unsaturated: darkest colour above this level and spread of the colours below this one, as
# fractions of white. A grid of this many pixels per side is enough to judge a patch.
GLASS_LEVEL, GLASS_SATURATION, GLASS_GRID = 0.75, 0.1, 16
# Scanners fill what they have not scanned with black, darker than any ink or pigment.
FILL_LEVEL = 0.04


def tissue_fraction(patch: np.ndarray, layout: str, white: float) -> float:
    """Share in [0, 1] of a patch that is not blank glass, estimated on a coarse grid of pixels.

    ``patch`` is (H, W, 3) with ``layout`` hwc or (3, H, W) with chw; ``white`` is its value of full intensity.
    """
    rows, columns = (slice(None, None, max(1, side // GLASS_GRID)) for side in _sides(patch, layout))
    coarse = patch[rows, columns] if layout == "hwc" else patch[:, rows, columns]
    # Copy each colour into a contiguous array: judging a training crop must take less time than copying it.
    red, green, blue = (
        np.array(coarse[..., colour] if layout == "hwc" else coarse[colour], np.float32) for colour in range(3)
    )
    low = np.minimum(np.minimum(red, green), blue)
    spread = np.maximum(np.maximum(red, green), blue) - low
    glass = (low > GLASS_LEVEL * white) & (spread < GLASS_SATURATION * white)
    return 1.0 - float(np.count_nonzero(glass)) / glass.size


def _sides(patch: np.ndarray, layout: str) -> tuple[int, ...]:
    return patch.shape[:2] if layout == "hwc" else patch.shape[1:]


def tissue_pixels(image: np.ndarray, white: float) -> np.ndarray:
    """Which pixels (H, W) of an H&E (H, W, 3) as stored show tissue: neither glass (bright and unsaturated) nor black
    fill. ``white`` is the value of full intensity."""
    red, green, blue = (np.ascontiguousarray(image[..., channel]) for channel in range(3))
    low = np.minimum(np.minimum(red, green), blue)
    high = np.maximum(np.maximum(red, green), blue)
    # In the stored type: comparing integers with a float would convert all of them.
    level, spread, black = (image.dtype.type(share * white) for share in (GLASS_LEVEL, GLASS_SATURATION, FILL_LEVEL))
    glass = (low > level) & (high - low <= spread)
    shown: np.ndarray = ~(glass | (high <= black))
    return shown
