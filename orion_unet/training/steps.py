"""The lines of steps.jsonl: what the steps within an epoch came to, gathered from numbers that the host has anyway."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from orion_unet.run_log import StepsWriter, utc_now
from orion_unet.training.engine import Step

LINES_AN_EPOCH = 20


def line_interval(wanted: int | None, steps: int) -> int:
    """Steps from one line to the next in an epoch of ``steps``; 0 for no lines. ``wanted`` None: about
    LINES_AN_EPOCH lines an epoch."""
    return max(1, round(steps / LINES_AN_EPOCH)) if wanted is None else wanted


class StepLog:
    """Gathers the steps of one epoch on rank 0 and writes a line every ``every`` steps (0: none).

    A line is also written after the last step of the epoch, and before a save or a stop within it: a run that goes on
    from there repeats nothing that the line covers. It waits for no device. Of a line,

    - ``loss`` is the mean of the finite losses since the last line, of the batches of rank 0 only;
    - ``grad_norm`` is the largest finite norm since the last line, before clipping, of the gradient of all ranks;
    - ``samples_per_s`` counts all ranks, ``data_wait_fraction`` is of rank 0;
    - ``skipped_steps`` counts the optimiser steps skipped since the last line on all ranks, ``non_finite_steps`` those
      of them that were no ordinary overflow of float16.

    ``patches`` is the number of patches of a step on all ranks. A line that cannot be written is lost, and ``say`` is
    called about the first such failure of the run: training goes on.
    """

    def __init__(
        self, writer: StepsWriter, every: int, steps: int, patches: int, attempt: int, say: Callable[[str], None]
    ) -> None:
        self.writer = writer
        self.every = every
        self.steps = steps
        self.patches = patches
        self.attempt = attempt
        self._say = say
        self._failed = False
        self._norm: float | None = None
        self.begin(0)

    def begin(self, epoch: int) -> None:
        """Start an epoch (from 1), whose first step begins now."""
        self._epoch = epoch
        self._waited = 0.0
        self._clear()

    def add(self, done: Step, rate: float, waited_s: float) -> None:
        """Note a finished step, its learning rate, and how long the epoch has waited for data so far [s]."""
        if not self.every:
            return
        self._count += 1
        self._skipped += done.bad
        self._non_finite += done.bad and not done.overflow
        if math.isfinite(done.loss):
            self._loss += done.loss
            self._finite += 1
        if done.grad_norm is not None and math.isfinite(done.grad_norm):
            self._norm = done.grad_norm if self._norm is None else max(self._norm, done.grad_norm)
        at = done.step + 1
        if at % self.every == 0 or at == self.steps or done.save or done.stop:
            self._write(at, rate, waited_s)

    def _write(self, step: int, rate: float, waited_s: float) -> None:
        elapsed = time.perf_counter() - self._started
        record: dict[str, Any] = {
            "epoch": self._epoch,
            "step": step,
            "attempt": self.attempt,
            "time": utc_now(),
            "loss": self._loss / self._finite if self._finite else None,
            "lr": rate,
            "grad_norm": self._norm,
            "samples_per_s": self._count * self.patches / elapsed if elapsed > 0 else None,
            "data_wait_fraction": min(1.0, max(0.0, waited_s - self._waited) / elapsed) if elapsed > 0 else None,
            "skipped_steps": self._skipped,
            "non_finite_steps": self._non_finite,
        }
        try:
            self.writer.append(record)
        except OSError as error:
            if not self._failed:
                self._failed = True
                self._say(f"{self.writer.path}: cannot be written ({error.strerror or error}); training goes on")
        self._waited = waited_s
        self._clear()

    def _clear(self) -> None:
        self._started = time.perf_counter()
        self._count = self._finite = self._skipped = self._non_finite = 0
        self._loss = 0.0
        self._norm = None
