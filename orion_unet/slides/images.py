"""H&E images of any kind behind one door: a size, a pixel size, and regions read without reading the whole."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Self

import numpy as np

from orion_unet.errors import InputError
from orion_unet.run_log import open_regular
from orion_unet.slides.intensity import WHITE, declared_white, value_range

ARRAYS, PICTURES, SLIDES = (".npy",), (".png", ".jpg", ".jpeg"), (".tif", ".tiff", ".svs")
SUFFIXES = ARRAYS + PICTURES + SLIDES
# A PNG or JPEG can only be decoded whole, at about seven bytes a pixel while it is done.
LARGEST_PICTURE = 16384**2
# A resolution tag outside these is that of a screen or a printer, not of a microscope.
SMALLEST_PIXEL_UM, LARGEST_PIXEL_UM = 0.05, 20.0


class HeImage(ABC):
    """An H&E image of ``shape`` (H, W) that is read by regions.

    ``white`` is the stored value of full intensity, ``pixel_size_um`` the side of a pixel in micrometres or None
    where the file does not say, ``is_slide`` whether it is a TIFF, which may be mostly glass. A context manager.
    """

    is_slide = False

    def __init__(self, path: Path, shape: tuple[int, int], white: float, pixel_size_um: float | None = None) -> None:
        self.path = path
        self.shape = shape
        self.white = white
        self.pixel_size_um = pixel_size_um

    @abstractmethod
    def stored(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        """A region inside the image as stored, (h, w, 3) in the file's dtype; raises InputError where damaged."""

    def read(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        """A region as intensities, (h, w, 3) float32 in [0, 1]; what lies outside the image is left out.

        Raises InputError where that part of the file is damaged.
        """
        top, left = max(y, 0), max(x, 0)
        bottom, right = min(y + height, self.shape[0]), min(x + width, self.shape[1])
        region = self.stored(top, left, max(bottom - top, 0), max(right - left, 0))
        return region.astype(np.float32) / np.float32(self.white)

    def close(self) -> None:  # noqa: B027 (most have nothing to let go of)
        """Let go of the file."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class ArrayImage(HeImage):
    """An array in memory or on disk, (H, W, 3) or (3, H, W), uint8, uint16 or floats in [0, 1] or [0, 255]."""

    def __init__(
        self, path: Path, open_array: Callable[[], np.ndarray], layout: str = "", pixel_size_um: float | None = None
    ) -> None:
        # A memory map is opened anew for every region: the pages of one that stays open count as this process's.
        self._open = open_array
        array = open_array()
        self._layout = layout or _layout(path, array)
        size = array.shape[:2] if self._layout == "hwc" else array.shape[1:]
        if 0 in size:
            raise InputError(f"{path}: has shape {array.shape}, no pixel at all")
        super().__init__(path, (int(size[0]), int(size[1])), _white(path, array), pixel_size_um)

    def stored(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        array = self._open()
        if self._layout == "hwc":
            region = array[y : y + height, x : x + width, :3]
        else:
            region = array[:3, y : y + height, x : x + width].transpose(1, 2, 0)
        return np.ascontiguousarray(region, region.dtype.newbyteorder("="))


def open_he(path: str | Path) -> HeImage:
    """Open an H&E image: .npy, .png, .jpg, .tif (tiled, striped, pyramidal, OME) or .svs.

    Raises InputError where the file is missing, damaged, of another kind, or has not three colour channels.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(f"{path}: is of no kind that can be read; use {', '.join(SUFFIXES)}")
    try:
        open_regular(path).close()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    if suffix in SLIDES:
        from orion_unet.slides.tiff import open_slide

        return open_slide(path)
    return _open_npy(path) if suffix in ARRAYS else _open_picture(path)


def needed(module: str, package: str = "") -> ModuleType:
    """Import what the optional extra brings; raises InputError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(
            f'the package {package or module} is needed for this: pip install "orion-unet[inference]"'
        ) from None


def believable(pixel_size_um: float | None) -> float | None:
    """A pixel size that a microscope can have, or None."""
    if pixel_size_um is None or not SMALLEST_PIXEL_UM <= pixel_size_um <= LARGEST_PIXEL_UM:
        return None
    return pixel_size_um


def _open_npy(path: Path) -> HeImage:
    def open_array() -> np.ndarray:
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except Exception as error:
            # NumPy evaluates the header as a Python literal: what a broken one raises can be nearly anything.
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"{path}: is no sound .npy file, or is truncated ({reason})") from None
        if not isinstance(array, np.memmap):
            array.close()
            raise InputError(f"{path}: is an archive of arrays (.npz), not one array")
        return array

    return ArrayImage(path, open_array)


def _layout(path: Path, array: np.ndarray) -> str:
    if array.ndim != 3 or 3 not in (array.shape[0], array.shape[2]):
        raise InputError(f"{path}: has shape {array.shape}; an H&E has 3 channels, (H, W, 3) or (3, H, W)")
    if array.shape[0] == array.shape[2]:
        raise InputError(f"{path}: has shape {array.shape}, which can be read as (H, W, 3) and as (3, H, W)")
    return "hwc" if array.shape[2] == 3 else "chw"


def _white(path: Path, array: np.ndarray) -> float:
    """Stored value of full intensity: that of the integer type, or the one that the whole file's range declares."""
    white = WHITE.get(array.dtype.newbyteorder("=").name)
    if white is not None:
        return white
    if array.dtype.kind != "f":
        raise InputError(f"{path}: has dtype {array.dtype}; use uint8, uint16 or floats in [0, 1] or [0, 255]")
    low, high = value_range(array)
    if not np.isfinite([low, high]).all():
        raise InputError(f"{path}: holds NaN or infinity")
    white = declared_white(high, "he")
    if high > white * 1.0001 or low < -1e-4 * white:
        raise InputError(f"{path}: holds values from {low:g} to {high:g}; floats must lie in [0, 1] or [0, 255]")
    return white


def _open_picture(path: Path) -> HeImage:
    pillow: Any = needed("PIL.Image", "pillow")
    # Pillow refuses images of this size only to guard servers; what fits into memory is decided below.
    limit, pillow.MAX_IMAGE_PIXELS = pillow.MAX_IMAGE_PIXELS, None
    try:
        with pillow.open(path, formats=("PNG", "JPEG")) as picture:
            width, height = picture.size
            if width * height > LARGEST_PICTURE:
                raise InputError(
                    f"{path}: is {width:,} x {height:,} pixels; PNG and JPEG can only be decoded whole, and more than "
                    f"{LARGEST_PICTURE / 1e6:.0f} megapixels are not: save it as a tiled TIFF"
                )
            if picture.mode not in ("RGB", "RGBA"):
                raise InputError(f"{path}: is of mode {picture.mode}; an H&E has the three channels red, green, blue")
            pixel_size_um = _resolution(picture.info)
            array = np.asarray(picture)
    except InputError:
        raise
    except Exception as error:
        # Decoders raise nearly anything on damaged bytes.
        raise InputError(f"{path}: is damaged, truncated or no PNG or JPEG ({error})") from None
    finally:
        pillow.MAX_IMAGE_PIXELS = limit
    return ArrayImage(path, lambda: array, "hwc", pixel_size_um)


def _resolution(info: dict[Any, Any]) -> float | None:
    try:
        return believable(25400.0 / float(info["dpi"][0]))
    except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError):
        return None
