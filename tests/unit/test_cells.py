"""Cells on drawn discs with known places and means."""

import numpy as np
import pytest
import tifffile
import torch
from scipy import ndimage
from scipy.special import expit, logit
from scipy.stats import t as student
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from orion_unet.errors import InputError
from orion_unet.evaluation.cell_scores import best_cutoff, best_cutoffs, otsu_thresholds, score_cells
from orion_unet.evaluation.cells import (
    Cells,
    cell_means,
    label_file,
    load_labels,
    measure_cells,
)
from orion_unet.evaluation.scored_folder import Region
from orion_unet.intervals import leave_one_out
from orion_unet.segmentation import nuclear_marker, segment_nuclei

CENTRES = [(20, 20), (20, 60), (50, 40), (80, 20), (80, 75)]


def discs(centres, radius=7, size=(100, 100), noise=0.02, seed=0):
    rows, columns = np.mgrid[: size[0], : size[1]]
    image = np.zeros(size)
    for y, x in centres:
        image[np.hypot(rows - y, columns - x) <= radius] = 0.8
    return np.clip(image + noise * np.random.default_rng(seed).standard_normal(size), 0, 1)


def test_every_disc_is_one_nucleus_at_its_place():
    labels = segment_nuclei(discs(CENTRES))
    assert labels.max() == len(CENTRES)
    centres = ndimage.center_of_mass(labels > 0, labels, range(1, 6))
    assert sorted(map(tuple, np.round(centres).astype(int).tolist())) == sorted(CENTRES)


def test_touching_nuclei_are_parted():
    labels = segment_nuclei(discs([(50, 40), (50, 53)]))
    assert labels.max() == 2
    assert labels[50, 40] != labels[50, 53]


def test_specks_are_no_nuclei():
    image = discs(CENTRES)
    image[5, 50] = image[95, 50] = 1
    assert segment_nuclei(image).max() == len(CENTRES)


def test_an_image_without_nuclei_has_no_cells():
    empty = segment_nuclei(np.full((40, 40), 0.3))
    assert empty.max() == 0
    assert segment_nuclei(discs([], noise=0.005)).max() == 0
    cells = measure_cells(empty, Region(*torch.rand(3, 3, 40, 40), np.ones(3, bool)))
    assert cells.measured.shape == cells.predicted.shape == (0, 3)


def test_scores_over_cells_are_those_of_the_cores_in_which_the_marker_was_measured():
    """Marker 1 was measured in cores 0 to 8 of 12; its scores are those without the others."""
    rng = np.random.default_rng(0)
    core = np.repeat(np.arange(12), 30)
    measured = rng.random((len(core), 2))
    predicted = measured + rng.normal(0, 0.3, measured.shape)
    partly = measured.copy()
    partly[core > 8, 1] = np.nan
    thresholds = otsu_thresholds(Cells(partly, predicted, core))
    own = Cells(measured[core <= 8], predicted[core <= 8], core[core <= 8])
    assert thresholds == pytest.approx([otsu_thresholds(Cells(measured, predicted, core))[0], otsu_thresholds(own)[1]])
    cutoffs = best_cutoffs(Cells(partly, predicted, core), thresholds)
    found = score_cells(
        Cells(partly, predicted, core), thresholds, cutoffs, leave_one_out([f"{c:02d}" for c in range(12)])
    )
    expected = score_cells(own, thresholds, cutoffs, leave_one_out([f"{c:02d}" for c in range(9)]))
    for metric, values in expected.values.items():
        assert found.values[metric][1] == pytest.approx(values[1], abs=1e-12)
        ends = [(scores.low[metric][1], scores.high[metric][1]) for scores in (found, expected)]
        assert ends[0] == pytest.approx(ends[1], abs=1e-9)
    # Below eight cores there is no interval.
    partly[core > 6, 1] = np.nan
    few = score_cells(
        Cells(partly, predicted, core), thresholds, cutoffs, leave_one_out([f"{c:02d}" for c in range(12)])
    )
    assert np.isfinite(few.values["pearson"]).all()
    assert np.isfinite(few.low["pearson"]).tolist() == [True, False]


