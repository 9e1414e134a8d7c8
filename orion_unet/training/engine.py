"""Steps of training as an iterator, and validation: model, batches, loss and device in, numbers out."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from orion_unet.data.transforms import Batch
from orion_unet.distributed import all_reduce_sum, world_size
from orion_unet.losses import TERMS, CompositeLoss, boundary_pixels
from orion_unet.metrics import MarkerSums
from orion_unet.models.freezing import is_frozen
from orion_unet.patch_sums import patch_sums
from orion_unet.training.averages import ModelEma, RunningStatistics

# A GPU's numbers are read this many steps late: by then they are there, and the host need not wait for them. The lag
# is fixed, because every rank must act on them at the same step.
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


@dataclass
class Learner:
    """What a step trains, and how.

    ``model`` is called and may be compiled or wrapped in DistributedDataParallel; ``statistics`` and ``ema`` are of
    the bare model inside. ``accumulate_steps`` batches make one optimiser step; ``grad_clip`` is the largest norm of
    its gradient, 0 for no limit.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    statistics: RunningStatistics
    ema: ModelEma | None = None
    precision: Precision = field(default_factory=Precision)
    accumulate_steps: int = 1
    grad_clip: float = 0.0


@dataclass
class Requests:
    """What this rank asks of all ranks; they act on it together, after the same optimiser step."""

    stop: bool = False
    save: bool = False


@dataclass(frozen=True)
class Step:
    """A finished step: the loss of its batch on this rank, and what became of it.

    ``bad``: the optimiser step was skipped on all ranks, because a loss or gradient was not finite. ``overflow``: only
    float16's scaled gradient was not, which is ordinary. ``culprits`` are the terms of the loss that were not finite
    on this rank, ``cores`` the cores in its batch. ``grad_norm``: norm of the gradient of all ranks and of all batches
    of the optimiser step before clipping, None where the step is not the last of these batches. ``stop`` and
    ``save``: a rank asked for it, and no later step has begun, so that the weights are those after this step.
    """

    step: int
    loss: float
    bad: bool = False
    overflow: bool = False
    culprits: tuple[str, ...] = ()
    cores: tuple[int, ...] = ()
    grad_norm: float | None = None
    stop: bool = False
    save: bool = False


