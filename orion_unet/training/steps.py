"""What is known of training steps on the host: sums of an epoch, and numbers read late so that nothing waits."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from orion_unet.distributed import all_reduce_sum, world_size
from orion_unet.losses import TERMS, CompositeLoss

# So many steps later a GPU's numbers are read: by then they are there, and the host need not wait for them. A fixed
# number, because every rank must act on them at the same step.
READ_LAG = 2
DIVERGED_AFTER = 10


class Diverged(Exception):
    """Training cannot go on: too many steps in a row without a finite loss and gradient, or such a validation."""


@dataclass(frozen=True)
class StepReport:
    """What is known of a finished step, on the host. ``bad`` names what was not finite on this rank or another."""

    step: int
    loss: float
    bad: bool
    culprits: tuple[str, ...]
    cores: tuple[int, ...]


@dataclass
class TrainSums:
    """Sums of an epoch under way; plain enough to be saved and continued.

    ``values`` float64: loss, every term of the loss, number of batches with a finite loss, sum of gradient norms,
    number of optimiser steps taken, number skipped.
    """

    names: tuple[str, ...]
    values: Tensor
    bad_in_a_row: int = 0

    @classmethod
    def start(cls, loss: CompositeLoss, device: torch.device) -> TrainSums:
        """Empty sums for the terms that the loss trains on."""
        names = tuple(name for name in TERMS if loss.weights[name] > 0)
        return cls(names, torch.zeros(len(names) + 5, dtype=torch.float64, device=device))

    def reduced(self) -> dict[str, Any]:
        """Means over steps and ranks, with a single reduction: loss, terms (None where not computed), grad_norm,
        skipped_steps."""
        values = all_reduce_sum(self.values.clone()).tolist()
        count, norm_sum, taken, skipped = values[-4:]
        means = [value / count if count else None for value in values[:-4]]
        terms: dict[str, float | None] = dict.fromkeys(TERMS)
        terms.update(zip(self.names, means[1:], strict=True))
        return {
            "loss": means[0],
            "terms": terms,
            "grad_norm": norm_sum / taken if taken else None,
            "skipped_steps": round(skipped / world_size()),
        }


@dataclass
class LateValues:
    """Small device tensors that are read on the host a fixed number of steps later (on a CPU, at once)."""

    lag: int
    waiting: deque[tuple[Tensor, Any, Any]] = field(default_factory=deque)

    def push(self, values: Tensor, note: Any) -> list[tuple[list[float], Any]]:
        """Add the values of this step; returns those that are due, with their notes."""
        event = None
        if values.device.type == "cuda":
            values = values.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self.waiting.append((values, event, note))
        return self.due(self.lag)

    def due(self, left: int = 0) -> list[tuple[list[float], Any]]:
        """All values but the last ``left``."""
        ready = []
        while len(self.waiting) > left:
            values, event, note = self.waiting.popleft()
            if event is not None:
                event.synchronize()
            ready.append((values.tolist(), note))
        return ready


@dataclass(frozen=True)
class StepNote:
    """What the host knew of a step when it was launched."""

    step: int
    cores: tuple[int, ...]
    ends_window: bool


@dataclass
class Wishes:
    """What was asked for on any rank and not yet done."""

    stop: bool = False
    save: bool = False


class StepWatch:
    """Reads the numbers of steps when they are due, tells of them, and notices divergence.

    ``values`` of a step are its loss and terms, then 1 where the optimiser step was skipped, and the numbers of
    ranks that ask for a stop and for a save. Every rank sees the same of the last three at the same step.
    """

    def __init__(self, sums: TrainSums, lag: int, on_step: Callable[[StepReport], None]) -> None:
        self.sums = sums
        self.wishes = Wishes()
        self._late = LateValues(lag)
        self._on_step = on_step
        self._culprits: set[str] = set()
        self._cores: list[int] = []

    def push(self, values: Tensor, note: StepNote) -> None:
        """Add a launched step, and tell of the one that is due. Raises Diverged."""
        self._tell(self._late.push(values, note))

    def flush(self) -> None:
        """Tell of every launched step; waits for the device. Raises Diverged."""
        self._tell(self._late.due())

    def _tell(self, due: list[tuple[list[float], StepNote]]) -> None:
        for values, note in due:
            *numbers, bad, stop, save = values
            self.wishes.stop |= stop > 0
            self.wishes.save |= save > 0
            finite = [abs(number) < float("inf") for number in numbers]
            # A step's gradient may come from several batches: name what was wrong with any of them.
            self._culprits.update(name for name, ok in zip(self.sums.names, finite[1:], strict=True) if not ok)
            if not all(finite):
                self._cores += note.cores
            cores = tuple(self._cores) or note.cores
            self._on_step(StepReport(note.step, numbers[0], bad > 0, tuple(sorted(self._culprits)), cores))
            if note.ends_window:
                self.sums.bad_in_a_row = self.sums.bad_in_a_row + 1 if bad > 0 else 0
                self._culprits.clear()
                self._cores.clear()
            if self.sums.bad_in_a_row >= DIVERGED_AFTER:
                raise Diverged(f"{DIVERGED_AFTER} steps in a row without a finite loss and gradient")
