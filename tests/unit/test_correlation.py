"""Pearson's correlation from added moments, against scipy."""

import numpy as np
import pytest
from scipy.stats import pearsonr

from orion_unet.correlation import moments, pearson, spread
from orion_unet.registration.shift import correlate


def draw(shape, seed=0):
    first, second = np.random.default_rng(seed).random((2, *shape))
    return first, 0.4 * first + second


def test_moments_are_sums_over_the_last_axis_in_float64():
    p, t = (image.astype(np.float16) for image in draw((2, 5, 7)))
    found = moments(p, t)
    assert found.shape == (6, 2, 5) and found.dtype == np.float64
    p, t = p.astype(float), t.astype(float)
    np.testing.assert_allclose(found[:, 1, 3], [7, *(each[1, 3].sum() for each in (p, t, p * p, t * t, p * t))])


def test_pearson_of_added_moments_is_that_of_all_values_together():
    p, t = draw((4, 3, 200))
    by_core = np.stack([moments(*core) for core in zip(p, t, strict=True)])
    assert pearson(by_core).shape == (4, 3)
    for channel in range(3):
        assert pearson(by_core)[2, channel] == pytest.approx(pearsonr(p[2, channel], t[2, channel]).statistic)
        together = pearsonr(p[:, channel].ravel(), t[:, channel].ravel()).statistic
        assert pearson(by_core.sum(axis=0))[channel] == pytest.approx(together)


@pytest.mark.parametrize("relative", [1e-2, 1e-3, 1e-4])
def test_a_high_mean_with_a_small_spread_keeps_six_digits(relative):
    p, t = (0.8 * (1 + relative * (image - image.mean())) for image in draw((1, 40_000)))
    assert pearson(moments(p, t))[0] == pytest.approx(pearsonr(p[0], t[0]).statistic, abs=1e-6)


def test_constants_and_their_rounding_have_no_spread_and_no_correlation():
    varied, _ = draw((1, 1000))
    for level in (0.0, 0.003, 0.7, 40_000.0):
        for constant in (np.full_like(varied, level), level * (1 + 1e-6 * varied)):
            sums = moments(constant, varied)
            assert spread(*sums[[0, 1, 3]]) == 0
            assert np.isnan(pearson(sums)).all() and np.isnan(pearson(moments(varied, constant))).all()


def test_what_was_not_counted_or_is_not_finite_has_no_correlation():
    assert np.isnan(pearson(np.zeros((6, 3)))).all()
    p, t = draw((2, 50))
    p[1, 7] = np.inf
    t[1, 8] = np.nan
    assert np.isfinite(pearson(moments(p, t))).tolist() == [True, False]


def test_identical_values_correlate_by_exactly_one_at_most():
    p, _ = draw((50, 30))
    assert pearson(moments(p, p)).max() <= 1
    np.testing.assert_allclose(pearson(moments(p, -p)), -1)


def test_images_correlate_as_in_numpy():
    first, second = (image.astype(np.float32) for image in draw((30, 40), seed=5))
    assert correlate(first, second) == pytest.approx(np.corrcoef(first.ravel(), second.ravel())[0, 1])
    assert np.isnan(correlate(first, np.full_like(first, 3)))
