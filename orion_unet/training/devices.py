"""The device a rank trains on, and how its kernels behave."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress
from pathlib import Path

import torch

from orion_unet.config import RuntimeOptions
from orion_unet.distributed import local_rank, local_world_size, under_launcher
from orion_unet.errors import InputError

NVIDIA_DEVICE = Path("/dev/nvidia0")
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def choose_device(options: RuntimeOptions) -> torch.device:
    """The GPU of this rank, or the CPU where there is none or ``--gpus 0``; raises InputError, also where the GPU
    lacks the type of mixed precision that is wanted.

    Under a launcher rank i of a machine takes GPU i. Alone, one GPU (several are started as ranks before this).
    """
    visible = torch.cuda.device_count()
    if options.gpus == 0 or (options.gpus is None and visible == 0):
        return torch.device("cpu")
    wanted = options.gpus
    if under_launcher() and wanted not in (None, local_world_size()):
        raise InputError(
            f"--gpus {wanted} contradicts the launcher, which has started {local_world_size()} ranks on this machine"
        )
    needed = local_world_size() if under_launcher() else wanted or 1
    if needed > visible:
        raise InputError(
            f"{needed} GPUs are wanted on this machine, {visible} are visible: lower --gpus (0 = CPU) or the number "
            "of ranks, or check CUDA_VISIBLE_DEVICES"
        )
    device = torch.device("cuda", local_rank())
    torch.cuda.set_device(device)
    autocast_dtype(options, device)
    return device


def autocast_dtype(options: RuntimeOptions, device: torch.device) -> torch.dtype | None:
    """The type of mixed precision on a device, None for plain float32; raises InputError where the GPU has no such
    type."""
    if not options.use_amp or device.type != "cuda":
        return None
    # Emulated bfloat16, which some older GPUs have, is slow and does not count.
    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if options.amp_dtype == "bfloat16" and not has_bfloat16:
        raise InputError(
            f"--amp_dtype bfloat16: {torch.cuda.get_device_name(device)} does not have it; use float16 or auto"
        )
    return torch.float16 if options.amp_dtype == "float16" or not has_bfloat16 else torch.bfloat16


def device_warning(device: torch.device, options: RuntimeOptions) -> list[str]:
    """A sentence where training runs on the CPU although the machine has a GPU that this torch cannot use."""
    wanted = device.type == "cpu" and options.gpus is None
    if not wanted or torch.backends.cuda.is_built() or not NVIDIA_DEVICE.exists():
        return []
    return [
        f"this machine has a GPU, but torch {torch.__version__} was built for CPUs only and trains on the CPU: install "
        "a CUDA build of torch (https://pytorch.org/get-started)"
    ]


def set_determinism(deterministic: bool) -> None:
    """Use deterministic kernels, or the fastest ones for the shapes at hand."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not deterministic


def keep_freed_memory(device: torch.device) -> None:
    """On a CPU, let the C library keep the memory of freed tensors for the next ones.

    By default glibc gives every large block back to the system, which clears each page before it hands it out
    again: a fifth of the time of a training step. It also gives back memory from the arenas of other threads in
    spite of these limits, so that threads started later share one arena. Other C libraries are left as they are.
    """
    if device.type != "cpu" or not sys.platform.startswith("linux"):
        return
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        # M_MMAP_MAX, M_TRIM_THRESHOLD and M_ARENA_MAX of malloc.h: no blocks of their own, nothing trimmed, one arena.
        library.mallopt(-4, 0)
        library.mallopt(-1, 2**31 - 1)
        library.mallopt(-8, 1)


def describe_devices(device: torch.device, ranks: int) -> str:
    """The devices of a run, for a person."""
    if device.type == "cuda":
        return f"{ranks} x {torch.cuda.get_device_name(device)}"
    threads = torch.get_num_threads()
    counted = f"{threads} thread{'s' if threads != 1 else ''}"
    return f"CPU ({counted})" if ranks == 1 else f"{ranks} CPU ranks ({counted} each)"


def device_memory_bytes(device: torch.device) -> int | None:
    """Memory of the GPU, or this rank's share of the machine's (or of its control group's) on a CPU; None where it is
    unknown."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    known = []
    with suppress(OSError, ValueError, AttributeError):
        known.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with suppress(OSError, ValueError):
        known.append(int(CGROUP_LIMIT.read_text()))
    return min(known) // max(1, local_world_size()) if known else None


def memory_bytes(device: torch.device) -> int:
    """Largest memory held so far: the GPU's tensors, or this process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
