"""The curves of the steps, as figures and terminal show them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from orion_unet.monitor.steps_reader import EPOCH, GRAD, LOSS, LR, STEP, StepsReader

# A smoothed value is the mean of this share of the curve, of at least and at most so many points.
SMOOTH_SHARE, SMOOTH_LEAST, SMOOTH_MOST = 1 / 20, 4, 50


@dataclass(frozen=True)
class StepCurves:
    """Curves over the steps (N,): ``at`` is the place in epochs (1.5: in the middle of epoch 2), ``loss`` inf where
    not finite, ``smooth`` the loss smoothed, ``rate`` and ``grad`` nan where not measured."""

    at: np.ndarray
    loss: np.ndarray
    smooth: np.ndarray
    rate: np.ndarray
    grad: np.ndarray

    def __len__(self) -> int:
        return len(self.at)


def step_curves(rows: np.ndarray, steps_per_epoch: int | None) -> StepCurves:
    """Curves of the rows of a StepsReader. Without ``steps_per_epoch``, the last step of any epoch is its end."""
    longest = steps_per_epoch or (float(rows[:, STEP].max()) if len(rows) else 1.0)
    at = rows[:, EPOCH] - 1 + np.minimum(rows[:, STEP] / longest, 1.0)
    return StepCurves(at, rows[:, LOSS], smoothed(rows[:, LOSS]), rows[:, LR], rows[:, GRAD])


def newest_curves(reader: StepsReader, steps_per_epoch: int | None, epochs: int = 2) -> StepCurves:
    """The curves of the last ``epochs`` epochs that have begun."""
    rows = reader.recent()
    if len(rows):
        rows = rows[rows[:, EPOCH] > rows[-1, EPOCH] - epochs]
    return step_curves(rows, steps_per_epoch)


def smoothed(values: np.ndarray) -> np.ndarray:
    """The mean of each value and of those before it, of four or a twentieth of the curve together; nan where none of
    them is finite."""
    width = int(np.clip(round(len(values) * SMOOTH_SHARE), SMOOTH_LEAST, SMOOTH_MOST))
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    first = np.maximum(np.arange(len(values)) + 1 - width, 0)
    total, count = sums[1:] - sums[first], counts[1:] - counts[first]
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
