"""What an evaluation leaves behind: scores.csv, cores.csv, cells.csv, scores.json and three figures."""

from __future__ import annotations

import csv
import io
import math
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orion_unet import __version__
from orion_unet.evaluation.bootstrap import LEAST_UNITS, LEVEL
from orion_unet.evaluation.bootstrap import SEED as BOOTSTRAP_SEED
from orion_unet.evaluation.cell_scores import CELL_METRICS, PUBLISHED_F1, PUBLISHED_NOTE, published_f1
from orion_unet.evaluation.score_figures import draw_markers, draw_patches, draw_scatter, plain
from orion_unet.evaluation.score_patches import best_median_worst
from orion_unet.evaluation.scorecard import OVERALL, csv_columns, csv_row, json_scores, verdicts
from orion_unet.evaluation.scores import BOX_PIXELS, METRICS, SAMPLE_SEED, overall
from orion_unet.run_log import utc_now, write_atomic, write_json

if TYPE_CHECKING:
    from orion_unet.evaluation.evaluate import CellResult, Evaluation

SCHEMA = 1
SCORES_CSV, CORES_CSV, CELLS_CSV, SCORES_JSON = "scores.csv", "cores.csv", "cells.csv", "scores.json"
MARKERS_PNG, SCATTER_PNG, PATCHES_PNG = "markers.png", "scatter.png", "patches.png"
FILES = (SCORES_JSON, SCORES_CSV, CORES_CSV, CELLS_CSV, MARKERS_PNG, SCATTER_PNG, PATCHES_PNG)


def write_files(found: Evaluation, folder: Path) -> None:
    """Write every file, each whole or not at all, scores.json last; an earlier evaluation's are replaced."""
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    card, table = found.card, found.folder.table
    write_atomic(folder / SCORES_CSV, _csv(["marker", *csv_columns(card)], [
        [OVERALL if marker is None else card.names[marker], *csv_row(card, marker)]
        for marker in [*range(len(card.names)), None]
    ]))  # fmt: skip
    write_atomic(folder / CORES_CSV, _csv(["core", "group", "split", "marker", *METRICS], _core_rows(found)))
    if found.cells is not None:
        write_atomic(folder / CELLS_CSV, _csv(*_cell_rows(card.names, found.cells)))
    write_atomic(folder / MARKERS_PNG, draw_markers(card))
    write_atomic(folder / SCATTER_PNG, draw_scatter(card, *found.samples))
    rows = []
    for word, patch in best_median_worst(found.patches):
        side = found.patch_side
        region = found.folder.region(patch.core, patch.y, patch.x, side, side)
        rows.append(
            (f"{word}, r {patch.score:.2f}\n{plain(str(table.names[patch.core]))}\n({patch.y}, {patch.x})", region)
        )
    if rows:
        write_atomic(folder / PATCHES_PNG, draw_patches(rows, card.names))
    write_json(folder / SCORES_JSON, document(found))


def document(found: Evaluation) -> dict[str, Any]:
    """Content of scores.json; what is undefined is null."""
    card, folder, model = found.card, found.folder, found.folder.model
    options, data = found.options, model.config.data
    names = folder.table.names
    return {
        "schema": SCHEMA,
        "created": utc_now(),
        "versions": _versions(),
        "checkpoint": {"path": str(model.path), "epoch": model.epoch},
        "pairs_dir": str(options.pairs_dir),
        "split": options.split,
        "cores": [
            {"core": str(names[core]), "group": folder.groups[core], "split": _side(found, core)}
            for core in found.cores
        ],
        "target": {
            "normalization": folder.normalization.method,
            "transform": folder.normalization.transform,
            "noise_removal": data.noise_removal,
            "range": [0, 1],
        },
        "box_pixels": BOX_PIXELS,
        "sample": {
            "metrics": ["spearman", "auc", "average_precision"],
            "pixels": int(found.samples[0].shape[1]),
            "share": found.share,
            "seed": SAMPLE_SEED,
        },
        "intervals": {
            "level": LEVEL,
            "replicates": 0 if found.no_interval else options.bootstrap,
            "seed": BOOTSTRAP_SEED,
            "unit": "group" if folder.grouped else "core",
            "units": len({folder.groups[core] for core in found.cores}),
            "least_units": LEAST_UNITS,
            "missing_because": found.no_interval or None,
        },
        "baselines": found.baselines.note,
        "verdicts": [sentence.strip() for sentence in verdicts(card)],
        "warnings": list(found.warnings),
        "overall": json_scores(card, None),
        "markers": {
            name: {"positive_threshold": float(found.thresholds[marker]), **json_scores(card, marker)}
            for marker, name in enumerate(card.names)
        },
        "cells": None if found.cells is None else _cell_document(card.names, found.cells),
    }


