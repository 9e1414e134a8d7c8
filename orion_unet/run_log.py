"""The run folder: the only thing trainer and monitor share. Strict JSON, atomic replaces, no torch.

Layout of a run folder::

    config.json  split.json  normalization.json  metrics.jsonl  status.json  train.log
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


def utc_now() -> str:
    """The current time as ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def strict(value: Any) -> Any:
    """A copy of plain Python values in which every number that is not finite is None, as strict JSON wants."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    return value


def fsync_folder(folder: Path) -> None:
    """Make a rename in the folder survive a power cut, where the file system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_atomic(path: Path, content: bytes, durable: bool = True) -> None:
    """Replace a file so that a reader sees the old one or the new one, never a part. Raises OSError."""
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


class MetricsWriter:
    """Appends one strict-JSON line per finished epoch to metrics.jsonl, flushed and fsynced."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / METRICS_FILE

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record in one call. A half line left by a killed writer is closed off first."""
        line = json.dumps({"schema": SCHEMA, **strict(record)}, ensure_ascii=False, allow_nan=False) + "\n"
        with open(self.path, "ab+") as file:
            if file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    line = "\n" + line
            file.write(line.encode("utf-8", "backslashreplace"))
            file.flush()
            os.fsync(file.fileno())


class Heartbeat:
    """Keeps status.json fresh from a thread of its own while the run works, and closes it with the run's end.

    Used as a context manager; ``update`` takes any field of status.json (state, epoch, epochs, step,
    steps_per_epoch, message). A change of state or epoch is written at once, the rest with the next beat.
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
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
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
            # A status that cannot be written must not end the training that it tells of.
            with suppress(OSError):
                self._write()

    def progress(self, **changes: Any) -> None:
        """Set fields, and note that a step or a validation batch has been finished now."""
        self.update(**changes, progressed=utc_now())

    def _write(self) -> None:
        with self._lock:
            status = {
                "schema": SCHEMA,
                **self._fields,
                "updated": utc_now(),
                "pid": os.getpid(),
                "host": socket.gethostname(),
            }
            write_json(self.path, status, durable=False)

    def _beat(self) -> None:
        while not self._stop.wait(self.interval_s):
            # A full or briefly unreachable disk must not end the thread: the next beat tries again.
            with suppress(OSError):
                self._write()


def read_document(path: Path, limit_bytes: int = 1 << 22) -> tuple[dict[str, Any] | None, float]:
    """Read a JSON object of the run folder that its writer replaces whole.

    Returns the object, or None where the file holds something else or more than ``limit_bytes``, and the
    file's modification time in seconds, as its file system tells it. The time is taken from the opened file:
    network file systems answer a bare ``stat`` from a cache. Raises OSError where the file cannot be read.
    """
    with open_regular(path) as file:
        modified = os.fstat(file.fileno()).st_mtime
        content = file.read(limit_bytes + 1)
    if len(content) > limit_bytes:
        return None, modified
    return parse_object(content), modified


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading; raises OSError for a folder, and at once for a pipe, which would block for ever."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "is not a regular file", str(path))
        return os.fdopen(handle, "rb", buffering=0)
    except BaseException:
        os.close(handle)
        raise


def parse_object(content: bytes) -> dict[str, Any] | None:
    """The JSON object that the bytes spell, or None. ``NaN`` and ``Infinity``, which are no JSON, are let pass."""
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None
