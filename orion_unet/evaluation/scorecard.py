"""The scores of a model and its baselines over all cores and in resamples of them, and what they say in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from orion_unet.evaluation.bootstrap import interval
from orion_unet.evaluation.scores import (
    METRICS,
    RANK_METRICS,
    CoreScores,
    overall,
    rank_replicates,
    rank_scores,
    sum_scores,
)

MODEL, MEAN, REGRESSION = "model", "mean", "regression"
BASELINE_NAMES = {MEAN: "the training mean", REGRESSION: "the regression from colours"}
# What a model has to beat, and on what: a constant has no correlation.
DUELS = ((MEAN, "psnr_db"), (REGRESSION, "psnr_db"), (REGRESSION, "pearson"))
METRIC_WORDS = {"psnr_db": "PSNR", "pearson": "Pearson"}
OVERALL = "overall"

Scores = dict[str, np.ndarray]


@dataclass(frozen=True)
class Scorecard:
    """Scores by predictor (model, mean, regression) and metric, NaN where undefined.

    ``values`` hold (C,) over all cores and ``replicates`` (N, C), which are empty where there are too few cores to
    resample. ``per_core`` are the model's scores (K, C) of single cores.
    """

    names: tuple[str, ...]
    values: dict[str, Scores]
    per_core: Scores
    replicates: dict[str, Scores] = field(default_factory=dict)

    def score(self, predictor: str, metric: str, marker: int | None = None) -> tuple[float, float, float]:
        """Value and its interval's ends, of one marker or (None) the mean over the markers that have a value."""
        values = self.values[predictor][metric]
        replicates = self.replicates.get(predictor, {}).get(metric)
        return _with_interval(values, replicates, marker)

    def gain(self, baseline: str, metric: str, marker: int | None = None) -> tuple[float, float, float]:
        """How much higher the model scores than a baseline, and the interval of that difference (paired)."""
        values = self.values[MODEL][metric] - self.values[baseline][metric]
        replicates = None
        if self.replicates:
            replicates = self.replicates[MODEL][metric] - self.replicates[baseline][metric]
        return _with_interval(values, replicates, marker)

    def known(self, metric: str) -> int:
        """Over how many markers the model's overall value is the mean."""
        return int(np.isfinite(self.values[MODEL][metric]).sum())

    @property
    def duels(self) -> list[tuple[str, str]]:
        """Pairs (baseline, metric) that can be compared here."""
        return [(baseline, metric) for baseline, metric in DUELS if baseline in self.values]


def _with_interval(values: np.ndarray, replicates: np.ndarray | None, marker: int | None) -> tuple[float, float, float]:
    value = overall(values) if marker is None else values[marker]
    if replicates is None or not np.isfinite(value):
        return float(value), np.nan, np.nan
    low, high = interval(overall(replicates) if marker is None else replicates[:, marker])
    return float(value), float(low), float(high)


def make_scorecard(
    names: tuple[str, ...],
    cores: dict[str, list[CoreScores]],
    measured: list[np.ndarray],
    thresholds: np.ndarray,
    draws: np.ndarray | None,
) -> Scorecard:
    """Put the cores together: ``cores`` by predictor, ``measured`` samples (C, n) of each, ``draws`` (N, K)."""
    counts = [sample.shape[1] for sample in measured]
    core = np.repeat(np.arange(len(counts)), counts)
    pooled = np.concatenate(measured, axis=1)
    values: dict[str, Scores] = {}
    replicates: dict[str, Scores] = {}
    for predictor, parts in cores.items():
        sums, boxes = _stacked(parts)
        sample = np.concatenate([part.sample for part in parts], axis=1)
        values[predictor] = sum_scores(sums.sum(axis=0), boxes.sum(axis=0)) | _ranks(sample, pooled, thresholds)
        if draws is not None:
            replicates[predictor] = sum_scores(np.tensordot(draws, sums, 1), np.tensordot(draws, boxes, 1))
            found = [
                rank_replicates(p, t, t > threshold, core, draws)
                for p, t, threshold in zip(sample, pooled, thresholds, strict=True)
            ]
            for metric in RANK_METRICS:
                replicates[predictor][metric] = np.stack([row[metric] for row in found], axis=1)
    per_core = sum_scores(*_stacked(cores[MODEL]))
    rows = [_ranks(part.sample, target, thresholds) for part, target in zip(cores[MODEL], measured, strict=True)]
    per_core |= {metric: np.stack([row[metric] for row in rows]) for metric in RANK_METRICS}
    return Scorecard(names, values, per_core, replicates)


