"""The U-Net and its Sobel guidance: shapes, ranges, symmetry, initialisation, precision."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage

from orion_unet.config import ModelOptions
from orion_unet.models.blocks import ConvBlock, UpBlock, norm_layer, sobel_magnitude
from orion_unet.models.unet import SpatialUNet, memory_format, parameter_count


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def gray(image):
    """(H, W) to a gray H&E batch (1, 3, H, W)."""
    return torch.as_tensor(image, dtype=torch.float32).expand(1, 3, -1, -1)


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("size", [(1, 1), (17, 33), (64, 64), (250, 131)])
def test_any_size_and_depth_gives_one_map_per_marker_in_0_to_1(depth, size):
    model = SpatialUNet(3, base_features=4, depth=depth, use_boundary_guidance=True).eval()
    with torch.no_grad():
        prediction = model(torch.rand(2, 3, *size))
    assert prediction.shape == (2, 3, *size)
    assert prediction.dtype == torch.float32
    assert prediction.min() >= 0 and prediction.max() <= 1 and prediction.std() > 0


def test_an_odd_size_is_predicted_as_its_replicated_continuation():
    model = SpatialUNet(2, base_features=4, depth=3, use_boundary_guidance=True).eval()
    he = torch.rand(1, 3, 17, 33)
    continued = torch.from_numpy(np.pad(he.numpy(), ((0, 0), (0, 0), (0, 7), (0, 7)), mode="edge"))
    with torch.no_grad():
        torch.testing.assert_close(model(he), model(continued)[..., :17, :33])


def test_parameter_count_equals_the_count_by_hand():
    encoder = 3 * 2 * 9 + 4 + 2 * 2 * 9 + 4
    bottleneck = 2 * 4 * 9 + 8 + 4 * 4 * 9 + 8
    decoder = 4 * 2 * 9 + 4 + 2 * 2 * 9 + 4
    head = 2 * 3 + 3
    for upsampling, up in (("transposed", 4 * 2 * 4 + 2), ("bilinear", 4 * 2 + 2)):
        model = SpatialUNet(3, base_features=2, depth=1, upsampling=upsampling)
        assert parameter_count(model) == encoder + bottleneck + decoder + up + head


def test_from_options_builds_what_the_options_say():
    options = ModelOptions(
        base_features=4, depth=2, norm="group", dropout=0.3, use_boundary_guidance=True, upsampling="transposed"
    )
    model = SpatialUNet.from_options(options, 5)
    twin = SpatialUNet(
        5, base_features=4, depth=2, norm="group", dropout=0.3, use_boundary_guidance=True, upsampling="transposed"
    )
    assert str(model) == str(twin)
    assert str(model) != str(SpatialUNet.from_options(ModelOptions(), 5))


def test_glass_reaches_the_first_convolution_as_zero_and_guidance_as_fourth_channel():
    model = SpatialUNet(1, base_features=2, depth=1, use_boundary_guidance=True).eval()
    seen = []
    model.encoder[0][0].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    he = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        model(torch.ones(1, 3, 8, 8))
        model(he)
    assert torch.equal(seen[0], torch.zeros(1, 4, 8, 8))
    assert torch.equal(seen[1], torch.cat((1 - he, sobel_magnitude(he)), dim=1))


@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (7, 7), (10, 5), (11, 1), (12, 6), (24, 8), (32, 8)])
def test_group_norm_takes_the_largest_number_of_groups_that_divides(channels, groups):
    assert norm_layer("group", channels).num_groups == groups


def test_an_unknown_norm_is_refused():
    with pytest.raises(ValueError, match="layer"):
        SpatialUNet(1, norm="layer")


@pytest.mark.parametrize("norm", ["batch", "group", "instance"])
def test_one_patch_whose_bottleneck_is_one_pixel_trains(norm):
    model = SpatialUNet(2, base_features=1, depth=3, norm=norm).train()
    prediction = model(torch.rand(1, 3, 8, 8))
    prediction.square().mean().backward()
    assert prediction.shape == (1, 2, 8, 8)
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert gradients.isfinite().all() and gradients.any()


def test_weights_are_kaiming_normal_and_biases_zero():
    model = SpatialUNet(64, base_features=64, depth=1)
    for conv, fan_in in ((model.encoder[0][3], 64 * 9), (model.bottleneck[0][3], 128 * 9), (model.head, 64)):
        weights = conv.weight.detach().flatten()
        assert weights.std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=0.04)
        kurtosis = ((weights / weights.std()) ** 4).mean().item()
        assert kurtosis == pytest.approx(3, abs=0.3)
    assert not model.head.bias.any() and not model.decoder[0].up.bias.any()


def test_the_up_convolution_keeps_the_spread_of_its_input():
    up = SpatialUNet(1, base_features=64, depth=1, upsampling="transposed").decoder[0].up
    features = torch.randn(4, 128, 16, 16).relu()
    with torch.no_grad():
        assert up(features).square().mean().item() == pytest.approx(features.square().mean().item(), rel=0.1)


def test_bilinear_upsampling_is_a_convolution_of_pixels_interpolated_around_their_centres():
    up = SpatialUNet(1, base_features=2, depth=1, upsampling="bilinear").decoder[0].up
    features = torch.randn(2, 4, 5, 7)
    with torch.no_grad():
        found = up(features)
        mixed = torch.einsum("oc,bchw->bohw", up.weight[..., 0, 0], features) + up.bias[:, None, None]
    assert found.shape == (2, 2, 10, 14)
    # The centre of pixel 5 of the output is at 2.25 in the input.
    expected = 0.75 * mixed[:, :, 2] + 0.25 * mixed[:, :, 3]
    torch.testing.assert_close(found[:, :, 5, 5], 0.75 * expected[..., 2] + 0.25 * expected[..., 3])
    torch.testing.assert_close(up(features.flip(3)).detach(), found.flip(3))


def test_an_unknown_upsampling_is_refused():
    with pytest.raises(ValueError, match="upsampling must be one of bilinear, transposed, not 'nearest'"):
        SpatialUNet(1, upsampling="nearest")


def test_convolutions_before_a_norm_have_no_bias():
    assert [m.bias for m in ConvBlock(3, 4, "instance") if isinstance(m, torch.nn.Conv2d)] == [None, None]


def test_the_head_bias_sets_the_level_of_the_prediction():
    model = SpatialUNet(2, base_features=2, depth=1).eval()
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.tensor([0.02, 0.7]).logit())
        prediction = model(torch.rand(1, 3, 8, 8))
    expected = torch.tensor([0.02, 0.7]).view(1, 2, 1, 1).expand_as(prediction)
    torch.testing.assert_close(prediction, expected)


def test_the_decoder_joins_skip_and_upsampled_features():
    block = UpBlock(2, "batch", "bilinear").eval()
    skip = torch.rand(1, 2, 4, 4, requires_grad=True)
    deep = torch.rand(1, 4, 2, 2, requires_grad=True)
    out = block(deep, skip)
    out.sum().backward()
    assert out.shape == (1, 2, 4, 4)
    assert skip.grad.any() and deep.grad.any()


def test_dropout_drops_whole_maps_of_the_bottleneck_in_training_only():
    model = SpatialUNet(1, base_features=16, depth=1, dropout=0.5)
    seen = []
    model.bottleneck.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    he = torch.rand(1, 3, 16, 16)
    model.train()(he)
    model.eval()(he)
    dropped = [(maps.flatten(2) == 0).all(2).float().mean().item() for maps in seen]
    assert 0.2 < dropped[0] < 0.8
    assert dropped[1] == 0


def test_under_bfloat16_autocast_the_output_is_float32_and_finer_than_bfloat16():
    model = SpatialUNet(2, base_features=4, depth=2, use_boundary_guidance=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prediction = model(torch.rand(2, 3, 32, 32))
    assert prediction.dtype == torch.float32
    assert (prediction != prediction.bfloat16().float()).float().mean() > 0.5


def test_channels_last_gives_the_same_prediction():
    model = SpatialUNet(2, base_features=4, depth=2, use_boundary_guidance=True).eval()
    he = torch.rand(2, 3, 30, 44)
    with torch.no_grad():
        expected = model(he)
        model = model.to(memory_format=torch.channels_last)
        torch.testing.assert_close(model(he.to(memory_format=torch.channels_last)), expected)


@pytest.mark.parametrize("norm", ["batch", "group", "instance"])
def test_channels_last_gives_the_same_gradients(norm):
    gradients = []
    he, target = torch.rand(3, 3, 32, 48), torch.rand(3, 2, 32, 48)
    for form in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(1)
        model = SpatialUNet(2, base_features=8, depth=2, norm=norm, use_boundary_guidance=True).to(memory_format=form)
        images = [tensor.contiguous(memory_format=form) for tensor in (he, target)]
        (model(images[0]) - images[1]).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        # The fused optimiser reads weights and gradients in parallel, in their order in memory.
        assert all(p.grad.stride() == p.stride() for p in model.parameters() if min(p.shape[1:], default=1) > 1)
    # A shift that the next norm takes away has no gradient but rounding: the largest of the model is the measure.
    largest = max(float(plain.abs().max()) for plain in gradients[0])
    for plain, last in zip(*gradients, strict=True):
        torch.testing.assert_close(last, plain, rtol=1e-5, atol=1e-5 * largest)


def test_a_compiled_model_gives_the_same_prediction_and_gradients():
    torch.manual_seed(1)
    model = SpatialUNet(2, base_features=4, depth=1, use_boundary_guidance=True).to(memory_format=torch.channels_last)
    he = torch.rand(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    outcomes = []
    for forward in (model, torch.compile(model, dynamic=False, backend="aot_eager")):
        model.zero_grad()
        prediction = forward(he)
        prediction.square().mean().backward()
        outcomes.append([prediction.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    largest = max(float(plain.abs().max()) for plain in outcomes[0][1:])
    for plain, compiled in zip(*outcomes, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-5 * largest)


@pytest.mark.parametrize("norm", ["batch", "group", "instance"])
def test_the_order_in_memory_is_channels_last_where_the_norm_has_such_a_kernel(norm):
    last = torch.channels_last
    assert (memory_format(norm, torch.device("cuda")) is last) == (norm == "batch")
    assert (memory_format(norm, torch.device("cpu")) is last) == (norm != "instance")


def test_forward_is_captured_as_one_graph():
    model = SpatialUNet(2, base_features=2, depth=2, use_boundary_guidance=True).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    he = torch.rand(1, 3, 18, 20)
    with torch.no_grad():
        torch.testing.assert_close(compiled(he), model(he))


def test_a_full_step_has_sobel_magnitude_exactly_one_on_both_sides():
    image = torch.zeros(7, 8)
    image[:, 4:] = 1
    expected = torch.zeros(7, 8)
    expected[:, 3:5] = 1
    assert torch.equal(sobel_magnitude(gray(image))[0, 0], expected)
    assert torch.equal(sobel_magnitude(gray(image.T))[0, 0], expected.T)


@pytest.mark.parametrize(("channel", "weight"), [(0, 0.299), (1, 0.587), (2, 0.114)])
def test_a_step_in_one_colour_counts_with_its_luminance(channel, weight):
    he = torch.zeros(1, 3, 4, 6)
    he[:, channel, :, 3:] = 1
    assert sobel_magnitude(he).max().item() == pytest.approx(weight, abs=1e-6)


def test_sobel_equals_scipy_and_is_clipped_at_one():
    noise = np.random.default_rng(0).random((23, 31))
    image = 0.7 * np.triu(np.ones((23, 31))) + 0.2 * noise
    slopes = [ndimage.sobel(image, axis=axis, mode="nearest") / 4 for axis in (0, 1)]
    expected = np.hypot(*slopes)
    assert expected.max() < 1
    np.testing.assert_allclose(sobel_magnitude(gray(image))[0, 0].numpy(), expected, atol=1e-6)
    diagonal = gray(torch.triu(torch.ones(9, 9)))
    assert np.hypot(3 / 4, 3 / 4) > 1 and sobel_magnitude(diagonal).max().item() == 1


@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("flip", [False, True])
def test_sobel_moves_with_flips_and_quarter_turns(turns, flip):
    def move(x):
        x = torch.rot90(x, turns, (-2, -1))
        return x.flip(-1) if flip else x

    he = torch.rand(2, 3, 12, 19)
    assert torch.equal(sobel_magnitude(move(he)), move(sobel_magnitude(he)))


def test_sobel_of_flat_images_is_zero_with_a_zero_gradient():
    for size in ((1, 1), (1, 5), (6, 6)):
        he = torch.full((1, 3, *size), 0.83, requires_grad=True)
        magnitude = sobel_magnitude(he)
        magnitude.sum().backward()
        assert not magnitude.any() and not he.grad.any()


def test_sobel_gradient_equals_finite_differences():
    he = torch.rand(1, 3, 5, 6) * 0.3
    he.requires_grad_()
    sobel_magnitude(he).sum().backward()
    step = torch.zeros_like(he)
    step[0, 1, 2, 3] = 1e-2
    with torch.no_grad():
        slope = (sobel_magnitude(he + step).sum() - sobel_magnitude(he - step).sum()).item() / 2e-2
    assert he.grad[0, 1, 2, 3].item() == pytest.approx(slope, abs=0.02)


def test_sobel_is_float32_under_autocast_and_from_half_precision():
    he = torch.rand(1, 3, 9, 9).half()
    expected = sobel_magnitude(he.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sobel_magnitude(he), expected)
    assert expected.dtype == torch.float32


@pytest.mark.parametrize("norm", ["batch", "group", "instance"])
def test_the_model_learns_where_the_tissue_is(norm):
    he = torch.ones(2, 3, 16, 16)
    he[:, :, 5:9, 6:11] = 0.2
    target = (he[:, :1] < 0.5).float()
    model = SpatialUNet(1, base_features=4, depth=2, norm=norm)
    optimizer = torch.optim.Adam(model.parameters(), 3e-2)
    for _ in range(80):
        loss = F.mse_loss(model(he), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1 * target.var().item()


@pytest.mark.parametrize(("how", "frozen"), [("full", 0), ("last", 2), ("frozen", 3)])
def test_frozen_stages_stay_in_evaluation_mode_and_take_no_gradient(how, frozen):
    model = SpatialUNet(2, base_features=4, depth=2, dropout=0.5)
    everything = parameter_count(model)
    model.freeze_encoder(how)
    model.train()
    assert [stage.training for stage in model.encoder_stages] == [False] * frozen + [True] * (3 - frozen)
    # The dropout behind the encoder goes on.
    assert model.bottleneck[1].training
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(torch.rand(2, 3, 32, 32)).sum().backward()
    held = {id(tensor) for stage in model.encoder_stages[:frozen] for tensor in (*stage.parameters(), *stage.buffers())}
    assert all((parameter.grad is None) == (id(parameter) in held) for parameter in model.parameters())
    assert all(torch.equal(buffer, before[name]) == (id(buffer) in held) for name, buffer in model.named_buffers())
    kept = parameter_count(model, trainable=False)
    assert kept == sum(p.numel() for stage in model.encoder_stages[:frozen] for p in stage.parameters())
    assert parameter_count(model) + kept == everything
