"""The state of a file or folder, by which a change is noticed without reading it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

State = tuple[int, int, int]


def path_state(path: Path) -> State:
    """Size, modification time and change time of a file; of a folder, the sum of the sizes and the latest times of the
    folder and all that is in it. Raises OSError."""
    found = path.stat()
    if not stat.S_ISDIR(found.st_mode):
        return found.st_size, found.st_mtime_ns, found.st_ctime_ns
    size, modified, changed = 0, found.st_mtime_ns, found.st_ctime_ns
    for inner in _inside(str(path)):
        size += inner.st_size
        modified, changed = max(modified, inner.st_mtime_ns), max(changed, inner.st_ctime_ns)
    return size, modified, changed


def _inside(folder: str) -> Iterator[os.stat_result]:
    with os.scandir(folder) as entries:
        for entry in entries:
            yield entry.stat()
            if entry.is_dir():
                yield from _inside(entry.path)