def _stacked(parts: Sequence[CoreScores]) -> tuple[np.ndarray, np.ndarray]:
    return np.stack([part.sums for part in parts]), np.stack([part.boxes for part in parts])


def _ranks(predicted: np.ndarray, measured: np.ndarray, thresholds: np.ndarray) -> Scores:
    """Rank scores (C,) of samples (C, n)."""
    rows = [rank_scores(p, t, t > threshold) for p, t, threshold in zip(predicted, measured, thresholds, strict=True)]
    return {metric: np.array([row[metric] for row in rows]) for metric in RANK_METRICS}


def verdicts(card: Scorecard) -> list[str]:
    """Plain sentences: does the model beat its baselines, overall and marker by marker?"""
    said = []
    for baseline, metric in card.duels:
        name, word = BASELINE_NAMES[baseline], METRIC_WORDS[metric]
        # Both over the markers that have a value for both: an empty marker has none for the mean.
        pair = np.stack([card.values[predictor][metric] for predictor in (MODEL, baseline)])
        model, other = overall(np.where(np.isfinite(pair).all(axis=0), pair, np.nan))
        gain, low, _ = card.gain(baseline, metric)
        if not np.isfinite(gain):
            said.append(f"{word}: the model cannot be compared with {name}, no marker has a value for both.")
            continue
        numbers = f"{number(model, metric)} against {number(other, metric)}"
        if gain <= 0:
            said.append(f"{word}: the model does NOT beat {name} overall ({numbers}).")
        elif low <= 0:
            said.append(f"{word}: the model is ahead of {name} overall ({numbers}), but not clearly: resampled cores "
                        "also give the opposite.")  # fmt: skip
        elif np.isfinite(low):
            said.append(f"{word}: the model beats {name} overall ({numbers}).")
        else:
            said.append(f"{word}: the model is ahead of {name} overall ({numbers}).")
        gains = [card.gain(baseline, metric, marker) for marker in range(len(card.names))]
        compared = sum(np.isfinite(gain) for gain, _, _ in gains)
        behind = [marker for marker, (gain, _, _) in zip(card.names, gains, strict=True) if gain <= 0]
        unclear = [marker for marker, (gain, low, _) in zip(card.names, gains, strict=True) if gain > 0 and low <= 0]
        if behind:
            said.append(f"  It does NOT beat it for {len(behind)} of {compared} markers: {', '.join(behind)}.")
        if unclear:
            said.append(f"  Not clearly for {len(unclear)} of {compared}: {', '.join(unclear)}.")
    return said


def number(value: float, metric: str) -> str:
    """A score as a person reads it; a dash where it is undefined."""
    if not np.isfinite(value):
        return "-"
    return f"{value:.1f}" if metric == "psnr_db" else f"{value:.3f}"


def csv_columns(card: Scorecard) -> list[str]:
    """Columns of scores.csv after the marker's name."""
    columns = [f"{metric}{end}" for metric in METRICS for end in ("", "_low", "_high")]
    columns += [f"{baseline}_{metric}" for baseline in (MEAN, REGRESSION) for metric in METRICS[:-1]]
    return columns + [
        f"{metric}_gain_over_{baseline}{end}" for baseline, metric in DUELS for end in ("", "_low", "_high")
    ]


def csv_row(card: Scorecard, marker: int | None) -> list[float]:
    """Values for ``csv_columns`` of a marker, or (None) overall."""
    row = [value for metric in METRICS for value in card.score(MODEL, metric, marker)]
    for baseline in (MEAN, REGRESSION):
        row += [
            card.score(baseline, metric, marker)[0] if baseline in card.values else np.nan for metric in METRICS[:-1]
        ]
    for baseline, metric in DUELS:
        row += card.gain(baseline, metric, marker) if baseline in card.values else [np.nan] * 3
    return row


def json_scores(card: Scorecard, marker: int | None) -> dict[str, object]:
    """The same for scores.json."""
    scores: dict[str, object] = {}
    for metric in METRICS:
        value, low, high = card.score(MODEL, metric, marker)
        scores[metric] = {"value": value, "low": low, "high": high}
        if marker is None:
            scores[metric] |= {"markers": card.known(metric)}  # type: ignore[operator]
    baselines = {
        baseline: {metric: card.score(baseline, metric, marker)[0] for metric in METRICS[:-1]}
        for baseline in card.values
        if baseline != MODEL
    }
    gains: dict[str, dict[str, dict[str, float]]] = {}
    for baseline, metric in card.duels:
        value, low, high = card.gain(baseline, metric, marker)
        gains.setdefault(baseline, {})[metric] = {"value": value, "low": low, "high": high}
    return {"model": scores, "baselines": baselines, "gains_over_baselines": gains}
