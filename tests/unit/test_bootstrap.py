"""Resampling of cores and groups."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from orion_unet.evaluation.bootstrap import RankBins, draw_units, interval, why_no_interval


def test_every_resample_draws_as_many_units_as_there_are():
    draws = draw_units(["a", "b", "c", "d", "e"], 500)
    assert draws.shape == (500, 5)
    assert (draws.sum(axis=1) == 5).all()
    # Each core is left out of (1 - 1/5)^5 = 33 % of the resamples.
    assert np.abs((draws == 0).mean(axis=0) - 0.8**5).max() < 0.08


def test_cores_of_a_group_are_drawn_together():
    draws = draw_units(["p1", "p2", "p1", "p3"], 200)
    assert (draws[:, 0] == draws[:, 2]).all()
    assert (draws[:, [0, 1, 3]].sum(axis=1) == 3).all()
    assert (draws[:, 0] != draws[:, 1]).any()


def test_resamples_are_the_same_every_time():
    assert (draw_units(["a", "b", "c"], 50) == draw_units(["a", "b", "c"], 50)).all()


def test_the_interval_is_between_the_2_5_and_97_5_percentiles():
    low, high = interval(np.arange(1001.0)[:, None] * [1, -1])
    assert low == pytest.approx([25, -975])
    assert high == pytest.approx([975, -25])


def test_the_interval_of_a_mean_is_about_two_standard_errors_wide():
    rng = np.random.default_rng(0)
    values = rng.standard_normal(60)
    low, high = interval(draw_units([str(k) for k in range(60)], 4000) @ values / 60)
    error = values.std() / np.sqrt(60)
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.1 * error)


def test_a_score_often_undefined_in_resamples_has_no_interval():
    replicates = np.ones((100, 2))
    replicates[:5, 0] = replicates[:20, 1] = np.nan
    low, high = interval(replicates)
    assert low[0] == high[0] == 1
    assert np.isnan([low[1], high[1]]).all()


@pytest.mark.parametrize(
    ("groups", "replicates", "grouped", "expected"),
    [
        (["a", "b"], 100, False, "2 cores scored"),
        (["a", "a", "a", "a"], 100, True, "1 group scored"),
        (["a", "b", "c"], 0, False, "--bootstrap 0"),
        (["a", "b", "c"], 100, False, None),
    ],
)
def test_what_keeps_from_an_interval_is_said(groups, replicates, grouped, expected):
    said = why_no_interval(groups, replicates, grouped)
    assert expected in said if expected else said == ""


@pytest.mark.parametrize("levels", [2, 40])
def test_curves_with_few_distinct_predictions_are_exact(levels):
    rng = np.random.default_rng(levels)
    core = rng.integers(0, 3, 4000)
    predicted = rng.integers(0, levels, 4000) / levels
    positive = rng.random(4000) < 0.1 + 0.3 * predicted
    bins = RankBins(predicted, positive, core, 3)
    draws = np.array([[1, 1, 1], [0, 2, 1]], float)
    for row, drawn in enumerate(draws.astype(int)):
        index = np.concatenate([np.tile(np.flatnonzero(core == k), times) for k, times in enumerate(drawn)])
        assert bins.auc(draws)[row] == pytest.approx(roc_auc_score(positive[index], predicted[index]))
        expected = average_precision_score(positive[index], predicted[index])
        assert bins.average_precision(draws)[row] == pytest.approx(expected)


def test_curves_need_both_classes_in_the_resample():
    positive = np.array([True, True, False, False])
    bins = RankBins(np.array([0.9, 0.8, 0.1, 0.2]), positive, np.array([0, 0, 1, 1]), 2)
    draws = np.array([[1, 1], [2, 0], [0, 2]], float)
    assert bins.auc(draws)[0] == 1
    assert np.isnan(bins.auc(draws)[1:]).all()
    assert np.isnan(bins.average_precision(draws)[1:]).all()


def test_a_rare_class_is_followed_finely():
    rng = np.random.default_rng(1)
    positive = np.arange(200_000) < 100
    predicted = rng.standard_normal(200_000) + 3 * positive
    bins = RankBins(predicted, positive, np.zeros(200_000, int), 1)
    expected = average_precision_score(positive, predicted)
    assert bins.average_precision(np.ones((1, 1)))[0] == pytest.approx(expected, abs=0.02)
