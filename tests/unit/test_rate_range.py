"""The range test's rule on made losses: gradient descent on a quadratic, noise, losses that blow up."""

import numpy as np
import pytest

from orion_unet.training.rate_range import half_window, has_grown, smooth, suggest

RATES = np.geomspace(1e-5, 1e-1, 120)
HALF = half_window(120)


def sigmoid_fall(centre, low=0.2, high=1.0, width=0.4):
    """A loss that falls from high to low, most steeply (in log10 of the rate) at ``centre``."""
    return high - (high - low) / (1 + np.exp(-(np.log10(RATES) - np.log10(centre)) / width))


@pytest.mark.parametrize("centre", [1e-4, 1e-3, 1e-2])
def test_the_suggested_rate_is_that_of_the_steepest_descent(centre):
    noise = np.random.default_rng(0).normal(0, 0.01, 120)
    found = suggest(RATES, sigmoid_fall(centre) + noise, HALF, None)
    # Within six of the 120 steps: a fifth of a decade.
    assert abs(np.log10(found.rate / centre)) < 0.2
    # By hand: a sigmoid is steepest at its centre, by height / (4 width); the window of 0.8 decades sees a bit less.
    assert found.slope == pytest.approx(-0.8 / (4 * 0.4), rel=0.15)


def test_gradient_descent_on_a_quadratic_gets_a_rate_that_trains_it():
    """Curvature 100: a step multiplies the distance by |1 - 100 rate|, so that it diverges above a rate of 0.02."""
    noise = np.random.default_rng(0)
    weight, losses, diverged = 1.0, [], None
    for rate in RATES:
        losses.append(1.0 + 50 * weight**2)
        weight -= rate * (100 * weight + noise.normal(0, 1))
        if has_grown(losses, HALF):
            diverged = rate
            break
    assert diverged > 0.02
    found = suggest(RATES[: len(losses)], losses, HALF, diverged)
    assert 1e-4 < found.rate < 0.02
    assert found.rate < found.lowest_rate < diverged
    assert found.tenth_of_diverged == pytest.approx(diverged / 10)


def test_smoothing_keeps_a_line_and_does_not_lag():
    line = 3.0 - 0.5 * np.log10(RATES)
    fitted, slopes = smooth(RATES, line, HALF)
    np.testing.assert_allclose(fitted, line, rtol=1e-12)
    np.testing.assert_allclose(slopes, -0.5, rtol=1e-9)


def test_noise_alone_gives_no_rate():
    for seed in range(50):
        losses = 1.0 + np.random.default_rng(seed).normal(0, 0.05, 120)
        found = suggest(RATES, losses, HALF, None)
        assert found.rate is None
        assert "does not stand out" in found.reason


def test_a_loss_that_only_rises_gives_no_rate():
    assert suggest(RATES, np.linspace(1, 1.4, 120), HALF, None).rate is None


def test_too_few_losses_before_the_divergence_give_no_rate_but_advice():
    found = suggest(RATES[:5], [1.0, 0.9, 0.8, 0.7, 0.6], HALF, RATES[5])
    assert found.rate is None
    assert "after 5 steps: lower --lowest_rate" in found.reason


def test_a_loss_that_still_falls_at_the_last_rate_is_marked():
    assert suggest(RATES, sigmoid_fall(1e-1), HALF, None).still_falling
    rising = sigmoid_fall(1e-3) + 0.2 * np.maximum(0, np.log10(RATES / 1e-2))
    assert not suggest(RATES, rising, HALF, None).still_falling


def test_the_loss_has_grown_when_its_mean_exceeds_half_as_much_again_as_the_lowest():
    calm = [1.0] * 40
    assert not has_grown(calm, 6)
    assert not has_grown([*calm, 2.5], 6)
    assert not has_grown([*calm, 1.51, 1.51, 1.51], 8)
    assert not has_grown([*calm, *[1.49] * 6], 8)
    assert has_grown([*calm, *[1.51] * 4], 8)
    # Too early to say.
    assert not has_grown([*[1.0] * 6, *[9.0] * 6], 6)
