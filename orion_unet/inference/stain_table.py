"""image_stain.csv: for every predicted image, whether its H&E is stained like those of the training."""

from __future__ import annotations

import fcntl
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from orion_unet.data.stain import FEATURES, OUTSIDE, StainJudgement
from orion_unet.errors import InputError, RunError
from orion_unet.inference.outputs import read_table
from orion_unet.run_log import write_atomic
from orion_unet.text import csv_bytes

STAIN_FILE = "image_stain.csv"
COLUMNS = ["image", "stain", "stain_distance", "stain_limit", *(name.replace(" ", "_") for name in FEATURES)]


def add_stain(folder: Path, image: str, found: StainJudgement) -> None:
    """Write or replace the row of an image.

    Raises InputError where the file is another table, RunError where it cannot be written.
    """
    path = folder / STAIN_FILE
    with _alone(folder):
        rows: dict[str, list[Any]] = {name: list(row) for name, *row in read_table(path, COLUMNS) or []}
        rows[image] = [found.state, found.distance, found.limit, *found.values.tolist()]
        _write(path, rows)


def drop_stain(folder: Path, image: str) -> None:
    """Remove the row of an image where there is one; raises as ``add_stain`` does."""
    path = folder / STAIN_FILE
    with _alone(folder):
        rows: dict[str, list[Any]] = {name: list(row) for name, *row in read_table(path, COLUMNS) or []}
        if rows.pop(image, None) is not None:
            _write(path, rows)


def read_stain(folder: Path) -> dict[str, StainJudgement]:
    """What image_stain.csv of a folder says of each image; nothing where there is none. Raises InputError."""
    path = folder / STAIN_FILE
    found = {}
    for image, state, *numbers in read_table(path, COLUMNS) or []:
        try:
            distance, limit = (float(text) if text else math.nan for text in numbers[:2])
        except ValueError:
            raise InputError(f"{path}: is damaged, {numbers[:2]} are no numbers") from None
        found[image] = StainJudgement(state, distance, limit, f"see {STAIN_FILE}")
    return found


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, so that processes that predict into one folder keep each other's rows."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        # Some network file systems have no locks; there the last writer wins.
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _write(path: Path, rows: dict[str, list[Any]]) -> None:
    try:
        write_atomic(path, csv_bytes(COLUMNS, ([name, *row] for name, row in rows.items())))
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror or error})") from error


def stain_warning(image: str, found: StainJudgement) -> str:
    """A sentence where the image's stain is foreign to the model, else nothing."""
    return f"warning: {image}: {found.sentence()}; its prediction may be wrong" if found.state == OUTSIDE else ""
