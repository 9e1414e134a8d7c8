"""Batches for one rank: which samples, in which order, fetched by worker processes."""

from __future__ import annotations

import atexit
import multiprocessing
import signal
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from orion_unet.data.patches import PatchPlace, PatchReader, RawBatch, draw_training_patch
from orion_unet.data.randomness import ORDER, counter_rng
from orion_unet.distributed import usable_cores


@dataclass(frozen=True)
class BatchRequest:
    """Sample indices of one batch in one epoch: all a worker needs to know."""

    epoch: int
    indices: np.ndarray


class TrainingBatches(Dataset[RawBatch]):
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

    def __getitem__(self, request: BatchRequest) -> RawBatch:
        return self.reader.read(
            [
                draw_training_patch(
                    self.reader,
                    int(self.cores[index // self.patches_per_image]),
                    self.seed,
                    request.epoch,
                    index,
                    self.augment,
                )
                for index in request.indices.tolist()
            ]
        )


class ValidationBatches(Dataset[RawBatch]):
    """Fixed patches given as rows (core, y, x)."""

    def __init__(self, reader: PatchReader, places: np.ndarray) -> None:
        self.reader = reader
        self.places = places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, request: BatchRequest) -> RawBatch:
        return self.reader.read([PatchPlace(*row) for row in self.places[request.indices].tolist()])


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


def build_loader(
    dataset: TrainingBatches | ValidationBatches, order: Sampler[BatchRequest], workers: int, pin_memory: bool
) -> DataLoader[RawBatch]:
    """Loader whose items are whole batches, assembled in the worker, in the sampler's order."""
    if workers > 0:
        atexit.register(_end_workers)
    return DataLoader(
        dataset,
        sampler=order,
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        prefetch_factor=2 if workers > 0 else None,
        worker_init_fn=_leave_signals_to_the_rank if workers > 0 else None,
    )


def _leave_signals_to_the_rank(worker: int) -> None:
    # A Ctrl-C reaches every process of the terminal; the rank decides when its workers end.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


def _end_workers() -> None:
    # A loader that a traceback keeps alive leaves its workers to multiprocessing, which at the end of the process
    # asks them with the SIGTERM they do not hear, and waits for ever.
    for worker in multiprocessing.active_children():
        worker.kill()
