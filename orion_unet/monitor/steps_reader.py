"""Reads steps.jsonl while the trainer appends to it: the newest lines as they are, older ones averaged or sampled."""

from __future__ import annotations

import math
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from orion_unet.monitor.growing_log import GrowingLog
from orion_unet.monitor.run_reader import MAX_EPOCH, number
from orion_unet.run_log import SCHEMA, STEPS_FILE, parse_object

COLUMNS = (
    "epoch",
    "step",
    "loss",
    "lr",
    "grad_norm",
    "samples_per_s",
    "data_wait_fraction",
    "steps",
    "skipped_steps",
    "non_finite_steps",
)
EPOCH, STEP, LOSS, LR, GRAD, SPEED, WAIT, COVERED, SKIPPED, NON_FINITE = range(len(COLUMNS))
# The newest lines are kept as they are. The whole run is kept as points, each the mean of several lines.
MAX_RECENT = 1024
MAX_POINTS = 2048
# A log, or an addition to it, that is larger than this is read in full only at its end. Before that, single lines are
# read at equal distances.
FIRST_BYTES, POLL_BYTES, TAIL_BYTES = 16 << 20, 2 << 20, 1 << 20
SAMPLES = 512
SAMPLE_BYTES = 4096
MAX_STEP = 10**12


class StepsReader(GrowingLog):
    """The steps of a growing steps.jsonl, in order.

    Damaged lines, lines of another schema, and single lines that go back in the run are skipped and counted. A line of
    a newer attempt ends the earlier one: the earlier attempt's lines from there on do not count, whether they come
    before or after it.

    ``recent`` and ``history`` return arrays (N, len(COLUMNS)). ``steps`` is the number of steps that a row covers; nan
    means not measured, inf a loss that is not finite. ``sampled`` says that the log was too long to read all of it.
    """

    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir / STEPS_FILE)

    def _reset(self) -> None:
        super()._reset()
        self.sampled = False
        self.lines = 0
        self._attempt = 0
        self._stride = 1.0
        self._recent: deque[list[float]] = deque(maxlen=MAX_RECENT)
        self._points: list[_Point] = []

    def recent(self) -> np.ndarray:
        """The newest lines, at most MAX_RECENT."""
        return _table(list(self._recent))

    def history(self) -> np.ndarray:
        """The whole run in at most MAX_POINTS rows: each the mean of neighbouring lines, the largest gradient norm, the
        sums of the counts, at the position of the last of them. The losses that are not finite count only where a row
        has no other."""
        return _table([point.row() for point in self._points])

    def _line(self, line: bytes) -> None:
        self._put(line, 1.0)

    def _unended_line(self, line: bytes) -> bool:
        if parse_object(line) is None:
            return False
        self._put(line, 1.0)
        return True

    def _skip_ahead(self, file: Any, size: int) -> None:
        if size - self._offset <= (POLL_BYTES if self._offset else FIRST_BYTES):
            return
        begin, end = self._offset, size - TAIL_BYTES
        lengths = []
        for offset in np.linspace(begin, end, SAMPLES, endpoint=False).astype(int).tolist():
            file.seek(offset)
            # The first part is the end of a line, or the rest of one that was begun at the last poll.
            parts = file.read(SAMPLE_BYTES).split(b"\n", 2)
            if len(parts) == 3:
                lengths.append((len(parts[1]) + 1, parts[1]))
        usual = float(np.median([length for length, _ in lengths])) if lengths else 1.0
        weight = max(1.0, (end - begin) / usual / SAMPLES)
        total = self.lines + size / usual
        while total / self._stride > MAX_POINTS:
            self._widen()
        for _, line in lengths:
            self._put(line, weight)
        self.sampled = True
        self._jump(file, end)

    def _put(self, line: bytes, weight: float) -> None:
        record = parse_object(line)
        row = _row(record) if record is not None else None
        if row is None or record is None:
            self.damaged_lines += 1
            return
        attempt = record.get("attempt", 1)
        if type(attempt) is not int or not 0 <= attempt <= MAX_EPOCH:
            attempt = 1
        place = (row[EPOCH], row[STEP])
        if attempt < self._attempt:
            # A line of an attempt that a newer one has replaced.
            return
        if attempt > self._attempt:
            self._attempt = attempt
            self._back_to(place)
        elif self._recent and place <= _place(self._recent[-1]):
            if weight > 1 or (len(self._recent) > 1 and place <= _place(self._recent[-2])):
                # Of a sample that hit the same line, and of a line that goes back, the earlier one counts.
                self.damaged_lines += weight == 1
                return
            self._back_to(place)
        row[COVERED] = self._covered(row)
        self.lines += round(weight)
        self._recent.append(row)
        self._point(row, weight)

    def _covered(self, row: list[float]) -> float:
        """How many steps a line covers: those since the line before it, which ends with its epoch."""
        if not self._recent or row[EPOCH] != self._recent[-1][EPOCH]:
            last = self._recent[-1][COVERED] if self._recent else row[STEP]
            return min(row[STEP], last) if self._recent and row[EPOCH] != self._recent[-1][EPOCH] + 1 else row[STEP]
        return row[STEP] - self._recent[-1][STEP]

    def _point(self, row: list[float], weight: float) -> None:
        if not self._points or self._points[-1].weight + weight > self._stride:
            self._points.append(_Point(row, weight))
        else:
            self._points[-1].add(row, weight)
        if len(self._points) > MAX_POINTS:
            self._widen()

    def _widen(self) -> None:
        """Double the number of lines that each point summarises."""
        self._stride *= 2
        joined: list[_Point] = []
        for point in self._points:
            if joined and joined[-1].parts == 1:
                joined[-1].join(point)
            else:
                point.parts = 1
                joined.append(point)
        for point in joined:
            point.parts = 1
        self._points = joined

    def _back_to(self, place: tuple[float, float]) -> None:
        """Drop what comes at or after a place, and take the kept lines of a point that straddles it one by one."""
        while self._recent and _place(self._recent[-1]) >= place:
            self._recent.pop()
        while self._points and self._points[-1].last >= place:
            self._points.pop()
        since = self._points[-1].last if self._points else (-1.0, -1.0)
        for row in self._recent:
            if _place(row) > since:
                self._point(row, 1.0)


