"""Camera noise and rare cells are not confused, whatever the noise looks like."""

import numpy as np
import pytest
from scipy import ndimage

from orion_unet.data.camera_noise import look_for_noise

SIDE = 512


def noise(rng, kind="normal", sd=8.0, mean=300.0):
    if kind == "shot":
        gain = sd**2 / mean
        return rng.poisson(mean / gain, (SIDE, SIDE)) * gain
    white = rng.standard_normal((SIDE, SIDE))
    if kind == "resampled":
        white = ndimage.gaussian_filter(white, 0.6)
        white /= white.std()
    return mean + sd * white


def cells(rng, share, width=9):
    """Round cells of height 1 that cover a share of the image."""
    image = np.zeros((SIDE, SIDE))
    rows, columns = np.ogrid[:SIDE, :SIDE]
    for _ in range(max(1, round(share * SIDE**2 / (np.pi * width**2 / 4)))):
        y, x = rng.integers(width, SIDE - width, 2)
        image[np.hypot(rows - y, columns - x) <= width / 2] = 1
    return image


def evidence(*images):
    """The evidence of images (H, W) in stored 16-bit values, each a core of one channel."""
    stored = [np.clip(np.rint(image), 0, 65535).astype(np.float32)[None] / 65535 for image in images]
    found = look_for_noise(stored[0])
    for image in stored[1:]:
        found = found.joined(look_for_noise(image))
    return found


@pytest.mark.parametrize("kind", ["normal", "shot", "resampled"])
@pytest.mark.parametrize("sd", [3, 8, 100])
def test_noise_is_noise_whatever_its_width_and_the_level_of_each_core(kind, sd):
    rng = np.random.default_rng(3)
    images = [noise(rng, kind, sd, mean) for mean in (400, 430, 1000)]
    images[0].ravel()[rng.choice(SIDE**2, 5, replace=False)] = 20_000  # hot pixels
    assert evidence(*images).noise.tolist() == [True]


@pytest.mark.parametrize("kind", ["normal", "shot", "resampled"])
@pytest.mark.parametrize("height", [3, 10, 30])
def test_cells_in_one_pixel_of_two_thousand_are_signal(kind, height):
    rng = np.random.default_rng(4)
    images = [noise(rng, kind) + height * 8 * cells(rng, 5e-4) for _ in range(4)]
    found = evidence(*images)
    assert found.noise.tolist() == [False]
    assert found.record(0)["bright_pieces"] >= 3 or found.record(0)["correlation"] > 0.05


def test_a_marker_in_one_core_of_many_is_signal():
    rng = np.random.default_rng(5)
    assert not evidence(*(noise(rng) for _ in range(9)), noise(rng) + 80 * cells(rng, 0.02)).noise[0]


def test_faint_broad_tissue_is_signal():
    rng = np.random.default_rng(6)
    broad = ndimage.gaussian_filter(rng.standard_normal((SIDE, SIDE)), 10)
    assert not evidence(noise(rng) + 3 * broad / broad.std()).noise[0]


def test_what_no_camera_makes_is_not_called_its_noise():
    rng = np.random.default_rng(7)
    rare = np.where(rng.random((SIDE, SIDE)) < 1e-3, 900.0, 0.0)
    assert not evidence(np.full((SIDE, SIDE), 300.0)).noise[0]  # constant
    assert not evidence(rare).noise[0]  # a background of one value
    assert not evidence(rng.uniform(0, 65535, (SIDE, SIDE))).noise[0]  # over the whole range
    assert not look_for_noise(np.zeros((1, 4, 4), np.float32)).noise[0]


def test_the_correlation_is_that_of_pixels_four_columns_apart():
    rng = np.random.default_rng(8)
    image = noise(rng) + 8 * ndimage.gaussian_filter(rng.standard_normal((SIDE, SIDE)), 3) / 0.094
    rows = np.rint(image).astype(np.float32) / 65535
    centred = rows - rows.mean(1, keepdims=True)
    expected = np.corrcoef(centred[:, 4:].ravel(), centred[:, :-4].ravel())[0, 1]
    assert look_for_noise(rows[None]).correlation[0] == pytest.approx(expected, abs=5e-3)
