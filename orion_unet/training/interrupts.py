"""Signals that ask a run to stop: noted, and acted on by all ranks between steps or validation batches."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

# SIGUSR1 is SLURM's early warning, SIGHUP a terminal that has gone (a dropped ssh).
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") if hasattr(signal, name))


class Interrupts:
    """Context in which SIGNALS set ``requested`` instead of ending the process; a signal that is ignored stays ignored.

    A second SIGINT raises KeyboardInterrupt at once: the person does not want to wait.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                # nohup ignores SIGHUP: the run is to outlive its terminal.
                if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def requested(self) -> bool:
        """Whether this rank has been asked to stop."""
        return self.received is not None

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C, 143 after any other request, of this rank or another."""
        return 130 if self.received == signal.SIGINT else 143

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
