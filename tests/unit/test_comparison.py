"""Measured beside predicted cells: scores, intervals, counts and distances against calculations of their own."""

import math
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from scipy.stats import t

pytest.importorskip("sklearn")
from sklearn.metrics import f1_score, roc_auc_score

from orion_unet.quantification.cells import ImageCells
from orion_unet.quantification.comparison import COLUMNS, compare
from orion_unet.quantification.comparison_figure import draw_comparison
from orion_unet.quantification.measure import CellGeometry, CellMeans
from orion_unet.quantification.positives import STORED, Cutoff, Positives

NAMES = ("CD3e", "CD20")
POSITIVES = Positives({"CD3e": Cutoff(0.6, 0.5, STORED, ""), "CD20": Cutoff(math.nan, 0.5, STORED, "")})


def image(name, seed, count=40, pixel_size_um=0.5):
    """An image whose second measured channel is CD3e."""
    rng = np.random.default_rng(seed)
    measured = rng.random((count, 2))
    predicted = np.clip(measured + rng.normal(0, 0.2, measured.shape), 0, 1)
    y, x = rng.random((2, count)) * 200
    return ImageCells(
        name, Path(name), "", (200, 400), pixel_size_um, np.arange(1, count + 1),
        CellGeometry(y, x, np.full(count, 50), np.zeros(count, int)), CellMeans(predicted),
        CellMeans(measured[:, ::-1]), (1, 0),
    )  # fmt: skip


@pytest.fixture(scope="module")
def images():
    return [image(f"core_{at}", at) for at in range(18)]


def both(images):
    """Predicted and measured CD3e of all cells."""
    return (
        np.concatenate([cells.means.mean[:, 0] for cells in images]),
        np.concatenate([cells.measured.mean[:, 1] for cells in images]),
    )


def test_the_intervals_over_groups_leave_out_one_patient_at_a_time(images):
    groups = [f"patient_{at // 2}" for at in range(18)]
    found = compare(NAMES, POSITIVES, images, groups)
    predicted, measured = both(images)
    unit = np.repeat(np.arange(18) // 2, 40)

    def f1(kept):
        return f1_score(measured[kept] > 0.5, predicted[kept] > 0.6)

    value = f1(unit >= 0)
    # Student's t with the jackknife's error, on Fisher's scale of (0, 1).
    centre, *moved = (math.atanh(2 * each - 1) for each in (value, *(f1(unit != left) for left in range(9))))
    reach = t.ppf(0.975, 8) * math.sqrt(8**2 / 9 * np.var(moved, ddof=1))
    expected = [(math.tanh(centre + side * reach) + 1) / 2 for side in (-1, 1)]
    marker = found.markers["CD3e"]
    assert marker.scores["f1"] == pytest.approx(value)
    assert marker.over_groups["f1"] == pytest.approx(expected)
    assert (found.groups, found.grouped, found.no_interval) == (9, True, "")
    assert found.markers["CD20"].over_groups["f1"] == pytest.approx((math.nan, math.nan), nan_ok=True)


def test_the_intervals_over_cells_are_as_wide_as_those_of_independent_cells(images):
    found = compare(NAMES, POSITIVES, images, [cells.name for cells in images]).markers["CD3e"]
    predicted, measured = both(images)
    low, high = found.over_cells["pearson"]
    # Fisher's interval of Pearson's r.
    reach = 1.96 / math.sqrt(len(predicted) - 3)
    expected = [math.tanh(math.atanh(found.scores["pearson"]) + side * reach) for side in (-1, 1)]
    assert high - low == pytest.approx(expected[1] - expected[0], rel=0.35)
    assert low < found.scores["pearson"] < high
    low, high = found.over_cells["auc"]
    assert low < roc_auc_score(measured > 0.5, predicted) < high


def test_with_few_images_there_are_intervals_over_cells_alone(images):
    found = compare(NAMES, POSITIVES, images[:3], ["a", "b", "c"])
    assert "too few images (3) for an interval" in found.no_interval
    assert math.isnan(found.markers["CD3e"].over_groups["f1"][0])
    assert math.isfinite(found.markers["CD3e"].over_cells["f1"][0])


def test_the_confusion_matrix_counts_every_cell_once(images):
    found = compare(NAMES, POSITIVES, images, [cells.name for cells in images]).markers
    predicted, measured = both(images)
    truth, called = measured > 0.5, predicted > 0.6
    counts = [[(~truth & ~called).sum(), (~truth & called).sum()], [(truth & ~called).sum(), (truth & called).sum()]]
    np.testing.assert_array_equal(found["CD3e"].confusion, counts)
    assert found["CD20"].confusion is None


def test_densities_and_distances_of_an_image_are_those_of_its_positive_cells(images):
    found = compare(NAMES, POSITIVES, images, [cells.name for cells in images])
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in found.table()]
    assert [row["marker"] for row in rows] == ["CD3e"] * 18
    cells, row = images[4], rows[4]
    truth, called = cells.measured.mean[:, 1] > 0.5, cells.means.mean[:, 0] > 0.6
    assert (row["measured_positive"], row["predicted_positive"]) == (truth.sum(), called.sum())
    assert row["both_positive"] == (truth & called).sum()
    assert row["predicted_per_mm2"] == pytest.approx(called.sum() / (0.1 * 0.2))
    for side, positive in (("measured", truth), ("predicted", called)):
        places = np.stack([cells.geometry.y, cells.geometry.x], axis=1)[positive]
        apart = cdist(places, places) + np.diag(np.full(len(places), np.inf))
        assert row[f"{side}_nearest_px"] == pytest.approx(np.median(apart.min(axis=1)))
        assert row[f"{side}_nearest_um"] == pytest.approx(0.5 * np.median(apart.min(axis=1)))


def test_cells_without_a_measured_value_are_not_counted_as_negative(images):
    cells = image("core", 3)
    cells.measured.mean[:15, 1] = np.nan
    found = compare(NAMES, POSITIVES, [cells], ["a"])
    row = dict(zip(COLUMNS, next(found.table()), strict=True))
    truth, called = cells.measured.mean[15:, 1] > 0.5, cells.means.mean[15:, 0] > 0.6
    assert (row["cells"], row["measured_positive"], row["predicted_positive"]) == (25, truth.sum(), called.sum())
    assert found.markers["CD3e"].confusion.sum() == 25


def test_without_a_pixel_size_and_with_one_cell_what_is_unknown_stays_empty():
    lone = image("lone", 0, count=1, pixel_size_um=None)
    found = compare(NAMES, POSITIVES, [lone], ["a"])
    row = dict(zip(COLUMNS, next(found.table()), strict=True))
    assert math.isnan(row["measured_per_mm2"])
    assert math.isnan(row["measured_nearest_px"])
    assert draw_comparison(found).startswith(b"\x89PNG")


def test_without_measured_markers_nothing_is_compared(images):
    bare = [ImageCells(*(getattr(images[0], name) for name in list(ImageCells.__dataclass_fields__)[:8]), None, ())]
    assert compare(NAMES, POSITIVES, bare, ["a"]) is None
