"""Failures with a known cause, in a sentence that says what to change. The original message is always kept."""

from __future__ import annotations

import errno
import re
import shutil
from contextlib import suppress
from pathlib import Path

import torch

from orion_unet.config import TrainConfig
from orion_unet.distributed import rank, world_size
from orion_unet.errors import RunError

NOTE_PATTERN = ".failure_rank_*"
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)
# What gloo and NCCL say of a peer that is gone, and of one that does not answer.
LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
SILENT_PEER = re.compile(r"Timed out waiting \d+ms for (recv|send) operation")


def plain_failure(error: BaseException, config: TrainConfig) -> RunError | None:
    """The plain form of a failure; None where only the traceback shows what went wrong."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return RunError(
            f"out of GPU memory: lower --batch_size ({config.optimisation.batch_size} now; --accumulate_steps keeps "
            f"the global batch), --patch_size or --base_features, or add --use_amp ({_first_line(text)})"
        )
    if isinstance(error, RuntimeError) and "DataLoader worker" in text:
        return RunError(
            f"a loader process was lost ({text.splitlines()[0].split('. ')[0]}): a file of --pairs_dir "
            f"({config.data.pairs_dir}) was cut short or cannot be read any more, or the system ended the process for "
            "lack of memory (lower --num_workers or --batch_size). The last checkpoint is whole: continue with "
            "--resume auto"
        )
    if isinstance(error, RuntimeError) and re.search(r"shared memory ?\(shm\)", text):
        return RunError(
            "the shared memory of this machine (/dev/shm) is too small for the loader processes: lower --batch_size or "
            f"--num_workers (0 needs none), or enlarge it (docker run --shm-size 8g) ({_first_line(text)})"
        )
    if isinstance(error, OSError) and error.errno in DISK:
        run_dir = config.output.output_dir
        return RunError(
            f"{error.filename or run_dir}: cannot be written ({error.strerror}); "
            f"{shutil.disk_usage(run_dir).free} bytes are free. The last checkpoint is whole: make room, then continue "
            "with --resume auto"
        )
    if world_size() > 1 and _lost_peer(error):
        return RunError(f"lost another rank: it failed or was killed; its own message says why ({_first_line(text)})")
    if world_size() > 1 and _silent_peer(error):
        return RunError(f"another rank does not answer: it is stuck or lost ({_first_line(text)})")
    return None


def _lost_peer(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in LOST_PEER)


def _silent_peer(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and SILENT_PEER.search(str(error)) is not None


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else "without a word"


def note_failure(run_dir: Path, error: BaseException) -> None:
    """Leave a rank's own cause of failure for rank 0, which may only notice that a rank is gone.

    The loss of another rank is not a cause.
    """
    if _lost_peer(error) or _silent_peer(error):
        return
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
