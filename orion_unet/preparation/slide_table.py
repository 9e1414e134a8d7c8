"""SLIDES.csv: one row a slide, with its two images and what their metadata lack."""

from __future__ import annotations

import csv
from dataclasses import dataclass, replace
from pathlib import Path

from orion_unet.errors import InputError
from orion_unet.slides.pixel_size import positive
from orion_unet.slides.remote import input_path, is_url

REQUIRED = ("slide", "he", "orion")
OPTIONAL = ("patient", "markers", "he_pixel_size_um", "orion_pixel_size_um")
# A name becomes part of file names.
FORBIDDEN = set('/\\:*?"<>|,')


@dataclass(frozen=True)
class Slide:
    """A row of SLIDES.csv, with its paths resolved. Pixel sizes in micrometres are None where the file's is to be
    used; ``group`` is the patient, else the slide."""

    name: str
    he: Path
    orion: Path
    group: str
    markers: Path | None = None
    he_pixel_size_um: float | None = None
    orion_pixel_size_um: float | None = None

    def absolute(self, markers: Path | None = None) -> Slide:
        """The same slide by absolute paths; ``markers`` is the list of channels where the row names none."""
        markers = self.markers or markers
        return replace(
            self,
            he=self.he.absolute(),
            orion=self.orion.absolute(),
            markers=markers.absolute() if markers is not None else None,
        )


def read_slide_table(path: Path) -> list[Slide]:
    """The slides of a CSV; raises InputError with every row at fault."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = [column.strip() for column in reader.fieldnames or ()]
            reader.fieldnames = columns
            rows = [{key: (value or "").strip() for key, value in row.items() if key} for row in reader]
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: is no CSV in UTF-8 ({error})") from None
    missing = [column for column in REQUIRED if column not in columns]
    unknown = [column for column in columns if column not in (*REQUIRED, *OPTIONAL)]
    if missing or unknown:
        wrong = [f"has no column {column}" for column in missing] + [f"has an unknown column {c!r}" for c in unknown]
        raise InputError(f"{path}: {'; '.join(wrong)}; its columns are {', '.join((*REQUIRED, *OPTIONAL))}")
    problems = [f"row {index}: {problem}" for index, row in enumerate(rows, 1) for problem in _row_problems(row)]
    names = [row["slide"] for row in rows]
    problems += [
        f"slide {name}: is listed in more than one row" for name in sorted({n for n in names if names.count(n) > 1})
    ]
    if not rows:
        problems = ["it lists no slide"]
    if problems:
        raise InputError.listing(f"{path}: cannot be used:", problems)
    return [_slide(path.parent, row) for row in rows]


def _row_problems(row: dict[str, str]) -> list[str]:
    found = [f"{column} is empty" for column in REQUIRED if not row.get(column)]
    name = row.get("slide", "")
    if set(name) & FORBIDDEN or name.startswith(".") or not name.isprintable():
        found.append(f"slide {name!r}: a name becomes part of file names; use letters, digits, - and _")
    for column in ("he_pixel_size_um", "orion_pixel_size_um"):
        if row.get(column) and positive(row[column]) is None:
            found.append(f"{column} {row[column]!r} is no number above 0")
    return found


def _image(folder: Path, named: str) -> Path:
    return input_path(named) if is_url(named) else folder / named


def _slide(folder: Path, row: dict[str, str]) -> Slide:
    return Slide(
        name=row["slide"],
        he=_image(folder, row["he"]),
        orion=_image(folder, row["orion"]),
        group=row.get("patient") or row["slide"],
        markers=folder / row["markers"] if row.get("markers") else None,
        he_pixel_size_um=positive(row.get("he_pixel_size_um")),
        orion_pixel_size_um=positive(row.get("orion_pixel_size_um")),
    )
