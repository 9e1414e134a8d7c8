"""The state of a file or folder, by which a change is noticed without reading it."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from orion_unet.slides.remote import RemotePath

State = tuple[int, int, int]


def path_state(path: Path) -> State:
    """Size, modification time and change time of a file; of a folder, the sum of the sizes and the latest times of the
    folder and all that is in it. On object storage, size and versions. Raises OSError, or for a store InputError."""
    if isinstance(path, RemotePath):
        return path.state()
    found = path.stat()
    if not stat.S_ISDIR(found.st_mode):
        return found.st_size, found.st_mtime_ns, found.st_ctime_ns
    size, modified, changed = 0, found.st_mtime_ns, found.st_ctime_ns
    for inner in _inside(str(path)):
        size += inner.st_size
        modified, changed = max(modified, inner.st_mtime_ns), max(changed, inner.st_ctime_ns)
    return size, modified, changed


def recent_state(path: Path) -> State:
    """The same; of a folder or an object, asked for again after 20 times as long as that took: an OME-Zarr has many
    files, and a store is far."""
    if not isinstance(path, RemotePath) and not path.is_dir():
        return path_state(path)
    known = _RECENT.get(path)
    begun = time.monotonic()
    if known is None or begun > known[0]:
        state = path_state(path)
        ended = time.monotonic()
        known = _RECENT[path] = (ended + 20 * (ended - begun), state)
    return known[1]


_RECENT: dict[Path, tuple[float, State]] = {}


def _inside(folder: str) -> Iterator[os.stat_result]:
    with os.scandir(folder) as entries:
        for entry in entries:
            yield entry.stat()
            if entry.is_dir():
                yield from _inside(entry.path)
