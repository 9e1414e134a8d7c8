"""Reusable memory for batches: allocated once, filled by the loader's workers, read by the rank."""

from __future__ import annotations

import mmap
from contextlib import suppress

import numpy as np
import torch

from orion_unet.data.patches import PatchReader

MODALITIES = ("he", "orion")
# Batches that a worker prepares in advance.
PREFETCH = 2


class BatchSlots:
    """Slots for whole batches in anonymous shared memory, which forked workers inherit.

    A new buffer for every batch would cost several times as much as copying the patches, because the system clears each
    page first. Anonymous, because containers often have only 64 MB of /dev/shm.

    Every worker fills its own slots in turn, two more than it prepares in advance. So a batch stays valid until two
    further ones have been taken or a new pass begins.
    """

    def __init__(self, reader: PatchReader, batch_size: int, workers: int) -> None:
        self._each = PREFETCH + 2 if workers else 2
        self._filled = 0
        self._pinned: list[np.ndarray] | None = None
        self.buffers: list[dict[str, np.ndarray]] = []
        for _ in range(max(1, workers) * self._each):
            slot = {}
            for modality in MODALITIES:
                shape, dtype = reader.batch_shape(modality, batch_size), reader.formats[modality].dtype
                slot[modality] = np.ndarray(shape, dtype, _shared_memory(int(np.prod(shape)) * dtype.itemsize))
            self.buffers.append(slot)

    def next(self, worker: int) -> int:
        """The slot that a worker (0 if the rank loads in its own process) fills next."""
        slot = worker * self._each + self._filled % self._each
        self._filled += 1
        return slot

    @property
    def nbytes(self) -> int:
        """Memory of all slots."""
        return sum(buffer.nbytes for slot in self.buffers for buffer in slot.values())

    def pin(self, limit_bytes: int) -> None:
        """Lock up to ``limit_bytes`` of the memory for asynchronous copies to a GPU.

        Copies from memory that is not locked, or that the system refuses to lock, are synchronous.

        Call it after the workers have been forked, so that they do not inherit pages that the driver has registered.
        """
        if self._pinned is not None:
            return
        self._pinned = []
        runtime = torch.cuda.cudart()
        for buffer in (buffer for slot in self.buffers for buffer in slot.values()):
            if sum(pinned.nbytes for pinned in self._pinned) + buffer.nbytes > limit_bytes:
                return
            if int(runtime.cudaHostRegister(buffer.ctypes.data, buffer.nbytes, 0)) != 0:
                # Run a dummy kernel, so that the pending error is not blamed on the next one.
                with suppress(RuntimeError):
                    torch.ones(1, device="cuda")
                return
            self._pinned.append(buffer)

    def unpin(self) -> None:
        """Unlock the memory."""
        for buffer in self._pinned or ():
            torch.cuda.cudart().cudaHostUnregister(buffer.ctypes.data)
        self._pinned = None


def _shared_memory(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size)
    with suppress(AttributeError, OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
