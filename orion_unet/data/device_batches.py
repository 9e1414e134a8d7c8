"""Network batches on the device, made from a loader's stored batches, and the time spent waiting for the loader."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch

from orion_unet.data.loaders import BatchLoader
from orion_unet.data.patches import RawBatch
from orion_unet.data.transforms import Batch, BatchTransform


class DeviceGaps:
    """Adds up the times between pairs of events on a device, without waiting for those that have not happened yet."""

    def __init__(self) -> None:
        self._open: deque[tuple[Any, Any]] = deque()
        self._milliseconds = 0.0

    def add(self, ended: Any, ready: Any) -> None:
        """A step's end, and the moment when the next batch is ready; there is no gap where that comes first."""
        self._open.append((ended, ready))
        while self._open and all(event.query() for event in self._open[0]):
            self._close()

    def total_s(self) -> float:
        """All gaps together; waits for the device."""
        while self._open:
            for event in self._open[0]:
                event.synchronize()
            self._close()
        return self._milliseconds / 1e3

    def _close(self) -> None:
        ended, ready = self._open.popleft()
        self._milliseconds += max(0.0, ended.elapsed_time(ready))


class DeviceBatches:
    """Iterates over a loader and transforms each batch on the device.

    On a GPU, copies and transforms run on a separate stream, in parallel with the previous training step. ``wait_s`` is
    the time of the last pass in which the device could do nothing but wait for a batch: on a CPU the time spent waiting
    for the loader; on a GPU, whose host runs ahead of it, the time by its own clock from the end of a step to the
    moment when the next batch is ready.
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
        gaps = DeviceGaps()
        started, ended = time.perf_counter(), self._moment()
        for raw in self.loader:
            self.wait_s += time.perf_counter() - started
            batch = self._prepare(raw)
            if self._stream is not None:
                gaps.add(ended, self._moment(self._stream))
            yield batch
            if self._stream is not None:
                ended = self._moment()
                copied.append(self._stream.record_event())
                if len(copied) > 1:
                    # The slot is overwritten two batches later. This copy has normally long finished.
                    copied.popleft().synchronize()
            started = time.perf_counter()
        self.wait_s += time.perf_counter() - started
        if self._stream is not None:
            self.wait_s = gaps.total_s()

    def _moment(self, stream: torch.cuda.Stream | None = None) -> torch.cuda.Event | None:
        """An event with the device's clock on a stream, or on the one that trains; None on a CPU."""
        if self._stream is None:
            return None
        event = torch.cuda.Event(enable_timing=True)
        (stream or torch.cuda.current_stream(self.transform.device)).record_event(event)
        return event

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
