"""One epoch of training, and one of validation: model, batches, loss and device in, numbers out."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from orion_unet.data.transforms import Batch
from orion_unet.distributed import all_reduce_sum, world_size
from orion_unet.losses import TERMS, CompositeLoss
from orion_unet.metrics import MarkerSums
from orion_unet.training.ema import ModelEma
from orion_unet.training.statistics import RunningStatistics

# So many steps later a GPU's numbers are read: by then they are there, and the host need not wait for them. A fixed
# number, because every rank must act on them at the same step.
READ_LAG = 2
DIVERGED_AFTER = 10


class Diverged(Exception):
    """Training cannot go on: too many steps in a row without a finite loss and gradient, or such a validation."""


@dataclass(frozen=True)
class Precision:
    """Autocast type (None: plain float32) and the gradient scaler that float16 needs."""

    dtype: torch.dtype | None = None
    scaler: torch.amp.GradScaler | None = None

    def autocast(self, device: torch.device) -> Any:
        """The context a forward pass runs in."""
        return nullcontext() if self.dtype is None else torch.autocast(device.type, self.dtype)


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
class TrainEpoch:
    """Outcome of ``train_one_epoch``: ``next_step`` is the number of steps when the epoch is complete."""

    sums: TrainSums
    next_step: int
    interrupted: bool
    duration_s: float
    samples: int


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


def train_one_epoch(
    model: nn.Module,
    batches: Iterable[Batch],
    loss: CompositeLoss,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    *,
    statistics: RunningStatistics,
    steps: int,
    start_step: int = 0,
    sums: TrainSums | None = None,
    begin_step: Callable[[int], None] = lambda step: None,
    on_step: Callable[[StepReport], None] = lambda report: None,
    stop_requested: Callable[[], bool] = lambda: False,
    accumulate_steps: int = 1,
    grad_clip: float = 0.0,
    precision: Precision = Precision(),
    ema: ModelEma | None = None,
) -> TrainEpoch:
    """Train on ``batches``, which are the steps from ``start_step`` to ``steps`` of an epoch.

    ``model`` may be wrapped in DistributedDataParallel. ``begin_step`` is called before each optimiser step with
    the index of its first batch (to set the learning rate), ``on_step`` with each finished step, late on a GPU.
    ``stop_requested`` may turn true on any rank: then all ranks stop after the same optimiser step.

    A step whose loss or gradient is not finite on any rank changes neither weights nor running statistics nor
    averages on all ranks; DIVERGED_AFTER of them in a row raise Diverged.
    """
    model.train()
    sums = sums or TrainSums.start(loss, device)
    late = LateValues(READ_LAG if device.type == "cuda" else 0)
    boundary_wanted = loss.weights["boundary"] > 0
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    started = time.perf_counter()
    samples = 0
    next_step, interrupted = start_step, False
    bad_norm = torch.zeros((), device=device)

    for step, batch in enumerate(batches, start_step):
        window_start = step - step % accumulate_steps
        window = min(accumulate_steps, steps - window_start)
        last_of_window = step == window_start + window - 1
        if step == window_start:
            begin_step(step)
            optimizer.zero_grad(set_to_none=True)

        control = _shared_control(batch.boundary, boundary_wanted, stop_requested(), device)
        statistics.keep()
        accumulating = isinstance(model, DistributedDataParallel) and not last_of_window
        with _without_reduction(model) if accumulating else nullcontext():
            with precision.autocast(device):
                prediction = model(batch.he)
            value, terms = loss(prediction, batch.target, batch.boundary, control[0])
            finite = torch.isfinite(value)
            # A loss that is not finite makes the whole gradient NaN: the sum over ranks carries it to every rank.
            marked = value * torch.where(finite, 1.0, torch.nan) / window
            (precision.scaler.scale(marked) if precision.scaler else marked).backward()
        # After the backward pass, which still looks at them.
        statistics.restore_where(~finite)

        numbers = torch.stack([value.detach(), *terms.values()]).double()
        counted = torch.where(finite, numbers, 0.0)
        sums.values[: len(numbers)] += counted
        sums.values[len(numbers)] += finite
        if last_of_window:
            bad_norm, norm = _optimizer_step(optimizer, parameters, grad_clip, precision)
            if ema is not None:
                ema.update(_bare(model), skip=bad_norm)
            sums.values[-3:] += torch.stack([torch.where(bad_norm > 0, 0.0, norm), 1 - bad_norm, bad_norm]).double()
        samples += len(batch.he)
        bad_here = bad_norm if last_of_window else torch.zeros_like(bad_norm)
        packed = torch.cat([numbers, torch.stack([bad_here.double(), control[1].double()])])
        next_step = step + 1
        for values, note in late.push(packed, (step, tuple(batch.core.tolist()))):
            interrupted |= _report(values, note, sums, on_step)
        if interrupted and last_of_window:
            break
    for values, note in late.due():
        interrupted |= _report(values, note, sums, on_step)
    return TrainEpoch(sums, next_step, interrupted, time.perf_counter() - started, samples)


def _shared_control(boundary: Tensor, wanted: bool, stop: bool, device: torch.device) -> Tensor:
    """Mean number of boundary pixels over ranks, and on how many ranks a stop was asked for: (2,) on the device."""
    control = torch.zeros(2, dtype=torch.float64, device=device)
    if wanted:
        control[0] = boundary.sum()
    if stop:
        control[1] = 1.0
    if world_size() > 1:
        all_reduce_sum(control)
        control[0] /= world_size()
    return control


def _optimizer_step(
    optimizer: torch.optim.Optimizer, parameters: list[Tensor], grad_clip: float, precision: Precision
) -> tuple[Tensor, Tensor]:
    """Clip and step; a step whose gradient is not finite is skipped on the device. Returns (skipped 0/1, norm)."""
    if precision.scaler:
        precision.scaler.unscale_(optimizer)
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    bad = (~torch.isfinite(norm)).float()
    if grad_clip > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, grad_clip, norm)
    if precision.scaler:
        precision.scaler.step(optimizer)
        precision.scaler.update()
    else:
        optimizer.found_inf = bad  # type: ignore[attr-defined]
        optimizer.step()
    return bad, norm


def _report(
    values: list[float], note: tuple[int, tuple[int, ...]], sums: TrainSums, on_step: Callable[[StepReport], None]
) -> bool:
    """Tell of a finished step; True where a stop was asked for. Raises Diverged."""
    bad, stop = values[-2] > 0, values[-1] > 0
    step, cores = note
    finite = [abs(value) < float("inf") for value in values[: len(sums.names) + 1]]
    culprits = tuple(name for name, ok in zip(sums.names, finite[1:], strict=True) if not ok)
    sums.bad_in_a_row = sums.bad_in_a_row + 1 if bad else 0
    on_step(StepReport(step, values[0], bad, culprits or (() if finite[0] else ("loss",)), cores))
    if sums.bad_in_a_row >= DIVERGED_AFTER:
        raise Diverged(f"{DIVERGED_AFTER} steps in a row without a finite loss and gradient")
    return stop


def _without_reduction(model: nn.Module) -> AbstractContextManager[None]:
    return cast(DistributedDataParallel, model).no_sync()


def _bare(model: nn.Module) -> nn.Module:
    inner: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
    original = getattr(inner, "_orig_mod", inner)
    return original if isinstance(original, nn.Module) else inner


@dataclass(frozen=True)
class Validation:
    """Outcome of ``evaluate``, equal on every rank: the loss and its unweighted terms, metrics over all markers and
    per marker, number of patches, and the time of this rank's own share."""

    loss: float
    terms: dict[str, float | None]
    metrics: dict[str, float | int | None]
    per_channel: dict[str, dict[str, float | None]]
    patches: int
    duration_s: float


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    loss: CompositeLoss,
    device: torch.device,
    *,
    names: tuple[str, ...],
    precision: Precision = Precision(),
    on_batch: Callable[[int], None] = lambda patches: None,
) -> Validation:
    """Validate on this rank's share of the patches; sums and counts are reduced over ranks once, at the end."""
    model.eval()
    started = time.perf_counter()
    markers = MarkerSums(len(names), device)
    sums = torch.zeros(2, len(TERMS), dtype=torch.float64, device=device)
    patches = 0
    for batch in batches:
        with precision.autocast(device):
            prediction = model(batch.he)
        numerators, denominators = loss.sums(prediction, batch.target, batch.boundary)
        sums[0] += numerators
        sums[1] += denominators
        markers.update(prediction, batch.target)
        patches += len(batch.he)
        on_batch(len(batch.he))
    count = torch.tensor([patches], dtype=torch.float64, device=device)
    together = all_reduce_sum(torch.cat([sums.flatten(), markers.state.flatten(), count]))
    sums = together[: sums.numel()].view_as(sums)
    markers.state = together[sums.numel() : -1].view_as(markers.state)
    value, terms = loss.combine(sums[0], sums[1])
    metrics, per_channel = markers.compute(names)
    return Validation(value, terms, metrics, per_channel, int(together[-1]), time.perf_counter() - started)
