"""Finds early what goes wrong within the epochs: pure functions, arrays in, findings out.

Rows of steps are those of ``steps_reader``: the newest lines, and the whole run in points.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from orion_unet.findings import WARNING, Finding, Lines
from orion_unet.monitor import advice
from orion_unet.monitor.diagnostics import Thresholds
from orion_unet.monitor.steps_reader import COVERED, EPOCH, GRAD, LOSS, NON_FINITE, SKIPPED, STEP
from orion_unet.run_log import STEPS_FILE

# A third of so many points has enough of them for a slope.
LEAST_POINTS = 18
# A slope must exceed its own standard error by this factor, and by more where few points make it uncertain.
SURE, SURE_OF_FEW = 4.0, 2.0
# The gradient norm now is the median of this share of the lines.
NOW = 1 / 5
# Counts are taken over about an epoch: so many lines.
WINDOW_LINES = 20
# float16's scaler looks for its scale at the start of a run, in steps that overflow.
SCALER_STEPS = 100
LEAST_SKIPPED, LEAST_NON_FINITE = 5, 3


def diagnose_steps(
    history: np.ndarray, recent: np.ndarray, limits: Thresholds, options: Mapping[str, Any]
) -> list[Finding]:
    """Judge the steps of a run: all of it in points (N, len(COLUMNS)) and its newest lines (M, len(COLUMNS)).

    ``options`` are the run's own, as in ``diagnose``. Returns the findings, the worst first.
    """
    found = [
        _non_finite(recent, limits, options),
        _rising(history, limits, options),
        _growing(recent, limits, options),
        _skipped(history, recent, limits, options),
    ]
    return [finding for finding in found if finding is not None]


def _rising(history: np.ndarray, limits: Thresholds, options: Mapping[str, Any]) -> Finding | None:
    rows = history[np.isfinite(history[:, LOSS])]
    third = len(rows) // 3
    if len(rows) < LEAST_POINTS:
        return None
    last, before = rows[-third:, LOSS], rows[-2 * third : -third, LOSS]
    at = np.linspace(-0.5, 0.5, third)
    rise = float((at @ (last - last.mean())) / (at @ at))
    rest = last - last.mean() - rise * at
    error = math.sqrt(float(rest @ rest) / (third - 2) / float(at @ at))
    # Noise that lasts for several lines makes a slope less certain than independent noise does.
    memory = float(rest[1:] @ rest[:-1]) / max(float(rest @ rest), 1e-300)
    memory = min(max(memory, 0.0), 0.9)
    error *= math.sqrt((1 + memory) / (1 - memory))
    level, start = float(np.median(before)), float(last.mean()) - rise / 2
    if rise <= limits.max_rise * max(abs(start), 1e-12) or rise <= SURE * (1 + SURE_OF_FEW / (third - 2)) * error:
        return None
    # A loss that comes back from a sudden fall only returns to where it was.
    if float(np.median(last[-max(third // 3, 2) :])) <= level:
        return None
    first, end = rows[-third], rows[-1]
    return Finding(
        "rising_steps",
        WARNING,
        f"loss of the steps rises by {rise / max(abs(start), 1e-12):.0%} over their last third, from {start:.4g} to "
        f"{start + rise:.4g} between {step_place(first)} and {step_place(end)}",
        rise / max(abs(start), 1e-12),
        limits.max_rise,
        advice.rising(options),
        step_lines(rows[-2 * third :]),
    )


def _growing(recent: np.ndarray, limits: Thresholds, options: Mapping[str, Any]) -> Finding | None:
    rows = recent[np.isfinite(recent[:, GRAD])]
    if len(rows) < LEAST_POINTS:
        return None
    newest = max(5, round(len(rows) * NOW)) if len(rows) < 5 * WINDOW_LINES else WINDOW_LINES
    now, earlier = float(np.median(rows[-newest:, GRAD])), float(np.median(rows[:-newest, GRAD]))
    if earlier <= 0 or now <= limits.max_gradient_growth * earlier:
        return None
    clip = advice.option_number(options, "grad_clip")
    clipped = f", clipped to {clip:g}" if clip and 0 < clip < now else ""
    return Finding(
        "growing_gradients",
        WARNING,
        f"largest gradient norm {now:.3g}{clipped} (median since {step_place(rows[-newest])}), {now / earlier:.3g} "
        f"times that of the steps before ({earlier:.3g})",
        now / earlier,
        limits.max_gradient_growth,
        advice.diverged(options),
        step_lines(rows[-2 * newest :]),
    )


def _non_finite(recent: np.ndarray, limits: Thresholds, options: Mapping[str, Any]) -> Finding | None:
    window = recent[-WINDOW_LINES:]
    count, steps = float(np.nansum(window[:, NON_FINITE])), float(np.nansum(window[:, COVERED]))
    if count < LEAST_NON_FINITE or count <= limits.max_non_finite * steps:
        return None
    last = window[np.nan_to_num(window[:, NON_FINITE]) > 0][-1]
    return Finding(
        "non_finite_steps",
        WARNING,
        f"loss or gradient of {count:.0f} of the last {max(steps, count):.0f} steps was not finite, so they were "
        f"skipped; the last ones before {step_place(last)}",
        count / max(steps, count),
        limits.max_non_finite,
        advice.not_finite(options),
        step_lines(window),
    )


def _skipped(history: np.ndarray, recent: np.ndarray, limits: Thresholds, options: Mapping[str, Any]) -> Finding | None:
    """Overflows of float16, which are ordinary where there are few."""
    done = float(np.nansum(history[:, COVERED]))
    window = recent[-WINDOW_LINES:]
    # The steps before the window, and in it, count from the start of the run.
    passed = done - np.nansum(window[:, COVERED]) + np.cumsum(np.nan_to_num(window[:, COVERED]))
    window = window[passed - np.nan_to_num(window[:, COVERED]) >= SCALER_STEPS]
    steps = float(np.nansum(window[:, COVERED]))
    count = float(np.nansum(window[:, SKIPPED]) - np.nansum(window[:, NON_FINITE]))
    if count < LEAST_SKIPPED or count <= limits.max_skipped * steps:
        return None
    return Finding(
        "skipped_steps",
        WARNING,
        f"{count:.0f} of the last {max(steps, count):.0f} steps were skipped: their gradient overflowed in float16",
        count / max(steps, count),
        limits.max_skipped,
        advice.overflowing(options),
        step_lines(window),
    )


def step_lines(rows: np.ndarray) -> Lines:
    """The lines of these steps, from the first to the last."""
    first, last = ((int(row[EPOCH]), int(row[STEP])) for row in (rows[0], rows[-1]))
    return Lines(STEPS_FILE, first, last)


def step_place(row: np.ndarray) -> str:
    """Epoch and step of a row, in words."""
    return f"epoch {row[EPOCH]:.0f} step {row[STEP]:.0f}"
