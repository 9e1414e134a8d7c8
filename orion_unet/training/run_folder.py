"""The run folder: claimed by one run at a time, refused where it holds another run, replaced when asked."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

import orion_unet
from orion_unet.checkpoint import BEST, LAST, PREVIOUS
from orion_unet.config import TrainConfig
from orion_unet.errors import InputError, RunError
from orion_unet.run_log import (
    CHECKPOINT_DIR,
    CONFIG_FILE,
    LOG_FILE,
    METRICS_FILE,
    NORMALIZATION_FILE,
    SANITY_DIR,
    SCHEMA,
    SPLIT_FILE,
    STATUS_FILE,
    STEPS_FILE,
    utc_now,
    write_json,
)
from orion_unet.training.failures import NOTE_PATTERN
from orion_unet.training.prepare import Prepared

# Files that mark a folder as holding a run, and all files that a run or its monitor writes there.
MARKS = (CONFIG_FILE, METRICS_FILE)
WRITTEN = (
    CONFIG_FILE,
    METRICS_FILE,
    STEPS_FILE,
    STATUS_FILE,
    SPLIT_FILE,
    NORMALIZATION_FILE,
    LOG_FILE,
    *(f"{name}.{form}" for name in ("training_progress", "comparison") for form in ("png", "svg", "pdf")),
    "monitor.json",
)
WRITTEN_PATTERNS = (f"{SANITY_DIR}/epoch_*.png", "tensorboard/events.out.tfevents.*")

LOCK_FILE = "run.lock"
# A holder on another machine is dead when its heartbeat is older than this.
STALE_S = 120.0
LOCK_POLL_S = 1.0


def check_free(config: TrainConfig) -> None:
    """Refuse an output_dir that cannot take the run; writes nothing. Raises InputError."""
    run_dir = Path(config.output.output_dir)
    check_writable(run_dir)
    if not config.output.overwrite and holds_run(run_dir):
        raise InputError(
            f"--output_dir {run_dir}: holds an earlier run, which is never touched unasked. Give another --output_dir, "
            "continue it with --resume auto, or replace it with --overwrite"
        )


def check_writable(run_dir: Path) -> None:
    """Refuse an output_dir that cannot be made or written to; writes nothing. Raises InputError."""
    holder = next((folder for folder in (run_dir, *run_dir.parents) if folder.exists()), run_dir)
    if not holder.is_dir():
        raise InputError(f"--output_dir {run_dir}: {holder} is a file; give another folder")
    if not os.access(holder, os.W_OK | os.X_OK):
        raise InputError(f"--output_dir {run_dir}: {holder} is not writable")


def holds_run(run_dir: Path) -> bool:
    """Whether the folder holds a run or its beginnings."""
    checkpoints = (run_dir / CHECKPOINT_DIR / name for name in (LAST, PREVIOUS, BEST))
    return any(path.exists() for path in (*(run_dir / mark for mark in MARKS), *checkpoints))


def last_attempt(run_dir: Path) -> int:
    """Number of the latest start of the run, which may have died before it saved anything; 0 for none."""
    try:
        attempt = json.loads((run_dir / CONFIG_FILE).read_text(encoding="utf-8"))["attempt"]
    except (OSError, ValueError, KeyError, TypeError):
        return 0
    return attempt if isinstance(attempt, int) else 0


def make(run_dir: Path) -> None:
    """Make the folder. Raises RunError where the disk does not allow it."""
    try:
        (run_dir / CHECKPOINT_DIR).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"--output_dir {run_dir}: cannot be made ({error.strerror})") from None


def clear(run_dir: Path, overwrite: bool) -> None:
    """Remove what killed saves left behind; with ``overwrite`` also what the earlier run wrote, and nothing else."""
    for left in (*run_dir.glob(".*.tmp"), *run_dir.glob(NOTE_PATTERN), *(run_dir / CHECKPOINT_DIR).glob(".*.tmp")):
        left.unlink(missing_ok=True)
    if overwrite:
        stale = [run_dir / name for name in WRITTEN]
        stale += [run_dir / CHECKPOINT_DIR / name for name in (LAST, PREVIOUS, BEST)]
        stale += [path for pattern in WRITTEN_PATTERNS for path in run_dir.glob(pattern)]
        for path in stale:
            path.unlink(missing_ok=True)


def check_space(run_dir: Path, parameters: int, averaged: bool) -> None:
    """Raises RunError where the checkpoints of a model of so many parameters would not fit on the disk."""
    # float32 weights, two moments and perhaps the averages, in the last, the one before and the one being written;
    # and the best model, old and new.
    needed = 4 * parameters * (3 * (4 if averaged else 3) + 2)
    free = shutil.disk_usage(run_dir).free
    if free < needed:
        raise RunError(
            f"--output_dir {run_dir}: the checkpoints need about {needed} bytes and {free} are free; make room or give "
            "another folder"
        )


def write_start(run_dir: Path, config: TrainConfig, prepared: Prepared, facts: dict[str, Any]) -> None:
    """config.json, split.json and normalization.json; ``facts`` join the options in config.json."""
    document = {
        "schema": SCHEMA,
        "created": utc_now(),
        "command": shlex.join(sys.argv),
        "recipe": config.recipe,
        "options": config.options(),
        **facts,
        "channel_names": list(prepared.table.kept_names),
        "versions": {
            "orion_unet": orion_unet.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
    }
    write_json(run_dir / CONFIG_FILE, document)
    write_json(run_dir / SPLIT_FILE, prepared.split.document(prepared.table))
    write_json(run_dir / NORMALIZATION_FILE, prepared.normalization.document())


class RunLock:
    """The lock of a run folder, with the host and process of its holder; a dead holder's lock is taken over.

    A holder on this machine is dead when its process is. One on another machine is alive when its heartbeat moves,
    and dead when the heartbeat is older than STALE_S. Between the two the lock waits: a job that the scheduler killed
    and queued again at once must not fail because its old lock is still fresh.
    """

    def __init__(self, run_dir: Path, say: Callable[[str], None] = lambda text: None) -> None:
        self.path = run_dir / LOCK_FILE
        self._say = say

    def acquire(self) -> None:
        """Take the lock; raises InputError where a living process holds it."""
        for _ in range(5):
            try:
                handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except FileExistsError:
                self._clear_if_dead()
                continue
            with open(handle, "w", encoding="utf-8") as file:
                json.dump(_identity(os.getpid()), file)
            return
        raise InputError(f"{self.path}: cannot be taken, other processes want it too; try again")

    def release(self) -> None:
        """Give the lock back; on a disk that has failed it stays, and the next run takes it over."""
        with suppress(OSError):
            self.path.unlink(missing_ok=True)

    def _clear_if_dead(self) -> None:
        try:
            found = self.path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return
        try:
            holder = json.loads(found)
        except (ValueError, RecursionError):
            holder = {}
        holder = holder if isinstance(holder, dict) else {}
        if self._lives(holder):
            raise InputError(
                f"{self.path.parent}: another run is writing there (process {holder.get('pid')} on "
                f"{holder.get('host')}). Wait for its end or choose another --output_dir; if it is surely dead, delete "
                f"{self.path}"
            )
        # Only one of several takers can rename the dead lock away. One that comes late may have caught the lock that
        # a faster one has taken meanwhile: it puts it back.
        aside = self.path.with_name(f".{LOCK_FILE}.{uuid.uuid4().hex}")
        with suppress(OSError):
            self.path.rename(aside)
            if aside.read_text(encoding="utf-8", errors="replace") != found:
                os.link(aside, self.path)
            aside.unlink()

    def _lives(self, holder: dict[str, Any]) -> bool:
        if holder.get("host") == socket.gethostname():
            pid = holder.get("pid")
            return isinstance(pid, int) and holder == _identity(pid) and _exists(pid)
        first = self._last_sign()
        announced = False
        while (age := self._now() - self._last_sign()) < STALE_S:
            if self._last_sign() != first or not self.path.exists():
                # Its heartbeat moves; or it has given the lock back, and the next attempt will tell.
                return self.path.exists()
            if not announced:
                announced = True
                self._say(
                    f"{self.path}: held by process {holder.get('pid')} on {holder.get('host')}, silent for "
                    f"{max(0, age):.0f} s; waiting up to {STALE_S - age:.0f} s to take it over or see it alive"
                )
            time.sleep(LOCK_POLL_S)
        return False

    def _last_sign(self) -> float:
        """When the holder last wrote, by the clock of the file system."""
        times = []
        for path in (self.path, self.path.with_name(STATUS_FILE)):
            with suppress(OSError):
                times.append(path.stat().st_mtime)
        return max(times, default=0.0)

    def _now(self) -> float:
        """The present, by the clock of the file system."""
        probe = self.path.with_name(f".{LOCK_FILE}.{uuid.uuid4().hex}")
        probe.touch()
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink()


def _identity(pid: int) -> dict[str, Any]:
    """Host, process and its start time, since a process number is used again."""
    started = None
    with suppress(OSError, IndexError):
        # Field 22 of /proc/PID/stat, counted behind the command name, which may hold spaces.
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return {"host": socket.gethostname(), "pid": pid, "started": started}


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