class _Point:
    """Several neighbouring lines taken together."""

    def __init__(self, row: list[float], weight: float) -> None:
        self.weight = 0.0
        self.parts = 1
        self._sums = [0.0] * len(COLUMNS)
        self._counts = [0.0] * len(COLUMNS)
        self._grad = math.nan
        self._broken = False
        self.last = _place(row)
        self._last = row
        self.add(row, weight)

    def add(self, row: list[float], weight: float) -> None:
        """Take a further line."""
        self.weight += weight
        self.last, self._last = _place(row), row
        self._broken |= row[LOSS] == math.inf
        # fmax takes the number where the other is nan.
        self._grad = float(np.fmax(self._grad, row[GRAD]))
        for at in (LOSS, SPEED, WAIT):
            if math.isfinite(row[at]):
                self._sums[at] += weight * row[at]
                self._counts[at] += weight
        for at in (COVERED, SKIPPED, NON_FINITE):
            if math.isfinite(row[at]):
                self._sums[at] += row[at]

    def join(self, later: _Point) -> None:
        """Take a later point into this one."""
        self.weight += later.weight
        self.parts = 2
        self.last, self._last = later.last, later._last
        self._broken |= later._broken
        self._grad = float(np.fmax(self._grad, later._grad))
        self._sums = [own + other for own, other in zip(self._sums, later._sums, strict=True)]
        self._counts = [own + other for own, other in zip(self._counts, later._counts, strict=True)]

    def row(self) -> list[float]:
        """The point as a row."""
        row = list(self._last)
        row[GRAD] = self._grad
        for at in (LOSS, SPEED, WAIT):
            row[at] = self._sums[at] / self._counts[at] if self._counts[at] else math.nan
        if self._broken and not self._counts[LOSS]:
            row[LOSS] = math.inf
        for at in (COVERED, SKIPPED, NON_FINITE):
            row[at] = self._sums[at]
        return row


def _place(row: list[float]) -> tuple[float, float]:
    return row[EPOCH], row[STEP]


def _table(rows: list[list[float]]) -> np.ndarray:
    return np.array(rows, float).reshape(len(rows), len(COLUMNS))


def _row(record: dict[str, Any]) -> list[float] | None:
    """The record's values in the order of ``COLUMNS``; None if it is no line of this schema."""
    epoch, step, schema = record.get("epoch"), record.get("step"), record.get("schema", SCHEMA)
    if type(schema) is not int or schema != SCHEMA or type(epoch) is not int or not 0 < epoch <= MAX_EPOCH:
        return None
    if type(step) is not int or not 0 < step <= MAX_STEP:
        return None
    return [
        epoch,
        step,
        number(record["loss"], math.inf) if "loss" in record else math.nan,
        number(record.get("lr")),
        _positive(record.get("grad_norm")),
        _positive(record.get("samples_per_s")),
        _positive(record.get("data_wait_fraction")),
        math.nan,
        _positive(record.get("skipped_steps")),
        _positive(record.get("non_finite_steps")),
    ]


def _positive(value: Any) -> float:
    """A JSON value as a float of at least 0; nan where it is something else."""
    found = number(value)
    return found if found >= 0 else math.nan
