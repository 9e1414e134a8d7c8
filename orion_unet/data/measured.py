"""A cache of measurements of files, in the user's cache folder, so that unchanged files are read only once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from orion_unet import __version__
from orion_unet.data.file_states import State, path_state
from orion_unet.data.slide_files import slide_state
from orion_unet.data.slide_regions import REGION_SUFFIX, slide_behind
from orion_unet.distributed import usable_cores
from orion_unet.errors import InputError
from orion_unet.run_log import write_json
from orion_unet.slides.remote import IMAGES, READERS, is_remote

# Number of documents kept; the oldest are deleted.
KEPT = 256


def cache_folder() -> Path:
    """The cache folder, as XDG base directories define it; raises OSError if the user has no home."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():
        try:
            base = Path.home() / ".cache"
        except RuntimeError as error:
            # The user of a container may have neither HOME nor an entry in the user database.
            raise FileNotFoundError(str(error)) from None
    return base / "orion_unet"


def file_state(path: Path) -> State:
    """Size, modification time and change time of a file, by which a changed file is recognised; of a folder (OME-Zarr),
    the sum of the sizes and the latest times of the folder and all that is in it; of a region of a slide, the sums of
    those of its file and its slide. On object storage, size and versions.

    Copying tools restore the modification time of the source, but nothing can set the change time. Raises InputError if
    the file is gone.
    """
    try:
        own = path_state(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read any more; it was changed or removed ({error})") from None
    if not path.name.endswith(REGION_SUFFIX):
        return own
    size, modified, changed = map(sum, zip(own, slide_state(slide_behind(path)), strict=True))
    return size, modified, changed


@cache
def measuring_code() -> str:
    """Digest of the code that measures: this package, and those that read images and move them.

    A measurement made by other code is not used, whatever its version is called.
    """
    package = Path(__file__).parent
    digest = hashlib.sha256(__version__.encode())
    rooms = (package, *(package.parent / name for name in ("registration", "slides")))
    for path in sorted(path for room in rooms for path in room.glob("*.py")):
        # Without its source (in an archive) the code is known by its version alone.
        with suppress(OSError):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def fingerprint(paths: Iterable[Path], *about: Any) -> str:
    """Name of a measurement, from the path and state of every file, ``about`` and the code that measures.

    Raises InputError if a file is gone.
    """
    digest = hashlib.sha256(json.dumps([measuring_code(), *about]).encode())
    files = list(paths)
    for path, state in zip(files, _states(files), strict=True):
        digest.update(json.dumps([str(path.resolve()), *state]).encode())
    return digest.hexdigest()


def _states(files: list[Path]) -> Iterator[tuple[int, int, int]]:
    if not any(map(is_remote, files)):
        yield from map(file_state, files)
        return
    with ThreadPoolExecutor(max_workers=READERS) as pool:
        yield from pool.map(file_state, files)


def reading_threads(folder: Path) -> int:
    """Threads that read the files of a folder: one for each core, which decodes; of a store, more, which wait."""
    return max(IMAGES, usable_cores()) if is_remote(folder) else usable_cores()


def recall(name: str) -> Any:
    """The measurement of that name; None if there is none or it cannot be read."""
    try:
        return json.loads((cache_folder() / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def remember(name: str, document: Any) -> None:
    """Store a measurement (plain values) under a name. If that fails, the next run measures again."""
    with suppress(OSError):
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"{name}.json", document)
        stored = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
        for path in stored[: max(0, len(stored) - KEPT)]:
            path.unlink(missing_ok=True)
