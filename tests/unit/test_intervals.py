"""Intervals from leaving out one unit at a time, against scipy, and their coverage."""

import numpy as np
import pytest
from scipy import stats

from orion_unet.intervals import LEAST_UNITS, interval, leave_one_out, why_no_interval


def test_every_unit_is_left_out_once_with_all_its_cores():
    counts = leave_one_out(["p1", "p2", "p1", "p3"])
    assert counts.tolist() == [[0, 1, 0, 1], [1, 0, 1, 1], [1, 1, 1, 0]]
    assert (leave_one_out(list("abcd")) == 1 - np.eye(4)).all()


def mean_interval(values, bounds=None):
    """Interval of the mean (S,) of values (n, S)."""
    counts = leave_one_out([str(unit) for unit in range(len(values))])
    return interval(values.mean(axis=0), counts @ values / (len(values) - 1), bounds)


def test_the_interval_of_a_mean_is_that_of_student():
    values = np.random.default_rng(0).standard_normal((11, 3))
    low, high = mean_interval(values)
    for column in range(3):
        expected = stats.ttest_1samp(values[:, column], 0).confidence_interval(0.95)
        assert (low[column], high[column]) == pytest.approx((expected.low, expected.high))


def test_about_95_of_100_intervals_of_8_cores_cover_the_truth():
    low, high = mean_interval(np.random.default_rng(1).normal(0.4, 0.1, (LEAST_UNITS, 4000)))
    assert ((low < 0.4) & (high > 0.4)).mean() == pytest.approx(0.95, abs=0.012)


def test_a_bounded_score_has_an_interval_within_its_bounds_that_is_lopsided_near_them():
    values = np.array([0.99, 0.98, 0.999, 0.95, 0.97, 0.999, 0.9, 0.99])[:, None]
    low, high = (float(end[0]) for end in mean_interval(values, (0.0, 1.0)))
    plain_low, plain_high = (float(end[0]) for end in mean_interval(values))
    assert plain_high > 1
    assert plain_low - 0.05 < low < values.mean() < high < 1
    assert values.mean() - low > high - values.mean()


def test_far_from_its_bounds_the_interval_is_nearly_the_plain_one():
    values = 0.01 * np.random.default_rng(2).standard_normal((10, 1))
    plain = np.array(mean_interval(values))
    assert np.array(mean_interval(values, (-1.0, 1.0))) == pytest.approx(plain, abs=1e-5)


def test_a_perfect_score_is_in_its_own_interval():
    low, high = interval(1.0, np.ones(9), (0.0, 1.0))
    assert low == pytest.approx(1)
    assert high == 1


def test_what_one_unit_alone_shows_has_no_interval():
    without = np.array([[0.5, np.nan], [0.6, 0.4], [0.55, 0.4]])
    low, high = interval(np.array([0.55, 0.4]), without)
    assert low[0] < 0.55 < high[0]
    assert np.isnan([low[1], high[1]]).all()
    assert np.isnan(interval(np.nan, np.ones(3))).all()


@pytest.mark.parametrize(
    ("groups", "grouped", "expected"),
    [
        (list("abcdefg"), False, "too few cores (7) for an interval"),
        (list("aabbccddeeffgg"), True, "too few groups (7) for an interval"),
        (list("abcdefgh"), False, None),
        (list("abcdefghh"), True, None),
    ],
)
def test_too_few_units_are_said_to_be_too_few(groups, grouped, expected):
    said = why_no_interval(groups, grouped)
    assert expected in said if expected else said == ""
