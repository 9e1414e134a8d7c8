"""Scores over cells: correlation of their mean intensities, and how well positive cells are told from negative."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from orion_unet.evaluation.bootstrap import RankBins, interval
from orion_unet.evaluation.cells import Cells
from orion_unet.evaluation.scores import overall, pearson

CELL_METRICS = ("pearson", "auc", "average_precision", "f1", "fraction_positive")
# MIPHEI-ViT (Balezo et al., 2025): F1 of positive cells on ORION colorectal slides.
PUBLISHED_F1 = {"Pan-CK": 0.88, "CD3e": 0.57, "SMA": 0.56, "CD68": 0.36, "CD20": 0.30}
PUBLISHED_NOTE = (
    "MIPHEI-ViT on ORION colorectal slides: another data set, other cells and thresholds; an order of magnitude, not "
    "a like-for-like comparison"
)
_SAME = {"pancytokeratin": "Pan-CK", "ck": "Pan-CK", "cd3": "CD3e", "asma": "SMA", "αsma": "SMA"}


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

    return np.array([threshold_otsu(m) if m.size and np.ptp(m) > 0 else np.nan for m in cells.measured.T])


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
    positive = cells.measured > thresholds
    return np.array([best_cutoff(p, yes) for p, yes in zip(cells.predicted.T, positive.T, strict=True)])


def score_cells(cells: Cells, thresholds: np.ndarray, cutoffs: np.ndarray, draws: np.ndarray | None) -> CellScores:
    """Scores of the cells of K cores; ``draws`` (N, K) are resamples of them, None for no intervals.

    ``f1`` is empty where a marker has no cut-off, or no measured positive cell.
    """
    cores = draws.shape[1] if draws is not None else int(cells.core.max(initial=-1)) + 1
    once = np.ones((1, cores))
    points = _scores(cells, thresholds, cutoffs, once)
    values = {metric: found[0] for metric, found in points.items()}
    nothing = {metric: np.full(len(thresholds), np.nan) for metric in CELL_METRICS}
    low, high = dict(nothing), dict(nothing)
    means = {metric: (float(overall(values[metric])), np.nan, np.nan) for metric in CELL_METRICS}
    if draws is not None:
        for metric, found in _scores(cells, thresholds, cutoffs, draws).items():
            known = np.isfinite(values[metric])
            low[metric], high[metric] = (np.where(known, end, np.nan) for end in interval(found))
            if known.any():
                ends = interval(overall(found))
                means[metric] = (means[metric][0], float(ends[0]), float(ends[1]))
    values |= _exact_curves(cells, thresholds)
    means |= {metric: (float(overall(values[metric])), *means[metric][1:]) for metric in ("auc", "average_precision")}
    return CellScores(len(cells.core), values, low, high, means, thresholds, cutoffs)


def _scores(cells: Cells, thresholds: np.ndarray, cutoffs: np.ndarray, draws: np.ndarray) -> dict[str, np.ndarray]:
    """All metrics (N, C) with the cores drawn as ``draws`` (N, K) says."""
    columns: dict[str, list[np.ndarray]] = {metric: [] for metric in CELL_METRICS}
    cores = draws.shape[1]

    def total(values: np.ndarray) -> np.ndarray:
        drawn: np.ndarray = draws @ np.bincount(cells.core, values, cores)
        return drawn

    ones = np.ones(len(cells.core))
    for marker, (threshold, cutoff) in enumerate(zip(thresholds, cutoffs, strict=True)):
        p, t = cells.predicted[:, marker], cells.measured[:, marker]
        sums = np.stack([total(values) for values in (ones, p, t, p * p, t * t, p * t)], axis=1)
        columns["pearson"].append(pearson(sums[:, :, None])[:, 0])
        undefined = np.full(len(draws), np.nan)
        positive, called = t > threshold, p > cutoff
        bins = RankBins(p, positive, cells.core, cores)
        columns["auc"].append(bins.auc(draws))
        columns["average_precision"].append(bins.average_precision(draws))
        count, positives = total(ones), total(positive)
        both = total(called) + positives
        f1 = np.divide(2 * total(called & positive), both, out=undefined.copy(), where=positives > 0)
        columns["f1"].append(f1 if np.isfinite(cutoff) else undefined)
        fraction = np.divide(positives, count, out=undefined.copy(), where=count > 0)
        columns["fraction_positive"].append(fraction if np.isfinite(threshold) else undefined)
    return {metric: np.stack(found, axis=1) for metric, found in columns.items()}


def _exact_curves(cells: Cells, thresholds: np.ndarray) -> dict[str, np.ndarray]:
    """Area under the ROC and average precision (C,), by scikit-learn: the resamples follow the curves in steps."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    found = {metric: np.full(len(thresholds), np.nan) for metric in ("auc", "average_precision")}
    for marker, threshold in enumerate(thresholds):
        positive, p = cells.measured[:, marker] > threshold, cells.predicted[:, marker]
        if positive.any() and not positive.all():
            found["auc"][marker] = roc_auc_score(positive, p)
            found["average_precision"][marker] = average_precision_score(positive, p)
    return found


def published_f1(name: str) -> float | None:
    """The published F1 of a marker under any of its usual names, None where there is none."""
    plain = "".join(letter for letter in name.casefold() if letter.isalnum())
    known = {"".join(letter for letter in key.casefold() if letter.isalnum()): key for key in PUBLISHED_F1}
    key = known.get(plain) or _SAME.get(plain)
    return PUBLISHED_F1[key] if key else None
