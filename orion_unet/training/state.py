"""All that a run carries from epoch to epoch, to and from a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from orion_unet.config import TrainConfig
from orion_unet.distributed import gather, rank, world_size
from orion_unet.errors import InputError
from orion_unet.losses import CompositeLoss
from orion_unet.models.unet import UNet
from orion_unet.training.averages import RunningStatistics
from orion_unet.training.engine import Learner, TrainSums
from orion_unet.training.optim import EarlyStopping, LearningRateSchedule, align_moments
from orion_unet.training.prepare import Prepared


@dataclass
class TrainState:
    """Model, learner and progress of one rank.

    ``epoch`` counts finished epochs, ``step`` the batches done of the epoch under way, whose sums are ``sums``. All
    batches done, but the epoch not finished: it is trained and not validated. ``origin`` is the record of the model
    that the run started from (``transfer.take_over``); None for a run that started from random weights. ``encoder`` is
    the record of the file with the weights of a timm encoder; None without one.
    """

    model: UNet
    learner: Learner
    schedule: LearningRateSchedule
    early_stopping: EarlyStopping
    epoch: int = 0
    step: int = 0
    attempt: int = 1
    sums: TrainSums | None = None
    origin: dict[str, Any] | None = None
    encoder: dict[str, Any] | None = None

    @property
    def validated(self) -> nn.Module:
        """The model that is validated and kept as best: the averaged one where there is one."""
        return self.model if self.learner.ema is None else self.learner.ema.model

    @property
    def validated_statistics(self) -> RunningStatistics:
        """Those of ``validated``."""
        return self.learner.statistics if self.learner.ema is None else self.learner.ema.statistics

    def average_statistics(self) -> None:
        """Make the running statistics equal on all ranks, before they are used."""
        self.learner.statistics.average_over_ranks()
        if self.learner.ema is not None:
            self.learner.ema.statistics.average_over_ranks()


def global_batch(config: TrainConfig) -> int:
    """Patches of one step over all ranks."""
    return config.optimisation.batch_size * world_size()


def capture(
    state: TrainState, config: TrainConfig, prepared: Prepared, ranks: list[dict[str, Any]] | None
) -> dict[str, Any]:
    """Content of last.pt, from which ``restore`` continues; ``ranks`` from ``rank_states`` within an epoch."""
    learner = state.learner
    return {
        **capture_model(state, config, prepared, state.model),
        "ema": _averages(state),
        "optimizer": learner.optimizer.state_dict(),
        "schedule": state.schedule.state_dict(),
        "early_stopping": state.early_stopping.state_dict(),
        "scaler": learner.precision.scaler.state_dict() if learner.precision.scaler else None,
        "attempt": state.attempt,
        "step": state.step,
        "global_batch": global_batch(config),
        "ranks": ranks,
    }


def rank_states(state: TrainState) -> list[dict[str, Any]] | None:
    """Within an epoch, what differs between ranks: gathered on every rank, so every rank must call it."""
    if state.sums is None:
        return None
    ema = state.learner.ema
    own = {
        "sums": state.sums.values.cpu(),
        "bad_in_a_row": state.sums.bad_in_a_row,
        "statistics": state.learner.statistics.flat.cpu(),
        "ema_statistics": None if ema is None else ema.statistics.flat.cpu(),
    }
    return gather(own)


def _restore_rank(state: TrainState, ranks: list[dict[str, Any]], loss: CompositeLoss, device: torch.device) -> None:
    """Continue an epoch under way: each rank as it was; on another number of ranks, each as their mean."""
    state.sums = TrainSums.start(loss, device)
    state.sums.bad_in_a_row = ranks[0]["bad_in_a_row"]
    if len(ranks) == world_size():
        own = ranks[rank()]
        sums, statistics, averaged = own["sums"], own["statistics"], own["ema_statistics"]
    else:
        # Each rank's sums are over all steps so far, whatever the number of ranks; so is their mean.
        sums, statistics = (torch.stack([each[key] for each in ranks]).mean(0) for key in ("sums", "statistics"))
        averages = [each["ema_statistics"] for each in ranks]
        averaged = None if averages[0] is None else torch.stack(averages).mean(0)
    state.sums.values.copy_(sums)
    state.learner.statistics.flat.copy_(statistics)
    if state.learner.ema is not None:
        state.learner.ema.statistics.flat.copy_(averaged)


def capture_model(state: TrainState, config: TrainConfig, prepared: Prepared, model: nn.Module) -> dict[str, Any]:
    """Content of best.pt: one model, with all that it takes to predict with it and to judge it."""
    return {
        "model": {
            name: tensor.detach().clone(memory_format=torch.contiguous_format)
            for name, tensor in model.state_dict().items()
            if not _is_left_out(name, state)
        },
        "options": config.options(),
        "normalization": prepared.normalization.document(),
        "channel_names": list(prepared.table.kept_names),
        "split": prepared.split.document(prepared.table),
        "cores": {"digests": prepared.digests, "earlier": (state.origin or {}).get("trained_on", [])},
        "started_from": state.origin,
        "encoder_weights": state.encoder,
        "colour_regression": prepared.colour_regression,
        "stain": prepared.stain,
        "panels": prepared.panels,
        "epoch": state.epoch,
        "best_val_loss": state.early_stopping.best_loss,
    }


def _is_left_out(name: str, state: TrainState) -> bool:
    """Whether checkpoints do without a tensor of the model, because it is in the file of the encoder's weights."""
    if state.encoder is None or not state.encoder["left_out"]:
        return False
    part, _, inner = name.partition(".")
    return part == "encoder" and inner not in state.encoder["missing"]


