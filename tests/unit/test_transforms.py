"""Transforms against NumPy and SciPy: geometry moves everything alike, colour the H&E alone, noise goes, cells stay."""

import itertools

import numpy as np
import pytest
import scipy.ndimage
import torch
from torch.overrides import TorchFunctionMode

from orion_unet.data import transforms
from orion_unet.data.normalization import LOG_CURVATURE, Normalization, fit_normalization
from orion_unet.data.patches import PatchPlace
from orion_unet.data.transforms import (
    BatchTransform,
    boundary_mask,
    jitter_colour,
    median_3x3,
    remove_hot_pixels,
    turn,
    turn_batch,
)

CPU = torch.device("cpu")
GEOMETRIES = list(itertools.product((False, True), repeat=3))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def prepared(write_pairs, open_pairs):
    """Factory: an opened folder and the transform of its batches."""

    def prepare(method="dataset", transform="linear", noise_removal=False, patch_size=16, exclude=None, **pairs):
        opened = open_pairs(write_pairs(**pairs), patch_size=patch_size, exclude_channels=exclude)
        fitted = fit_normalization(opened.table, opened.scales, np.array([0, 1, 2]), method, transform)
        return opened, fitted, BatchTransform(opened.table, opened.reader.formats, fitted, noise_removal, CPU)

    return prepare


def turned(image, geometry):
    """Reference: rows reversed, then columns, then transposed; image (H, W)."""
    rows, columns, swap = geometry
    image = image[::-1] if rows else image
    image = image[:, ::-1] if columns else image
    return image.T if swap else image


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_marked_pixel_moves_alike_in_he_target_and_mask(tmp_path, store, open_pairs, geometry):
    he, orion = np.full((16, 16, 3), 200), np.zeros((16, 16, 2))
    he[3, 11] = 0
    orion[3, 11] = 255
    store(tmp_path / "a_HE.npy", he, "uint8")
    store(tmp_path / "a_ORION.npy", orion, "uint8")
    opened = open_pairs(tmp_path)
    plain = Normalization(opened.table.kept_names, np.zeros(2), np.ones(2), 255.0, "none")
    transform = BatchTransform(opened.table, opened.reader.formats, plain, False, CPU)
    still = transform(opened.reader.read([PatchPlace(0, 0, 0)]), augment=True)
    moved = transform(opened.reader.read([PatchPlace(0, 0, 0, geometry)]), augment=True)
    marked = np.zeros((16, 16), bool)
    marked[3, 11] = True
    np.testing.assert_array_equal(moved.target[0, 0].numpy() == 1, turned(marked, geometry))
    np.testing.assert_array_equal(moved.target[0, 1].numpy() == 1, turned(marked, geometry))
    np.testing.assert_array_equal(moved.he[0, 0].numpy() < 0.5, turned(marked, geometry))
    assert still.boundary[0, 0].sum() == 8
    np.testing.assert_array_equal(moved.boundary[0, 0].numpy(), turned(still.boundary[0, 0].numpy(), geometry))


def test_a_batch_is_turned_image_by_image():
    images = torch.rand(len(GEOMETRIES), 3, 6, 6).contiguous(memory_format=torch.channels_last)
    turned = turn_batch(images, torch.tensor(GEOMETRIES))
    for image, source, geometry in zip(turned, images, GEOMETRIES, strict=True):
        assert torch.equal(image, turn(source, geometry))


def test_the_eight_geometries_are_all_flips_and_quarter_turns():
    image = torch.arange(25.0).reshape(1, 5, 5)
    found = {tuple(turn(image, geometry).flatten().tolist()) for geometry in GEOMETRIES}
    flat = image[0].numpy()
    expected = {tuple(np.rot90(side, k).flatten().tolist()) for side in (flat, flat[::-1]) for k in range(4)}
    assert found == expected


