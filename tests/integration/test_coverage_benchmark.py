"""The benchmark of intervals runs, and its populations have the score that it counts as the truth."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import pearsonr

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def coverage(monkeypatch):
    spec = importlib.util.spec_from_file_location("coverage_of_intervals", ROOT / "benchmarks" / "coverage.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RESAMPLES", 99)
    monkeypatch.setattr(module, "UNITS", (5, 8))
    monkeypatch.setattr(module, "POPULATION", 1000)
    return module


def test_intervals_of_normal_scores_are_covered_as_theory_says(coverage):
    found = coverage.coverage(coverage.normal, 5, 1500, 0.5, False, seed=0)
    assert found["t"] == pytest.approx(0.95, abs=0.02)
    # Percentiles of 5 values are too narrow by sqrt(4 / 5), and by the difference of Student's and Gauss's quantiles.
    assert found["percentile"] < 0.88


def test_the_moments_of_a_core_are_those_of_its_pixels(coverage):
    rng = np.random.default_rng(0)
    t = rng.normal(0.3, 0.1, (2, 4000))
    p = 0.6 * t + rng.normal(0, 0.05, t.shape)
    moments = np.stack([np.ones(2), *(values.mean(axis=1) for values in (p, t, p * p, t * t, p * t))], axis=-1)
    assert coverage.score(moments.mean(axis=0)) == pytest.approx(pearsonr(p.ravel(), t.ravel()).statistic)


def test_it_prints_a_table_for_each_population(coverage, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["coverage.py", "--simulations", "20", "--only", "coverage"])
    coverage.main()
    said = capsys.readouterr().out
    assert all(name in said for name in coverage.POPULATIONS)
    assert said.count("\n| 8 |") == said.count("\n| 5 |") == len(coverage.POPULATIONS)


def test_standard_errors_of_binned_curves_are_those_of_exact_ones(coverage, capsys):
    coverage.report_curves(pixels=20_000, cores=8)
    ratios = [line.split("|")[2] for line in capsys.readouterr().out.splitlines() if "standard error" in line]
    assert [float(ratio) for ratio in ratios] == pytest.approx([1, 1], abs=0.05)
