"""Scores over cells: correlation of mean intensities, and how well predictions separate positive from negative."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from orion_unet.cell_metrics import CELL_METRICS, counted_scores
from orion_unet.data.scale import Progress
from orion_unet.evaluation.cells import CellFinder, Cells
from orion_unet.evaluation.scores import BOUNDS, by_marker, overall, rank_scores
from orion_unet.intervals import interval

# The predicted cut-off of positive cells is chosen on so many training cores, evenly spaced among all.
CUTOFF_CORES = 20


@dataclass(frozen=True)
class CellScores:
    """Scores over cells: ``values`` (C,) by metric with NaN where undefined, ``low`` and ``high`` their intervals.

    ``overall`` is (value, low, high) by metric, the mean over the markers that have a value. ``thresholds`` (C,) are
    the measured means above which a cell is positive, ``cutoffs`` (C,) the predicted ones; NaN where there is none.
    """

    count: int
    values: dict[str, np.ndarray]
    low: dict[str, np.ndarray]
    high: dict[str, np.ndarray]
    overall: dict[str, tuple[float, float, float]]
    thresholds: np.ndarray
    cutoffs: np.ndarray


def otsu_thresholds(cells: Cells) -> np.ndarray:
    """Otsu's threshold (C,) of the measured means of each marker; NaN where they are all the same."""
    from skimage.filters import threshold_otsu

    markers = [m for _, m, _ in _by_marker(cells)]
    return np.array([threshold_otsu(m) if m.size and np.ptp(m) > 0 else np.nan for m in markers])


def best_cutoff(predicted: np.ndarray, positive: np.ndarray) -> float:
    """The cut-off with the highest F1 when cells predicted above it are called positive; NaN without both classes.

    It lies half-way between two predictions.
    """
    if positive.all() or not positive.any():
        return np.nan
    order = np.argsort(predicted)[::-1]
    values, hits = predicted[order], np.cumsum(positive[order])
    # Equal predictions are called together: only the last of each counts.
    ends = np.flatnonzero(np.append(np.diff(values) != 0, True))
    f1 = 2 * hits[ends] / (ends + 1 + hits[-1])
    best = ends[int(np.argmax(f1))]
    below = values[best + 1] if best + 1 < len(values) else values[best] - 1.0
    return float((values[best] + below) / 2)


def best_cutoffs(cells: Cells, thresholds: np.ndarray) -> np.ndarray:
    """``best_cutoff`` (C,) of every marker."""
    return np.array([best_cutoff(p, t > x) for (p, t, _), x in zip(_by_marker(cells), thresholds, strict=True)])


def _by_marker(cells: Cells) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    return by_marker(cells.predicted.T, cells.measured.T, cells.core)


def score_cells(cells: Cells, thresholds: np.ndarray, cutoffs: np.ndarray, left_out: np.ndarray | None) -> CellScores:
    """Scores of the cells of K cores; ``left_out`` (U, K) counts the cores with each unit left out, None for no
    intervals.

    ``f1`` is empty where a marker has no cut-off, or no measured positive cell.
    """
    cores = int(cells.core.max(initial=-1)) + 1 if left_out is None else left_out.shape[1]
    all_cores = _scores(cells, thresholds, cutoffs, np.ones((1, cores)))
    values = {metric: found[0] for metric, found in all_cores.items()} | _exact_curves(cells, thresholds)
    means = {metric: float(overall(found)) for metric, found in values.items()}
    if left_out is None:
        undefined = np.full(len(thresholds), np.nan)
        ends = dict.fromkeys(CELL_METRICS, (undefined, undefined))
        mean_ends = dict.fromkeys(CELL_METRICS, (np.array(np.nan), np.array(np.nan)))
    else:
        without = _scores(cells, thresholds, cutoffs, left_out)
        units = _units(cells, left_out)
        ends = {name: interval(values[name], without[name], BOUNDS[name], units) for name in CELL_METRICS}
        mean_ends = {name: interval(means[name], overall(without[name]), BOUNDS[name]) for name in CELL_METRICS}
    return CellScores(
        len(cells.core),
        values,
        {metric: low for metric, (low, _) in ends.items()},
        {metric: high for metric, (_, high) in ends.items()},
        {metric: (means[metric], float(low), float(high)) for metric, (low, high) in mean_ends.items()},
        thresholds,
        cutoffs,
    )


