"""Everything that a run needs, built before its first epoch: data, loaders, network, loss, optimiser, state."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from orion_unet import checkpoint
from orion_unet.checkpoint import BEST, LAST, checkpoint_path
from orion_unet.config import STAIN_AUGMENTATION, UPSAMPLING, TrainConfig, declared_options
from orion_unet.data.device_batches import DeviceBatches
from orion_unet.data.loaders import (
    BatchLoader,
    TrainingOrder,
    TrainingSamples,
    ValidationOrder,
    ValidationSamples,
    automatic_workers,
    slots_bytes,
)
from orion_unet.data.patches import PatchReader
from orion_unet.data.transforms import BatchTransform
from orion_unet.distributed import local_world_size, mean_over_ranks, rank, world_size
from orion_unet.errors import InputError
from orion_unet.losses import CompositeLoss
from orion_unet.models.build import build_network
from orion_unet.models.timm_unet import TimmUNet
from orion_unet.models.unet import memory_format
from orion_unet.training import run_folder
from orion_unet.training.averages import ModelEma, RunningStatistics
from orion_unet.training.console import Console
from orion_unet.training.devices import autocast_dtype
from orion_unet.training.engine import Learner, Precision, batch_norms, settle_buckets
from orion_unet.training.optim import EarlyStopping, LearningRateSchedule, automatic_rate, build_optimizer
from orion_unet.training.prepare import Prepared, planned_steps
from orion_unet.training.state import TrainState, check_resumable, restore
from orion_unet.training.tensorboard import EventWriter
from orion_unet.training.transfer import EncoderFile, Source, take_over

# What a new run takes for the options that are left open.
FRESH: dict[str, Callable[[TrainConfig, Prepared, Source | None], Any]] = {
    "learning_rate": lambda config, prepared, source: automatic_rate(planned_steps(config, prepared)),
    "statistics_batches": lambda config, prepared, source: 16,
    "fold": lambda config, prepared, source: config.data.fold,
    "pixel_size_um": lambda config, prepared, source: prepared.pixel_size_um,
    "stain_augmentation": lambda config, prepared, source: STAIN_AUGMENTATION,
    "upsampling": lambda config, prepared, source: (source and source.options.upsampling) or UPSAMPLING,
}


@dataclass
class Feeds:
    """The training and validation batches of this rank."""

    order: TrainingOrder
    train: DeviceBatches
    val: DeviceBatches
    transform: BatchTransform
    reader: PatchReader
    workers: int

    def close(self) -> None:
        """End the loaders' processes."""
        self.train.close()
        self.val.close()


