"""Batches of one rank: which samples, in which order, and the worker processes that read them."""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from orion_unet.data.patches import PatchPlace, PatchReader, RawBatch, describe, draw_training_patch
from orion_unet.data.randomness import ORDER, counter_rng
from orion_unet.data.slots import MODALITIES, PREFETCH, BatchSlots
from orion_unet.distributed import usable_cores
from orion_unet.errors import InputError, RunError

# Linux: the signal that a process is sent when its parent ends (linux/prctl.h).
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class BatchRequest:
    """Epoch and sample indices of one batch: all that a worker needs."""

    epoch: int
    indices: np.ndarray


class Samples(Protocol):
    """A source of batches: a reader, and the patches of a batch."""

    reader: PatchReader

    def places(self, request: BatchRequest) -> list[PatchPlace]:
        """The patches of a batch."""


class TrainingSamples:
    """Random crops: sample ``index`` of an epoch comes from core ``cores[index // patches_per_image]``."""

    def __init__(
        self, reader: PatchReader, cores: np.ndarray, patches_per_image: int, seed: int, augment: bool
    ) -> None:
        self.reader = reader
        self.cores = cores
        self.patches_per_image = patches_per_image
        self.seed = seed
        self.augment = augment

    def __len__(self) -> int:
        return len(self.cores) * self.patches_per_image

    def places(self, request: BatchRequest) -> list[PatchPlace]:
        """The requested samples of the epoch."""
        cores = self.cores[request.indices // self.patches_per_image].tolist()
        return [
            draw_training_patch(self.reader, core, self.seed, request.epoch, index, self.augment)
            for core, index in zip(cores, request.indices.tolist(), strict=True)
        ]


class ValidationSamples:
    """Fixed patches given as rows (core, y, x)."""

    def __init__(self, reader: PatchReader, rows: np.ndarray) -> None:
        self.reader = reader
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def places(self, request: BatchRequest) -> list[PatchPlace]:
        """The requested patches, the same in every epoch."""
        return [PatchPlace(*row) for row in self.rows[request.indices].tolist()]


class TrainingOrder(Sampler[BatchRequest]):
    """Batches of this rank for one epoch: a permutation drawn from (seed, epoch), cut into equal global batches.

    With the same global batch, step s covers the same samples on any number of ranks. The incomplete last batch is
    dropped, so that every step has the same weight and shapes never change. ``mixed`` is the number of consecutive
    samples of a core, and of the cores whose samples are mixed (``epoch_order``).
    """

    def __init__(
        self,
        samples: int,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        mixed: tuple[int, int] = (1, 0),
    ) -> None:
        self.samples = samples
        self.mixed = mixed
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.epoch = 0
        self.start_step = 0

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Choose the epoch and its first step (above 0 when an interrupted epoch is resumed)."""
        self.epoch = epoch
        self.start_step = start_step

    @property
    def steps(self) -> int:
        """Number of batches of a whole epoch."""
        return self.samples // (self.batch_size * self.world_size)

    def __len__(self) -> int:
        return self.steps - self.start_step

    def __iter__(self) -> Iterator[BatchRequest]:
        order = epoch_order(self.samples, self.seed, self.epoch, *self.mixed)
        whole = order[: self.steps * self.world_size * self.batch_size]
        mine = whole.reshape(self.steps, self.world_size, self.batch_size)[:, self.rank]
        for indices in mine[self.start_step :]:
            yield BatchRequest(self.epoch, indices)


def epoch_order(samples: int, seed: int, epoch: int, per_core: int = 1, cores: int = 0) -> np.ndarray:
    """The samples of an epoch, each once, in an order drawn from (seed, epoch), whatever their format.

    With ``cores`` above 0, the cores, of ``per_core`` consecutive samples each, come in random order, and the samples
    of so many of them at a time are mixed: tiles are decoded once where a cache has room for those of ``cores`` cores.
    """
    rng = counter_rng(seed, ORDER, epoch)
    if not 0 < cores * per_core < samples:
        return rng.permutation(samples)
    drawn = rng.permutation(samples // per_core)
    order = (drawn[:, None] * per_core + np.arange(per_core)).reshape(-1)
    for start in range(0, samples, cores * per_core):
        rng.shuffle(order[start : start + cores * per_core])
    return order


class ValidationOrder(Sampler[BatchRequest]):
    """This rank's share of the validation patches: over all ranks, each patch comes exactly once."""

    def __init__(self, samples: int, batch_size: int, rank: int, world_size: int) -> None:
        self.mine = np.arange(rank, samples, world_size)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.mine) // self.batch_size)

    def __iter__(self) -> Iterator[BatchRequest]:
        for start in range(0, len(self.mine), self.batch_size):
            yield BatchRequest(0, self.mine[start : start + self.batch_size])


