"""Reading patches of a data set that memory cannot hold: ask the system for their rows, and for nothing else."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

# Share of the memory that the files may fill before they count as too large for the page cache.
CACHE_SHARE = 0.6
# Rows that lie closer together than this are asked for in one piece.
GAP_BYTES = 4 * mmap.PAGESIZE
# Where Linux keeps the limits of control groups, and the names of those that this process belongs to.
CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def memory_limit() -> int:
    """Bytes of memory that this process may use: the machine's, or those of its container, job or service."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in _limit_files():
        with suppress(OSError, ValueError):
            limits.append(int(path.read_text(encoding="ascii")))
    return min(limits)


def _limit_files() -> Iterator[Path]:
    """Files that may hold a limit: those of this process's control groups and of all groups around them."""
    lines = ["0::/", "0:memory:/"]
    with suppress(OSError, ValueError):
        lines += OWN_CGROUPS.read_text(encoding="utf-8").splitlines()
    for line in lines:
        _, _, named = line.partition(":")
        controllers, _, group = named.partition(":")
        # The second version of control groups has one tree for all, the first one for each kind of limit.
        if not controllers:
            root, name = CGROUPS, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = CGROUPS / "memory", "memory.limit_in_bytes"
        else:
            continue
        inner = PurePosixPath(group.lstrip("/"))
        yield from (root / folder / name for folder in (inner, *inner.parents))


def fits_page_cache(size: int) -> bool:
    """Whether files of so many bytes stay in memory once they have been read."""
    return size <= CACHE_SHARE * memory_limit()


def expect_single_rows(stored: Any) -> None:
    """Let the system read what is touched of a memory map only, not megabytes around it."""
    with suppress(AttributeError, OSError):
        stored._mmap.madvise(mmap.MADV_RANDOM)


def ask_for(stored: Any, crop: np.ndarray) -> None:
    """Begin to read a crop (a view of a memory map's array) into the page cache, without waiting for it."""
    with suppress(AttributeError, OSError):
        memory = stored._mmap
        origin = stored.ctypes.data - stored.offset % mmap.ALLOCATIONGRANULARITY
        for start, stop in _pieces(crop):
            first = (start - origin) // mmap.PAGESIZE * mmap.PAGESIZE
            memory.madvise(mmap.MADV_WILLNEED, first, stop - origin - first)


def _pieces(crop: np.ndarray) -> list[tuple[int, int]]:
    """Address ranges that hold the crop, those merged that lie close together."""
    starts = np.array([crop.ctypes.data])
    length = crop.itemsize
    for size, stride in sorted(zip(crop.shape, crop.strides, strict=True), key=lambda axis: axis[1]):
        if stride - length <= GAP_BYTES:
            length += (size - 1) * stride
        else:
            starts = (starts[:, None] + np.arange(size) * stride).reshape(-1)
    return [(start, start + length) for start in starts.tolist()]
