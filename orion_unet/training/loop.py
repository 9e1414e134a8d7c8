"""A training run from its options to its end: the epochs, and all that an epoch does, in one visible sequence."""

from __future__ import annotations

import math
import time
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from orion_unet import checkpoint
from orion_unet.checkpoint import BEST, LAST, checkpoint_path
from orion_unet.config import TrainConfig
from orion_unet.distributed import (
    Watchdog,
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
from orion_unet.models.unet import parameter_count
from orion_unet.run_log import Heartbeat, MetricsWriter, StepsWriter
from orion_unet.training import report, run_folder
from orion_unet.training.build import Run, build_run, carry_best_over, find_earlier, settled
from orion_unet.training.console import Console
from orion_unet.training.devices import choose_device, keep_freed_memory, set_determinism
from orion_unet.training.engine import (
    Diverged,
    Requests,
    Step,
    TrainSums,
    Validation,
    ValidationSums,
    measure_statistics,
    train_steps,
    validate,
)
from orion_unet.training.failures import note_failure, noted_failures, plain_failure
from orion_unet.training.interrupts import Interrupts
from orion_unet.training.prepare import prepare_data
from orion_unet.training.recalibrate import RecalibrationSums
from orion_unet.training.report import EpochTimes
from orion_unet.training.run_folder import RunLock
from orion_unet.training.sanity import SanityPanel
from orion_unet.training.state import capture, capture_model, load_validated, rank_states
from orion_unet.training.steps import StepLog, line_interval
from orion_unet.training.tensorboard import EventWriter
from orion_unet.training.transfer import find_encoder, find_source

FINISHED, DIVERGED = 0, 3
DIVERGENCE_ADVICE = (
    "Try a lower --learning_rate (a quarter of it), --warmup_epochs 1, --grad_clip 0.5, --no_use_amp, "
    "--variance_form target"
)


def train(config: TrainConfig) -> int:
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
        earlier = from_main_process(lambda: find_earlier(config, console))
        source = from_main_process(lambda: find_source(config, earlier))
        encoder = from_main_process(lambda: find_encoder(config, earlier))
        prepared = from_main_process(lambda: prepare_data(config, world_size(), earlier, source, console.progress))
        config = settled(config, prepared, earlier, source)
        from_main_process(lambda: run_folder.make(run_dir))
        lock = RunLock(run_dir, console.say)
        from_main_process(lock.acquire)
        try:
            if is_main_process():
                run_folder.clear(run_dir, config.output.overwrite)
                if earlier is not None:
                    carry_best_over(config, earlier, console)
            run = build_run(config, device, prepared, earlier, source, encoder)
            # The weights are in the model now; every rank would keep a second copy of all state for the whole run.
            earlier = source = encoder = None
            return Loop(run, console).run()
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


@dataclass
class End(Exception):
    """The run ends here: final state, message and exit code."""

    state: str
    message: str
    exit_code: int


class Loop:
    """The epochs of one rank's side of a run."""

    def __init__(self, run: Run, console: Console) -> None:
        self.built = run
        self.state = run.state
        self.config = run.config
        self.console = console
        self.metrics = MetricsWriter(run.dir)
        self.step_log = self._step_log()
        self.events = EventWriter(run.dir, run.config.output.tensorboard and is_main_process())
        self.panel = self._panel()
        self.heartbeat: Heartbeat | None = Heartbeat(run.dir) if is_main_process() else None
        self.watchdog = Watchdog(lambda reason: self._beat(state="failed", message=reason))
        self.interrupts = Interrupts()
        self.last_saved = time.monotonic()

    def run(self) -> int:
        """All epochs, to the end of the run; returns the exit code."""
        epochs = self.config.optimisation.epochs
        if is_main_process():
            self._begin()
        with self.heartbeat or nullcontext(), self.interrupts, self.watchdog:
            try:
                if self.state.early_stopping.should_stop:
                    raise self._complete("early_stopped", self._early_stop_message())
                for epoch in range(self.state.epoch + 1, epochs + 1):
                    self._epoch(epoch)
                raise self._complete("finished", f"finished after {epochs} epochs")
            except Diverged as error:
                return self._end(End("diverged", f"diverged: {error}. {DIVERGENCE_ADVICE}", DIVERGED))
            except End as end:
                return self._end(end)
            except Exception as error:
                self._fail(error)
                raise
            finally:
                self.console.end_bar()
                self.built.feeds.close()
                self.events.close()

    def _begin(self) -> None:
        run, state = self.built, self.state
        parameters = parameter_count(state.model) + parameter_count(state.model, trainable=False)
        run_folder.check_space(run.dir, parameters, state.learner.ema is not None)
        self.console.log_to(run.dir)
        facts = report.facts(run)
        run_folder.write_start(run.dir, self.config, run.prepared, facts)
        self.console.say(report.greeting(run, facts))

    def _epoch(self, epoch: int) -> None:
        """Everything of an epoch, in order: train, save, measure, validate, judge, write, save, draw, decide."""
        state, times = self.state, EpochTimes()
        started = time.perf_counter()
        rates = self.built.rates(epoch)
        trained = self._train(epoch, rates, times)
        # Whatever happens during the validation, the training of this epoch is kept.
        self._save_within_epoch(len(rates), trained)
        state.average_statistics()
        self._measure_statistics(epoch)
        validation = self._validate(epoch, times)
        best = state.early_stopping.update(validation.loss, validation.metrics["pearson"], epoch)
        lowered = state.schedule.end_epoch(validation.loss)
        state.epoch, state.step, state.sums = epoch, 0, None
        times.total_s = time.perf_counter() - started
        record = report.epoch_record(self.built, epoch, rates[-1], trained, validation, best, times)
        if is_main_process():
            if best:
                model = capture_model(state, self.config, self.built.prepared, state.validated)
                checkpoint.save(checkpoint_path(self.built.dir, BEST), model)
            # The line before the state: a kill between them repeats the epoch, and the later attempt is the true one.
            self.metrics.append(record)
            if math.isfinite(validation.loss):
                self._save_last(None)
            self.events.write(record)
            self.console.epoch_line(record, self.config.optimisation.epochs)
            if lowered:
                rate = self.built.rates(epoch + 1)[0]
                self.console.say(f"validation loss is no better: learning rate lowered to {rate:.2e}")
            if self.panel and epoch % self.config.output.sanity_check_freq == 0:
                self.panel.draw(state.validated, self.built.dir, epoch)
        if not math.isfinite(validation.loss):
            raise Diverged(f"the validation loss of epoch {epoch} is not finite")
        if state.early_stopping.should_stop:
            raise self._complete("early_stopped", self._early_stop_message())
        if epoch < self.config.optimisation.epochs and any_rank(self.interrupts.requested()):
            raise self._interrupted()

    def _train(self, epoch: int, rates: list[float], times: EpochTimes) -> TrainSums:
        """The steps of an epoch that are still to be done, at the given learning rates; their sums."""
        run, state, options = self.built, self.state, self.config.optimisation
        feed = run.feeds.train
        sums = state.sums or TrainSums.start(run.loss, run.device)
        # Dropout, too, is a function of where the run is, not of how it got there.
        seeds = [hash((options.seed, epoch, step, rank())) for step in range(len(rates))]
        requests = Requests()
        batch = options.batch_size * world_size()
        started, first = time.perf_counter(), state.step
        run.feeds.order.set_epoch(epoch, first)
        self._beat(state="training", epoch=epoch, step=first)
        if self.step_log is not None:
            self.step_log.begin(epoch)
        self.console.start_bar(f"epoch {epoch}/{options.epochs}", len(rates) * batch, first * batch)
        for done in train_steps(
            state.learner,
            feed,
            run.loss,
            sums,
            rates,
            seeds=seeds if self.config.model.dropout > 0 else None,
            start_step=first,
            requests=requests,
        ):
            self._progress(step=done.step + 1)
            if self.step_log is not None:
                self.step_log.add(done, rates[done.step], feed.wait_s)
            self.console.advance(batch, loss=f"{done.loss:.4f}", lr=f"{rates[done.step]:.1e}")
            if done.bad and not done.overflow:
                self._report_not_finite(epoch, done)
            if done.save or done.stop:
                self._save_within_epoch(done.step + 1, sums)
            if done.stop:
                raise self._interrupted()
            requests.stop, requests.save = self.interrupts.requested(), self._save_is_due()
        self.console.end_bar()
        times.train_s, times.wait_s = time.perf_counter() - started, feed.wait_s
        times.patches = (len(rates) - first) * options.batch_size
        return sums

    def _measure_statistics(self, epoch: int) -> None:
        """Measure the statistics of the model to validate over the last training batches of the epoch."""
        run, state = self.built, self.state
        batches = run.statistics_batches
        if not batches:
            return
        self._beat(state="validating", epoch=epoch)
        # Read anew: a run continued after the last step has none of them left.
        run.feeds.order.set_epoch(epoch, run.steps - batches)
        measured = measure_statistics(
            state.validated, state.validated_statistics, run.feeds.train, state.learner.precision, run.device
        )
        with closing(measured):
            for _ in measured:
                self._progress()
                if any_rank(self.interrupts.requested()):
                    raise self._interrupted()

    def _validate(self, epoch: int, times: EpochTimes) -> Validation:
        """The validation of an epoch, the same on every rank; ends the run between two batches where asked to."""
        run = self.built
        patches = len(run.prepared.validation)
        started = time.perf_counter()
        self._beat(state="validating", epoch=epoch)
        self.console.start_bar("validating", patches)
        sums = ValidationSums(run.prepared.table.kept_names, run.device)
        batches = validate(run.validated, run.feeds.val, run.loss, sums, self.state.learner.precision)
        # As many turns on every rank as the rank with most patches needs, so that all decide together.
        for _ in range(math.ceil(math.ceil(patches / world_size()) / self.config.optimisation.val_batch_size)):
            if any_rank(self.interrupts.requested()):
                raise self._interrupted()
            self.console.advance(next(batches, 0) * world_size())
            self._progress()
        outcome = sums.reduced(run.loss)
        self.console.end_bar()
        times.val_s = time.perf_counter() - started
        # Decisions follow from this; one rank's rounding must not part them.
        return broadcast(outcome)

    def _report_not_finite(self, epoch: int, done: Step) -> None:
        """Name what was not finite and where; every rank comes here for the same step."""
        names = self.built.prepared.table.names
        found = gather((done.culprits, sorted({str(names[core]) for core in done.cores})))
        guilty = [(terms, cores) for terms, cores in found if terms] or found
        terms = sorted({term for some, _ in guilty for term in some}) or ["gradient"]
        cores = sorted({core for _, some in guilty for core in some})
        self.console.say(
            f"epoch {epoch} step {done.step + 1}: not finite: {', '.join(terms)}; step skipped; cores in the batch: "
            f"{', '.join(cores)}"
        )

    def _save_is_due(self) -> bool:
        minutes = self.config.output.save_every_minutes
        return is_main_process() and minutes > 0 and time.monotonic() - self.last_saved > 60 * minutes

    def _save_within_epoch(self, step: int, sums: TrainSums) -> None:
        """Save after a step, so that nothing of the epoch is lost; every rank comes here for the same step."""
        self.state.step, self.state.sums = step, sums
        ranks = rank_states(self.state)
        if is_main_process():
            self._save_last(ranks)

    def _save_last(self, ranks: list[dict[str, Any]] | None) -> None:
        content = capture(self.state, self.config, self.built.prepared, ranks)
        checkpoint.save(checkpoint_path(self.built.dir, LAST), content, keep_previous=True)
        self.last_saved = time.monotonic()

    def _step_log(self) -> StepLog | None:
        if not is_main_process():
            return None
        run, state = self.built, self.state
        every = line_interval(self.config.output.log_every_steps, run.steps)
        patches = self.config.optimisation.batch_size * world_size()
        return StepLog(StepsWriter(run.dir), every, run.steps, patches, state.attempt, self.console.say)

    def _panel(self) -> SanityPanel | None:
        if not is_main_process() or self.config.output.sanity_check_freq == 0:
            return None
        places = torch.from_numpy(self.built.prepared.validation)
        feeds = self.built.feeds
        return SanityPanel(feeds.reader, feeds.transform, places, self.built.prepared.table.kept_names)

    def _interrupted(self, where: str | None = None) -> End:
        """The end after a request to stop, on every rank; the state has been saved."""
        codes = gather(self.interrupts.exit_code if self.interrupts.requested() else 0)
        if where is None:
            step = f"after step {self.state.step}" if self.state.step < self.built.steps else "before its validation"
            where = f"in epoch {self.state.epoch + 1} {step}"
        return End(
            "interrupted",
            f"interrupted {where}, state saved; the same command with --resume auto continues from here",
            max(codes) or 143,
        )

    def _complete(self, state: str, message: str) -> End:
        """The end of a run whose training is complete; recalibrates its best model."""
        if self.config.optimisation.recalibrate:
            self._recalibrate(checkpoint_path(self.built.dir, BEST))
        return End(state, message, FINISHED)

    def _recalibrate(self, best: Path) -> None:
        """Fit the recalibration of the best model to training patches and add it to best.pt, unless it has one."""
        try:
            content = from_main_process(lambda: checkpoint.load(best) if best.exists() else None)
            if content is None or content.get("recalibration") is not None:
                return
            load_validated(self.state, content["model"])
        except InputError as error:
            self.console.say(f"warning: the best model is not recalibrated: {error}")
            return
        self._beat(state="validating")
        sums = RecalibrationSums(self.built)
        for places in sums.batches:
            if any_rank(self.interrupts.requested()):
                raise self._interrupted("after the last epoch, before the best model was recalibrated")
            sums.add(places)
            self._progress()
        found = sums.fit()
        if is_main_process():
            checkpoint.save(best, {**content, "recalibration": found.document()})
            self.console.say(f"best model recalibrated: {found.sentence()}")

    def _early_stop_message(self) -> str:
        stopping = self.state.early_stopping
        return f"stopped early: no better {stopping.measure} for {stopping.bad_epochs} epochs"

    def _end(self, end: End) -> int:
        self.console.end_bar()
        self._beat(state=end.state, message=end.message)
        self.console.say(end.message)
        stopping = self.state.early_stopping
        best = checkpoint_path(self.built.dir, BEST)
        if stopping.best is not None:
            where = f"model in {best}" if best.exists() else f"its model is not in {best.parent}"
            pearson = f"val Pearson {stopping.best:.5f}, " if stopping.best_by == "pearson" else ""
            self.console.say(f"best epoch {stopping.best_epoch}: {pearson}val loss {stopping.best_loss:.5f}, {where}")
        if end.exit_code == FINISHED:
            self.console.say(f"next: python monitor_training.py --output_dir {self.built.dir}")
        return end.exit_code

    def _fail(self, error: Exception) -> None:
        """Leave the cause in status.json; a rank that was lost may have left its own."""
        if is_main_process() and not isinstance(error, InputError):
            plain = plain_failure(error, self.config)
            causes = [str(plain) if plain else f"{type(error).__name__}: {error}", *noted_failures(self.built.dir)]
            self._beat(state="failed", message="; ".join(causes))

    def _progress(self, **fields: Any) -> None:
        """A step or a validation batch has been finished."""
        self.watchdog.progress()
        if self.heartbeat is not None:
            self.heartbeat.progress(**fields)

    def _beat(self, **fields: Any) -> None:
        if self.heartbeat is not None:
            epochs, steps = self.config.optimisation.epochs, self.built.steps
            self.heartbeat.update(epochs=epochs, steps_per_epoch=steps, **fields)
