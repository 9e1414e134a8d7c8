"""The benchmark of warnings and intervals runs, and what it shifts and counts is right."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def trust():
    spec = importlib.util.spec_from_file_location("trust_of_predictions", ROOT / "benchmarks" / "trust.py")
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look themselves up there.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.slow
def test_the_benchmark_runs(call):
    made = call(sys.executable, ROOT / "benchmarks" / "trust.py", "--quick")
    assert made.code == 0, made.err
    assert "Warned of without a shift: 0 of 4 held-out cores" in made.out
    assert "The same from every seed for 20 of 20 markers." in made.out
    for name in ("one width", "by 20 bins of the prediction"):
        row = next(line for line in made.out.splitlines() if line.startswith(f"| {name}"))
        assert 50 < float(row.split("|")[2]) <= 100


def test_the_weakest_shift_of_each_kind_is_none(trust):
    he = np.random.default_rng(0).integers(30, 250, (40, 40, 3), dtype=np.uint8)
    for kind, (_, strengths) in trust.SHIFTS.items():
        assert np.abs(trust.shifted(he, kind, strengths[0]).astype(int) - he).max() <= 1, kind
        assert np.abs(trust.shifted(he, kind, strengths[-1]).astype(int) - he).max() > 20, kind


@pytest.mark.parametrize("bins", [1, 20])
def test_intervals_cover_nine_in_ten_of_new_pixels_that_are_alike(trust, bins):
    rng = np.random.default_rng(0)
    measured = rng.random(40_000)
    predicted = np.clip(measured + rng.normal(0, 0.02 + 0.2 * measured), 0, 1)
    calibration = rng.random(40_000) < 0.5
    covered = trust._covered(predicted, measured, calibration, bins)
    assert covered[~calibration].mean() == pytest.approx(0.9, abs=0.01)
    # Errors grow with the value, which one width for all cannot know.
    low = predicted[~calibration] < 0.1
    assert abs(covered[~calibration][low].mean() - 0.9) < 0.03 if bins > 1 else True
