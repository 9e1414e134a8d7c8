"""All that a run carries from epoch to epoch, to and from a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from orion_unet.config import TrainConfig
from orion_unet.distributed import gather, mean_over_ranks, rank, world_size
from orion_unet.errors import InputError
from orion_unet.losses import CompositeLoss
from orion_unet.models.unet import SpatialUNet, memory_format
from orion_unet.training.ema import ModelEma
from orion_unet.training.engine import Precision
from orion_unet.training.optim import EarlyStopping, LearningRateSchedule, align_moments, build_optimizer
from orion_unet.training.prepare import Prepared
from orion_unet.training.statistics import RunningStatistics
from orion_unet.training.steps import TrainSums


@dataclass
class TrainState:
    """Model, optimiser and progress of one rank; ``epoch`` counts finished epochs, ``step`` the batches of the
    epoch under way that are done, ``sums`` what they added up to."""

    model: SpatialUNet
    statistics: RunningStatistics
    ema: ModelEma | None
    ema_statistics: RunningStatistics | None
    optimizer: torch.optim.Optimizer
    schedule: LearningRateSchedule
    early_stopping: EarlyStopping
    precision: Precision
    epoch: int = 0
    step: int = 0
    attempt: int = 1
    sums: TrainSums | None = None

    @property
    def validated(self) -> nn.Module:
        """The model that is validated and kept as best: the averaged one where there is one."""
        return self.model if self.ema is None else self.ema.model

    def average_statistics(self) -> None:
        """Make the running statistics one on all ranks, before they are used."""
        self.statistics.average_over_ranks()
        if self.ema_statistics is not None:
            self.ema_statistics.average_over_ranks()


def build_state(config: TrainConfig, prepared: Prepared, device: torch.device, steps: int) -> TrainState:
    """A run before its first step, the same on every rank for the same seed."""
    optimisation = config.optimisation
    torch.manual_seed(optimisation.seed)
    model = SpatialUNet.from_options(config.model, len(prepared.table.kept_channels))
    if config.model.output_start == "mean":
        model.start_at(torch.from_numpy(prepared.normalization.target_mean))
    model = model.to(device, memory_format=memory_format(config.model.norm, device))  # type: ignore[call-overload]
    statistics = RunningStatistics(model)
    ema = ModelEma(model, optimisation.ema_decay) if optimisation.ema_decay > 0 else None
    return TrainState(
        model,
        statistics,
        ema,
        RunningStatistics(ema.model) if ema is not None else None,
        build_optimizer(model, optimisation, device),
        LearningRateSchedule(optimisation, steps),
        EarlyStopping(optimisation.early_stopping_patience),
        _precision(config, device),
    )


def _precision(config: TrainConfig, device: torch.device) -> Precision:
    if not config.runtime.use_amp or device.type != "cuda":
        return Precision()
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return Precision(torch.bfloat16)
    # The default first scale of 65,536 would cost the first steps: 2^13 rarely overflows and grows by itself.
    return Precision(torch.float16, torch.amp.GradScaler("cuda", init_scale=2.0**13))


def build_loss(config: TrainConfig, prepared: Prepared, device: torch.device) -> CompositeLoss:
    """The composite loss of the options."""
    weights = prepared.channel_weights
    loss = CompositeLoss(
        config.loss.weights,
        config.loss.variance_form,
        config.loss.target_variance,
        None if weights is None else torch.tensor(weights),
        mean_over_ranks if world_size() > 1 else None,
    )
    return loss.to(device)


def global_batch(config: TrainConfig) -> int:
    """Patches of one step over all ranks."""
    return config.optimisation.batch_size * world_size()


def capture(
    state: TrainState, config: TrainConfig, prepared: Prepared, ranks: list[dict[str, Any]] | None
) -> dict[str, Any]:
    """Content of last.pt, from which ``restore`` continues; ``ranks`` from ``rank_states`` within an epoch."""
    return {
        **capture_model(state, config, prepared, state.model),
        "ema": state.ema.state_dict() if state.ema else None,
        "optimizer": state.optimizer.state_dict(),
        "schedule": state.schedule.state_dict(),
        "early_stopping": state.early_stopping.state_dict(),
        "scaler": state.precision.scaler.state_dict() if state.precision.scaler else None,
        "attempt": state.attempt,
        "step": state.step,
        "global_batch": global_batch(config),
        "ranks": ranks,
    }


def rank_states(state: TrainState) -> list[dict[str, Any]] | None:
    """Within an epoch, what differs between ranks: gathered on every rank, so every rank must call it."""
    if state.sums is None:
        return None
    own = {
        "sums": state.sums.values.cpu(),
        "bad_in_a_row": state.sums.bad_in_a_row,
        "statistics": state.statistics.flat.cpu(),
        "ema_statistics": None if state.ema_statistics is None else state.ema_statistics.flat.cpu(),
    }
    return gather(own)


def _restore_rank(state: TrainState, ranks: list[dict[str, Any]], loss: CompositeLoss, device: torch.device) -> None:
    """Continue an epoch under way: each rank as it was; on another number of ranks, what they were together."""
    state.sums = TrainSums.start(loss, device)
    state.sums.bad_in_a_row = ranks[0]["bad_in_a_row"]
    if len(ranks) == world_size():
        own = ranks[rank()]
        state.sums.values.copy_(own["sums"])
        statistics, averaged = own["statistics"], own["ema_statistics"]
    else:
        state.sums.values.copy_(sum(each["sums"] for each in ranks) / world_size())
        statistics = torch.stack([each["statistics"] for each in ranks]).mean(0)
        averaged = None if state.ema is None else torch.stack([each["ema_statistics"] for each in ranks]).mean(0)
    state.statistics.flat.copy_(statistics)
    if state.ema_statistics is not None:
        state.ema_statistics.flat.copy_(averaged)


def capture_model(state: TrainState, config: TrainConfig, prepared: Prepared, model: nn.Module) -> dict[str, Any]:
    """Content of best.pt: one model, with all that it takes to predict with it and to judge it."""
    return {
        "model": {
            name: tensor.detach().clone(memory_format=torch.contiguous_format)
            for name, tensor in model.state_dict().items()
        },
        "options": config.options(),
        "normalization": prepared.normalization.document(),
        "channel_names": list(prepared.table.kept_names),
        "split": prepared.split.document(prepared.table),
        "epoch": state.epoch,
        "best_val_loss": state.early_stopping.best,
    }


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
    try:
        state.model.load_state_dict(earlier["model"])
        if state.ema is not None:
            state.ema.load_state_dict(earlier["ema"])
        state.optimizer.load_state_dict(earlier["optimizer"])
        align_moments(state.optimizer)
        state.schedule.load_state_dict(earlier["schedule"])
        state.early_stopping.load_state_dict(earlier["early_stopping"])
        if state.precision.scaler and earlier["scaler"]:
            state.precision.scaler.load_state_dict(earlier["scaler"])
        if earlier["ranks"] is not None:
            _restore_rank(state, earlier["ranks"], loss, device)
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"--resume: the checkpoint does not fit this model ({error})") from None
    state.epoch, state.step, state.attempt = earlier["epoch"], earlier["step"], earlier["attempt"] + 1
