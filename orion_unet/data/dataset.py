"""dataset.json: what a folder of pairs says of itself."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from orion_unet.config import DataOptions
from orion_unet.data.pairs import PairTable, find_pairs
from orion_unet.errors import InputError
from orion_unet.run_log import SCHEMA
from orion_unet.slides.pixel_size import LARGEST_UM, SMALLEST_UM

DATASET_FILE = "dataset.json"
# Two statements of one pixel size may differ by rounding, as a fraction.
ROUNDING = 0.01


def dataset_document(pixel_size_um: float | None, source: str) -> dict[str, Any]:
    """Content of dataset.json: side of a pixel in micrometres, and where the pairs come from."""
    return {"schema": SCHEMA, "pixel_size_um": pixel_size_um, "source": source}


def stated_pixel_size(folder: Path) -> float | None:
    """Side of a pixel in micrometres from the folder's dataset.json; None without the file, or where it states none.

    Raises InputError if the file cannot be used.
    """
    path = folder / DATASET_FILE
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not JSON ({error}); repair it or remove it") from None
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise InputError(f"{path}: is not a dataset.json of schema {SCHEMA}; repair it or remove it")
    stated = document.get("pixel_size_um")
    if stated is None:
        return None
    if isinstance(stated, bool) or not isinstance(stated, int | float) or not math.isfinite(stated):
        raise InputError(f"{path}: pixel_size_um is {stated!r}, not a number of micrometres")
    if not SMALLEST_UM <= stated <= LARGEST_UM:
        raise InputError(
            f"{path}: pixel_size_um is {stated:g}; microscopes have pixels of {SMALLEST_UM:g} to {LARGEST_UM:g} µm"
        )
    return float(stated)


def pixel_size(table: PairTable, given: float | None) -> float | None:
    """Side of a pixel of the pairs in micrometres, at their level: ``--pixel_size_um``, else by dataset.json, which
    states that of level 0, else as the files state it, else None.

    Raises InputError if the first two contradict each other by more than 1 %.
    """
    folder = table.folder
    stated = level_pixel_size(table)
    if given is not None and stated is not None and abs(given - stated) > ROUNDING * stated:
        raise InputError(
            f"--pixel_size_um {given:g} contradicts the {stated:g} of {folder / DATASET_FILE}: leave the option out, "
            "or correct the file"
        )
    if given is not None:
        return given
    return table.pixel_size_um if stated is None else stated


def pairs_at_size(options: DataOptions) -> PairTable:
    """The pairs as ``find_pairs`` finds them, at that level of their pyramids whose pixels have ``--pixel_size_um``, if
    there is one. Raises InputError.
    """
    table = find_pairs(options)
    given, level = options.pixel_size_um, options.level
    stated = level_pixel_size(table) or table.pixel_size_um
    if given is None or stated is None or level or given <= stated * (1 + ROUNDING):
        return table
    while True:
        level += 1
        try:
            smaller = find_pairs(replace(options, level=level))
        except InputError:
            # No pyramid, or no level of this size: the size is checked against what the folder states.
            return table
        size = stated * smaller.factor / table.factor
        if abs(given - size) <= ROUNDING * size:
            note = f"level {level} of the pyramids is used, whose pixels have the --pixel_size_um of {given:g}"
            return replace(smaller, warnings=[*smaller.warnings, note])
        if size > given:
            return table


def level_pixel_size(table: PairTable) -> float | None:
    """Side of a pixel by dataset.json at the level of the pairs; raises InputError if that file cannot be used."""
    stated = stated_pixel_size(table.folder)
    return None if stated is None else stated * table.factor
