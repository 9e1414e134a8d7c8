"""A training run from its options to its end: the wiring, and the epoch as one visible sequence."""

from __future__ import annotations

import inspect
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from orion_unet import checkpoint
from orion_unet.checkpoint import BEST, LAST, checkpoint_path
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
from orion_unet.errors import InputError
from orion_unet.losses import CompositeLoss
from orion_unet.models.unet import parameter_count
from orion_unet.run_log import Heartbeat, MetricsWriter
from orion_unet.training import folder, report
from orion_unet.training.console import Console
from orion_unet.training.devices import choose_device, keep_freed_memory, set_determinism
from orion_unet.training.engine import TrainEpoch, Validation, evaluate, train_one_epoch
from orion_unet.training.failures import note_failure, noted_failures, plain_failure
from orion_unet.training.interrupts import Interrupts
from orion_unet.training.lock import RunLock
from orion_unet.training.optim import automatic_rate
from orion_unet.training.prepare import Feeds, Prepared, build_feeds, planned_steps, prepare_data
from orion_unet.training.sanity import SanityPanel
from orion_unet.training.state import (
    TrainState,
    build_loss,
    build_state,
    capture,
    capture_model,
    check_resumable,
    rank_states,
    restore,
)
from orion_unet.training.steps import Diverged, StepReport, TrainSums
from orion_unet.training.tensorboard import EventWriter

FINISHED, DIVERGED = 0, 3
DIVERGENCE_ADVICE = (
    "Try a lower --learning_rate (a quarter of it), --warmup_epochs 1, --grad_clip 0.5, --no_use_amp, "
    "--variance_form target"
)


def run(config: TrainConfig) -> int:
    """Train as the options say; returns the exit code (0 finished, 3 diverged, 130 or 143 interrupted).

    Raises InputError for bad options or data, before anything of an earlier run is touched, and RunError where
    disk, memory or another rank fail.
    """
    device = choose_device(config.runtime)
    set_determinism(config.runtime.deterministic)
    keep_freed_memory(device)
    run_dir = Path(config.output.output_dir)
    with process_group(device):
        console = Console()
        earlier = from_main_process(lambda: _earlier_run(config, console))
        prepared = from_main_process(lambda: prepare_data(config, world_size(), earlier, console.progress))
        config = _with_rate(config, prepared, earlier)
        from_main_process(lambda: folder.make(run_dir))
        lock = RunLock(run_dir)
        from_main_process(lock.acquire)
        try:
            if is_main_process():
                folder.clear(run_dir, config.output.overwrite)
            return Run(config, device, prepared, earlier, console).train()
        except Exception as error:
            if not is_main_process():
                note_failure(run_dir, error)
            plain = plain_failure(error, config)
            if plain is None:
                raise
            raise plain from error
        finally:
            if is_main_process():
                lock.release()


def _with_rate(config: TrainConfig, prepared: Prepared, earlier: dict[str, Any] | None) -> TrainConfig:
    """The options with a learning rate: the one given, that of the run continued, or one that suits the length."""
    if config.optimisation.learning_rate is not None:
        return config
    rate = earlier["options"]["learning_rate"] if earlier else automatic_rate(planned_steps(config, prepared))
    return replace(config, optimisation=replace(config.optimisation, learning_rate=rate))


def _earlier_run(config: TrainConfig, console: Console) -> dict[str, Any] | None:
    """The checkpoint to continue from; None for a run that begins. Raises InputError."""
    EventWriter.check_available(config.output.tensorboard)
    resume, run_dir = config.runtime.resume, Path(config.output.output_dir)
    if resume is None:
        folder.check_free(config)
        return None
    if resume == "auto":
        earlier, warning = checkpoint.load_last(run_dir)
        if warning:
            console.say(f"warning: {warning}")
        source = str(run_dir)
    else:
        earlier, source = checkpoint.load(Path(resume), to_resume=True), resume
        if Path(resume).resolve().parent != checkpoint_path(run_dir, LAST).resolve().parent:
            # Continued in a folder of its own; another run's folder is refused as ever.
            folder.check_free(config)
    if earlier is not None:
        check_resumable(config, earlier, source)
    return earlier


