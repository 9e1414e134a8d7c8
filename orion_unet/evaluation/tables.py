"""The scores on a terminal: as many columns as fit its width."""

from __future__ import annotations

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from orion_unet.cell_metrics import CELL_METRICS
from orion_unet.evaluation.cell_scores import CellScores
from orion_unet.evaluation.scorecard import MEAN, MODEL, OVERALL, REGRESSION, Scorecard, number
from orion_unet.text import clean

# From this width on there is room for every column.
WIDE = 120
NAME_WIDTH = 18
INTERVAL = "95 % interval"


def marker_table(card: Scorecard, width: int | None = None) -> Table:
    """Scores per marker, best Pearson first, and overall, for a terminal of ``width`` columns (None: this one)."""
    wide = (width or Console().width) >= WIDE
    with_intervals = bool(card.without)
    metrics = {"pearson_boxes": "8x8", "spearman": "Spearman", "mae": "MAE", "psnr_db": "PSNR", "ssim": "SSIM",
               "auc": "AUC", "average_precision": "AP", "fraction_positive": "positive"}  # fmt: skip
    if not wide:
        metrics = {name: metrics[name] for name in ("pearson_boxes", "psnr_db", "ssim", "auc")}
    table = _table("marker", "Pearson", *([INTERVAL] if with_intervals else []), *metrics.values())
    table.caption = "8x8: Pearson over boxes of 8 x 8 pixels."
    if REGRESSION in card.values:
        table.add_column("colours r", justify="right")
        table.caption += " colours r: Pearson of the regression from colours."
    if wide:
        for baseline, title in ((MEAN, "mean PSNR"), (REGRESSION, "colours PSNR")):
            if baseline in card.values:
                table.add_column(title, justify="right")
    order = np.argsort(np.nan_to_num(card.values[MODEL]["pearson"], nan=-2))[::-1].tolist()
    for marker in [*order, None]:
        value, low, high = card.score(MODEL, "pearson", marker)
        row = [number(value, "pearson")]
        if with_intervals:
            row.append(_range(low, high))
        row += [number(card.score(MODEL, metric, marker)[0], metric) for metric in metrics]
        if REGRESSION in card.values:
            row.append(number(card.score(REGRESSION, "pearson", marker)[0], "pearson"))
        if wide:
            for baseline in (MEAN, REGRESSION):
                if baseline in card.values:
                    row.append(number(card.score(baseline, "psnr_db", marker)[0], "psnr_db"))
        _add(table, OVERALL if marker is None else card.names[marker], row)
    return table


def cell_table(names: tuple[str, ...], scores: CellScores) -> Table:
    """Scores over cells per marker, best Pearson first, and overall."""
    with_intervals = any(np.isfinite(ends).any() for ends in scores.low.values())
    table = _table("marker", "Pearson", "AUC", "AP", "F1", *([INTERVAL] if with_intervals else []), "positive")
    order = np.argsort(np.nan_to_num(scores.values["pearson"], nan=-2))[::-1].tolist()
    for marker in [*order, None]:
        values = {
            metric: scores.overall[metric][0] if marker is None else scores.values[metric][marker]
            for metric in CELL_METRICS
        }
        low, high = (
            scores.overall["f1"][1:] if marker is None else (scores.low["f1"][marker], scores.high["f1"][marker])
        )
        row = [number(values[metric], metric) for metric in CELL_METRICS]
        if with_intervals:
            row.insert(4, _range(low, high))
        _add(table, OVERALL if marker is None else names[marker], row)
    return table


def show(table: Table, title: str) -> None:
    """Print a table under its title, within the terminal's width."""
    console = Console()
    console.print(Text(clean(title, None)), style="bold")
    console.print(table)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1), caption_justify="left")
    table.add_column(columns[0], no_wrap=True, max_width=NAME_WIDTH, overflow="ellipsis")
    for name in columns[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _add(table: Table, name: str, row: list[str]) -> None:
    # Text, so that a name like CD3[e] is not taken for markup.
    table.add_row(Text(clean(name)), *row, style="bold" if name == OVERALL else None)


def _range(low: float, high: float) -> str:
    return f"{low:.3f}–{high:.3f}" if np.isfinite(low) and np.isfinite(high) else "-"
