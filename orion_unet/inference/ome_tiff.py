"""Writes predictions as pyramidal OME-TIFF, for QuPath, napari and every reader based on Bio-Formats."""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np

from orion_unet import __version__
from orion_unet.data.channels import nuclear_channel
from orion_unet.distributed import usable_cores
from orion_unet.errors import RunError
from orion_unet.extras import needed
from orion_unet.run_log import fsync_folder

TILE = 512
WHITE = 65535
# The low bits of a prediction are noise: higher levels, up to 9, take longer and save nothing.
DEFLATE_LEVEL = 1
# Encoded tiles waiting to be written; tifffile's default is half a gigabyte.
WAITING_BYTES = 1 << 26
# A classic TIFF is limited to 4 GiB. Without counting on compression, and with a third more for the pyramid.
CLASSIC_BYTES = 3 * (1 << 30)
ANNOTATIONS = "orion-unet/held-out-tissue"
NUCLEAR_BLUE = (0, 90, 255)


def write_ome_tiff(
    path: Path,
    image: np.ndarray,
    names: Sequence[str],
    *,
    pixel_size_um: float | None = None,
    dtype: str = "uint16",
    high: float = 1.0,
    description: str = "",
    annotations: Mapping[str, str] | None = None,
) -> None:
    """Write ``image`` (C, H, W), float, with its C channel names; replaces ``path`` once the file is complete.

    ``dtype`` float32 keeps the values; uint16 stores 0 to ``high`` as 0 to 65535, clipped. Tiles of 512, deflate,
    BigTIFF where 4 GiB may not do. Each level of the pyramid is the 2 x 2 mean of the one above (rounded, for
    uint16; at an odd edge, of the pixels there are), down to 512 pixels. ``pixel_size_um`` is the side of a pixel
    in micrometres. A channel's colour depends on its place in the list alone, and a nuclear stain is blue.

    The image may be a memory map: it is read once, in bands of 512 rows, and the smaller levels pass through
    unnamed files beside ``path`` (a third of the stored size). Memory: a few bands, whatever the height.

    ``annotations`` become a MapAnnotation of OME in the namespace ANNOTATIONS, which QuPath and OMERO show as key-value
    pairs: how well each channel's prediction agreed with held-out tissue, and whether the stain is that of the
    training.

    Display: OME has no field for it. napari's reader shows uint16 from 0 to 65535, so that equal intensities look
    equal in every image; QuPath, whatever a file says, starts 16-bit and float images at the 0.1 and 99.9 %
    quantiles of the smallest level, and napari does the like with float32. With uint16, 0 to 65535 set by hand in
    QuPath means 0 to ``high`` in every file.

    Raises RunError if the file cannot be written, InputError if a package is not installed.
    """
    if dtype not in ("uint16", "float32"):
        raise ValueError(f"dtype {dtype}: must be uint16 or float32")
    if image.ndim != 3 or len(names) != len(image) or not high > 0:
        raise ValueError(f"image {image.shape}, {len(names)} names, high {high}: want (C, H, W), C names, high > 0")
    require_writer()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        _write(temporary, image, names, pixel_size_um, np.dtype(dtype), high, description, annotations or {})
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_folder(path.parent)
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror or error}{_space(path.parent)})") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def require_writer() -> None:
    """Raise InputError if a package that writes OME-TIFF is missing."""
    needed("tifffile")
    # Unlike tifffile alone, the pair also has the predictor, and compresses on every core.
    needed("imagecodecs")
    needed("skimage.color", "scikit-image")


def _space(folder: Path) -> str:
    with suppress(OSError):
        return f"; {shutil.disk_usage(folder).free} bytes free"
    return ""


def _write(
    path: Path,
    image: np.ndarray,
    names: Sequence[str],
    pixel_size_um: float | None,
    dtype: np.dtype,
    high: float,
    description: str,
    annotations: Mapping[str, str],
) -> None:
    import tifffile

    sizes = pyramid_sizes(image.shape[1], image.shape[2])
    stored_bytes = 4 / 3 * image.size * dtype.itemsize
    metadata: dict[str, Any] = {
        "axes": "CYX",
        "Name": _printable(path.name.removeprefix(".").partition(".")[0]),
        "Channel": {
            "Name": [_printable(name) for name in names],
            "Color": [_signed_rgba(colour) for colour in channel_colours(names)],
        },
    }
    if description:
        metadata["Description"] = _printable(description)
    if annotations:
        pairs = {_printable(name): _printable(text) for name, text in annotations.items()}
        metadata["MapAnnotation"] = {"Namespace": ANNOTATIONS, "Value": pairs}
    if pixel_size_um:
        for axis in "XY":
            metadata[f"PhysicalSize{axis}"] = pixel_size_um
            metadata[f"PhysicalSize{axis}Unit"] = "µm"
    options: dict[str, Any] = {
        "dtype": dtype,
        "photometric": "minisblack",
        "tile": (TILE, TILE),
        "compression": "adobe_deflate",
        "compressionargs": {"level": DEFLATE_LEVEL},
        # Bio-Formats undoes differences of integers, not of floats.
        "predictor": dtype.kind == "u",
        "maxworkers": usable_cores(),
        "buffersize": WAITING_BYTES,
    }
    with (
        ExitStack() as scratch,
        tifffile.TiffWriter(path, bigtiff=stored_bytes > CLASSIC_BYTES, ome=True) as tiff,
    ):
        bands = _bands(image, dtype, high)
        for level, (height, width) in enumerate(sizes):
            last = level + 1 == len(sizes)
            smaller = None if last else scratch.enter_context(tempfile.TemporaryFile(dir=path.parent))
            if pixel_size_um:
                # The same for readers that know plain TIFF only, which count pixels per centimetre.
                options["resolution"] = (1e4 / (pixel_size_um * 2**level),) * 2
                options["resolutionunit"] = "CENTIMETER"
            if level == 0:
                options |= {"subifds": len(sizes) - 1, "metadata": metadata, "software": f"orion-unet {__version__}"}
            else:
                options |= {"subifds": None, "subfiletype": 1, "metadata": None, "software": False}
            tiff.write(_tiles(bands, smaller), shape=(len(image), height, width), **options)
            if smaller is not None:
                smaller.seek(0)
                bands = _stored_bands(smaller, len(image), *sizes[level + 1], dtype)


