"""Writes the files of an inspection: two tables, a JSON document, and the contact sheets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orion_unet.data.scale import Progress, no_progress
from orion_unet.errors import InputError, RunError
from orion_unet.inspection.check import Inspection, channel_record, core_record
from orion_unet.inspection.contact_sheet import write_contact_sheets
from orion_unet.run_log import write_atomic, write_json
from orion_unet.text import csv_bytes

CHANNELS_FILE, CORES_FILE, DOCUMENT_FILE = "channels.csv", "cores.csv", "check_data.json"


def prepare_folder(folder: Path) -> None:
    """Make the folder, before the slow work starts; raises InputError if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output_dir {folder}: cannot be made ({error.strerror or error})") from None


def write_results(inspection: Inspection, folder: Path, progress: Progress = no_progress) -> list[Path]:
    """Write all files, replacing those of an earlier inspection; returns their paths. Raises RunError."""
    channels, cores, document = (folder / name for name in (CHANNELS_FILE, CORES_FILE, DOCUMENT_FILE))
    try:
        write_atomic(channels, _csv([channel_record(row) for row in inspection.channels]), durable=False)
        write_atomic(cores, _csv([core_record(core) for core in inspection.cores]), durable=False)
        write_json(document, inspection.document(), durable=False)
    except OSError as error:
        raise RunError(f"{folder}: cannot be written to ({error.strerror or error})") from error
    sheets = write_contact_sheets(inspection, folder, progress)
    for sheet in set(folder.glob("contact_sheet_[0-9][0-9]*.png")) - set(sheets):
        # Left by an earlier inspection of more cores.
        sheet.unlink(missing_ok=True)
    return [channels, cores, document, *sheets]


def _csv(records: Sequence[dict[str, Any]]) -> bytes:
    return csv_bytes(list(records[0]), [list(record.values()) for record in records])
