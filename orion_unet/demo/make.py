"""Demo data: a folder of paired H&E and ORION cores, drawn from a seed.

``tissue.py`` draws the anatomy with the primitives of ``shapes.py``; ``stains.py`` renders it as H&E and as markers.
This module draws whole cores and manages the folder.
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

from orion_unet.data.channels import NAMES_FILE
from orion_unet.data.dataset import DATASET_FILE, dataset_document
from orion_unet.data.pairs import HE_SUFFIX, ORION_SUFFIX
from orion_unet.data.split import GROUPS_FILE
from orion_unet.demo.stains import MARKERS, Stain, render_he, render_orion, stain_dyes
from orion_unet.demo.tissue import Habit, draw_tissue
from orion_unet.errors import InputError
from orion_unet.run_log import write_atomic, write_json

__all__ = ["DEMO_FILE", "MARKERS", "draw_core", "holds_demo", "make_demo"]

DEMO_FILE = "demo.json"
"""Record of the files that make-demo has made and of their settings. Only these files are ever replaced."""
CORES_PER_PATIENT = 2
PIXEL_SIZE_UM = 0.325
"""Side of a pixel that the drawn nuclei correspond to; that of ORION's scanners."""
VERSION = 1
"""Raise this when the same seed draws different pixels."""


def draw_core(seed: int, size: int, patient: int | None = None) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
    """One tissue-microarray core of ``size`` x ``size`` pixels (at least 64) on blank glass.

    Returns the H&E, uint8 (S, S, 3), and the ORION image of ``MARKERS``, uint16 (S, S, 20). Cores with the same
    ``patient`` (another seed; default: that of the core) share composition and staining.
    """
    of_patient = np.random.default_rng(seed if patient is None else patient)
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1,)))
    tissue = draw_tissue(rng, size, Habit.draw(of_patient))
    stain = Stain.draw(of_patient, rng)
    dyes = stain_dyes(rng, tissue)
    return render_he(rng, dyes, stain), render_orion(rng, tissue, dyes, stain)


def make_demo(folder: Path, cores: int = 12, size: int = 512, seed: int = 0, overwrite: bool = False) -> list[str]:
    """Fill a folder with paired cores, channel_names.txt, groups.csv (two cores per patient) and dataset.json.

    Returns the names of the cores. If the folder already has this set, nothing changes; an interrupted set is
    completed. ``overwrite`` replaces an earlier demo set and nothing else.

    Raises InputError for numbers out of range, for a folder with other pairs, and if the folder cannot be written.
    """
    settings = _settings(cores, size, seed)
    names = _names(cores)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        record = _claim(folder, settings, overwrite)
        groups = [f"{name},patient_{i // CORES_PER_PATIENT:02d}" for i, name in enumerate(names)]
        _add(folder, record, NAMES_FILE, "\n".join([*MARKERS, ""]).encode())
        dataset = dataset_document(PIXEL_SIZE_UM, "make-demo: generated tissue")
        _add(folder, record, DATASET_FILE, (json.dumps(dataset, indent=2) + "\n").encode())
        _add(folder, record, GROUPS_FILE, "\n".join(["core,group", *groups, ""]).encode())
        missing = [i for i, name in enumerate(names) if not all(_holds(folder, record, file) for file in _pair(name))]
        for i in tqdm(missing, desc="drawing cores", unit="core", disable=None):
            images = draw_core(_subseed(seed, 0, i), size, patient=_subseed(seed, 1, i // CORES_PER_PATIENT))
            for k, file in enumerate(_pair(names[i])):
                content = io.BytesIO()
                np.lib.format.write_array(content, images[k], allow_pickle=False)
                _add(folder, record, file, content.getvalue())
    except OSError as error:
        raise InputError(f"{folder}: demo data cannot be written here ({error.strerror or error})") from None
    return names


def holds_demo(folder: Path, cores: int, size: int, seed: int) -> bool:
    """Whether the folder has the complete set that ``make_demo`` makes with these numbers.

    Raises InputError for numbers out of range.
    """
    settings, record = _settings(cores, size, seed), _read_record(folder)
    wanted = [NAMES_FILE, GROUPS_FILE, DATASET_FILE, *(file for name in _names(cores) for file in _pair(name))]
    return (
        record is not None
        and all(record.get(key) == value for key, value in settings.items())
        and all(_holds(folder, record, name) for name in wanted)
    )


def _settings(cores: int, size: int, seed: int) -> dict[str, int]:
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
    return name + HE_SUFFIX, name + ORION_SUFFIX


def _subseed(seed: int, stream: int, index: int) -> int:
    """Seed of one core (stream 0) or patient (stream 1), independent of the number of cores."""
    return int(np.random.SeedSequence(seed, spawn_key=(stream, index)).generate_state(1, np.uint64)[0])


def _read_record(folder: Path) -> dict[str, Any] | None:
    """Content of ``demo.json``: the settings, and the SHA-256 of each file. None if there is no valid one."""
    try:
        record = json.loads((folder / DEMO_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("files"), dict):
        return None
    return record if all(Path(name).name == name for name in record["files"]) else None


def _holds(folder: Path, record: dict[str, Any], name: str) -> bool:
    return name in record["files"] and (folder / name).exists()


def _claim(folder: Path, settings: dict[str, int], overwrite: bool) -> dict[str, Any]:
    """Check that the folder may be filled, remove an earlier set, and return the record to continue with."""
    found = sorted(path.name for path in folder.iterdir())
    # Read after the listing, so that the record covers all files that another process was making at that moment.
    record = _read_record(folder)
    made = {} if record is None else {**record["files"], DEMO_FILE: ""}
    reserved = (NAMES_FILE, GROUPS_FILE, DATASET_FILE, DEMO_FILE)
    others = [
        name for name in found if name not in made and (name in reserved or name.endswith((HE_SUFFIX, ORION_SUFFIX)))
    ]
    if others:
        headline = f"{folder} has files that make-demo did not make and will not touch:"
        raise InputError.listing(headline, others, "Choose another folder for the demo data.", limit=5)
    if record is not None:
        if not overwrite and all(record.get(key) == value for key, value in settings.items()):
            return record
        present = [name for name in record["files"] if (folder / name).exists()]
        if present and not overwrite:
            held = ", ".join(f"{key} {record.get(key)}" for key in settings)
            raise InputError(f"{folder} has another demo set ({held}): add --overwrite or choose another folder")
        changed = [name for name in present if _sha256((folder / name).read_bytes()) != record["files"][name]]
        if changed:
            headline = f"{folder} has demo files that were changed since, which --overwrite will not touch:"
            raise InputError.listing(headline, changed, "Choose another folder for the demo data.", limit=5)
        for name in present:
            (folder / name).unlink()
    return {**settings, "files": {}}


def _add(folder: Path, record: dict[str, Any], name: str, content: bytes) -> None:
    """Write a file unless it exists. Record it first, so that no file of ours is taken for someone else's."""
    if not _holds(folder, record, name):
        record["files"][name] = _sha256(content)
        write_json(folder / DEMO_FILE, record)
        write_atomic(folder / name, content)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
