"""A run's logs as files for other programs: CSV tables, events for TensorBoard, a file store of MLflow."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from orion_unet.errors import InputError
from orion_unet.extras import needed
from orion_unet.monitor.export_logs import EPOCH_COLUMNS, STEP_COLUMNS, Logs, read_logs, scalars
from orion_unet.monitor.export_mlflow import mlflow_writer
from orion_unet.text import csv_bytes

DIGITS = 12
# Writes logs into a folder, which is moved to its final place afterwards.
Writer = Callable[[Logs, Path, Path], None]


def export(run_dir: Path, to: str, output: Path) -> list[Path]:
    """Write a run's logs into a folder that is empty or not there yet; returns the files.

    ``to`` is ``csv`` (``epochs.csv``, ``markers.csv``, ``steps.csv``), ``tensorboard`` (an event file) or ``mlflow`` (a
    file store). The folder appears whole or not at all. Raises InputError.
    """
    write = WRITERS[to]()
    logs = read_logs(run_dir)
    try:
        # A link to a folder stays.
        output = output.resolve()
        if output.exists() and not output.is_dir():
            raise InputError(f"--output_dir {output}: is a file; give a folder")
        if output.is_dir() and any(output.iterdir()):
            raise InputError(f"--output_dir {output}: is not empty; give another folder")
        output.parent.mkdir(parents=True, exist_ok=True)
        unfinished = output.with_name(f".{output.name}.{os.getpid()}.tmp")
        unfinished.mkdir()
        try:
            write(logs, unfinished, output)
            unfinished.replace(output)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        raise InputError(f"--output_dir {output}: cannot be written ({error.strerror or error})") from None
    return sorted(path for path in output.iterdir() if not path.name.startswith("."))


def write_csv(logs: Logs, folder: Path, final: Path) -> None:
    """Write the tables: one row per epoch, per epoch and marker, per line of steps. Undefined cells are empty."""
    columns = list(dict.fromkeys((*EPOCH_COLUMNS, *(name for row in logs.epochs for name in row))))
    rows = ([row.get(name) for name in columns] for row in logs.epochs)
    (folder / "epochs.csv").write_bytes(csv_bytes(columns, rows, DIGITS))
    metrics = list(dict.fromkeys(name for epoch in logs.markers for row in epoch.values() for name in row))
    of_markers = (
        [epoch["epoch"], marker, *(values.get(name) for name in metrics)]
        for epoch, markers in zip(logs.epochs, logs.markers, strict=True)
        for marker, values in markers.items()
    )
    (folder / "markers.csv").write_bytes(csv_bytes(("epoch", "marker", *metrics), of_markers, DIGITS))
    steps = ([int(row[0]), int(row[1]), when, *row[2:]] for row, when in zip(logs.steps, logs.times, strict=True))
    columns = ["epoch", "step", "time", *STEP_COLUMNS[2:]]
    (folder / "steps.csv").write_bytes(csv_bytes(columns, steps, DIGITS))


def _csv_writer() -> Writer:
    return write_csv


def _event_writer() -> Writer:
    """What writes events. Raises InputError without the package tensorboard; imports neither torch nor TensorFlow."""
    writers = needed("tensorboard.summary.writer.event_file_writer", extra="tensorboard")
    events = needed("tensorboard.compat.proto.event_pb2", extra="tensorboard")
    summaries = needed("tensorboard.compat.proto.summary_pb2", extra="tensorboard")

    def write(logs: Logs, folder: Path, final: Path) -> None:
        file = writers.EventFileWriter(str(folder))
        try:
            for step, when, tagged in scalars(logs):
                values = [summaries.Summary.Value(tag=tag, simple_value=value) for tag, value in tagged.items()]
                file.add_event(events.Event(wall_time=when, step=step, summary=summaries.Summary(value=values)))
        finally:
            file.close()

    return write


WRITERS: dict[str, Callable[[], Writer]] = {"csv": _csv_writer, "tensorboard": _event_writer, "mlflow": mlflow_writer}
