"""Distinguishes tissue from blank glass in an H&E image."""

from __future__ import annotations

import numpy as np

# Glass is bright and unsaturated: darkest colour above this level and spread of the colours below this one, as
# fractions of white. A grid of this many pixels per side is enough to judge a patch.
GLASS_LEVEL, GLASS_SATURATION, GLASS_GRID = 0.75, 0.1, 16


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
