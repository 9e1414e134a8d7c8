"""Text for people: names of unknown origin made safe to show, numbers, durations, CSV.

Names of channels, cores and files come from whoever made them. Shown as they are, they could move a terminal's
cursor, reorder a line, hide part of it, or be read as a formula by matplotlib.
"""

from __future__ import annotations

import csv
import io
import math
import unicodedata
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any

NAMED = 8
_ESCAPED = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def clean(value: Any, limit: int | None = 120) -> str:
    r"""One line of printable text, for terminals and pages; at most ``limit`` characters (None: all of them).

    Control characters, terminal escapes, bidirectional overrides, surrogates and line breaks appear as ``\x1b`` or
    ``\u202e``. Only two combining marks in a row are kept: more would climb over the neighbouring lines. The result
    may still hold rich markup or HTML: print it as ``rich.text.Text``, or escape it.
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
    return line if limit is None or max(len(line), len(text)) <= limit else line[: limit - 1] + "…"


def clean_lines(text: str) -> str:
    """Text of several lines, each of them cleaned, none of them shortened."""
    return "\n".join(clean(line, None) for line in text.split("\n"))


def named(items: Iterable[str]) -> str:
    """A list for a sentence; only the first NAMED items, and how many more there are."""
    items = list(items)
    rest = len(items) - NAMED
    return ", ".join(items[:NAMED]) + (f", and {rest} more" if rest > 0 else "")


def for_figure(value: Any, limit: int | None = 120) -> str:
    """``clean`` text that matplotlib shows as it is: a dollar sign starts no formula."""
    return clean(value, limit).replace("$", r"\$")


def short_number(value: float | None, digits: int = 4) -> str:
    """A number with ``digits`` significant digits; ``-`` for None and nan, ``not finite`` from 1e30 on."""
    if value is None or value != value:
        return "-"
    if abs(value) >= 1e30:
        return "not finite"
    return f"{value:.{digits}g}"


def duration(seconds: float | None) -> str:
    """Seconds as ``0.042 s``, ``4.2 s``, ``41 s``, ``12 min``, ``3 h 20 min`` or ``2 d 7 h``; ``-`` where unknown."""
    if seconds is None or not 0 <= seconds < 1e9:
        return "-"
    if seconds < 1:
        return f"{seconds:.2g} s"
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


def csv_bytes(columns: Sequence[str], rows: Iterable[Sequence[Any]], digits: int = 6) -> bytes:
    """A CSV file in UTF-8 with a heading; fractions have ``digits`` significant digits.

    What is undefined (None, nan or infinite) is an empty cell.
    """
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_cell(value, digits) for value in row] for row in rows)
    return file.getvalue().encode("utf-8", "backslashreplace")


def _cell(value: Any, digits: int) -> str:
    if value is None:
        return ""
    if isinstance(value, Real) and not isinstance(value, Integral):
        return f"{float(value):.{digits}g}" if math.isfinite(value) else ""
    return str(value)
