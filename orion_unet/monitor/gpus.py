"""How busy the GPUs of this machine are, as ``nvidia-smi`` says, where there is one.

It is asked seldom and never waited for long. See https://docs.nvidia.com/deploy/nvidia-smi/ for what it answers.
"""

from __future__ import annotations

import math
import os
import select
import shutil
import signal
import subprocess
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from orion_unet.text import clean, short_number

ASK = ("--query-gpu=index,name,utilization.gpu,memory.used,memory.total", "--format=csv,noheader,nounits")
# An answer that takes longer, or is longer, is ignored.
DEADLINE_S, MOST_BYTES, MOST_GPUS = 2.0, 64 << 10, 64
# One reading covers only a fraction of a second, so the mean of this many is shown.
LOOKS = 30
# After an answer that was none, wait this long: a driver that hangs must not slow down every poll.
PAUSE_S = 300.0
LEAST_INTERVAL_S = 1.0


@dataclass(frozen=True)
class Gpu:
    """One GPU: ``busy`` in [0, 1] (mean over ``looks`` answers) and its memory [bytes], nan where not known."""

    index: int
    name: str
    busy: float
    looks: int
    memory_used_bytes: float
    memory_total_bytes: float

    def document(self) -> dict[str, Any]:
        """The GPU as plain values; None where not known."""
        values = {
            "busy": self.busy,
            "memory_used_bytes": self.memory_used_bytes,
            "memory_total_bytes": self.memory_total_bytes,
        }
        known = {name: value if math.isfinite(value) else None for name, value in values.items()}
        return {"index": self.index, "name": clean(self.name), "looks": self.looks} | known

    def text(self) -> str:
        """For a person: ``GPU 0 35 % busy, 11.2 of 80 GiB``."""
        busy = f" {100 * self.busy:.0f} % busy" if math.isfinite(self.busy) else ""
        used, total = (short_number(each / 2**30, 3) for each in (self.memory_used_bytes, self.memory_total_bytes))
        return f"GPU {self.index}{busy}, {used} of {total} GiB"


class Gpus:
    """Asks ``nvidia-smi`` at most once in ``interval_s``; without one on the PATH, never.

    ``read`` starts no second process while an earlier one cannot be ended.
    """

    def __init__(self, interval_s: float = 0.0) -> None:
        self.command = shutil.which("nvidia-smi")
        self._interval_s = max(interval_s, LEAST_INTERVAL_S)
        self._asked_at = -math.inf
        self._not_before = -math.inf
        self._stuck: subprocess.Popen[bytes] | None = None
        self._looks: deque[list[Gpu]] = deque(maxlen=LOOKS)
        self._latest: list[Gpu] = []

    def read(self) -> list[Gpu]:
        """The GPUs of this machine in their order; empty where there is no usable answer."""
        now = time.monotonic()
        # A little early is on time: polls are not exactly one interval apart.
        if self.command is None or now < self._not_before or now < self._asked_at + 0.9 * self._interval_s:
            return self._latest
        if self._stuck is not None and self._stuck.poll() is None:
            return self._latest
        self._asked_at = now
        found = parsed(self._answer(self.command))
        if not found:
            self._not_before = time.monotonic() + PAUSE_S
            self._looks.clear()
            self._latest = []
            return []
        self._looks.append(found)
        self._latest = [self._mean(gpu) for gpu in found]
        return self._latest

    def _mean(self, gpu: Gpu) -> Gpu:
        busy = [known.busy for look in self._looks for known in look if known.index == gpu.index]
        busy = [value for value in busy if math.isfinite(value)]
        mean = sum(busy) / len(busy) if busy else math.nan
        return Gpu(gpu.index, gpu.name, mean, len(busy), gpu.memory_used_bytes, gpu.memory_total_bytes)

    def _answer(self, command: str) -> bytes:
        """What the command prints; nothing if it fails, or goes on for too long."""
        deadline = time.monotonic() + DEADLINE_S
        try:
            process = subprocess.Popen(
                [command, *ASK],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except (OSError, ValueError):
            return b""
        assert process.stdout is not None
        said, ended = b"", False
        with process.stdout as pipe:
            while not ended and len(said) <= MOST_BYTES and (left := deadline - time.monotonic()) > 0:
                if select.select([pipe], [], [], left)[0]:
                    part = os.read(pipe.fileno(), MOST_BYTES)
                    said, ended = said + part, not part
        try:
            code = process.wait(max(deadline - time.monotonic(), 0.01) if ended else 0)
        except subprocess.TimeoutExpired:
            self._end(process)
            return b""
        return said if ended and code == 0 else b""

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """End it with what it has started. A process that waits for a driver cannot be ended: it is left behind."""
        with suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        self._stuck = process
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.1)
            self._stuck = None


def parsed(answer: bytes) -> list[Gpu]:
    """The GPUs of an answer to ASK; empty if any line of it is something else."""
    lines = answer.decode("utf-8", "replace").strip().splitlines()
    found = []
    for line in lines[:MOST_GPUS]:
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) < 5 or not (cells[0].isascii() and cells[0].isdigit() and len(cells[0]) < 5):
            return []
        # A name may contain a comma.
        busy, used, total = (_number(cell) for cell in cells[-3:])
        if math.isnan(total):
            return []
        busy = busy / 100 if 0 <= busy <= 100 else math.nan
        found.append(Gpu(int(cells[0]), ",".join(cells[1:-3]), busy, 1, used * 2**20, total * 2**20))
    return found


def busiest(gpus: Sequence[Gpu], count: int) -> list[Gpu]:
    """The ``count`` busiest GPUs of which that is known: a run on some of a machine's GPUs uses no busier ones."""
    known = sorted((gpu for gpu in gpus if math.isfinite(gpu.busy)), key=lambda gpu: -gpu.busy)
    return known[: max(count, 1)]


def summary(gpus: Sequence[Gpu]) -> str:
    """The GPUs in a line for a person: each of two, the range of several."""
    if len(gpus) <= 2:
        return " | ".join(gpu.text() for gpu in gpus)
    busy = _range([100 * gpu.busy for gpu in gpus], 0)
    used, total = (
        _range([value / 2**30 for value in values], 1)
        for values in ([gpu.memory_used_bytes for gpu in gpus], [gpu.memory_total_bytes for gpu in gpus])
    )
    return f"{len(gpus)} GPUs {busy} % busy, {used} of {total} GiB each"


def _range(values: Sequence[float], places: int) -> str:
    known = [f"{value:.{places}f}" for value in sorted(filter(math.isfinite, values))]
    return "-" if not known else known[0] if known[0] == known[-1] else f"{known[0]} to {known[-1]}"


def _number(cell: str) -> float:
    """A number from 0 to 1e9; nan for anything else, such as ``[N/A]``."""
    try:
        value = float(cell)
    except ValueError:
        return math.nan
    return value if 0 <= value < 1e9 else math.nan
