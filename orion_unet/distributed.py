"""Process group, rank and reductions. Every function also answers correctly with no process group."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from types import TracebackType
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from orion_unet.errors import InputError, RunError

T = TypeVar("T")

# A collective that waits longer than this has lost a rank.
TIMEOUT = timedelta(minutes=10)
# How long the other ranks wait for rank 0 between two parts of what it does alone, such as measuring a file.
PREPARATION_STALL_S = 1800.0
# In training, a rank that finishes nothing for this long is stuck. Below TIMEOUT, so that the watchdog speaks first.
STUCK_S = 540.0
# Time that a rank gets to notice the failure of a peer without the watchdog.
GRACE_S = 15.0
_FAILED, _PROGRESS = "orion_unet/failed", "orion_unet/progress"
_turns = count()


def usable_cores() -> int:
    """Number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def under_launcher() -> bool:
    """True if torchrun or our launcher started this process as a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    """Rank of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """Rank among the processes of this machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Number of ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """True on rank 0, the only one that writes files and prints."""
    return rank() == 0


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the launcher's process group while the block runs: NCCL on GPUs, gloo on CPUs. Without a launcher, nothing.

    Leaves the group only if the block succeeds: after a failure, leaving could wait for ever for a peer that is gone.
    The process is then expected to end.
    """
    if not under_launcher():
        yield
        return
    # Flags and plain values travel by gloo from the CPU, gradients and sums by NCCL from the GPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield
    except BaseException as error:
        _announce(f"rank {rank()} failed: {type(error).__name__}: {error}")
        raise
    dist.destroy_process_group()


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _announce(failure: str) -> None:
    """Inform the watchdogs of the other ranks, unless the store is gone too."""
    try:
        _store().set(_FAILED, failure.splitlines()[0][:500])
    except RuntimeError:
        return


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over ranks, in place; without a process group, the tensor itself."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def mean_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Mean over ranks, in place; without a process group, the tensor itself."""
    return all_reduce_sum(tensor).div_(world_size())


def any_rank(flag: bool) -> bool:
    """True if the flag is set on any rank. All ranks get the same answer, so they take the same decision."""
    if not dist.is_initialized():
        return flag
    shared = torch.tensor(int(flag))
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return bool(shared.item())


def broadcast(value: T) -> T:
    """The value of rank 0, on every rank; plain Python values and arrays."""
    if not dist.is_initialized():
        return value
    box: list[Any] = [value if is_main_process() else None]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return cast(T, box[0])


def note_progress() -> None:
    """On rank 0, while the others wait: signal that it is making progress."""
    if dist.is_initialized():
        _store().add(_PROGRESS, 1)


def from_main_process(compute: Callable[[], T]) -> T:
    """Compute a value on rank 0 and return it on every rank. Every rank raises its InputError or RunError.

    The others wait as long as rank 0 calls ``note_progress`` at least every PREPARATION_STALL_S, then raise RunError.
    """
    turn = f"orion_unet/turn/{next(_turns)}"
    outcome: tuple[T | None, Exception | None] = (None, None)
    if is_main_process():
        try:
            outcome = (compute(), None)
        except (InputError, RunError) as error:
            outcome = (None, error)
        except BaseException as error:
            _finish(turn)
            broadcast((None, RunError(f"rank 0 failed: {type(error).__name__}: {error}")))
            raise
        _finish(turn)
    else:
        _await(turn)
    value, failure = broadcast(outcome)
    if isinstance(failure, RunError):
        failure.told = not is_main_process()
    if failure is not None:
        raise failure
    return cast(T, value)


def _finish(turn: str) -> None:
    if dist.is_initialized():
        _store().set(turn, "done")


def _await(turn: str) -> None:
    """Wait until rank 0 has finished its turn. A collective would give up after TIMEOUT whatever rank 0 does."""
    store, pause_s = _store(), 0.005
    seen, since = -1, time.monotonic()
    try:
        while not store.check([turn]):
            progress = store.add(_PROGRESS, 0)
            if progress != seen:
                seen, since = progress, time.monotonic()
            elif time.monotonic() - since > PREPARATION_STALL_S:
                raise RunError(
                    f"rank 0 has made no progress for {PREPARATION_STALL_S / 60:.0f} minutes while it prepared the data"
                )
            time.sleep(pause_s)
            pause_s = min(0.5, 1.5 * pause_s)
    except RuntimeError as error:
        raise RunError(f"lost rank 0 while it prepared the data ({error})") from error


class Watchdog:
    """Ends this rank when it is stuck, or when another rank has failed and this one waits for it. A context manager.

    A rank that waits in a collective for a lost peer cannot be interrupted, so a thread prints the reason and ends the
    process with exit code 1, after calling ``leave`` with the reason. The thread counts its own seconds, so that a
    suspended machine or process does not count as stuck. With one rank it does nothing.
    """

    def __init__(self, leave: Callable[[str], None] = lambda reason: None, stuck_s: float = STUCK_S) -> None:
        self.stuck_s = stuck_s
        self._leave = leave
        self._idle_s: float | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def progress(self) -> None:
        """Note that a step or a validation batch is finished. Before the first, the rank does not count as stuck."""
        self._idle_s = 0.0

    def __enter__(self) -> Watchdog:
        if world_size() > 1:
            # A separate connection, because a waiting rank blocks the shared one.
            self._store = _store().clone()
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()

    def _watch(self) -> None:
        failure, left_s = "", GRACE_S
        while not self._stop.wait(1.0):
            if self._idle_s is not None:
                self._idle_s += 1.0
                if self._idle_s > self.stuck_s:
                    self._end(f"no step was finished for {self.stuck_s:.0f} s: another rank is stuck or lost")
            failure = failure or self._failure()
            if failure:
                left_s -= 1.0
                if left_s < 0:
                    self._end(f"another rank failed ({failure})")

    def _failure(self) -> str:
        try:
            return self._store.get(_FAILED).decode() if self._store.check([_FAILED]) else ""
        except RuntimeError as error:
            return f"the store of the process group is gone: {str(error).splitlines()[0]}"

    def _end(self, reason: str) -> None:
        self._leave(reason)
        print(f"error: rank {rank()}: {reason}", file=sys.stderr, flush=True)
        os._exit(1)


def gather(value: T) -> list[T]:
    """The values of all ranks, in order of rank, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    # all_gather_object would use the GPU's backend for plain values; a broadcast from each rank stays on the CPU.
    for source in range(world_size()):
        box: list[Any] = [value if source == rank() else None]
        dist.broadcast_object_list(box, src=source, device=torch.device("cpu"))
        values[source] = box[0]
    return values
