"""Scores of evaluation, against scipy, scikit-image, scikit-learn and hand calculations."""

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, rankdata, spearmanr
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from sklearn.metrics import average_precision_score, roc_auc_score

from orion_unet.errors import InputError
from orion_unet.evaluation.scorecard import MEAN, MODEL, REGRESSION, csv_columns, csv_row, make_scorecard, verdicts
from orion_unet.evaluation.scores import (
    draw_pixels,
    overall,
    positive_thresholds,
    rank_replicates,
    rank_scores,
    sampled_share,
    score_core,
    sum_scores,
)

THRESHOLDS = np.array([0.5, 0.8, 0.5])


def draw_images(seed, size=(45, 38), noise=0.2):
    """Two correlated markers and a constant one, measured and predicted."""
    rng = np.random.default_rng(seed)
    measured = rng.random((3, *size)).astype(np.float32)
    predicted = np.clip(measured + noise * rng.standard_normal((3, *size)), 0, 1).astype(np.float32)
    measured[2] = 0
    return predicted, measured


def scored(predicted, measured, pixels=None):
    pixels = np.arange(measured[0].size) if pixels is None else pixels
    return score_core(*(torch.from_numpy(a) for a in (predicted, measured, THRESHOLDS.astype(np.float32))), pixels)


def boxes(image):
    height, width = (side // 8 * 8 for side in image.shape)
    return image[:height, :width].reshape(height // 8, 8, width // 8, 8).mean(axis=(1, 3)).ravel()


def test_sum_scores_of_one_core_equal_scipy_and_scikit_image():
    predicted, measured = draw_images(0)
    core = scored(predicted, measured)
    found = sum_scores(core.sums, core.boxes)
    for marker in (0, 1):
        p, t = predicted[marker].astype(float), measured[marker].astype(float)
        assert found["pearson"][marker] == pytest.approx(pearsonr(p.ravel(), t.ravel()).statistic, abs=1e-9)
        assert found["pearson_boxes"][marker] == pytest.approx(pearsonr(boxes(p), boxes(t)).statistic, abs=1e-6)
        assert found["mae"][marker] == pytest.approx(np.abs(p - t).mean())
        assert found["psnr_db"][marker] == pytest.approx(peak_signal_noise_ratio(t, p, data_range=1))
        similarity = structural_similarity(
            t, p, data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert found["ssim"][marker] == pytest.approx(similarity, abs=1e-9)
        assert found["fraction_positive"][marker] == pytest.approx((t > np.float32(THRESHOLDS[marker])).mean())


def test_a_constant_marker_has_no_correlation_but_an_error():
    core = scored(*draw_images(1))
    found = sum_scores(core.sums, core.boxes)
    assert np.isnan([found["pearson"][2], found["pearson_boxes"][2]]).all()
    assert found["mae"][2] > 0
    assert found["fraction_positive"][2] == 0


def test_added_sums_are_the_scores_of_all_pixels_together():
    images = [draw_images(seed, size) for seed, size in ((0, (45, 38)), (1, (24, 60)))]
    cores = [scored(*pair) for pair in images]
    found = sum_scores(sum(core.sums for core in cores), sum(core.boxes for core in cores))
    p, t = (np.concatenate([pair[side][0].ravel() for pair in images]).astype(float) for side in (0, 1))
    assert found["pearson"][0] == pytest.approx(pearsonr(p, t).statistic, abs=1e-9)
    assert found["psnr_db"][0] == pytest.approx(-10 * np.log10(np.mean((p - t) ** 2)))


def test_a_core_smaller_than_a_box_has_no_box_correlation():
    core = scored(*draw_images(0, (7, 50)))
    assert np.isnan(sum_scores(core.sums, core.boxes)["pearson_boxes"]).all()


def test_rank_scores_of_a_case_calculated_by_hand():
    measured = np.array([0.1, 0.2, 0.7, 0.9])
    predicted = np.array([0.3, 0.4, 0.35, 0.8])
    found = rank_scores(predicted, measured, measured > 0.5)
    # Ranks 1 3 2 4 against 1 2 3 4: 1 - 6 * 2 / (4 * 15). Three of four pairs are in order.
    # From the top: hit (1/1), miss, hit (2/3).
    assert found == pytest.approx({"spearman": 0.8, "auc": 0.75, "average_precision": (1 + 2 / 3) / 2})


@pytest.mark.parametrize(
    ("predicted", "measured"), [(np.zeros(5), np.linspace(0, 1, 5)), (np.linspace(0, 1, 5), np.zeros(5))]
)
def test_ranks_of_a_constant_are_undefined(predicted, measured):
    found = rank_scores(predicted, measured, measured > 0.5)
    assert np.isnan(found["spearman"])
    assert np.isnan(found["auc"]) == (not measured.any())


def test_rank_replicates_equal_the_scores_of_the_cores_drawn():
    rng = np.random.default_rng(3)
    core = np.repeat([0, 1, 2], [3000, 2000, 4000])
    measured = rng.random(9000) ** 3 + 0.1 * core
    predicted = measured + 0.5 * rng.standard_normal(9000)
    positive = measured > 0.9
    draws = np.array([[1, 1, 1], [2, 0, 1], [0, 3, 0]])
    found = rank_replicates(predicted, measured, positive, core, draws.astype(float))
    ranks = rankdata(predicted), rankdata(measured)
    for row, drawn in enumerate(draws):
        index = np.concatenate([np.tile(np.flatnonzero(core == k), times) for k, times in enumerate(drawn)])
        assert found["auc"][row] == pytest.approx(roc_auc_score(positive[index], predicted[index]), abs=1e-3)
        precision = average_precision_score(positive[index], predicted[index])
        assert found["average_precision"][row] == pytest.approx(precision, abs=5e-3)
        r = pearsonr(ranks[0][index], ranks[1][index]).statistic
        assert found["spearman"][row] == pytest.approx(r, abs=1e-9)
    assert found["spearman"][0] == pytest.approx(spearmanr(predicted, measured).statistic)


def test_sampled_pixels_are_distinct_cover_the_core_and_stay_the_same():
    drawn = draw_pixels(3, 1000, 0.25)
    assert len(drawn) == 250
    assert (drawn // 4 == np.arange(250)).all()
    assert (drawn == draw_pixels(3, 1000, 0.25)).all()
    assert (drawn != draw_pixels(4, 1000, 0.25)).any()
    assert (draw_pixels(3, 1000, 1.0) == np.arange(1000)).all()


def test_the_sample_is_bounded_in_pixels_and_in_values():
    assert sampled_share(100_000, 20) == 1
    assert sampled_share(10_000_000, 20) * 10_000_000 == pytest.approx(500_000)
    assert sampled_share(10_000_000, 1000) * 10_000_000 * 1000 <= 20_000_000


def test_the_overall_score_leaves_out_undefined_markers():
    assert overall(np.array([0.2, np.nan, 0.4])) == pytest.approx(0.3)
    assert np.isnan(overall(np.array([np.nan, np.nan])))


def test_thresholds_are_given_for_all_markers_for_some_or_both():
    assert positive_thresholds(None, ["A", "B"]).tolist() == [0.5, 0.5]
    assert positive_thresholds("0.3", ["A", "B"]).tolist() == [0.3, 0.3]
    assert positive_thresholds("B=0.1, 0.3", ["A", "B"]).tolist() == [0.3, 0.1]


@pytest.mark.parametrize("given", ["1.5", "-0.1", "nan", "much", "A=", "C=0.5"])
def test_a_threshold_that_cannot_be_used_is_named(given):
    with pytest.raises(InputError, match="positive_threshold"):
        positive_thresholds(given, ["A", "B"])


def make_card(noise, draws=None):
    """Three cores; the regression is a fixed, middling prediction."""
    pairs = [draw_images(seed, noise=noise) for seed in range(3)]
    middling = [draw_images(seed, noise=0.5)[0] for seed in range(3)]
    mean = [np.broadcast_to(np.float32([[[0.5]], [[0.5]], [[0.0]]]), pairs[0][0].shape).copy() for _ in range(3)]
    cores = {
        MODEL: [scored(p, t) for p, t in pairs],
        MEAN: [scored(m, t) for m, (_, t) in zip(mean, pairs, strict=True)],
        REGRESSION: [scored(m, t) for m, (_, t) in zip(middling, pairs, strict=True)],
    }
    samples = [t.reshape(3, -1) for _, t in pairs]
    return make_scorecard(("CD3e", "CD20", "Blank"), cores, samples, THRESHOLDS, draws)


def test_a_model_that_does_not_beat_its_baselines_is_told_so():
    said = "\n".join(verdicts(make_card(noise=2.0)))
    assert "PSNR: the model does NOT beat the training mean overall" in said
    assert "Pearson: the model does NOT beat the regression from colours overall" in said
    assert "does NOT beat it for 2 of 2 markers: CD3e, CD20" in said


def test_a_model_that_beats_its_baselines_is_not_scolded():
    draws = np.array([[1, 1, 1], [2, 1, 0], [0, 1, 2]], float)
    said = verdicts(make_card(0.05, draws))
    assert len(said) == 3
    assert all("the model beats" in sentence for sentence in said)


def test_compared_numbers_are_means_over_the_same_markers():
    card = make_card(0.2)
    assert np.isnan(card.values[MEAN]["psnr_db"][2])
    both = card.values[MODEL]["psnr_db"][:2].mean()
    assert f"({both:.1f} against" in verdicts(card)[0]


def test_rows_of_scores_csv_fit_their_columns_with_and_without_a_regression():
    card = make_card(0.2)
    assert len(csv_columns(card)) == len(csv_row(card, 0)) == len(csv_row(card, None))
    del card.values[REGRESSION]
    row = dict(zip(csv_columns(card), csv_row(card, 0), strict=True))
    assert np.isnan(row["regression_pearson"])
    assert row["mean_psnr_db"] == pytest.approx(card.values[MEAN]["psnr_db"][0])


def test_the_interval_of_a_gain_is_that_of_paired_resamples():
    draws = np.eye(3)
    card = make_card(0.2, draws)
    value, low, high = card.gain(REGRESSION, "pearson", 0)
    singles = [
        pearsonr(draw_images(s, noise=0.2)[0][0].ravel(), draw_images(s)[1][0].ravel()).statistic
        - pearsonr(draw_images(s, noise=0.5)[0][0].ravel(), draw_images(s)[1][0].ravel()).statistic
        for s in range(3)
    ]
    assert (low, high) == pytest.approx(tuple(np.quantile(singles, [0.025, 0.975])))
    assert low < value < high
