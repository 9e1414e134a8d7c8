"""The picture of positive cells: the same scale in every image, and a ring at each positive cell."""

import io

import numpy as np
import pytest

pytest.importorskip("skimage")
PIL = pytest.importorskip("PIL.Image")

from orion_unet.inference.trust import MarkerTrust  # noqa: E402
from orion_unet.quantification.cell_labels import CellLabels  # noqa: E402
from orion_unet.quantification.cells import ImageCells  # noqa: E402
from orion_unet.quantification.measure import measure_geometry, measure_means  # noqa: E402
from orion_unet.quantification.overview import draw_positives  # noqa: E402
from orion_unet.quantification.positives import Cutoff, Positives, TrainingRange  # noqa: E402
from orion_unet.slides.markers import ArrayMarkers  # noqa: E402


def no_step():
    pass


def drawn(image, cutoff=np.nan, scale=None, trust=None):
    """The picture (h, w, 3) of one marker with two cells, the left one brighter."""
    labels = np.zeros((1, 100, 100), np.int32)
    labels[0, 40:60, 15:35], labels[0, 40:60, 65:85] = 1, 2
    opened = ArrayMarkers("image", lambda: image, "chw")
    cells = CellLabels(ArrayMarkers("labels", lambda: labels, "chw"), "")
    to_unit = scale.to_unit(["CD3e"], image.dtype, False) if scale else None
    means = measure_means(cells, opened, [0], 0, to_unit, no_step)
    geometry = measure_geometry(cells, no_step)
    found = ImageCells("image", "image", "", (100, 100), None, cells.numbers, geometry, means, None, ())
    positives = Positives({"CD3e": Cutoff(cutoff, cutoff, "as stored", "a test")}, scale)
    picture = draw_positives(opened, found, ["CD3e"], positives, to_unit, trust)
    return np.asarray(PIL.open(io.BytesIO(picture)).convert("RGB")).astype(int)


def two_cells(left, right):
    image = np.zeros((1, 100, 100), np.uint16)
    image[0, 40:60, 15:35], image[0, 40:60, 65:85] = left, right
    return image


def rings(picture):
    """Where (y, x) in parts of its sides a picture is more blue than red: the markers are grey."""
    return np.argwhere(picture[..., 2] - picture[..., 0] > 60) / np.array(picture.shape[:2])


def test_a_ring_is_drawn_around_positive_cells_alone():
    hits = rings(drawn(two_cells(40000, 9000), cutoff=20000))
    assert len(hits) > 20
    assert hits[:, 1].max() < 0.45
    # The panel begins below its title.
    np.testing.assert_allclose(hits.mean(0), [0.54, 0.26], atol=0.05)
    assert not len(rings(drawn(two_cells(40000, 9000))))


def test_with_a_range_of_training_equal_values_look_equal_in_every_image():
    scale = TrainingRange(65535.0, {"CD3e": (0.0, 1.0)}, "linear")
    dim, bright = drawn(two_cells(9000, 9000), scale=scale), drawn(two_cells(9000, 60000), scale=scale)
    left = (slice(int(0.5 * len(dim)), int(0.58 * len(dim))), slice(int(0.22 * dim.shape[1]), int(0.3 * dim.shape[1])))
    np.testing.assert_array_equal(dim[left], bright[left])
    assert abs(dim[left].mean() - 9000 / 65535 * 255) < 2


def test_a_nearly_empty_marker_looks_empty():
    picture = drawn(two_cells(60, 30))
    inside = picture[len(picture) // 5 : -len(picture) // 8, len(picture) // 8 : -len(picture) // 8]
    assert inside.max() < 8


def test_a_marker_that_is_not_supported_has_its_verdict_in_its_title():
    image = two_cells(9000, 9000)
    plain, weak = drawn(image), drawn(image, trust={"CD3e": MarkerTrust(0.3, 0.1, 0.5, 0.2, "weak")})
    changed = np.argwhere((plain != weak).any(axis=2))
    assert len(changed) and changed[:, 0].max() < 0.12 * len(plain)
    supported = drawn(image, trust={"CD3e": MarkerTrust(0.9, 0.8, 0.95, 0.2, "supported")})
    np.testing.assert_array_equal(supported, plain)
