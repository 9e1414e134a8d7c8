"""Network batches on the device, made from a loader's stored batches, and the time spent waiting for the loader."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator

import torch

from orion_unet.data.loaders import BatchLoader
from orion_unet.data.patches import RawBatch
from orion_unet.data.transforms import Batch, BatchTransform


class DeviceBatches:
    """Iterates over a loader and transforms each batch on the device.

    On a GPU, copies and transforms run on a separate stream, in parallel with the previous training step. ``wait_s`` is
    the time that the current or last pass has spent waiting for the loader.
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
            # A new pass overwrites the slots of the last one: wait for its copies.
            self._stream.synchronize()
        started = time.perf_counter()
        for raw in self.loader:
            self.wait_s += time.perf_counter() - started
            yield self._prepare(raw)
            if self._stream is not None:
                copied.append(self._stream.record_event())
                if len(copied) > 1:
                    # The slot is overwritten two batches later. This copy has normally long finished.
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
            # Keep the allocator from reusing the memory while the training stream still reads it.
            tensor.record_stream(current)
        return batch
