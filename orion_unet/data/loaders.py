"""Batches for one rank: which samples, in which order, fetched by worker processes."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from orion_unet.data.patches import PatchPlace, PatchReader, RawBatch, describe, draw_training_patch
from orion_unet.data.randomness import ORDER, counter_rng
from orion_unet.data.slots import PREFETCH, BatchSlots
from orion_unet.distributed import usable_cores
from orion_unet.errors import InputError


@dataclass(frozen=True)
class BatchRequest:
    """Sample indices of one batch in one epoch: all a worker needs to know."""

    epoch: int
    indices: np.ndarray


class Samples(Protocol):
    """What a loader can load: its reader, and the places of a batch."""

    reader: PatchReader

    def places(self, request: BatchRequest) -> list[PatchPlace]:
        """Where the patches of a batch lie."""


class TrainingSamples:
    """Random crops: sample ``index`` of an epoch lies in core ``cores[index // patches_per_image]``."""

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
        """The samples of an epoch with the given indices."""
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
        """The patches with the given indices, whatever the epoch."""
        return [PatchPlace(*row) for row in self.rows[request.indices].tolist()]


class TrainingOrder(Sampler[BatchRequest]):
    """Batches of this rank for one epoch: a permutation of (seed, epoch), cut into equal global batches.

    Step s of every world size with the same global batch covers the same samples; the incomplete last batch is
    left out, so that every step weighs the same and shapes never change.
    """

    def __init__(self, samples: int, batch_size: int, rank: int, world_size: int, seed: int) -> None:
        self.samples = samples
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.epoch = 0
        self.start_step = 0

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Choose the epoch, and the step to begin with (that of an epoch that was interrupted)."""
        self.epoch = epoch
        self.start_step = start_step

    @property
    def steps(self) -> int:
        """Batches of a whole epoch."""
        return self.samples // (self.batch_size * self.world_size)

    def __len__(self) -> int:
        return self.steps - self.start_step

    def __iter__(self) -> Iterator[BatchRequest]:
        order = counter_rng(self.seed, ORDER, self.epoch).permutation(self.samples)
        whole = order[: self.steps * self.world_size * self.batch_size]
        mine = whole.reshape(self.steps, self.world_size, self.batch_size)[:, self.rank]
        for indices in mine[self.start_step :]:
            yield BatchRequest(self.epoch, indices)


class ValidationOrder(Sampler[BatchRequest]):
    """This rank's share of the validation patches: every one exactly once over all ranks, none repeated."""

    def __init__(self, samples: int, batch_size: int, rank: int, world_size: int) -> None:
        self.mine = np.arange(rank, samples, world_size)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.mine) // self.batch_size)

    def __iter__(self) -> Iterator[BatchRequest]:
        for start in range(0, len(self.mine), self.batch_size):
            yield BatchRequest(0, self.mine[start : start + self.batch_size])


def automatic_workers(local_world_size: int, on_gpu: bool) -> int:
    """Loader processes per rank: the machine's usable cores shared by its ranks, one of them kept for the rank.

    On a CPU the network itself wants the cores and is far slower than the loader: one process is enough.
    """
    cores = usable_cores() // max(1, local_world_size)
    return min(8, max(1, cores - 1)) if on_gpu else max(0, min(1, cores - 1))


class _Filling(Dataset[tuple[int, tuple[np.ndarray, ...]]]):
    """In a worker: fills its next slot, and tells which, with all of the batch that is not images."""

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

    The images of a batch hold until two further batches have been taken or a new pass begins: then their memory is
    filled anew. With ``pin`` it is locked, so that copies to a GPU need not wait. Workers are forked at the first
    pass and serve all further ones; where the system cannot fork, the rank loads by itself.
    """

    def __init__(
        self, samples: Samples, order: Sampler[BatchRequest], batch_size: int, workers: int, pin: bool = False
    ) -> None:
        if "fork" not in multiprocessing.get_all_start_methods():
            workers = 0
        self.workers = workers
        self._pin = pin
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
                if self._pin:
                    self._slots.pin()
                yield RawBatch.of(self._slots.buffers[slot], described)
        except InputError as error:
            # A worker hands its message over at the end of a traceback.
            raise InputError(str(error).rpartition("InputError: ")[2].strip()) from None

    def worker_ids(self) -> list[int]:
        """Process ids of the workers, none before the first pass."""
        return [worker.pid for worker in getattr(self._loader._iterator, "_workers", ())]

    def close(self) -> None:
        """End the workers now, not when the interpreter gets round to it: they ignore its signals."""
        iterator: Any = self._loader._iterator
        if iterator is not None:
            iterator._shutdown_workers()
            self._loader._iterator = None
        self._slots.unpin()


def _as_it_is(batch: Any) -> Any:
    return batch


def _begin_worker(rank_pid: int, worker: int) -> None:
    # A Ctrl-C reaches every process of the terminal; the rank decides when its workers end.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    # From here on the loader ends a worker whose parent changes. A rank killed earlier has already been replaced as the
    # parent, unnoticed, and the worker would wait for ever.
    if os.getppid() != rank_pid:
        os._exit(1)


def _end_workers() -> None:
    # A loader that a traceback keeps alive leaves its workers to multiprocessing, which at the end of the process
    # asks them with the SIGTERM they do not hear, and waits for ever.
    for worker in multiprocessing.active_children():
        worker.kill()
