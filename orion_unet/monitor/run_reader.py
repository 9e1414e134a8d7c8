"""Reads metrics.jsonl while the trainer appends to it, in bounded memory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from orion_unet.monitor.growing_log import GrowingLog
from orion_unet.run_log import METRICS_FILE, SCHEMA, parse_object

TERMS = ("mse", "l1", "boundary", "focal", "variance", "correlation")
METRICS = ("pearson", "mae", "psnr_db", "ssim")
COLUMNS = (
    "epoch",
    "attempt",
    "duration_s",
    "lr",
    "train_loss",
    "val_loss",
    *(f"val_{term}" for term in TERMS),
    *METRICS,
    "r2",
    "grad_norm",
    "samples_per_s",
    "data_wait_fraction",
    "max_memory_bytes",
    "skipped_steps",
)
MAX_EPOCH = 10_000_000
MAX_CHANNELS = 20_000
MAX_NAME_CHARS = 200
MAX_CHANNEL_ROWS = 512
LARGEST = 1e30
"""Larger numbers count as not finite, and numbers below its inverse as 0: they are no losses, and would overflow."""

_CHANNELS_KEY = b'"per_channel":'


class ChannelHistory:
    """Validation Pearson of every marker over the epochs, thinned to at most ``MAX_CHANNEL_ROWS`` epochs.

    It keeps the epochs that are multiples of a stride, which doubles when there are too many, and all metrics of the
    newest epoch.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.left_out = 0
        self._index: dict[str, int] = {}
        self._stride = 1
        self._rows: dict[int, np.ndarray] = {}
        self._latest: tuple[int, bytes | dict[str, Any] | None] = (-1, None)

    def put(self, epoch: int, channels: bytes | dict[str, Any] | None) -> None:
        """Add one epoch's ``per_channel`` object, parsed or as the bytes of the log."""
        if epoch >= self._latest[0]:
            self._latest = (epoch, channels)
        if epoch % self._stride == 0:
            self._rows[epoch] = self._row(as_object(channels))
            if len(self._rows) > MAX_CHANNEL_ROWS:
                self._stride *= 2
                self._rows = {kept: row for kept, row in self._rows.items() if kept % self._stride == 0}

    def forget_after(self, epoch: int) -> None:
        """Drop all later epochs."""
        self._rows = {kept: row for kept, row in self._rows.items() if kept <= epoch}
        if self._latest[0] > epoch:
            self._latest = (-1, None)

    def pearson(self) -> tuple[np.ndarray, np.ndarray]:
        """Epochs (E,) in order, and Pearson (C, E) float32 in [-1, 1], nan where undefined."""
        newest, channels = self._latest
        rows = dict(self._rows)
        if newest >= 0 and newest not in rows:
            rows[newest] = self._row(as_object(channels))
        epochs = sorted(rows)
        values = np.full((len(self.names), len(epochs)), np.nan, np.float32)
        for column, epoch in enumerate(epochs):
            values[: len(rows[epoch]), column] = rows[epoch]
        return np.array(epochs, int), values

    def newest(self) -> dict[str, dict[str, float]]:
        """Metrics of every marker in the newest epoch; nan where null or absent."""
        channels = as_object(self._latest[1])
        return {
            _short(name): {metric: number(values.get(metric)) for metric in METRICS}
            for name, values in list(channels.items())[:MAX_CHANNELS]
            if isinstance(values, dict)
        }

    def _row(self, channels: dict[str, Any]) -> np.ndarray:
        index, found = self._index, {}
        for name, values in channels.items():
            name = _short(name)
            if name not in index:
                if len(index) >= MAX_CHANNELS:
                    self.left_out += 1
                    continue
                index[name] = len(index)
                self.names.append(name)
            if isinstance(values, dict):
                value = number(values.get("pearson"))
                found[index[name]] = value if abs(value) <= 1 else math.nan
        row = np.full(len(index), np.nan, np.float32)
        row[list(found)] = list(found.values())
        return row


