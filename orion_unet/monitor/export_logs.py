"""All lines of a run's logs that count, for programs that want them: read once, whole, into memory."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from orion_unet.errors import InputError
from orion_unet.monitor.growing_log import GrowingLog
from orion_unet.monitor.run_reader import MAX_NAME_CHARS, MetricsReader, as_object, number
from orion_unet.monitor.steps_reader import COLUMNS, EPOCH, MAX_STEP, STEP, StepsReader
from orion_unet.run_log import CONFIG_FILE, METRICS_FILE, SCHEMA, STATUS_FILE, STEPS_FILE, parse_object, read_document
from orion_unet.text import clean

# The same few names come with every epoch.
_clean = lru_cache(maxsize=1 << 14)(clean)
# What the rows of a table begin with; further columns follow in the order of the log.
EPOCH_COLUMNS = ("epoch", "attempt", "time", "duration_s", "lr", "train_loss", "val_loss")
STEP_COLUMNS = tuple(name for name in COLUMNS if name != "steps")
# The numbers of a line of metrics.jsonl that are neither losses nor terms nor metrics.
_OF_RECORD = (
    *("lr", "duration_s", "grad_norm", "samples_per_s", "data_wait_fraction", "max_memory_bytes", "skipped_steps"),
)


@dataclass(frozen=True)
class Logs:
    """What a run has logged, without what a later attempt has replaced.

    ``epochs`` has one mapping per epoch, in order, from column to value (text under ``time``, None where undefined);
    ``markers`` one per epoch, from marker to its metrics; ``steps`` one row per line of steps.jsonl, with
    ``STEP_COLUMNS``, nan where not measured and inf for a loss that is not finite. ``places`` are the numbers of the
    rows' steps, counted from the start of the run; ``times`` are the rows' times, None where the log has none.
    ``name`` is that of the run's folder, ``state`` its state (empty if unknown), ``options`` those of its config.json.
    """

    epochs: list[dict[str, Any]]
    markers: list[dict[str, dict[str, float | None]]]
    steps: list[list[float]]
    places: list[int]
    times: list[str | None]
    name: str
    state: str
    options: Mapping[str, Any]


def read_logs(run_dir: Path) -> Logs:
    """Read a run's logs into memory, all lines of them. Raises InputError if the folder has none."""
    if not run_dir.is_dir():
        raise InputError(f"{run_dir} {'is not a folder' if run_dir.exists() else 'does not exist'}: give a run folder")
    metrics, steps = _EveryEpoch(run_dir), _EveryStep(run_dir)
    logs: tuple[GrowingLog, ...] = (metrics, steps)
    for log in logs:
        try:
            log.poll()
        except OSError as error:
            raise InputError(f"{log.path} cannot be read ({error.strerror or error})") from None
    if metrics.foreign_schema is not None and not len(metrics):
        raise InputError(
            f"{metrics.path} was written with schema {metrics.foreign_schema!r:.40}; only {SCHEMA} can be read"
        )
    rows, status = steps.recent(), _document(run_dir, STATUS_FILE)
    if not len(metrics) and not len(rows):
        raise InputError(f"{run_dir} has no epoch in {METRICS_FILE} and no step in {STEPS_FILE}: give a run folder")
    kept = [metrics.kept.epochs[epoch] for epoch in sorted(metrics.kept.epochs)]
    columns = [COLUMNS.index(name) for name in STEP_COLUMNS]
    return Logs(
        epochs=[epoch_values(record) for record, _ in kept],
        markers=[_marker_values(channels) for _, channels in kept],
        steps=rows[:, columns].tolist(),
        places=_places(rows, status.get("steps_per_epoch")),
        times=[steps.times.get((row[EPOCH], row[STEP])) for row in rows],
        name=_clean(run_dir.resolve().name, MAX_NAME_CHARS),
        state=str(status.get("state")),
        options={
            _clean(name): value for name, value in _object(_document(run_dir, CONFIG_FILE).get("options")).items()
        },
    )


def _document(run_dir: Path, name: str) -> Mapping[str, Any]:
    """A JSON document of the run; empty where there is none that can be read."""
    try:
        return read_document(run_dir / name)[0] or {}
    except OSError:
        return {}


