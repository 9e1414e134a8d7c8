"""The display ranges of panels of predictions."""

import pytest
import torch

from orion_unet.training.sanity import SMALLEST_RANGE, display_range


def test_the_range_is_a_high_quantile_of_the_measured_values():
    values = torch.linspace(0, 1, 1001)
    assert display_range(values.reshape(7, 11, 13)) == pytest.approx(0.998)


def test_a_dark_marker_keeps_a_range_in_which_it_looks_dark():
    assert display_range(torch.full((3, 8, 8), 0.001)) == SMALLEST_RANGE


def test_patches_of_more_values_than_torch_can_rank_are_no_limit():
    # Three patches of 2,400 pixels have 17.3 million values; torch.quantile takes 16.8 million.
    values = torch.zeros(3, 2400, 2400, dtype=torch.float16)
    values[:, :24] = 0.5
    assert display_range(values) == pytest.approx(0.5)