class MetricsReader(GrowingLog):
    """The epochs of a growing metrics.jsonl.

    Damaged lines and lines of another schema are skipped and counted. Of two lines of one epoch the later attempt
    counts, and lines of an earlier attempt beyond the newest attempt's last epoch do not count.
    """

    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir / METRICS_FILE)

    def _reset(self) -> None:
        super()._reset()
        self.foreign_schema: Any = None
        self.channels = ChannelHistory()
        self._data = np.empty((256, len(COLUMNS)))
        self._count = 0
        self._row_of: dict[int, int] = {}
        self._ordered = True
        self._attempt = 0.0
        self._last_of_attempt = -1

    def __len__(self) -> int:
        return self._count

    def column(self, name: str) -> np.ndarray:
        """One of ``COLUMNS``, float64 (E,) in order of epoch: nan where not measured, inf for a loss not finite."""
        values = self._data[: self._count, COLUMNS.index(name)]
        if not self._ordered:
            values = values[np.argsort(self._data[: self._count, 0], kind="stable")]
        return values.copy()

    def _line(self, line: bytes) -> None:
        self._put(*_parse(line))

    def _unended_line(self, line: bytes) -> bool:
        record, channels = _parse(line)
        if record is not None:
            self._put(record, channels)
        return record is not None

    def _put(self, record: dict[str, Any] | None, channels: bytes | dict[str, Any] | None) -> None:
        row = _row(record) if record is not None else None
        if row is None:
            self.damaged_lines += 1
            if record is not None and record.get("schema", SCHEMA) != SCHEMA:
                self.foreign_schema = record["schema"]
            return
        epoch, attempt = int(row[0]), row[1]
        if attempt > self._attempt:
            self._forget_after(epoch)
            self._attempt, self._last_of_attempt = attempt, epoch
        elif attempt < self._attempt and epoch > self._last_of_attempt:
            return
        elif attempt == self._attempt:
            self._last_of_attempt = max(self._last_of_attempt, epoch)
        at = self._row_of.get(epoch)
        if at is None:
            at = self._append(epoch)
        elif attempt < self._data[at, 1]:
            return
        self._data[at] = row
        self.channels.put(epoch, channels)

    def _forget_after(self, epoch: int) -> None:
        """Drop all later epochs: a newer attempt has gone back to this one."""
        rows = self._data[: self._count]
        kept = rows[rows[:, 0] <= epoch]
        if len(kept) == len(rows):
            return
        self._count = len(kept)
        self._data[: self._count] = kept
        self._row_of = {int(known): at for at, known in enumerate(kept[:, 0])}
        self._ordered = bool((np.diff(kept[:, 0]) > 0).all())
        self.channels.forget_after(epoch)

    def _append(self, epoch: int) -> int:
        at = self._count
        if at == len(self._data):
            self._data = np.concatenate([self._data, np.empty_like(self._data)])
        if at and epoch < self._data[at - 1, 0]:
            self._ordered = False
        self._row_of[epoch] = at
        self._count += 1
        return at


def number(value: Any, null: float = math.nan) -> float:
    """A JSON value as a float: ``null`` where it is null or not finite, nan where it is not a number."""
    if type(value) is float or type(value) is int:
        # An integer may be too large for a float, but can be compared.
        if not -LARGEST < value < LARGEST:
            return null
        return float(value) if abs(value) > 1 / LARGEST else 0.0
    return null if value is None else math.nan


def _parse(line: bytes) -> tuple[dict[str, Any] | None, bytes | dict[str, Any] | None]:
    """The record of a line, and separately its per_channel object, as bytes not parsed yet where possible.

    The markers take most of a line, and most of a long log is never shown. The object is cut out up to the first
    ``}}``; if that is not its end, the brackets of the rest do not match, and the whole line is parsed.
    """
    start = line.find(_CHANNELS_KEY)
    end = line.find(b"}}", start) + 2 if start >= 0 else 1
    if end > 1:
        begin = start + len(_CHANNELS_KEY)
        record = parse_object(line[:begin] + b"0" + line[end:])
        if record is not None:
            return record, line[begin:end]
    record = parse_object(line)
    val = record.get("val") if record else None
    channels = val.get("per_channel") if isinstance(val, dict) else None
    return record, channels if isinstance(channels, dict) else None


def as_object(channels: bytes | dict[str, Any] | None) -> dict[str, Any]:
    """A ``per_channel`` object from the bytes of the log; empty if it is none."""
    return (parse_object(channels) or {}) if isinstance(channels, bytes) else (channels or {})


def _row(record: dict[str, Any]) -> list[float] | None:
    """The record's values in the order of ``COLUMNS``; None if it is not an epoch of this schema."""
    epoch = record.get("epoch")
    schema = record.get("schema", SCHEMA)
    if type(epoch) is not int or not 0 <= epoch <= MAX_EPOCH or type(schema) is not int or schema != SCHEMA:
        return None
    attempt = record.get("attempt", 1)
    if type(attempt) is not int or not 0 <= attempt <= MAX_EPOCH:
        attempt = 1
    train, val = _section(record, "train"), _section(record, "val")
    val_terms, metrics = _section(val, "terms"), _section(val, "metrics")
    return [
        epoch,
        attempt,
        number(record.get("duration_s")),
        number(record.get("lr")),
        number(train["loss"], math.inf) if "loss" in train else math.nan,
        number(val["loss"], math.inf) if "loss" in val else math.nan,
        *[number(val_terms.get(term)) for term in TERMS],
        *[number(metrics.get(metric)) for metric in METRICS],
        number(metrics.get("r2")),
        *[number(record.get(name)) for name in COLUMNS[-5:]],
    ]


def _section(record: dict[str, Any], name: str) -> dict[str, Any]:
    value = record.get(name)
    return value if isinstance(value, dict) else {}


def _short(name: str) -> str:
    return name if len(name) <= MAX_NAME_CHARS else name[:MAX_NAME_CHARS] + "…"
