"""Optical densities of the stains of an H&E."""

from __future__ import annotations

import numpy as np

# Optical density of haematoxylin, eosin and residual in R, G, B: Ruifrok and Johnston, Anal Quant Cytol Histol 2001.
STAINS = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))


def haematoxylin(he: np.ndarray) -> np.ndarray:
    """Haematoxylin density (H, W) of an H&E (H, W, 3) in [0, 1], by colour deconvolution with ``STAINS``."""
    stains = np.array(STAINS)
    separate = np.linalg.inv(stains / np.linalg.norm(stains, axis=1, keepdims=True))
    density: np.ndarray = -np.log(np.clip(he, 1 / 255, 1)) @ separate[:, 0].astype(np.float32)
    return density
