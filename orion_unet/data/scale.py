"""The meaning of stored values: the white level of every dtype. For floats it follows from the folder's range."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from orion_unet.data.measured import file_state, fingerprint, reading_threads, recall, remember
from orion_unet.data.pairs import PairTable
from orion_unet.errors import InputError
from orion_unet.slides.images import ArrayImage
from orion_unet.slides.intensity import WHITE, declared_white, value_range
from orion_unet.slides.tiles import TiledArray

# Seconds between two stores of what has been measured so far.
KEEP_EVERY_S = 5.0

Progress = Callable[[int, str], Callable[[], None]]


def no_progress(total: int, text: str) -> Callable[[], None]:
    """Progress that is not shown: the default of slow functions."""
    return lambda: None


@dataclass(frozen=True)
class Scales:
    """Stored value of full intensity per modality and dtype name: intensity = stored / white."""

    he: dict[str, float]
    orion: dict[str, float]

    def white(self, modality: str, dtype: np.dtype) -> float:
        """White level of files of this modality and dtype, in either byte order."""
        levels: dict[str, float] = getattr(self, modality)
        return levels[_native_name(dtype)]


@cache
def _native_name(dtype: np.dtype) -> str:
    # NumPy builds the name anew on every call, which is too slow for every patch.
    return dtype.newbyteorder("=").name


def he_image(table: PairTable, scales: Scales, core: int) -> ArrayImage:
    """The H&E of a core, in the scale of its folder; raises InputError if the file has changed since it was checked."""
    row = table.he[core]
    white = scales.white("he", np.dtype(str(row["dtype"])))
    stored = table.open(core, "he")
    # A memory map is opened anew for every region; tiles are decoded once.
    decoded = np.asarray(stored) if isinstance(stored, TiledArray) else None

    def pixels() -> np.ndarray:
        return np.asarray(table.open(core, "he")) if decoded is None else decoded

    return ArrayImage(table.path(core, "he"), pixels, str(row["layout"]), white=white)


def measure_scales(table: PairTable, bounded_targets: bool, progress: Progress = no_progress) -> Scales:
    """White level of every dtype in the folder.

    Integers are scaled by their type. Float files are read once in full, in bounded memory; later runs read only those
    that have changed. Their common range decides between [0, 1] and [0, 255] (for ORION also [0, 65535]), so that all
    patches have the same scale. ``bounded_targets`` (no target normalisation) also forbids negative ORION floats.
    Raises InputError that names every file with NaN, infinity or values outside these ranges.
    """
    jobs = [(modality, core) for modality in ("he", "orion") for core in _float_cores(table, modality)]
    known = _Ranges(table)
    step = progress(len(jobs), "checking float files")

    def scan(job: tuple[str, int]) -> tuple[float, float]:
        path = table.path(job[1], job[0])
        found = known.get(path)
        if found is None:
            found = (*file_state(path), *_range(table.open(job[1], job[0])))
            known.add(path, found)
        step()
        return found[-2], found[-1]

    with ThreadPoolExecutor(max_workers=reading_threads(table.folder)) as pool:
        ranges = dict(zip(jobs, pool.map(scan, jobs), strict=True))
    known.keep()

    problems = [
        f"{table.path(core, modality).name}: contains NaN or infinity"
        for (modality, core), found in ranges.items()
        if not np.isfinite(found).all()
    ]
    whites: dict[str, dict[str, float]] = {}
    for modality in ("he", "orion"):
        whites[modality] = dict(WHITE)
        of_modality = {
            core: found for (kind, core), found in ranges.items() if kind == modality and np.isfinite(found).all()
        }
        if of_modality:
            negative_ok = modality == "orion" and not bounded_targets
            white = declared_white(max(high for _, high in of_modality.values()), modality)
            whites[modality] |= {"float16": white, "float32": white}
            problems += _outside(table, modality, of_modality, white, negative_ok)
    if problems:
        raise InputError.listing(
            f"--pairs_dir {table.folder}: these files have values that cannot be used:",
            problems,
            "Floats must be in [0, 1] or [0, 255] over the whole folder; any uint8 or uint16 value is fine.",
        )
    return Scales(whites["he"], whites["orion"])


def _range(stored: np.ndarray | TiledArray) -> tuple[float, float]:
    """Minimum and maximum of a core, in bounded memory."""
    if not isinstance(stored, TiledArray):
        return value_range(stored)
    # NumPy's minimum and maximum hand on NaN.
    lows, highs = np.array([value_range(band) for band in stored.bands()]).T
    return float(lows.min()), float(highs.max())


class _Ranges:
    """Cached ranges of a folder's float files by file name: state when measured, minimum, maximum."""

    def __init__(self, table: PairTable) -> None:
        self._name = fingerprint((), "ranges", str(table.folder.resolve()), table.level)
        document = recall(self._name)
        stored = document.get("files") if isinstance(document, dict) else None
        self.files: dict[str, tuple[float, ...]] = {
            name: tuple(found)
            for name, found in (stored.items() if isinstance(stored, dict) else ())
            if isinstance(found, list) and len(found) == 5 and all(isinstance(value, int | float) for value in found)
        }
        self._lock = threading.Lock()
        self._changed = False
        self._kept_at = time.monotonic()

    def get(self, path: Path) -> tuple[float, ...] | None:
        """The entry of a file, or None if there is none or the file has changed since."""
        found = self.files.get(path.name)
        return found if found and found[:-2] == file_state(path) else None

    def add(self, path: Path, found: tuple[float, ...]) -> None:
        """Add the entry of a file; now and then all entries are stored, so that a killed run need not start again."""
        with self._lock:
            self.files[path.name] = found
            self._changed = True
            due = time.monotonic() - self._kept_at > KEEP_EVERY_S
        if due:
            self.keep()

    def keep(self) -> None:
        """Store the ranges for the next run, except those of files with NaN or infinity."""
        with self._lock:
            if not self._changed:
                return
            usable = {name: found for name, found in self.files.items() if np.isfinite(found[-2:]).all()}
            self._changed, self._kept_at = False, time.monotonic()
            remember(self._name, {"files": usable})


def _float_cores(table: PairTable, modality: str) -> Iterator[int]:
    for core, dtype in enumerate(getattr(table, modality)["dtype"].tolist()):
        if np.dtype(dtype).kind == "f":
            yield core


def _outside(
    table: PairTable, modality: str, ranges: dict[int, tuple[float, float]], white: float, negative_ok: bool
) -> Iterator[str]:
    for core, (low, high) in ranges.items():
        if high > white * 1.0001 or (low < -1e-4 * white and not negative_ok):
            yield f"{table.path(core, modality).name}: values from {low:g} to {high:g}"
