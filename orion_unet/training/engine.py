"""One epoch of training, and one of validation: model, batches, loss and device in, numbers out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
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
from orion_unet.training.steps import READ_LAG, StepNote, StepReport, StepWatch, TrainSums


@dataclass(frozen=True)
class Precision:
    """Autocast type (None: plain float32) and the gradient scaler that float16 needs."""

    dtype: torch.dtype | None = None
    scaler: torch.amp.GradScaler | None = None

    def autocast(self, device: torch.device) -> Any:
        """The context a forward pass runs in."""
        return nullcontext() if self.dtype is None else torch.autocast(device.type, self.dtype)


@dataclass
class TrainEpoch:
    """Outcome of ``train_one_epoch``: ``next_step`` is the number of steps when the epoch is complete."""

    sums: TrainSums
    next_step: int
    interrupted: bool
    duration_s: float
    samples: int


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
    save_requested: Callable[[], bool] = lambda: False,
    save: Callable[[int, TrainSums], None] = lambda next_step, sums: None,
    accumulate_steps: int = 1,
    grad_clip: float = 0.0,
    precision: Precision = Precision(),
    ema: ModelEma | None = None,
) -> TrainEpoch:
    """Train on ``batches``, which are the steps from ``start_step`` to ``steps`` of an epoch.

    ``model`` may be wrapped in DistributedDataParallel. ``begin_step`` is called before each optimiser step with
    the index of its first batch (to set the learning rate), ``on_step`` with each finished step, late on a GPU.
    ``stop_requested`` and ``save_requested`` may turn true on any rank: then all ranks stop, or call ``save`` with
    the number of finished steps and their sums, after the same optimiser step.

    A step whose loss or gradient is not finite on any rank changes neither weights nor running statistics nor
    averages on all ranks; DIVERGED_AFTER of them in a row raise Diverged.
    """
    model.train()
    sums = sums or TrainSums.start(loss, device)
    watch = StepWatch(sums, READ_LAG if device.type == "cuda" else 0, on_step)
    boundary_wanted = loss.weights["boundary"] > 0
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    started = time.perf_counter()
    samples = 0
    next_step = start_step
    bad_norm = torch.zeros((), device=device)

    for step, batch in enumerate(batches, start_step):
        window_start = step - step % accumulate_steps
        window = min(accumulate_steps, steps - window_start)
        last_of_window = step == window_start + window - 1
        if step == window_start:
            begin_step(step)
            optimizer.zero_grad(set_to_none=True)
            statistics.keep()

        control = _shared_control(batch.boundary, boundary_wanted, stop_requested(), save_requested(), device)
        accumulating = isinstance(model, DistributedDataParallel) and not last_of_window
        with _without_reduction(model) if accumulating else nullcontext():
            with precision.autocast(device):
                prediction = model(batch.he)
            value, terms = loss(prediction, batch.target, batch.boundary, control[0])
            finite = torch.isfinite(value)
            # A loss that is not finite makes the whole gradient NaN: the sum over ranks carries it to every rank.
            marked = value * torch.where(finite, 1.0, torch.nan) / window
            (precision.scaler.scale(marked) if precision.scaler else marked).backward()

        numbers = torch.stack([value.detach(), *terms.values()]).double()
        counted = torch.where(finite, numbers, 0.0)
        sums.values[: len(numbers)] += counted
        sums.values[len(numbers)] += finite
        if last_of_window:
            bad_norm, norm = _optimizer_step(optimizer, parameters, grad_clip, precision)
            # The gradient is that of all ranks and batches of the step, and so is the verdict on it.
            statistics.restore_where(bad_norm > 0)
            if ema is not None:
                ema.update(_bare(model), skip=bad_norm)
            sums.values[-3:] += torch.stack([torch.where(bad_norm > 0, 0.0, norm), 1 - bad_norm, bad_norm]).double()
        samples += len(batch.he)
        bad_here = bad_norm if last_of_window else torch.zeros_like(bad_norm)
        packed = torch.cat([numbers, bad_here.double()[None], control[1:]])
        next_step = step + 1
        watch.push(packed, StepNote(step, tuple(batch.core.tolist()), last_of_window))
        if watch.wishes.stop and last_of_window:
            break
        if watch.wishes.save and last_of_window:
            watch.flush()
            save(next_step, sums)
            watch.wishes.save = False
    watch.flush()
    return TrainEpoch(sums, next_step, watch.wishes.stop, time.perf_counter() - started, samples)


def _shared_control(boundary: Tensor, wanted: bool, stop: bool, save: bool, device: torch.device) -> Tensor:
    """Mean number of boundary pixels over ranks, and on how many ranks a stop and a save were asked for: (3,) on the
    device."""
    control = torch.zeros(3, dtype=torch.float64, device=device)
    if wanted:
        control[0] = boundary.sum()
    if stop:
        control[1] = 1.0
    if save:
        control[2] = 1.0
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
        sums += torch.stack(loss.sums(prediction, batch.target, batch.boundary))
        markers.update(prediction, batch.target)
        patches += len(batch.he)
        on_batch(len(batch.he))
    count = torch.tensor([patches], dtype=torch.float64, device=device)
    parts = [sums, markers.state, count]
    together = all_reduce_sum(torch.cat([part.flatten() for part in parts])).split([part.numel() for part in parts])
    sums, markers.state, count = (whole.view_as(part) for whole, part in zip(together, parts, strict=True))
    value, terms = loss.combine(sums[0], sums[1], markers.state[:6])
    metrics, per_channel = markers.compute(names)
    return Validation(value, terms, metrics, per_channel, int(count), time.perf_counter() - started)