def epoch_values(record: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a line of metrics.jsonl by column (``val_mse``, ``pearson``), and its ``time``; None where null.

    Metrics have their own names, losses and terms begin with ``train_`` or ``val_``.
    """
    values: dict[str, Any] = dict.fromkeys(EPOCH_COLUMNS)
    found = [(name, value) for name, value in record.items() if name not in ("schema", "train", "val")]
    for side in ("train", "val"):
        section = _object(record.get(side))
        found.append((f"{side}_loss", section.get("loss")))
        found += [(f"{side}_{name}", value) for name, value in _object(section.get("terms")).items()]
    metrics = _object(_object(record.get("val")).get("metrics"))
    # The columns of the record itself come first: no metric replaces them.
    found += [(name, value) for name, value in metrics.items() if name not in record]
    for name, value in found:
        if value is None or type(value) in (int, float):
            values[_clean(name)] = _defined(value)
    values["time"] = _time(record)
    return values


def scalars(logs: Logs) -> Iterator[tuple[int, float, dict[str, float]]]:
    """Step, time [s since 1970] and the defined numbers by tag, of every line of steps, then of every epoch.

    The tags of epochs are those that training with ``--tensorboard`` writes, at the number of the epoch; the steps'
    begin with ``steps/``, at the number of steps since the start of the run.
    """
    for line, step, time in zip(logs.steps, logs.places, logs.times, strict=True):
        measured = zip(STEP_COLUMNS[2:], line[2:], strict=True)
        yield step, seconds(time), {f"steps/{name}": value for name, value in measured if math.isfinite(value)}
    for row, markers in zip(logs.epochs, logs.markers, strict=True):
        found = {name: value for name, value in row.items() if name not in ("epoch", "attempt", "time")}
        tagged = {_tag(name): value for name, value in found.items()}
        tagged |= {f"{name}/{marker}": score for marker, scores in markers.items() for name, score in scores.items()}
        yield row["epoch"], seconds(row["time"]), {tag: value for tag, value in tagged.items() if value is not None}


def _tag(column: str) -> str:
    side, _, name = column.partition("_")
    if side in ("train", "val"):
        return f"loss/{side}" if name == "loss" else f"{side}/{name}"
    return column if column in _OF_RECORD else f"metrics/{column}"


def _marker_values(channels: bytes | dict[str, Any] | None) -> dict[str, dict[str, float | None]]:
    """The metrics of every marker of an epoch; None where undefined."""
    return {
        _clean(marker, MAX_NAME_CHARS): {_clean(name): _defined(value) for name, value in values.items()}
        for marker, values in as_object(channels).items()
        if isinstance(values, dict)
    }


def _places(rows: np.ndarray, known: Any) -> list[int]:
    """Number of each row's step, counted from the start of the run; epochs are as long as status.json says (``known``),
    or as the longest in the log."""
    longest = int(rows[:, STEP].max(initial=1))
    length = max(known, longest) if type(known) is int and 0 < known <= MAX_STEP else longest
    return [int(row[EPOCH] - 1) * length + int(row[STEP]) for row in rows]


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _defined(value: Any) -> float | int | None:
    """A finite number as it is, else None."""
    return value if math.isfinite(number(value)) else None


def _time(record: Mapping[str, Any]) -> str | None:
    time = record.get("time")
    return _clean(time, 40) if isinstance(time, str) else None


def seconds(time: str | None) -> float:
    """A time of the log in seconds since 1970; 0 where there is none."""
    try:
        found = datetime.fromisoformat(time or "")
    except ValueError:
        return 0.0
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()


class _Kept:
    """In place of a reader's thinned history: every epoch that counts, as the log has it."""

    names: tuple[str, ...] = ()
    left_out = 0

    def __init__(self) -> None:
        self.offered: Mapping[str, Any] = {}
        self.epochs: dict[int, tuple[Mapping[str, Any], bytes | dict[str, Any] | None]] = {}

    def put(self, epoch: int, channels: bytes | dict[str, Any] | None) -> None:
        self.epochs[epoch] = self.offered, channels

    def forget_after(self, epoch: int) -> None:
        self.epochs = {kept: found for kept, found in self.epochs.items() if kept <= epoch}


class _EveryEpoch(MetricsReader):
    kept: _Kept

    def _reset(self) -> None:
        super()._reset()
        self.kept = self.channels = _Kept()  # type: ignore[assignment]

    def _put(self, record: dict[str, Any] | None, channels: bytes | dict[str, Any] | None) -> None:
        self.kept.offered = record or {}
        super()._put(record, channels)


class _EveryStep(StepsReader):
    """Keeps all lines, however many, and their times."""

    def _reset(self) -> None:
        super()._reset()
        self._recent = deque()
        self.times: dict[tuple[float, float], str | None] = {}

    def _put(self, line: bytes, weight: float) -> None:
        count = len(self._recent), self.lines
        super()._put(line, weight)
        if (len(self._recent), self.lines) != count:
            newest = self._recent[-1]
            self.times[newest[EPOCH], newest[STEP]] = _time(parse_object(line) or {})

    def _skip_ahead(self, file: Any, size: int) -> None:
        return
