"""The straight line from prediction to measurement, against numpy's fit and by hand."""

import numpy as np
import pytest
import torch

from orion_unet.correlation import moments
from orion_unet.errors import InputError
from orion_unet.models.recalibration import Recalibration


def test_the_lines_are_those_of_least_squares():
    rng = np.random.default_rng(0)
    p = rng.random((3, 5000))
    t = np.stack([0.5 * p[0] + 0.1, 0.3 * p[1] ** 2 + 0.1 * rng.random(5000), 0.9 * p[2] + 0.2 * rng.random(5000)])
    found = Recalibration.fit(moments(p, t))
    for marker in range(3):
        expected = np.polyfit(p[marker], t[marker], 1)
        np.testing.assert_allclose([found.scale[marker], found.offset[marker]], expected, rtol=1e-9)
    assert found.pixels == 5000


def test_what_says_nothing_of_the_level_is_left_alone_and_a_constant_marker_becomes_its_constant():
    p = np.array([[0.1, 0.2, 0.3, 0.4]] * 4)
    p[1] = 0.25
    t = np.array([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4], [0.0] * 4, [0.7] * 4])
    found = Recalibration.fit(moments(p, t))
    # It falls where the measurement rises; it is constant; the marker is empty; the marker is constant.
    np.testing.assert_array_equal(found.scale, [1, 1, 0, 0])
    np.testing.assert_allclose(found.offset, [0, 0, 0, 0.7])
    unmeasured = Recalibration.fit(np.zeros((6, 2)))
    assert (unmeasured.scale.tolist(), unmeasured.offset.tolist(), unmeasured.pixels) == ([1, 1], [0, 0], 0)


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
