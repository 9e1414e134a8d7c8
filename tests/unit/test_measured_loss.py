"""The loss and the metrics where panels differ: means over the measured pairs of patch and marker, and nothing else."""

import numpy as np
import pytest
import torch

from orion_unet.losses import TERMS, CompositeLoss
from orion_unet.metrics import MarkerSums
from orion_unet.patch_sums import patch_sums

# Marker 2 is in one patch, marker 3 in none.
MEASURED = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [0, 1, 1, 0]]).bool()
WEIGHTS = [1.0, 2.0, 0.5, 0.5]


def batch(height=12, width=13):
    torch.manual_seed(0)
    prediction, target = torch.rand(2, *MEASURED.shape, height, width).unbind()
    boundary = torch.rand(len(MEASURED), 1, height, width) < torch.tensor([0.1, 0.5, 0.3]).view(-1, 1, 1, 1)
    return prediction, target * MEASURED[:, :, None, None], boundary


def by_hand(name, prediction, target, boundary, factors):
    """A term in float64, from a loop over the measured pairs alone."""
    p, t, m = prediction.double().numpy(), target.double().numpy(), boundary[:, 0].numpy()
    pairs = [(b, c) for b in range(len(p)) for c in range(p.shape[1]) if MEASURED[b, c]]
    if name == "correlation":
        found = []
        for c in sorted({c for _, c in pairs}):
            own = [b for b, channel in pairs if channel == c]
            (pp, pt), (_, tt) = np.cov(p[own, c].ravel(), t[own, c].ravel(), bias=True)
            found.append(factors[c] * (1 - pt / np.sqrt((pp + 1e-4) * (tt + 1e-4))))
        return np.mean(found)
    if name == "variance":
        return np.mean([factors[c] * np.maximum(0, 0.2 - p[b, c].var()) ** 2 for b, c in pairs])
    values = []
    for b, c in pairs:
        error = np.abs(p[b, c] - t[b, c])
        scaling = {"l1": 1 / error, "focal": 2 / (1 + np.exp(-0.2 * error)) - 1}.get(name, 1)
        value = factors[c] * error**2 * scaling
        values.append(value[m[b]] if name == "boundary" else value.ravel())
    return np.concatenate(values).mean()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", TERMS)
def test_each_term_is_the_mean_over_the_measured_pairs_alone(name, weighted):
    prediction, target, boundary = batch()
    weights = torch.tensor(WEIGHTS) if weighted else None
    criterion = CompositeLoss({name: 1.0}, target_variance=0.2, channel_weights=weights)
    expected = by_hand(name, prediction, target, boundary, WEIGHTS if weighted else [1.0] * 4)
    trained, terms = criterion(prediction, target, boundary, measured=MEASURED)
    assert trained.item() == pytest.approx(expected, rel=2e-5)
    assert terms[name].item() == trained.item()
    patches = patch_sums(prediction, target, boundary).where(MEASURED)
    value, validated = criterion.combine(*criterion.sums(patches), torch.stack(patches[:6]).sum(1))
    assert value == validated[name] == pytest.approx(expected, rel=2e-5)


def test_what_was_not_measured_has_no_gradient_whatever_is_predicted_there():
    prediction, target, boundary = batch()
    criterion = CompositeLoss(dict.fromkeys(TERMS, 0.3), target_variance=0.2)
    gradients = []
    for filled in (0.1, 0.9):
        given = torch.where(MEASURED[:, :, None, None], prediction, filled).requires_grad_()
        loss, _ = criterion(given, target, boundary, measured=MEASURED)
        loss.backward()
        gradients.append(given.grad)
    assert torch.equal(*gradients)
    assert (gradients[0].abs().sum((2, 3)) > 0).equal(MEASURED)


def test_with_everything_measured_a_mask_changes_nothing():
    prediction, target, boundary = batch()
    criterion = CompositeLoss(dict.fromkeys(TERMS, 0.3))
    everything = torch.ones_like(MEASURED)
    masked, plain = (criterion(prediction, target, boundary, measured=each) for each in (everything, None))
    torch.testing.assert_close(masked, plain, rtol=1e-5, atol=1e-7)
    patches = patch_sums(prediction, target, boundary)
    assert all(torch.equal(*pair) for pair in zip(patches.where(everything), patches, strict=True))


def test_where_nothing_was_measured_loss_and_gradient_are_0():
    prediction, target, boundary = batch()
    prediction.requires_grad_()
    criterion = CompositeLoss(dict.fromkeys(TERMS, 0.3))
    loss, terms = criterion(prediction, target, boundary, measured=torch.zeros_like(MEASURED))
    loss.backward()
    assert loss.item() == 0
    assert {value.item() for value in terms.values()} == {0}
    assert not prediction.grad.any()


def test_the_metrics_of_a_marker_are_those_of_the_patches_that_have_it():
    prediction, target, boundary = batch()
    names = ("a", "b", "c", "d")
    sums = MarkerSums(4)
    sums.add(patch_sums(prediction, target, boundary).where(MEASURED))
    overall, per_channel = sums.compute(names)
    for channel, name in enumerate(names[:3]):
        own = MarkerSums(1)
        rows = MEASURED[:, channel]
        own.update(prediction[rows, channel, None], target[rows, channel, None])
        assert per_channel[name] == pytest.approx(own.compute(["x"])[1]["x"], rel=1e-6)
    assert set(per_channel["d"].values()) == {None}
    assert overall["pearson_markers"] == 3
    squares = [(prediction - target)[MEASURED[:, c], c].double().square().sum() for c in range(3)]
    spreads = [target[MEASURED[:, c], c].double().var(correction=0) * MEASURED[:, c].sum() * 156 for c in range(3)]
    assert overall["r2"] == pytest.approx(1 - float(sum(squares) / sum(spreads)), abs=1e-6)
