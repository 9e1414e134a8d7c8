"""Sums over patches against float64 numpy and scikit-image, on images that are hard on float32."""

import numpy as np
import pytest
import scipy.ndimage
import torch
from skimage.metrics import structural_similarity

from orion_unet import patch_sums as module
from orion_unet.patch_sums import PatchSums, patch_sums


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def pair(samples=3, channels=4, height=24, width=31):
    target = torch.rand(samples, channels, height, width) ** 2
    return (0.7 * target + 0.3 * torch.rand_like(target)).clamp(0, 1), target


def draw_mask(images):
    return torch.rand(len(images), 1, *images.shape[2:]) < 0.2


def ssim(prediction, target):
    """Of one patch and channel, by scikit-image in float64."""
    return structural_similarity(
        prediction.double().numpy(),
        target.double().numpy(),
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=1,
    )


def by_numpy(prediction, target, mask):
    """Every field of PatchSums, (15, B, C), in float64."""
    p, t = prediction.double().numpy(), target.double().numpy()
    error, one, inside = np.abs(p - t), np.ones_like(p), np.broadcast_to(mask.numpy(), p.shape).astype(float)
    similarity = [
        [ssim(*images) for images in zip(*patch, strict=True)] for patch in zip(prediction, target, strict=True)
    ]
    maps = [one, p, t, p * p, t * t, p * t, error, error**2, error**3, error**5, error**7, inside * error**2, inside]
    sums = [each.sum(axis=(2, 3)) for each in maps]
    return np.stack([*sums[:8], np.array(similarity), one[:, :, 0, 0], *sums[8:]])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "shape", [(3, 4, 24, 31), (2, 1, 11, 11), (2, 20, 64, 64), (1, 3, 150, 160), (1, 2, 300, 517), (1, 60, 16, 40)]
)
def test_every_sum_equals_numpys_to_1e_6(shape, memory_format):
    prediction, target = pair(*shape)
    mask = draw_mask(target)
    arranged = (image.contiguous(memory_format=memory_format) for image in (prediction, target))
    found = patch_sums(*arranged, mask)
    assert {each.dtype for each in found} == {torch.float64}
    np.testing.assert_allclose(torch.stack(found).numpy(), by_numpy(prediction, target, mask), rtol=1e-6)


def smooth(shape, width, seed):
    """Smooth noise of mean 0 and sd 1."""
    noise = np.random.default_rng(seed).standard_normal(shape)
    blurred = scipy.ndimage.gaussian_filter(noise, width, mode="wrap")
    return torch.from_numpy(blurred / blurred.std()).float()


def hard_pairs():
    shape = (128, 160)
    noise = torch.rand(shape), torch.rand(shape)
    ramp = torch.linspace(0, 1, shape[1]).expand(shape)
    sparse = (noise[0] < 1e-3).float()
    bright = torch.zeros(shape)
    bright[60, 70] = 1.0
    return {
        "constant": (torch.full(shape, 0.3), torch.full(shape, 0.7)),
        "constant against noise": (torch.full(shape, 0.1), noise[0]),
        "nearly constant": (0.3 + 1e-6 * noise[0], 0.7 + 1e-6 * noise[1]),
        "tiny variance": (0.5 + 1e-3 * noise[0], 0.5 + 1e-3 * noise[1]),
        "near 1": (0.98 + 1e-3 * noise[0], 0.98 + 1e-3 * noise[1]),
        "near 0": (1e-3 * noise[0], 1e-3 * noise[1]),
        "bright and smooth": (0.8 + 0.05 * smooth(shape, 8, 1), 0.8 + 0.05 * smooth(shape, 8, 2)),
        "dark and bright regions": tuple((0.5 + 0.3 * smooth(shape, 20, seed)).clamp(0, 1) for seed in (3, 4)),
        "ramps across each other": (ramp, torch.linspace(0, 1, shape[0])[:, None].expand(shape)),
        "sparse": (0.01 + 0.02 * sparse + 1e-3 * noise[1], 0.9 * sparse + 3e-3 * noise[1]),
        "one bright pixel": (torch.full(shape, 0.25), bright),
        "equal": (noise[0], noise[0]),
        "nearly equal": (noise[0], (noise[0] + 1e-4 * (noise[1] - 0.5)).clamp(0, 1)),
        "saturated": ((2 * noise[0]).clamp(0, 1), (2 * noise[1] - 1).clamp(0, 1)),
        "noise": noise,
    }  # fmt: skip


