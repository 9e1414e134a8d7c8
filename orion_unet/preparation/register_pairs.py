"""Registers a folder of pairs that exist: every core moved onto its markers, or rejected with the reason."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orion_unet.command_options import RegisterOptions
from orion_unet.config import DataOptions
from orion_unet.data.channels import nuclear_channel
from orion_unet.data.measured import file_state
from orion_unet.data.packing import carried_files
from orion_unet.data.pairs import PairTable, find_pairs, pair_file
from orion_unet.data.panels import PANELS_FILE, panels_of
from orion_unet.data.scale import Progress, Scales, measure_scales, no_progress
from orion_unet.errors import InputError, RunError
from orion_unet.preparation.one_pair import KEPT, Judgement, Registered, register_pair
from orion_unet.preparation.workers import over_workers
from orion_unet.run_log import append_line, parse_object, write_atomic
from orion_unet.text import csv_bytes

TABLE = "registration.csv"
RECORD = "registration.jsonl"
"""File with one line per finished core, from which an interrupted registration goes on."""


@dataclass(frozen=True)
class RegisteredFolder:
    """Outcome of ``register_folder``: the rows of all cores, how many were found done, and the nuclear marker."""

    table: PairTable
    scales: Scales
    rows: list[Registered]
    found: int
    nuclear: int

    @property
    def kept(self) -> list[Registered]:
        """Rows of the cores that were written."""
        return [row for row in self.rows if row.state == KEPT]


def register_folder(data: DataOptions, given: RegisterOptions, progress: Progress = no_progress) -> RegisteredFolder:
    """Register every pair of ``data.pairs_dir`` into ``given.output_dir``, over ``given.jobs`` processes.

    Writes the kept pairs, registration.csv, and what belongs to the folder (names, groups, dataset.json). A core whose
    files and options have not changed since an earlier call is not registered again. Raises InputError for pairs that
    training would refuse, without a nuclear marker, and for a folder that cannot be used; RunError where the disk fails
    or is too small.
    """
    table = find_pairs(data)
    nuclear = _nuclear(table, given.register_on)
    if lacking := table.lacking(nuclear):
        raise InputError.listing(
            f"{table.folder / PANELS_FILE}: {table.channel_names[nuclear]} was not measured in these cores, so they "
            "cannot be registered on it:",
            lacking,
            "Name a marker that every core has with --register_on, or register each panel in a folder of its own.",
        )
    output = given.output_dir
    _make(output, table, given.overwrite)
    scales = measure_scales(table, False, progress)
    judgement = Judgement(nuclear, given.min_correlation, given.max_shift)
    done = _done(output, table, judgement)
    missing = [core for core in range(len(table)) if str(table.names[core]) not in done]
    _check_space(output, table, missing)
    step = progress(len(missing), "registering cores")
    try:
        for name, content in carried_files(table, output).items():
            # Rejected cores must not be in it.
            if name != PANELS_FILE:
                write_atomic(output / name, content)
        for core, row in _register(table, scales, missing, judgement, given):
            done[row.core] = row
            _note(output, table, core, judgement, row)
            step()
        rows = [done[str(name)] for name in table.names]
        columns = list(rows[0].record())
        kept = [row.core for row in rows if row.state == KEPT]
        if (assigned := panels_of(table.folder, kept)) is not None:
            write_atomic(output / PANELS_FILE, assigned)
        write_atomic(output / TABLE, csv_bytes(columns, [list(row.record().values()) for row in rows]))
    except OSError as error:
        raise RunError(
            f"--output_dir {output}: cannot be written ({error.strerror or error}); what is registered is kept, and "
            "the same command goes on from there"
        ) from error
    return RegisteredFolder(table, scales, rows, len(table) - len(missing), nuclear)


def _nuclear(table: PairTable, given: str | None) -> int:
    names = table.channel_names
    if given is not None:
        if given not in names:
            raise InputError(f"--register_on {given}: no such channel; there are {', '.join(names)}")
        return names.index(given)
    found = nuclear_channel(names)
    if found is None:
        raise InputError(
            f"{table.folder}: no channel has the name of a nuclear stain; name the one that shows nuclei with "
            f"--register_on, of {', '.join(names)}"
        )
    return found


def _register(
    table: PairTable, scales: Scales, missing: list[int], judgement: Judgement, given: RegisterOptions
) -> Iterator[tuple[int, Registered]]:
    tasks = [(table, scales, core, judgement, given.output_dir) for core in missing]
    for task, row in over_workers(register_pair, tasks, given.jobs):
        yield task[2], row


def _make(output: Path, table: PairTable, overwrite: bool) -> None:
    """Make the folder; raises InputError where it is the source, or has pairs that did not come from here."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        itself = table.folder.samefile(output)
        there = {path.name for path in output.iterdir()}
    except OSError as error:
        raise InputError(f"--output_dir {output}: cannot be used ({error.strerror or error})") from None
    if itself:
        raise InputError(f"--output_dir {output}: is the folder of the pairs itself; choose another one")
    cores = {name for name in there if pair_file(name)}
    expected = {table.npy_name(core, modality) for core in range(len(table)) for modality in ("he", "orion")}
    if cores - expected or (cores and RECORD not in there and not overwrite):
        raise InputError.listing(
            f"--output_dir {output} has pairs that were not registered from {table.folder}:",
            sorted(cores - expected or cores),
            "Choose another folder, or move them away.",
            limit=5,
        )
    if overwrite:
        for name in cores | ({RECORD, TABLE} & there):
            (output / name).unlink(missing_ok=True)


