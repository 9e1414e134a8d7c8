"""Reads TIFF of every kind (OME-TIFF, pyramids, ImageScope's SVS) at full resolution, one tile or strip at a time."""

from __future__ import annotations

import os
import re
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from orion_unet.distributed import usable_cores
from orion_unet.errors import InputError
from orion_unet.slides.images import ArrayImage, HeImage
from orion_unet.slides.pixel_size import MICROMETRES, UNKNOWN_PIXEL_SIZE, PixelSize, positive, square_pixel

# The next region overlaps this one, so some of its decoded tiles are kept. A single tile or strip may exceed
# CACHE_BYTES; above LARGEST_SEGMENT the slide is one compressed piece, which cannot be read by region.
CACHE_BYTES, LARGEST_SEGMENT = 1 << 27, 1 << 29
# TIFF's codes for colours and compressions.
GRAY, RGB, YCBCR = 1, 2, 6
JPEGS, YCBCR_JPEG_2000 = (6, 7, 34892, 33007), 33003


class TiffImage(HeImage):
    """Level 0 of a TIFF whose pixels are in one page (interleaved or planar) or in one page per channel."""

    is_slide = True

    def __init__(self, path: Path, tiff: Any, planes: list[Any], pixel_size: PixelSize) -> None:
        page = self._page = planes[0].keyframe
        white = float(np.iinfo(page.dtype).max)
        super().__init__(path, (page.imagelength, page.imagewidth), white, pixel_size)
        self._tiff, self._planes = tiff, planes
        self._planar = len(planes) > 1 or (page.planarconfig == 2 and page.samplesperpixel > 1)
        if page.is_tiled:
            self._side = (page.tilelength, page.tilewidth)
        else:
            self._side = (min(page.rowsperstrip, page.imagelength), page.imagewidth)
        self._grid = tuple(-(-length // side) for length, side in zip(self.shape, self._side, strict=True))
        self._check()
        self._kept: dict[tuple[int, int, int], np.ndarray] = {}
        self._decoders = ThreadPoolExecutor(max_workers=min(8, usable_cores()))

    def _check(self) -> None:
        """Raise InputError if reading would need unbounded memory, or if the file ends before its pixels do."""
        samples = 1 if self._planar else self._page.samplesperpixel
        segment = self._side[0] * self._side[1] * samples * self._page.dtype.itemsize
        if segment > LARGEST_SEGMENT:
            raise InputError(
                f"{self.path}: its pixels are compressed in pieces of {segment / 1e9:.1f} GB, too large to be read by "
                "region: save it as a tiled TIFF"
            )
        per_page = self._grid[0] * self._grid[1] * (3 if self._planar and len(self._planes) == 1 else 1)
        size = self._tiff.filehandle.size
        for plane in self._planes:
            offsets, counts = plane.dataoffsets, plane.databytecounts
            if min(len(offsets), len(counts)) < per_page:
                raise InputError(f"{self.path}: is damaged, it lists {len(offsets)} of its {per_page} tiles or strips")
            if max(map(sum, zip(offsets, counts, strict=False))) > size:
                raise InputError(f"{self.path}: is truncated, its pixels continue past the end of the file")

    def stored(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        # Scanners leave out tiles of empty glass.
        region = np.full((height, width, 3), int(self.white), self._page.dtype)
        if 0 in region.shape:
            return region
        rows = range(y // self._side[0], -(-(y + height) // self._side[0]))
        columns = range(x // self._side[1], -(-(x + width) // self._side[1]))
        places = list(product(rows, range(3 if self._planar else 1), columns))
        decoded: dict[tuple[int, int, int], np.ndarray] = {}
        for place, pixels in zip(places, self._decoders.map(self._segment, places), strict=True):
            if pixels is None:
                continue
            decoded[place] = pixels
            row, channel, column = place
            top, left = row * self._side[0], column * self._side[1]
            up, down = max(top, y), min(top + pixels.shape[0], y + height)
            start, end = max(left, x), min(left + pixels.shape[1], x + width)
            part = pixels[up - top : down - top, start - left : end - left]
            if self._planar:
                region[up - y : down - y, start - x : end - x, channel] = part[..., 0]
            else:
                region[up - y : down - y, start - x : end - x] = part[..., :3]
        self._keep(decoded)
        return region

    def _segment(self, place: tuple[int, int, int]) -> np.ndarray | None:
        """Decoded tile or strip (h, w, samples) at (row, channel, column); None if the file leaves it out."""
        if place in self._kept:
            return self._kept[place]
        row, channel, column = place
        one_page = len(self._planes) == 1
        plane = self._planes[0 if one_page else channel]
        index = row * self._grid[1] + column
        if one_page:
            index += channel * self._grid[0] * self._grid[1]
        offset, count = plane.dataoffsets[index], plane.databytecounts[index]
        if not count:
            return None
        tables = {"jpegtables": plane.jpegtables, "jpegheader": self._page.jpegheader}
        try:
            data = os.pread(self._tiff.filehandle.fileno(), count, offset)
            if len(data) < count:
                raise ValueError("the file ends here")
            pixels = self._page.decode(data, index, **(tables if self._page.compression in JPEGS else {}))[0]
        except Exception as error:
            # On damaged bytes a decoder can raise almost anything.
            raise InputError(
                f"{self.path}: is damaged or truncated at row {row * self._side[0]}, column "
                f"{column * self._side[1]} ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
            ) from None
        return None if pixels is None else pixels[0]

    def _keep(self, decoded: dict[tuple[int, int, int], np.ndarray]) -> None:
        """Keep the lowest tiles of this region, at least one: the next region begins among them."""
        self._kept, held = {}, 0
        for place, pixels in reversed(decoded.items()):
            held += pixels.nbytes
            if held > CACHE_BYTES and self._kept:
                break
            self._kept[place] = pixels

    def close(self) -> None:
        self._decoders.shutdown()
        self._tiff.close()


def open_tiff(path: Path) -> HeImage:
    """Open a TIFF at full resolution; raises InputError if it is damaged or not an RGB image."""
    import tifffile

    try:
        tiff = tifffile.TiffFile(path)
    except Exception as error:
        # On damaged bytes tifffile can raise almost anything.
        raise InputError(f"{path}: is damaged, truncated or no TIFF ({error})") from None
    try:
        try:
            series = tiff.series[0].levels[0]
        except Exception:
            # libvips copies the description of its input to every page of a pyramid, and tifffile believes it.
            tiff.close()
            tiff = tifffile.TiffFile(path)
            series = _first_page(tiff)
        return _open(path, tiff, series)
    except Exception as error:
        tiff.close()
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: is damaged or of a kind that cannot be read ({error})") from None


def _first_page(tiff: Any) -> Any:
    """A series of the first page alone; raises ValueError if a later page is larger."""
    import tifffile

    first = tiff.pages[0]
    if any(page.imagelength > first.imagelength or page.imagewidth > first.imagewidth for page in tiff.pages):
        raise ValueError("its description does not fit its pages, and the first page is not the largest")
    return tifffile.TiffPageSeries([first])


def _open(path: Path, tiff: Any, series: Any) -> HeImage:
    page = series.keyframe
    planes = [page] if len(series.pages) == 1 else list(series.pages)
    refused = _refusal(series, page, planes)
    if refused:
        raise InputError(f"{path}: {refused}")
    pixel_size = _pixel_size(tiff, page)
    if series.dataoffset is not None and (len(planes) == 3 or page.samplesperpixel == 3):
        image = _mapped(path, tiff, series, page, planes, pixel_size)
        tiff.close()
        return image
    return TiffImage(path, tiff, planes, pixel_size)


def _refusal(series: Any, page: Any, planes: list[Any]) -> str:
    """Why this is not an H&E; empty if it is one."""
    samples, meaning = page.samplesperpixel, int(page.photometric)
    if page.imagedepth > 1 or None in planes:
        return f"is a stack of shape {series.shape}, not one image"
    if len(planes) > 1:
        if len(planes) != 3 or samples != 1 or series.axes[0] not in "CSQ" or meaning not in (GRAY, RGB):
            return f"has {len(planes)} planes of {samples} samples ({series.axes}); an H&E has 3 channels"
    elif samples not in (3, 4) or meaning not in (GRAY, RGB, YCBCR) or (samples == 4 and meaning != RGB):
        kind = getattr(page.photometric, "name", str(meaning)).lower()
        return f"has {samples} samples a pixel ({kind}); an H&E has the three channels red, green, blue"
    if page.dtype not in (np.uint8, np.uint16) or page.bitspersample not in (8, 16):
        return f"has pixels of {page.bitspersample} bits ({page.dtype}); use uint8 or uint16"
    if page.compression == YCBCR_JPEG_2000 or (meaning == YCBCR and page.compression not in JPEGS):
        return f"has colours stored as YCbCr under {page.compression.name.lower()} compression: save it as RGB"
    return ""


def _mapped(path: Path, tiff: Any, series: Any, page: Any, planes: list[Any], pixel_size: PixelSize) -> HeImage:
    """Maps pixels that are stored uncompressed and in one piece."""
    planar = len(planes) == 3 or page.planarconfig == 2
    size = (page.imagelength, page.imagewidth)
    shape = (3, *size) if planar else (*size, 3)
    dtype = page.dtype.newbyteorder(tiff.byteorder)
    offset = int(series.dataoffset)
    if offset + int(np.prod(shape)) * dtype.itemsize > tiff.filehandle.size:
        raise InputError(f"{path}: is truncated, its pixels continue past the end of the file")

    def open_array() -> np.ndarray:
        try:
            return np.memmap(path, dtype, "r", offset, shape)
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read any more, it has changed or gone ({error})") from None

    image = ArrayImage(path, open_array, "chw" if planar else "hwc", pixel_size)
    image.is_slide = True
    return image


def _pixel_size(tiff: Any, page: Any) -> PixelSize:
    """The first size that OME-XML, ImageScope's description and the resolution tags (ImageJ's, too) state.

    If none states a size to believe, the first doubt.
    """
    stated = [_ome_pixel_size(tiff.ome_metadata) if tiff.is_ome else UNKNOWN_PIXEL_SIZE]
    scanned = re.search(r"\bMPP\s*=\s*([0-9.]+)", page.description or "")
    stated.append(square_pixel(positive(scanned.group(1) if scanned else None), None))
    if tiff.is_imagej:
        unit = str((tiff.imagej_metadata or {}).get("unit", "")).replace("\\u00B5", "µ")
        unit_um = MICROMETRES.get(unit)
    else:
        unit_um = {2: 25400.0, 3: 1e4, 4: 1e3, 5: 1.0}.get(int(page.resolutionunit))
    if unit_um:
        stated.append(square_pixel(*(unit_um / per_unit if per_unit > 0 else None for per_unit in page.resolution)))
    known = [size for size in stated if size.um is not None]
    doubted = [size for size in stated if size.doubt]
    return next(iter(known + doubted), UNKNOWN_PIXEL_SIZE)


def _ome_pixel_size(xml: str | None) -> PixelSize:
    try:
        root = ElementTree.fromstring(xml or "")
    except ElementTree.ParseError:
        return UNKNOWN_PIXEL_SIZE
    pixels = next((element for element in root.iter() if element.tag.rpartition("}")[2] == "Pixels"), None)
    if pixels is None:
        return UNKNOWN_PIXEL_SIZE
    sizes = [positive(pixels.get(f"PhysicalSize{axis}")) for axis in "XY"]
    units = [pixels.get(f"PhysicalSize{axis}Unit") for axis in "XY"]
    lengths_um: list[float | None] = []
    for size, unit in zip(sizes, (units[0] or units[1], units[1] or units[0]), strict=True):
        if size is not None and unit not in (None, *MICROMETRES):
            return PixelSize(doubt=f"it states {size:g} {unit}, which is no length")
        if size == 1 and unit is None:
            # Micrometres by the schema; in practice the default of converters that do not know the size.
            return PixelSize(doubt="it states 1 without a unit")
        lengths_um.append(None if size is None else size * MICROMETRES[unit or "µm"])
    return square_pixel(*lengths_um)
