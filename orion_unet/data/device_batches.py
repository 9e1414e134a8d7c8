"""Stored batches from a loader, turned into network batches on the device, with the time spent waiting for them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator

import torch

from orion_unet.data.loaders import BatchLoader
from orion_unet.data.patches import RawBatch
from orion_unet.data.transforms import Batch, BatchTransform


class DeviceBatches:
    """Iterates a loader and transforms each batch on the device.

    On a GPU, copy and transforms run on a stream of their own beside the training step before them. ``wait_s`` is
    the time the last iteration spent waiting for the loader.
    """

    def __init__(self, loader: BatchLoader, transform: BatchTransform, augment: bool) -> None:
        self.loader = loader
        self.transform = transform
        self.augment = augment
        self.wait_s = 0.0
        on_gpu = transform.device.type == "cuda"
        self._stream = torch.cuda.Stream(transform.device) if on_gpu else None

    def __iter__(self) -> Iterator[Batch]:
        self.wait_s = 0.0
        copied: deque[torch.cuda.Event] = deque()
        if self._stream is not None:
            # A new pass fills all memory of the last one anew.
            self._stream.synchronize()
        started = time.perf_counter()
        for raw in self.loader:
            self.wait_s += time.perf_counter() - started
            yield self._prepare(raw)
            if self._stream is not None:
                copied.append(self._stream.record_event())
                if len(copied) > 1:
                    # The next batch but one will take its memory. Done long ago, while the step before it ran.
                    copied.popleft().synchronize()
            started = time.perf_counter()
        self.wait_s += time.perf_counter() - started

    def close(self) -> None:
        """End the loader's processes."""
        self.loader.close()

    def _prepare(self, raw: RawBatch) -> Batch:
        if self._stream is None:
            return self.transform(raw, self.augment)
        with torch.cuda.stream(self._stream):
            batch = self.transform(raw, self.augment)
        current = torch.cuda.current_stream(self.transform.device)
        current.wait_stream(self._stream)
        for tensor in (batch.he, batch.target, batch.boundary):
            # The allocator must not hand the memory on while the training stream still reads it.
            tensor.record_stream(current)
        return batch
