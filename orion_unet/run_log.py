"""The run folder, which is all that trainer and monitor share. Strict JSON, atomic replaces, no torch.

Layout of a run folder::

    config.json  split.json  normalization.json  metrics.jsonl  steps.jsonl  status.json  train.log
    checkpoints/  sanity/  training_progress.png  monitor.json
"""

from __future__ import annotations

import errno
import json
import math
import os
import socket
import stat
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

SCHEMA = 1
CONFIG_FILE = "config.json"
SPLIT_FILE = "split.json"
NORMALIZATION_FILE = "normalization.json"
METRICS_FILE = "metrics.jsonl"
STEPS_FILE = "steps.jsonl"
STATUS_FILE = "status.json"
LOG_FILE = "train.log"
CHECKPOINT_DIR = "checkpoints"
SANITY_DIR = "sanity"

STATES = (
    "starting",
    "training",
    "validating",
    "finished",
    "early_stopped",
    "interrupted",
    "diverged",
    "failed",
)
FINAL_STATES = ("finished", "early_stopped", "interrupted", "diverged", "failed")
HEARTBEAT_S = 5.0
PACE_STEPS = 20


def utc_now() -> str:
    """The current time as ISO 8601 in UTC, to the second."""
    return _utc(time.time())


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def strict(value: Any) -> Any:
    """A copy of plain Python values for strict JSON: numbers that are not finite become None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    return value


def fsync_folder(folder: Path) -> None:
    """Make a rename in the folder survive a power cut, if the file system supports that."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_atomic(path: Path, content: bytes, durable: bool = True) -> None:
    """Replace a file so that readers see the old or the new one, never a part. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if durable:
        fsync_folder(path.parent)


def write_json(path: Path, document: Mapping[str, Any], durable: bool = True) -> None:
    """Replace a JSON file atomically; numbers that are not finite become null."""
    text = json.dumps(strict(document), indent=2, ensure_ascii=False, allow_nan=False)
    # A file name that is not UTF-8 holds surrogates: they become JSON's own escapes.
    write_atomic(path, (text + "\n").encode("utf-8", "backslashreplace"), durable)


def append_line(path: Path, document: Mapping[str, Any], durable: bool = True) -> None:
    """Add a line of strict JSON in one call, flushed and, if ``durable``, fsynced; a partial line that a killed writer
    left is ended first. Raises OSError."""
    line = json.dumps(strict(document), ensure_ascii=False, allow_nan=False) + "\n"
    with open(path, "ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = "\n" + line
        file.write(line.encode("utf-8", "backslashreplace"))
        file.flush()
        if durable:
            os.fsync(file.fileno())


class MetricsWriter:
    """Appends one line of strict JSON per finished epoch to metrics.jsonl."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / METRICS_FILE

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record."""
        append_line(self.path, {"schema": SCHEMA, **record})


class StepsWriter:
    """Appends lines of strict JSON to steps.jsonl.

    A line is not fsynced, because it may follow the last one within a second. Closing the file hands it to a file
    server, so that a monitor on another machine sees it.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / STEPS_FILE

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record. Raises OSError."""
        append_line(self.path, {"schema": SCHEMA, **record}, durable=False)


class Heartbeat:
    """Keeps status.json up to date from a thread of its own while the run works, and closes it at the run's end.

    Use it as a context manager. ``update`` and ``progress`` take any of the fields ``state``, ``epoch``, ``epochs``,
    ``step``, ``steps_per_epoch`` and ``message``. A change of state or epoch is written at once, everything else with
    the next beat. Besides these fields, ``updated``, ``pid`` and ``host``, the file says how the run gets on:

    - ``since``: when the state or the epoch last changed;
    - ``progressed``: when the last training step or validation batch finished, null before the first;
    - ``step_s``: how long one of them takes in the present state [s], the mean of about the last 20; null before the
      first since then, and until three have been timed.
    """

    def __init__(self, run_dir: Path, interval_s: float = HEARTBEAT_S) -> None:
        self.path = run_dir / STATUS_FILE
        self.interval_s = interval_s
        self._fields: dict[str, Any] = {
            "state": "starting",
            "epoch": 0,
            "epochs": 0,
            "step": 0,
            "steps_per_epoch": 0,
            "message": "",
        }
        self._since = time.time()
        self._progressed: float | None = None
        self._last_step: float | None = None
        # Of each state, how many steps were timed, and how long one takes [s].
        self._pace: dict[str, tuple[int, float]] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._since = time.time()
        self._write()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        if kind is not None and self._fields["state"] not in FINAL_STATES:
            self._fields.update(state="failed", message=f"{kind.__name__}: {error}")
        with suppress(OSError):
            self._write()

    def update(self, **changes: Any) -> None:
        """Set fields of status.json."""
        urgent = any(self._fields.get(key) != changes[key] for key in ("state", "epoch") if key in changes)
        self._fields.update(changes)
        if urgent:
            self._since, self._last_step = time.time(), None
            # Training goes on even if its status cannot be written.
            with suppress(OSError):
                self._write()

    def progress(self, **changes: Any) -> None:
        """Note that a training step or a validation batch has finished, and set fields.

        Cheap enough for every step: it writes no file, unless the state or the epoch changes.
        """
        now = time.monotonic()
        self._progressed = time.time()
        if self._last_step is not None:
            state = self._fields["state"]
            count, mean = self._pace.get(state, (0, 0.0))
            count += 1
            self._pace[state] = (count, mean + (now - self._last_step - mean) / min(count, PACE_STEPS))
        self._last_step = now
        self.update(**changes)

    def _write(self) -> None:
        with self._lock:
            count, pace = self._pace.get(self._fields["state"], (0, 0.0))
            status = {
                "schema": SCHEMA,
                **self._fields,
                "since": _utc(self._since),
                "progressed": None if self._progressed is None else _utc(self._progressed),
                "step_s": round(pace, 4) if count >= 3 and self._last_step is not None else None,
                "updated": utc_now(),
                "pid": os.getpid(),
                "host": socket.gethostname(),
            }
            write_json(self.path, status, durable=False)

    def _beat(self) -> None:
        while not self._stop.wait(self.interval_s):
            # The disk may be full or unreachable for a moment: the next beat tries again.
            with suppress(OSError):
                self._write()


def read_document(path: Path, limit_bytes: int = 1 << 22) -> tuple[dict[str, Any] | None, float]:
    """Read a JSON object from a file that its writer replaces as a whole.

    Returns the object (None if the file contains something else, or more than ``limit_bytes``) and the modification
    time [s] by the file system's clock. That time is read from the open file, because network file systems answer a
    plain ``stat`` from a cache. Raises OSError if the file cannot be read.
    """
    with open_regular(path) as file:
        modified = os.fstat(file.fileno()).st_mtime
        content = file.read(limit_bytes + 1)
    if len(content) > limit_bytes:
        return None, modified
    return parse_object(content), modified


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading. Raises OSError for folders, and for pipes, which could block for ever."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "is not a regular file", str(path))
        return os.fdopen(handle, "rb", buffering=0)
    except BaseException:
        os.close(handle)
        raise


def parse_object(content: bytes) -> dict[str, Any] | None:
    """The bytes as a JSON object, or None. Accepts ``NaN`` and ``Infinity``, which strict JSON does not have."""
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None
