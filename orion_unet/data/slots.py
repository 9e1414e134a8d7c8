"""Memory for a loader's batches: made once, filled by its worker processes, read by the rank, used again."""

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

    A fresh buffer for every batch would cost several times the copy of its patches: the system clears each page
    before it is written. Anonymous, because containers are often given no more than 64 MB of /dev/shm.

    Every worker fills slots of its own in turn, two more than it prepares in advance: a batch stays as it is until
    two further ones have been taken, or a new pass begins.
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
        """The slot that a worker (0 where the rank loads by itself) fills next."""
        slot = worker * self._each + self._filled % self._each
        self._filled += 1
        return slot

    def pin(self) -> None:
        """Lock the memory for asynchronous copies to a GPU; where the system refuses, the copies wait instead.

        After the workers have been forked: what a driver does to its pages must not pass on to them.
        """
        if self._pinned is not None:
            return
        self._pinned = []
        runtime = torch.cuda.cudart()
        for buffer in (buffer for slot in self.buffers for buffer in slot.values()):
            if int(runtime.cudaHostRegister(buffer.ctypes.data, buffer.nbytes, 0)) != 0:
                # The next kernel would be blamed for it: let one that nobody needs take the blame.
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
