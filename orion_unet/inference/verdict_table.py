"""marker_verdicts.csv: the verdict on every marker of a model, which predict writes and quantify reads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from orion_unet.errors import InputError
from orion_unet.inference.outputs import read_table
from orion_unet.inference.trust import UNKNOWN, VERDICTS, MarkerTrust
from orion_unet.text import csv_bytes

VERDICTS_FILE = "marker_verdicts.csv"
COLUMNS = ["marker", "verdict", "pearson", "pearson_low", "pearson_high", "regression_pearson"]


def verdict_rows(names: Sequence[str], trust: Mapping[str, MarkerTrust]) -> list[list[str | float]]:
    """A row for each marker, in the order of ``COLUMNS``; NaN where a number is unknown."""
    rows = [(name, trust.get(name, UNKNOWN)) for name in names]
    return [[name, found.verdict, found.pearson, found.low, found.high, found.regression] for name, found in rows]


def verdicts_file(output_dir: Path, names: Sequence[str], trust: Mapping[str, MarkerTrust]) -> tuple[Path, str]:
    """The table of the verdicts on the markers of a model, and its content."""
    return output_dir / VERDICTS_FILE, csv_bytes(COLUMNS, verdict_rows(names, trust)).decode()


def read_verdicts(folder: Path) -> dict[str, MarkerTrust] | None:
    """The verdicts by marker on the predictions of a folder; None where it has no table. Raises InputError."""
    path = folder / VERDICTS_FILE
    rows = read_table(path, COLUMNS)
    if rows is None:
        return None
    found = {}
    for name, verdict, *texts in rows:
        try:
            pearson, low, high, regression = (float(text) if text else math.nan for text in texts)
        except ValueError:
            raise InputError(f"{path}: is damaged, {texts} are no numbers") from None
        if verdict not in VERDICTS:
            raise InputError(f"{path}: is damaged, {verdict!r} is none of {', '.join(VERDICTS)}")
        found[name] = MarkerTrust(pearson, low, high, regression, verdict)
    return found
