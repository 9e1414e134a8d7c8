"""Optical densities of the stains of an H&E."""

from __future__ import annotations

import numpy as np

# Optical density of haematoxylin, eosin and residual in R, G, B: Ruifrok and Johnston, Anal Quant Cytol Histol 2001.
STAINS = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))


def haematoxylin(he: np.ndarray) -> np.ndarray:
    """Haematoxylin density (H, W) of an H&E (H, W, 3) in [0, 1], by colour deconvolution with ``STAINS``."""
    density: np.ndarray = optical_density(he) @ separation()[:, 0]
    return density


def optical_density(he: np.ndarray) -> np.ndarray:
    """-ln of intensities in [0, 1], none darker than one level of 255."""
    found: np.ndarray = -np.log(np.clip(he, 1 / 255, 1))
    return found


def separation() -> np.ndarray:
    """What optical densities (..., 3) are multiplied with, (3, 3) float32, to give the densities of haematoxylin, eosin
    and residual, per stain vector of length 1."""
    stains = np.array(STAINS)
    return np.linalg.inv(stains / np.linalg.norm(stains, axis=1, keepdims=True)).astype(np.float32)
