"""Following something until it is over: in lines for a pipe, or as a view that fills the terminal."""

from __future__ import annotations

import os
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from orion_unet.monitor.notify import Notifier

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

# A person who leaves waits no longer for the command on news.
LEAVING_S = 2.0
# How often a live view looks whether the window has another size.
LOOK_S = 0.2


class Followed(ABC):
    """What ``follow`` follows; ``notify`` runs the user's command on news, None without one."""

    notify: Notifier | None = None

    @abstractmethod
    def poll(self) -> bool:
        """Look at it; returns whether to go on."""

    @abstractmethod
    def news(self) -> Iterable[str]:
        """Lines on what has changed since the last call."""

    @abstractmethod
    def view(self, console: Console, height: int) -> RenderableType:
        """It as it is, in the console's width and in ``height`` lines."""


def follow(followed: Followed, interval_s: float, as_json: bool, notify: tuple[str, ...]) -> bool:
    """Poll every ``interval_s`` seconds until it is over or Ctrl-C is pressed; returns whether it was a live view.

    ``notify`` are the words of the user's command.
    """
    on_screen = not as_json and sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    with suppress(KeyboardInterrupt), _notifier(notify, on_screen) as followed.notify, terminate_cleanly():
        (_on_screen if on_screen else _in_lines)(followed, interval_s)
    return on_screen


def _in_lines(followed: Followed, interval_s: float) -> None:
    tolerate_encoding()
    while True:
        goes_on = followed.poll()
        for line in followed.news():
            print(line, flush=True)
        if not goes_on:
            return
        time.sleep(interval_s)


def _on_screen(followed: Followed, interval_s: float) -> None:
    """On the terminal's alternate screen, also redrawn when the window is resized."""
    from rich.live import Live

    from orion_unet.monitor.terminal import make_console

    console = make_console(sys.stdout)
    with Live(console=console, screen=True, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            goes_on = followed.poll()
            due = time.monotonic() + interval_s
            size = None
            while time.monotonic() < due:
                if console.size != size:
                    size = console.size
                    live.update(followed.view(console, size.height - 1), refresh=True)
                if not goes_on:
                    return
                time.sleep(min(LOOK_S, interval_s))


@contextmanager
def _notifier(words: tuple[str, ...], on_screen: bool) -> Iterator[Notifier | None]:
    """What runs the user's command, until everything has been told; None without a command. Its failure is printed, or
    left to a live view to show."""
    if not words:
        yield None
        return
    found = Notifier(words, lambda text: None if on_screen else print(text, file=sys.stderr, flush=True))
    try:
        yield found
    except (KeyboardInterrupt, SystemExit):
        # Who leaves does not wait for a slow command.
        found.close(LEAVING_S)
        raise
    found.close()


def tolerate_encoding() -> None:
    """Let a terminal or pipe that cannot encode a character show a question mark, not a traceback."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")


@contextmanager
def terminate_cleanly() -> Iterator[None]:
    """Let SIGTERM unwind the stack, so that the terminal's screen and cursor are restored."""

    def leave(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    earlier = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)
