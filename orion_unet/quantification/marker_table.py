"""What is known of each marker: whether its prediction can be trusted, its cut-offs, and its positive cells."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from orion_unet.inference import verdict_table
from orion_unet.inference.trust import MarkerTrust
from orion_unet.quantification.cells import ImageCells
from orion_unet.quantification.positives import Positives

COLUMNS = [
    *verdict_table.COLUMNS,
    *("positive_cutoff", "measured_cutoff", "cutoff_unit", "cells", "positive"),
]
"""Columns of markers.csv and, but for the first, of ``var`` in cells.h5ad."""


def positive_counts(names: Sequence[str], positives: Positives, images: Sequence[ImageCells]) -> dict[str, int]:
    """How many cells of all images are positive, for each marker with a cut-off."""
    counts: dict[str, int] = {}
    for cells in images:
        for name, flags in positives.called(names, cells.means).items():
            counts[name] = counts.get(name, 0) + int(flags.sum())
    return counts


def marker_rows(
    names: Sequence[str],
    trust: Mapping[str, MarkerTrust] | None,
    positives: Positives,
    images: Sequence[ImageCells],
) -> list[list[Any]]:
    """A row for each marker, in the order of ``COLUMNS``; NaN for numbers, and an empty unit, where there are none."""
    counts = positive_counts(names, positives, images)
    total = sum(len(cells.numbers) for cells in images)
    rows: list[list[Any]] = []
    for row in verdict_table.verdict_rows(names, trust or {}):
        name = str(row[0])
        cutoff = positives.cutoffs.get(name)
        values = [positives.value(name, side) for side in ("predicted", "measured")]
        rows.append([*row, *values, "" if cutoff is None else cutoff.unit, total, counts.get(name, math.nan)])
    return rows