@dataclass
class _Stop(Exception):
    """The run ends here: final state, message and exit code."""

    state: str
    message: str
    exit_code: int


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
        self.earlier = earlier
        self.console = console
        self.run_dir = Path(config.output.output_dir)
        self.names = prepared.table.kept_names
        self.feeds: Feeds = build_feeds(config, prepared, device)
        self.steps = self.feeds.order.steps
        self.accumulate = config.optimisation.accumulate_steps
        self.loss: CompositeLoss = build_loss(config, prepared, device)
        self.state: TrainState = build_state(config, prepared, device, math.ceil(self.steps / self.accumulate))
        self.forward: nn.Module = self.state.model
        if config.runtime.compile:
            # A graph for each shape there is (training, validation, its last batch), rather than one slower for all.
            self.forward = cast(nn.Module, torch.compile(self.state.model, dynamic=False))
        self.parallel = parallel(self.forward, device)
        if earlier is not None:
            # Not before: DistributedDataParallel gives every rank the running statistics of rank 0.
            restore(self.state, earlier, self.loss, device)
        if config.runtime.resume:
            self.state.attempt = max(self.state.attempt, folder.last_attempt(self.run_dir) + 1)
        self.metrics = MetricsWriter(self.run_dir)
        self.events = EventWriter(self.run_dir, config.output.tensorboard and is_main_process())
        self.panel = self._panel()
        self.heartbeat: Heartbeat | None = Heartbeat(self.run_dir) if is_main_process() else None
        self.interrupts = Interrupts()
        self.last_saved = time.monotonic()

    def _panel(self) -> SanityPanel | None:
        if not is_main_process() or self.config.output.sanity_check_freq == 0:
            return None
        places = torch.from_numpy(self.prepared.validation)
        return SanityPanel(self.feeds.reader, self.feeds.transform, places, self.names)

    def train(self) -> int:
        """Run to the end; returns the exit code."""
        epochs = self.config.optimisation.epochs
        if is_main_process():
            folder.check_space(self.run_dir, parameter_count(self.state.model), self.state.ema is not None)
            self.console.log_to(self.run_dir)
            folder.write_start(self.run_dir, self.config, self.prepared, report.facts(self))
            self.console.say(report.greeting(self))
        with self.heartbeat or nullcontext(), self.interrupts:
            try:
                if self.state.early_stopping.should_stop:
                    raise _Stop("early_stopped", self._early_stop_message(), FINISHED)
                for epoch in range(self.state.epoch + 1, epochs + 1):
                    self._epoch(epoch)
                raise _Stop("finished", f"finished after {epochs} epochs", FINISHED)
            except Diverged as error:
                return self._end(_Stop("diverged", f"diverged: {error}. {DIVERGENCE_ADVICE}", DIVERGED))
            except _Stop as stop:
                return self._end(stop)
            except Exception as error:
                self._fail(error)
                raise
            finally:
                self.console.end_bar()
                self.feeds.train.close()
                self.feeds.val.close()
                self.events.close()

    def _epoch(self, epoch: int) -> None:
        """Everything of an epoch, in order: train, validate, judge, write, save, draw, decide."""
        started = time.perf_counter()
        rate = self.rate(epoch, self.steps - 1)
        trained = self._train_epoch(epoch)
        self.state.average_statistics()
        validation = self._validate(epoch)
        best = self.state.early_stopping.update(validation.loss, epoch)
        reduced = self.state.schedule.end_epoch(validation.loss)
        self.state.epoch, self.state.step, self.state.sums = epoch, 0, None
        record = report.epoch_record(self, epoch, rate, trained, validation, best, started)
        if is_main_process():
            if best:
                model = capture_model(self.state, self.config, self.prepared, self.state.validated)
                checkpoint.save(checkpoint_path(self.run_dir, BEST), model)
            # The line before the state: a kill between them repeats the epoch, and the later attempt is the true one.
            self.metrics.append(record)
            if math.isfinite(validation.loss):
                self._save_last(None)
            self.events.write(record)
            self.console.epoch_line(record, self.config.optimisation.epochs)
            if reduced:
                lowered = self.rate(epoch + 1, 0)
                self.console.say(f"validation loss is no better: learning rate lowered to {lowered:.2e}")
            if self.panel and epoch % self.config.output.sanity_check_freq == 0:
                self.panel.draw(self.state.validated, self.run_dir, epoch)
        if not math.isfinite(validation.loss):
            raise Diverged(f"the validation loss of epoch {epoch} is not finite")
        if self.state.early_stopping.should_stop:
            raise _Stop("early_stopped", self._early_stop_message(), FINISHED)
        if epoch < self.config.optimisation.epochs and any_rank(self.interrupts.requested()):
            self._interrupted()

    def _train_epoch(self, epoch: int) -> TrainEpoch:
        options = self.config.optimisation
        self.feeds.order.set_epoch(epoch, self.state.step)
        self._beat(state="training", epoch=epoch, step=self.state.step)
        patches = options.batch_size * world_size()
        self.console.start_bar(f"epoch {epoch}/{options.epochs}", self.steps * patches, self.state.step * patches)
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
            save_requested=self._save_is_due,
            save=self._save_within_epoch,
            accumulate_steps=self.accumulate,
            grad_clip=options.grad_clip,
            precision=self.state.precision,
            ema=self.state.ema,
        )
        self.console.end_bar()
        if trained.interrupted and trained.next_step < self.steps:
            self._save_within_epoch(trained.next_step, trained.sums)
            self._interrupted()
        return trained

    def _begin_step(self, epoch: int, step: int) -> None:
        for group in self.state.optimizer.param_groups:
            group["lr"] = self.rate(epoch, step)
        if self.config.model.dropout > 0:
            # Dropout, too, is a function of where the run is, not of how it got there.
            torch.manual_seed(hash((self.config.optimisation.seed, epoch, step, rank())))

    def rate(self, epoch: int, step: int) -> float:
        """Learning rate of a batch: epochs from 1, steps from 0."""
        return self.state.schedule.at(epoch - 1, step // self.accumulate)

    def _on_step(self, epoch: int, done: StepReport) -> None:
        patches = self.config.optimisation.batch_size * world_size()
        self._beat(step=done.step + 1)
        self.console.advance(patches, loss=f"{done.loss:.4f}", lr=f"{self.rate(epoch, done.step):.1e}")
        if done.bad:
            self._tell_bad(epoch, done)

    def _tell_bad(self, epoch: int, done: StepReport) -> None:
        """Name what was not finite and where; every rank comes here for the same step."""
        names = self.prepared.table.names
        found = gather((done.culprits, sorted({str(names[core]) for core in done.cores})))
        guilty = [(terms, cores) for terms, cores in found if terms] or found
        terms = sorted({term for some, _ in guilty for term in some}) or ["gradient"]
        cores = sorted({core for _, some in guilty for core in some})
        self.console.say(
            f"epoch {epoch} step {done.step + 1}: not finite: {', '.join(terms)}; step skipped; cores in the batch: "
            f"{', '.join(cores)}"
        )

    def _validate(self, epoch: int) -> Validation:
        self._beat(state="validating", epoch=epoch)
        self.console.start_bar("validating", len(self.prepared.validation))
        found = evaluate(
            self.forward if self.state.ema is None else self.state.ema.model,
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

    def _save_is_due(self) -> bool:
        minutes = self.config.output.save_every_minutes
        return is_main_process() and minutes > 0 and time.monotonic() - self.last_saved > 60 * minutes

    def _save_within_epoch(self, step: int, sums: TrainSums) -> None:
        """Save at a step, so that nothing of the epoch is lost; every rank comes here for the same step."""
        self.state.step, self.state.sums = step, sums
        ranks = rank_states(self.state)
        if is_main_process():
            self._save_last(ranks)

    def _save_last(self, ranks: list[dict[str, Any]] | None) -> None:
        content = capture(self.state, self.config, self.prepared, ranks)
        checkpoint.save(checkpoint_path(self.run_dir, LAST), content, keep_previous=True)
        self.last_saved = time.monotonic()

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
        return f"stopped early: no better validation loss for {self.state.early_stopping.bad_epochs} epochs"

    def _end(self, stop: _Stop) -> int:
        self.console.end_bar()
        self._beat(state=stop.state, message=stop.message)
        self.console.say(stop.message)
        stopping = self.state.early_stopping
        if stopping.best is not None:
            best = checkpoint_path(self.run_dir, BEST)
            self.console.say(f"best epoch {stopping.best_epoch}: val loss {stopping.best:.5f}, model in {best}")
        if stop.exit_code == FINISHED:
            self.console.say(f"next: python monitor_training.py --output_dir {self.run_dir}")
        return stop.exit_code

    def _fail(self, error: Exception) -> None:
        """Leave the cause in status.json; a rank that was lost may have left its own."""
        if is_main_process() and not isinstance(error, InputError):
            plain = plain_failure(error, self.config)
            causes = [str(plain) if plain else f"{type(error).__name__}: {error}", *noted_failures(self.run_dir)]
            self._beat(state="failed", message="; ".join(causes))

    def _beat(self, **fields: Any) -> None:
        if self.heartbeat is not None:
            self.heartbeat.update(epochs=self.config.optimisation.epochs, steps_per_epoch=self.steps, **fields)
