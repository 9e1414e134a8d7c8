"""The composite loss: each term against torch's own loss or a calculation by hand; exact sums over batches."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from orion_unet.errors import InputError
from orion_unet.losses import TERMS, CompositeLoss
from orion_unet.patch_sums import patch_sums


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def batch(samples=4, channels=3, height=9, width=11):
    prediction = torch.rand(samples, channels, height, width)
    target = torch.rand(samples, channels, height, width)
    mask = torch.rand(samples, 1, height, width) < torch.linspace(0.1, 0.6, samples).view(-1, 1, 1, 1)
    return prediction, target, mask


def validated(criterion, prediction, target, mask=None):
    """Loss and terms as validation computes them."""
    patches = patch_sums(prediction, target, mask)
    return criterion.combine(*criterion.sums(patches), torch.stack(patches[:6]).sum(1))


def alone(name, **options):
    return CompositeLoss({name: 1.0}, **options)


def by_hand(name, prediction, target, mask, factor=1.0):
    """Each term's definition in float64 numpy; ``factor`` multiplies the values, e.g. per channel."""
    p, t = prediction.double().numpy(), target.double().numpy()
    m = np.broadcast_to(mask.numpy(), p.shape).astype(float)
    error = p - t
    if name == "correlation":
        each = np.broadcast_to(factor, (1, p.shape[1], 1, 1)).ravel()
        found = []
        for channel in range(p.shape[1]):
            (pp, pt), (_, tt) = np.cov(p[:, channel].ravel(), t[:, channel].ravel(), bias=True)
            found.append(1 - pt / np.sqrt((pp + 1e-4) * (tt + 1e-4)))
        return (np.array(found) * each).mean()
    if name == "boundary":
        return (m * error**2 * factor).sum() / m.sum()
    scaling = 2 / (1 + np.exp(-0.2 * np.abs(error))) - 1
    values = {
        "mse": error**2,
        "l1": np.abs(error),
        "focal": scaling * error**2,
        "variance": np.maximum(0, 0.2 - p.var(axis=(2, 3), keepdims=True)) ** 2,
    }[name]
    return (values * factor).mean()


@pytest.mark.parametrize(("name", "own"), [("mse", F.mse_loss), ("l1", F.l1_loss)])
def test_pixel_terms_equal_torchs_own_losses(name, own):
    prediction, target, _ = batch()
    loss, terms = alone(name)(prediction, target)
    assert loss.item() == own(prediction, target).item()
    assert terms == {name: loss}


def test_boundary_equals_mse_over_the_masked_pixels():
    prediction, target, mask = batch()
    chosen = mask.expand_as(prediction)
    loss, _ = alone("boundary")(prediction, target, mask)
    torch.testing.assert_close(loss, F.mse_loss(prediction[chosen], target[chosen]))
    torch.testing.assert_close(alone("boundary")(prediction, target, mask.float())[0], loss)


def test_focal_equals_the_sigmoid_scaled_squared_error():
    prediction = torch.tensor([[[[0.9, 0.25]]]])
    target = torch.tensor([[[[0.1, 0.2]]]])
    expected = [(2 / (1 + math.exp(-0.2 * e)) - 1) * e**2 for e in (0.8, 0.05)]
    assert alone("focal")(prediction, target)[0].item() == pytest.approx(sum(expected) / 2, rel=1e-6)


def test_focal_keeps_its_digits_for_tiny_errors():
    error = 2.0**-13
    target = torch.full((1, 1, 2, 2), 0.5)
    loss, _ = alone("focal")(target + error, target)
    assert loss.item() == pytest.approx(math.tanh(0.1 * error) * error**2, rel=1e-6)


def test_variance_target_form_by_hand():
    prediction = torch.tensor([[[[0.4, 0.6], [0.4, 0.6]], [[0.0, 1.0], [1.0, 0.0]]]])
    # spatial variances 0.01 and 0.25; only the first is below 0.03
    loss, _ = alone("variance", target_variance=0.03)(prediction, torch.zeros_like(prediction))
    assert loss.item() == pytest.approx(0.02**2 / 2, rel=1e-5)


