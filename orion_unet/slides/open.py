"""Opens the H&E and marker images of every format; the ending of the name chooses the reader."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from orion_unet.errors import InputError
from orion_unet.extras import needed
from orion_unet.slides.images import ArrayImage, HeImage
from orion_unet.slides.marker_tiff import open_marker_tiff
from orion_unet.slides.marker_zarr import open_marker_zarr
from orion_unet.slides.markers import DTYPES, ArrayMarkers, MarkerImage
from orion_unet.slides.pixel_size import UNKNOWN_PIXEL_SIZE, PixelSize, square_pixel
from orion_unet.slides.remote import check_openable, input_path, is_remote
from orion_unet.slides.tiff import open_tiff
from orion_unet.slides.whole_slide import open_whole_slide
from orion_unet.slides.zarr_he import open_zarr_he

# PNG and JPEG can only be decoded whole, which takes about seven bytes a pixel.
LARGEST_PICTURE = 16384**2


def open_he(path: str | Path) -> HeImage:
    """Open an H&E image: .npy, .png, .jpg, .tif (tiled, striped, pyramidal, OME), .svs, what OpenSlide reads, or an
    OME-Zarr folder (.zarr).

    Raises InputError if the file is missing, damaged, of another format or without three colour channels, or if a
    package that reads this format is not installed.
    """
    path = input_path(path)
    if is_zarr_image(path):
        return open_zarr_he(_zarr_folder(path))
    kind = KINDS.get(path.suffix.lower())
    if kind is None:
        raise InputError(f"{path}: cannot be read; use {', '.join(SUFFIXES)}")
    require_readers([path])
    if is_remote(path) and kind is not TIFF:
        raise InputError(f"{path}: cannot be read by its URL; a TIFF or OME-Zarr can: copy it to a disk first")
    check_openable(path)
    return kind.open(path)


def require_readers(paths: Iterable[Path]) -> None:
    """Raise InputError if a package that one of these files needs is missing; opens none of them."""
    suffixes = {path.suffix.lower() for path in paths}
    for suffix in sorted(suffixes & KINDS.keys()):
        for module, package in KINDS[suffix].packages.items():
            needed(module, package, KINDS[suffix].extra)
    if ".zarr" in suffixes:
        needed("zarr")


def open_npy(path: Path) -> HeImage:
    """A .npy file as a memory map; raises InputError if it is damaged or not an H&E."""
    return ArrayImage(path, _map_npy(path))


def _map_npy(path: Path) -> Callable[[], np.ndarray]:
    """What maps a .npy file; it raises InputError if the file is damaged."""

    def open_array() -> np.ndarray:
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except Exception as error:
            # NumPy evaluates the header as a Python literal, so a broken one can raise almost anything.
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"{path}: is damaged, truncated or not a .npy file ({reason})") from None
        if not isinstance(array, np.memmap):
            array.close()
            raise InputError(f"{path}: is an archive of arrays (.npz), not one array")
        return array

    return open_array


def open_markers(path: str | Path) -> MarkerImage:
    """Open a marker image: .npy, .tif (OME-TIFF, tiled or striped, pyramidal) or an OME-Zarr folder (.zarr).

    Raises InputError if it is missing, damaged, of another format or of another dtype than uint8, uint16, float16 and
    float32, or if a package that reads it is not installed.
    """
    image = _open_planes(input_path(path), "markers", _map_npy)
    if image.dtype.name not in DTYPES:
        image.close()
        raise InputError(f"{path}: has dtype {image.dtype}; use {', '.join(DTYPES)}")
    return image


def open_labels(path: str | Path) -> MarkerImage:
    """Open a label image (1, H, W) of integers, 0 outside of cells: .npy (H, W), .tif, or an OME-Zarr folder (.zarr).

    Raises InputError if it is missing, damaged, of another format, no integers or more than one plane, or if a package
    that reads it is not installed.
    """

    def map_plane(path: Path) -> Callable[[], np.ndarray]:
        def open_plane() -> np.ndarray:
            array = opened()
            return array[None] if array.ndim == 2 else array

        opened = _map_npy(path)
        return open_plane

    image = _open_planes(input_path(path), "labels", map_plane)
    if image.shape[0] != 1 or image.dtype.kind not in "ui":
        image.close()
        raise InputError(f"{path}: is {image.dtype} {image.shape}; labels are one plane of integers")
    return image


def is_zarr_image(path: Path) -> bool:
    """Whether a path is called .zarr, or a folder is a Zarr group: labels of an OME-Zarr image have any name."""
    documents = (path / name for name in (".zattrs", ".zgroup", "zarr.json"))
    return path.suffix.lower() == ".zarr" or any(document.is_file() for document in documents)


def _zarr_folder(path: Path) -> Path:
    if not is_remote(path) and not path.is_dir():
        raise InputError(f"{path}: cannot be read (no such folder)")
    needed("zarr")
    return path


def _open_planes(path: Path, kind: str, map_npy: Callable[[Path], Callable[[], np.ndarray]]) -> MarkerImage:
    suffix = path.suffix.lower()
    if is_zarr_image(path):
        return open_marker_zarr(_zarr_folder(path))
    if suffix not in MARKER_SUFFIXES:
        raise InputError(f"{path}: cannot be read as {kind}; use {', '.join(MARKER_SUFFIXES)}")
    require_readers([path])
    if is_remote(path) and suffix == ".npy":
        raise InputError(f"{path}: cannot be read by its URL; a TIFF or OME-Zarr can: copy it to a disk first")
    check_openable(path)
    if suffix != ".npy":
        return open_marker_tiff(path)
    # The one plane of labels comes first; of markers, the shortest axis is that of the channels.
    return ArrayMarkers(path, map_npy(path), "chw" if kind == "labels" else "")


def open_picture(path: Path) -> HeImage:
    """A PNG or JPEG, decoded whole; raises InputError if it is damaged, too large or not RGB."""
    import PIL.Image

    pillow: Any = PIL.Image
    # Pillow's own limit protects servers from decompression bombs; the limit below is about memory.
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
            pixel_size = _resolution(picture.info)
            array = np.asarray(picture)
    except InputError:
        raise
    except Exception as error:
        # On damaged bytes a decoder can raise almost anything.
        raise InputError(f"{path}: is damaged, truncated or no PNG or JPEG ({error})") from None
    finally:
        pillow.MAX_IMAGE_PIXELS = limit
    return ArrayImage(path, lambda: array, "hwc", pixel_size)


def _resolution(info: dict[Any, Any]) -> PixelSize:
    try:
        across, down = (25400.0 / float(per_inch) for per_inch in info["dpi"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return UNKNOWN_PIXEL_SIZE
    return square_pixel(across, down)


class Kind(NamedTuple):
    """A format: its reader, the modules that the reader imports with their packages, the extra that installs them."""

    open: Callable[[Path], HeImage]
    packages: dict[str, str]
    extra: str = "inference"


PICTURE = Kind(open_picture, {"PIL.Image": "pillow"})
# Without imagecodecs, tifffile reads only some compressions; the others would look damaged.
TIFF = Kind(open_tiff, {"tifffile": "tifffile", "imagecodecs": "imagecodecs"})
WHOLE_SLIDE = Kind(open_whole_slide, {"openslide": "openslide-python"}, "openslide")
KINDS = {
    ".npy": Kind(open_npy, {}),
    **dict.fromkeys((".png", ".jpg", ".jpeg"), PICTURE),
    **dict.fromkeys((".tif", ".tiff", ".svs"), TIFF),
    **dict.fromkeys((".ndpi", ".mrxs", ".scn", ".bif", ".svslide"), WHOLE_SLIDE),
}
SUFFIXES = (*KINDS, ".zarr")
MARKER_SUFFIXES = (".npy", ".tif", ".tiff", ".zarr")
