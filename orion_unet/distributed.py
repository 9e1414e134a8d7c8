"""Process group, rank and reductions: every function answers correctly with no process group too."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from orion_unet.errors import InputError, RunError

T = TypeVar("T")

# A collective that waits longer than this has lost a rank. Long enough for rank 0 to fit the normalisation of a
# large data set while the others wait for its answer.
TIMEOUT = timedelta(minutes=30)


def usable_cores() -> int:
    """Processor cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def under_launcher() -> bool:
    """True where torchrun (or our own launcher) has started this process as one rank of several or of one."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    """This process's rank; 0 alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks; 1 alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """Rank among the processes of this machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Number of ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """True on rank 0, which alone writes and speaks."""
    return rank() == 0


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the launcher's process group for as long as the block runs: NCCL on GPUs, gloo on CPUs; alone, nothing."""
    if not under_launcher():
        yield
        return
    # Flags and plain values travel by gloo from the CPU, gradients and sums by NCCL from the GPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over ranks, in place; the tensor itself alone."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def mean_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Mean over ranks, in place; the tensor itself alone."""
    return all_reduce_sum(tensor).div_(world_size())


def any_rank(flag: bool) -> bool:
    """True where the flag is set on any rank: how a decision that could part the ranks is taken once."""
    if not dist.is_initialized():
        return flag
    shared = torch.tensor(int(flag))
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return bool(shared.item())


def broadcast(value: T) -> T:
    """The value of rank 0, on every rank. Plain Python values and arrays."""
    if not dist.is_initialized():
        return value
    box: list[Any] = [value if is_main_process() else None]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return cast(T, box[0])


def barrier() -> None:
    """Wait for all ranks."""
    any_rank(False)


def from_main_process(compute: Callable[[], T]) -> T:
    """Compute a value once, on rank 0, and give it to all; its InputError or RunError is raised on every rank."""
    outcome: tuple[T | None, Exception | None] = (None, None)
    if is_main_process():
        try:
            outcome = (compute(), None)
        except (InputError, RunError) as error:
            outcome = (None, error)
        except BaseException as error:
            broadcast((None, RunError(f"rank 0 failed: {type(error).__name__}: {error}")))
            raise
    value, failure = broadcast(outcome)
    if isinstance(failure, RunError):
        failure.told = not is_main_process()
    if failure is not None:
        raise failure
    return cast(T, value)


def gather(value: T) -> list[T]:
    """The values of all ranks, in order of rank, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    # all_gather_object would take the GPU's backend for plain values: a broadcast from each rank stays on the CPU.
    for source in range(world_size()):
        box: list[Any] = [value if source == rank() else None]
        dist.broadcast_object_list(box, src=source, device=torch.device("cpu"))
        values[source] = box[0]
    return values