@dataclass
class TrainSums:
    """Sums over an epoch, plain enough to be saved and continued.

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


def train_steps(
    learner: Learner,
    batches: Iterable[Batch],
    loss: CompositeLoss,
    sums: TrainSums,
    rates: Sequence[float],
    *,
    seeds: Sequence[int] | None = None,
    start_step: int = 0,
    requests: Requests | None = None,
) -> Iterator[Step]:
    """Train on ``batches``, the steps from ``start_step`` on of an epoch of ``len(rates)`` steps; yields what is done.

    On a GPU steps come READ_LAG late, so that nothing waits for the device. An optimiser step takes the learning
    rate, and the seed of dropout where there are ``seeds``, of its first batch. ``requests`` may change while the
    iterator runs; once a rank has asked, all ranks see ``stop`` or ``save`` on the same step, and a ``stop`` is the
    last step. ``sums`` is added to in place, on the device that trains.

    A step whose loss or gradient is not finite on any rank changes neither weights nor running statistics nor
    averages on all ranks; after DIVERGED_AFTER of them in a row Diverged is raised.
    """
    device = sums.values.device
    requests = requests or Requests()
    journal = _Journal(sums, READ_LAG if device.type == "cuda" else 0)
    parameters = [p for group in learner.optimizer.param_groups for p in group["params"]]
    bad_norm, norm = torch.zeros((), device=device), torch.zeros((), device=device)
    learner.model.train()

    for step, batch in enumerate(batches, start_step):
        window_start = step - step % learner.accumulate_steps
        window = min(learner.accumulate_steps, len(rates) - window_start)
        ends_window = step == window_start + window - 1
        if step == window_start:
            for group in learner.optimizer.param_groups:
                # Optimisers of runs made before there were factors have none.
                group["lr"] = rates[step] * group.get("rate_factor", 1.0)
            if seeds is not None:
                torch.manual_seed(seeds[step])
            learner.optimizer.zero_grad(set_to_none=True)
            learner.statistics.keep()

        boundary = batch.boundary if loss.weights["boundary"] > 0 else None
        measured = batch.measured
        shared = _shared(boundary, measured, requests, device)
        with nullcontext() if ends_window else _without_reduction(learner.model):
            with learner.precision.autocast(device):
                prediction = learner.model(batch.he)
            counts = (shared[0],) if measured is None else (shared[0], measured, shared[1])
            value, terms = loss(prediction, batch.target, batch.boundary, *counts)
            finite = torch.isfinite(value)
            # A loss that is not finite makes the whole gradient NaN: the sum over ranks carries it to every rank.
            marked = value * torch.where(finite, 1.0, torch.nan) / window
            scaler = learner.precision.scaler
            (scaler.scale(marked) if scaler else marked).backward()

        numbers = torch.stack([value.detach(), *terms.values()]).double()
        sums.values[: len(numbers)] += torch.where(finite, numbers, 0.0)
        sums.values[len(numbers)] += finite
        if ends_window:
            bad_norm, norm = _optimizer_step(learner, parameters)
            # The gradient is that of all ranks and batches of the step, and so is the verdict on it.
            learner.statistics.restore_where(bad_norm > 0)
            if learner.ema is not None:
                learner.ema.update(skip=bad_norm)
            sums.values[-3:] += torch.stack([torch.where(bad_norm > 0, 0.0, norm), 1 - bad_norm, bad_norm]).double()
        bad_here = bad_norm if ends_window else torch.zeros_like(bad_norm)
        bad_losses = (~finite).double()
        if scaler:
            # Only float16 has to tell a loss that is not finite on some rank from a gradient that overflowed.
            all_reduce_sum(bad_losses)
        journal.add(torch.cat([numbers, torch.stack([norm.double(), bad_here.double(), bad_losses]), shared[2:]]),
                    _Note(step, tuple(batch.core.tolist()), ends_window, scaler is not None))  # fmt: skip
        for done in journal.due(drain_if_asked=ends_window):
            yield done
            if sums.bad_in_a_row >= DIVERGED_AFTER:
                raise Diverged(f"{DIVERGED_AFTER} steps in a row without a finite loss and gradient")
            if done.stop:
                return
    yield from journal.rest()
    if sums.bad_in_a_row >= DIVERGED_AFTER:
        raise Diverged(f"{DIVERGED_AFTER} steps in a row without a finite loss and gradient")


@dataclass(frozen=True)
class _Note:
    """What the host knew of a step when it was launched."""

    step: int
    cores: tuple[int, ...]
    ends_window: bool
    scaled: bool


class _Journal:
    """Numbers of launched steps, read on the host when they are due.

    The numbers of a step are its loss and terms; the norm of the last gradient; 1 where the optimiser step was
    skipped; the number of losses that were not finite; the number of ranks that ask for a stop, and for a save. Every
    rank reads the same of the last two, and of the skipped step, at the same step.
    """

    def __init__(self, sums: TrainSums, lag: int) -> None:
        self.sums = sums
        self.lag = lag
        self._waiting: deque[tuple[Tensor, Any, _Note]] = deque()
        self._asked = Requests()
        self._culprits: set[str] = set()
        self._cores: list[int] = []
        self._bad_losses = 0.0

    def add(self, numbers: Tensor, note: _Note) -> None:
        """Note a launched step, without waiting for it."""
        event = None
        if numbers.device.type == "cuda":
            numbers = numbers.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._waiting.append((numbers, event, note))

    def due(self, drain_if_asked: bool) -> list[Step]:
        """The steps whose numbers are due; with ``drain_if_asked`` all of them where a stop or a save was asked for."""
        found = self._read(self.lag)
        if drain_if_asked and (self._asked.stop or self._asked.save):
            found += self._read(0)
            found[-1] = replace(found[-1], stop=self._asked.stop, save=self._asked.save)
            self._asked = Requests()
        return found

    def rest(self) -> list[Step]:
        """All steps that have not been read; waits for the device."""
        return self._read(0)

    def _read(self, left: int) -> list[Step]:
        found = []
        while len(self._waiting) > left:
            numbers, event, note = self._waiting.popleft()
            if event is not None:
                event.synchronize()
            found.append(self._step(numbers.tolist(), note))
        return found

    def _step(self, values: list[float], note: _Note) -> Step:
        *numbers, norm, bad, bad_losses, stop, save = values
        self._asked.stop |= stop > 0
        self._asked.save |= save > 0
        finite = [abs(number) < float("inf") for number in numbers]
        # A step's gradient may come from several batches: name what was wrong with any of them.
        self._culprits.update(name for name, ok in zip(self.sums.names, finite[1:], strict=True) if not ok)
        self._bad_losses += bad_losses
        if not all(finite):
            self._cores += note.cores
        step = Step(
            note.step,
            numbers[0],
            bad > 0,
            note.scaled and bad > 0 and self._bad_losses == 0,
            tuple(sorted(self._culprits)),
            tuple(self._cores) or note.cores,
            norm if note.ends_window else None,
        )
        if note.ends_window:
            self.sums.bad_in_a_row = self.sums.bad_in_a_row + 1 if bad > 0 else 0
            self._culprits.clear()
            self._cores.clear()
            self._bad_losses = 0.0
        return step


def _shared(boundary: Tensor | None, measured: Tensor | None, requests: Requests, device: torch.device) -> Tensor:
    """Mean numbers of boundary pixels and of measured pairs of patch and marker over ranks, and on how many ranks a
    stop and a save were asked for: (4,) on the device."""
    shared = torch.zeros(4, dtype=torch.float64, device=device)
    if boundary is not None:
        shared[0] = boundary_pixels(boundary, measured)
    if measured is not None:
        shared[1] = measured.sum()
    if requests.stop:
        shared[2] = 1.0
    if requests.save:
        shared[3] = 1.0
    if world_size() > 1:
        all_reduce_sum(shared)
        shared[:2] /= world_size()
    return shared


def _optimizer_step(learner: Learner, parameters: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Clip and step; a step whose gradient is not finite is skipped on the device. Returns (skipped 0/1, norm)."""
    optimizer, scaler = learner.optimizer, learner.precision.scaler
    if scaler:
        scaler.unscale_(optimizer)
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    bad = (~torch.isfinite(norm)).float()
    if learner.grad_clip > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, learner.grad_clip, norm)
    if scaler:
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.found_inf = bad  # type: ignore[attr-defined]
        optimizer.step()
    return bad, norm


