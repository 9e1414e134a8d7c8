"""The scores of a model and its baselines over all cores, with intervals, and what they say in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from orion_unet.evaluation.scores import (
    BOUNDS,
    RANK_METRICS,
    CoreScores,
    by_marker,
    counted_rank_scores,
    overall,
    rank_scores,
    sum_scores,
)
from orion_unet.inference.trust import MarkerTrust, judge_marker
from orion_unet.intervals import interval

MODEL, MEAN, REGRESSION = "model", "mean", "regression"
BASELINE_NAMES = {MEAN: "the training mean", REGRESSION: "the regression from colours"}
# What a model has to beat, and on what: a constant has no correlation.
DUELS = ((MEAN, "psnr_db"), (REGRESSION, "psnr_db"), (REGRESSION, "pearson"))
METRIC_WORDS = {"psnr_db": "PSNR", "pearson": "Pearson"}
BEATS, BEATEN, UNCLEAR, TOO_FEW = "beats", "beaten", "not told apart", "too few groups"
PER_MARKER = {BEATEN: "It does NOT beat it", UNCLEAR: "Not told apart", TOO_FEW: "Too few groups to tell"}
OVERALL = "overall"

Scores = dict[str, np.ndarray]


@dataclass(frozen=True)
class Scorecard:
    """Scores by predictor (model, mean, regression) and metric, NaN where undefined.

    ``values`` hold (C,) over all cores, ``without`` (U, C) the same without each of U units (groups or cores); it is
    empty where there are too few of them for intervals. ``per_core`` are the model's scores (K, C) of single cores.
    ``present`` (K, C) bool are the cores in which each marker was measured, ``units`` (U, C) bool the units that have
    one; None where all have all.
    """

    names: tuple[str, ...]
    values: dict[str, Scores]
    per_core: Scores
    without: dict[str, Scores] = field(default_factory=dict)
    present: np.ndarray | None = None
    units: np.ndarray | None = None

    def score(self, predictor: str, metric: str, marker: int | None = None) -> tuple[float, float, float]:
        """Value and its interval's ends, of one marker or (None) the mean over the markers that have a value."""
        without = self.without[predictor][metric] if self.without else None
        return self._with_interval(self.values[predictor][metric], without, marker, BOUNDS.get(metric))

    def gain(self, baseline: str, metric: str, marker: int | None = None) -> tuple[float, float, float]:
        """How much higher the model scores than a baseline, and the interval of that difference (paired)."""
        without = None
        if self.without:
            without = self.without[MODEL][metric] - self.without[baseline][metric]
        return self._with_interval(self.values[MODEL][metric] - self.values[baseline][metric], without, marker, None)

    def cores_with(self, marker: int) -> int:
        """In how many of the scored cores a marker was measured."""
        return len(self.per_core["mae"]) if self.present is None else int(self.present[:, marker].sum())

    def known(self, metric: str) -> int:
        """Over how many markers the model's overall value is the mean."""
        return int(np.isfinite(self.values[MODEL][metric]).sum())

    def _with_interval(
        self, values: np.ndarray, without: np.ndarray | None, marker: int | None, bounds: tuple[float, float] | None
    ) -> tuple[float, float, float]:
        value = float(overall(values) if marker is None else values[marker])
        if without is None:
            return value, np.nan, np.nan
        if marker is None:
            low, high = interval(value, overall(without), bounds)
        else:
            units = None if self.units is None else self.units[:, marker]
            low, high = interval(value, without[:, marker], bounds, units)
        return value, float(low), float(high)

    @property
    def duels(self) -> list[tuple[str, str]]:
        """Pairs (baseline, metric) that can be compared here."""
        return [(baseline, metric) for baseline, metric in DUELS if baseline in self.values]


