"""What was measured of files before, kept in the user's cache folder, so that the next run need not read them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from orion_unet import __version__
from orion_unet.errors import InputError
from orion_unet.run_log import write_json

# Documents that are kept; the oldest go first.
KEPT = 256


def cache_folder() -> Path:
    """The folder of the measurements, by the rules of the XDG base directories; OSError where there is no home."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():
        try:
            base = Path.home() / ".cache"
        except RuntimeError as error:
            # A container's user may have neither HOME nor a line in the list of users.
            raise FileNotFoundError(str(error)) from None
    return base / "orion_unet"


def file_state(path: Path) -> tuple[int, int, int]:
    """Size, time of the last writing and of the last change of any kind: what tells a file from its former self.

    Copying tools set the time of writing back to that of the source, but nothing sets back the other. Raises
    InputError where the file has gone.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise InputError(f"{path}: cannot be read any more, it has changed or gone ({error})") from None
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def fingerprint(paths: Iterable[Path], *about: Any) -> str:
    """Name of a measurement: it changes with the place and state of every file, with ``about``, and with the version.

    Raises InputError where a file has gone.
    """
    digest = hashlib.sha256(json.dumps([__version__, *about]).encode())
    for path in paths:
        digest.update(json.dumps([str(path.resolve()), *file_state(path)]).encode())
    return digest.hexdigest()


def recall(name: str) -> Any:
    """The measurement of that name; None where there is none, or none that can be read."""
    try:
        return json.loads((cache_folder() / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def remember(name: str, document: Any) -> None:
    """Keep a measurement (plain values) under a name; where that is not possible, the next run measures again."""
    with suppress(OSError):
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"{name}.json", document)
        stored = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
        for path in stored[: max(0, len(stored) - KEPT)]:
            path.unlink(missing_ok=True)