@pytest.mark.parametrize("method", ["dataset", "core"])
def test_a_batch_equals_its_samples_one_at_a_time(prepared, method):
    opened, _, transform = prepared(method=method, noise_removal=True)
    rng = np.random.default_rng(5)
    places = [
        PatchPlace(core, 3 * core, 2, geometry, tuple(rng.uniform(-1, 1, 8).tolist()))
        for core, geometry in zip([0, 1, 2, 3, 3, 2, 1, 0], GEOMETRIES, strict=True)
    ]
    together = transform(opened.reader.read(places), augment=True)
    for row, place in enumerate(places):
        alone = transform(opened.reader.read([place]), augment=True)
        torch.testing.assert_close(together.he[row], alone.he[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(together.target[row], alone.target[0], rtol=0, atol=1e-6)
        assert torch.equal(together.boundary[row], alone.boundary[0])


def test_without_augmentation_what_was_drawn_is_not_applied(prepared):
    opened, _, transform = prepared()
    drawn = PatchPlace(0, 1, 1, (True, False, True), (0.7,) * 8)
    plain = transform(opened.reader.read([PatchPlace(0, 1, 1)]), augment=False)
    ignored = transform(opened.reader.read([drawn]), augment=False)
    assert torch.equal(plain.he, ignored.he)
    assert torch.equal(plain.target, ignored.target)


def test_colour_touches_the_he_alone(prepared):
    opened, _, transform = prepared()
    plain, coloured = (
        transform(opened.reader.read([PatchPlace(0, 1, 1, colour=(strength,) * 8)]), augment=True)
        for strength in (0.0, 1.0)
    )
    assert (plain.he - coloured.he).abs().max() > 0.02
    assert torch.equal(plain.target, coloured.target)
    assert torch.equal(plain.boundary, coloured.boundary)


def test_the_strength_of_the_colour_jitter_multiplies_what_was_drawn(prepared):
    opened, fitted, plain = prepared()
    raw = opened.reader.read(
        [PatchPlace(core, 1, 1, colour=(0.3, -0.9, 0.5, 1, -1, 0.2, -0.7, 0.8)) for core in (0, 1)]
    )
    untouched = plain(raw, augment=False).he
    for strength in (0.0, 1.0, 3.0):
        transform = BatchTransform(opened.table, opened.reader.formats, fitted, False, CPU, stain_augmentation=strength)
        expected = jitter_colour(untouched, strength * raw.colour) if strength else untouched
        assert torch.equal(transform(raw, augment=True).he, expected)
        assert torch.equal(transform(raw, augment=False).he, untouched)
    assert torch.equal(plain(raw, augment=True).he, jitter_colour(untouched, raw.colour))


def test_nothing_makes_the_host_wait_for_the_device(write_pairs, open_pairs):
    """On tensors without content whatever needs a content fails; what looks for errors on a device is named here."""
    opened = open_pairs(write_pairs())
    fitted = fit_normalization(opened.table, opened.scales, np.array([0, 1, 2]), "core", "log1p")
    nowhere = torch.device("meta")
    transform = BatchTransform(opened.table, opened.reader.formats, fitted, True, nowhere)
    called = []

    class Calls(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            # A tensor made from a list is copied at once.
            if any(isinstance(arg, torch.Tensor) and arg.device == nowhere for arg in args) or (
                function is torch.tensor and (kwargs or {}).get("device") == nowhere
            ):
                called.append(getattr(function, "__name__", ""))
            return function(*args, **(kwargs or {}))

    raw = opened.reader.read([PatchPlace(core, 1, 2, (True, False, True), (0.5,) * 8) for core in range(3)])
    with Calls():
        batch = transform(raw, augment=True)
    assert batch.he.device == nowhere and batch.he.shape == (3, 3, 16, 16)
    assert "einsum" in called
    assert not {"linalg_inv", "linalg_solve", "item", "tolist", "nonzero", "tensor"} & set(called)


def test_no_colour_drawn_leaves_an_image_as_it_is():
    he = torch.randint(1, 256, (3, 3, 20, 24)) / 255
    torch.testing.assert_close(jitter_colour(he, torch.zeros(3, 8)), he, rtol=0, atol=1e-5)
    # Black has no finite density: it is lifted by one level of 8 bits.
    assert jitter_colour(torch.zeros(1, 3, 4, 4), torch.zeros(1, 8)).max() <= 1.001 / 255


@pytest.mark.parametrize("strength", [1, 4])
def test_colour_stays_in_range_and_finite_for_every_draw(strength):
    he = torch.cat([torch.rand(64, 3, 8, 8), torch.zeros(64, 3, 8, 8), torch.ones(64, 3, 8, 8)])
    jittered = jitter_colour(he, strength * (torch.rand(192, 8) * 2 - 1))
    assert torch.isfinite(jittered).all()
    assert jittered.min() >= 0
    assert jittered.max() <= 1


def test_colour_follows_beer_and_lambert():
    """Reference in float64: densities in stain space scaled and shifted, then brightness and contrast."""
    rng = np.random.default_rng(3)
    he, drawn = rng.uniform(0.05, 1, (2, 3, 6, 7)), rng.uniform(-1, 1, (2, 8))
    stains = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
    stains /= np.linalg.norm(stains, axis=1, keepdims=True)
    found = jitter_colour(torch.from_numpy(he).float(), torch.from_numpy(drawn).float()).numpy()
    for image, draw, result in zip(he, drawn, found, strict=True):
        amounts = np.linalg.solve(stains.T, -np.log(image.reshape(3, -1)))
        amounts = amounts * (1 + transforms.STAIN_SCALE * draw[:3, None]) + transforms.STAIN_SHIFT * draw[3:6, None]
        light = np.exp(-stains.T @ amounts)
        light = (light - light.mean()) * (1 + transforms.CONTRAST * draw[7]) + light.mean()
        light = np.clip(light + transforms.BRIGHTNESS * draw[6], 0, 1)
        np.testing.assert_allclose(result.reshape(3, -1), light, atol=1e-5)


@pytest.mark.parametrize("shape", [(16, 16), (13, 29)])
def test_the_boundary_mask_is_scipys_sobel_above_mean_and_deviation(shape):
    rng = np.random.default_rng(1)
    he = scipy.ndimage.gaussian_filter(rng.random((4, 3, *shape)), (0, 0, 2, 2))
    he = np.clip((he - he.min()) / (he.max() - he.min()), 0, 1)
    he[2] = 0.5 + he[2] * 0.01
    he[3] = 1.0
    mask = boundary_mask(torch.from_numpy(he).float())[:, 0].numpy()
    for image, found in zip(he, mask, strict=True):
        grey = np.tensordot([0.299, 0.587, 0.114], image, 1)
        gradient = np.hypot(*(scipy.ndimage.sobel(grey, axis, mode="nearest") / 4 for axis in (0, 1))).clip(max=1)
        limit = max(gradient.mean() + gradient.std(), 0.08)
        clear = np.abs(gradient - limit) > 1e-5
        assert clear.mean() > 0.99
        np.testing.assert_array_equal(found[clear], (gradient > limit)[clear])
    assert mask[0].any()
    assert mask[1].any()
    assert not mask[2:].any()


def noisy_patches(hot=40, level=100.0):
    """Smooth background with ``hot`` isolated bright pixels in one image, also on its edges; and where they are."""
    rng = np.random.default_rng(2)
    images = scipy.ndimage.gaussian_filter(rng.random((2, 3, 64, 64)), (0, 0, 3, 3))
    places = np.zeros((64, 64), bool)
    places[::7, ::9] = True
    places[63, 63] = True
    places &= rng.random((64, 64)) < hot / places.sum()
    images[0, 1][places] = level
    return images, places


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_isolated_hot_pixels_become_scipys_median_and_nothing_else_changes(memory_format):
    images, places = noisy_patches()
    cleaned = remove_hot_pixels(torch.from_numpy(images).contiguous(memory_format=memory_format)).numpy()
    median = scipy.ndimage.median_filter(images[0, 1], 3, mode="nearest")
    assert places.sum() > 20
    np.testing.assert_array_equal(cleaned[0, 1][places], median[places])
    np.testing.assert_array_equal(cleaned[0, 1][~places], images[0, 1][~places])
    assert cleaned[0, 1].max() < 1.1


@pytest.mark.parametrize("step", [(0, 1), (1, 0), (1, 1), (1, -1)])
@pytest.mark.parametrize("at", [(20, 20), (0, 10), (30, 30), (62, 63)])
def test_a_bright_cell_of_two_pixels_stays(step, at):
    image = torch.rand(1, 1, 64, 64)
    y, x = at[0] + step[0], at[1] + step[1]
    if not (0 <= y < 64 and 0 <= x < 64):
        y, x = at[0] - step[0], at[1] - step[1]
    image[0, 0, at[0], at[1]] = image[0, 0, y, x] = 50
    assert torch.equal(remove_hot_pixels(image), image)
    image[0, 0, y, x] = 0.5
    assert remove_hot_pixels(image)[0, 0, at[0], at[1]] < 1


def test_a_flat_or_empty_patch_passes_noise_removal_unchanged():
    for image in (torch.zeros(1, 2, 16, 16), torch.full((1, 2, 16, 16), 700.0)):
        assert torch.equal(remove_hot_pixels(image), image)


@pytest.mark.parametrize("shape", [(1, 1, 5, 5), (2, 3, 17, 31), (1, 1, 3, 40)])
def test_the_dense_median_is_scipys_everywhere(shape):
    images = torch.randint(0, 50, shape).float()
    expected = scipy.ndimage.median_filter(images.numpy(), (1, 1, 3, 3), mode="nearest")
    np.testing.assert_array_equal(median_3x3(images).numpy(), expected)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("height", [64, 63])
def test_the_listed_path_of_the_cpu_equals_the_dense_path(memory_format, height):
    images = torch.from_numpy(noisy_patches()[0]).float()[..., :height, : height - 2]
    images = torch.cat([images, torch.rand_like(images) ** 30]).contiguous(memory_format=memory_format)
    bright = torch.rand_like(images) < 0.05
    around = torch.nn.functional.avg_pool2d(bright.float(), 3, stride=1, padding=1, divisor_override=1)
    isolated = bright & (around < 1.5)
    assert isolated[..., 0, :].any()
    assert (bright & ~isolated).any()
    dense = torch.where(isolated, median_3x3(images), images)
    assert torch.equal(transforms._replace_isolated(images, bright), dense)


def test_hot_pixels_are_the_same_in_any_batch():
    images = (torch.rand(5, 20, 64, 64) ** 8).contiguous(memory_format=torch.channels_last)
    apart = [remove_hot_pixels(images[part]) for part in (slice(0, 1), slice(1, 5))]
    assert torch.equal(remove_hot_pixels(images), torch.cat(apart))


@pytest.mark.parametrize("noise_removal", [False, True])
@pytest.mark.parametrize("method", ["dataset", "core", "none"])
@pytest.mark.parametrize("curve", ["linear", "log1p"])
def test_targets_are_normalised_as_numpy_would(prepared, method, curve, noise_removal):
    opened, fitted, transform = prepared(method, curve, noise_removal, orion_layout="chw")
    places = [PatchPlace(core, 7, 11) for core in (3, 1)]
    target = transform(opened.reader.read(places), augment=False).target.numpy()
    for row, place in enumerate(places):
        stored = np.load(opened.table.path(place.core, "orion"))[:, 7:23, 11:27].astype(np.float64)
        low, high = fitted.bounds(f"core_{place.core:02d}")[:, :, None, None]
        expected = np.clip((stored / 65535 - low) / (high - low), 0, 1)
        if curve == "log1p":
            expected = np.log1p(LOG_CURVATURE * expected) / np.log1p(LOG_CURVATURE)
        # Uniform noise has no pixel above mean + 3 sd: noise removal changes nothing.
        np.testing.assert_allclose(target[row], expected, atol=1e-5)


def test_noise_is_removed_in_the_target_of_a_batch(prepared):
    opened, _, transform = prepared(method="none", noise_removal=True)
    array = np.zeros((48, 40, 3), np.uint16)
    array[5, 6, 0] = array[9, 9:11, 1] = 60_000
    np.save(opened.table.path(0, "orion"), array)
    target = transform(opened.reader.read([PatchPlace(0, 0, 0)]), augment=False).target
    assert target[0, 0].max() == 0
    assert (target[0, 1] > 0.9).sum() == 2


@pytest.mark.parametrize("method", ["dataset", "core"])
@pytest.mark.parametrize("curve", ["linear", "log1p"])
def test_empty_channels_give_zeros_not_nan(prepared, method, curve):
    opened, _, _ = prepared()
    for core in range(4):
        array = np.load(opened.table.path(core, "orion"))
        array[..., 0], array[..., 2] = 0, 65535
        np.save(opened.table.path(core, "orion"), array)
    fitted = fit_normalization(opened.table, opened.scales, np.array([0, 1, 2]), method, curve)
    transform = BatchTransform(opened.table, opened.reader.formats, fitted, True, CPU)
    batch = transform(opened.reader.read([PatchPlace(core, 0, 0) for core in range(4)]), augment=False)
    assert torch.isfinite(batch.target).all()
    assert batch.target[:, [0, 2]].abs().max() == 0
    assert batch.target[:, 1].max() > 0.9


def test_left_out_channels_are_not_in_the_target(prepared):
    whole_opened, _, whole = prepared()
    opened, _, part = prepared(exclude="1")
    places = [PatchPlace(1, 4, 5)]
    expected = whole(whole_opened.reader.read(places), augment=False).target[:, [0, 2]]
    assert torch.equal(part(opened.reader.read(places), augment=False).target, expected)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float16", "float32"])
def test_a_batch_has_the_shapes_types_and_ranges_it_promises(prepared, dtype):
    opened, _, transform = prepared(he_dtype=dtype, orion_dtype=dtype, he_layout="chw")
    batch = transform(opened.reader.read([PatchPlace(0, 0, 0), PatchPlace(1, 32, 24)]), augment=True)
    assert batch.he.shape == (2, 3, 16, 16)
    assert batch.target.shape == (2, 3, 16, 16)
    assert batch.boundary.shape == (2, 1, 16, 16)
    assert (batch.he.dtype, batch.target.dtype, batch.boundary.dtype) == (torch.float32, torch.float32, torch.bool)
    assert batch.core.tolist() == [0, 1]
    for tensor in (batch.he, batch.target):
        assert tensor.min() >= 0
        assert tensor.max() <= 1
    expected = np.load(opened.table.path(1, "he"))[:, 32:48, 24:40] / {"uint8": 255, "uint16": 65535}.get(dtype, 1)
    np.testing.assert_allclose(batch.he[1].numpy(), expected, atol=1e-5)
