"""Where a slide has tissue: on a thumbnail, without glass, pen marks and specks."""

from __future__ import annotations

import numpy as np

from orion_unet.data.tissue import GLASS_LEVEL, GLASS_SATURATION

# Ink is strongly coloured and no stain: haematoxylin and eosin absorb green most. Ink that absorbs red or blue more
# by this optical density is a pen's; so is black, which absorbs all three alike by at least BLACK.
INK, BLACK, BLACK_SPREAD = 0.25, 1.2, 0.25
# Radius that is closed and opened [pixels of the thumbnail], and the least share of the image of a piece of tissue.
RADIUS, LEAST_PIECE = 2, 5e-4


def tissue_map(he: np.ndarray) -> np.ndarray:
    """Where an H&E thumbnail (h, w, 3) in [0, 1] shows tissue, (h, w) bool."""
    from scipy import ndimage

    smooth = ndimage.uniform_filter(he, (3, 3, 1))
    low, high = (pick(pick(smooth[..., 0], smooth[..., 1]), smooth[..., 2]) for pick in (np.minimum, np.maximum))
    glass = (low > GLASS_LEVEL) & (high - low < GLASS_SATURATION)
    tissue = ~glass & ~ink_map(smooth)
    disc = np.hypot(*np.mgrid[-RADIUS : RADIUS + 1, -RADIUS : RADIUS + 1]) <= RADIUS
    tissue = ndimage.binary_opening(
        ndimage.binary_closing(np.pad(tissue, RADIUS), disc)[RADIUS:-RADIUS, RADIUS:-RADIUS], disc
    )
    labels, count = ndimage.label(tissue)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    kept = sizes >= LEAST_PIECE * tissue.size
    kept[0] = False
    found: np.ndarray = kept[labels]
    return found


def ink_map(he: np.ndarray) -> np.ndarray:
    """Where a thumbnail (h, w, 3) in [0, 1] shows the ink of a pen: blue, green, or black; with a margin."""
    from scipy import ndimage

    red, green, blue = np.moveaxis(-np.log(np.clip(he, 1 / 255, 1)), -1, 0)
    coloured = np.maximum(red, blue) - green > INK
    darkness = np.minimum(np.minimum(red, green), blue)
    spread = np.maximum(np.maximum(red, green), blue) - darkness
    ink = coloured | ((darkness > BLACK) & (spread < BLACK_SPREAD))
    found: np.ndarray = ndimage.binary_dilation(ndimage.binary_opening(ink, iterations=1), iterations=RADIUS)
    return found
