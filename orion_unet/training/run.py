"""A training run from its options to its end: the wiring, and the epoch as one visible sequence."""

from __future__ import annotations

import inspect
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from orion_unet import checkpoint
from orion_unet.config import TrainConfig
from orion_unet.distributed import (
    any_rank,
    broadcast,
    from_main_process,
    gather,
    is_main_process,
    process_group,
    rank,
    world_size,
)
from orion_unet.losses import CompositeLoss
from orion_unet.models.unet import parameter_count
from orion_unet.run_log import Heartbeat, MetricsWriter, utc_now
from orion_unet.training import folder
from orion_unet.training.console import Console
from orion_unet.training.devices import choose_device, describe_devices, memory_bytes, set_determinism
from orion_unet.training.engine import Diverged, StepReport, TrainEpoch, Validation, evaluate, train_one_epoch
from orion_unet.training.interrupts import Interrupts
from orion_unet.training.prepare import Feeds, Prepared, build_feeds, prepare_data
from orion_unet.training.sanity import SanityPanel
from orion_unet.training.state import (
    TrainState,
    build_loss,
    build_state,
    capture,
    capture_model,
    check_resumable,
    global_batch,
    restore,
)
from orion_unet.training.tensorboard import EventWriter

FINISHED, DIVERGED = 0, 3
DIVERGENCE_ADVICE = (
    "Try a lower --learning_rate (5e-5 or 2e-5), --warmup_epochs 1, --grad_clip 0.5, --no_use_amp, "
    "--variance_form target; best.pt still holds the best epoch."
)


def run(config: TrainConfig) -> int:
    """Train as the options say; returns the exit code (0 finished, 3 diverged, 130 or 143 interrupted).

    Raises InputError for bad options or data, before anything of an earlier run is touched.
    """
    device = choose_device(config.runtime)
    set_determinism(config.runtime.deterministic)
    with process_group(device):
        console = Console()
        earlier = from_main_process(lambda: _earlier_run(config, console))
        prepared = from_main_process(lambda: prepare_data(config, world_size(), earlier, console.progress))
        if is_main_process():
            folder.claim(Path(config.output.output_dir), config.output.overwrite)
        return Run(config, device, prepared, earlier, console).train()


def _earlier_run(config: TrainConfig, console: Console) -> dict[str, Any] | None:
    """The checkpoint to continue from; None for a run that begins. Raises InputError."""
    EventWriter.check_available(config.output.tensorboard)
    resume = config.runtime.resume
    if resume is None:
        folder.check_free(config)
        return None
    run_dir = Path(config.output.output_dir)
    if resume == "auto":
        earlier, warning = checkpoint.load_last(run_dir)
        if warning:
            console.say(f"warning: {warning}")
        source = str(run_dir)
    else:
        earlier, source = checkpoint.load(Path(resume), to_resume=True), resume
    if earlier is not None:
        check_resumable(config, earlier, source)
    return earlier


@dataclass
class _Stop(Exception):
    """The run ends here: final state, message and exit code."""

    state: str
    message: str
    exit_code: int


