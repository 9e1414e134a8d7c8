"""The side of a pixel as files state it: in which unit, and whether to believe it."""

from __future__ import annotations

# A size outside these is that of a screen or a printer, not of a microscope.
SMALLEST_UM, LARGEST_UM = 0.05, 20.0
MICROMETRES = {"µm": 1.0, "μm": 1.0, "um": 1.0, "micron": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6}


def believable(pixel_size_um: float | None) -> float | None:
    """A pixel size that a microscope can have, or None."""
    if pixel_size_um is None or not SMALLEST_UM <= pixel_size_um <= LARGEST_UM:
        return None
    return pixel_size_um


def positive(text: str | None) -> float | None:
    """A finite number above 0 from text, or None."""
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if 0 < number < float("inf") else None
