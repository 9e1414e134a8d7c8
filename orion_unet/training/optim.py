"""AdamW, the learning rate of every step, and when to stop."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.optim import AdamW

from orion_unet.config import OptimisationOptions

# As torch's ReduceLROnPlateau: an epoch is better when it lowers the best loss by this fraction,
# and a reduction smaller than this is not made.
PLATEAU_THRESHOLD = 1e-4
SMALLEST_REDUCTION = 1e-8
# The automatic rate is TRAVEL / steps, within LOWEST_RATE and HIGHEST_RATE. A run warns at its start if its rate is
# below MUCH_LOWER of the automatic one and rate times steps is below LITTLE_TRAVEL.
TRAVEL, LITTLE_TRAVEL, MUCH_LOWER = 8.0, 1.0, 1 / 8
LOWEST_RATE, HIGHEST_RATE = 1e-4, 1e-2


def build_optimizer(
    model: nn.Module,
    options: OptimisationOptions,
    device: torch.device,
    encoder: Iterable[nn.Parameter] = (),
    encoder_rate_factor: float = 1.0,
) -> AdamW:
    """AdamW (Loshchilov & Hutter, ICLR 2019) that decays convolution kernels only, not norms and biases.

    Where ``encoder_rate_factor`` is not 1, the parameters ``encoder`` have groups of their own, whose ``rate_factor``
    the training steps multiply the learning rate by. Parameters that do not require a gradient are left out.

    On a CPU or CUDA device it is the fused form, which honours a 0/1 float tensor set as its attribute
    ``found_inf``: 1 makes ``step()`` change neither weights nor moments nor step counts, without waiting for the
    device.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    slow = set() if encoder_rate_factor == 1 else {id(p) for p in encoder}
    groups = [
        {
            "params": [p for p in parameters if (p.ndim >= 2) == decayed and (id(p) in slow) == own_rate],
            "weight_decay": options.weight_decay if decayed else 0.0,
            "rate_factor": encoder_rate_factor if own_rate else 1.0,
        }
        for own_rate in (False, True)
        for decayed in (True, False)
    ]
    return AdamW(
        [group for group in groups if group["params"]],
        lr=options.rate,
        fused=device.type in ("cpu", "cuda"),
    )


def automatic_rate(steps: int) -> float:
    """A peak learning rate for a run of so many optimiser steps.

    Adam moves a weight by about the learning rate in a step, whatever the size of its gradient (Kingma & Ba, ICLR
    2015), so rate times steps is about how far a weight can travel. TRAVEL was among the best of three rates in runs of
    100 to 2000 steps (``benchmarks/stability.py``). HIGHEST_RATE and LOWEST_RATE keep shorter and longer runs, about
    which less is known, at usual rates.
    """
    return float(f"{min(HIGHEST_RATE, max(LOWEST_RATE, TRAVEL / steps)):.1e}")


def align_moments(optimizer: torch.optim.Optimizer) -> None:
    """Give the moments of a restored optimiser the memory layout of their parameters.

    The fused optimisers walk through both in memory order: moments in another layout would be applied to other
    weights.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for name, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    optimizer.state[parameter][name] = torch.empty_like(parameter).copy_(value)


class LearningRateSchedule:
    """The learning rate of every optimiser step: linear warm-up, then constant, cosine or plateau.

    The cosine falls to 0 at the last step of the run. The plateau form multiplies the rate by ``lr_factor`` after
    more than ``lr_patience`` epochs without a better validation loss, as torch's ReduceLROnPlateau does. Only
    the plateau has a state.
    """

    def __init__(self, options: OptimisationOptions, steps_per_epoch: int) -> None:
        self.options = options
        self.steps_per_epoch = steps_per_epoch
        self.scale = 1.0
        self.best = math.inf
        self.bad_epochs = 0

    def at(self, epoch_index0: int, step: int) -> float:
        """Learning rate of optimiser step ``step`` (from 0) of epoch ``epoch_index0`` (from 0)."""
        options = self.options
        position = epoch_index0 * self.steps_per_epoch + step
        warmup = round(options.warmup_epochs * self.steps_per_epoch)
        rate = options.rate * self.scale
        if position < warmup:
            return rate * (position + 1) / warmup
        if options.scheduler == "cosine":
            last = max(1, options.epochs * self.steps_per_epoch - 1 - warmup)
            rate *= 0.5 * (1 + math.cos(math.pi * min(1.0, (position - warmup) / last)))
        return rate

    def end_epoch(self, val_loss: float | None) -> bool:
        """Update with an epoch's validation loss; True when the plateau schedule has lowered the rate.

        A loss that is None or NaN counts as no better.
        """
        if self.options.scheduler != "plateau":
            return False
        if val_loss is not None and val_loss < self.best * (1 - PLATEAU_THRESHOLD):
            self.best = val_loss
            self.bad_epochs = 0
        else:
            self.bad_epochs += 1
        if self.bad_epochs <= self.options.lr_patience:
            return False
        self.bad_epochs = 0
        reduction = self.options.rate * self.scale * (1 - self.options.lr_factor)
        if reduction <= SMALLEST_REDUCTION:
            return False
        self.scale *= self.options.lr_factor
        return True

    def state_dict(self) -> dict[str, Any]:
        """Plain Python values from which ``load_state_dict`` continues."""
        return {"scale": self.scale, "best": self.best, "bad_epochs": self.bad_epochs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the state of an earlier schedule."""
        self.scale, self.best, self.bad_epochs = state["scale"], state["best"], state["bad_epochs"]


class EarlyStopping:
    """Remembers the best epoch; stops after ``patience`` epochs in a row that have not beaten it (0: never).

    ``best_by`` "loss": the epoch with the lowest validation loss; "pearson": the one with the highest validation
    Pearson. ``best`` is its value, ``best_loss`` its validation loss.
    """

    def __init__(self, patience: int, best_by: str = "loss") -> None:
        self.patience = patience
        self.best_by = best_by
        self.best: float | None = None
        self.best_loss: float | None = None
        self.best_epoch: int | None = None
        self.bad_epochs = 0

    def update(self, val_loss: float | None, pearson: float | None, epoch: int) -> bool:
        """Update with an epoch's validation loss and Pearson; True when it is the best yet.

        An epoch whose loss, or whose value to choose by, is None, NaN or infinite is never the best.
        """
        value = val_loss if self.best_by == "loss" else pearson
        improved = _is_number(val_loss) and _is_number(value) and self._beats(value)
        if improved:
            self.best, self.best_loss, self.best_epoch, self.bad_epochs = value, val_loss, epoch, 0
        else:
            self.bad_epochs += 1
        return improved

    def _beats(self, value: float) -> bool:
        if self.best is None:
            return True
        return value < self.best if self.best_by == "loss" else value > self.best

    @property
    def should_stop(self) -> bool:
        """Whether the patience has run out."""
        return 0 < self.patience <= self.bad_epochs

    @property
    def measure(self) -> str:
        """What the best epoch is chosen by, for a person."""
        return "validation loss" if self.best_by == "loss" else "validation Pearson"

    def state_dict(self) -> dict[str, Any]:
        """Plain Python values from which ``load_state_dict`` continues."""
        names = ("best", "best_loss", "best_epoch", "bad_epochs")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the state of an earlier one; the patience stays this one's own."""
        self.best, self.best_epoch, self.bad_epochs = state["best"], state["best_epoch"], state["bad_epochs"]
        # Runs made before --best_by existed chose by the loss, and kept no other value.
        self.best_loss = state.get("best_loss", state["best"])


def _is_number(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)
