"""Is the trainer alive, and does it make progress? Judged by its heartbeat, its steps and, on its host, its process."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orion_unet.findings import WARNING, Finding
from orion_unet.monitor import advice
from orion_unet.monitor.advice import option_number
from orion_unet.run_log import FINAL_STATES, HEARTBEAT_S, STATES
from orion_unet.text import duration

MONITOR_FILE = "monitor.json"

# In the middle of an epoch's training or validation, a run may make no progress for this many typical steps.
STEPS_WITHOUT_PROGRESS = 10
# Before the first step (it compiles, starts the loader, fills caches), before the first validation batch, after the
# last step of an epoch, and while the typical step is unknown.
PATIENCE_S = 900.0
# Once validation has begun: its state includes saving the checkpoints and drawing the panels of the epoch.
VALIDATION_S = 120.0


@dataclass(frozen=True)
class Life:
    """State of a run (one of status.json's, or waiting, stalled, crashed), why, and the age of the heartbeat [s].

    ``finding`` is the warning that a run is stalled or crashed.
    """

    state: str
    reason: str = ""
    age_s: float | None = None
    finding: Finding | None = None


class Liveness:
    """Judges one run folder poll by poll; remembers when the heartbeat last changed and which process it has seen.

    ``interval_s`` is the time between two polls.
    """

    def __init__(self, run_dir: Path, stalled_after_s: float, interval_s: float = 0.0) -> None:
        self.run_dir = run_dir
        self.stalled_after_s = stalled_after_s
        self.interval_s = interval_s
        self._beat = -1.0
        self._seen_at = 0.0
        self._known_pid: Any = None

    def judge(self, status: Mapping[str, Any] | None, beat: float, epoch_s: float | None = None) -> Life:
        """Judge status.json's document and modification time ``beat`` [s, the file system's clock].

        ``epoch_s`` is the time an epoch takes, from metrics.jsonl.
        """
        if beat != self._beat:
            self._beat, self._seen_at = beat, time.monotonic()
        if status is None:
            return Life("waiting", "there is no readable status.json yet")
        state = status.get("state")
        if state not in STATES:
            return Life("waiting", "status.json has no state that this monitor knows")
        if state in FINAL_STATES:
            return Life(str(state))
        age = self._age(status.get("host"))
        if status.get("host") == socket.gethostname():
            pid = status.get("pid")
            if process_lives(pid, age):
                self._known_pid = pid
            elif self._known_pid == pid or age > 1.3 * HEARTBEAT_S:
                # A process never seen may run in a container with this host's name: wait until its heartbeat is late.
                reason = f"process {pid} is gone, in state {state}"
                return Life("crashed", reason, age, Finding("crashed", WARNING, reason, age, None, advice.CRASHED))
        if age > self.stalled_after_s:
            message = f"no heartbeat for {duration(age)}: the process hangs, is stopped, or cannot write its status"
            finding = Finding("stalled", WARNING, message, age, self.stalled_after_s, advice.STUCK)
            return Life("stalled", f"no heartbeat for {duration(age)}, in state {state}", age, finding)
        return self._judge_progress(status, str(state), age, epoch_s)

    def _judge_progress(self, status: Mapping[str, Any], state: str, age: float, epoch_s: float | None) -> Life:
        """Judge a run with a fresh heartbeat by its progress, if it records that."""
        progressed, since = _seconds(status.get("progressed")), _seconds(status.get("since"))
        updated = _seconds(status.get("updated"))
        latest = max((moment for moment in (progressed, since) if moment is not None), default=None)
        if "progressed" not in status or updated is None or latest is None:
            return Life(state, age_s=age)
        # All three times are of the trainer's clock.
        quiet = max(updated - latest, 0.0) + age
        step, steps = (option_number(status, name) or 0.0 for name in ("step", "steps_per_epoch"))
        measured = option_number(status, "step_s") or 0.0
        typical = measured or (epoch_s / steps if epoch_s and steps > 0 else 0.0)
        begun = measured > 0 if "step_s" in status else step > 0 and typical > 0
        midway = begun and not (state == "training" and 0 < steps <= step)
        least = PATIENCE_S if not midway else VALIDATION_S if state == "validating" else 0.0
        allowed = max(self.stalled_after_s, self.interval_s, STEPS_WITHOUT_PROGRESS * typical, least)
        if quiet <= allowed:
            return Life(state, age_s=age)
        what = "validation batch" if state == "validating" else "training step"
        usually = f" (one usually takes {duration(typical)})" if typical > 0 else ""
        reason = f"no {what} has finished for {duration(quiet)}"
        message = (
            f"{reason}{usually}, although the heartbeat goes on; likely causes: a frozen loader process, storage that "
            "does not answer, a lost rank"
        )
        return Life("stalled", reason, age, Finding("stalled", WARNING, message, quiet, allowed, advice.STUCK))

    def _age(self, host: Any) -> float:
        """Seconds since the last heartbeat, without comparing the clocks of two machines."""
        unchanged = time.monotonic() - self._seen_at
        now = filesystem_now(self.run_dir)
        if now is None and host == socket.gethostname():
            now = time.time()
        return unchanged if now is None else max(unchanged, now - self._beat, 0.0)


def _seconds(moment: Any) -> float | None:
    """Seconds since 1970 of an ISO 8601 time (UTC, where it names no zone); None if it is something else."""
    try:
        found = datetime.fromisoformat(moment)
    except (TypeError, ValueError):
        return None
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()


def filesystem_now(folder: Path) -> float | None:
    """The present time by the clock of the folder's file system: that of a file made just now; None if none can be.

    The file is the temporary one that the next monitor.json is written to.
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

    A zombie does not run. A process that started after the heartbeat is another one with the same number.
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
        # The fields after the name, which is in brackets and may contain anything: the state is the first of them, the
        # start time the 20th.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        process_age = uptime - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return True
    return fields[0] not in "ZX" and not (beat_age_s is not None and process_age < beat_age_s - 2)
