"""The straight line from prediction to measurement, against numpy's fit and by hand."""

import numpy as np
import pytest
import torch

from orion_unet.correlation import moments
from orion_unet.errors import InputError
from orion_unet.models.recalibration import LEAST_PATCHES, Recalibration


def fit(p, t, patches=8, empty=False):
    return Recalibration.fit(moments(p, t), np.full(len(p), patches), np.broadcast_to(empty, len(p)))


def test_the_lines_are_those_of_least_squares():
    rng = np.random.default_rng(0)
    p = rng.random((3, 5000))
    t = np.stack([0.5 * p[0] + 0.1, 0.3 * p[1] ** 2 + 0.1 * rng.random(5000), 0.9 * p[2] - 0.2 * rng.random(5000)])
    found = fit(p, t)
    for marker in range(3):
        expected = np.polyfit(p[marker], t[marker], 1)
        np.testing.assert_allclose([found.scale[marker], found.offset[marker]], expected, rtol=1e-9)
    assert found.pixels == 5000
    assert found.sentence() == f"3 of 3 markers, scales {found.scale.min():.2f} to {found.scale.max():.2f}"


def test_a_marker_that_says_nothing_of_its_level_is_left_alone_and_an_empty_one_becomes_0():
    p = np.array([[0.1, 0.2, 0.3, 0.4]] * 4)
    p[1] = 0.25
    t = np.array([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4], [0.0] * 4, [0.0] * 4])
    # It falls where the measurement rises; it is flat; the patches show nothing of the marker; the marker is empty.
    found = fit(p, t, empty=np.array([False, False, False, True]))
    np.testing.assert_array_equal(found.scale, [1, 1, 1, 0])
    np.testing.assert_array_equal(found.offset, 0)
    unmeasured = Recalibration.fit(np.zeros((6, 2)), np.zeros(2), np.zeros(2, bool))
    assert (unmeasured.scale.tolist(), unmeasured.offset.tolist(), unmeasured.pixels) == ([1, 1], [0, 0], 0)
    assert unmeasured.sentence() == "changes no marker"


def test_a_few_patches_are_no_evidence():
    p = np.linspace(0, 1, 50)[None]
    assert fit(p, 0.5 * p, patches=LEAST_PATCHES).scale == pytest.approx(0.5)
    assert fit(p, 0.5 * p, patches=LEAST_PATCHES - 1).scale == 1


def test_a_prediction_is_never_widened():
    p = np.linspace(0.4, 0.6, 50)[None]
    assert fit(p, 1.1 * p - 0.1).document() == {"scale": [1.0], "offset": [0.0], "pixels": 50}


def test_a_prediction_is_scaled_marker_by_marker_and_stays_within_0_and_1():
    line = Recalibration(np.array([2.0, 0.5]), np.array([-0.2, 0.1]), 4)
    given = torch.tensor([0.05, 0.3, 0.9])
    found = line.apply_(given.repeat(2, 1)[None, :, None].clone())
    expected = torch.tensor([[0.0, 0.4, 1.0], [0.125, 0.25, 0.55]])
    torch.testing.assert_close(found, expected[None, :, None])


def test_a_document_is_read_back_and_a_damaged_one_refused():
    line = Recalibration(np.array([2.0, 0.5]), np.array([-0.2, 0.1]), 4)
    again = Recalibration.from_document(line.document(), 2)
    assert again.document() == line.document()
    for damaged in (
        None,
        [],
        {"scale": [1.0, 1.0], "offset": [0.0, 0.0]},
        line.document() | {"scale": [1.0, float("nan")]},
        line.document() | {"scale": ["x", 1]},
        line.document() | {"offset": [0.0]},
    ):
        with pytest.raises(InputError, match="is damaged"):
            Recalibration.from_document(damaged, 2)