def _averages(state: TrainState) -> dict[str, Any] | None:
    if state.learner.ema is None:
        return None
    averages = state.learner.ema.state_dict()
    kept = {name: tensor for name, tensor in averages["model"].items() if not _is_left_out(name, state)}
    return {**averages, "model": kept}


def _completed(stored: dict[str, Any], state: TrainState) -> dict[str, Any]:
    """Weights of a checkpoint, with those that it leaves out as they are in the model."""
    present = state.model.state_dict().items()
    return {**{name: tensor for name, tensor in present if _is_left_out(name, state)}, **stored}


def load_validated(state: TrainState, weights: dict[str, Any]) -> None:
    """Load the ``weights`` of a checkpoint into the model that is validated; raises InputError if they do not fit."""
    try:
        state.validated.load_state_dict(_completed(weights, state))
    except (RuntimeError, TypeError, AttributeError) as error:
        raise InputError(f"the checkpoint does not fit this model ({str(error).splitlines()[0]})") from None


def check_resumable(config: TrainConfig, earlier: dict[str, Any], source: str) -> None:
    """Raises InputError listing the options that would silently change the run."""
    changes = config.changes_from(earlier["options"])
    if earlier["global_batch"] != global_batch(config):
        changes.append(f"global batch (--batch_size x ranks): {earlier['global_batch']} in the run, "
                       f"{global_batch(config)} now")  # fmt: skip
    if changes:
        raise InputError.listing(
            f"--resume: the options are not those of the run in {source}:",
            changes,
            "Give the run's own options (--config RUN/config.json does), or start another run in another --output_dir.",
        )


def restore(state: TrainState, earlier: dict[str, Any], loss: CompositeLoss, device: torch.device) -> None:
    """Continue from the content of a last.pt. Raises InputError where it is of another model."""
    learner = state.learner
    try:
        state.model.load_state_dict(_completed(earlier["model"], state))
        if learner.ema is not None:
            averages = earlier["ema"]
            learner.ema.load_state_dict({**averages, "model": _completed(averages["model"], state)})
        learner.optimizer.load_state_dict(earlier["optimizer"])
        align_moments(learner.optimizer)
        state.schedule.load_state_dict(earlier["schedule"])
        state.early_stopping.load_state_dict(earlier["early_stopping"])
        if learner.precision.scaler and earlier["scaler"]:
            learner.precision.scaler.load_state_dict(earlier["scaler"])
        if earlier["ranks"] is not None:
            _restore_rank(state, earlier["ranks"], loss, device)
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"--resume: the checkpoint does not fit this model ({error})") from None
    state.epoch, state.step, state.attempt = earlier["epoch"], earlier["step"], earlier["attempt"] + 1
    state.origin = earlier.get("started_from")
    state.encoder = earlier.get("encoder_weights")
