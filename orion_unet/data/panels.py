"""Panels that differ: which markers were measured in which core of a folder, from panels.csv and panel_NAME.txt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from orion_unet.data.assignments import read_assignments
from orion_unet.data.channels import check_unique, listed_names, read_names
from orion_unet.errors import InputError
from orion_unet.text import csv_bytes

PANELS_FILE = "panels.csv"
PREFIX, SUFFIX = "panel_", ".txt"
# Hexadecimal digits of a digest.
DIGITS = 20


@dataclass(frozen=True)
class Panels:
    """The panel of every core, and the C markers of all panels together.

    ``markers`` are the names of each panel's markers, in the order of the channels in its cores' files. ``of_core``
    (N,) are the panels of the cores, ``names`` (C,) the markers of all panels, in the order of the network's output.
    """

    markers: dict[str, tuple[str, ...]]
    of_core: tuple[str, ...]
    names: tuple[str, ...]

    @cached_property
    def places(self) -> np.ndarray:
        """Place of each marker among the channels of each core's file (N, C), -1 where it was not measured."""
        of_panel = {
            panel: [markers.index(name) if name in markers else -1 for name in self.names]
            for panel, markers in self.markers.items()
        }
        return np.array([of_panel[panel] for panel in self.of_core], int).reshape(-1, len(self.names))

    @property
    def differ(self) -> bool:
        """Whether any core's file is not simply the C markers in order."""
        return bool((self.places != np.arange(len(self.names))).any())

    def of(self, cores: Sequence[int]) -> Self:
        """The same for some of the cores."""
        return replace(self, of_core=tuple(self.of_core[core] for core in cores))

    def digest(self, names: Sequence[str], cores: Iterable[int]) -> str:
        """Digest of what was measured, and in which order, in some of the cores; ``names`` (N,) are their names."""
        about = [[str(names[core]), self.markers[self.of_core[core]]] for core in cores]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:DIGITS]

    def document(self) -> dict[str, Any]:
        """By panel: its markers and how many cores have it."""
        return {
            panel: {"markers": list(markers), "cores": self.of_core.count(panel)}
            for panel, markers in self.markers.items()
        }

    def wrong_counts(self, files: Sequence[str], counts: Sequence[int]) -> Iterator[str]:
        """A sentence for every ORION file whose number of channels is not that of its panel; 0 was reported before."""
        for file, count, panel in zip(files, counts, self.of_core, strict=True):
            named = len(self.markers[panel])
            if count not in (0, named):
                yield f"{file}: has {count} channels, but {panel_file(panel)} names {named} markers"


def panel_file(panel: str) -> str:
    """Name of the file that lists the markers of a panel."""
    return f"{PREFIX}{panel}{SUFFIX}"


def panel_files(folder: Path) -> list[str]:
    """Names of the panel files in a folder."""
    return sorted(path.name for path in folder.glob(f"{PREFIX}*{SUFFIX}"))


def find_panels(folder: Path, cores: Sequence[str], given_names: str | None) -> tuple[Panels | None, list[str]]:
    """The panels of the cores by the folder's panels.csv, None without one; and warnings.

    The order of the markers is that of ``--channel_names`` or channel_names.txt, which must list those of all panels;
    without either, the markers of the alphabetically first panel come first, then what each further one adds. Raises
    InputError that names the file.
    """
    path = folder / PANELS_FILE
    if not path.exists():
        unused = panel_files(folder)
        return None, [f"without {PANELS_FILE}, {', '.join(unused)} have no effect"] if unused else []
    of_core = read_assignments(path, cores, "panel", only_these=True)
    markers, problems = {}, []
    for panel in sorted(set(of_core)):
        file = folder / panel_file(panel)
        if file.parent != folder:
            problems.append(f"{panel}: a panel's name must be usable as part of a file name")
        elif not file.is_file():
            problems.append(f"{file.name}: is missing; it lists the markers of the panel {panel}, one a line")
        else:
            markers[panel] = read_names(file)
            if not markers[panel]:
                problems.append(f"{file.name}: names no marker")
            else:
                check_unique(str(file), markers[panel])
    if problems:
        raise InputError.listing(f"{path}: these panels cannot be used:", problems)
    names = _in_order(markers, listed_names(given_names, folder))
    unused = sorted(set(panel_files(folder)) - set(map(panel_file, markers)))
    warnings = [f"no core in {PANELS_FILE} has the panel of {', '.join(unused)}"] if unused else []
    return Panels(markers, tuple(of_core), names), warnings


def markers_of(folder: Path, core: str) -> tuple[str, ...]:
    """The markers of one core's file, in order, by the folder's panels.csv; none without one. Raises InputError."""
    path = folder / PANELS_FILE
    if not path.exists():
        return ()
    (panel,) = read_assignments(path, [core], "panel")
    names = read_names(folder / panel_file(panel))
    check_unique(str(folder / panel_file(panel)), names)
    return names


def panels_of(folder: Path, cores: Sequence[str]) -> bytes | None:
    """The content of a folder's panels.csv for only some of its cores; None without one."""
    path = folder / PANELS_FILE
    if not path.exists():
        return None
    return csv_bytes(["core", "panel"], zip(cores, read_assignments(path, cores, "panel"), strict=True))


def _in_order(markers: dict[str, tuple[str, ...]], listed: tuple[str, tuple[str, ...]] | None) -> tuple[str, ...]:
    """All markers once: as listed, or in the order of the panels."""
    union = tuple(dict.fromkeys(name for panel in markers.values() for name in panel))
    if listed is None:
        return union
    source, names = listed
    check_unique(source, names)
    problems = [f"{name}: is listed, but no panel measures it" for name in names if name not in union]
    problems += [
        f"{name}: is measured by {panel_file(next(panel for panel, own in markers.items() if name in own))}, "
        "but not listed"
        for name in union
        if name not in names
    ]
    if problems:
        raise InputError.listing(
            f"{source}: with {PANELS_FILE} it must list the markers of all panels, and only those:", problems
        )
    return names