class Run:
    """One rank's side of a run."""

    def __init__(
        self,
        config: TrainConfig,
        device: torch.device,
        prepared: Prepared,
        earlier: dict[str, Any] | None,
        console: Console,
    ) -> None:
        self.config = config
        self.device = device
        self.prepared = prepared
        self.console = console
        self.run_dir = Path(config.output.output_dir)
        self.names = prepared.table.kept_names
        self.feeds: Feeds = build_feeds(config, prepared, device)
        self.steps = self.feeds.order.steps
        self.accumulate = config.optimisation.accumulate_steps
        self.loss: CompositeLoss = build_loss(config, prepared, device)
        self.state: TrainState = build_state(config, prepared, device, math.ceil(self.steps / self.accumulate))
        self.resumed = earlier is not None
        if earlier is not None:
            restore(self.state, earlier, self.loss, device)
        self.forward: nn.Module = self.state.model
        if config.runtime.compile:
            self.forward = cast(nn.Module, torch.compile(self.state.model))
        self.parallel = self._parallel(self.forward)
        self.metrics = MetricsWriter(self.run_dir)
        self.events = EventWriter(self.run_dir, config.output.tensorboard and is_main_process())
        self.panel = self._panel()

    def _parallel(self, model: nn.Module) -> nn.Module:
        if world_size() == 1:
            return model
        # The running statistics are averaged once an epoch, before they are used; torch 2.13 renamed the option.
        accepted = inspect.signature(DistributedDataParallel).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in accepted else "broadcast_buffers"
        return DistributedDataParallel(
            model,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            **cast(dict[str, Any], {name: False}),
        )

    def _panel(self) -> SanityPanel | None:
        if not is_main_process() or self.config.output.sanity_check_freq == 0:
            return None
        places = torch.from_numpy(self.prepared.validation)
        return SanityPanel(self.feeds.reader, self.feeds.transform, places, self.names)

    def train(self) -> int:
        """Run to the end; returns the exit code."""
        options = self.config.optimisation
        if is_main_process():
            self.console.log_to(self.run_dir)
            folder.write_start(self.run_dir, self.config, self.prepared, self._facts())
            self._greet()
        self.heartbeat = Heartbeat(self.run_dir) if is_main_process() else None
        with self.heartbeat or nullcontext(), Interrupts() as self.interrupts:
            try:
                if self.state.early_stopping.should_stop:
                    raise _Stop("early_stopped", self._early_stop_message(), FINISHED)
                for epoch in range(self.state.epoch + 1, options.epochs + 1):
                    self._epoch(epoch)
                raise _Stop("finished", f"finished after {options.epochs} epochs", FINISHED)
            except Diverged as error:
                return self._end(_Stop("diverged", f"diverged: {error}. {DIVERGENCE_ADVICE}", DIVERGED))
            except _Stop as stop:
                return self._end(stop)
            finally:
                self.console.end_bar()
                self.events.close()

    def _epoch(self, epoch: int) -> None:
        """Everything of an epoch, in order: train, validate, judge, save, write, draw, decide."""
        started = time.perf_counter()
        trained = self._train_epoch(epoch)
        self.state.statistics.average_over_ranks()
        validation = self._validate(epoch)
        best = self.state.early_stopping.update(validation.loss, epoch)
        rate = self._rate(epoch, self.steps - 1)
        self.state.epoch, self.state.step, self.state.sums = epoch, 0, None
        reduced = self.state.schedule.end_epoch(validation.loss)
        if not math.isfinite(validation.loss):
            raise Diverged(f"the validation loss of epoch {epoch} is not finite")
        record = self._record(epoch, rate, trained, validation, best, started)
        if is_main_process():
            if best:
                content = capture_model(self.state, self.config, self.prepared, self.state.validated)
                checkpoint.save(checkpoint.checkpoint_path(self.run_dir, checkpoint.BEST), content)
            self._save_last()
            self.metrics.append(record)
            self.events.write(record)
            self.console.epoch_line(record, self.config.optimisation.epochs)
            if reduced:
                self.console.say(
                    f"validation loss is no better: learning rate lowered to {self._rate(epoch + 1, 0):.2e}"
                )
            if self.panel and epoch % self.config.output.sanity_check_freq == 0:
                self.panel.draw(self.state.validated, self.run_dir, epoch)
        if self.state.early_stopping.should_stop:
            raise _Stop("early_stopped", self._early_stop_message(), FINISHED)
        if any_rank(self.interrupts.requested()):
            self._interrupted()

    def _train_epoch(self, epoch: int) -> TrainEpoch:
        options = self.config.optimisation
        self.feeds.order.set_epoch(epoch, self.state.step)
        self._beat(state="training", epoch=epoch, step=self.state.step)
        patches = options.batch_size * world_size()
        self.console.start_bar(f"epoch {epoch}/{options.epochs}", self.steps * patches, done=self.state.step * patches)
        trained = train_one_epoch(
            self.parallel,
            self.feeds.train,
            self.loss,
            self.state.optimizer,
            self.device,
            statistics=self.state.statistics,
            steps=self.steps,
            start_step=self.state.step,
            sums=self.state.sums,
            begin_step=lambda step: self._begin_step(epoch, step),
            on_step=lambda report: self._on_step(epoch, report),
            stop_requested=self.interrupts.requested,
            accumulate_steps=self.accumulate,
            grad_clip=options.grad_clip,
            precision=self.state.precision,
            ema=self.state.ema,
        )
        self.console.end_bar()
        if trained.interrupted and trained.next_step < self.steps:
            self.state.step, self.state.sums = trained.next_step, trained.sums
            if is_main_process():
                self._save_last()
            self._interrupted()
        return trained

    def _begin_step(self, epoch: int, step: int) -> None:
        for group in self.state.optimizer.param_groups:
            group["lr"] = self._rate(epoch, step)
        if self.config.model.dropout > 0:
            # Dropout, too, is a function of where the run is, not of how it got there.
            torch.manual_seed(hash((self.config.optimisation.seed, epoch, step, rank())))

    def _rate(self, epoch: int, step: int) -> float:
        return self.state.schedule.at(epoch - 1, step // self.accumulate)

    def _on_step(self, epoch: int, report: StepReport) -> None:
        patches = self.config.optimisation.batch_size * world_size()
        self._beat(step=report.step + 1)
        self.console.advance(patches, loss=f"{report.loss:.4f}", lr=f"{self._rate(epoch, report.step):.1e}")
        if report.bad:
            self._report_bad(epoch, report)

    def _report_bad(self, epoch: int, report: StepReport) -> None:
        """Name what was not finite and where; every rank comes here for the same step."""
        names = self.prepared.table.names
        found = gather((report.culprits, sorted({str(names[core]) for core in report.cores})))
        guilty = [(terms, cores) for terms, cores in found if terms] or found
        terms = sorted({term for some, _ in guilty for term in some}) or ["gradient"]
        cores = sorted({core for _, some in guilty for core in some})
        self.console.say(
            f"epoch {epoch} step {report.step + 1}: not finite: {', '.join(terms)}; step skipped; cores in the batch: "
            f"{', '.join(cores)}"
        )

    def _validate(self, epoch: int) -> Validation:
        self._beat(state="validating", epoch=epoch)
        self.console.start_bar("validating", len(self.prepared.validation))
        model = self.forward if self.state.ema is None else self.state.ema.model
        found = evaluate(
            model,
            self.feeds.val,
            self.loss,
            self.device,
            names=self.names,
            precision=self.state.precision,
            on_batch=lambda patches: self.console.advance(patches * world_size()),
        )
        self.console.end_bar()
        # Decisions follow from this; one rank's rounding must not part them.
        return broadcast(found)

    def _record(
        self, epoch: int, rate: float, trained: TrainEpoch, validation: Validation, best: bool, started: float
    ) -> dict[str, Any]:
        """The epoch's line of metrics.jsonl."""
        sums = trained.sums.reduced()
        return {
            "epoch": epoch,
            "attempt": self.state.attempt,
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
            "data_wait_fraction": min(1.0, self.feeds.train.wait_s / trained.duration_s),
            "max_memory_bytes": memory_bytes(self.device),
            "skipped_steps": sums["skipped_steps"],
            "best": best,
        }

    def _save_last(self) -> None:
        path = checkpoint.checkpoint_path(self.run_dir, checkpoint.LAST)
        checkpoint.save(path, capture(self.state, self.config, self.prepared), keep_previous=True)

    def _interrupted(self) -> None:
        """End after a request to stop, on every rank; the state has been saved."""
        codes = gather(self.interrupts.exit_code if self.interrupts.requested() else 0)
        raise _Stop(
            "interrupted",
            f"interrupted in epoch {self.state.epoch + 1} after step {self.state.step}, state saved; the same command "
            "with --resume auto goes on from here",
            max(codes) or 143,
        )

    def _early_stop_message(self) -> str:
        stopping = self.state.early_stopping
        return f"stopped early: no better validation loss for {stopping.bad_epochs} epochs"

    def _end(self, stop: _Stop) -> int:
        self.console.end_bar()
        self._beat(state=stop.state, message=stop.message)
        self.console.say(stop.message)
        stopping = self.state.early_stopping
        if stopping.best is not None:
            best = checkpoint.checkpoint_path(self.run_dir, checkpoint.BEST)
            self.console.say(f"best epoch {stopping.best_epoch}: val loss {stopping.best:.5f}, model in {best}")
        if stop.exit_code == FINISHED:
            self.console.say(f"next: python monitor_training.py --output_dir {self.run_dir}")
        return stop.exit_code

    def _beat(self, **fields: Any) -> None:
        if self.heartbeat is not None:
            self.heartbeat.update(epochs=self.config.optimisation.epochs, steps_per_epoch=self.steps, **fields)

    def _facts(self) -> dict[str, Any]:
        return {
            "device": describe_devices(self.device, world_size()),
            "world_size": world_size(),
            "global_batch": global_batch(self.config) * self.accumulate,
            "parameters": parameter_count(self.state.model),
            "attempt": self.state.attempt,
        }

    def _greet(self) -> None:
        """What a person wants to know before the first epoch."""
        split, options = self.prepared.split, self.config.optimisation
        facts = self._facts()
        precision = self.state.precision.dtype
        amp = f", AMP {str(precision).removeprefix('torch.')}" if precision else ""
        samples = self.steps * global_batch(self.config)
        lines = [
            f"devices         {facts['device']}{amp}",
            f"batch           {options.batch_size} per rank, global batch {facts['global_batch']}"
            + (f" ({self.accumulate} batches accumulated)" if self.accumulate > 1 else ""),
            f"data            {len(split.train)} training and {len(split.val)} validation cores, "
            f"{len(self.names)} markers, loader processes per rank: {self.feeds.workers}",
            f"patches         {samples} training per epoch ({self.steps} steps), {len(self.prepared.validation)} "
            f"validation, {self.config.data.patch_size} x {self.config.data.patch_size} pixels",
            f"model           {facts['parameters']:,} parameters",
            f"run folder      {self.run_dir}",
            f"monitor with    python monitor_training.py --output_dir {self.run_dir} --watch",
        ]
        lines += [f"warning: {warning}" for warning in self.prepared.warnings]
        if self.config.runtime.use_amp and self.device.type == "cpu":
            lines.append("note: mixed precision needs a GPU; training in float32")
        if self.resumed:
            best = self.state.early_stopping.best
            lines.append(
                f"resumed         at epoch {self.state.epoch + 1} step {self.state.step}, learning rate "
                f"{self._rate(self.state.epoch + 1, self.state.step):.2e}, best validation loss "
                f"{'none yet' if best is None else f'{best:.5f}'}, attempt {self.state.attempt}"
            )
        self.console.say("\n".join(lines))
