"""The words and records of a run: what is said at its start, its facts, and an epoch's line of metrics.jsonl."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from orion_unet.distributed import world_size
from orion_unet.models.unet import parameter_count
from orion_unet.run_log import utc_now
from orion_unet.training.devices import describe_devices, memory_bytes
from orion_unet.training.engine import TrainEpoch, Validation
from orion_unet.training.optim import LITTLE_TRAVEL, MUCH_LOWER, automatic_rate
from orion_unet.training.prepare import planned_steps
from orion_unet.training.state import global_batch

if TYPE_CHECKING:
    from orion_unet.training.run import Run


def facts(run: Run) -> dict[str, Any]:
    """What config.json tells beside the options."""
    steps = planned_steps(run.config, run.prepared)
    return {
        "device": describe_devices(run.device, world_size()),
        "world_size": world_size(),
        "global_batch": global_batch(run.config) * run.config.optimisation.accumulate_steps,
        "parameters": parameter_count(run.state.model),
        "optimiser_steps": steps,
        "automatic_learning_rate": automatic_rate(steps),
        "attempt": run.state.attempt,
    }


def greeting(run: Run) -> str:
    """What a person wants to know before the first epoch."""
    config, split, known = run.config, run.prepared.split, facts(run)
    precision = run.state.precision.dtype
    rate, steps, suited = config.optimisation.rate, known["optimiser_steps"], known["automatic_learning_rate"]
    amp = f", AMP {str(precision).removeprefix('torch.')}" if precision else ""
    accumulated = config.optimisation.accumulate_steps
    lines = [
        f"devices         {known['device']}{amp}",
        f"batch           {config.optimisation.batch_size} per rank, global batch {known['global_batch']}"
        + (f" ({accumulated} batches accumulated)" if accumulated > 1 else ""),
        f"data            {len(split.train)} training and {len(split.val)} validation cores, {len(run.names)} markers, "
        f"loader processes per rank: {run.feeds.workers}",
        f"patches         {run.steps * global_batch(config)} training per epoch ({run.steps} steps), "
        f"{len(run.prepared.validation)} validation, {config.data.patch_size} x {config.data.patch_size} pixels",
        f"steps           {steps} optimiser steps, learning rate up to {rate:.2g}",
        f"model           {known['parameters']:,} parameters",
        f"run folder      {run.run_dir}",
        f"monitor with    python monitor_training.py --output_dir {run.run_dir} --watch",
    ]
    lines += [f"warning: {warning}" for warning in run.prepared.warnings]
    if rate < suited * MUCH_LOWER and rate * steps < LITTLE_TRAVEL:
        lines.append(
            f"note: {steps} steps at a learning rate of {rate:.2g} move a weight by about {rate * steps:.2g}, "
            f"which is little to learn in; --learning_rate auto would be {suited:.2g}"
        )
    if config.runtime.use_amp and run.device.type == "cpu":
        lines.append("note: mixed precision needs a GPU; training in float32")
    if run.earlier is not None:
        lines += _resumed(run, run.earlier)
    return "\n".join(lines)


def _resumed(run: Run, earlier: dict[str, Any]) -> list[str]:
    state, optimisation = run.state, run.config.optimisation
    best = state.early_stopping.best
    lines = [
        f"resumed         at epoch {state.epoch + 1} step {state.step}, learning rate "
        f"{run.rate(state.epoch + 1, state.step):.2e}, best validation loss "
        f"{'none yet' if best is None else f'{best:.5f}'}, attempt {state.attempt}"
    ]
    before = earlier["options"].get("epochs")
    if before != optimisation.epochs:
        what = {
            "cosine": "the cosine now falls to 0 at the new last epoch, so the rate rises at once",
            "plateau": "the plateau schedule goes on from the rate it had reached",
            "constant": "the rate stays as it was",
        }[optimisation.scheduler]
        lines.append(f"epochs          {before} before, {optimisation.epochs} now: {what}")
    return lines


def epoch_record(
    run: Run, epoch: int, rate: float, trained: TrainEpoch, validation: Validation, best: bool, started: float
) -> dict[str, Any]:
    """The epoch's line of metrics.jsonl; reduces the training sums, so every rank must call it."""
    sums = trained.sums.reduced()
    return {
        "epoch": epoch,
        "attempt": run.state.attempt,
        "time": utc_now(),
        "duration_s": time.perf_counter() - started,
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
        "samples_per_s": trained.samples * world_size() / trained.duration_s,
        "val_samples_per_s": validation.patches / validation.duration_s,
        "data_wait_fraction": min(1.0, run.feeds.train.wait_s / trained.duration_s),
        "max_memory_bytes": memory_bytes(run.device),
        "skipped_steps": sums["skipped_steps"],
        "best": best,
    }
