"""Confidence intervals: cores, or the patients or slides they come from, drawn again with replacement."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from orion_unet.data.randomness import BOOTSTRAP, counter_rng

LEVEL = 0.95
SEED = 0
# With fewer units than this, resampling says nothing of what other tissue would give.
LEAST_UNITS = 3
# A score that is undefined in more of the resamples than this (a marker that one core alone shows) has no interval.
LARGEST_UNDEFINED = 0.1
# Steps of the ROC and precision-recall curves in resamples, over the positive values and over the negative ones.
CURVE_STEPS = 512


def draw_units(groups: Sequence[str], replicates: int) -> np.ndarray:
    """How often each of the K cores stands in each resample, (N, K) float64; the cores of a group go together.

    As many groups are drawn as there are, with replacement and a fixed seed.
    """
    units, unit_of = np.unique(list(groups), return_inverse=True)
    counts = np.zeros((replicates, len(units)))
    drawn = counter_rng(SEED, BOOTSTRAP).integers(0, len(units), (replicates, len(units)))
    np.add.at(counts, (np.arange(replicates)[:, None], drawn), 1.0)
    return counts[:, unit_of]


def why_no_interval(groups: Sequence[str], replicates: int, grouped: bool) -> str:
    """A sentence where no interval can be given, else nothing."""
    units = len(set(groups))
    if replicates == 0:
        return "no intervals: --bootstrap 0"
    if units < LEAST_UNITS:
        kind = "group" if grouped else "core"
        plural = "" if units == 1 else "s"
        return f"no intervals: {units} {kind}{plural} scored, resampling needs at least {LEAST_UNITS}"
    return ""


def interval(replicates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper end (...) of the 95 % percentile interval over the first axis (N, ...).

    NaN where too many replicates are undefined. Efron and Tibshirani, An Introduction to the Bootstrap, 1993.
    """
    known = np.isfinite(replicates)
    enough = known.mean(axis=0) >= 1 - LARGEST_UNDEFINED
    tail = (1 - LEVEL) / 2
    usable = np.where(enough, replicates, 0.0)
    low, high = np.nanquantile(usable, [tail, 1 - tail], axis=0)
    return np.where(enough, low, np.nan), np.where(enough, high, np.nan)


class RankBins:
    """Predictions sorted into bins, counted by core and class: ROC and precision-recall curves of any resample.

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

    def auc(self, draws: np.ndarray) -> np.ndarray:
        """Area under the ROC curve (N,) with the cores drawn as ``draws`` (N, K) says; NaN without both classes."""
        positive, negative = draws @ self.positive, draws @ self.negative
        below = np.cumsum(negative, axis=1) - negative / 2
        pairs = positive.sum(axis=1) * negative.sum(axis=1)
        return np.divide((positive * below).sum(axis=1), pairs, out=np.full(len(draws), np.nan), where=pairs > 0)

    def average_precision(self, draws: np.ndarray) -> np.ndarray:
        """Average precision (N,), Σ (Rₙ − Rₙ₋₁) Pₙ over the bins from the top; NaN without both classes."""
        positive, negative = (np.flip(draws @ side, axis=1) for side in (self.positive, self.negative))
        hits, all_called = np.cumsum(positive, axis=1), np.cumsum(positive + negative, axis=1)
        precision = np.divide(hits, all_called, out=np.zeros_like(hits), where=all_called > 0)
        total = hits[:, -1]
        defined = (total > 0) & (all_called[:, -1] > total)
        return np.divide((positive * precision).sum(axis=1), total, out=np.full(len(draws), np.nan), where=defined)
