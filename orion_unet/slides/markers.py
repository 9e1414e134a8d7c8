"""The interface of marker images: channels with names, read by region. And arrays."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from orion_unet.errors import InputError
from orion_unet.slides.pixel_size import UNKNOWN_PIXEL_SIZE, PixelSize

DTYPES = ("uint8", "uint16", "float16", "float32")


class MarkerImage(ABC):
    """A marker image of ``shape`` (C, H, W), read by region. A context manager.

    ``dtype`` is the stored type. ``channel_names`` is empty where the file has none. ``pixel_size_um`` and
    ``pixel_size_doubt`` are as in HeImage. Raises InputError where it has no pixels.
    """

    def __init__(
        self,
        path: Path,
        shape: tuple[int, int, int],
        dtype: np.dtype,
        channel_names: Sequence[str] = (),
        pixel_size: PixelSize = UNKNOWN_PIXEL_SIZE,
    ) -> None:
        self.path = path
        self.shape = shape
        self.dtype = np.dtype(dtype).newbyteorder("=")
        if 0 in shape:
            raise InputError(f"{path}: has shape {shape}, no pixels")
        self.channel_names = tuple(channel_names)
        self.pixel_size_um, self.pixel_size_doubt = pixel_size

    @abstractmethod
    def read(self, channels: Sequence[int], y: int, x: int, height: int, width: int) -> np.ndarray:
        """A region inside the image as stored, (len(channels), h, w); raises InputError if it is damaged."""

    def nearest_level(self, factor: float) -> MarkerImage:
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


class ArrayMarkers(MarkerImage):
    """An array on disk, (C, H, W) or (H, W, C); the axis of the channels is the shortest one."""

    def __init__(
        self,
        path: Path,
        open_array: Callable[[], np.ndarray],
        layout: str = "",
        channel_names: Sequence[str] = (),
        pixel_size: PixelSize = UNKNOWN_PIXEL_SIZE,
    ) -> None:
        # Reopened for every region: the pages of a memory map count as this process's memory while it is open.
        self._open = open_array
        array = open_array()
        if array.ndim != 3:
            raise InputError(f"{path}: has shape {array.shape}; markers are (C, H, W) or (H, W, C)")
        self._layout = layout or ("hwc" if array.shape[2] < array.shape[0] else "chw")
        c, h, w = array.shape if self._layout == "chw" else (array.shape[2], *array.shape[:2])
        super().__init__(path, (int(c), int(h), int(w)), array.dtype, channel_names, pixel_size)

    def read(self, channels: Sequence[int], y: int, x: int, height: int, width: int) -> np.ndarray:
        array = self._open()
        if self._layout == "chw":
            region = array[list(channels), y : y + height, x : x + width]
        else:
            region = array[y : y + height, x : x + width][..., list(channels)].transpose(2, 0, 1)
        return np.ascontiguousarray(region, self.dtype)
