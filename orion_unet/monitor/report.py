"""A run at one moment: read, judged, and ready to be shown or printed as JSON."""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from orion_unet.errors import InputError
from orion_unet.findings import WARNING, Finding
from orion_unet.monitor.advice import AUTOMATIC_RATE, judge_config, option_number
from orion_unet.monitor.diagnostics import Thresholds, diagnose
from orion_unet.monitor.gpus import Gpu, Gpus
from orion_unet.monitor.liveness import Life, Liveness
from orion_unet.monitor.marker_rules import diagnose_markers
from orion_unet.monitor.noise import validation_noise
from orion_unet.monitor.resource_rules import Usage, diagnose_resources
from orion_unet.monitor.run_reader import MetricsReader
from orion_unet.monitor.step_curves import StepCurves, newest_curves, step_curves
from orion_unet.monitor.step_rules import diagnose_steps
from orion_unet.monitor.steps_reader import EPOCH, GRAD, LOSS, LR, SPEED, STEP, WAIT, StepsReader
from orion_unet.run_log import CONFIG_FILE, METRICS_FILE, SCHEMA, STATUS_FILE, STEPS_FILE, read_document, strict

# With one of these, a run is not advised to learn faster.
UNCALM = {"unstable_validation", "diverged", "rising_steps", "growing_gradients", "non_finite_steps"}
ENDED = ("finished", "early_stopped", "interrupted", "diverged", "failed", "crashed")


