"""Atomic save and safe load of checkpoints: tensors and plain Python values only."""

from __future__ import annotations

import io
import os
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from orion_unet.errors import InputError, RunError
from orion_unet.run_log import CHECKPOINT_DIR, fsync_folder

SCHEMA = 1
KIND = "orion_unet checkpoint"
LAST, PREVIOUS, BEST = "last.pt", "last_previous.pt", "best.pt"
# Entries of every checkpoint, and further entries of one that a run can resume from.
MODEL_KEYS = {
    "model": dict,
    "options": dict,
    "normalization": dict,
    "channel_names": list,
    "split": dict,
    "epoch": int,
}
RESUME_KEYS = {
    "optimizer": dict,
    "schedule": dict,
    "early_stopping": dict,
    "attempt": int,
    "step": int,
    "global_batch": int,
}


class SaveError(RunError):
    """A checkpoint could not be written; the one before it is intact."""


def checkpoint_path(run_dir: Path, name: str) -> Path:
    """Path of a checkpoint in a run folder."""
    return run_dir / CHECKPOINT_DIR / name


def save(path: Path, content: dict[str, Any], keep_previous: bool = False) -> None:
    """Write a checkpoint so that its path always has a whole file, the new or the old one, whatever happens.

    Temporary file, fsync, rename, fsync of the folder. With ``keep_previous`` the replaced one is kept as
    last_previous.pt. Raises SaveError with path and free space if it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save({"kind": KIND, "schema": SCHEMA, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        if keep_previous and path.exists():
            _keep(path, path.with_name(PREVIOUS))
        temporary.replace(path)
        fsync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise SaveError(
            f"{path}: cannot be written ({error}); {_space(path.parent)}, about {_size(content)} bytes needed"
        ) from error


def _keep(path: Path, previous: Path) -> None:
    """Hard-link the file to a second name, so that it never disappears; rename it if links are not supported."""
    linked = path.with_name(f".{previous.name}.{os.getpid()}.tmp")
    try:
        os.link(path, linked)
        linked.replace(previous)
    except OSError:
        path.replace(previous)
    finally:
        # A rename between two links to one file does nothing and leaves both.
        linked.unlink(missing_ok=True)


def _size(value: Any) -> int:
    """Bytes of all tensors in nested containers, which are nearly all of a checkpoint."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list | tuple) else 0


def _space(folder: Path) -> str:
    try:
        figures = os.statvfs(folder)
    except OSError:
        return "free space unknown"
    return f"{figures.f_bavail * figures.f_frsize} bytes free"


def load(path: Path, to_resume: bool = False) -> dict[str, Any]:
    """Read a checkpoint to the CPU without executing code in it, and check its structure.

    Raises InputError if it is missing, damaged, no checkpoint of this toolkit, or, with ``to_resume``, a model without
    the state of its run.
    """
    try:
        stored = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        with zipfile.ZipFile(io.BytesIO(stored)) as archive:
            # torch.load does not verify the checksums, so a flipped bit would change a weight unnoticed.
            damaged = archive.testzip()
        if damaged:
            raise zipfile.BadZipFile(f"{damaged} fails its checksum")
        content = torch.load(io.BytesIO(stored), map_location="cpu", weights_only=True)
    except Exception as error:
        # On damaged bytes, the readers of the archive and the tensors can raise almost any exception.
        raise InputError(f"{path}: is damaged or not a checkpoint ({type(error).__name__})") from None
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise InputError(f"{path}: is not a checkpoint of this toolkit")
    if content.get("schema") != SCHEMA:
        raise InputError(f"{path}: has schema {content.get('schema')}, but this version reads schema {SCHEMA}")
    missing = [key for key, kind in MODEL_KEYS.items() if not isinstance(content.get(key), kind)]
    if missing:
        raise InputError(f"{path}: is damaged: {', '.join(missing)} is missing")
    if to_resume:
        missing = [key for key, kind in RESUME_KEYS.items() if not isinstance(content.get(key), kind)]
        if missing:
            raise InputError(f"{path}: has a model to predict with, but no run to resume; resume from {LAST}")
    return content


def load_last(run_dir: Path) -> tuple[dict[str, Any] | None, str]:
    """The newest undamaged checkpoint of a run and a warning; (None, "") if the run has no checkpoint yet.

    Falls back to the previous checkpoint when last.pt is damaged. Raises InputError if both are damaged.
    """
    last, previous = (checkpoint_path(run_dir, name) for name in (LAST, PREVIOUS))
    if not last.exists() and not previous.exists():
        return None, ""
    try:
        return load(last, to_resume=True), ""
    except InputError as error:
        if not previous.exists():
            raise
        return load(previous, to_resume=True), f"{error}; resuming from {previous.name}, the checkpoint before it"
