"""The pixel size that a file states, in micrometres, and whether to believe it."""

from __future__ import annotations

from typing import NamedTuple

# Resolutions outside this range describe screens and printers, not microscopes.
SMALLEST_UM, LARGEST_UM = 0.05, 20.0
# A pixel is square if its sides differ by no more than this fraction.
LARGEST_DIFFERENCE = 0.01
# Units of length as OME-XML and ImageJ write them. Others, such as "pixel", are not lengths.
MICROMETRES = {
    **dict.fromkeys(("µm", "μm", "um", "micron", "microns"), 1.0),
    **dict.fromkeys(("in", "inch"), 25400.0),
    "nm": 1e-3,
    "mm": 1e3,
    "cm": 1e4,
    "m": 1e6,
}


class PixelSize(NamedTuple):
    """``um``: side of a pixel in micrometres, None if unknown. ``doubt``: why the size in the file is not used."""

    um: float | None = None
    doubt: str = ""


UNKNOWN_PIXEL_SIZE = PixelSize()


def square_pixel(across_um: float | None, down_um: float | None) -> PixelSize:
    """The pixel size from those of the two axes, either of which may be missing.

    Unknown if no microscope has such pixels, in doubt if the axes differ by more than 1 %.
    """
    stated = [size for size in (across_um, down_um) if size is not None]
    if not stated or not SMALLEST_UM <= stated[0] <= LARGEST_UM:
        return UNKNOWN_PIXEL_SIZE
    if max(stated) - min(stated) > LARGEST_DIFFERENCE * max(stated):
        return PixelSize(doubt=f"it states {stated[0]:g} µm across and {stated[1]:g} µm down")
    return PixelSize(stated[0])


def positive(text: str | None) -> float | None:
    """The number in a text if it is finite and above 0, else None."""
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if 0 < number < float("inf") else None
