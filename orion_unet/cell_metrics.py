"""Scores over cells or pixels that belong to units (cores, images, blocks of cells), whichever units count."""

from __future__ import annotations

import numpy as np

from orion_unet.correlation import pearson

CELL_METRICS = ("pearson", "auc", "average_precision", "f1", "fraction_positive")
CELL_BOUNDS = {"pearson": (-1.0, 1.0), **dict.fromkeys(CELL_METRICS[1:], (0.0, 1.0))}
"""Smallest and largest value of each."""
# Steps of the ROC and precision-recall curves, over the positive values and over the negative ones.
CURVE_STEPS = 512


class RankBins:
    """Predictions sorted into bins, counted by core and class: ROC and precision-recall curves whichever cores count.

    The bin edges are quantiles of the positive and of the negative predictions, so that a rare class is followed
    as finely as a common one. Equal predictions share a bin, and count half against each other, as in an exact
    area under the curve.
    """

    def __init__(self, predicted: np.ndarray, positive: np.ndarray, core: np.ndarray, cores: int) -> None:
        steps = np.linspace(0, 1, CURVE_STEPS + 1)
        sides = [
            np.quantile(side, steps, method="lower")
            for side in (predicted[positive], predicted[~positive])
            if side.size
        ]
        edges = np.unique(np.concatenate(sides)) if sides else np.zeros(1)
        bins = np.searchsorted(edges, predicted, side="right")
        size = len(edges) + 1
        self.positive, self.negative = (
            np.bincount(core[side] * size + bins[side], minlength=cores * size).reshape(cores, size).astype(np.float64)
            for side in (positive, ~positive)
        )

    def auc(self, counts: np.ndarray) -> np.ndarray:
        """Area under the ROC curve (N,) with cores counted as ``counts`` (N, K) says; NaN without both classes."""
        positive, negative = counts @ self.positive, counts @ self.negative
        below = np.cumsum(negative, axis=1) - negative / 2
        pairs = positive.sum(axis=1) * negative.sum(axis=1)
        return np.divide((positive * below).sum(axis=1), pairs, out=np.full(len(counts), np.nan), where=pairs > 0)

    def average_precision(self, counts: np.ndarray) -> np.ndarray:
        """Average precision (N,), Σ (Rₙ − Rₙ₋₁) Pₙ over the bins from the top; NaN without both classes."""
        positive, negative = (np.flip(counts @ side, axis=1) for side in (self.positive, self.negative))
        hits, all_called = np.cumsum(positive, axis=1), np.cumsum(positive + negative, axis=1)
        precision = np.divide(hits, all_called, out=np.zeros_like(hits), where=all_called > 0)
        total = hits[:, -1]
        defined = (total > 0) & (all_called[:, -1] > total)
        return np.divide((positive * precision).sum(axis=1), total, out=np.full(len(counts), np.nan), where=defined)


def counted_scores(
    predicted: np.ndarray, measured: np.ndarray, threshold: float, cutoff: float, unit: np.ndarray, counts: np.ndarray
) -> dict[str, np.ndarray]:
    """``CELL_METRICS`` (N,) of one marker over cells (n,), with units counted as ``counts`` (N, K) says.

    ``unit`` (n,) is the unit of each cell. A cell is positive where it was measured above ``threshold``, and called so
    where it is predicted above ``cutoff``; what needs one that is NaN is NaN. The curves are those of ``RankBins``.
    """
    units = counts.shape[1]

    def total(values: np.ndarray) -> np.ndarray:
        counted: np.ndarray = counts @ np.bincount(unit, values, units)
        return counted

    p, t = predicted, measured
    ones, undefined = np.ones(len(unit)), np.full(len(counts), np.nan)
    sums = np.stack([total(values) for values in (ones, p, t, p * p, t * t, p * t)], axis=1)
    positive, called = t > threshold, p > cutoff
    bins = RankBins(p, positive, unit, units)
    number, positives = total(ones), total(positive)
    both = total(called) + positives
    f1 = np.divide(2 * total(called & positive), both, out=undefined.copy(), where=positives > 0)
    fraction = np.divide(positives, number, out=undefined.copy(), where=number > 0)
    return {
        "pearson": pearson(sums[:, :, None])[:, 0],
        "auc": bins.auc(counts),
        "average_precision": bins.average_precision(counts),
        "f1": f1 if np.isfinite(cutoff) else undefined,
        "fraction_positive": fraction if np.isfinite(threshold) else undefined,
    }