def make_scorecard(
    names: tuple[str, ...],
    cores: dict[str, list[CoreScores]],
    measured: list[np.ndarray],
    thresholds: np.ndarray,
    left_out: np.ndarray | None,
) -> Scorecard:
    """Put the cores together: ``cores`` by predictor, ``measured`` samples (C, n) of each, NaN where not measured.

    ``left_out`` (U, K) counts the cores with each unit left out, None for no intervals.
    """
    counts = [sample.shape[1] for sample in measured]
    core = np.repeat(np.arange(len(counts)), counts)
    pooled = np.concatenate(measured, axis=1)
    values: dict[str, Scores] = {}
    without: dict[str, Scores] = {}
    for predictor, parts in cores.items():
        sums, boxes = _stacked(parts)
        sample = np.concatenate([part.sample for part in parts], axis=1)
        values[predictor] = sum_scores(sums.sum(axis=0), boxes.sum(axis=0)) | _ranks(sample, pooled, thresholds)
        if left_out is not None:
            without[predictor] = sum_scores(np.tensordot(left_out, sums, 1), np.tensordot(left_out, boxes, 1))
            found = [
                counted_rank_scores(p, t, t > threshold, of, left_out)
                for (p, t, of), threshold in zip(by_marker(sample, pooled, core), thresholds, strict=True)
            ]
            for metric in RANK_METRICS:
                without[predictor][metric] = np.stack([row[metric] for row in found], axis=1)
    per_core = sum_scores(*_stacked(cores[MODEL]))
    rows = [_ranks(part.sample, target, thresholds) for part, target in zip(cores[MODEL], measured, strict=True)]
    per_core |= {metric: np.stack([row[metric] for row in rows]) for metric in RANK_METRICS}
    present = np.stack([part.sums[0] > 0 for part in cores[MODEL]])
    if present.all():
        return Scorecard(names, values, per_core, without)
    units = None if left_out is None else (1 - left_out) @ present > 0
    return Scorecard(names, values, per_core, without, present, units)


def _stacked(parts: Sequence[CoreScores]) -> tuple[np.ndarray, np.ndarray]:
    return np.stack([part.sums for part in parts]), np.stack([part.boxes for part in parts])


def _ranks(predicted: np.ndarray, measured: np.ndarray, thresholds: np.ndarray) -> Scores:
    """Rank scores (C,) of samples (C, n)."""
    markers = by_marker(predicted, measured, np.empty(measured.shape[1], int))
    rows = [rank_scores(p, t, t > threshold) for (p, t, _), threshold in zip(markers, thresholds, strict=True)]
    return {metric: np.array([row[metric] for row in rows]) for metric in RANK_METRICS}


def verdicts(card: Scorecard) -> list[str]:
    """Plain sentences: does the model beat its baselines, overall and marker by marker?

    "Beats" and "does NOT beat" are said where the interval of the paired difference excludes 0.
    """
    said = []
    for baseline, metric in card.duels:
        name, word = BASELINE_NAMES[baseline], METRIC_WORDS[metric]
        # Both over the markers that have a value for both: an empty marker has none for the mean.
        pair = np.stack([card.values[predictor][metric] for predictor in (MODEL, baseline)])
        model, other = overall(np.where(np.isfinite(pair).all(axis=0), pair, np.nan))
        gains = [card.gain(baseline, metric, marker) for marker in range(len(card.names))]
        compared = sum(np.isfinite(gain) for gain, _, _ in gains)
        if not compared:
            said.append(f"{word}: the model cannot be compared with {name}, no marker has a value for both.")
            continue
        sentence = {
            BEATS: f"the model beats {name} overall",
            BEATEN: f"the model does NOT beat {name} overall",
            UNCLEAR: f"the model and {name} are not told apart overall",
            TOO_FEW: f"too few groups to tell the model from {name}",
        }[_verdict(*card.gain(baseline, metric))]
        said.append(f"{word}: {sentence} ({number(model, metric)} against {number(other, metric)}).")
        found = [_verdict(*gain) if np.isfinite(gain[0]) else "" for gain in gains]
        for verdict, words in PER_MARKER.items():
            listed = [marker for marker, its in zip(card.names, found, strict=True) if its == verdict]
            if listed and card.without:
                said.append(f"  {words} for {len(listed)} of {compared} markers: {', '.join(listed)}.")
    return said


def trust_of(card: Scorecard) -> dict[str, MarkerTrust]:
    """The verdict on every marker, with the numbers it follows from."""
    found = {}
    for marker, name in enumerate(card.names):
        value, low, high = card.score(MODEL, "pearson", marker)
        other = float(card.values[REGRESSION]["pearson"][marker]) if REGRESSION in card.values else None
        verdict = judge_marker(low, other)
        found[name] = MarkerTrust(value, low, high, np.nan if other is None else other, verdict)
    return found


def _verdict(gain: float, low: float, high: float) -> str:
    if not np.isfinite(low):
        return TOO_FEW
    return BEATS if low > 0 else BEATEN if high < 0 else UNCLEAR


def number(value: float, metric: str) -> str:
    """A score as a person reads it; a dash where it is undefined."""
    if not np.isfinite(value):
        return "-"
    return f"{value:.1f}" if metric == "psnr_db" else f"{value:.3f}"
