"""Is the trainer alive? Judged by the file system's own clock and, on its host, by its process."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orion_unet.run_log import FINAL_STATES, HEARTBEAT_S, STATES

MONITOR_FILE = "monitor.json"


@dataclass(frozen=True)
class Life:
    """State of a run (those of status.json, or waiting, stalled, crashed), why, and the heartbeat's age [s]."""

    state: str
    reason: str = ""
    age_s: float | None = None


class Liveness:
    """Judges one run folder poll by poll, remembering when its heartbeat last moved and whether it saw the process."""

    def __init__(self, run_dir: Path, stalled_after_s: float) -> None:
        self.run_dir = run_dir
        self.stalled_after_s = stalled_after_s
        self._beat = -1.0
        self._seen_at = 0.0
        self._known_pid: Any = None

    def judge(self, status: Mapping[str, Any] | None, beat: float) -> Life:
        """The state told by status.json's document and modification time ``beat`` [s, the file system's clock]."""
        if beat != self._beat:
            self._beat, self._seen_at = beat, time.monotonic()
        if status is None:
            return Life("waiting", "no status.json that can be read yet")
        state = status.get("state")
        if state not in STATES:
            return Life("waiting", "status.json tells no state that this monitor knows")
        if state in FINAL_STATES:
            return Life(str(state))
        age = self._age(status.get("host"))
        if status.get("host") == socket.gethostname():
            pid = status.get("pid")
            if process_lives(pid, age):
                self._known_pid = pid
            elif self._known_pid == pid or (age is not None and age > 1.3 * HEARTBEAT_S):
                # A process never seen may live in a container with this host's name; its heartbeat tells.
                return Life("crashed", f"process {pid} is gone, in state {state}", age)
        if age is not None and age > self.stalled_after_s:
            return Life("stalled", f"last sign of life in state {state}", age)
        return Life(str(state), age_s=age)

    def _age(self, host: Any) -> float | None:
        """Seconds since the heartbeat; never this machine's clock against another's."""
        unchanged = time.monotonic() - self._seen_at
        now = filesystem_now(self.run_dir)
        if now is None and host == socket.gethostname():
            now = time.time()
        return unchanged if now is None else max(unchanged, now - self._beat, 0.0)


def filesystem_now(folder: Path) -> float | None:
    """What the folder's file system takes for the present: the time it gives a file made just now.

    None where no file can be made. The file is the one that the next monitor.json is written to.
    """
    probe = folder / f".{MONITOR_FILE}.{os.getpid()}.tmp"
    try:
        handle = os.open(probe, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW, 0o644)
    except OSError:
        return None
    try:
        os.write(handle, b"\n")
        return os.fstat(handle).st_mtime
    except OSError:
        return None
    finally:
        os.close(handle)
        with suppress(OSError):
            probe.unlink()


def process_lives(pid: Any, beat_age_s: float | None) -> bool:
    """Whether the process that wrote a heartbeat of this age still runs on this machine.

    A zombie does not, nor does a process that started after the heartbeat: its number was given anew.
    """
    if type(pid) is not int or not 0 < pid < 2**31:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    try:
        # Fields after the name, which stands in brackets and may hold anything: state first, start time the 20th.
        told = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        process_age = uptime - int(told[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return True
    return told[0] not in "ZX" and not (beat_age_s is not None and process_age < beat_age_s - 2)
