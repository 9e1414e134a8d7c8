"""CSV files that assign every core of a folder to something: to a group (groups.csv), to a panel (panels.csv)."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from orion_unet.errors import InputError


def read_assignments(path: Path, names: Sequence[str], what: str, only_these: bool = False) -> list[str]:
    """What each of the named cores is assigned to, from a CSV with the columns core and ``what``.

    Rows of other cores are ignored, or refused with ``only_these``. Raises InputError that names every bad row.
    """
    try:
        text = io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="")
        rows = list(csv.DictReader(text, skipinitialspace=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as CSV ({error})") from None
    if not rows or not {"core", what} <= set(rows[0]):
        raise InputError(f"{path}: needs a header line core,{what} and one row per core")
    mapping: dict[str, str] = {}
    problems = []
    for row in rows:
        core, assigned = (row["core"] or "").strip(), (row[what] or "").strip()
        if not core and not assigned:
            continue
        if mapping.setdefault(core, assigned) != assigned:
            problems.append(f"{core}: is in two {what}s, {mapping[core]} and {assigned}")
        elif not assigned:
            problems.append(f"{core}: has no {what}")
    problems += [f"{name}: has no row" for name in names if name not in mapping]
    if only_these:
        known = set(names)
        problems += [f"{core}: is not among the pairs" for core in mapping if core not in known]
    if problems:
        raise InputError.listing(f"{path}: does not assign every core to one {what}:", problems)
    return [mapping[name] for name in names]