@pytest.mark.parametrize("without_onednn", [False, True])
@pytest.mark.parametrize("name", hard_pairs())
def test_hard_images_keep_their_digits(name, without_onednn, monkeypatch):
    if without_onednn:
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    prediction, target = (image[None, None] for image in hard_pairs()[name])
    found = patch_sums(prediction, target)
    p, t = (image.double().numpy() for image in (prediction, target))
    count = p.size
    assert found.ssim.item() == pytest.approx(ssim(prediction[0, 0], target[0, 0]), abs=1e-6)
    assert found.squared.item() / count == pytest.approx(((p - t) ** 2).mean(), rel=1e-6)
    assert found.absolute.item() / count == pytest.approx(np.abs(p - t).mean(), rel=1e-6)
    for total, squares, image in ((found.p, found.pp, p), (found.t, found.tt, t)):
        # What is left of it where the variance is tiny is what float64 holds.
        spread = (squares - total**2 / count).item()
        assert spread == pytest.approx(((image - image.mean()) ** 2).sum(), rel=1e-6, abs=1e-12 * (image**2).sum())
    shared = (found.pt - found.p * found.t / count).item()
    limit = 1e-6 * (p.std() * t.std() * count) + 1e-12 * (p * t).sum()
    assert shared == pytest.approx(((p - p.mean()) * (t - t.mean())).sum(), rel=0, abs=limit)


def test_images_of_few_grey_levels_keep_four_digits_of_a_patch():
    blobs = torch.stack([smooth((128, 128), 5, seed) > 0.5 for seed in range(16)]).float()[:, None]
    blurred = torch.nn.functional.avg_pool2d(blobs, 5, 1, 2)
    found = patch_sums(blobs, blurred).ssim[:, 0]
    expected = [ssim(*images) for images in zip(blobs[:, 0], blurred[:, 0], strict=True)]
    assert found.tolist() == pytest.approx(expected, abs=3e-5)


@pytest.mark.parametrize("filtered", [1, 60_000, 2**22])
@pytest.mark.parametrize("cached", [1, 3 * 4 * 31, 2**19])
def test_the_size_of_the_pieces_changes_nothing_but_rounding(filtered, cached, monkeypatch):
    prediction, target = pair(samples=2, height=77)
    mask = draw_mask(target)
    monkeypatch.setitem(module.FILTERED_VALUES, "cpu", filtered)
    monkeypatch.setitem(module.CACHED_VALUES, "cpu", cached)
    found = torch.stack(patch_sums(prediction, target, mask)).numpy()
    np.testing.assert_allclose(found, by_numpy(prediction, target, mask), rtol=1e-6)


@pytest.mark.parametrize("shape", [(7, 3, 9, 11), (5, 20, 16, 64), (5, 20, 64, 64), (3, 4, 200, 300)])
def test_a_patch_has_the_same_sums_in_any_batch_and_with_any_number_of_threads(shape):
    prediction, target = pair(*shape)
    mask = draw_mask(target)
    whole = torch.stack(patch_sums(prediction, target, mask))
    parts = [slice(0, 1), slice(1, 3), slice(3, shape[0])]
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))
    try:
        apart = [
            torch.stack(patch_sums(prediction[part], target[part], mask[part]))
            for part in parts
            if part.start < part.stop
        ]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.cat(apart, dim=1), whole)


def test_patches_smaller_than_the_window_have_no_ssim():
    for height, width in ((10, 50), (50, 10), (1, 1)):
        found = patch_sums(*pair(height=height, width=width))
        assert not found.ssim.any() and not found.ssim_patches.any()
        assert (found.pixels == height * width).all() and found.squared.all()


def test_without_a_mask_nothing_is_masked():
    found = patch_sums(*pair())
    assert not found.masked.any() and not found.masked_pixels.any()


def test_a_mask_may_be_of_floats():
    prediction, target = pair()
    mask = draw_mask(target)
    for found, expected in zip(
        patch_sums(prediction, target, mask.float()), patch_sums(prediction, target, mask), strict=True
    ):
        assert torch.equal(found, expected)


def test_what_is_not_finite_stays_in_its_patch_and_channel():
    prediction, target = pair(samples=2, height=40)
    clean = patch_sums(prediction, target)
    prediction[1, 2, 3, 4] = float("nan")
    found = patch_sums(prediction, target)
    for name in ("p", "pp", "pt", "absolute", "squared", "ssim", "absolute_7"):
        assert getattr(found, name)[1, 2].isnan()
    for before, after in zip(clean, found, strict=True):
        before[1, 2] = after[1, 2] = 0
        assert torch.equal(before, after)


def test_autocast_gradients_and_half_precision_do_not_change_the_sums():
    prediction, target = pair()
    halves = prediction.half(), target.half()
    expected = patch_sums(*(image.float() for image in halves))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = patch_sums(halves[0].requires_grad_(), halves[1])
    assert not any(each.requires_grad for each in found)
    for ours, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=0.0)


def test_images_that_were_expanded_are_read_and_left_alone():
    target = pair()[1]
    level = target.mean((2, 3), keepdim=True)
    before = level.clone(), target.clone()
    found = patch_sums(level.expand_as(target), target)
    assert isinstance(found, PatchSums)
    assert torch.equal(level, before[0]) and torch.equal(target, before[1])
    np.testing.assert_allclose(found.squared, ((level.double() - target.double()) ** 2).sum((2, 3)), rtol=1e-6)


def test_shapes_that_would_broadcast_are_refused():
    prediction, target = pair()
    for wrong in (target[:, :1], target[:1], target[..., :1]):
        with pytest.raises(ValueError, match="differ in shape"):
            patch_sums(prediction, wrong)
