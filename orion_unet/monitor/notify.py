"""Calls the user's command when a warning appears or a run ends."""

from __future__ import annotations

import queue
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from orion_unet.findings import WARNING, Finding
from orion_unet.monitor.report import to_json
from orion_unet.text import clean

LONGEST_S = 60.0
# Warnings that may come back, each time with a new notification; of the others there is one a run.
PASSING = {"stalled", "crashed"}


class News:
    """What is new about one run since the last look."""

    def __init__(self) -> None:
        self._told: set[str] = set()
        self._state = ""

    def update(self, state: str, ended: bool, findings: Sequence[Finding]) -> list[dict[str, Any]]:
        """The events since the last call: ``warning`` with the codes that have appeared, ``ended`` with the state."""
        codes = [finding.code for finding in findings if finding.severity == WARNING]
        new = [code for code in codes if code not in self._told]
        self._told = (self._told - PASSING) | set(codes)
        events: list[dict[str, Any]] = [{"event": "warning", "new_warnings": new}] if new else []
        if ended and state != self._state:
            events.append({"event": "ended", "new_warnings": []})
        self._state = state
        return events


class Notifier:
    """Runs a command, word by word and never in a shell, with a JSON document on its standard input.

    Commands run one after the other in a thread of their own; one that takes longer than ``longest_s`` is killed.
    The first failure is reported through ``say``.
    """

    def __init__(self, words: Sequence[str], say: Callable[[str], None], longest_s: float = LONGEST_S) -> None:
        self.words = list(words)
        self.problem = ""
        self._say = say
        self._longest_s = longest_s
        self._waiting: queue.Queue[bytes | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="notify", daemon=True)
        self._thread.start()

    def tell(self, events: Sequence[Mapping[str, Any]], document: Mapping[str, Any]) -> None:
        """Run the command once for each event; its input is the event and the document together."""
        for event in events:
            self._waiting.put((to_json({**event, **document}) + "\n").encode())

    def close(self, patience_s: float | None = None) -> None:
        """Wait until everything has been told, but no longer than for one command, or than ``patience_s``."""
        self._waiting.put(None)
        self._thread.join(self._longest_s + 5 if patience_s is None else patience_s)

    def _work(self) -> None:
        while (content := self._waiting.get()) is not None:
            problem = self._run(content)
            if problem and not self.problem:
                self.problem = f"--notify {clean(self.words[0], 100)}: {problem}; the monitor goes on"
                self._say(self.problem)

    def _run(self, content: bytes) -> str:
        try:
            done = subprocess.run(
                self.words,
                input=content,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                timeout=self._longest_s,
                check=False,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            return f"took longer than {self._longest_s:g} s and was killed"
        except (OSError, ValueError) as error:
            return f"cannot be run ({getattr(error, 'strerror', None) or error})"
        if done.returncode == 0:
            return ""
        said = clean(done.stderr.decode("utf-8", "replace").strip(), 200)
        return f"ended with code {done.returncode}" + (f" ({said})" if said else "")
