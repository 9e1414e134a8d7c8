"""What an evaluation leaves behind: scores.csv, cores.csv, cells.csv, scores.json and three figures."""

from __future__ import annotations

import math
import os
import platform
import tempfile
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from orion_unet import __version__
from orion_unet.cell_metrics import CELL_METRICS
from orion_unet.evaluation.cell_scores import CellResult
from orion_unet.evaluation.figures import draw_markers, draw_patches, draw_scatter
from orion_unet.evaluation.results import Evaluation
from orion_unet.evaluation.scorecard import DUELS, MEAN, MODEL, OVERALL, REGRESSION, Scorecard, trust_of, verdicts
from orion_unet.evaluation.scores import BOX_PIXELS, METRICS, RANK_METRICS, SAMPLE_SEED, overall
from orion_unet.inference.ensemble import members_of
from orion_unet.inference.trust import RULE
from orion_unet.intervals import COVERAGE, LEAST_UNITS, LEVEL
from orion_unet.run_log import fsync_folder, utc_now, write_atomic, write_json
from orion_unet.text import csv_bytes

SCHEMA = 2
SCORES_CSV, CORES_CSV, CELLS_CSV, SCORES_JSON = "scores.csv", "cores.csv", "cells.csv", "scores.json"
MARKERS_PNG, SCATTER_PNG, PATCHES_PNG = "markers.png", "scatter.png", "patches.png"
FILES = (SCORES_JSON, SCORES_CSV, CORES_CSV, CELLS_CSV, MARKERS_PNG, SCATTER_PNG, PATCHES_PNG)
# A fraction of positive pixels is measured: every predictor has the same.
BASELINE_METRICS = tuple(metric for metric in METRICS if metric != "fraction_positive")


def write_files(found: Evaluation, folder: Path) -> None:
    """Write every file of an evaluation into a folder that exists, and remove what an earlier one has beside them.

    The files appear under their names when all of them are written, scores.json last: an earlier evaluation stays
    whole where this one fails. Raises OSError.
    """
    card = found.card
    with tempfile.TemporaryDirectory(prefix=".evaluation-", dir=folder) as scratch:
        new = Path(scratch)
        write_atomic(new / SCORES_CSV, csv_bytes(["marker", *score_columns()], score_rows(card)))
        stain = ["stain", "stain_distance"] if found.stain else []
        write_atomic(
            new / CORES_CSV, csv_bytes(["core", "group", "split", "marker", *METRICS, *stain], _core_rows(found))
        )
        if found.cells is not None:
            write_atomic(new / CELLS_CSV, csv_bytes(_cell_columns(), _cell_rows(card.names, found.cells)))
        write_atomic(new / MARKERS_PNG, draw_markers(card, [found.verdict for found in trust_of(card).values()]))
        write_atomic(new / SCATTER_PNG, draw_scatter(card, *found.samples))
        if found.patches:
            write_atomic(new / PATCHES_PNG, draw_patches(found.patches, card.names))
        write_json(new / SCORES_JSON, document(found))
        written = [name for name in FILES if (new / name).exists()]
        for name in reversed(written):
            os.replace(new / name, folder / name)
    for name in set(FILES) - set(written):
        (folder / name).unlink(missing_ok=True)
    fsync_folder(folder)


def document(found: Evaluation) -> dict[str, Any]:
    """Content of scores.json; what is undefined is null."""
    card, folder, model = found.card, found.folder, found.folder.model
    known, trust = folder.known, trust_of(card)
    return {
        "schema": SCHEMA,
        "created": utc_now(),
        "versions": versions(),
        "checkpoint": {"path": str(model.path), "epoch": model.epoch},
        "ensemble": [{"path": str(member.path), "epoch": member.epoch} for member in members_of(model)],
        "pairs_dir": str(found.options.pairs_dir),
        "split": found.options.split,
        "cores": [
            {
                "core": str(folder.table.names[core]),
                "in_training": known.names[core],
                "group": known.groups[core],
                "split": _side(found, core),
                **({"stain": stain.state, "stain_distance": stain.distance} if stain else {}),
            }
            for core, stain in zip(found.cores, found.stain or [None] * len(found.cores), strict=True)
        ],
        "stain_limit": found.stain[0].limit if found.stain else None,
        "matching": known.matching or None,
        "target": {
            "normalization": folder.normalization.method,
            "transform": folder.normalization.transform,
            "noise_removal": model.config.data.noise_removal,
            "range": [0, 1],
            # With the range of each marker, what makes stored values targets.
            "white": folder.normalization.white,
        },
        "box_pixels": BOX_PIXELS,
        "sample": {
            "metrics": list(RANK_METRICS),
            "pixels": int(found.samples[0].shape[1]),
            "share": found.share,
            "seed": SAMPLE_SEED,
        },
        "intervals": interval_document(
            folder.grouped, len({known.groups[core] for core in found.cores}), found.no_interval
        ),
        "baselines": found.baselines.note,
        "rule": RULE,
        "verdicts": [sentence.strip() for sentence in verdicts(card)],
        "warnings": list(found.warnings),
        "overall": json_scores(card, None),
        "markers": {
            name: {
                "verdict": trust[name].verdict,
                "cores": card.cores_with(marker),
                "positive_threshold": float(found.thresholds[marker]),
                "range": [float(folder.normalization.lower[marker]), float(folder.normalization.upper[marker])],
                **json_scores(card, marker),
            }
            for marker, name in enumerate(card.names)
        },
        "cells": None if found.cells is None else _cell_document(card.names, found.cells),
    }


