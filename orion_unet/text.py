"""Text of unknown origin made safe to show: nothing in it may move a cursor, reorder a line or hide."""

from __future__ import annotations

import unicodedata
from typing import Any

_ESCAPED = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def clean(value: Any, limit: int = 120) -> str:
    r"""One line of printable text, at most ``limit`` characters.

    Control characters, terminal escapes, bidirectional overrides, surrogates and line breaks appear as ``\x1b``
    or ``\u202e``; a third combining mark in a row (text that climbs over its neighbours) is left out.
    """
    text = value if isinstance(value, str) else repr(value)
    shown: list[str] = []
    marks = 0
    for char in text[:limit]:
        category = unicodedata.category(char)
        marks = marks + 1 if category in ("Mn", "Me") else 0
        if category in _ESCAPED:
            code = ord(char)
            shown.append(f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}")
        elif category == "Zs":
            shown.append(" ")
        elif marks <= 2:
            shown.append(char)
    line = "".join(shown)
    return line if len(line) <= limit and len(text) <= limit else line[: limit - 1] + "…"


def short_number(value: float | None, digits: int = 4) -> str:
    """A number for a person, ``-`` where there is none."""
    if value is None or value != value:
        return "-"
    if abs(value) >= 1e30:
        return "not finite"
    return f"{value:.{digits}g}"


def duration(seconds: float | None) -> str:
    """Seconds as ``41 s``, ``12 min`` or ``3 h 20 min``; ``-`` where unknown."""
    if seconds is None or not 0 <= seconds < 1e9:
        return "-"
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"
