"""The panel of a slide: which channels of the marker image are kept, and their names."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from orion_unet.errors import InputError

TRUE = ("true", "1", "yes", "t", "y")


@dataclass(frozen=True)
class Listed:
    """A line of a list of markers."""

    name: str
    remove: bool = False


@dataclass(frozen=True)
class Panel:
    """Indices of the channels that are kept, in the order of ``names``."""

    channels: tuple[int, ...]
    names: tuple[str, ...]


def read_markers(path: Path) -> list[Listed]:
    """The markers that a file lists: MCMICRO's markers.csv (marker_name, optional remove), or one name a line.

    Raises InputError.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a list of markers ({error})") from None
    lines = [line for line in text.splitlines() if line.strip()]
    columns = [column.strip().lower() for column in next(csv.reader(lines[:1]), [])]
    if "marker_name" in columns:
        rows = csv.DictReader(lines[1:], fieldnames=columns)
        listed = [
            Listed((row["marker_name"] or "").strip(), (row.get("remove") or "").strip().lower() in TRUE)
            for row in rows
        ]
    elif len(columns) > 1:
        raise InputError(f"{path}: has the columns {', '.join(columns)} and no marker_name")
    else:
        listed = [Listed(line.strip()) for line in lines]
    names = [marker.name for marker in listed]
    double = sorted({name for name in names if names.count(name) > 1})
    if double or not all(names) or not names:
        raise InputError(
            f"{path}: every marker needs a name of its own; duplicate or empty: {', '.join(double) or '-'}"
        )
    return listed


def choose_panel(path: Path, count: int, ome_names: tuple[str, ...], listed: list[Listed] | None) -> Panel:
    """The channels of a marker image of ``count`` channels; raises InputError.

    Without a list, all channels under their OME names. A list whose names are the OME names in another order is
    matched by name; otherwise it names the channels in the order of the file, and must be as long. Channels that the
    list removes are left out.
    """
    if listed is None:
        if not ome_names:
            raise InputError(
                f"{path}: its {count} channels have no names of their own; name them with --markers FILE or the column "
                "markers"
            )
        return Panel(tuple(range(count)), ome_names)
    names = [marker.name for marker in listed]
    if ome_names and set(names) <= set(ome_names):
        places = [ome_names.index(name) for name in names]
    elif len(names) != count:
        unknown = [name for name in names if name not in ome_names]
        hint = f"; not among the names in the image: {', '.join(unknown[:5])}" if ome_names else ""
        raise InputError(f"{path}: has {count} channels, but its list of markers has {len(names)}{hint}")
    elif ome_names and set(names) & set(ome_names) and not _in_order(names, ome_names):
        moved = [name for name in names if name in ome_names and names.index(name) != ome_names.index(name)]
        raise InputError(
            f"{path}: its list of markers has {', '.join(moved[:3])} elsewhere than the image, and other names are "
            "unknown to the image: the channels cannot be matched; correct the list"
        )
    else:
        places = list(range(count))
    kept = [(place, marker.name) for place, marker in zip(places, listed, strict=True) if not marker.remove]
    if not kept:
        raise InputError(f"{path}: its list of markers removes every channel")
    return Panel(tuple(place for place, _ in kept), tuple(name for _, name in kept))


def _in_order(names: list[str], ome_names: tuple[str, ...]) -> bool:
    return all(ome_names.index(name) == place for place, name in enumerate(names) if name in ome_names)
