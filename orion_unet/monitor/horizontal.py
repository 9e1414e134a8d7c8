"""What the horizontal axis of a figure counts: epochs, steps, patches, or hours of training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from orion_unet.monitor.advice import option_number
from orion_unet.monitor.report import Report
from orion_unet.monitor.steps_reader import STEP

LABELS = {"epoch": "epoch", "step": "step", "patches": "patches seen", "hours": "hours of training"}


@dataclass(frozen=True)
class Horizontal:
    """The axis: its label, and places on it (K,) that belong to ``epochs`` (K,), both rising, K at least 2."""

    label: str
    epochs: np.ndarray
    places: np.ndarray

    def of(self, epochs: np.ndarray | float) -> np.ndarray:
        """Where epochs are on the axis, float64 of the same shape: straight lines between and beyond the known ones."""
        at = np.asarray(epochs, float)
        after = np.clip(np.searchsorted(self.epochs, at, side="right"), 1, len(self.epochs) - 1)
        rise = np.diff(self.places) / np.diff(self.epochs)
        return self.places[after - 1] + rise[after - 1] * (at - self.epochs[after - 1])


EPOCHS = Horizontal(LABELS["epoch"], np.array([0.0, 1.0]), np.array([0.0, 1.0]))


def horizontals(reports: Sequence[Report], kind: str) -> list[Horizontal]:
    """The axis of each run for one of ``LABELS``; that of epochs for all where a run does not say what is needed."""
    found = [axis for axis in (_horizontal(report, kind) for report in reports) if axis is not None]
    return found if len(found) == len(reports) else [EPOCHS] * len(reports)


def _horizontal(report: Report, kind: str) -> Horizontal | None:
    if kind == "epoch":
        return EPOCHS
    if kind == "hours":
        return _hours(report)
    length = float(report.steps_per_epoch or _longest(report))
    if kind == "patches":
        # The trainer writes the patches of an optimiser step, which may be several steps of the loop.
        batch = option_number(report.config, "global_batch") or 0.0
        length *= batch / max(option_number(report.options, "accumulate_steps") or 1.0, 1.0)
    return Horizontal(LABELS[kind], EPOCHS.epochs, EPOCHS.places * length) if length > 0 else None


def _hours(report: Report) -> Horizontal | None:
    """Epochs without a duration count as long as the median of the others."""
    taken = report.reader.column("duration_s") / 3600
    known = taken[(taken > 0) & (taken < 1e6)]
    if not len(known):
        return None
    usual = np.median(known)
    taken = np.where((taken > 0) & (taken < 1e6), taken, usual)
    before = np.diff(report.epochs, prepend=0)
    # An epoch in progress takes as long as the usual one.
    epochs = np.concatenate([[0], report.epochs, report.epochs[-1:] + 1])
    places = np.concatenate([[0], np.cumsum(taken * before)])
    return Horizontal(LABELS["hours"], epochs.astype(float), np.append(places, places[-1] + usual))


def _longest(report: Report) -> float:
    rows = report.steps.history()
    return float(rows[:, STEP].max(initial=0.0))
