"""The regression from colours, against numpy's least squares, what it is fitted to, and how it is kept."""

import numpy as np
import pytest
import torch

from orion_unet.config import DataOptions
from orion_unet.data import colour_regression
from orion_unet.data.colour_regression import (
    FEATURES,
    ColourRegression,
    NormalEquations,
    colour_features,
    fit_colour_regression,
    held_out_correlations,
)
from orion_unet.data.normalization import fit_normalization
from orion_unet.data.transforms import BatchTransform
from orion_unet.errors import InputError


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


def regression_of(coefficients, mean=None):
    count = coefficients.shape[1]
    names = tuple(f"M{index}" for index in range(count))
    return ColourRegression(names, np.zeros(count) if mean is None else mean, coefficients, 100, 2)


def test_predictions_are_those_of_the_features_within_the_range_of_targets():
    he, measured = draw()
    coefficients = 3 * np.random.default_rng(5).standard_normal((7, 4))
    expected = np.clip(design(he) @ coefficients, 0, 1).T.reshape(measured.shape)
    assert regression_of(coefficients).predict(he).numpy() == pytest.approx(expected, abs=1e-5)
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


def test_some_markers_can_be_taken_in_another_order():
    coefficients, mean = np.random.default_rng(0).random((7, 4)), np.arange(4.0)
    part = regression_of(coefficients, mean).of((3, 1))
    assert part.names == ("M3", "M1")
    assert part.mean.tolist() == [3, 1]
    assert (part.coefficients == coefficients[:, [3, 1]]).all()


def test_a_checkpoint_gives_back_what_was_put_into_it(tmp_path):
    before = regression_of(np.random.default_rng(0).standard_normal((7, 4)), np.linspace(0, 1, 4))
    torch.save(before.document(), tmp_path / "document.pt")
    after = ColourRegression.from_document(torch.load(tmp_path / "document.pt", weights_only=True))
    assert (after.names, after.pixels, after.cores) == (before.names, 100, 2)
    assert (after.mean == before.mean).all()
    assert (after.coefficients == before.coefficients).all()


@pytest.mark.parametrize(
    "change",
    [
        {"names": ["one"]},
        {"features": list(FEATURES[::-1])},
        {"coefficients": [[np.nan] * 4] * 7},
        {"coefficients": "much"},
        {"mean": None},
        {"pixels": "many"},
    ],
)
def test_a_damaged_document_is_refused(change):
    with pytest.raises(InputError, match="regression from colours"):
        ColourRegression.from_document({**regression_of(np.zeros((7, 4))).document(), **change})
    with pytest.raises(InputError, match="regression from colours"):
        ColourRegression.from_document(3)


def fit(opened, train, **options):
    normalization = fit_normalization(opened.table, opened.scales, np.array(train), "dataset", "linear")
    transform = BatchTransform(opened.table, opened.reader.formats, normalization, False, torch.device("cpu"))
    found = fit_colour_regression(opened.table, opened.scales, transform, np.array(train), 16, **options)
    return found, normalization


def test_small_sets_are_fitted_to_every_pixel_of_the_training_cores(write_pairs, open_pairs):
    folder = write_pairs(size=(48, 32), tissue_rows=30)
    found, normalization = fit(open_pairs(folder), [0, 2, 3])
    he = [np.load(folder / f"core_{core:02d}_HE.npy").reshape(-1, 3) / 255 for core in (0, 2, 3)]
    orion = [np.load(folder / f"core_{core:02d}_ORION.npy").reshape(-1, 3) / 65535 for core in (0, 2, 3)]
    targets = np.concatenate(orion) - normalization.lower
    targets = np.clip(targets / (normalization.upper - normalization.lower), 0, 1)
    colours = np.concatenate(he)
    features = np.concatenate([np.ones((len(colours), 1)), colours, -np.log(colours)], axis=1)
    expected = np.linalg.lstsq(features, targets, rcond=None)[0]
    assert found.pixels == 3 * 48 * 32
    assert found.cores == 3
    assert found.names == ("channel_00", "channel_01", "channel_02")
    assert found.mean == pytest.approx(targets.mean(axis=0), abs=1e-6)
    assert features @ found.coefficients == pytest.approx(features @ expected, abs=1e-4)


