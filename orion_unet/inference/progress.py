"""What a person sees of a long prediction: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

from orion_unet.text import clean, clean_lines, duration

LINE_EVERY_S = 30.0


class Progress:
    """Counts the tiles of one image after the other."""

    def __init__(self) -> None:
        self.on_terminal = sys.stdout.isatty() and sys.stderr.isatty()
        self._bar: tqdm[Any] | None = None

    def say(self, text: str) -> None:
        """A line, above the bar if there is one; what could move the cursor is shown as an escape."""
        text = clean_lines(text)
        if self._bar is not None:
            tqdm.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def start(self, name: str, tiles: int, done: int) -> None:
        """Begin an image of which some tiles may have been done earlier."""
        self._name, self._tiles, self._before, self._done = clean(name), tiles, done, done
        self._began = self._said = time.monotonic()
        if self.on_terminal:
            self._bar = tqdm(total=tiles, initial=done, desc=self._name, unit="tile", leave=False, dynamic_ncols=True)

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
