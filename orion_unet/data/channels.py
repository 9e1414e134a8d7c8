"""ORION channels: their names, which of them are excluded, and their weights in the loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from orion_unet.errors import InputError

NAMES_FILE = "channel_names.txt"
# Substrings (lower case) of the names of nuclear stains, the most specific first.
NUCLEAR_STAINS = ("hoechst", "dapi", "draq", "sytox", "dna", "nuclei", "nuclear")


def channel_names(given: str | None, folder: Path, count: int, stated: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Names of ``count`` channels: from ``--channel_names``, else the folder's channel_names.txt, else those that its
    files state, else ``channel_07``.

    Raises InputError for a wrong number of names, an empty name or a duplicate.
    """
    listed = listed_names(given, folder)
    if listed is None:
        return stated or tuple(f"channel_{index:02d}" for index in range(count))
    source, names = listed
    if len(names) != count:
        hint = "" if len(names) > 1 else " (or no such file exists)"
        raise InputError(f"{source}: has {len(names)} names, but the ORION files have {count} channels{hint}")
    check_unique(source, names)
    return names


def listed_names(given: str | None, folder: Path) -> tuple[str, tuple[str, ...]] | None:
    """Where channel names are listed, and the names: ``--channel_names`` (names or a file), else the folder's
    channel_names.txt; None without either. Raises InputError for a file that cannot be read."""
    if given is None:
        path = folder / NAMES_FILE
        return (str(path), read_names(path)) if path.is_file() else None
    if _is_file(given):
        return "--channel_names", read_names(Path(given))
    return "--channel_names", tuple(name.strip() for name in given.split(","))


def check_unique(source: str, names: Sequence[str]) -> None:
    """Raise InputError for an empty name or a duplicate."""
    problems = sorted({name for name in names if names.count(name) > 1})
    if problems or not all(names):
        raise InputError(f"{source}: every channel needs a unique name; duplicate or empty: {problems or 'empty'}")


def _is_file(given: str) -> bool:
    try:
        return Path(given).is_file()
    except OSError:
        # A list of many names can be longer than a file name may be.
        return False


def read_names(path: Path) -> tuple[str, ...]:
    """The lines of a file that are not blank; raises InputError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a list of channel names ({error})") from None
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def nuclear_channel(names: Sequence[str]) -> int | None:
    """Index of the channel named after a nuclear stain, None if there is none."""
    for stain in NUCLEAR_STAINS:
        for index, name in enumerate(names):
            if stain in name.lower():
                return index
    return None


def excluded_channels(given: str | None, names: Sequence[str]) -> set[int]:
    """Indices of the channels in ``--exclude_channels``, given by name or index; raises InputError."""
    excluded = listed_channels("exclude_channels", given, names)
    if len(excluded) == len(names):
        raise InputError("--exclude_channels: leaves no channel to train on")
    return excluded


def listed_channels(option: str, given: str | None, names: Sequence[str]) -> set[int]:
    """Indices of the channels that an option lists by name or index, separated by commas; raises InputError."""
    found = set()
    unknown = []
    for item in (part.strip() for part in (given or "").split(",")):
        if item in names:
            found.add(names.index(item))
        elif item.isdecimal() and int(item) < len(names):
            found.add(int(item))
        elif item:
            unknown.append(item)
    if unknown:
        raise InputError(f"--{option}: no channel {', '.join(unknown)}; the channels are {', '.join(names)}")
    return found


def parse_channel_weights(given: str | None, names: Sequence[str]) -> list[float] | None:
    """Weight per channel from ``--channel_weights NAME=W,...``, 1 for all others; None without the option."""
    if given is None:
        return None
    weights = dict.fromkeys(names, 1.0)
    problems = []
    for item in (part.strip() for part in given.split(",")):
        name, separator, text = item.rpartition("=")
        name = name.strip()
        try:
            weight = float(text)
        except ValueError:
            weight = math.nan
        if not separator or not (math.isfinite(weight) and weight >= 0):
            problems.append(f"{item!r}: write NAME=WEIGHT, with a weight of at least 0")
        elif name not in weights:
            problems.append(f"{name}: no such channel among {', '.join(names)}")
        else:
            weights[name] = weight
    if not problems and not any(weights.values()):
        problems.append("all weights are 0")
    if problems:
        raise InputError.listing("--channel_weights cannot be used:", problems)
    return list(weights.values())
