"""Failures whose cause is known: told in a sentence that says what to change, where a traceback would not help."""

from __future__ import annotations

import errno
import shutil
from contextlib import suppress
from pathlib import Path

import torch

from orion_unet.config import TrainConfig
from orion_unet.distributed import rank, world_size
from orion_unet.errors import RunError

NOTE_PATTERN = ".failure_rank_*"
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)
LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo", "NCCL", "timed out")


def plain_failure(error: BaseException, config: TrainConfig) -> RunError | None:
    """The plain form of a failure; None where only the traceback tells what went wrong."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return RunError(
            f"out of GPU memory: lower --batch_size ({config.optimisation.batch_size} now; --accumulate_steps keeps "
            "the global batch), --patch_size or --base_features, or add --use_amp"
        )
    if isinstance(error, RuntimeError) and "DataLoader worker" in text:
        return RunError(
            f"a loader process was lost ({text.splitlines()[0].split('. ')[0]}): a file of --pairs_dir "
            f"({config.data.pairs_dir}) was cut short or cannot be read any more, or the system ended the process for "
            "lack of memory (lower --num_workers or --batch_size). The last checkpoint stands: go on with --resume auto"
        )
    if isinstance(error, RuntimeError) and "shared memory" in text:
        return RunError(
            "the shared memory of this machine (/dev/shm) is too small for the loader processes: lower --batch_size or "
            "--num_workers (0 needs none), or enlarge it (docker run --shm-size 8g)"
        )
    if isinstance(error, OSError) and error.errno in DISK:
        run_dir = config.output.output_dir
        return RunError(
            f"{error.filename or run_dir}: cannot be written ({error.strerror}); "
            f"{shutil.disk_usage(run_dir).free} bytes are free. The last checkpoint stands: make room, then go on with "
            "--resume auto"
        )
    if world_size() > 1 and isinstance(error, RuntimeError) and any(sign in text for sign in LOST_PEER):
        return RunError("lost another rank: it failed or was killed; its own message says why")
    return None


def note_failure(run_dir: Path, error: BaseException) -> None:
    """Leave a rank's own cause of failure for rank 0, which may only notice that a rank is gone."""
    with suppress(OSError):
        (run_dir / NOTE_PATTERN.replace("*", str(rank()))).write_text(f"rank {rank()}: {type(error).__name__}: {error}")


def noted_failures(run_dir: Path) -> list[str]:
    """The causes that ranks have left, cleared away."""
    causes = []
    for path in sorted(run_dir.glob(NOTE_PATTERN)):
        with suppress(OSError):
            causes.append(path.read_text())
            path.unlink()
    return causes