def test_variance_exponential_form_by_hand():
    prediction = torch.tensor([[[[0.4, 0.6], [0.4, 0.6]], [[0.5, 0.5], [0.5, 0.5]]]])
    loss, _ = alone("variance", variance_form="exponential")(prediction, torch.zeros_like(prediction))
    assert loss.item() == pytest.approx((math.exp(-1) + 1) / 2, rel=1e-5)


@pytest.mark.parametrize("form", ["target", "exponential"])
def test_variance_pushes_a_nearly_flat_prediction_apart(form):
    prediction = 0.5 + 0.05 * torch.randn(1, 1, 8, 8)
    prediction.requires_grad_()
    loss, _ = alone("variance", variance_form=form)(prediction, torch.zeros_like(prediction))
    loss.backward()
    moved = prediction - prediction.grad
    assert moved.var() > prediction.var()


def test_correlation_is_one_minus_pearson_over_the_whole_batch():
    # Within each patch the prediction is noise, but it distinguishes bright patches from dark ones.
    rng = np.random.default_rng(0)
    target = torch.tensor(rng.random((6, 1, 16, 16)) * 0.2 + np.linspace(0, 0.8, 6)[:, None, None, None])
    prediction = torch.tensor(rng.random((6, 1, 16, 16)) * 0.2 + np.linspace(0, 0.8, 6)[:, None, None, None])
    r = stats.pearsonr(prediction.numpy().ravel(), target.numpy().ravel()).statistic
    assert r > 0.9
    assert alone("correlation")(prediction, target)[0].item() == pytest.approx(1 - r, abs=2e-3)


def test_a_flat_marker_has_no_correlation_and_a_finite_gradient():
    prediction, target, _ = batch()
    prediction[:, 1], target[:, 2] = 0.25, 0.0
    prediction.requires_grad_()
    loss, _ = alone("correlation")(prediction, target)
    expected = by_hand("correlation", prediction.detach(), target, torch.ones(4, 1, 9, 11))
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert prediction.grad.isfinite().all()
    assert prediction.grad[:, 2].abs().max() < 1e-6


def test_correlation_does_not_care_for_brightness_or_contrast():
    _, target, _ = batch()
    loss, _ = alone("correlation")(0.3 + 0.5 * target, target)
    assert loss.item() == pytest.approx(0, abs=4e-3)
    assert alone("correlation")(1 - target, target)[0].item() == pytest.approx(2, abs=4e-3)


@pytest.mark.parametrize("name", TERMS)
def test_every_term_alone_equals_its_definition_in_training_and_in_validation(name):
    prediction, target, mask = batch()
    criterion = alone(name, target_variance=0.2)
    expected = by_hand(name, prediction, target, mask)
    assert expected > 0
    loss, terms = criterion(prediction, target, mask)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert set(terms) == {name}
    validation_loss, validation_terms = validated(criterion, prediction, target, mask)
    assert validation_loss == pytest.approx(expected, rel=1e-6)
    assert validation_terms[name] == validation_loss


def test_the_loss_is_the_weighted_sum_of_the_unweighted_terms():
    weights = {"mse": 0.8, "l1": 0.3, "boundary": 0.1, "focal": 0.7, "variance": 0.2, "correlation": 0.4}
    criterion = CompositeLoss(weights, target_variance=0.2)
    prediction, target, mask = batch()
    loss, terms = criterion(prediction, target, mask)
    expected = {name: by_hand(name, prediction, target, mask) for name in TERMS}
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected, rel=1e-5)
    assert loss.item() == pytest.approx(sum(weights[name] * expected[name] for name in TERMS), rel=1e-5)


def test_terms_of_weight_zero_are_not_computed_in_training_but_in_validation():
    criterion = CompositeLoss({"mse": 1.0, "boundary": 0.0})
    prediction, target, mask = batch()
    computed = []
    original = criterion._values

    def uncorrelated(moments, some):
        return pytest.fail("computed in training") if moments.requires_grad else 1.0

    criterion._uncorrelated = uncorrelated
    criterion._values = lambda name, *rest: computed.append(name) or original(name, *rest)
    _, terms = criterion(prediction, target)
    assert computed == ["mse"] and list(terms) == ["mse"]
    loss, terms = validated(criterion, prediction, target, mask)
    assert list(terms) == list(TERMS) and None not in terms.values()
    assert loss == terms["mse"]