def test_the_work_is_bounded_and_every_core_has_its_share(write_pairs, open_pairs, monkeypatch):
    read = []
    monkeypatch.setattr(colour_regression, "FITTED_PIXELS", 2000)
    monkeypatch.setattr(colour_regression, "SMALLEST_SIDE", 8)
    original = colour_regression.PatchReader.read
    monkeypatch.setattr(
        colour_regression.PatchReader,
        "read",
        lambda self, places: (read.extend((place.core, self.patch_size) for place in places), original(self, places))[
            1
        ],
    )
    opened = open_pairs(write_pairs(cores=6, size=(48, 40)))
    found, _ = fit(opened, range(6))
    # Patches of 16 pixels would be at least 6 x 256; those of 16 x 16 = 256 pixels fit 333 pixels a core once.
    assert found.pixels == sum(side**2 for _, side in read) <= 2000
    assert {core for core, _ in read} == set(range(6))
    read.clear()
    monkeypatch.setattr(colour_regression, "FITTED_PIXELS", 3 * 64)
    found, _ = fit(opened, range(6))
    assert found.cores == 3
    assert read == [(0, 8), (2, 8), (5, 8)]


def test_the_seed_chooses_the_patches(write_pairs, open_pairs, monkeypatch):
    monkeypatch.setattr(colour_regression, "FITTED_PIXELS", 600)
    monkeypatch.setattr(colour_regression, "SMALLEST_SIDE", 8)
    opened = open_pairs(write_pairs())
    first, again, other = (fit(opened, [0, 1], seed=seed)[0] for seed in (0, 0, 1))
    assert (first.coefficients == again.coefficients).all()
    assert (first.coefficients != other.coefficients).any()


def test_its_correlation_on_held_out_cores_is_numpys_and_is_remembered(write_pairs, open_pairs, monkeypatch):
    folder = write_pairs(size=(48, 32))
    for core in range(4):
        path = folder / f"core_{core:02d}_ORION.npy"
        orion = np.load(path)
        # The first marker follows the red light, with noise; the third is constant.
        red = np.load(folder / f"core_{core:02d}_HE.npy")[..., 0].astype(float)
        orion[..., 0] = 200 * red + np.random.default_rng(core).integers(0, 20000, red.shape)
        orion[..., 2] = 7
        np.save(path, orion)
    opened = open_pairs(folder)
    found, normalization = fit(opened, [0, 2])
    places = np.array([(core, y, x) for core in (1, 3) for y in (0, 16, 32) for x in (0, 16)])
    monkeypatch.setattr(colour_regression, "recall", lambda name: None)
    kept = {}
    monkeypatch.setattr(colour_regression, "remember", kept.__setitem__)
    options = DataOptions(patch_size=16, noise_removal=False)
    about = (found, opened.table, opened.scales, normalization, places, options)
    reached = held_out_correlations(*about)
    he = np.concatenate([np.load(folder / f"core_{core:02d}_HE.npy").reshape(-1, 3) / 255 for core in (1, 3)])
    orion = np.concatenate([np.load(folder / f"core_{core:02d}_ORION.npy").reshape(-1, 3) / 65535 for core in (1, 3)])
    features = np.concatenate([np.ones((len(he), 1)), he, -np.log(np.maximum(he, 1 / 255))], axis=1)
    made = np.clip(features @ found.coefficients, 0, 1)
    targets = np.clip((orion - normalization.lower) / (normalization.upper - normalization.lower + 1e-30), 0, 1)
    assert list(reached) == ["channel_00", "channel_01", "channel_02"]
    assert reached["channel_02"] is None
    assert reached["channel_00"] > 0.8
    for at in (0, 1):
        assert reached[f"channel_{at:02d}"] == pytest.approx(np.corrcoef(made[:, at], targets[:, at])[0, 1], abs=1e-4)
    monkeypatch.setattr(colour_regression, "recall", kept.get)
    monkeypatch.setattr(colour_regression, "PatchReader", None)
    assert held_out_correlations(*about) == reached