@dataclass
class Report:
    """A run at one moment. Text from its files (names, messages, options) is as found: clean it before showing it."""

    run: str
    life: Life
    reader: MetricsReader
    steps: StepsReader
    status: Mapping[str, Any]
    config: Mapping[str, Any]
    thresholds: Thresholds
    findings: list[Finding]
    config_findings: list[Finding]
    gpus: Sequence[Gpu] = ()
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.epochs = self.reader.column("epoch").astype(int)
        self.train = self.reader.column("train_loss")
        self.val = self.reader.column("val_loss")

    @property
    def options(self) -> Mapping[str, Any]:
        """The run's options; empty if config.json does not list them."""
        options = self.config.get("options")
        return options if isinstance(options, Mapping) else {}

    @property
    def planned(self) -> int | None:
        """Number of epochs that the run is meant to have."""
        for value in (option_number(self.status, "epochs"), option_number(self.options, "epochs")):
            if value is not None and 0 < value < 1e9:
                return int(value)
        return None

    @property
    def current_epoch(self) -> int:
        """The epoch that the run is in, or its last one."""
        now = int(self.epochs[-1]) if len(self.epochs) else 0
        if self.life.state in ("training", "validating", "stalled", "crashed"):
            begun = option_number(self.status, "epoch")
            now = max(now, int(begun) if begun is not None and 0 < begun < 1e9 else 0)
        return now

    @property
    def steps_per_epoch(self) -> int | None:
        """Number of steps of an epoch, None where status.json does not give it."""
        value = option_number(self.status, "steps_per_epoch")
        return int(value) if value is not None and 1 <= value < 1e12 else None

    @cached_property
    def curves(self) -> StepCurves:
        """The curves of the steps of the whole run."""
        return step_curves(self.steps.history(), self.steps_per_epoch)

    @cached_property
    def newest_curves(self) -> StepCurves:
        """The curves of the steps of this epoch and the one before it."""
        return newest_curves(self.steps, self.steps_per_epoch)

    @cached_property
    def newest_step(self) -> dict[str, float] | None:
        """The newest line of steps.jsonl: epoch, step, loss, smoothed loss, rate, largest gradient norm of this epoch,
        patches per second, share of the time spent waiting for data; None without steps."""
        rows = self.steps.recent()
        if not len(rows):
            return None
        row, grads = rows[-1], rows[rows[:, EPOCH] == rows[-1, EPOCH], GRAD]
        return {
            "epoch": row[EPOCH],
            "step": row[STEP],
            "loss": row[LOSS],
            "smoothed_loss": float(self.newest_curves.smooth[-1]),
            "lr": row[LR],
            "largest_grad_norm": float(np.fmax.reduce(grads)),
            "samples_per_s": row[SPEED],
            "data_wait_fraction": row[WAIT],
        }

    @property
    def best_by(self) -> str:
        """What the run's best epoch is chosen by: "loss", or "pearson" where the options say so."""
        return "pearson" if self.options.get("best_by") == "pearson" else "loss"

    @property
    def best(self) -> int | None:
        """Index of the best epoch: of the lowest validation loss, or the highest validation Pearson; see best_by."""
        value = self.val if self.best_by == "loss" else -self.reader.column("pearson")
        finite = np.isfinite(self.val) & np.isfinite(value)
        return int(np.where(finite, value, np.inf).argmin()) if finite.any() else None

    @property
    def best_name(self) -> str:
        """What best_value is."""
        return "validation loss" if self.best_by == "loss" else "validation Pearson"

    @property
    def best_value(self) -> float:
        """Validation loss or Pearson of the best epoch, whichever it was chosen by; NaN where there is none."""
        if self.best is None:
            return math.nan
        return float((self.val if self.best_by == "loss" else self.reader.column("pearson"))[self.best])

    @property
    def epoch_s(self) -> float | None:
        """Seconds an epoch takes."""
        return recent_epoch_s(self.reader)

    @property
    def left_s(self) -> float | None:
        """Seconds left if all planned epochs take as long as the recent ones; None if the run is over or stalled."""
        if self.epoch_s is None or self.planned is None or not len(self.epochs):
            return None
        if self.life.state in (*ENDED, "stalled"):
            return None
        return max(self.planned - int(self.epochs[-1]), 0) * self.epoch_s

    @property
    def warnings(self) -> list[Finding]:
        """The findings that are warnings; the others are notices."""
        return [finding for finding in self.findings if finding.severity == WARNING]

    @property
    def noise(self) -> float:
        """Noise of the validation loss around its trend; nan where there are too few epochs."""
        return validation_noise(self.val, self.train)

    @property
    def gap(self) -> float:
        """Validation minus training loss, the median of the last five epochs; nan where not measured."""
        recent = finite_or_nan(self.val[-5:]) - finite_or_nan(self.train[-5:])
        recent = recent[np.isfinite(recent)]
        return float(np.median(recent)) if len(recent) else math.nan

    def document(self) -> dict[str, Any]:
        """The report as plain values for strict JSON: what ``--json`` prints and monitor.json contains."""
        best = self.best
        return {
            "schema": SCHEMA,
            "run": self.run,
            "state": self.life.state,
            "reason": self.life.reason,
            "heartbeat_age_s": plain(self.life.age_s),
            "message": str(self.status.get("message") or "")[:1000],
            "epochs": len(self.epochs),
            "epochs_planned": self.planned,
            "best_by": self.best_by,
            "best_epoch": int(self.epochs[best]) if best is not None else None,
            "best_val_loss": float(self.val[best]) if best is not None else None,
            "best_pearson": plain(self.reader.column("pearson")[best]) if best is not None else None,
            "train_loss": plain(self.train[-1]) if len(self.train) else None,
            "val_loss": plain(self.val[-1]) if len(self.val) else None,
            "noise": plain(self.noise),
            "gap": plain(self.gap),
            "epoch_s": plain(self.epoch_s),
            "left_s": plain(self.left_s),
            "newest_step": self._newest_step_document(),
            "gpus": [gpu.document() for gpu in self.gpus],
            "damaged_lines": self.reader.damaged_lines,
            "warnings": [finding.document() for finding in self.findings],
            "config_findings": [finding.document() for finding in self.config_findings],
            "notes": self.notes,
        }

    def _newest_step_document(self) -> dict[str, float | int | None] | None:
        if self.newest_step is None:
            return None
        values = {name: plain(value) for name, value in self.newest_step.items()}
        return values | {name: int(self.newest_step[name]) for name in ("epoch", "step")}


