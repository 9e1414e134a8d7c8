"""One writer for a run folder: a lock with host and process, taken over when its holder is dead."""

from __future__ import annotations

import json
import os
import socket
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from orion_unet.errors import InputError
from orion_unet.run_log import STATUS_FILE

LOCK_FILE = "run.lock"
# A holder on another machine is dead when its heartbeat (every few seconds) is older than this.
STALE_S = 120.0


class RunLock:
    """The lock of a run folder."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / LOCK_FILE

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
        raise InputError(f"{self.path}: cannot be taken, other processes are after it too; try again")

    def release(self) -> None:
        """Give the lock back; on a disk that has failed it stays, and is taken over by the next run."""
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
        return self._age_s() < STALE_S

    def _age_s(self) -> float:
        """Time since the holder last wrote, by the clock of the file system itself."""
        probe = self.path.with_name(f".{LOCK_FILE}.{uuid.uuid4().hex}")
        probe.touch()
        try:
            now = probe.stat().st_mtime
        finally:
            probe.unlink()
        written = [path.stat().st_mtime for path in (self.path, self.path.with_name(STATUS_FILE)) if path.exists()]
        return now - max(written, default=now)


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
