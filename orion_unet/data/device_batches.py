"""Network batches on the device, made from a loader's stored batches, and the time spent waiting for the loader."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch

from orion_unet.data.loaders import BatchLoader
from orion_unet.data.patches import RawBatch
from orion_unet.data.transforms import Batch, BatchTransform

# Steps that a GPU may still have to do when the host prepares another batch.
AHEAD = 2


class DeviceGaps:
    """Adds up the times between pairs of events on a device, without waiting for those that have not happened yet."""

    def __init__(self) -> None:
        self._open: deque[tuple[Any, Any]] = deque()
        self._milliseconds = 0.0

    @property
    def known_s(self) -> float:
        """The gaps that are known by now."""
        return self._milliseconds / 1e3

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
        return self.known_s

    def _close(self) -> None:
        ended, ready = self._open.popleft()
        self._milliseconds += max(0.0, ended.elapsed_time(ready))


class DeviceBatches:
    """Iterates over a loader and transforms each batch on the device.

    On a GPU, copies and transforms run on a separate stream, in parallel with the previous step; no more than AHEAD
    steps are waiting for the device when the next batch is prepared. ``wait_s`` is the time of the last pass in which
    the device could do nothing but wait for a batch: on a CPU the time spent waiting for the loader; on a GPU, whose
    host runs ahead of it, the time by its own clock from the end of a step to the moment when the next batch is ready.
    During a pass it is the time so far; on a GPU the last steps may still be missing.
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
        return self._in_turn() if self._stream is None else self._beside_steps(self._stream)

    def _in_turn(self) -> Iterator[Batch]:
        started = time.perf_counter()
        for raw in self.loader:
            self.wait_s += time.perf_counter() - started
            yield self.transform(raw, self.augment)
            started = time.perf_counter()
        self.wait_s += time.perf_counter() - started

    def _beside_steps(self, stream: torch.cuda.Stream) -> Iterator[Batch]:
        # A new pass overwrites the slots of the last one: wait for its copies.
        stream.synchronize()
        gaps = DeviceGaps()
        prepared: deque[torch.cuda.Event] = deque()
        launched: deque[torch.cuda.Event] = deque()
        ended = self._moment()
        for raw in self.loader:
            batch = self._prepare(raw, stream)
            prepared.append(self._moment(stream))
            gaps.add(ended, prepared[-1])
            self.wait_s = gaps.known_s
            yield batch
            ended = self._moment()
            launched.append(ended)
            if len(prepared) > 1:
                # The slot is overwritten two batches later. This copy has normally long finished.
                prepared.popleft().synchronize()
            if len(launched) > AHEAD:
                # In validation nothing else holds the host back: it would fill the memory with batches.
                launched.popleft().synchronize()
        self.wait_s = gaps.total_s()

    def _moment(self, stream: torch.cuda.Stream | None = None) -> torch.cuda.Event:
        """An event with the device's clock on a stream; default: the one that the steps run on."""
        event = torch.cuda.Event(enable_timing=True)
        (stream or torch.cuda.current_stream(self.transform.device)).record_event(event)
        return event

    def close(self) -> None:
        """End the loader's processes."""
        if self._stream is not None:
            # A pass that was broken off may still be copying. After an error of the device, so does this wait fail.
            with suppress(RuntimeError):
                self._stream.synchronize()
        self.loader.close()

    def _prepare(self, raw: RawBatch, stream: torch.cuda.Stream) -> Batch:
        with torch.cuda.stream(stream):
            batch = self.transform(raw, self.augment)
        current = torch.cuda.current_stream(self.transform.device)
        current.wait_stream(stream)
        for tensor in (batch.he, batch.target, batch.boundary, batch.measured):
            if tensor is not None:
                # Keep the allocator from reusing the memory while the training stream still reads it.
                tensor.record_stream(current)
        return batch