def slots_bytes(reader: PatchReader, batch_size: int) -> int:
    """Memory of the batches that one loader process prepares in advance."""
    return (PREFETCH + 2) * sum(
        int(np.prod(reader.batch_shape(modality, batch_size))) * reader.formats[modality].dtype.itemsize
        for modality in MODALITIES
    )


def automatic_workers(local_world_size: int, on_gpu: bool) -> int:
    """Loader processes per rank: the usable cores divided among the ranks of the machine, minus one for the rank.

    On a CPU one process is enough, because the network needs the cores and is far slower than the loader.
    """
    cores = usable_cores() // max(1, local_world_size)
    return min(8, max(1, cores - 1)) if on_gpu else max(0, min(1, cores - 1))


class _Filling(Dataset[tuple[int, tuple[np.ndarray, ...]]]):
    """In a worker: fills its next slot and returns the slot's index with the metadata of the batch."""

    def __init__(self, samples: Samples, slots: BatchSlots) -> None:
        self.samples = samples
        self.slots = slots

    def __getitem__(self, request: BatchRequest) -> tuple[int, tuple[np.ndarray, ...]]:
        worker = get_worker_info()
        slot = self.slots.next(worker.id if worker else 0)
        places = self.samples.places(request)
        self.samples.reader.fill(places, self.slots.buffers[slot])
        return slot, describe(places)


class BatchLoader:
    """Whole batches as stored, assembled by worker processes in the sampler's order.

    The images of a batch are valid until two further batches have been taken or a new pass begins; then their memory is
    overwritten. Up to ``pin_bytes`` of it are locked, for asynchronous copies to a GPU. Workers are forked at the first
    pass and kept for later ones. On systems without fork, the rank loads in its own process.
    """

    def __init__(
        self, samples: Samples, order: Sampler[BatchRequest], batch_size: int, workers: int, pin_bytes: int = 0
    ) -> None:
        if "fork" not in multiprocessing.get_all_start_methods():
            workers = 0
        self.workers = workers
        self._pin_bytes = pin_bytes
        self._slots = BatchSlots(samples.reader, batch_size, workers)
        if workers > 0:
            atexit.register(_end_workers)
        self._loader = DataLoader(
            _Filling(samples, self._slots),
            sampler=order,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=workers,
            multiprocessing_context="fork" if workers > 0 else None,
            persistent_workers=workers > 0,
            prefetch_factor=PREFETCH if workers > 0 else None,
            worker_init_fn=partial(_begin_worker, os.getpid()) if workers > 0 else None,
        )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[RawBatch]:
        try:
            for slot, described in self._loader:
                if self._pin_bytes:
                    self._slots.pin(self._pin_bytes)
                yield RawBatch.of(self._slots.buffers[slot], described)
        except (InputError, RunError) as error:
            # A worker's exception arrives as a traceback that ends with its message.
            kind = type(error)
            raise kind(str(error).rpartition(f"{kind.__name__}: ")[2].strip()) from None

    @property
    def nbytes(self) -> int:
        """Memory of the batches prepared in advance."""
        return self._slots.nbytes

    def worker_ids(self) -> list[int]:
        """Process ids of the workers; empty before the first pass."""
        return [worker.pid for worker in getattr(self._loader._iterator, "_workers", ())]

    def close(self) -> None:
        """End the workers now. They ignore the signals by which the interpreter would end them later."""
        iterator: Any = self._loader._iterator
        if iterator is not None:
            iterator._shutdown_workers()
            self._loader._iterator = None
        self._slots.unpin()


def _as_it_is(batch: Any) -> Any:
    return batch


def _begin_worker(rank_pid: int, worker: int) -> None:
    # Ctrl-C reaches every process of the terminal, but the rank decides when its workers end.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    # A worker inherits its rank's connections to the other ranks. While it has them open, they do not notice that the
    # rank was killed, so it must end at once. torch's own check takes up to 5 s.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
    # A rank killed earlier has already been replaced as the parent, unnoticed, and the worker would wait for ever.
    if os.getppid() != rank_pid:
        os._exit(1)


def _end_workers() -> None:
    # If a traceback keeps the loader alive, multiprocessing ends the workers at exit: it sends SIGTERM, which they
    # ignore, and waits for ever.
    for worker in multiprocessing.active_children():
        worker.kill()
