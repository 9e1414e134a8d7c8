"""The side of a pixel as files state it: in which unit, and whether to believe it."""

from __future__ import annotations

from typing import NamedTuple

# A size outside these is that of a screen or a printer, not of a microscope.
SMALLEST_UM, LARGEST_UM = 0.05, 20.0
# Pixels whose sides differ by more than this share are not square.
LARGEST_DIFFERENCE = 0.01
# Units as OME-XML and ImageJ write them; all others, such as pixel, are no lengths.
MICROMETRES = {
    **dict.fromkeys(("µm", "μm", "um", "micron", "microns"), 1.0),
    **dict.fromkeys(("in", "inch"), 25400.0),
    "nm": 1e-3,
    "mm": 1e3,
    "cm": 1e4,
    "m": 1e6,
}


class PixelSize(NamedTuple):
    """``um``: the side of a pixel in micrometres, None where unknown; ``doubt``: why a stated size is not used."""

    um: float | None = None
    doubt: str = ""


UNKNOWN_PIXEL_SIZE = PixelSize()


def square_pixel(across_um: float | None, down_um: float | None) -> PixelSize:
    """The pixel size that both axes state, or that one states alone.

    Unknown where neither states one that a microscope can have; in doubt where they differ by more than 1 %.
    """
    stated = [size for size in (across_um, down_um) if size is not None]
    if not stated or not SMALLEST_UM <= stated[0] <= LARGEST_UM:
        return UNKNOWN_PIXEL_SIZE
    if max(stated) - min(stated) > LARGEST_DIFFERENCE * max(stated):
        return PixelSize(doubt=f"it states {stated[0]:g} µm across and {stated[1]:g} µm down")
    return PixelSize(stated[0])


def positive(text: str | None) -> float | None:
    """A finite number above 0 from text, or None."""
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if 0 < number < float("inf") else None
