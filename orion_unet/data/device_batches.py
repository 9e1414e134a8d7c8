"""Stored batches from a loader, turned into network batches on the device, with the time spent waiting for them."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader

from orion_unet.data.patches import RawBatch
from orion_unet.data.transforms import Batch, BatchTransform
from orion_unet.errors import InputError


class DeviceBatches:
    """Iterates a loader and transforms each batch on the device.

    On a GPU, copy and transforms run on a stream of their own beside the training step before them. ``wait_s`` is
    the time the last iteration spent waiting for the loader.
    """

    def __init__(self, loader: DataLoader[RawBatch], transform: BatchTransform, augment: bool) -> None:
        self.loader = loader
        self.transform = transform
        self.augment = augment
        self.wait_s = 0.0
        on_gpu = transform.device.type == "cuda"
        self._stream = torch.cuda.Stream(transform.device) if on_gpu else None

    def __iter__(self) -> Iterator[Batch]:
        self.wait_s = 0.0
        started = time.perf_counter()
        for raw in self._loaded():
            self.wait_s += time.perf_counter() - started
            yield self._prepare(raw)
            started = time.perf_counter()
        self.wait_s += time.perf_counter() - started

    def close(self) -> None:
        """End the loader's processes now, not when the interpreter gets round to it: they ignore its signals."""
        iterator = getattr(self.loader, "_iterator", None)
        if iterator is not None:
            iterator._shutdown_workers()
            self.loader._iterator = None

    def _loaded(self) -> Iterator[RawBatch]:
        try:
            yield from self.loader
        except InputError as error:
            # A loader process hands its message over at the end of a traceback.
            raise InputError(str(error).rpartition("InputError: ")[2].strip()) from None

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
