"""What was measured of files before, kept in the user's cache folder, so that the next run need not read them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from orion_unet.run_log import write_json

# Documents that are kept; the oldest go first.
KEPT = 256


def cache_folder() -> Path:
    """The folder of the measurements, by the rules of the XDG base directories."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "orion_unet"


def fingerprint(paths: Iterable[Path], *about: Any) -> str:
    """Name of a measurement: it changes with the place, size and time of change of every file, and with ``about``."""
    digest = hashlib.sha256(json.dumps(about).encode())
    for path in paths:
        found = path.stat()
        digest.update(json.dumps([str(path.resolve()), found.st_size, found.st_mtime_ns]).encode())
    return digest.hexdigest()


def recall(name: str) -> Any:
    """The measurement of that name; None where there is none, or none that can be read."""
    try:
        return json.loads((cache_folder() / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def remember(name: str, document: Any) -> None:
    """Keep a measurement (plain values) under a name; where that is not possible, the next run measures again."""
    folder = cache_folder()
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"{name}.json", document)
        stored = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
        for path in stored[: max(0, len(stored) - KEPT)]:
            path.unlink(missing_ok=True)
