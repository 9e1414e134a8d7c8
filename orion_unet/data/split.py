"""The split into training and validation cores, by core or by group, so that no tissue is on both sides."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from orion_unet.config import DataOptions, fold_numbers
from orion_unet.data.assignments import read_assignments
from orion_unet.data.pairs import PairTable
from orion_unet.data.randomness import SPLIT, counter_rng
from orion_unet.errors import InputError
from orion_unet.run_log import SCHEMA
from orion_unet.text import named

GROUPS_FILE = "groups.csv"


@dataclass(frozen=True)
class Split:
    """Indices of the training and validation cores in a PairTable, ascending, and the group of every core.

    ``fold`` is K/N where the validation cores are the K-th of N parts.
    """

    train: np.ndarray
    val: np.ndarray
    groups: tuple[str, ...]
    fold: str | None = None

    def document(self, table: PairTable) -> dict[str, Any]:
        """The content of split.json."""
        sides = {"train": self.train, "val": self.val}
        rows = {
            side: [{"core": str(table.names[core]), "group": self.groups[core]} for core in cores]
            for side, cores in sides.items()
        }
        return {"schema": SCHEMA, **({"fold": self.fold} if self.fold else {}), **rows}


def make_split(
    table: PairTable, options: DataOptions, seed: int, earlier: dict[str, Any] | None = None
) -> tuple[Split, list[str]]:
    """Split the cores as the options say; returns the split and warnings for the user.

    Whole groups are drawn in an order that depends on the seed only. As many are held out as bring the share of
    held-out cores closest to ``val_split``, at least one group on each side; with ``fold``, those of one part of
    ``fold_parts``. ``earlier``, the split.json of a resumed run, takes precedence. Raises InputError.
    """
    groups = core_groups(table, options.groups_csv)
    if earlier is not None:
        split, warnings = _from_document(earlier, "the run to resume", table, groups)
        return replace(split, fold=earlier.get("fold")), warnings
    if options.split_file:
        return _from_file(Path(options.split_file), table, groups)
    units = sorted(set(groups))
    if len(units) < 2:
        kind = "core" if len(table) < 2 else "group"
        raise InputError(f"--pairs_dir {table.folder}: has only one {kind}; two are needed, one of them to hold out")
    if options.fold is not None:
        number, count = fold_numbers(options.fold)
        held, wanted = set(fold_parts(groups, count, seed, str(table.folder))[number - 1]), 1 / count
    else:
        order = counter_rng(seed, SPLIT).permutation(len(units))
        members = Counter(groups)
        sizes = np.array([members[units[index]] for index in order])
        held_out = np.cumsum(sizes)[:-1]
        wanted = options.val_split
        count = 1 + int(np.argmin(np.abs(held_out - wanted * len(table))))
        held = {units[index] for index in order[:count]}
    on_val = np.array([group in held for group in groups])
    warnings = []
    share = on_val.mean()
    if abs(share - wanted) > 0.1:
        warnings.append(
            f"{on_val.sum()} of {len(table)} cores ({share:.0%}) are held out instead of {wanted:.0%}, "
            "because whole cores and groups stay together"
        )
    return Split(np.flatnonzero(~on_val), np.flatnonzero(on_val), tuple(groups), options.fold), warnings


def fold_parts(groups: Sequence[str], count: int, seed: int, folder: str) -> list[list[str]]:
    """The groups in ``count`` parts of about equally many cores; ``groups`` names the group of every core.

    The largest groups come first, equal ones in an order that depends on the seed only; each joins the part that has
    the fewest cores. Raises InputError, naming the ``folder``, where there are fewer groups than parts.
    """
    units = sorted(set(groups))
    if count > len(units):
        kind = "cores" if len(units) == len(groups) else "groups"
        raise InputError(
            f"--pairs_dir {folder}: {count} folds need at least {count} {kind}, and there are {len(units)}; ask for "
            "fewer folds"
        )
    members = Counter(groups)
    drawn = [units[index] for index in counter_rng(seed, SPLIT).permutation(len(units))]
    parts: list[list[str]] = [[] for _ in range(count)]
    cores = [0] * count
    for group in sorted(drawn, key=lambda group: -members[group]):
        smallest = cores.index(min(cores))
        parts[smallest].append(group)
        cores[smallest] += members[group]
    return parts


def core_groups(table: PairTable, given: str | None) -> list[str]:
    """Group of every core, from the CSV; without one, each core is its own group."""
    path = Path(given) if given else table.folder / GROUPS_FILE
    names: list[str] = table.names.tolist()
    return read_groups(path, names) if given or path.is_file() else names


def read_groups(path: Path, names: Sequence[str]) -> list[str]:
    """Group of each of the named cores, from a CSV with the columns core and group; raises InputError."""
    return read_assignments(path, names, "group")


def _from_file(path: Path, table: PairTable, groups: list[str]) -> tuple[Split, list[str]]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--split_file {path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise InputError(f"--split_file {path}: is not the split.json of a run") from None
    return _from_document(document, f"--split_file {path}", table, groups)


def _from_document(document: Any, source: str, table: PairTable, groups: list[str]) -> tuple[Split, list[str]]:
    try:
        sides = {side: [str(row["core"]) for row in document[side]] for side in ("train", "val")}
    except (KeyError, TypeError):
        raise InputError(f"{source}: is not the split.json of a run") from None
    position = {name: index for index, name in enumerate(table.names.tolist())}
    problems = [
        f"{core}: is not among the pairs of {table.folder}"
        for cores in sides.values()
        for core in cores
        if core not in position
    ]
    problems += [f"{core}: is on both sides" for core in sorted(set(sides["train"]) & set(sides["val"]))]
    problems += [f"no core on the {side} side" for side, cores in sides.items() if not cores]
    if not problems:
        on = {side: {groups[position[core]] for core in cores} for side, cores in sides.items()}
        problems += [f"group {group}: is on both sides" for group in sorted(on["train"] & on["val"])]
    if problems:
        raise InputError.listing(f"{source} cannot be used:", problems)
    left_out = sorted(set(position) - set(sides["train"]) - set(sides["val"]))
    warnings = [f"{len(left_out)} cores are not in {source} and are ignored: {named(left_out)}"] if left_out else []
    train, val = (np.unique([position[core] for core in sides[side]]) for side in ("train", "val"))
    return Split(train, val, tuple(groups)), warnings
