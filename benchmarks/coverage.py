"""How often do intervals of evaluation cover the truth?

    python benchmarks/coverage.py [--simulations N] [--only coverage|curves]

- coverage: cores are drawn again and again from a population whose score is known, and intervals of nominally 95 % are
  made of each draw: bootstrap percentiles and BCa (scipy.stats.bootstrap, 999 resamples), and Student's t with the
  jackknife's standard error, as it is and on Fisher's scale, as ``evaluate`` has it. The score is the mean of a score
  per core, or Pearson's r over the pixels of all cores together;
- curves: areas under the ROC and precision-recall curves with each of 50 cores left out, by ``RankBins`` against
  scikit-learn: time, and how far the standard errors differ.

Prints Markdown tables. Units are groups or cores: what was sampled independently.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from scipy import stats
from sklearn.metrics import average_precision_score, roc_auc_score

from orion_unet.evaluation.scores import RankBins, pearson
from orion_unet.intervals import LEVEL, interval, leave_one_out

UNITS = (3, 4, 5, 6, 8, 10, 15, 20, 30, 50)
METHODS = ("percentile", "BCa", "t", "t, Fisher")
RESAMPLES = 999
# Cores whose score counts as that of the population.
POPULATION = 2_000_000

Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


def normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Scores (*shape, 1) that are normal."""
    return rng.normal(0.5, 0.1, (*shape, 1))


def skewed(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Scores near their upper bound, with a tail to lower ones, as correlations of a good model."""
    return rng.beta(5, 1.2, (*shape, 1))


def heavy(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Lognormal scores: most are small, few are many times as large."""
    return rng.lognormal(-2.5, 0.7, (*shape, 1))


def alike(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Moments (*shape, 6) of cores in which a marker is about equally strong and equally well predicted."""
    return _moments(rng, rng.normal(0.2, 0.05, shape).clip(0.01), rng.normal(0.6, 0.15, shape))


def unlike(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Moments of cores few of which show most of a marker, and in which it is predicted anything from badly to well."""
    return _moments(rng, rng.lognormal(-1.9, 0.6, shape), rng.beta(2, 2, shape))


def _moments(rng: np.random.Generator, mean: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """Count, Σp, Σt, Σp², Σt², Σpt per pixel of cores where p = gain · t + offset + noise."""
    spread = mean * rng.uniform(0.5, 1.2, mean.shape)
    noise = 0.5 * spread * rng.uniform(0.5, 1.5, mean.shape)
    predicted = gain * mean + 0.08 + rng.normal(0, 0.04, mean.shape)
    return np.stack(
        [
            np.ones_like(mean),
            predicted,
            mean,
            gain**2 * spread**2 + noise**2 + predicted**2,
            spread**2 + mean**2,
            gain * spread**2 + predicted * mean,
        ],
        axis=-1,
    )


POPULATIONS: dict[str, Draw] = {
    "mean, normal": normal,
    "mean, skewed": skewed,
    "mean, heavy tail": heavy,
    "pooled r, cores alike": alike,
    "pooled r, cores unlike": unlike,
}


def score(sums: np.ndarray) -> np.ndarray:
    """The score (...) of cores from their means (..., 1) or added moments (..., 6)."""
    return sums[..., 0] if sums.shape[-1] == 1 else pearson(sums[..., None])[..., 0]


def intervals(cores: np.ndarray, bounded: bool, rng: np.random.Generator) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Lower and upper ends (S,) by method, of S draws of n cores (S, n, k). Fisher's only where a score is bounded."""
    draws, count, _ = cores.shape

    def statistic(*columns: np.ndarray, axis: int) -> np.ndarray:
        return score(np.stack([column.mean(axis=axis) for column in columns], axis=-1))

    found = {}
    for method in ("percentile", "BCa"):
        made = stats.bootstrap(
            tuple(np.moveaxis(cores, -1, 0)), statistic, paired=True, vectorized=True, axis=-1, method=method,
            n_resamples=RESAMPLES, confidence_level=LEVEL, batch=max(1, 4_000_000 // (draws * count)), rng=rng,
        ).confidence_interval  # fmt: skip
        found[method] = made.low, made.high
    counts = leave_one_out([str(unit) for unit in range(count)])
    without = score(np.einsum("un,snk->usk", counts, cores) / (count - 1))
    found["t"] = interval(score(cores.mean(axis=1)), without)
    if bounded:
        found["t, Fisher"] = interval(score(cores.mean(axis=1)), without, (-1.0, 1.0))
    return found


def coverage(draw: Draw, count: int, simulations: int, truth: float, bounded: bool, seed: int) -> dict[str, float]:
    """Share of the intervals of each method, over draws of ``count`` cores, that cover the truth."""
    rng = np.random.default_rng([seed, count])
    made = intervals(draw(rng, (simulations, count)), bounded, rng)
    return {method: float(((low <= truth) & (truth <= high)).mean()) for method, (low, high) in made.items()}


def report_coverage(simulations: int) -> None:
    """One table per population."""
    for seed, (name, draw) in enumerate(POPULATIONS.items()):
        everything = draw(np.random.default_rng(seed), (POPULATION,))
        truth = float(score(everything.mean(axis=0)))
        bounded = draw not in (normal, heavy)
        print(f"\n{name} (truth {truth:.3f})\n\n| units | {' | '.join(METHODS)} |\n|{' --- |' * (len(METHODS) + 1)}")
        for count in UNITS:
            found = coverage(draw, count, simulations, truth, bounded, seed)
            shown = [f"{100 * found[method]:.1f}" if method in found else "" for method in METHODS]
            print(f"| {count} | {' | '.join(shown)} |", flush=True)


def report_curves(pixels: int = 500_000, cores: int = 50) -> None:
    """Time for one marker, and the largest relative difference of the jackknife's standard errors."""
    rng = np.random.default_rng(0)
    core = rng.integers(0, cores, pixels)
    positive = rng.random(pixels) < 0.05 * rng.uniform(0.2, 1.8, cores)[core]
    predicted = rng.random(pixels) + positive * rng.uniform(0.1, 0.8, cores)[core]
    counts = leave_one_out([f"{unit:03d}" for unit in range(cores)])
    started = time.perf_counter()
    bins = RankBins(predicted, positive, core, cores)
    binned = np.stack([bins.auc(counts), bins.average_precision(counts)])
    binned_s = time.perf_counter() - started
    started = time.perf_counter()
    exact = np.empty((2, cores))
    for left in range(cores):
        kept = core != left
        exact[:, left] = (
            roc_auc_score(positive[kept], predicted[kept]),
            average_precision_score(positive[kept], predicted[kept]),
        )
    exact_s = time.perf_counter() - started
    ratio = binned.std(axis=1) / exact.std(axis=1)
    print(f"\n| {pixels} pixels, {cores} cores, one marker | RankBins | scikit-learn |\n| --- | --- | --- |")
    print(f"| time [s] | {binned_s:.2f} | {exact_s:.1f} |")
    print(f"| standard error of the area under the ROC, over the exact one | {ratio[0]:.4f} | 1 |")
    print(f"| standard error of the average precision, over the exact one | {ratio[1]:.4f} | 1 |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=2000, help="draws for each number of units; default: 2000")
    parser.add_argument("--only", choices=("coverage", "curves"), help="one part alone; default: both")
    given = parser.parse_args()
    if given.only != "curves":
        report_coverage(given.simulations)
    if given.only != "coverage":
        report_curves()


if __name__ == "__main__":
    main()
