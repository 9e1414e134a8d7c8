"""Scores of evaluation, against scipy, scikit-image, scikit-learn and hand calculations."""

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, rankdata, spearmanr
from scipy.stats import t as student
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from sklearn.metrics import average_precision_score, roc_auc_score

from orion_unet.errors import InputError
from orion_unet.evaluation.scorecard import MEAN, MODEL, REGRESSION, make_scorecard, verdicts
from orion_unet.evaluation.scores import (
    RankBins,
    counted_rank_scores,
    draw_pixels,
    overall,
    positive_thresholds,
    rank_scores,
    sampled_share,
    score_core,
    sum_scores,
)
from orion_unet.intervals import leave_one_out

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
        assert found["pearson"][marker] == pytest.approx(pearsonr(p.ravel(), t.ravel()).statistic, abs=1e-6)
        assert found["pearson_boxes"][marker] == pytest.approx(pearsonr(boxes(p), boxes(t)).statistic, abs=1e-6)
        assert found["mae"][marker] == pytest.approx(np.abs(p - t).mean())
        assert found["psnr_db"][marker] == pytest.approx(peak_signal_noise_ratio(t, p, data_range=1))
        similarity = structural_similarity(
            t, p, data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert found["ssim"][marker] == pytest.approx(similarity, abs=1e-6)
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
    assert found["pearson"][0] == pytest.approx(pearsonr(p, t).statistic, abs=1e-6)
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


def test_counted_rank_scores_equal_the_scores_of_the_cores_counted():
    rng = np.random.default_rng(3)
    core = np.repeat([0, 1, 2], [3000, 2000, 4000])
    measured = rng.random(9000) ** 3 + 0.1 * core
    predicted = measured + 0.5 * rng.standard_normal(9000)
    positive = measured > 0.9
    counts = np.array([[1, 1, 1], [2, 0, 1], [0, 3, 0]])
    found = counted_rank_scores(predicted, measured, positive, core, counts.astype(float))
    ranks = rankdata(predicted), rankdata(measured)
    for row, times in enumerate(counts):
        index = np.concatenate([np.tile(np.flatnonzero(core == k), count) for k, count in enumerate(times)])
        assert found["auc"][row] == pytest.approx(roc_auc_score(positive[index], predicted[index]), abs=1e-3)
        precision = average_precision_score(positive[index], predicted[index])
        assert found["average_precision"][row] == pytest.approx(precision, abs=5e-3)
        r = pearsonr(ranks[0][index], ranks[1][index]).statistic
        assert found["spearman"][row] == pytest.approx(r, abs=1e-9)
    assert found["spearman"][0] == pytest.approx(spearmanr(predicted, measured).statistic)


@pytest.mark.parametrize("levels", [2, 40])
def test_curves_with_few_distinct_predictions_are_exact(levels):
    rng = np.random.default_rng(levels)
    core = rng.integers(0, 3, 4000)
    predicted = rng.integers(0, levels, 4000) / levels
    positive = rng.random(4000) < 0.1 + 0.3 * predicted
    bins = RankBins(predicted, positive, core, 3)
    counts = np.array([[1, 1, 1], [0, 2, 1]], float)
    for row, drawn in enumerate(counts.astype(int)):
        index = np.concatenate([np.tile(np.flatnonzero(core == k), times) for k, times in enumerate(drawn)])
        assert bins.auc(counts)[row] == pytest.approx(roc_auc_score(positive[index], predicted[index]))
        expected = average_precision_score(positive[index], predicted[index])
        assert bins.average_precision(counts)[row] == pytest.approx(expected)


def test_curves_need_both_classes_in_the_resample():
    positive = np.array([True, True, False, False])
    bins = RankBins(np.array([0.9, 0.8, 0.1, 0.2]), positive, np.array([0, 0, 1, 1]), 2)
    counts = np.array([[1, 1], [2, 0], [0, 2]], float)
    assert bins.auc(counts)[0] == 1
    assert np.isnan(bins.auc(counts)[1:]).all()
    assert np.isnan(bins.average_precision(counts)[1:]).all()


def test_a_rare_class_is_followed_finely():
    rng = np.random.default_rng(1)
    positive = np.arange(200_000) < 100
    predicted = rng.standard_normal(200_000) + 3 * positive
    bins = RankBins(predicted, positive, np.zeros(200_000, int), 1)
    expected = average_precision_score(positive, predicted)
    assert bins.average_precision(np.ones((1, 1)))[0] == pytest.approx(expected, abs=0.02)


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


CORES = 9


def make_card(noise, cores=CORES, left_out=None, spread=0.0):
    """Cores of noise; the regression is a fixed, middling prediction. ``spread`` makes every other core noisier."""
    pairs = [draw_images(seed, noise=noise + spread * (seed % 2)) for seed in range(cores)]
    middling = [draw_images(seed, noise=0.5)[0] for seed in range(cores)]
    mean = [np.broadcast_to(np.float32([[[0.5]], [[0.5]], [[0.0]]]), pairs[0][0].shape).copy() for _ in range(cores)]
    scores = {
        MODEL: [scored(p, t) for p, t in pairs],
        MEAN: [scored(m, t) for m, (_, t) in zip(mean, pairs, strict=True)],
        REGRESSION: [scored(m, t) for m, (_, t) in zip(middling, pairs, strict=True)],
    }
    samples = [t.reshape(3, -1) for _, t in pairs]
    return make_scorecard(("CD3e", "CD20", "Blank"), scores, samples, THRESHOLDS, left_out)


ALL_UNITS = leave_one_out([str(core) for core in range(CORES)])


def test_a_model_that_does_not_beat_its_baselines_is_said_not_to():
    said = "\n".join(verdicts(make_card(2.0, left_out=ALL_UNITS)))
    assert "PSNR: the model does NOT beat the training mean overall" in said
    assert "Pearson: the model does NOT beat the regression from colours overall" in said
    assert "does NOT beat it for 2 of 2 markers: CD3e, CD20" in said


def test_a_model_that_beats_its_baselines_is_said_to():
    said = verdicts(make_card(0.05, left_out=ALL_UNITS))
    assert len(said) == 3
    assert all("the model beats" in sentence for sentence in said)


def test_a_difference_that_may_be_chance_is_no_verdict():
    card = make_card(0.2, left_out=ALL_UNITS, spread=0.6)
    _, low, high = card.gain(REGRESSION, "psnr_db")
    assert low < 0 < high
    said = "\n".join(verdicts(card))
    assert "PSNR: the model and the regression from colours are not told apart overall" in said
    assert "Not told apart for 2 of 2 markers: CD3e, CD20" in said


@pytest.mark.parametrize("noise", [0.05, 2.0])
def test_without_intervals_there_is_no_verdict(noise):
    said = verdicts(make_card(noise, cores=3))
    assert len(said) == 3
    assert all("too few groups to tell the model from" in sentence for sentence in said)
    assert "beat" not in "".join(said)


def test_compared_numbers_are_means_over_the_same_markers():
    card = make_card(0.2)
    assert np.isnan(card.values[MEAN]["psnr_db"][2])
    both = card.values[MODEL]["psnr_db"][:2].mean()
    assert f"({both:.1f} against" in verdicts(card)[0]


def test_the_interval_of_a_gain_is_that_of_the_jackknife_of_the_paired_difference():
    value, low, high = make_card(0.2, left_out=ALL_UNITS).gain(REGRESSION, "pearson", 0)
    images = [(draw_images(s, noise=0.2), draw_images(s, noise=0.5)[0]) for s in range(CORES)]

    def gain(cores):
        p, m, t = (
            np.concatenate([part(images[core])[0].ravel() for core in cores]).astype(float)
            for part in (lambda core: core[0][0], lambda core: core[1], lambda core: core[0][1])
        )
        return pearsonr(p, t).statistic - pearsonr(m, t).statistic

    without = [gain([core for core in range(CORES) if core != left]) for left in range(CORES)]
    error = np.sqrt((CORES - 1) / CORES * np.sum((without - np.mean(without)) ** 2))
    reach = student.ppf(0.975, CORES - 1) * error
    assert value == pytest.approx(gain(range(CORES)), abs=1e-6)
    assert (low, high) == pytest.approx((value - reach, value + reach), abs=1e-6)


def test_a_marker_is_scored_by_the_cores_in_which_it_was_measured():
    """Marker 1 was measured in 9 of 12 cores: its scores and intervals are those of a scorecard of the 9."""
    cores = [draw_images(seed, size=(24, 24)) for seed in range(12)]
    present = np.ones((12, 3), bool)
    present[9:, 1] = False
    parts, samples = {MODEL: [], MEAN: []}, []
    for (predicted, measured), there in zip(cores, present, strict=True):
        sample = measured.reshape(3, -1).copy()
        sample[~there] = np.nan
        samples.append(sample)
        for kind, image in ((MODEL, predicted), (MEAN, np.full_like(predicted, 0.4))):
            parts[kind].append(scored(image, measured * there[:, None, None]).of(there))
    names = ("a", "b", "c")
    card = make_scorecard(names, parts, samples, THRESHOLDS, leave_one_out([f"{core:02d}" for core in range(12)]))
    nine = {kind: of_kind[:9] for kind, of_kind in parts.items()}
    expected = make_scorecard(names, nine, samples[:9], THRESHOLDS, leave_one_out([f"{core:02d}" for core in range(9)]))
    assert [card.cores_with(marker) for marker in range(3)] == [12, 9, 12]
    for metric in expected.values[MODEL]:
        assert card.score(MODEL, metric, 1) == pytest.approx(expected.score(MODEL, metric, 1), abs=1e-9)
    assert card.gain(MEAN, "psnr_db", 1) == pytest.approx(expected.gain(MEAN, "psnr_db", 1), abs=1e-9)
    assert np.isnan(card.per_core["mae"][9:, 1]).all() and np.isfinite(card.per_core["mae"][:9, 1]).all()
    assert verdicts(card)