def interval_document(grouped: bool, units: int, no_interval: str) -> dict[str, Any]:
    """What is said of the intervals; ``no_interval`` is why there are none, else empty."""
    return {
        "level": LEVEL,
        "method": "Student t with the jackknife's standard error over units",
        "coverage": COVERAGE,
        "unit": "group" if grouped else "core",
        "units": units,
        "least_units": LEAST_UNITS,
        "missing_because": no_interval or None,
    }


def versions() -> dict[str, str]:
    """Versions of this package and of those that its numbers depend on."""
    found = {"orion_unet": __version__, "python": platform.python_version()}
    for package in ("torch", "numpy", "scipy", "scikit-learn", "scikit-image"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _side(found: Evaluation, core: int) -> str:
    known = found.folder.known
    return "train" if core in known.train else "val" if core in known.val else "related"


def _interval(value: float, low: float, high: float) -> dict[str, float]:
    return {"value": float(value), "low": float(low), "high": float(high)}


def json_scores(card: Scorecard, marker: int | None) -> dict[str, Any]:
    """Scores of a marker, or (None) overall, beside those of the baselines."""
    scores: dict[str, dict[str, float]] = {}
    for metric in METRICS:
        scores[metric] = _interval(*card.score(MODEL, metric, marker))
        if marker is None:
            scores[metric]["markers"] = card.known(metric)
    baselines = {
        baseline: {metric: card.score(baseline, metric, marker)[0] for metric in BASELINE_METRICS}
        for baseline in card.values
        if baseline != MODEL
    }
    gains: dict[str, dict[str, dict[str, float]]] = {}
    for baseline, metric in card.duels:
        gains.setdefault(baseline, {})[metric] = _interval(*card.gain(baseline, metric, marker))
    return {"model": scores, "baselines": baselines, "gains_over_baselines": gains}


def _cell_document(names: tuple[str, ...], cells: CellResult) -> dict[str, Any]:
    scores = cells.scores
    return {
        "count": scores.count,
        "source": cells.source,
        "thresholds": cells.threshold_note,
        "cutoffs": cells.cutoff_note,
        "overall": {metric: _interval(*scores.overall[metric]) for metric in CELL_METRICS},
        "markers": {
            name: {
                "measured_threshold": float(scores.thresholds[marker]),
                "predicted_cutoff": float(scores.cutoffs[marker]),
                **{
                    metric: _interval(
                        scores.values[metric][marker], scores.low[metric][marker], scores.high[metric][marker]
                    )
                    for metric in CELL_METRICS
                },
            }
            for marker, name in enumerate(names)
        },
    }


def score_columns() -> list[str]:
    """Columns of scores.csv after the marker's name."""
    columns = [f"{metric}{end}" for metric in METRICS for end in ("", "_low", "_high")]
    columns += [f"{baseline}_{metric}" for baseline in (MEAN, REGRESSION) for metric in BASELINE_METRICS]
    gains = [f"{metric}_gain_over_{baseline}{end}" for baseline, metric in DUELS for end in ("", "_low", "_high")]
    return [*columns, *gains, "verdict"]


def score_rows(card: Scorecard) -> Iterable[list[Any]]:
    """Rows of scores.csv: every marker, and the mean over markers, which has no verdict."""
    trust = trust_of(card)
    for marker in (*range(len(card.names)), None):
        row: list[Any] = [OVERALL if marker is None else card.names[marker]]
        row += [value for metric in METRICS for value in card.score(MODEL, metric, marker)]
        for baseline in (MEAN, REGRESSION):
            fitted = baseline in card.values
            row += [card.score(baseline, name, marker)[0] if fitted else math.nan for name in BASELINE_METRICS]
        for baseline, metric in DUELS:
            row += card.gain(baseline, metric, marker) if baseline in card.values else [math.nan] * 3
        row.append("" if marker is None else trust[card.names[marker]].verdict)
        yield row


def _core_rows(found: Evaluation) -> Iterable[list[Any]]:
    scores = found.card.per_core
    for row, core in enumerate(found.cores):
        stain = [found.stain[row].state, found.stain[row].distance] if found.stain else []
        start = [str(found.folder.table.names[core]), found.folder.known.groups[core], _side(found, core)]
        for marker, name in enumerate(found.card.names):
            yield [*start, name, *(float(scores[metric][row, marker]) for metric in METRICS), *stain]
        yield [*start, OVERALL, *(float(overall(scores[metric][row])) for metric in METRICS), *stain]


def _cell_columns() -> list[str]:
    scores = [f"{metric}{end}" for metric in CELL_METRICS for end in ("", "_low", "_high")]
    return ["marker", "measured_threshold", "predicted_cutoff", *scores]


def _cell_rows(names: tuple[str, ...], cells: CellResult) -> Iterable[list[Any]]:
    scores = cells.scores
    for marker, name in enumerate(names):
        row: list[Any] = [name, float(scores.thresholds[marker]), float(scores.cutoffs[marker])]
        for metric in CELL_METRICS:
            row += [float(ends[metric][marker]) for ends in (scores.values, scores.low, scores.high)]
        yield row
    yield [OVERALL, math.nan, math.nan, *(value for metric in CELL_METRICS for value in scores.overall[metric])]