def test_means_of_cells_equal_those_of_scipy():
    labels = segment_nuclei(discs(CENTRES))
    images = np.random.default_rng(0).random((4, 100, 100)).astype(np.float32)
    found = cell_means(labels, torch.from_numpy(images))
    for marker, image in enumerate(images):
        assert found[:, marker] == pytest.approx(ndimage.mean(image.astype(float), labels, range(1, 6)))


def test_means_of_drawn_discs_are_what_was_drawn():
    labels = np.zeros((30, 30), int)
    labels[2:8, 2:8], labels[20:25, 10:20] = 1, 2
    image = np.where(labels == 1, 0.25, np.where(labels == 2, 0.75, 0.0)).astype(np.float32)
    assert cell_means(labels, torch.from_numpy(image)[None]).tolist() == [[0.25], [0.75]]


@pytest.mark.parametrize("suffix", ["npy", "tif"])
def test_label_files_are_read_and_numbered_without_gaps(tmp_path, suffix):
    labels = np.zeros((20, 30), np.uint16)
    labels[:5, :5], labels[10:, 20:] = 7, 300
    path = tmp_path / f"core_LABELS.{suffix}"
    np.save(path, labels) if suffix == "npy" else tifffile.imwrite(path, labels)
    assert label_file(tmp_path, "core") == path
    found = load_labels(path, (20, 30))
    assert (found == np.searchsorted([0, 7, 300], labels)).all()


def test_labels_without_background_are_all_cells(tmp_path):
    np.save(tmp_path / "core_LABELS.npy", np.repeat([[4, 9]], 3, axis=0))
    assert load_labels(tmp_path / "core_LABELS.npy", (3, 2)).tolist() == [[1, 2]] * 3


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (np.zeros((4, 4)), "float64"),
        (np.zeros((4, 5), int), r"\(4, 5\)"),
        (np.full((4, 4), -1), "negative"),
        (np.array([{}], object), "cannot be read"),
    ],
)
def test_labels_that_cannot_be_used_are_refused(tmp_path, content, said):
    path = tmp_path / "core_LABELS.npy"
    # Pickles only what this test makes: the reader must refuse the object array.
    np.save(path, content, allow_pickle=True)
    with pytest.raises(InputError, match=said):
        load_labels(path, (4, 4))


@pytest.mark.parametrize("content", [3, 60, 250])
def test_a_truncated_label_image_is_refused(tmp_path, content):
    path = tmp_path / "core_LABELS.tif"
    tifffile.imwrite(path, np.ones((4, 4), np.uint16))
    path.write_bytes(path.read_bytes()[:content])
    with pytest.raises(InputError, match=r"core_LABELS\.tif"):
        load_labels(path, (4, 4))


def test_the_nuclear_marker_is_told_from_the_names():
    assert nuclear_marker(["CD3e", "Hoechst"], None, "give labels") == 1
    assert nuclear_marker(["DNA_1", "DAPI"], None, "give labels") == 1
    assert nuclear_marker(["CD3e", "CD20"], "CD20", "give labels") == 1
    with pytest.raises(InputError, match="--nuclear_marker"):
        nuclear_marker(["CD3e", "CD20"], None, "give labels")
    with pytest.raises(InputError, match="CD8"):
        nuclear_marker(["CD3e", "CD20"], "CD8", "give labels")


