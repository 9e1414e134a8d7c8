"""What an interrupted prepare goes on from: plans of slides and finished regions, kept beside the pairs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from orion_unet.command_options import PrepareOptions
from orion_unet.data.measured import file_state
from orion_unet.errors import InputError
from orion_unet.preparation.one_pair import KEPT
from orion_unet.preparation.one_region import PreparedRegion
from orion_unet.preparation.regions import Region
from orion_unet.preparation.slide_plan import SlidePlan
from orion_unet.preparation.slide_table import Slide
from orion_unet.preparation.writing import SUFFIXES, pair_paths
from orion_unet.registration.transform import Affine
from orion_unet.run_log import append_line, parse_object, write_json
from orion_unet.slides.remote import is_remote

FOLDER, RECORD = ".prepare", "regions.jsonl"
# Options that do not change what a pair is.
FREE = ("slides", "output_dir", "markers", "jobs", "dask_scheduler", "dry_run", "skip_bad", "overwrite")


def origin(slide: Slide, options: PrepareOptions) -> dict[str, Any]:
    """What the pairs of a slide depend on: its files by size and modification time, the options, the row of the CSV.

    Raises InputError where a file is missing.
    """
    files = {}
    for path in (slide.he, slide.orion, slide.markers or options.markers):
        if path is None:
            continue
        if not is_remote(path):
            try:
                path = path.resolve()
                path.stat()
            except OSError as error:
                raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
        # Of an OME-Zarr, all files in the folder count.
        files[str(path)] = list(file_state(path)[:2])
    chosen = {f.name: getattr(options, f.name) for f in fields(options) if f.name not in FREE}
    sizes = [slide.he_pixel_size_um, slide.orion_pixel_size_um]
    return {"files": files, "options": chosen, "pixel_sizes_um": sizes, "group": slide.group}


class State:
    """The folder .prepare of an output folder."""

    def __init__(self, output: Path) -> None:
        self.folder = output / FOLDER
        self._output = output

    def plan(self, slide: Slide, source: dict[str, Any]) -> SlidePlan | None:
        """The plan that an earlier call made of the same files with the same options; None where there is none.

        Raises InputError where one was made of other files or with other options.
        """
        try:
            document = parse_object(self._plan_file(slide).read_bytes())
        except FileNotFoundError:
            return None
        if document is None:
            return None
        if document.get("origin") != source:
            raise InputError(
                f"{self._output} has pairs that were made of other files or with other options; "
                "add --overwrite, or choose another folder"
            )
        stored = document["plan"]
        try:
            known = {
                **stored, "slide": slide, "affine": Affine(np.array(stored["affine"])),
                "channels": tuple(stored["channels"]), "names": tuple(stored["names"]),
                "regions": [Region(**region) for region in stored["regions"]],
            }  # fmt: skip
            return SlidePlan(**known)
        except (KeyError, TypeError):
            # Of another version of the toolkit.
            return None

    def keep_plan(self, plan: SlidePlan, source: dict[str, Any]) -> None:
        """Store a plan. Raises OSError."""
        self.folder.mkdir(exist_ok=True)
        stored = {name: value for name, value in asdict(plan).items() if name != "slide"}
        document = {"origin": source, "plan": {**stored, "affine": plan.affine.matrix.tolist()}}
        write_json(self._plan_file(plan.slide), document)

    def done(self, format: str) -> dict[str, PreparedRegion]:
        """The finished regions by name, those whose files have gone left out."""
        return {row.core: row for row in self._rows() if row.state != KEPT or self._has_pair(row, format)}

    def _rows(self) -> Iterator[PreparedRegion]:
        try:
            lines = (self.folder / RECORD).read_bytes().splitlines()
        except FileNotFoundError:
            return
        for line in lines:
            # A killed run may have left a line unfinished.
            with suppress(TypeError):
                yield PreparedRegion(**(parse_object(line) or {}))

    def _has_pair(self, row: PreparedRegion, format: str) -> bool:
        return all(path.exists() for path in pair_paths(self._output, row.core, format).values())

    def note(self, row: PreparedRegion) -> None:
        """Record a finished region. Raises OSError."""
        append_line(self.folder / RECORD, row.record())

    def known_cores(self) -> set[str]:
        """Names of all regions of all plans, whatever they were made of."""
        found: set[str] = set()
        for path in self.folder.glob("plan_*.json"):
            try:
                document = json.loads(path.read_text(encoding="utf-8"))
                found |= {str(region["core"]) for region in document["plan"]["regions"]}
            except (OSError, ValueError, KeyError, TypeError):
                continue
        return found

    def known_slides(self) -> set[str]:
        """Names of the slides of which there are pairs, in any format."""
        kept = (row for row in self._rows() if row.state == KEPT)
        return {row.slide for row in kept if any(self._has_pair(row, format) for format in SUFFIXES)}

    def _plan_file(self, slide: Slide) -> Path:
        return self.folder / f"plan_{slide.name}.json"