def _printable(text: str) -> str:
    """Text without control characters, which XML does not allow."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def pyramid_sizes(height: int, width: int) -> list[tuple[int, int]]:
    """Height and width of every level: halved, rounded up, until both sides are at most 512."""
    sizes = [(height, width)]
    while max(sizes[-1]) > TILE:
        sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))
    return sizes


def _bands(image: np.ndarray, dtype: np.dtype, high: float) -> Iterator[np.ndarray]:
    """Bands of up to TILE rows, channel after channel, in the stored dtype."""
    for plane in image:
        for top in range(0, plane.shape[0], TILE):
            band = np.array(plane[top : top + TILE], np.float32)
            release(image)
            if dtype.kind == "u":
                band *= np.float32(WHITE / high)
                np.rint(band, out=band)
                np.clip(band, 0, WHITE, out=band)
            yield band.astype(dtype, copy=False)


def _stored_bands(file: IO[bytes], channels: int, height: int, width: int, dtype: np.dtype) -> Iterator[np.ndarray]:
    for _ in range(channels):
        for top in range(0, height, TILE):
            rows = min(TILE, height - top)
            yield np.fromfile(file, dtype, rows * width).reshape(rows, width)


def _tiles(bands: Iterator[np.ndarray], smaller: IO[bytes] | None) -> Iterator[np.ndarray]:
    """Tiles in the order of the file; every band, halved, also goes to ``smaller``, which so becomes the next level."""
    for band in bands:
        if smaller is not None:
            smaller.write(halve(band).data)
        for left in range(0, band.shape[1], TILE):
            yield band[:, left : left + TILE]


def halve(band: np.ndarray) -> np.ndarray:
    """Mean over 2 x 2 pixels of (H, W) in its own dtype, rounded for integers; an odd edge means over what there is."""
    band = np.pad(band, [(0, size % 2) for size in band.shape], mode="edge")
    mean = band[::2, ::2].astype(np.float32)
    for row, column in ((0, 1), (1, 0), (1, 1)):
        mean += band[row::2, column::2]
    mean *= 0.25
    return (np.rint(mean) if band.dtype.kind == "u" else mean).astype(band.dtype, copy=False)


def release(array: np.ndarray) -> None:
    """Free the pages of a memory map that were read, so that a file larger than memory does not fill it.

    The values stay the same; pages are read again when needed. Does nothing for an array in memory.
    """
    owner: Any = array
    while isinstance(owner, np.ndarray):
        if getattr(owner, "mode", "r") == "c":
            return  # private changes live in those pages alone
        owner = owner.base
    if isinstance(owner, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        owner.madvise(mmap.MADV_DONTNEED)


def channel_colours(names: Sequence[str]) -> list[tuple[int, int, int]]:
    """An RGB colour in 0..255 for each channel, distinct on black; blue is for a nuclear stain alone."""
    palette = iter(_palette(len(names)))
    nuclear = nuclear_channel(names)
    return [NUCLEAR_BLUE if index == nuclear else next(palette) for index in range(len(names))]


@cache
def _palette(count: int) -> list[tuple[int, int, int]]:
    """Bright colours, each the one that is furthest (in CIELAB) from blue, from black, and from all before it."""
    from skimage.color import rgb2lab

    steps = np.arange(0, 256, 15)
    rgb = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 3)
    lab = rgb2lab(rgb / 255.0)
    bright = lab[:, 0] > 45
    rgb, lab = rgb[bright], lab[bright]
    distance = np.linalg.norm(lab - rgb2lab(np.array(NUCLEAR_BLUE) / 255.0), axis=1)
    colours = []
    for _ in range(count):
        chosen = int(distance.argmax())
        red, green, blue = rgb[chosen].tolist()
        colours.append((red, green, blue))
        distance = np.minimum(distance, np.linalg.norm(lab - lab[chosen], axis=1))
    return colours


def _signed_rgba(colour: tuple[int, int, int]) -> int:
    """OME's form of a colour: R, G, B and alpha as the bytes of one signed 32-bit number."""
    return int.from_bytes(bytes((*colour, 255)), "big", signed=True)
