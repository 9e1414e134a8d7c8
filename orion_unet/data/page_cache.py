"""Reads patches of data sets larger than memory: asks the system for the rows of a patch and no read-ahead."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

# Files larger than this share of the memory count as too large for the page cache.
CACHE_SHARE = 0.6
# Rows that are closer together than this are requested in one piece.
GAP_BYTES = 4 * mmap.PAGESIZE
# Where Linux keeps the limits of control groups, and the list of the groups of this process.
CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def memory_limit() -> int:
    """Bytes of memory that this process may use: the machine's, or the limit of its container, job or service."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in _limit_files():
        with suppress(OSError, ValueError):
            limits.append(int(path.read_text(encoding="ascii")))
    return min(limits)


def _limit_files() -> Iterator[Path]:
    """Files that may contain a limit: those of this process's control groups and of all their parents."""
    lines = ["0::/", "0:memory:/"]
    with suppress(OSError, ValueError):
        lines += OWN_CGROUPS.read_text(encoding="utf-8").splitlines()
    for line in lines:
        _, _, named = line.partition(":")
        controllers, _, group = named.partition(":")
        # Version 2 of control groups has one tree for all limits, version 1 has a tree per kind of limit.
        if not controllers:
            root, name = CGROUPS, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = CGROUPS / "memory", "memory.limit_in_bytes"
        else:
            continue
        inner = PurePosixPath(group.lstrip("/"))
        yield from (root / folder / name for folder in (inner, *inner.parents))


def fits_page_cache(size: int) -> bool:
    """Whether files of this many bytes stay in memory once read."""
    return size <= CACHE_SHARE * memory_limit()


def expect_single_rows(stored: Any) -> None:
    """Switch off read-ahead for a memory map: without this, the system reads megabytes around each access."""
    with suppress(AttributeError, OSError):
        stored._mmap.madvise(mmap.MADV_RANDOM)


def ask_for(stored: Any, crop: np.ndarray) -> None:
    """Start reading a crop (a view of a memory map's array) into the page cache, without waiting for it."""
    with suppress(AttributeError, OSError):
        memory = stored._mmap
        origin = stored.ctypes.data - stored.offset % mmap.ALLOCATIONGRANULARITY
        for start, stop in _pieces(crop):
            first = (start - origin) // mmap.PAGESIZE * mmap.PAGESIZE
            memory.madvise(mmap.MADV_WILLNEED, first, stop - origin - first)


def _pieces(crop: np.ndarray) -> list[tuple[int, int]]:
    """Address ranges that cover the crop; ranges that are close together are merged."""
    starts = np.array([crop.ctypes.data])
    length = crop.itemsize
    for size, stride in sorted(zip(crop.shape, crop.strides, strict=True), key=lambda axis: axis[1]):
        if stride - length <= GAP_BYTES:
            length += (size - 1) * stride
        else:
            starts = (starts[:, None] + np.arange(size) * stride).reshape(-1)
    return [(start, start + length) for start in starts.tolist()]