def test_terms_carry_no_gradient_and_the_loss_does():
    prediction, target, mask = batch()
    loss, terms = CompositeLoss(dict.fromkeys(TERMS, 1.0))(prediction.requires_grad_(), target, mask)
    assert loss.requires_grad and not any(term.requires_grad for term in terms.values())
    assert not any(part.requires_grad for part in alone("mse").sums(patch_sums(prediction, target, mask)))


def test_sums_over_split_batches_combine_to_the_value_of_the_whole():
    criterion = CompositeLoss(dict.fromkeys(TERMS, 1.0), target_variance=0.2)
    prediction, target, mask = batch(samples=7)
    whole, whole_terms = validated(criterion, prediction, target, mask)
    patches = [
        patch_sums(prediction[rows], target[rows], mask[rows]) for rows in (slice(0, 1), slice(1, 5), slice(5, 7))
    ]
    numerators, denominators = (sum(part) for part in zip(*map(criterion.sums, patches), strict=True))
    assert numerators.shape == denominators.shape == (6,)
    assert numerators.dtype == denominators.dtype == torch.float64
    moments = sum(torch.stack(part[:6]).sum(1) for part in patches)
    loss, terms = criterion.combine(numerators, denominators, moments)
    assert loss == pytest.approx(whole, rel=1e-12)
    assert terms == pytest.approx(whole_terms, rel=1e-12)


def test_a_term_that_covered_nothing_is_none_and_counts_zero():
    criterion = CompositeLoss({"mse": 1.0, "boundary": 1.0})
    prediction, target, mask = batch()
    for no_mask in (None, torch.zeros_like(mask)):
        loss, terms = validated(criterion, prediction, target, no_mask)
        assert terms["boundary"] is None
        assert loss == terms["mse"] > 0
    empty, terms = criterion.combine(torch.zeros(6), torch.zeros(6), torch.zeros(6, 3))
    assert empty == 0 and set(terms.values()) == {None}


def test_an_empty_mask_gives_a_boundary_term_of_zero_and_a_finite_gradient():
    prediction, target, mask = batch()
    prediction.requires_grad_()
    for count in (None, torch.tensor(0.0)):
        loss, _ = alone("boundary")(prediction, target, torch.zeros_like(mask), count)
        loss.backward()
        assert loss.item() == 0 and not prediction.grad.any()


def test_two_ranks_that_share_their_mean_boundary_count_average_to_the_gradient_of_the_whole_batch():
    criterion = CompositeLoss({"mse": 0.8, "l1": 0.3, "boundary": 0.5, "variance": 0.1}, target_variance=0.2)
    prediction, target, mask = batch(samples=6)
    mask[:3] &= torch.rand(mask[:3].shape) < 0.2

    def gradient(rows, count):
        part = prediction[rows].clone().requires_grad_()
        criterion(part, target[rows], mask[rows], count)[0].backward()
        return part.grad

    halves = (slice(0, 3), slice(3, 6))
    shared = sum(mask[rows].sum() for rows in halves) / 2
    ranks = torch.cat([gradient(rows, shared) / 2 for rows in halves])
    own = torch.cat([gradient(rows, None) / 2 for rows in halves])
    whole = gradient(slice(None), None)
    torch.testing.assert_close(ranks, whole, rtol=1e-6, atol=1e-9)
    assert (own - whole).abs().max() > 1e-4


@pytest.mark.parametrize("name", TERMS)
def test_channel_weights_multiply_every_term_and_keep_mean_one(name):
    prediction, target, mask = batch()
    criterion = alone(name, target_variance=0.2, channel_weights=torch.tensor([4.0, 1.0, 1.0]))
    factor = np.array([2.0, 0.5, 0.5]).reshape(1, 3, 1, 1)
    expected = by_hand(name, prediction, target, mask, factor)
    assert expected != pytest.approx(by_hand(name, prediction, target, mask), rel=1e-3)
    assert criterion(prediction, target, mask)[0].item() == pytest.approx(expected, rel=1e-5)
    assert validated(criterion, prediction, target, mask)[0] == pytest.approx(expected, rel=1e-6)