@dataclass
class Run:
    """One rank's side of a run: what its epochs need.

    ``validated`` is the model to validate with, compiled where asked. ``resumed_from`` holds what the report of a
    continued run quotes of the earlier one; None for a new run.
    """

    config: TrainConfig
    device: torch.device
    prepared: Prepared
    feeds: Feeds
    loss: CompositeLoss
    state: TrainState
    validated: nn.Module
    resumed_from: dict[str, Any] | None

    @property
    def dir(self) -> Path:
        """The run folder."""
        return Path(self.config.output.output_dir)

    @property
    def steps(self) -> int:
        """Batches of an epoch."""
        return self.feeds.order.steps

    @property
    def statistics_batches(self) -> int:
        """Batches per rank that the statistics are measured over before each validation: at most those of an epoch,
        0 where they are not measured or there are none."""
        wanted = self.config.optimisation.statistics_batches or 0
        return min(wanted, self.steps) if batch_norms(self.state.validated) else 0

    def rates(self, epoch: int) -> list[float]:
        """The learning rate of every batch of an epoch (from 1); batches of one optimiser step share one."""
        accumulate = self.config.optimisation.accumulate_steps
        return [self.state.schedule.at(epoch - 1, step // accumulate) for step in range(self.steps)]


def build_run(
    config: TrainConfig,
    device: torch.device,
    prepared: Prepared,
    earlier: dict[str, Any] | None,
    source: Source | None = None,
    encoder: EncoderFile | None = None,
) -> Run:
    """Build a run, or continue the one whose checkpoint is ``earlier``; the same on every rank for the same seed.

    A new run starts from the weights of ``source``, where there is one, and a timm encoder from those of ``encoder``.
    """
    feeds = build_feeds(config, prepared, device)
    steps = math.ceil(feeds.order.steps / config.optimisation.accumulate_steps)
    state = build_state(config, prepared, device, steps, source, encoder)
    loss = build_loss(config, prepared, device)
    validated = state.validated
    if config.runtime.compile:
        # A graph for each shape there is (training, validation, its last batch), rather than one slower for all.
        trained = cast(nn.Module, torch.compile(state.model, dynamic=False))
        validated = trained if validated is state.model else cast(nn.Module, torch.compile(validated, dynamic=False))
        state.learner.model = trained
    state.learner.model = parallel(state.learner.model, device)
    patch = config.data.patch_size
    layout = memory_format(config.model.norm, device)
    blank = torch.ones(config.optimisation.batch_size, 3, patch, patch, device=device).contiguous(memory_format=layout)
    settle_buckets(state.learner, blank)
    resumed_from = None
    if earlier is not None:
        # Only now: DistributedDataParallel gives every rank the running statistics of rank 0.
        restore(state, earlier, loss, device)
        resumed_from = {"epochs": earlier["options"].get("epochs")}
    if config.runtime.resume:
        state.attempt = max(state.attempt, run_folder.last_attempt(Path(config.output.output_dir)) + 1)
    return Run(config, device, prepared, feeds, loss, state, validated, resumed_from)


def build_state(
    config: TrainConfig,
    prepared: Prepared,
    device: torch.device,
    steps: int,
    source: Source | None = None,
    encoder: EncoderFile | None = None,
) -> TrainState:
    """A run before its first step; ``steps`` are the optimiser steps of an epoch, ``source`` its first weights, and
    ``encoder`` those of a timm encoder."""
    optimisation = config.optimisation
    torch.manual_seed(optimisation.seed)
    model = build_network(config.model, len(prepared.table.kept_channels))
    means = torch.from_numpy(prepared.normalization.target_mean) if config.model.output_start == "mean" else None
    if means is not None:
        model.start_at(means)
    origin = None if source is None else take_over(model, source, prepared.table.kept_names, means)
    if encoder is not None:
        cast(TimmUNet, model).encoder.load_state_dict(encoder.weights, strict=False)
    transfer = config.transfer
    if transfer.encoder_train != "full":
        model.freeze_encoder(transfer.encoder_train)
    model = model.to(device, memory_format=memory_format(config.model.norm, device))  # type: ignore[call-overload]
    statistics = RunningStatistics(model)
    learner = Learner(
        model,
        build_optimizer(
            model,
            optimisation,
            device,
            () if transfer.encoder_rate_factor == 1 else model.encoder_parameters,
            transfer.encoder_rate_factor,
        ),
        statistics,
        ModelEma(model, statistics, optimisation.ema_decay) if optimisation.ema_decay > 0 else None,
        _precision(config, device),
        optimisation.accumulate_steps,
        optimisation.grad_clip,
    )
    return TrainState(
        model,
        learner,
        LearningRateSchedule(optimisation, steps),
        EarlyStopping(optimisation.early_stopping_patience, optimisation.best_by),
        origin=origin,
        encoder=None if encoder is None else encoder.record,
    )


def _precision(config: TrainConfig, device: torch.device) -> Precision:
    dtype = autocast_dtype(config.runtime, device)
    if dtype != torch.float16:
        return Precision(dtype)
    # The default first scale of 65,536 would cost the first steps: 2^13 rarely overflows and grows by itself.
    return Precision(dtype, torch.amp.GradScaler(device.type, init_scale=2.0**13))


def build_loss(config: TrainConfig, prepared: Prepared, device: torch.device) -> CompositeLoss:
    """The composite loss of the options, compiled if wanted and on one rank: several exchange sums within it."""
    weights = prepared.channel_weights
    loss = CompositeLoss(
        config.loss.weights,
        config.loss.variance_form,
        config.loss.target_variance,
        None if weights is None else torch.tensor(weights),
        mean_over_ranks if world_size() > 1 else None,
    ).to(device)
    if config.runtime.compile and world_size() == 1:
        loss.compile(dynamic=False)
    return loss


def parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """The model as several ranks train it; itself on one."""
    if world_size() == 1:
        return model
    # The running statistics are averaged once an epoch, before they are used; torch 2.13 renamed the option.
    accepted = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in accepted else "broadcast_buffers"
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **cast(dict[str, Any], {name: False}),
    )


def build_feeds(config: TrainConfig, prepared: Prepared, device: torch.device) -> Feeds:
    """Loaders and transforms of this rank."""
    data, optimisation = config.data, config.optimisation
    on_gpu = device.type == "cuda"
    reader = PatchReader(prepared.table, prepared.scales, data.patch_size, int(data.cache_mb * 1e6))
    transform = BatchTransform(
        prepared.table,
        reader.formats,
        prepared.normalization,
        data.noise_removal,
        device,
        memory_format(config.model.norm, device),
        STAIN_AUGMENTATION if data.stain_augmentation is None else data.stain_augmentation,
    )
    workers = data.num_workers
    pin_bytes = int(config.runtime.pinned_memory_mb * 1e6) if on_gpu else 0
    if workers is None:
        workers = automatic_workers(local_world_size(), on_gpu)
        if on_gpu:
            workers = max(1, min(workers, pin_bytes // slots_bytes(reader, optimisation.batch_size)))
    training = TrainingSamples(reader, prepared.split.train, data.patches_per_image, optimisation.seed, data.augment)
    order = TrainingOrder(
        len(training),
        optimisation.batch_size,
        rank(),
        world_size(),
        optimisation.seed,
        (data.patches_per_image, data.mixed_cores),
    )
    validation = ValidationSamples(reader, prepared.validation)
    val_order = ValidationOrder(len(validation), optimisation.val_batch_size, rank(), world_size())
    train_loader = BatchLoader(training, order, optimisation.batch_size, workers, pin_bytes)
    val_loader = BatchLoader(
        validation, val_order, optimisation.val_batch_size, workers, max(0, pin_bytes - train_loader.nbytes)
    )
    return Feeds(
        order,
        DeviceBatches(train_loader, transform, augment=data.augment),
        DeviceBatches(val_loader, transform, augment=False),
        transform,
        reader,
        workers,
    )


def find_earlier(config: TrainConfig, console: Console) -> dict[str, Any] | None:
    """The checkpoint to continue from; None for a run that begins. Raises InputError."""
    EventWriter.check_available(config.output.tensorboard)
    resume, run_dir = config.runtime.resume, Path(config.output.output_dir)
    if resume is None:
        run_folder.check_free(config)
        return None
    if resume == "auto":
        earlier, warning = checkpoint.load_last(run_dir)
        if warning:
            console.say(f"warning: {warning}")
        source = str(run_dir)
    else:
        earlier, source = checkpoint.load(Path(resume), to_resume=True), resume
        if _from_another_folder(resume, run_dir):
            # Continued in a folder of its own; another run's folder is refused as ever.
            run_folder.check_free(config)
    if earlier is not None:
        check_resumable(config, earlier, source)
    return earlier


def carry_best_over(config: TrainConfig, earlier: dict[str, Any], console: Console) -> None:
    """Copy the best model so far of a run that is continued in another folder; a warning where it cannot be found."""
    resume, run_dir = config.runtime.resume, Path(config.output.output_dir)
    epoch = earlier["early_stopping"].get("best_epoch")
    if resume in (None, "auto") or epoch is None or not _from_another_folder(str(resume), run_dir):
        return
    best = Path(str(resume)).with_name(BEST)
    try:
        content = checkpoint.load(best)
        if content["epoch"] != epoch:
            raise InputError(f"{best}: is of epoch {content['epoch']}")
    except InputError as error:
        console.say(
            f"warning: the best model so far, of epoch {epoch}, cannot be carried over ({error}); until an epoch is "
            "better, this run has none"
        )
        return
    checkpoint.save(checkpoint_path(run_dir, BEST), content)


def _from_another_folder(resume: str, run_dir: Path) -> bool:
    return Path(resume).resolve().parent != checkpoint_path(run_dir, LAST).resolve().parent


def settled(
    config: TrainConfig, prepared: Prepared, earlier: dict[str, Any] | None, source: Source | None
) -> TrainConfig:
    """The options with those left open decided: as in the run that is continued, or to suit this one and the model that
    it starts from."""
    options = config.options()
    for name, declared in declared_options().items():
        if declared.metadata["follows"] and options[name] is None:
            if earlier is not None:
                options[name] = earlier["options"].get(name, declared.metadata["before"])
            else:
                options[name] = FRESH[name](config, prepared, source)
    return TrainConfig.from_options(options, config.recipe)
