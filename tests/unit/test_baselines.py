"""The regression from colours, against numpy's least squares."""

import numpy as np
import pytest
import torch

from orion_unet.evaluation.baselines import Baselines, NormalEquations, colour_features


def draw(seed=0, size=(20, 30), markers=4):
    rng = np.random.default_rng(seed)
    he = rng.uniform(0.02, 1, (3, *size)).astype(np.float32)
    measured = rng.random((markers, *size)).astype(np.float32)
    measured[0] = 0.5 * he[0] - 0.2 * np.log(he[1]) + 0.1
    return torch.from_numpy(he), torch.from_numpy(measured)


def design(he):
    """Features (n, 7) of pixels, written out."""
    r, g, b = (channel.ravel().astype(float) for channel in he.numpy())
    return np.stack([np.ones_like(r), r, g, b, -np.log(r), -np.log(g), -np.log(b)], axis=1)


def fitted(*images):
    equations = NormalEquations(images[0][1].shape[0])
    for he, measured in images:
        equations.add(he, measured)
    return equations


def test_the_regression_is_the_least_squares_solution_over_all_pixels():
    images = [draw(0), draw(1, (16, 8))]
    features = np.concatenate([design(he) for he, _ in images])
    targets = np.concatenate([measured.flatten(1).T.numpy() for _, measured in images])
    expected = np.linalg.lstsq(features, targets, rcond=None)[0]
    equations = fitted(*images)
    assert equations.pixels == 20 * 30 + 16 * 8
    assert equations.solve() == pytest.approx(expected, abs=1e-5)
    assert equations.mean() == pytest.approx(targets.mean(axis=0))


def test_a_marker_that_is_linear_in_colour_is_found_exactly():
    he, measured = draw()
    coefficients = fitted((he, measured)).solve()[:, 0]
    assert coefficients == pytest.approx([0.1, 0.5, 0, 0, 0, 0.2, 0], abs=1e-4)


def test_predictions_are_those_of_the_features_within_the_range_of_targets():
    he, measured = draw()
    coefficients = 3 * np.random.default_rng(5).standard_normal((7, 4))
    baselines = Baselines(np.zeros(4), coefficients, "")
    expected = np.clip(design(he) @ coefficients, 0, 1).T.reshape(measured.shape)
    assert baselines.predict_regression(he).numpy() == pytest.approx(expected, abs=1e-5)
    assert 0 < expected.mean() < 1


def test_grey_images_have_a_solution_too():
    he, measured = draw()
    grey = he[:1].expand(3, -1, -1)
    coefficients = fitted((grey, measured)).solve()
    expected = np.linalg.lstsq(design(grey), measured.flatten(1).T.numpy(), rcond=None)[0]
    assert design(grey) @ coefficients == pytest.approx(design(grey) @ expected, abs=1e-4)


def test_black_pixels_have_a_finite_optical_density():
    features = colour_features(torch.zeros(3, 2, 2))
    assert features[4:].numpy() == pytest.approx(np.log(255))


def test_the_mean_image_is_the_same_everywhere():
    image = Baselines(np.array([0.1, 0.7]), None, "").predict_mean(torch.zeros(2, 5, 6))
    assert image.shape == (2, 5, 6)
    assert image.flatten(1).T.unique(dim=0).numpy() == pytest.approx(np.array([[0.1, 0.7]]))
