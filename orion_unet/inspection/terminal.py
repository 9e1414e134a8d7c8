"""Prints an inspection: tables that fit 80 columns and use more where there are more, then the warnings."""

from __future__ import annotations

import math
from collections import Counter
from typing import TextIO

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from orion_unet.inspection.check import Inspection
from orion_unet.inspection.findings import mismatched, remark
from orion_unet.text import clean

WIDE = 110
NAME_WIDTH, WIDE_NAME = 15, 24
MOST_CORES = 24
# Headings, and whether narrow terminals show them too.
CHANNEL_HEADINGS = (
    ("min", False), ("1 %", True), ("50 %", True), ("99 %", True), ("99.9 %", True), ("max", True),
    ("mean", True), ("threshold", False), ("positive", True), ("satur.", True),
)  # fmt: skip


def show(inspection: Inspection, file: TextIO) -> None:
    """Print the inspection. Names and paths are cleaned, and never interpreted as markup."""
    console = Console(
        file=file, markup=False, highlight=False, emoji=False, force_terminal=file.isatty(), legacy_windows=False
    )
    wide = console.width >= WIDE
    console.print(Text(_summary(inspection)))
    console.print()
    console.print(_channel_table(inspection, wide))
    console.print(
        Text(
            f"Intensities are stored values / full scale, from {inspection.sampled_pixels:,} sampled pixels. positive: "
            "above the median + 5 sd of the background; satur.: at the largest value, if enough pixels share it.",
            style="dim",
        )
    )
    console.print()
    console.print(_core_table(inspection, wide))
    if inspection.nuclear:
        console.print(
            Text(
                f"r: correlation of {clean(inspection.nuclear)} with the haematoxylin, as stored and after the best "
                "shift of the marker (pixels down, right).",
                style="dim",
            )
        )
    if len(inspection.cores) > MOST_CORES:
        console.print(Text(f"and {len(inspection.cores) - MOST_CORES} more: --output_dir writes them all", style="dim"))
    console.print()
    for note in inspection.notes:
        console.print(Text(f"note: {clean(note, None)}"))
    for finding in inspection.findings:
        console.print(
            Text("warning: ", style="bold yellow").append(clean(finding.message, None), style="not bold default")
        )
        for advice in finding.advice:
            if advice.startswith("python "):
                # In one line, so that it can be pasted.
                console.print(Text(" " * 9 + clean(advice, None)), soft_wrap=True)
            else:
                console.print(Padding(Text(clean(advice, None)), (0, 0, 0, 9), expand=False))
    if not inspection.findings:
        console.print(Text("Nothing wrong was found.", style="green"))


def _summary(inspection: Inspection) -> str:
    cores = inspection.cores
    sizes = Counter((core.height, core.width) for core in cores)
    size = " x ".join(map(str, next(iter(sizes)))) if len(sizes) == 1 else _range(sizes)
    stored = "; ".join(
        f"{'H&E' if modality == 'he' else 'ORION'} {dtype} {layout}" + (f" ({count})" if count < len(cores) else "")
        for (modality, dtype, layout), count in inspection.formats.items()
    )
    groups = len(set(inspection.split.groups))
    return (
        f"{clean(str(inspection.table.folder), None)}: {len(cores)} cores of {size} pixels in {groups} groups, "
        f"{len(inspection.channels)} channels\n"
        f"stored as {stored}\n"
        f"a split at the default seed: {len(inspection.split.train)} training and {len(inspection.split.val)} "
        "validation cores"
    )


def _range(sizes: Counter[tuple[int, int]]) -> str:
    heights, widths = zip(*sizes, strict=True)
    return f"{min(heights)} x {min(widths)} to {max(heights)} x {max(widths)}"


def _table(first: str) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column(first, no_wrap=True)
    return table


def _channel_table(inspection: Inspection, wide: bool) -> Table:
    table = _table("channel")
    shown = [wide or always for _, always in CHANNEL_HEADINGS]
    for (heading, _), keep in zip(CHANNEL_HEADINGS, shown, strict=True):
        if keep:
            table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for row in inspection.channels:
        numbers = (row.low, *row.quantiles, row.high, row.mean, row.threshold)
        cells = [*map(number, numbers), share(row.positive), share(row.saturated)]
        table.add_row(
            _name(row.name, wide),
            *(Text(cell) for cell, keep in zip(cells, shown, strict=True) if keep),
            Text(row.state, style="yellow"),
        )
    return table


def _core_table(inspection: Inspection, wide: bool) -> Table:
    table = _table("core")
    headings = ["tissue"]
    if inspection.nuclear:
        headings += ["r", "best r", "shift"]
    if wide:
        headings = ["pixels", *headings]
    table.add_column("group", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for core in inspection.cores[:MOST_CORES]:
        cells = [f"{core.height} x {core.width}"] if wide else []
        cells.append(f"{core.tissue:.0%}")
        if core.registration is not None:
            found = core.registration
            cells += [_correlation(found.correlation), _correlation(found.best_correlation)]
            cells.append("" if found.shift is None or mismatched(core) else "{:+d}, {:+d}".format(*found.shift))
        table.add_row(
            _name(core.name, wide), _name(core.group, wide), *map(Text, cells), Text(remark(core), style="yellow")
        )
    return table


def _name(text: str, wide: bool) -> Text:
    return Text(clean(text, WIDE_NAME if wide else NAME_WIDTH))


def number(value: float) -> str:
    """An intensity in at most six characters."""
    if value == 0:
        return "0"
    return f"{value:.4f}" if 5e-5 <= abs(value) < 10 else f"{value:.0e}"


def share(value: float) -> str:
    """A share as a percentage; a tiny one is shown as ``<0.01%``, not as 0."""
    if value == 0:
        return "0"
    return "<0.01%" if value < 1e-4 else f"{100 * value:.2f}%" if value < 0.1 else f"{100 * value:.1f}%"


def _correlation(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "-"
