"""An image on the pixel grid that a model was trained on."""

from __future__ import annotations

import math

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from orion_unet.errors import InputError
from orion_unet.registration.transform import Affine, move
from orion_unet.slides.images import HeImage, level_factor
from orion_unet.slides.pixel_size import PixelSize

# Pixel sizes that differ by less are taken for the same: the sizes that scanners state are about as exact, and the edge
# of a nucleus of 10 µm moves by 0.1 µm.
SAME = 0.02
# A network never saw what it would be shown beyond this factor.
LARGEST_FACTOR = 4.0


class ResampledImage(HeImage):
    """An image with pixels of another size, resampled by region: bicubic, and smoothed first where it gets coarser.

    It is made from the smallest level of the file that is not coarser than what is wanted. The upper left corners of
    the two images coincide; the last row and column may extend half a pixel beyond the image.
    """

    def __init__(self, image: HeImage, pixel_size_um: float, wanted_um: float) -> None:
        factor = pixel_size_um / wanted_um
        height, width = (max(1, round(side * factor)) for side in image.shape)
        super().__init__(image.path, (height, width), image.white, PixelSize(wanted_um))
        self.is_slide = image.is_slide
        self._factor = factor
        self._source_shape = image.shape
        self._image = image.nearest_level(1 / factor)
        down, across = (1 / (factor * level_factor(full, level))
                        for full, level in zip(image.shape, self._image.shape, strict=True))  # fmt: skip
        # Centres of pixels are half a pixel from the corner, on both grids.
        self._affine = Affine(np.array([[down, 0.0, (down - 1) / 2], [0.0, across, (across - 1) / 2]]))

    def stored(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        if height <= 0 or width <= 0:
            return self._image.stored(0, 0, 0, 0)
        return move(self._image.stored, self._image.shape, self._affine, None, (y, x, height, width))[0]

    def back(self, markers: Tensor) -> Tensor:
        """Markers (C, h, w) that were predicted from this image, on the pixels of the image it was made from (C, H, W).

        Bilinear; where they get coarser, each pixel is a weighted mean of all that it covers.
        """
        height, width = self._source_shape
        # Rounding may have left out up to half a pixel at the right and the bottom.
        beyond = 2 + math.ceil(self._factor)
        padded = F.pad(markers[None], (0, beyond, 0, beyond), mode="replicate")
        found = F.interpolate(padded, scale_factor=1 / self._factor, mode="bilinear", antialias=True)
        return found[0, :, :height, :width]


def on_model_grid(image: HeImage, pixel_size_um: float | None, model_um: float | None) -> HeImage:
    """The image, resampled where its pixel size is known, that of the model too, and they differ by more than 2 %.

    Raises InputError if they differ by more than a factor of 4.
    """
    if pixel_size_um is None or model_um is None:
        return image
    factor = pixel_size_um / model_um
    if abs(factor - 1) <= SAME:
        return image
    if not 1 / LARGEST_FACTOR <= factor <= LARGEST_FACTOR:
        raise InputError(
            f"{image.path}: its pixels are {pixel_size_um:g} µm wide, those of the training {model_um:g} µm; more than "
            f"a factor of {LARGEST_FACTOR:g} apart, nothing can be predicted. Check --pixel_size_um, or use a model "
            "trained at another pixel size"
        )
    return ResampledImage(image, pixel_size_um, model_um)
