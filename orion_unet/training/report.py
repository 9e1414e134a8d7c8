"""What a run reports: its facts for config.json, the lines at its start, and an epoch's line of metrics.jsonl."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from orion_unet.config import TrainConfig
from orion_unet.distributed import usable_cores, world_size
from orion_unet.models.timm_unet import TimmUNet
from orion_unet.models.unet import parameter_count
from orion_unet.run_log import utc_now
from orion_unet.training.build import Run
from orion_unet.training.devices import describe_devices, device_memory_bytes, device_warning, memory_bytes
from orion_unet.training.engine import TrainSums, Validation, batch_norms
from orion_unet.training.optim import LITTLE_TRAVEL, MUCH_LOWER, automatic_rate
from orion_unet.training.prepare import planned_steps
from orion_unet.training.state import global_batch
from orion_unet.training.transfer import describe, describe_encoder, is_source


def facts(run: Run) -> dict[str, Any]:
    """What config.json holds beside the options."""
    steps = planned_steps(run.config, run.prepared)
    return {
        "device": describe_devices(run.device, world_size()),
        "device_memory_bytes": device_memory_bytes(run.device),
        "loader_processes": run.feeds.workers,
        "usable_cores": usable_cores(),
        "target_layouts": sorted({str(layout) for layout in run.prepared.table.orion["layout"]}),
        "empty_channels": list(run.prepared.normalization.empty),
        "panels": _panels(run),
        "unvalidated_channels": run.prepared.table.never_measured(run.prepared.split.val.tolist()),
        "regression_pearson": run.prepared.regression_pearson,
        "world_size": world_size(),
        "global_batch": global_batch(run.config) * run.config.optimisation.accumulate_steps,
        "parameters": parameter_count(run.state.model) + parameter_count(run.state.model, trainable=False),
        "frozen_parameters": parameter_count(run.state.model, trainable=False),
        "optimiser_steps": steps,
        "automatic_learning_rate": automatic_rate(steps),
        "attempt": run.state.attempt,
        "started_from": _origin(run),
        "encoder_weights": run.state.encoder,
    }


def _panels(run: Run) -> dict[str, Any] | None:
    """What panels.csv says, and the digest by which a resumed run knows it; None where panels do not differ."""
    panels = run.prepared.table.panels
    return None if panels is None else {"digest": run.prepared.panels, "of": panels.document()}


def _origin(run: Run) -> dict[str, Any] | None:
    """The record of the model the run started from, without the digests of its cores: those are in the checkpoints."""
    origin = run.state.origin
    return None if origin is None else {name: value for name, value in origin.items() if name != "trained_on"}


def greeting(run: Run, known: dict[str, Any]) -> str:
    """The lines before the first epoch, from the run and its ``facts``."""
    config, split = run.config, run.prepared.split
    precision = run.state.learner.precision.dtype
    rate, steps, suited = config.optimisation.rate, known["optimiser_steps"], known["automatic_learning_rate"]
    amp = f", AMP {str(precision).removeprefix('torch.')}" if precision else ""
    accumulated = config.optimisation.accumulate_steps
    lines = [
        f"devices         {known['device']}{amp}",
        f"batch           {config.optimisation.batch_size} per rank, global batch {known['global_batch']}"
        + (f" ({accumulated} batches accumulated)" if accumulated > 1 else ""),
        f"data            {len(split.train)} training and {len(split.val)} validation cores, "
        f"{len(run.prepared.table.kept_names)} markers, loader processes per rank: {run.feeds.workers}",
        *_listed_panels(run),
        f"patches         {run.steps * global_batch(config)} training per epoch ({run.steps} steps), "
        f"{len(run.prepared.validation)} validation, {config.data.patch_size} x {config.data.patch_size} pixels",
        f"pixel size      {_pixel_size(config)}",
        f"recipe          {config.recipe}",
        f"steps           {steps} optimiser steps, learning rate up to {rate:.2g}",
        f"model           {known['parameters']:,} parameters"
        + (f", {known['frozen_parameters']:,} of them do not train" if known["frozen_parameters"] else ""),
        f"batch norm      {_statistics(run)}",
        *_started_from(run),
        *_encoder(run),
        f"run folder      {run.dir}",
        f"monitor with    python monitor_training.py --output_dir {run.dir} --watch",
    ]
    lines += [
        f"warning: {warning}" for warning in [*run.prepared.warnings, *device_warning(run.device, config.runtime)]
    ]
    if rate < suited * MUCH_LOWER and rate * steps < LITTLE_TRAVEL:
        lines.append(
            f"note: {steps} steps at a learning rate of {rate:.2g} move a weight by about {rate * steps:.2g}, "
            f"which is little to learn in; --learning_rate auto would be {suited:.2g}"
        )
    if config.runtime.use_amp and run.device.type == "cpu":
        lines.append("note: mixed precision needs a GPU; training in float32")
    if run.resumed_from is not None:
        lines += _resumed(run, run.resumed_from)
    return "\n".join(lines)


def _listed_panels(run: Run) -> list[str]:
    panels = run.prepared.table.panels
    if panels is None:
        return []
    listed = [
        f"{name} ({about['cores']} core{'s' * (about['cores'] != 1)}, {len(about['markers'])} markers)"
        for name, about in panels.document().items()
    ]
    return [f"panels          {', '.join(listed)}"]


def _started_from(run: Run) -> list[str]:
    origin, asked = run.state.origin, run.config.transfer.init_from
    lines = [] if origin is None else describe(origin)
    if run.resumed_from is not None and asked is not None and not is_source(asked, origin):
        lines.append(f"note: --init_from {asked} is not read, because the weights of a resumed run are its own")
    return lines


def _encoder(run: Run) -> list[str]:
    config = run.config
    how, factor = config.transfer.encoder_train, config.transfer.encoder_rate_factor
    kept = ", which keeps its weights and the statistics of its norms"
    lines = _encoder_input(run) + ([] if run.state.encoder is None else describe_encoder(run.state.encoder))
    lines += {
        "full": [],
        "frozen": [f"encoder         frozen{kept}"],
        "last": [f"encoder         frozen but for its last stage{kept}"],
    }[how]
    if factor != 1 and how == "frozen":
        lines.append(f"note: --encoder_rate_factor {factor:g} has no effect, because the encoder is frozen")
    elif factor != 1:
        lines.append(f"encoder rate    {factor:g} x the learning rate")
    return lines


def _encoder_input(run: Run) -> list[str]:
    model, size = run.state.model, run.config.data.pixel_size_um
    if not isinstance(model, TimmUNet) or model.strides[0] == model.strides[1]:
        return []
    own, stride = model.strides
    pixels = f"{stride}/{own} times larger" if size is None else f"of {size * stride / own:.3g} µm"
    return [
        f"encoder input   the H&E at {own}/{stride} of its size, hence pixels {pixels}, because its stride is {own}"
    ]


def _pixel_size(config: TrainConfig) -> str:
    size = config.data.pixel_size_um
    if size is None:
        return "unknown, so predictions cannot be fitted to it (--pixel_size_um, or dataset.json beside the pairs)"
    return f"{size:g} µm"


def _statistics(run: Run) -> str:
    wanted, used = run.config.optimisation.statistics_batches or 0, run.statistics_batches
    if not batch_norms(run.state.validated):
        return f"none with --norm {run.config.model.norm}, so --statistics_batches has no effect"
    if not wanted:
        return "validated with running averages of its statistics"
    all_of_it = f", all of an epoch (--statistics_batches {wanted})" if used < wanted else ""
    return f"statistics measured anew over {used} batches before each validation{all_of_it}"


def _resumed(run: Run, earlier: dict[str, Any]) -> list[str]:
    state, optimisation = run.state, run.config.optimisation
    stopping = state.early_stopping
    # Where only the validation is left, the rate is that of the epoch's last step.
    rate = run.rates(state.epoch + 1)[min(state.step, run.steps - 1)]
    lines = [
        f"resumed         at epoch {state.epoch + 1} step {state.step}, learning rate {rate:.2e}, best "
        f"{stopping.measure} {'none yet' if stopping.best is None else f'{stopping.best:.5f}'}, attempt {state.attempt}"
    ]
    if earlier["epochs"] != optimisation.epochs:
        what = {
            "cosine": "the cosine now falls to 0 at the new last epoch, so the rate rises at once",
            "plateau": "the plateau schedule continues from the rate it had reached",
            "constant": "the rate stays as it was",
        }[optimisation.scheduler]
        lines.append(f"epochs          {earlier['epochs']} before, {optimisation.epochs} now: {what}")
    return lines


@dataclass
class EpochTimes:
    """Seconds spent in the training and the validation of an epoch, and in waiting for the loader; patches trained on
    by this rank since it started, 0 where only the validation was left."""

    train_s: float = 0.0
    wait_s: float = 0.0
    val_s: float = 0.0
    total_s: float = 0.0
    patches: int = 0


def epoch_record(
    run: Run, epoch: int, rate: float, trained: TrainSums, validation: Validation, best: bool, times: EpochTimes
) -> dict[str, Any]:
    """The epoch's line of metrics.jsonl; reduces the training sums, so every rank must call it.

    ``rate`` is the learning rate of its last step, ``best`` whether it is the best so far, by --best_by.
    """
    sums = trained.reduced()
    return {
        "epoch": epoch,
        "attempt": run.state.attempt,
        "time": utc_now(),
        "duration_s": times.total_s,
        "lr": rate,
        "train": {"loss": sums["loss"], "terms": sums["terms"]},
        "val": {
            "loss": validation.loss,
            "terms": validation.terms,
            "metrics": validation.metrics,
            "per_channel": validation.per_channel,
            "patches": validation.patches,
        },
        "grad_norm": sums["grad_norm"],
        "samples_per_s": times.patches * world_size() / times.train_s if times.patches else None,
        "val_samples_per_s": validation.patches / times.val_s,
        "data_wait_fraction": min(1.0, times.wait_s / times.train_s) if times.patches else None,
        "max_memory_bytes": memory_bytes(run.device),
        "skipped_steps": sums["skipped_steps"],
        "best": best,
    }
