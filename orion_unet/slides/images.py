"""The interface of all H&E images: a shape, a pixel size, and regions read without reading the rest. And arrays."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from orion_unet.errors import InputError
from orion_unet.slides.intensity import WHITE, declared_white, value_range
from orion_unet.slides.pixel_size import UNKNOWN_PIXEL_SIZE, PixelSize


class HeImage(ABC):
    """An H&E image of ``shape`` (H, W), read by region. A context manager.

    ``white`` is the stored value of full intensity. ``pixel_size_um`` is the side of a pixel in micrometres, None if
    unknown; ``pixel_size_doubt`` says why a size that the file states is not used. ``is_slide`` is True for whole
    slides, which may be mostly glass.
    """

    is_slide = False

    def __init__(
        self, path: Path, shape: tuple[int, int], white: float, pixel_size: PixelSize = UNKNOWN_PIXEL_SIZE
    ) -> None:
        self.path = path
        self.shape = shape
        self.white = white
        self.pixel_size_um, self.pixel_size_doubt = pixel_size

    @abstractmethod
    def stored(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        """A region inside the image as stored, (h, w, 3) in the file's dtype; raises InputError if it is damaged."""

    def read(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        """A region as intensities, (h, w, 3) float32 in [0, 1], cropped to the image.

        Raises InputError if that part of the file is damaged.
        """
        top, left = max(y, 0), max(x, 0)
        bottom, right = min(y + height, self.shape[0]), min(x + width, self.shape[1])
        region = self.stored(top, left, max(bottom - top, 0), max(right - left, 0))
        return region.astype(np.float32) / np.float32(self.white)

    def nearest_level(self, factor: float) -> HeImage:
        """The smallest copy in the file that is at most ``factor`` times smaller: the image itself where there is none.

        It is valid until the image is closed, and need not be closed.
        """
        return self

    def close(self) -> None:  # noqa: B027 (most have nothing to close)
        """Close the file."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def level_factor(full: int, level: int) -> float:
    """How many pixels of the full image a pixel of a smaller level covers, from the two lengths of a side.

    A whole number where the level's side is the quotient by it, rounded up or down.
    """
    whole = round(full / level)
    return float(whole) if whole > 0 and abs(full / whole - level) < 1 else full / level


class ArrayImage(HeImage):
    """An array in memory or on disk, (H, W, 3) or (3, H, W), uint8, uint16 or floats in [0, 1] or [0, 255].

    Without ``white``, the value of full intensity follows from the type, for floats from the range of the whole array.
    """

    def __init__(
        self,
        path: Path,
        open_array: Callable[[], np.ndarray],
        layout: str = "",
        pixel_size: PixelSize = UNKNOWN_PIXEL_SIZE,
        white: float | None = None,
    ) -> None:
        # Reopened for every region: the pages of a memory map count as this process's memory while it is open.
        self._open = open_array
        array = open_array()
        self._layout = layout or _layout(path, array)
        size = array.shape[:2] if self._layout == "hwc" else array.shape[1:]
        if 0 in size:
            raise InputError(f"{path}: has shape {array.shape}, no pixels")
        white = _white(path, array) if white is None else white
        super().__init__(path, (int(size[0]), int(size[1])), white, pixel_size)

    def stored(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        array = self._open()
        if self._layout == "hwc":
            region = array[y : y + height, x : x + width, :3]
        else:
            region = array[:3, y : y + height, x : x + width].transpose(1, 2, 0)
        return np.ascontiguousarray(region, region.dtype.newbyteorder("="))


def _layout(path: Path, array: np.ndarray) -> str:
    if array.ndim != 3 or 3 not in (array.shape[0], array.shape[2]):
        raise InputError(f"{path}: has shape {array.shape}; an H&E has 3 channels, (H, W, 3) or (3, H, W)")
    if array.shape[0] == array.shape[2]:
        raise InputError(f"{path}: has shape {array.shape}, which can be read as (H, W, 3) and as (3, H, W)")
    return "hwc" if array.shape[2] == 3 else "chw"


def _white(path: Path, array: np.ndarray) -> float:
    """Stored value of full intensity: fixed for an integer type, from the range of the whole file for floats."""
    white = WHITE.get(array.dtype.newbyteorder("=").name)
    if white is not None:
        return white
    if array.dtype.kind != "f":
        raise InputError(f"{path}: has dtype {array.dtype}; use uint8, uint16 or floats in [0, 1] or [0, 255]")
    low, high = value_range(array)
    if not np.isfinite([low, high]).all():
        raise InputError(f"{path}: contains NaN or infinity")
    white = declared_white(high, "he")
    if high > white * 1.0001 or low < -1e-4 * white:
        raise InputError(f"{path}: has values from {low:g} to {high:g}; floats must be in [0, 1] or [0, 255]")
    return white