def test_equal_channel_weights_change_nothing():
    prediction, target, mask = batch()
    weights = dict.fromkeys(TERMS, 1.0)
    plain, _ = CompositeLoss(weights)(prediction, target, mask)
    equal, _ = CompositeLoss(weights, channel_weights=torch.full((3,), 7.0))(prediction, target, mask)
    assert equal.item() == plain.item()


def test_half_precision_is_computed_in_float32_also_under_autocast():
    prediction, target, mask = batch()
    criterion = CompositeLoss(dict.fromkeys(TERMS, 1.0), target_variance=0.2)
    halves = prediction.half(), target.half()
    expected, _ = criterion(halves[0].float(), halves[1].float(), mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, terms = criterion(*halves, mask, mask.sum(dtype=torch.float64))
    assert loss.dtype == torch.float32
    assert {term.dtype for term in terms.values()} == {torch.float32}
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_all_weights_zero_is_an_input_error_that_names_the_options():
    with pytest.raises(InputError, match=r"--mse_weight.*--variance_weight"):
        CompositeLoss(dict.fromkeys(TERMS, 0.0))


@pytest.mark.parametrize("weight", [-0.1, math.nan, math.inf])
def test_weights_out_of_range_are_refused(weight):
    with pytest.raises(ValueError, match="at least 0"):
        CompositeLoss({"mse": 1.0, "l1": weight})


def test_unknown_names_and_forms_are_refused():
    with pytest.raises(ValueError, match="huber"):
        CompositeLoss({"huber": 1.0})
    with pytest.raises(ValueError, match="cubic"):
        CompositeLoss({"mse": 1.0}, variance_form="cubic")


@pytest.mark.parametrize("weights", [[0.0, 0.0], [1.0, -1.0], [1.0, math.nan]])
def test_unusable_channel_weights_are_refused(weights):
    with pytest.raises(ValueError, match="channel weights"):
        CompositeLoss({"mse": 1.0}, channel_weights=torch.tensor(weights))


def test_shapes_that_would_broadcast_and_a_missing_mask_are_refused():
    prediction, target, _ = batch()
    with pytest.raises(ValueError, match="differ in shape"):
        alone("mse")(prediction, target[:, :1])
    with pytest.raises(ValueError, match="mask"):
        alone("boundary")(prediction, target)


def test_a_compiled_loss_is_one_graph_that_gives_the_same_values_gradients_and_culprits():
    weights = {"mse": 0.8, "l1": 0.3, "boundary": 0.1, "focal": 0.2, "variance": 0.1, "correlation": 0.3}
    options = {"channel_weights": torch.tensor([1.0, 4.0, 1.0]), "target_variance": 0.2}
    eager, compiled = CompositeLoss(weights, **options), CompositeLoss(weights, **options)
    # What torch traces and differentiates ahead of time; the kernels it then writes are torch's own affair.
    compiled.compile(dynamic=False, fullgraph=True, backend="aot_eager")
    for spoiled in (False, False, True):
        prediction, target, mask = batch(height=64, width=80)
        if spoiled:
            target[1, 2, 3, 4] = math.nan
        found = []
        for loss in (eager, compiled):
            p = prediction.clone().requires_grad_()
            value, terms = loss(p, target, mask, mask.sum().double() + 7)
            value.backward()
            found.append((value.detach(), terms, p.grad))
        (value, terms, gradient), (value_there, terms_there, gradient_there) = found
        assert terms.keys() == terms_there.keys() == weights.keys()
        assert {name: bool(term.isfinite()) for name, term in terms.items()} == {
            name: bool(term.isfinite()) for name, term in terms_there.items()
        }
        torch.testing.assert_close(value_there, value, rtol=1e-5, atol=0, equal_nan=True)
        for name, term in terms.items():
            assert not terms_there[name].requires_grad
            torch.testing.assert_close(terms_there[name], term, rtol=1e-5, atol=0, equal_nan=True, msg=name)
        if not spoiled:
            assert value > 0.1 and all(term > 0 for term in terms.values())
            largest = float(gradient.abs().max())
            torch.testing.assert_close(gradient_there, gradient, rtol=0, atol=1e-5 * largest)
