"""Metrics per marker against scipy and scikit-image; exact sums over batches and ranks."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from sklearn.metrics import r2_score

from orion_unet.metrics import METRICS, MarkerSums


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def images(samples=3, channels=4, height=24, width=31):
    """Smooth-ish targets and predictions that agree in part."""
    target = torch.rand(samples, channels, height, width) ** 2
    prediction = (0.7 * target + 0.3 * torch.rand_like(target)).clamp(0, 1)
    return prediction, target


def names(tensor):
    return [f"marker{channel}" for channel in range(tensor.shape[1])]


def computed(prediction, target):
    sums = MarkerSums(prediction.shape[1])
    sums.update(prediction, target)
    return sums.compute(names(prediction))


def of_channel(tensor, channel):
    return tensor[:, channel].double().numpy().ravel()


def skimage_ssim(prediction, target, **options):
    return structural_similarity(
        prediction.double().numpy(),
        target.double().numpy(),
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=1,
        **options,
    )


def test_every_metric_equals_scipy_and_scikit_image():
    prediction, target = images()
    overall, per_channel = computed(prediction, target)
    expected = {"pearson": [], "mae": [], "psnr_db": [], "ssim": []}
    for channel, name in enumerate(names(target)):
        p, t = of_channel(prediction, channel), of_channel(target, channel)
        ssim = [skimage_ssim(prediction[i, channel], target[i, channel]) for i in range(len(target))]
        values = {
            "pearson": pearsonr(p, t).statistic,
            "mae": np.abs(p - t).mean(),
            "psnr_db": peak_signal_noise_ratio(t, p, data_range=1),
            "ssim": np.mean(ssim),
        }
        assert per_channel[name] == pytest.approx(values, rel=1e-6)
        for metric, value in values.items():
            expected[metric].append(value)
    for metric, per_marker in expected.items():
        assert overall[metric] == pytest.approx(np.mean(per_marker), rel=1e-6)
        assert overall[f"{metric}_markers"] == 4
    by_pixel = [each.double().numpy().transpose(0, 2, 3, 1).reshape(-1, 4) for each in (target, prediction)]
    assert overall["r2"] == pytest.approx(r2_score(*by_pixel, multioutput="variance_weighted"), rel=1e-6)


def test_r2_is_nought_for_the_means_below_for_worse_and_none_where_nothing_varies():
    _, target = images()
    means = target.mean((0, 2, 3), keepdim=True).expand_as(target)
    assert computed(means, target)[0]["r2"] == pytest.approx(0, abs=1e-6)
    assert computed(1 - means, target)[0]["r2"] < -1
    assert computed(target, means.contiguous())[0]["r2"] is None
    target[:, 0] = 0.3
    wrong = target.clone()
    wrong[:, 0] = 0.4
    spread = target.double().var((0, 2, 3), unbiased=False).sum().item()
    assert computed(wrong, target)[0]["r2"] == pytest.approx(1 - 0.01 / spread, rel=1e-5)


def test_ssim_of_bright_flat_float32_images_keeps_its_digits():
    target = 0.98 + 0.001 * torch.rand(1, 1, 32, 32)
    prediction = 0.98 + 0.001 * torch.rand(1, 1, 32, 32)
    _, per_channel = computed(prediction, target)
    assert per_channel["marker0"]["ssim"] == pytest.approx(skimage_ssim(prediction[0, 0], target[0, 0]), abs=1e-6)


def test_identical_images_have_ssim_one_pearson_one_and_no_psnr():
    _, target = images()
    overall, _ = computed(target, target)
    assert overall["ssim"] == pytest.approx(1)
    assert overall["pearson"] == pytest.approx(1)
    assert overall["mae"] == 0
    assert overall["psnr_db"] is None and overall["psnr_db_markers"] == 0


def test_pearson_of_sparse_markers_equals_scipy_to_1e_6():
    target = torch.zeros(8, 1, 64, 64)
    bright = torch.rand(8, 1, 64, 64) < 5e-4
    target[bright] = torch.rand(int(bright.sum())) * 0.9 + 0.1
    target += 0.003 * torch.rand_like(target)
    prediction = (0.01 + 0.02 * target + 0.001 * torch.randn_like(target)).clamp(0, 1)
    _, per_channel = computed(prediction, target)
    expected = pearsonr(of_channel(prediction, 0), of_channel(target, 0)).statistic
    assert target.mean() < 0.003
    assert per_channel["marker0"]["pearson"] == pytest.approx(expected, abs=1e-6)


def test_a_single_bright_pixel_is_a_signal():
    target = torch.zeros(4, 1, 128, 128)
    target[2, 0, 5, 7] = 1e-3
    prediction = torch.full_like(target, 0.25)
    prediction[2, 0, 5, 7] = 0.26
    _, per_channel = computed(prediction, target)
    assert per_channel["marker0"]["pearson"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("spread", [1e-2, 1e-3, 1e-4])
def test_pearson_of_a_high_mean_with_a_small_spread_equals_scipy_to_1e_6(spread):
    target = 0.9 + spread * torch.randn(4, 1, 64, 64)
    prediction = 0.8 + spread * torch.randn(4, 1, 64, 64) + 0.5 * (target - 0.9)
    _, per_channel = computed(prediction, target)
    expected = pearsonr(of_channel(prediction, 0), of_channel(target, 0)).statistic
    assert per_channel["marker0"]["pearson"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("level", [0.003, 0.1, 0.7])
@pytest.mark.parametrize("constant", ["prediction", "target"])
def test_a_constant_has_no_correlation_even_with_float32_rounding_noise(level, constant):
    varied = torch.rand(2, 1, 40, 40)
    flat = torch.full_like(varied, level)
    noisy = flat * (1 + 1e-6 * (varied - 0.5))
    assert noisy.unique().numel() > 3
    for still in (flat, noisy):
        pair = (still, varied) if constant == "prediction" else (varied, still)
        overall, per_channel = computed(*pair)
        assert per_channel["marker0"]["pearson"] is None
        assert overall["pearson"] is None and overall["pearson_markers"] == 0
        assert per_channel["marker0"]["mae"] > 0


def test_means_over_markers_leave_out_what_is_undefined_and_say_over_how_many_they_ran():
    prediction, target = images()
    target[:, 1] = 0
    prediction[:, 2] = target[:, 2]
    overall, per_channel = computed(prediction, target)
    assert per_channel["marker1"]["pearson"] is None
    assert per_channel["marker2"]["psnr_db"] is None
    kept = [per_channel[f"marker{channel}"]["pearson"] for channel in (0, 2, 3)]
    assert overall["pearson"] == pytest.approx(sum(kept) / 3)
    assert [overall[f"{metric}_markers"] for metric in ("pearson", "mae", "psnr_db", "ssim")] == [3, 4, 3, 4]


def test_patches_smaller_than_the_window_have_no_ssim():
    overall, per_channel = computed(*images(height=10, width=50))
    assert overall["ssim"] is None and overall["ssim_markers"] == 0
    assert per_channel["marker0"]["ssim"] is None
    assert per_channel["marker0"]["pearson"] is not None
    assert computed(*images(height=11, width=11))[0]["ssim_markers"] == 4


def test_without_a_patch_every_metric_is_none():
    overall, per_channel = MarkerSums(2).compute(["a", "b"])
    assert {overall[m] for m in METRICS} == {None}
    assert set(per_channel["a"].values()) == {None}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_prediction_that_is_not_finite_spoils_its_own_marker_only(bad):
    prediction, target = images()
    clean = computed(prediction, target)[1]
    prediction[1, 2, 3, 4] = bad
    overall, per_channel = computed(prediction, target)
    assert set(per_channel["marker2"].values()) == {None}
    assert per_channel["marker1"] == clean["marker1"]
    assert overall["mae_markers"] == 3


def test_states_of_split_batches_add_to_the_state_of_the_whole():
    prediction, target = images(samples=7)
    whole = MarkerSums(4)
    whole.update(prediction, target)
    first, second = MarkerSums(4), MarkerSums(4)
    for sums, rows in ((first, slice(0, 1)), (first, slice(1, 5)), (second, slice(5, 7))):
        sums.update(prediction[rows], target[rows])
    first.state += second.state
    torch.testing.assert_close(first.state, whole.state, rtol=1e-13, atol=0)
    assert first.state.dtype == torch.float64


def test_autocast_and_gradients_leave_the_sums_alone():
    prediction, target = images()
    expected, _ = computed(prediction, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        overall, _ = computed(prediction.clone().requires_grad_(), target)
    assert overall == expected


def test_wrong_shapes_and_names_are_refused():
    prediction, target = images()
    with pytest.raises(ValueError, match="differ in shape"):
        MarkerSums(4).update(prediction, target[:, :1])
    with pytest.raises(ValueError, match="4 channels, not 5"):
        MarkerSums(5).update(prediction, target)
    with pytest.raises(ValueError, match="3 names for 4 channels"):
        MarkerSums(4).compute(["a", "b", "c"])
