"""Reads TIFF of every kind (OME-TIFF, pyramids, ImageScope's SVS) at full resolution, one tile or strip at a time."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from orion_unet.errors import InputError, RunError
from orion_unet.slides.images import ArrayImage, HeImage
from orion_unet.slides.pixel_size import MICROMETRES, UNKNOWN_PIXEL_SIZE, PixelSize, positive, square_pixel
from orion_unet.slides.remote import RemoteFile, RemotePath, is_remote
from orion_unet.slides.segments import Segments
from orion_unet.slides.tiff_tiles import JPEGS, TiffTiles

T = TypeVar("T")

# TIFF's codes for colours and a compression.
GRAY, RGB, YCBCR = 1, 2, 6
YCBCR_JPEG_2000 = 33003
# A level is smaller by more than this factor, and its proportions differ by less than this fraction (rounding).
SMALLER, SAME_PROPORTIONS = 1.2, 0.02
# A level may be smaller than what is asked for by this factor: sides are rounded.
LOOSE = 1.01


class TiffImage(HeImage):
    """One level of a TIFF whose pixels are in one page (interleaved or planar) or in one page per channel.

    ``levels`` are the pages of its further levels, the largest first.
    """

    is_slide = True

    def __init__(
        self,
        path: Path,
        tiff: Any,
        planes: list[Any],
        pixel_size: PixelSize,
        levels: Sequence[list[Any]] = (),
        level: int = 0,
    ) -> None:
        tiles = TiffTiles(path, tiff, planes, blank_glass(planes), level)
        self._segments = Segments(tiles)
        super().__init__(path, tiles.shape, tiles.blank, pixel_size)
        self._tiff, self._levels = tiff, levels
        self._opened: list[Segments] = []

    def stored(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        return self._segments.read((0, 1, 2), y, x, height, width)

    def nearest_level(self, factor: float) -> HeImage:
        for number, planes in reversed(list(enumerate(self._levels, 1))):
            if self.shape[0] / planes[0].keyframe.imagelength <= factor * LOOSE:
                # A damaged level is left out; a larger one serves.
                with suppress(InputError):
                    level = TiffImage(self.path, self._tiff, planes, UNKNOWN_PIXEL_SIZE, level=number)
                    self._opened.append(level._segments)
                    return level
        return self

    def close(self) -> None:
        for segments in (self._segments, *self._opened):
            segments.close()
        self._tiff.close()


def open_tiff(path: Path) -> HeImage:
    """Open a TIFF at full resolution; raises InputError if it is damaged or not an RGB image."""
    return parsed_tiff(path, _open)


def parsed_tiff(path: Path, use: Callable[[Path, Any, Any], T]) -> T:
    """What ``use`` makes of the path, the open TIFF and its first series at full resolution.

    ``use`` closes the TIFF, or hands it on; where it fails, it is closed here. Raises InputError if it is damaged.
    """

    try:
        source: Any = RemoteFile(path) if isinstance(path, RemotePath) else path
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    try:
        found = _used(path, source, use)
    except Exception as error:
        failure = getattr(source, "failure", None)
        raise failure or error from None
    if isinstance(source, RemoteFile) and source.failure is not None:
        # tifffile goes on without what it could not read, and would leave out pages.
        raise source.failure
    return found


def _used(path: Path, source: Any, use: Callable[[Path, Any, Any], T]) -> T:
    import tifffile

    try:
        tiff = tifffile.TiffFile(source)
    except Exception as error:
        # On damaged bytes tifffile can raise almost anything.
        raise InputError(f"{path}: is damaged, truncated or no TIFF ({error})") from None
    try:
        try:
            series = tiff.series[0].levels[0]
        except Exception:
            # libvips copies the description of its input to every page of a pyramid, and tifffile believes it.
            tiff.close()
            tiff = tifffile.TiffFile(source)
            series = first_page(tiff)
        return use(path, tiff, series)
    except Exception as error:
        tiff.close()
        if isinstance(error, InputError | RunError):
            raise
        raise InputError(f"{path}: is damaged or of a kind that cannot be read ({error})") from None


def first_page(tiff: Any) -> Any:
    """A series of the first page alone; raises ValueError if a later page is larger."""
    import tifffile

    first = tiff.pages[0]
    if any(page.imagelength > first.imagelength or page.imagewidth > first.imagewidth for page in tiff.pages):
        raise ValueError("its description does not fit its pages, and the first page is not the largest")
    return tifffile.TiffPageSeries([first])


def _open(path: Path, tiff: Any, series: Any) -> HeImage:
    page, planes = series.keyframe, he_planes(path, series)
    pixel_size = tiff_pixel_size(tiff, page)
    if not is_remote(path) and series.dataoffset is not None and (len(planes) == 3 or page.samplesperpixel == 3):
        image = _mapped(path, tiff, series, page, planes, pixel_size)
        tiff.close()
        return image
    return TiffImage(path, tiff, planes, pixel_size, smaller_levels(tiff, series, len(planes)))


def he_planes(path: Path, series: Any) -> list[Any]:
    """The one page or three pages of an H&E; raises InputError if it is none."""
    page = series.keyframe
    planes = [page] if len(series.pages) == 1 else list(series.pages)
    refused = _refusal(series, page, planes)
    if refused:
        raise InputError(f"{path}: {refused}")
    return planes


def blank_glass(planes: list[Any]) -> int:
    """Value of the tiles that a scanner leaves out: those of empty glass."""
    return int(np.iinfo(planes[0].keyframe.dtype).max)


def smaller_levels(tiff: Any, series: Any, planes: int) -> list[list[Any]]:
    """The pages of every smaller copy of the same image, the largest first: the levels of the series, else later pages
    of the file, as many of a size as there are planes, in the same proportions."""
    page = series.keyframe
    found = [[level.keyframe] if planes == 1 else list(level.pages) for level in series.levels[1:]]
    if not found:
        by_size: dict[tuple[int, int], list[Any]] = {}
        for page_or_frame in tiff.pages:
            other = page_or_frame.aspage()
            size = (int(other.imagelength), int(other.imagewidth))
            by_size.setdefault(size, []).append(other)
        found = [pages for pages in by_size.values() if len(pages) == planes]
    levels = []
    for pages in found:
        if None in pages:
            continue
        first = pages[0].keyframe
        same = first.samplesperpixel == page.samplesperpixel and first.dtype == page.dtype
        down, across = page.imagelength / first.imagelength, page.imagewidth / first.imagewidth
        # Labels and overviews of the glass have other proportions.
        if same and down > SMALLER and abs(down / across - 1) < SAME_PROPORTIONS:
            levels.append(pages)
    return sorted(levels, key=lambda pages: -int(pages[0].keyframe.imagelength))


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
    opener = mapped_array(path, tiff, series, (3, *size) if planar else (*size, 3))
    image = ArrayImage(path, opener, "chw" if planar else "hwc", pixel_size)
    image.is_slide = True
    return image


def mapped_array(path: Path, tiff: Any, series: Any, shape: tuple[int, ...]) -> Callable[[], np.ndarray]:
    """What opens a memory map of pixels that are stored uncompressed and in one piece; raises InputError where the
    file ends before they do."""
    dtype = series.keyframe.dtype.newbyteorder(tiff.byteorder)
    offset = int(series.dataoffset)
    if offset + int(np.prod(shape)) * dtype.itemsize > tiff.filehandle.size:
        raise InputError(f"{path}: is truncated, its pixels continue past the end of the file")

    def open_array() -> np.ndarray:
        try:
            return np.memmap(path, dtype, "r", offset, shape)
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read any more, it has changed or gone ({error})") from None

    return open_array


def tiff_pixel_size(tiff: Any, page: Any) -> PixelSize:
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