def _scores(cells: Cells, thresholds: np.ndarray, cutoffs: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
    """All metrics (N, C) with cores counted as ``counts`` (N, K) says."""
    rows = [
        counted_scores(p, t, threshold, cutoff, core, counts)
        for (p, t, core), threshold, cutoff in zip(_by_marker(cells), thresholds, cutoffs, strict=True)
    ]
    return {metric: np.stack([found[metric] for found in rows], axis=1) for metric in CELL_METRICS}


def _exact_curves(cells: Cells, thresholds: np.ndarray) -> dict[str, np.ndarray]:
    """Area under the ROC and average precision (C,): ``RankBins`` follow the curves in steps."""
    markers = zip(_by_marker(cells), thresholds, strict=True)
    rows = [rank_scores(p, t, t > threshold) for (p, t, _), threshold in markers]
    return {metric: np.array([row[metric] for row in rows]) for metric in ("auc", "average_precision")}


def _units(cells: Cells, left_out: np.ndarray) -> np.ndarray | None:
    """The units (U, C) bool with cells in which each marker was measured; None where all cells have all markers."""
    known = ~np.isnan(cells.measured)
    if known.all():
        return None
    cores = np.zeros((left_out.shape[1], known.shape[1]))
    np.add.at(cores, cells.core, known)
    present: np.ndarray = (1 - left_out) @ cores > 0
    return present


@dataclass(frozen=True)
class CellResult:
    """Cells of the scored cores, how they were found, and in words what their thresholds rest on."""

    scores: CellScores
    source: str
    threshold_note: str
    cutoff_note: str


def judge_cells(
    finder: CellFinder, cells: Cells, given: np.ndarray | None, left_out: np.ndarray | None, progress: Progress
) -> CellResult:
    """Scores over the cells of the scored cores. Positive is what lies above a threshold that rests on measured values
    alone (``given`` (C,), else Otsu's); the predicted cut-off is chosen on cells of training cores, so that nothing is
    tuned on what is scored."""
    training, cores = _training_cells(finder, progress)
    count = len(training.core)
    if given is not None:
        thresholds, note = given, "positive cells: measured mean above --positive_threshold"
    elif count:
        thresholds = otsu_thresholds(training)
        note = f"positive cells: measured mean above Otsu's threshold of {count} training cells"
    else:
        thresholds = otsu_thresholds(cells)
        note = "positive cells: measured mean above Otsu's threshold of the scored cells, there being no training cells"
    if count:
        cutoffs = best_cutoffs(training, thresholds)
        cutoff_note = f"predicted cut-off: the best F1 on {count} cells of {cores} training cores"
    else:
        cutoffs = np.full(len(thresholds), np.nan)
        cutoff_note = "no F1: without training cores in the folder there is nothing to choose a predicted cut-off on"
    return CellResult(score_cells(cells, thresholds, cutoffs, left_out), finder.source, note, cutoff_note)


def _training_cells(finder: CellFinder, progress: Progress) -> tuple[Cells, int]:
    """Cells of at most CUTOFF_CORES training cores, and of how many."""
    folder = finder.folder
    usable = [core for core in folder.known.train.tolist() if finder.knows(core)]
    places = np.linspace(0, len(usable) - 1, min(CUTOFF_CORES, len(usable))).round().astype(int)
    step = progress(len(places), "cells of training cores")
    parts = []
    for place in places.tolist():
        parts.append(finder.find(usable[place], folder.region(usable[place])))
        step()
    return Cells.joined(parts, len(folder.names)), len(parts)
