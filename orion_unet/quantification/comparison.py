"""Measured beside predicted cells: scores with intervals, counts, densities, and distances of positive cells."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from orion_unet.cell_metrics import CELL_BOUNDS, CELL_METRICS, counted_scores
from orion_unet.intervals import LEAST_UNITS, LEVEL, interval, leave_one_out, why_no_interval
from orion_unet.quantification.cells import ImageCells
from orion_unet.quantification.files import measured_columns
from orion_unet.quantification.positives import Positives

# Cells are left out in so many random blocks for the intervals over cells.
BLOCKS, SEED = 50, 0

Ends = dict[str, tuple[float, float]]

COLUMNS = [
    *("image", "group", "marker", "cells", "measured_positive", "predicted_positive", "both_positive"),
    *("measured_per_mm2", "predicted_per_mm2", "measured_nearest_px", "predicted_nearest_px"),
    *("measured_nearest_um", "predicted_nearest_um"),
]
"""Columns of comparison.csv."""


@dataclass(frozen=True)
class MarkerAgreement:
    """How well predicted and measured means of the same cells agree.

    ``scores`` by metric: ``pearson`` needs no cut-off; ``auc``, ``average_precision`` and ``fraction_positive`` need a
    measured one, ``f1`` both; NaN where undefined. ``over_groups`` and ``over_cells`` are the ends of their 95 %
    intervals, NaN where there are none. ``confusion`` (2, 2) counts cells, rows measured and columns predicted,
    negative first; None without both cut-offs.
    """

    scores: dict[str, float]
    over_groups: Ends
    over_cells: Ends
    confusion: np.ndarray | None


@dataclass(frozen=True)
class RegionRow:
    """Positive cells of one marker in one image. The last two fields are distances (n,) in pixels from each measured
    or predicted positive cell to the nearest other one."""

    image: str
    group: str
    marker: str
    cells: int
    measured: int
    predicted: int
    both: int
    area_mm2: float
    pixel_size_um: float
    measured_nearest: np.ndarray = field(repr=False)
    predicted_nearest: np.ndarray = field(repr=False)


@dataclass(frozen=True)
class Comparison:
    """Everything that is compared. ``no_interval`` says why there are no intervals over groups, else it is empty."""

    markers: dict[str, MarkerAgreement]
    rows: list[RegionRow]
    groups: int
    grouped: bool
    no_interval: str

    def document(self) -> dict[str, Any]:
        """By marker: the scores, their intervals, and the confusion matrix."""
        return {
            name: {
                **found.scores,
                "over_groups": {metric: list(ends) for metric, ends in found.over_groups.items()},
                "over_cells": {metric: list(ends) for metric, ends in found.over_cells.items()},
                "confusion": None if found.confusion is None else found.confusion.tolist(),
            }
            for name, found in self.markers.items()
        }

    def interval_document(self) -> dict[str, Any]:
        """What the intervals are."""
        return {
            "level": LEVEL,
            "unit": "group" if self.grouped else "image",
            "units": self.groups,
            "missing_because": self.no_interval or None,
            "over_cells": f"{BLOCKS} random blocks of cells, as if cells were independent",
        }

    def table(self) -> Iterator[list[Any]]:
        """Rows of comparison.csv."""
        for row in self.rows:
            nearest = [_median(row.measured_nearest), _median(row.predicted_nearest)]
            yield [
                *(row.image, row.group, row.marker, row.cells, row.measured, row.predicted, row.both),
                *(count / row.area_mm2 for count in (row.measured, row.predicted)),
                *nearest,
                *(value * row.pixel_size_um for value in nearest),
            ]


def compare(
    names: Sequence[str], positives: Positives, images: Sequence[ImageCells], groups: Sequence[str]
) -> Comparison | None:
    """Compare the predicted and measured cells of all images; None without measured markers.

    ``groups`` are the patients or slides of the images: intervals over groups leave them out one at a time.
    """
    columns = measured_columns(images)
    if not columns:
        return None
    unit = np.repeat(np.unique(list(groups), return_inverse=True)[1], [len(cells.numbers) for cells in images])
    block = np.random.default_rng(SEED).permutation(len(unit)) % BLOCKS
    grouped = len(set(groups)) < len(groups)
    no_interval = why_no_interval(groups, grouped).replace("cores", "images")
    markers = {}
    for column in columns:
        name = names[column]
        pairs = [_pair(cells, positives, name, column) for cells in images]
        predicted, measured = (np.concatenate(side) for side in zip(*pairs, strict=True))
        valid = np.isfinite(predicted) & np.isfinite(measured)
        markers[name] = _agreement(predicted[valid], measured[valid], positives, name, unit[valid], block[valid])
    rows = [
        row for cells, group in zip(images, groups, strict=True) for row in _region_rows(names, positives, cells, group)
    ]
    return Comparison(markers, rows, len(set(groups)), grouped, no_interval)


def _pair(cells: ImageCells, positives: Positives, name: str, column: int) -> tuple[np.ndarray, np.ndarray]:
    """Predicted and measured means (n,) of one marker, as cut-offs compare them; NaN where it was not measured."""
    predicted = positives.compared(name, cells.means, column)
    if cells.measured is None or column not in cells.measured_columns:
        return predicted, np.full(len(predicted), np.nan)
    return predicted, positives.compared(name, cells.measured, cells.measured_columns.index(column))


def _agreement(
    predicted: np.ndarray,
    measured: np.ndarray,
    positives: Positives,
    name: str,
    group: np.ndarray,
    block: np.ndarray,
) -> MarkerAgreement:
    threshold, cutoff = positives.value(name, "measured"), positives.value(name, "predicted")
    scores = _exact(predicted, measured, threshold, cutoff)
    over = []
    for part, least in ((group, LEAST_UNITS), (block, BLOCKS)):
        found: Ends = dict.fromkeys(CELL_METRICS, (math.nan, math.nan))
        # A group without a cell of this marker says nothing about it.
        names_of_units, unit = np.unique(part, return_inverse=True)
        if len(names_of_units) >= least:
            left_out = leave_one_out([str(one) for one in names_of_units])
            without = counted_scores(predicted, measured, threshold, cutoff, unit, left_out)
            for metric in CELL_METRICS:
                low, high = interval(scores[metric], without[metric], CELL_BOUNDS[metric])
                found[metric] = float(low), float(high)
        over.append(found)
    confusion = None
    if math.isfinite(threshold) and math.isfinite(cutoff):
        cells = 2 * (measured > threshold) + (predicted > cutoff)
        confusion = np.bincount(cells, minlength=4).reshape(2, 2)
    return MarkerAgreement(scores, over[0], over[1], confusion)


def _exact(p: np.ndarray, t: np.ndarray, threshold: float, cutoff: float) -> dict[str, float]:
    from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

    scores = dict.fromkeys(CELL_METRICS, math.nan)
    if len(p) > 1 and np.ptp(p) > 0 and np.ptp(t) > 0:
        scores["pearson"] = float(np.corrcoef(p, t)[0, 1])
    if math.isfinite(threshold) and len(t):
        truth = t > threshold
        scores["fraction_positive"] = float(truth.mean())
        if truth.any() and not truth.all():
            scores["auc"] = float(roc_auc_score(truth, p))
            scores["average_precision"] = float(average_precision_score(truth, p))
        if truth.any() and math.isfinite(cutoff):
            scores["f1"] = float(f1_score(truth, p > cutoff))
    return scores


def _region_rows(names: Sequence[str], positives: Positives, cells: ImageCells, group: str) -> Iterator[RegionRow]:
    if cells.measured is None:
        return
    predicted = positives.called(names, cells.means)
    own = [names[column] for column in cells.measured_columns]
    places = np.stack([cells.geometry.y, cells.geometry.x], axis=1)
    side = cells.pixel_size_um or math.nan
    area = cells.shape[0] * cells.shape[1] * (side / 1000) ** 2
    for name, truth in positives.called(own, cells.measured, "measured").items():
        if name in predicted:
            # As in the scores, cells without a value on either side do not count.
            known = np.isfinite(np.stack(_pair(cells, positives, name, names.index(name)))).all(axis=0)
            found, truth = predicted[name] & known, truth & known
            both = int((found & truth).sum())
            yield RegionRow(
                cells.name, group, name, int(known.sum()), int(truth.sum()), int(found.sum()), both, area, side,
                _nearest(places[truth]), _nearest(places[found]),
            )  # fmt: skip


def _nearest(places: np.ndarray) -> np.ndarray:
    """Distance (n,) from each place (n, 2) to the nearest other one; empty where there is none."""
    from scipy.spatial import cKDTree

    if len(places) < 2:
        return np.empty(0)
    found: np.ndarray = cKDTree(places).query(places, k=2)[0][:, 1]
    return found


def _median(values: np.ndarray) -> float:
    return float(np.median(values)) if len(values) else math.nan