def _origin(table: PairTable, core: int, judgement: Judgement) -> dict[str, Any]:
    """What a result depends on: the source files, by size, modification time and layout, and the options."""
    files = {}
    for modality, rows in (("he", table.he), ("orion", table.orion)):
        size, modified_ns, _ = file_state(table.path(core, modality))
        files[modality] = [size, modified_ns, str(rows[core]["layout"])]
    options = [int(table.places(core)[judgement.nuclear]), judgement.min_correlation, judgement.max_shift]
    if table.level:
        options.append(table.level)
    return {"folder": str(table.folder.resolve()), "files": files, "options": options}


def _done(output: Path, table: PairTable, judgement: Judgement) -> dict[str, Registered]:
    """The cores that an earlier call has finished, from the same files with the same options."""
    try:
        lines = (output / RECORD).read_bytes().splitlines()
    except FileNotFoundError:
        return {}
    position = {str(name): core for core, name in enumerate(table.names)}
    found = {}
    for line in lines:
        document = parse_object(line) or {}
        row, core = document.get("row"), position.get(str(document.get("core")))
        if core is None or not isinstance(row, dict) or document.get("origin") != _origin(table, core, judgement):
            continue
        try:
            registered = Registered(**row)
        except TypeError:
            continue
        paths = [output / table.npy_name(core, modality) for modality in ("he", "orion")]
        if registered.state != KEPT or all(path.is_file() for path in paths):
            found[registered.core] = registered
    return found


def _note(output: Path, table: PairTable, core: int, judgement: Judgement, row: Registered) -> None:
    if row.state != KEPT:
        # An earlier call, with other options, may have kept it.
        for modality in ("he", "orion"):
            (output / table.npy_name(core, modality)).unlink(missing_ok=True)
    origin = _origin(table, core, judgement)
    append_line(output / RECORD, {"core": row.core, "origin": origin, "row": row.record()})


def _check_space(output: Path, table: PairTable, missing: list[int]) -> None:
    needed = table.of(missing).nbytes
    free = shutil.disk_usage(output).free
    if needed > free:
        raise RunError(
            f"--output_dir {output}: too little disk space, up to {needed / 1e9:.1f} GB are needed and "
            f"{free / 1e9:.1f} GB free; free some space or choose a folder on another disk"
        )
