"""Demo data: a folder of paired H&E and ORION cores of tissue that is drawn from a seed.

What lies where is drawn in ``tissue.py`` (with the pencils of ``shapes.py``) and stained twice in
``stains.py``. This room draws whole cores and keeps the folder.
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from orion_unet.demo.stains import MARKERS, Stain, render_he, render_orion, stain_dyes
from orion_unet.demo.tissue import Habit, draw_tissue
from orion_unet.errors import InputError
from orion_unet.run_log import write_atomic, write_json

__all__ = ["DEMO_FILE", "MARKERS", "draw_core", "holds_demo", "make_demo"]

DEMO_FILE = "demo.json"
"""Says which files of the folder were made here, and from what. Only those are ever replaced."""
NAMES_FILE, GROUPS_FILE = "channel_names.txt", "groups.csv"
CORES_PER_PATIENT = 2
VERSION = 1
"""To be raised when the same seed draws other pixels."""


def draw_core(seed: int, size: int, patient: int | None = None) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
    """One tissue-microarray core of ``size`` x ``size`` pixels (at least 64) on blank glass.

    Returns the H&E, uint8 (S, S, 3), and the ORION image of ``MARKERS``, uint16 (S, S, 20). Cores drawn with
    the same ``patient`` (a seed of its own; default: the core's) share composition and staining.
    """
    of_patient = np.random.default_rng(seed if patient is None else patient)
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1,)))
    tissue = draw_tissue(rng, size, Habit.draw(of_patient))
    stain = Stain.draw(of_patient, rng)
    dyes = stain_dyes(rng, tissue)
    return render_he(rng, dyes, stain), render_orion(rng, tissue, dyes, stain)


def make_demo(folder: Path, cores: int = 12, size: int = 512, seed: int = 0, overwrite: bool = False) -> list[str]:
    """Fill a folder with paired cores, channel_names.txt and groups.csv (two cores a patient).

    Returns the names of the cores. A folder that already holds this very set is left as it is, and one in which
    making it was interrupted is completed. ``overwrite`` replaces a set that was made here, and nothing else.

    Raises InputError for numbers out of range, for a folder that holds other pairs, and where the folder cannot
    be written.
    """
    recipe = _recipe(cores, size, seed)
    names = _names(cores)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        record = _claim(folder, recipe, overwrite)
        groups = [f"{name},patient_{i // CORES_PER_PATIENT:02d}" for i, name in enumerate(names)]
        _add(folder, record, NAMES_FILE, "\n".join([*MARKERS, ""]).encode())
        _add(folder, record, GROUPS_FILE, "\n".join(["core,group", *groups, ""]).encode())
        missing = [i for i, name in enumerate(names) if not all(_holds(folder, record, file) for file in _pair(name))]
        for i in tqdm(missing, desc="drawing cores", unit="core", disable=None):
            images = draw_core(_subseed(seed, 0, i), size, patient=_subseed(seed, 1, i // CORES_PER_PATIENT))
            for k, file in enumerate(_pair(names[i])):
                content = io.BytesIO()
                np.lib.format.write_array(content, images[k], allow_pickle=False)
                _add(folder, record, file, content.getvalue())
    except OSError as error:
        raise InputError(f"{folder}: demo data cannot be kept here ({error.strerror or error})") from None
    return names


def holds_demo(folder: Path, cores: int, size: int, seed: int) -> bool:
    """Whether the folder holds, complete, the set that ``make_demo`` makes of these numbers.

    Raises InputError for numbers out of range.
    """
    recipe, record = _recipe(cores, size, seed), _read_record(folder)
    wanted = [NAMES_FILE, GROUPS_FILE, *(file for name in _names(cores) for file in _pair(name))]
    return (
        record is not None
        and all(record.get(key) == value for key, value in recipe.items())
        and all(_holds(folder, record, name) for name in wanted)
    )


def _recipe(cores: int, size: int, seed: int) -> dict[str, int]:
    for option, value, low, high in (
        ("--cores", cores, 2, 1000),
        ("--size", size, 64, 4096),
        ("--seed", seed, 0, 2**63 - 1),
    ):
        if not low <= value <= high:
            raise InputError(f"{option} {value}: must be at least {low} and at most {high}")
    return {"version": VERSION, "cores": cores, "size": size, "seed": seed}


def _names(cores: int) -> list[str]:
    return [f"core_{i:03d}" for i in range(cores)]


def _pair(name: str) -> tuple[str, str]:
    return f"{name}_HE.npy", f"{name}_ORION.npy"


def _subseed(seed: int, stream: int, index: int) -> int:
    """The seed of one core (stream 0) or patient (stream 1): the same whatever the number of cores."""
    return int(np.random.SeedSequence(seed, spawn_key=(stream, index)).generate_state(1, np.uint64)[0])


def _read_record(folder: Path) -> dict[str, Any] | None:
    """What ``demo.json`` says was made here: the recipe, and the SHA-256 of each file. None where there is none."""
    try:
        record = json.loads((folder / DEMO_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("files"), dict):
        return None
    return record if all(Path(name).name == name for name in record["files"]) else None


def _holds(folder: Path, record: dict[str, Any], name: str) -> bool:
    return name in record["files"] and (folder / name).exists()


def _claim(folder: Path, recipe: dict[str, int], overwrite: bool) -> dict[str, Any]:
    """Make sure that the folder may be filled, clear it of an earlier set, and return the record to go on with."""
    found = sorted(path.name for path in folder.iterdir())
    # Read after the listing: of what another process is making here at this moment, the listing holds no more.
    record = _read_record(folder)
    made = {} if record is None else {**record["files"], DEMO_FILE: ""}
    reserved = (NAMES_FILE, GROUPS_FILE, DEMO_FILE)
    others = [
        name for name in found if name not in made and (name in reserved or name.endswith(("_HE.npy", "_ORION.npy")))
    ]
    if others:
        headline = f"{folder} holds files that make-demo has not made, and will not touch:"
        raise InputError.listing(headline, others, "Name another folder for the demo data.", limit=5)
    if record is not None:
        if not overwrite and all(record.get(key) == value for key, value in recipe.items()):
            return record
        present = [name for name in record["files"] if (folder / name).exists()]
        if present and not overwrite:
            held = ", ".join(f"{key} {record.get(key)}" for key in recipe)
            raise InputError(f"{folder} holds another demo set ({held}): add --overwrite, or name another folder")
        changed = [name for name in present if _sha256((folder / name).read_bytes()) != record["files"][name]]
        if changed:
            headline = f"{folder} holds demo files that were changed since, and --overwrite will not touch:"
            raise InputError.listing(headline, changed, "Name another folder for the demo data.", limit=5)
        for name in present:
            (folder / name).unlink()
    return {**recipe, "files": {}}


def _add(folder: Path, record: dict[str, Any], name: str, content: bytes) -> None:
    """Write a file unless it is there. It is put on record first, so that no file of ours looks like another's."""
    if not _holds(folder, record, name):
        record["files"][name] = _sha256(content)
        write_json(folder / DEMO_FILE, record)
        write_atomic(folder / name, content)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