def _versions() -> dict[str, str]:
    found = {"orion_unet": __version__, "python": platform.python_version()}
    for package in ("torch", "numpy", "scipy", "scikit-learn", "scikit-image"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _side(found: Evaluation, core: int) -> str:
    if core in found.folder.train:
        return "train"
    return "val" if core in found.folder.val else "related"


def _csv(columns: list[str], rows: Iterable[list[Any]]) -> bytes:
    """A CSV file in which what is undefined is an empty cell."""
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_cell(value) for value in row] for row in rows)
    return file.getvalue().encode()


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else ""
    return str(value)


def _core_rows(found: Evaluation) -> Iterable[list[Any]]:
    scores = found.card.per_core
    for row, core in enumerate(found.cores):
        start = [str(found.folder.table.names[core]), found.folder.groups[core], _side(found, core)]
        for marker, name in enumerate(found.card.names):
            yield [*start, name, *(float(scores[metric][row, marker]) for metric in METRICS)]
        yield [*start, OVERALL, *(float(overall(scores[metric][row])) for metric in METRICS)]


def _cell_rows(names: tuple[str, ...], cells: CellResult) -> tuple[list[str], list[list[Any]]]:
    columns = ["marker", "measured_threshold", "predicted_cutoff"]
    columns += [f"{metric}{end}" for metric in CELL_METRICS for end in ("", "_low", "_high")]
    scores = cells.scores
    rows: list[list[Any]] = []
    for marker, name in enumerate(names):
        row: list[Any] = [name, float(scores.thresholds[marker]), float(scores.cutoffs[marker])]
        for metric in CELL_METRICS:
            row += [float(ends[metric][marker]) for ends in (scores.values, scores.low, scores.high)]
        rows.append([*row, _published(name)])
    total = [value for metric in CELL_METRICS for value in scores.overall[metric]]
    rows.append([OVERALL, math.nan, math.nan, *total, math.nan])
    return [*columns, "miphei_f1"], rows


def _published(name: str) -> float:
    value = published_f1(name)
    return math.nan if value is None else value


def _cell_document(names: tuple[str, ...], cells: CellResult) -> dict[str, Any]:
    scores = cells.scores
    return {
        "count": scores.count,
        "source": cells.source,
        "thresholds": cells.threshold_note,
        "cutoffs": cells.cutoff_note,
        "published": {"f1": PUBLISHED_F1, "note": PUBLISHED_NOTE},
        "overall": {
            metric: dict(zip(("value", "low", "high"), scores.overall[metric], strict=True)) for metric in CELL_METRICS
        },
        "markers": {
            name: {
                "measured_threshold": float(scores.thresholds[marker]),
                "predicted_cutoff": float(scores.cutoffs[marker]),
                "published_f1": published_f1(name),
                **{
                    metric: {
                        "value": float(scores.values[metric][marker]),
                        "low": float(scores.low[metric][marker]),
                        "high": float(scores.high[metric][marker]),
                    }
                    for metric in CELL_METRICS
                },
            }
            for marker, name in enumerate(names)
        },
    }