def draw_cells(seed=0, count=900, cores=4):
    rng = np.random.default_rng(seed)
    measured = np.concatenate([rng.normal(0.1, 0.03, (count * 4 // 5, 2)), rng.normal(0.6, 0.1, (count // 5, 2))])
    predicted = measured + rng.normal(0, 0.15, measured.shape)
    return Cells(measured, predicted, rng.integers(0, cores, count))


def test_otsu_parts_two_populations():
    thresholds = otsu_thresholds(draw_cells())
    assert ((thresholds > 0.15) & (thresholds < 0.5)).all()
    constant = Cells(np.ones((5, 1)), np.ones((5, 1)), np.zeros(5, int))
    assert np.isnan(otsu_thresholds(constant)).all()


def test_the_best_cutoff_is_the_best_of_all():
    cells = draw_cells()
    positive, p = cells.measured[:, 0] > 0.3, cells.predicted[:, 0]
    tried = [f1_score(positive, p > cut) for cut in np.sort(p)]
    assert f1_score(positive, p > best_cutoff(p, positive)) == pytest.approx(max(tried))


def test_the_best_cutoff_takes_equal_predictions_together():
    p, positive = np.array([0.2, 0.2, 0.2, 0.9]), np.array([True, False, False, True])
    # Above 0.9: F1 = 2/3. Above 0.2, all four: F1 = 2/3 too, and the first wins.
    assert best_cutoff(p, positive) == pytest.approx(0.55)
    assert np.isnan(best_cutoff(p, np.zeros(4, bool)))


def test_scores_over_cells_equal_scikit_learn():
    cells = draw_cells()
    thresholds = np.array([0.3, np.nan])
    cutoffs = best_cutoffs(cells, thresholds)
    found = score_cells(cells, thresholds, cutoffs, None)
    positive, p = cells.measured[:, 0] > 0.3, cells.predicted[:, 0]
    assert found.count == 900
    expected = {
        "pearson": np.corrcoef(p, cells.measured[:, 0])[0, 1],
        "auc": roc_auc_score(positive, p),
        "average_precision": average_precision_score(positive, p),
        "f1": f1_score(positive, p > cutoffs[0]),
        "fraction_positive": positive.mean(),
    }
    assert {metric: values[0] for metric, values in found.values.items()} == pytest.approx(expected)
    assert all(np.isnan(found.values[metric][1]) for metric in expected if metric != "pearson")
    assert found.overall["f1"][0] == pytest.approx(expected["f1"])
    assert np.isnan([*found.low["f1"], found.overall["f1"][1]]).all()


def test_intervals_over_cells_are_those_of_leaving_out_each_core():
    cells, thresholds = draw_cells(cores=8), np.array([0.3, 0.3])
    found = score_cells(cells, thresholds, np.array([0.3, 0.3]), leave_one_out([str(core) for core in range(8)]))
    positive, called = cells.measured[:, 0] > 0.3, cells.predicted[:, 0] > 0.3
    # On the scale without bounds, ln(f1 / (1 - f1)), of which Fisher's transform is half.
    without = [logit(f1_score(positive[cells.core != k], called[cells.core != k])) for k in range(8)]
    error = np.sqrt(7 / 8 * np.sum((without - np.mean(without)) ** 2))
    ends = logit(f1_score(positive, called)) + student.ppf([0.025, 0.975], 7) * error
    assert (found.low["f1"][0], found.high["f1"][0]) == pytest.approx(tuple(expit(ends)))
    for metric, values in found.values.items():
        assert (found.low[metric] < values).all()
        assert (values < found.high[metric]).all()
        value, low, high = found.overall[metric]
        assert low < value < high


def test_no_cells_have_no_scores():
    found = score_cells(Cells.joined([], 2), np.full(2, np.nan), np.full(2, np.nan), None)
    assert found.count == 0
    assert all(np.isnan(values).all() for values in found.values.values())


def test_cells_of_several_cores_are_joined_in_order():
    parts = [Cells(np.full((n, 2), n), np.zeros((n, 2)), np.zeros(n, int)) for n in (2, 0, 3)]
    joined = Cells.joined(parts, 2)
    assert joined.core.tolist() == [0, 0, 2, 2, 2]
    assert joined.measured[:, 0].tolist() == [2, 2, 3, 3, 3]
