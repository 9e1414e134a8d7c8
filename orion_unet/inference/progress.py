"""Progress of long work: a bar on a terminal, otherwise a line every half minute."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

from orion_unet.text import clean, clean_lines, duration

LINE_EVERY_S = 30.0


class Progress:
    """Counts the tiles of one image after another."""

    def __init__(self) -> None:
        self.on_terminal = sys.stdout.isatty() and sys.stderr.isatty()
        self._bar: tqdm[Any] | None = None

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one. Control characters are shown as escapes."""
        text = clean_lines(text)
        if self._bar is not None:
            tqdm.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def start(self, name: str, tiles: int, done: int, unit: str = "tile") -> None:
        """Begin an image, of which ``done`` tiles (or other units) were done earlier."""
        self._name, self._tiles, self._before, self._done = clean(name), tiles, done, done
        self._began = self._said = time.monotonic()
        if self.on_terminal:
            self._bar = tqdm(total=tiles, initial=done, desc=self._name, unit=unit, leave=False, dynamic_ncols=True)

    def advance(self, tiles: int) -> None:
        """Count ``tiles`` more."""
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
