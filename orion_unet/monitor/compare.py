"""Several runs side by side: their results, stability and speed, and the options in which they differ."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orion_unet.monitor.changed_options import ASIDE
from orion_unet.monitor.report import Report
from orion_unet.text import clean, duration, short_number


def run_names(reports: Sequence[Report]) -> list[str]:
    """Names that distinguish the runs: folder names, or whole paths where two folders have one name."""
    names = [clean(Path(report.run).name or report.run, 40) for report in reports]
    return [
        name if names.count(name) == 1 else clean(report.run, 100) for name, report in zip(names, reports, strict=True)
    ]


def differing_options(reports: Sequence[Report]) -> dict[str, list[Any]]:
    """The values, run by run, of every option that differs between runs; None where config.json lacks it."""
    known = [report.options for report in reports if report.options]
    names = list(dict.fromkeys(name for options in known for name in options))
    values = {name: [report.options.get(name) for report in reports] for name in names}
    distinct = {name: {_text(v) for v, r in zip(values[name], reports, strict=True) if r.options} for name in names}
    return {name: values[name] for name in names if len(distinct[name]) > 1 and name not in ASIDE}


def comparison(reports: Sequence[Report]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the table: one column per run, a star at the lowest validation loss."""
    losses = [report.val[report.best] if report.best is not None else float("inf") for report in reports]
    best_of_all = min(range(len(losses)), key=losses.__getitem__)
    rows = [
        ["state", *[report.life.state for report in reports]],
        ["epochs", *[_epochs(report) for report in reports]],
        ["best epoch", *[str(r.epochs[r.best]) if r.best is not None else "-" for r in reports]],
        [
            "best validation loss" if all(r.best_by == "loss" for r in reports) else "validation loss there",
            *[
                short_number(loss) + (" *" if at == best_of_all and loss < float("inf") else "")
                for at, loss in enumerate(losses)
            ],
        ],
        ["Pearson there", *[short_number(_at_best(report, "pearson"), 3) for report in reports]],
        ["noise of validation loss", *[short_number(report.noise, 2) for report in reports]],
        ["gap, validation - training", *[short_number(report.gap, 3) for report in reports]],
        ["time per epoch", *[duration(report.epoch_s) for report in reports]],
        ["warnings", *[", ".join(finding.code for finding in report.warnings) or "none" for report in reports]],
    ]
    for name, values in differing_options(reports).items():
        shown = [_text(v) if r.options else "unknown" for v, r in zip(values, reports, strict=True)]
        rows.append([f"--{clean(name, 40)}", *shown])
    return ["", *run_names(reports)], rows


def comparison_document(reports: Sequence[Report]) -> dict[str, Any]:
    """The comparison as plain values for ``--json``."""
    return {
        "runs": [report.document() for report in reports],
        "differing_options": {clean(k): [_text(v) for v in vs] for k, vs in differing_options(reports).items()},
    }


def _at_best(report: Report, column: str) -> float:
    return float(report.reader.column(column)[report.best]) if report.best is not None else float("nan")


def _epochs(report: Report) -> str:
    return f"{len(report.epochs)}" + (f" of {report.planned}" if report.planned else "")


def _text(value: Any) -> str:
    return clean(value if isinstance(value, str) else json.dumps(value), 60)
