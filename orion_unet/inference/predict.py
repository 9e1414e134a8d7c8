"""Predicts the markers of an H&E image in memory: the Python interface."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from orion_unet.errors import InputError
from orion_unet.inference.model import TrainedModel
from orion_unet.inference.resampled import on_model_grid
from orion_unet.inference.tiling import TiledPrediction, choose_tiling
from orion_unet.inference.units import Unit
from orion_unet.slides.images import ArrayImage


def predict(
    he: np.ndarray,
    model: TrainedModel,
    *,
    normalized: bool = False,
    tta: bool = False,
    tissue_only: bool = False,
    tile: int | None = None,
    overlap: int | None = None,
    batch_size: int | None = None,
    pixel_size_um: float | None = None,
) -> np.ndarray:
    """Predict the markers of an H&E image of any size, by the same blended tiles as ``python -m orion_unet predict``.

    ``he`` is (H, W, 3) or (3, H, W): uint8, uint16, or floats in [0, 1] or [0, 255]. ``model`` comes from
    ``orion_unet.load_model``. Returns (C, H, W) float32 in the order of ``model.names`` and in the unit of the
    training data, or in [0, 1] with ``normalized``. ``tta`` averages over the eight flips and turns, ``tissue_only``
    leaves tiles that show no tissue at 0; ``tile`` and ``overlap`` are in pixels. ``pixel_size_um`` is the side of a
    pixel of ``he`` in micrometres: where it differs from ``model.pixel_size_um`` by more than 2 %, the image is
    resampled to that, and the markers have its pixels. Raises InputError for an array of another kind, numbers that do
    not fit the network, or pixel sizes more than a factor of 4 apart.
    """
    if pixel_size_um is not None and not (np.isfinite(pixel_size_um) and pixel_size_um > 0):
        raise InputError(f"pixel_size_um {pixel_size_um}: is no length in micrometres")
    array = np.asarray(he)
    image = on_model_grid(ArrayImage(Path("he"), lambda: array), pixel_size_um, model.pixel_size_um)
    tiling = choose_tiling(model, image.shape, tile, overlap)
    tiles = TiledPrediction(model, image, tiling, tissue_only=tissue_only, augmented=tta, batch_size=batch_size)
    markers = np.empty((len(model.names), *image.shape), np.float32)
    unit = Unit(model.normalization, range(len(model.names)), normalized)
    for y, rows in tiles.run():
        for channel, values in enumerate(rows):
            markers[channel, y : y + rows.shape[1]] = unit.stored(values, channel).cpu().numpy()
    return markers