class Run:
    """A run folder that is read again and again, every ``interval_s`` seconds. Several runs may share ``gpus``."""

    def __init__(
        self, run_dir: Path, thresholds: Thresholds, interval_s: float = 0.0, gpus: Gpus | None = None
    ) -> None:
        self.run_dir = run_dir
        self.thresholds = thresholds
        self.reader = MetricsReader(run_dir)
        self.steps = StepsReader(run_dir)
        self.gpus = gpus or Gpus(interval_s)
        self._liveness = Liveness(run_dir, thresholds.stalled_after, interval_s)

    def poll(self) -> Report:
        """Read what is new and judge it. Raises InputError if the folder is not a run or cannot be read."""
        if not self.run_dir.is_dir():
            what = "is not a folder" if self.run_dir.exists() else "does not exist"
            raise InputError(f"{self.run_dir} {what}: give --output_dir the folder of a run")
        notes: list[str] = []
        status, beat = self._document(STATUS_FILE, notes)
        config, _ = self._document(CONFIG_FILE, notes)
        try:
            self.reader.poll()
        except OSError as error:
            raise _unreadable(self.reader.path, error) from None
        try:
            self.steps.poll()
        except OSError as error:
            notes.append(f"{self.steps.path} cannot be read ({error.strerror or error})")
        self._check(status, config)
        reader = self.reader
        life = self._liveness.judge(status, beat, recent_epoch_s(reader))
        epochs, train, val = (reader.column(name) for name in ("epoch", "train_loss", "val_loss"))
        options = (config or {}).get("options")
        options = dict(options) if isinstance(options, Mapping) else {}
        options[AUTOMATIC_RATE] = option_number(config or {}, AUTOMATIC_RATE)
        findings = [life.finding] if life.finding else []
        r2, rate = reader.column("r2"), reader.column("lr")
        findings += diagnose(epochs, train, val, self.thresholds, options, r2, rate)
        recent = self.steps.recent()
        findings += diagnose_steps(self.steps.history(), recent, self.thresholds, options)
        waits, memory = reader.column("data_wait_fraction"), reader.column("max_memory_bytes")
        gpus = self._gpus(life, status or {}, config or {})
        usage = Usage(epochs, waits, memory, recent, gpus)
        findings += diagnose_resources(usage, self.thresholds, config or {}, options)
        if len(epochs):
            findings += diagnose_markers(int(epochs[-1]), reader.channels.newest(), config or {}, options)
        calm = not UNCALM & {finding.code for finding in findings}
        for log, name in ((reader, METRICS_FILE), (self.steps, STEPS_FILE)):
            if log.damaged_lines:
                lines = f"{log.damaged_lines} damaged line{'s' if log.damaged_lines > 1 else ''}"
                notes.append(f"{lines} of {name} left out")
        if reader.channels.left_out:
            notes.append(f"{reader.channels.left_out} markers beyond the first {len(reader.channels.names)} left out")
        return Report(
            run=str(self.run_dir),
            life=life,
            reader=reader,
            steps=self.steps,
            status=status or {},
            config=config or {},
            thresholds=self.thresholds,
            findings=findings,
            config_findings=judge_config(config or {}, calm),
            gpus=gpus,
            notes=notes,
        )

    def _gpus(self, life: Life, status: Mapping[str, Any], config: Mapping[str, Any]) -> Sequence[Gpu]:
        """This machine's GPUs, if the run goes on here and on a GPU."""
        here = status.get("host") == socket.gethostname() and life.state not in (*ENDED, "waiting")
        device = config.get("device")
        return self.gpus.read() if here and isinstance(device, str) and "CPU" not in device else ()

    def _document(self, name: str, notes: list[str]) -> tuple[dict[str, Any] | None, float]:
        path = self.run_dir / name
        try:
            document, modified = read_document(path)
        except FileNotFoundError:
            return None, -1.0
        except OSError as error:
            raise _unreadable(path, error) from None
        if document is None:
            notes.append(f"{name} is not a JSON object and was left out")
        return document, modified

    def _check(self, status: Mapping[str, Any] | None, config: Mapping[str, Any] | None) -> None:
        """Refuse a folder that is not a run, or a run of another schema."""
        reader = self.reader
        for name, document in ((STATUS_FILE, status), (CONFIG_FILE, config)):
            if document is not None and document.get("schema", SCHEMA) != SCHEMA:
                raise _foreign(self.run_dir / name, document["schema"])
        if len(reader) == 0 and reader.foreign_schema is not None:
            raise _foreign(reader.path, reader.foreign_schema)
        if status is None and config is None and len(reader) == 0:
            if reader.damaged_lines:
                raise InputError(f"{reader.path} contains no line that this monitor can read as an epoch")
            if not any((self.run_dir / name).exists() for name in (STATUS_FILE, CONFIG_FILE, METRICS_FILE)):
                raise InputError(
                    f"{self.run_dir} is not a run folder (no {CONFIG_FILE}, {STATUS_FILE} or {METRICS_FILE})"
                )


def recent_epoch_s(reader: MetricsReader) -> float | None:
    """Seconds an epoch takes: the median of the last five."""
    recent = reader.column("duration_s")[-5:]
    recent = recent[np.isfinite(recent) & (recent >= 0)]
    return float(np.median(recent)) if len(recent) else None


def finite_or_nan(values: np.ndarray) -> np.ndarray:
    """The values, with nan in place of those that are not finite."""
    return np.where(np.isfinite(values), values, np.nan)


def _foreign(path: Path, schema: Any) -> InputError:
    return InputError(f"{path} was written with schema {schema!r:.40}; this monitor reads schema {SCHEMA}")


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(f"{path} cannot be read ({error.strerror or error})")


def to_json(document: Mapping[str, Any], indent: int | None = None) -> str:
    """Strict JSON in printable ASCII: whatever could move a cursor, or a terminal cannot encode, is escaped."""
    return json.dumps(strict(document), indent=indent, allow_nan=False)


def plain(value: Any) -> float | None:
    """A finite number, or None."""
    return float(value) if value is not None and math.isfinite(value) else None
