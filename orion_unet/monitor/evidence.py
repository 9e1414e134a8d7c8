"""The lines of a run's log that a finding rests on, as a table."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from orion_unet.findings import Lines
from orion_unet.monitor import steps_reader as steps
from orion_unet.monitor.report import Report
from orion_unet.run_log import METRICS_FILE
from orion_unet.text import short_number

MOST_ROWS = 24
_EPOCHS = (
    ("train", "train_loss"),
    ("val", "val_loss"),
    ("pearson", "pearson"),
    ("r2", "r2"),
    ("lr", "lr"),
    ("data wait", "data_wait_fraction"),
    ("memory [GiB]", "max_memory_bytes"),
)
_STEPS = (
    ("loss", steps.LOSS),
    ("lr", steps.LR),
    ("largest gradient", steps.GRAD),
    ("data wait", steps.WAIT),
    ("skipped", steps.SKIPPED),
    ("not finite", steps.NON_FINITE),
)


def evidence(report: Report, lines: Lines) -> tuple[str, list[str], list[list[str]]]:
    """A title, headings and rows for the lines of a finding; of many lines, MOST_ROWS at equal distances."""
    if lines.log == METRICS_FILE:
        within = (report.epochs >= lines.first[0]) & (report.epochs <= lines.last[0])
        places = [[str(epoch)] for epoch in report.epochs[within].tolist()]
        values = [(name, report.reader.column(column)[within]) for name, column in _EPOCHS]
        heads, what = ["epoch"], f"epochs {lines.first[0]} to {lines.last[0]}"
        if lines.first == lines.last:
            what = f"epoch {lines.first[0]}"
    else:
        rows = _step_rows(report, lines)
        places = [[f"{row[steps.EPOCH]:.0f}", f"{row[steps.STEP]:.0f}"] for row in rows]
        values = [(name, rows[:, column]) for name, column in _STEPS]
        heads = ["epoch", "step"]
        what = " to ".join(f"epoch {epoch} step {step}" for epoch, step in (lines.first, lines.last))
    # Leave out columns without any value.
    values = [(name, column) for name, column in values if not np.isnan(column).all()]
    kept = np.unique(np.linspace(0, len(places) - 1, min(MOST_ROWS, len(places))).round().astype(int))
    table = [[*places[at], *(_cell(name, float(column[at])) for name, column in values)] for at in kept.tolist()]
    some = f", {len(kept)} of {len(places)} lines" if len(kept) < len(places) else ""
    return f"{lines.log}, {what}{some}", [*heads, *(name for name, _ in values)], table


def _step_rows(report: Report, lines: Lines) -> np.ndarray:
    """The newest lines as they are, or, where they do not go back so far, the run's points."""
    for rows in (report.steps.recent(), report.steps.history()):
        where: Sequence[tuple[int, ...]] = [(int(e), int(s)) for e, s in rows[:, [steps.EPOCH, steps.STEP]].tolist()]
        if where and where[0] <= lines.first:
            break
    within = [lines.first <= place <= lines.last for place in where]
    found: np.ndarray = rows[np.array(within, bool)]
    return found


def _cell(name: str, value: float) -> str:
    if name == "data wait" and np.isfinite(value):
        return f"{value:.0%}"
    return short_number(value / 2**30, 3) if "GiB" in name else short_number(value)