def _without_reduction(model: nn.Module) -> AbstractContextManager[None]:
    """Within a window, gradients add up on each rank by itself."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def settle_buckets(learner: Learner, he: Tensor) -> None:
    """Let DistributedDataParallel settle its gradient buckets before the first step, with a batch (B, 3, H, W) of any
    content. Changes neither weights nor running statistics.

    It arranges the buckets anew after its first backward pass. From three ranks on, the order in which a sum is
    formed depends on where a gradient lies in its bucket: a run that is continued would, in its first step, round
    differently from one that went on.
    """
    if not isinstance(learner.model, DistributedDataParallel):
        return
    counts = [(buffer, buffer.clone()) for buffer in learner.model.buffers() if not buffer.is_floating_point()]
    learner.statistics.keep()
    learner.model.train()
    # The arrangement is made at the beginning of the second pass.
    for _ in range(2):
        with learner.precision.autocast(he.device):
            prediction = learner.model(he)
        (prediction.float().sum() * 0.0).backward()
    learner.optimizer.zero_grad(set_to_none=True)
    learner.statistics.restore_where(torch.ones((), dtype=torch.bool, device=he.device))
    for buffer, before in counts:
        buffer.copy_(before)


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """The layers of a model that normalise by running statistics in evaluation mode, without frozen ones."""
    return [
        layer
        for layer in model.modules()
        if isinstance(layer, _BatchNorm) and layer.track_running_stats and not is_frozen(layer)
    ]


@torch.no_grad()
def measure_statistics(
    model: nn.Module,
    statistics: RunningStatistics,
    batches: Iterable[Batch],
    precision: Precision,
    device: torch.device,
) -> Generator[None, None, None]:
    """Replace the running statistics of a model's batch norms by the mean over ``batches`` and ranks; yields after
    each batch, and changes nothing else of the model.

    Running averages mix the statistics of weights that no longer exist. At a high learning rate, or in the first
    epochs, they describe none of them, and the validation judges a network that nobody trained. The mean and the
    unbiased variance of each batch count alike, as in torch.optim.swa_utils.update_bn. Other layers work as in
    evaluation: a dropped feature map would widen the variance. Frozen norms keep their statistics. ``batches`` must be
    equally many on every rank.
    """
    norms = batch_norms(model)
    momenta = [norm.momentum for norm in norms]
    model.eval()
    statistics.keep()
    try:
        for norm in norms:
            norm.train()
        for done, batch in enumerate(batches):
            for norm in norms:
                # A cumulative mean; torch's own (momentum None) waits for the device in every layer.
                norm.momentum = 1.0 / (done + 1)
            with precision.autocast(device):
                model(batch.he)
            yield
        statistics.average_over_ranks()
        # Activations that overflow have no statistics; the running averages come from weights that had some.
        statistics.restore_where(~torch.isfinite(statistics.flat).all())
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.eval()
            norm.momentum = momentum


@dataclass(frozen=True)
class Validation:
    """The outcome of a validation, equal on every rank: the loss and its unweighted terms, metrics over all markers
    and per marker, and the number of patches."""

    loss: float
    terms: dict[str, float | None]
    metrics: dict[str, float | int | None]
    per_channel: dict[str, dict[str, float | None]]
    patches: int


class ValidationSums:
    """Sums over validation patches, from which the loss, its terms and the metrics follow."""

    def __init__(self, names: tuple[str, ...], device: torch.device) -> None:
        self.names = names
        self.markers = MarkerSums(len(names), device)
        self.terms = torch.zeros(2, len(TERMS), dtype=torch.float64, device=device)
        self.patches = 0

    def add(self, prediction: Tensor, batch: Batch, loss: CompositeLoss) -> None:
        """Add the prediction of a batch. Does not wait for the device."""
        patches = patch_sums(prediction, batch.target, batch.boundary)
        if batch.measured is not None:
            patches = patches.where(batch.measured)
        self.terms += torch.stack(loss.sums(patches))
        self.markers.add(patches)
        self.patches += len(batch.he)

    def reduced(self, loss: CompositeLoss) -> Validation:
        """The outcome over all ranks, with a single reduction."""
        device = self.terms.device
        parts = [self.terms, self.markers.state, torch.tensor([self.patches], dtype=torch.float64, device=device)]
        together = all_reduce_sum(torch.cat([part.flatten() for part in parts])).split([part.numel() for part in parts])
        terms, self.markers.state, count = (whole.view_as(part) for whole, part in zip(together, parts, strict=True))
        value, means = loss.combine(terms[0], terms[1], self.markers.state[:6])
        metrics, per_channel = self.markers.compute(self.names)
        return Validation(value, means, metrics, per_channel, int(count))


@torch.inference_mode()
def validate(
    model: nn.Module, batches: Iterable[Batch], loss: CompositeLoss, sums: ValidationSums, precision: Precision
) -> Iterator[int]:
    """Add this rank's share of the validation patches to ``sums``; yields the number of patches of each batch."""
    model.eval()
    for batch in batches:
        with precision.autocast(sums.terms.device):
            prediction = model(batch.he)
        sums.add(prediction, batch, loss)
        yield len(batch.he)
