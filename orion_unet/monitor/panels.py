"""The sanity panels of a run, for its page: a few of them, read once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from orion_unet.run_log import SANITY_DIR, open_regular

# A page has at most so many panels, and each of them at most so many bytes.
MAX_PANELS, MAX_BYTES = 12, 4 << 20
_NAME = re.compile(r"epoch_([0-9]{1,8})\.png")
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Panel:
    """The panel of an epoch, as PNG."""

    epoch: int
    png: bytes


class Panels:
    """Reads the panels of a run folder that may still grow; what has not changed is not read again."""

    def __init__(self, run_dir: Path) -> None:
        self.folder = run_dir / SANITY_DIR
        self._read: dict[int, tuple[tuple[int, int], Panel | None]] = {}

    def poll(self, last: int, best: int | None) -> list[Panel]:
        """At most MAX_PANELS panels up to the epoch ``last``, in order: the first, the last, the one closest to the
        epoch ``best``, others evenly between. Files that are no PNG, or too large, are left out."""
        found: dict[int, tuple[Path, tuple[int, int]]] = {}
        try:
            for path in self.folder.iterdir():
                match = _NAME.fullmatch(path.name)
                if match and int(match[1]) <= last:
                    status = path.stat()
                    found[int(match[1])] = path, (status.st_mtime_ns, status.st_size)
        except OSError:
            # No panels yet, or the file server does not answer: the page does without.
            return []
        wanted = chosen(sorted(found), best)
        self._read = {epoch: self._panel(epoch, *found[epoch]) for epoch in wanted}
        return [panel for _, panel in self._read.values() if panel is not None]

    def _panel(self, epoch: int, path: Path, state: tuple[int, int]) -> tuple[tuple[int, int], Panel | None]:
        known = self._read.get(epoch)
        if known is not None and known[0] == state:
            return known
        try:
            with open_regular(path) as file:
                content = file.read(MAX_BYTES + 1)
        except OSError:
            return state, None
        usable = content.startswith(_PNG) and len(content) <= MAX_BYTES
        return state, Panel(epoch, content) if usable else None


def chosen(epochs: Sequence[int], best: int | None) -> list[int]:
    """At most MAX_PANELS of the epochs, in order: the ends, the one closest to ``best``, and others evenly between."""
    if len(epochs) <= MAX_PANELS:
        return list(epochs)
    even = np.linspace(0, len(epochs) - 1, MAX_PANELS - 1).round().astype(int)
    return sorted({*(epochs[at] for at in even), *([closest(epochs, best)] if best is not None else [])})


def closest(epochs: Sequence[int], best: int) -> int:
    """The epoch closest to ``best``, the later one of two."""
    return min(epochs, key=lambda epoch: (abs(epoch - best), -epoch))
