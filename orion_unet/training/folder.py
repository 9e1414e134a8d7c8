"""Claiming the run folder: refusing one that holds a run, replacing it when told to, and the files of the start."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

import orion_unet
from orion_unet.checkpoint import BEST, LAST, PREVIOUS
from orion_unet.config import TrainConfig
from orion_unet.errors import InputError, RunError
from orion_unet.run_log import (
    CHECKPOINT_DIR,
    CONFIG_FILE,
    LOG_FILE,
    METRICS_FILE,
    NORMALIZATION_FILE,
    SANITY_DIR,
    SCHEMA,
    SPLIT_FILE,
    STATUS_FILE,
    utc_now,
    write_json,
)
from orion_unet.training.failures import NOTE_PATTERN
from orion_unet.training.prepare import Prepared

# What marks a folder as holding a run, and all that a run or its monitor writes there.
MARKS = (CONFIG_FILE, METRICS_FILE)
WRITTEN = (
    CONFIG_FILE,
    METRICS_FILE,
    STATUS_FILE,
    SPLIT_FILE,
    NORMALIZATION_FILE,
    LOG_FILE,
    "training_progress.png",
    "monitor.json",
)
WRITTEN_PATTERNS = (f"{SANITY_DIR}/epoch_*.png", "tensorboard/events.out.tfevents.*")


def check_free(config: TrainConfig) -> None:
    """Refuse an output_dir that cannot take the run; writes nothing. Raises InputError."""
    run_dir = Path(config.output.output_dir)
    holder = next((folder for folder in (run_dir, *run_dir.parents) if folder.exists()), run_dir)
    if not holder.is_dir():
        raise InputError(f"--output_dir {run_dir}: {holder} is a file; give another folder")
    if not os.access(holder, os.W_OK | os.X_OK):
        raise InputError(f"--output_dir {run_dir}: {holder} is not writable")
    if not config.output.overwrite and holds_run(run_dir):
        raise InputError(
            f"--output_dir {run_dir}: holds an earlier run, which is never touched unasked. Give another --output_dir, "
            "continue it with --resume auto, or replace it with --overwrite"
        )


def holds_run(run_dir: Path) -> bool:
    """Whether the folder holds a run or its beginnings."""
    checkpoints = (run_dir / CHECKPOINT_DIR / name for name in (LAST, PREVIOUS, BEST))
    return any(path.exists() for path in (*(run_dir / mark for mark in MARKS), *checkpoints))


def last_attempt(run_dir: Path) -> int:
    """Number of the latest start of the run, which may have died before it saved anything; 0 for none."""
    try:
        attempt = json.loads((run_dir / CONFIG_FILE).read_text(encoding="utf-8"))["attempt"]
    except (OSError, ValueError, KeyError, TypeError):
        return 0
    return attempt if isinstance(attempt, int) else 0


def make(run_dir: Path) -> None:
    """Make the folder. Raises RunError where it cannot be."""
    try:
        (run_dir / CHECKPOINT_DIR).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"--output_dir {run_dir}: cannot be made ({error.strerror})") from None


def clear(run_dir: Path, overwrite: bool) -> None:
    """Remove what killed saves have left; with ``overwrite`` also what the earlier run wrote, and nothing else."""
    for left in (*run_dir.glob(".*.tmp"), *run_dir.glob(NOTE_PATTERN), *(run_dir / CHECKPOINT_DIR).glob(".*.tmp")):
        left.unlink(missing_ok=True)
    if overwrite:
        stale = [run_dir / name for name in WRITTEN]
        stale += [run_dir / CHECKPOINT_DIR / name for name in (LAST, PREVIOUS, BEST)]
        stale += [path for pattern in WRITTEN_PATTERNS for path in run_dir.glob(pattern)]
        for path in stale:
            path.unlink(missing_ok=True)


def check_space(run_dir: Path, parameters: int, averaged: bool) -> None:
    """Raises RunError where the checkpoints of a model of so many parameters would not fit on the disk."""
    # float32 weights, two moments and perhaps the averages, in the last, the one before and the one being written;
    # and the best model, old and new.
    needed = 4 * parameters * (3 * (4 if averaged else 3) + 2)
    free = shutil.disk_usage(run_dir).free
    if free < needed:
        raise RunError(
            f"--output_dir {run_dir}: the checkpoints need about {needed} bytes and {free} are free; make room or give "
            "another folder"
        )


def write_start(run_dir: Path, config: TrainConfig, prepared: Prepared, facts: dict[str, Any]) -> None:
    """config.json, split.json and normalization.json; ``facts`` join the options in config.json."""
    document = {
        "schema": SCHEMA,
        "created": utc_now(),
        "command": shlex.join(sys.argv),
        "options": config.options(),
        **facts,
        "channel_names": list(prepared.table.kept_names),
        "versions": {
            "orion_unet": orion_unet.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
    }
    write_json(run_dir / CONFIG_FILE, document)
    write_json(run_dir / SPLIT_FILE, prepared.split.document(prepared.table))
    write_json(run_dir / NORMALIZATION_FILE, prepared.normalization.document())
