"""What a person sees of a long prediction: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

LINE_EVERY_S = 30.0


class Progress:
    """Counts the tiles of one image after the other."""

    def __init__(self) -> None:
        self.on_terminal = sys.stdout.isatty() and sys.stderr.isatty()
        self._bar: tqdm[Any] | None = None

    def say(self, text: str) -> None:
        """A line, above the bar if there is one."""
        if self._bar is not None:
            tqdm.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def start(self, name: str, tiles: int, done: int) -> None:
        """Begin an image of which some tiles may have been done earlier."""
        self._name, self._tiles, self._before, self._done = name, tiles, done, done
        self._began = self._said = time.monotonic()
        if self.on_terminal:
            self._bar = tqdm(total=tiles, initial=done, desc=name, unit="tile", leave=False, dynamic_ncols=True)

    def advance(self, tiles: int) -> None:
        """So many more tiles are done."""
        self._done += tiles
        if self._bar is not None:
            self._bar.update(tiles)
            return
        now = time.monotonic()
        if now - self._said >= LINE_EVERY_S:
            self._said = now
            left_s = (now - self._began) / (self._done - self._before) * (self._tiles - self._done)
            self.say(f"{self._name}: {100 * self._done // self._tiles} %, about {duration(left_s)} left")

    def end(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def duration(seconds: float) -> str:
    """Seconds in words: 4.2 s, 3 min, 2.5 h."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
