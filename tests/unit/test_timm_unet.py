"""Encoders from timm: shapes, strides, standardisation, freezing, and weights from a file."""

import sys
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from timm_here import PatchEncoder, TinyEncoder, timm_or_skip
from torch import nn

from orion_unet.config import ModelOptions
from orion_unet.errors import InputError
from orion_unet.models import timm_unet
from orion_unet.models.build import build_network
from orion_unet.models.encoder_weights import check_variant, match_weights, read_weights
from orion_unet.models.unet import SpatialUNet

SMALL = {"base_features": 4}


@pytest.fixture
def tiny(monkeypatch):
    """A network with TinyEncoder, whether timm is here or not."""
    monkeypatch.setattr(timm_unet, "create_encoder", lambda name: TinyEncoder())
    monkeypatch.setattr(timm_unet, "_colours", lambda name: ((0.5, 0.4, 0.3), (0.2, 0.2, 0.1)))

    def build(markers=2, **options):
        torch.manual_seed(0)
        return build_network(ModelOptions(encoder="timm:tiny", **{**SMALL, **options}), markers)

    return build


@pytest.mark.parametrize("size", [(1, 1), (17, 33), (64, 48)])
def test_any_size_gives_one_map_per_marker(size, tiny):
    model = tiny(3, use_boundary_guidance=True).eval()
    with torch.no_grad():
        prediction = model(torch.rand(2, 3, *size))
    assert prediction.shape == (2, 3, *size)
    assert prediction.min() >= 0 and prediction.max() <= 1 and prediction.std() > 0


def test_the_depth_follows_the_encoder_and_the_stem_covers_what_lies_above_it(tiny):
    model = tiny(depth=7)
    assert model.depth == 2
    assert len(model.stem) == 1
    assert [level.block[0].out_channels for level in model.decoder] == [8, 4]


def test_full_resolution_reaches_the_output_past_the_encoder(tiny):
    """One pixel moves the prediction around it, even where the encoder sees nothing."""
    model = tiny().eval()
    for parameter in model.encoder.parameters():
        parameter.data.zero_()
    he = torch.full((1, 3, 32, 32), 0.8)
    dotted = he.clone()
    dotted[..., 16, 16] = 0.0
    with torch.no_grad():
        moved = (model(dotted) - model(he)).abs().sum(1)[0]
    assert moved[16, 16] > 0
    assert not moved[24:].any()


def test_the_encoder_sees_standardised_colours_and_the_stem_does_not(tiny):
    seen = []
    model = tiny(encoder_mean="0.1,0.2,0.3", encoder_std="0.5,0.25,2").eval()
    model.encoder.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    he = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        model(he)
    expected = torch.stack([(he[0, 0] - 0.1) / 0.5, (he[0, 1] - 0.2) / 0.25, (he[0, 2] - 0.3) / 2])
    torch.testing.assert_close(seen[0][0], expected)
    # They are stored with the weights.
    stored = tiny()
    stored.load_state_dict(model.state_dict())
    assert torch.equal(stored.standardise.mean, model.standardise.mean)


def test_what_reaches_no_map_never_waits_for_a_gradient(tiny):
    model = tiny()
    model(torch.rand(2, 3, 16, 16)).sum().backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {"encoder.spare.weight", "encoder.spare.bias"}
    assert without == {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def test_a_frozen_encoder_stays_and_stem_and_projections_learn(tiny):
    model = tiny()
    model.freeze_encoder("frozen")
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model(torch.rand(2, 3, 16, 16)).sum().backward()
    trains = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trains == {"stem", "project", "bottleneck", "decoder", "head"}
    changed = {
        name.split(".")[0] for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])
    }
    assert "encoder" not in changed and "standardise" not in changed and "stem" in changed


@pytest.mark.parametrize("strides", [[3, 9], [2, 8], [1, 2], [4, 4, 16], [14, 16]])
def test_strides_that_do_not_double_are_refused(strides):
    encoder = TinyEncoder()
    encoder.feature_info = SimpleNamespace(reduction=lambda: strides, channels=lambda: [5] * len(strides))
    with pytest.raises(InputError, match="--encoder timm:odd: its maps are at strides"):
        timm_unet._try_out(encoder, "odd")


@pytest.fixture
def patches(monkeypatch):
    """A network whose encoder has maps at ``stride`` and its doubles; and the H&E that the encoder saw."""
    monkeypatch.setattr(timm_unet, "_colours", lambda name: ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)))

    def build(stride=14, maps=1, **options):
        monkeypatch.setattr(timm_unet, "create_encoder", lambda name: PatchEncoder(stride, maps))
        torch.manual_seed(0)
        model = build_network(ModelOptions(encoder="timm:patches", **{**SMALL, **options}), 2).eval()
        seen = []
        model.encoder.register_forward_hook(lambda module, given, maps: seen.append((given[0], maps)))
        return model, seen

    return build


@pytest.mark.parametrize(
    ("stride", "maps", "strides", "depth"),
    [(14, 1, (14, 16), 4), (14, 2, (14, 16), 5), (3, 3, (3, 4), 4), (12, 1, (12, 16), 4), (16, 1, (16, 16), 4)],
)
@pytest.mark.parametrize("size", [(1, 1), (96, 96), (100, 70), (256, 64)])
def test_an_encoder_of_any_stride_sees_the_image_so_that_its_maps_fit(stride, maps, strides, depth, size, patches):
    model, seen = patches(stride, maps)
    assert (model.strides, model.depth, model.sees_whole_image) == (strides, depth, maps == 1)
    with torch.no_grad():
        prediction = model(torch.rand(1, 3, *size))
    assert prediction.shape == (1, 2, *size)
    (image, found), multiple = seen[0], 2**depth
    padded = [-(-side // multiple) * multiple for side in size]
    padded = [2 * multiple, 2 * multiple] if padded == [multiple, multiple] else padded
    assert list(image.shape[2:]) == [side * strides[0] // strides[1] for side in padded]
    assert list(found[0].shape[2:]) == [side // strides[1] for side in padded]


def test_a_stride_of_a_power_of_2_leaves_the_image_as_it_is(patches):
    model, seen = patches(16)
    he = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        model(he)
    assert torch.equal(seen[0][0], he)


def test_the_resampled_image_is_that_of_pillow(patches):
    image_module = pytest.importorskip("PIL.Image")
    model, seen = patches()
    he = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        model(he)
    for channel, found in zip(he[0], seen[0][0][0], strict=True):
        expected = image_module.fromarray(channel.numpy()).resize((84, 56), image_module.Resampling.BILINEAR)
        np.testing.assert_allclose(found, np.asarray(expected), atol=1e-5)


def test_a_place_in_the_image_stays_at_its_place_in_the_map(patches):
    """The map of an image moved by one stride is moved by one, and a spot is seen where it is, from edge to edge."""
    model, seen = patches()
    he = torch.rand(1, 3, 160, 160)
    with torch.no_grad():
        model(he)
        model(torch.roll(he, (16, 32), (2, 3)))
    (_, (still,)), (_, (moved,)) = seen
    torch.testing.assert_close(moved[..., 2:-1, 3:-1], still[..., 1:-2, 1:-3], atol=1e-4, rtol=0)
    for row, column in ((1.5, 1.5), (79.5, 100.5), (150.5, 157.5)):
        grid = torch.stack(torch.meshgrid(torch.arange(160.0), torch.arange(160.0), indexing="ij"))
        spot = torch.exp(-((grid - torch.tensor([row, column])[:, None, None]) ** 2).sum(0) / 8)
        small = model._resampled(spot.expand(1, 3, 160, 160))[0, 0]
        centre = [(small.sum(1 - axis) * (torch.arange(140.0) + 0.5)).sum() / small.sum() for axis in (0, 1)]
        # At the edge the spot is cut off, on the same side in both.
        whole = [(spot.sum(1 - axis) * (torch.arange(160.0) + 0.5)).sum() / spot.sum() for axis in (0, 1)]
        torch.testing.assert_close(torch.stack(centre) * 16 / 14, torch.stack(whole), atol=0.1, rtol=0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_resampled_encoder_learns_in_mixed_precision_and_either_layout(layout, patches):
    model, seen = patches(norm="group")
    model = model.train().to(memory_format=layout)
    he = torch.rand(2, 3, 64, 48).contiguous(memory_format=layout)
    plain = model(he)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(he)
    assert mixed.dtype == torch.float32 and seen[1][0].dtype == torch.float32
    torch.testing.assert_close(mixed, plain, atol=0.1, rtol=0)
    mixed.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def weights_of_tiny(prefix=""):
    """Its tensors under the names that files have: dots for the underscores that timm writes."""
    torch.manual_seed(5)
    state = TinyEncoder().state_dict()
    return {f"{prefix}{name.replace('stages_2', 'stages.2')}": tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    "prefix",
    ["", "module.", "model.", "encoder.", "backbone.", "module.model.encoder.", "teacher.backbone.", "_orig_mod."],
)
def test_names_fit_whatever_was_put_before_them(prefix, tmp_path):
    path = tmp_path / "weights.pt"
    torch.save({"state_dict": weights_of_tiny(prefix) | {"fc.weight": torch.zeros(2)}, "epoch": 3}, path)
    matched = match_weights(TinyEncoder(), read_weights(path), path)
    assert matched.missing == ()
    assert matched.unexpected == ("fc.weight",)
    encoder = TinyEncoder()
    encoder.load_state_dict(matched.weights)
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, weights_of_tiny()[name.replace("stages_2", "stages.2")])


def test_few_missing_tensors_are_listed_and_many_are_an_error(tmp_path):
    encoder = nn.Sequential(*(nn.Conv2d(2, 2, 1) for _ in range(10)))
    stored = encoder.state_dict()
    path = tmp_path / "w.pt"
    two_missing = {name: tensor for name, tensor in stored.items() if not name.startswith("3.")}
    assert match_weights(encoder, two_missing, path).missing == ("3.weight", "3.bias")
    other_shape = {**stored, "4.weight": torch.zeros(5)}
    found = match_weights(encoder, other_shape, path)
    assert (found.missing, found.unexpected) == (("4.weight",), ("4.weight",))
    del two_missing["7.bias"]
    with pytest.raises(InputError, match="has 17 of the 20 tensors of this encoder, so it is of another model"):
        match_weights(encoder, two_missing, path)


def test_the_teacher_of_a_checkpoint_of_dino_is_taken_and_its_options_do_no_harm(tmp_path):
    path = tmp_path / "checkpoint.pth"
    teacher = weights_of_tiny("module.backbone.") | {"module.head.mlp.0.weight": torch.ones(2)}
    student = {name: tensor + 1 for name, tensor in teacher.items()}
    for content in ({"teacher": teacher, "student": student}, {"model": {"teacher": teacher}}):
        torch.save({**content, "args": Namespace(arch="vit_small", lr=1e-3), "epoch": 3}, path)
        matched = match_weights(TinyEncoder(), read_weights(path), path)
        assert (matched.missing, matched.unexpected) == ((), ("module.head.mlp.0.weight",))
        assert torch.equal(matched.weights["spare.bias"], teacher["module.backbone.spare.bias"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_become_those_of_the_encoder(dtype, tmp_path):
    path = tmp_path / "w.pt"
    torch.save(
        {name: tensor.to(dtype) if "num" not in name else tensor for name, tensor in weights_of_tiny().items()}, path
    )
    matched = match_weights(TinyEncoder(), read_weights(path), path)
    assert matched.missing == () and matched.weights["one.0.weight"].dtype == torch.float32
    torch.testing.assert_close(matched.weights["one.0.weight"], weights_of_tiny()["one.0.weight"], atol=1e-2, rtol=0)


def test_weights_that_cannot_be_those_of_the_encoder_are_refused(tmp_path):
    path = tmp_path / "w.pt"
    stored = weights_of_tiny()
    for value in (float("nan"), float("inf")):
        broken = {**stored, "one.0.bias": torch.full((5,), value)}
        with pytest.raises(InputError, match=r"--encoder_weights .*w.pt: one.0.bias has values that are not finite"):
            match_weights(TinyEncoder(), broken, path)
    # Too large for the encoder's float32.
    with pytest.raises(InputError, match="not finite"):
        match_weights(TinyEncoder(), {**stored, "one.0.bias": torch.full((5,), 1e300, dtype=torch.float64)}, path)
    with pytest.raises(InputError, match=r"has two tensors for one\.0\.bias of this encoder"):
        match_weights(TinyEncoder(), {**stored, "module.one.0.bias": torch.zeros(5)}, path)
    # Quantised weights without their scales mean nothing.
    whole = {name: (100 * tensor).to(torch.int8) for name, tensor in stored.items()}
    with pytest.raises(InputError, match="so it is of another model"):
        match_weights(TinyEncoder(), whole, path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"cannot be read \(No such file or directory\)"),
        (b"no weights", "cannot be read as weights"),
        ({"epoch": 3}, "has no weights in it"),
        ([1, 2], "has no weights in it"),
        (SimpleNamespace(a=1), "cannot be read as weights"),
    ],
)
def test_a_file_that_is_no_weights_is_refused(content, message, tmp_path):
    path = tmp_path / "w.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(InputError, match=message) as error:
        read_weights(path)
    assert str(error.value).startswith(f"--encoder_weights {path}: ")


def test_without_timm_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(
        InputError, match=r"the package timm is needed for this: pip install \"orion-unet\[encoders\]\""
    ):
        build_network(ModelOptions(encoder="timm:resnet18"), 2)


def test_a_torchvision_of_another_torch_is_explained(monkeypatch):
    def fail(*names, **options):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(timm_unet, "needed", fail)
    with pytest.raises(InputError, match="install the torchvision that belongs to torch"):
        build_network(ModelOptions(encoder="timm:resnet18"), 2)


def test_our_own_encoder_needs_no_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert isinstance(build_network(ModelOptions(**SMALL), 2), SpatialUNet)


# From here on with timm itself.

FAMILIES = {
    "resnet10t": (5, "layer4"),
    "convnext_atto": (5, "stages_3"),
    "mobilenetv3_small_050": (5, "blocks.5"),
    "densenet121": (5, None),
    "swin_tiny_patch4_window7_224": (5, "layers_3"),
    "vit_tiny_patch16_224": (4, "model.blocks.11"),
    "vit_small_patch14_dinov2,depth=3": (4, None),
    "vit_small_patch14_reg4_dinov2,depth=3": (4, None),
    "eva02_tiny_patch14_224,depth=3": (4, None),
}


@pytest.mark.parametrize(("name", "depth", "last"), [(name, *expected) for name, expected in FAMILIES.items()])
def test_families_of_timm_predict_any_size_and_give_every_weight_a_gradient(name, depth, last):
    timm_or_skip()
    torch.manual_seed(0)
    model = build_network(ModelOptions(encoder=f"timm:{name}", **SMALL), 2)
    assert model.depth == depth
    prediction = model(torch.rand(2, 3, 70, 40))
    assert prediction.shape == (2, 2, 70, 40)
    prediction.sum().backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())
    if last is not None:
        assert timm_unet.last_stage(model.encoder) is model.encoder.get_submodule(last)


def test_unknown_names_bring_the_nearest_and_nothing_is_looked_up(monkeypatch):
    timm_or_skip()
    import socket

    monkeypatch.setattr(socket, "socket", None)
    for name, message in (
        ("resnet51", "has no model of that name; the nearest names are resnet"),
        ("hf-hub:owner/model", "has no model of that name"),
        ("resnet18.nonsense", "there is no such variant; there is timm:resnet18"),
        ("xxxxxxxx", "has no model of that name; timm.list_models"),
    ):
        with pytest.raises(InputError, match=message):
            timm_unet.create_encoder(name)
    assert timm_unet.create_encoder("resnet18.a1_in1k") is not None


def test_the_mean_and_deviation_are_those_of_the_published_weights():
    timm_or_skip()
    model = build_network(ModelOptions(encoder="timm:vit_tiny_patch16_224", **SMALL), 1)
    assert model.standardise.mean.flatten().tolist() == [0.5, 0.5, 0.5]
    model = build_network(ModelOptions(encoder="timm:resnet10t", **SMALL), 1)
    assert model.standardise.std.flatten().tolist() == pytest.approx([0.229, 0.224, 0.225])


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto", "densenet121", "vit_tiny_patch16_224"])
@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_weights_that_timm_saved_come_back_whole(name, ending, tmp_path):
    timm = timm_or_skip()
    torch.manual_seed(3)
    whole = timm.create_model(name, pretrained=False)
    path = tmp_path / f"w.{ending}"
    if ending == "pth":
        torch.save(whole.state_dict(), path)
    else:
        safetensors = pytest.importorskip("safetensors.torch")
        safetensors.save_file(whole.state_dict(), path)
    encoder = timm_unet.create_encoder(name)
    matched = match_weights(encoder, read_weights(path), path)
    assert matched.missing == ()
    # Only the classifier and the norm before it are not part of the encoder.
    assert all(part.split(".")[0] in ("fc", "head", "norm", "classifier", "head_norm") for part in matched.unexpected)
    encoder.load_state_dict(matched.weights, strict=False)
    he = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        expected = whole.eval().forward_intermediates(he, intermediates_only=True) if "vit" in name else None
        found = encoder.eval()(he)
    if expected is not None:
        torch.testing.assert_close(found[-1], expected[-1])


def whole_and_encoder(name, **differing):
    """A whole network of timm with random weights and positions, and the encoder of another image size."""
    timm = timm_or_skip()
    torch.manual_seed(3)
    base, arguments = timm_unet._arguments(name, timm)
    whole = timm.create_model(base, pretrained=False, dynamic_img_size=True, **{**arguments, **differing}).eval()
    torch.nn.init.normal_(whole.pos_embed)
    return whole, timm_unet.create_encoder(name).eval()


DINO, REGISTERS = "vit_small_patch14_dinov2,depth=3", "vit_small_patch14_reg4_dinov2,depth=3"


@pytest.mark.parametrize("name", [DINO, REGISTERS])
def test_positions_of_another_image_size_are_resampled(name, tmp_path):
    whole, encoder = whole_and_encoder(name, img_size=224)
    matched = match_weights(encoder, whole.state_dict(), tmp_path / "w.pt")
    assert matched.missing == ()
    assert matched.fitted == ("pos_embed",)
    own, stored = matched.weights["model.pos_embed"], whole.pos_embed.detach()
    first = own.shape[1] - 37 * 37
    assert torch.equal(own[:, :first], stored[:, :first])
    grid = stored[0, first:].T.reshape(1, -1, 16, 16)
    expected = nn.functional.interpolate(grid, (37, 37), mode="bicubic", antialias=True).flatten(2).mT
    torch.testing.assert_close(own[:, first:], expected)


@pytest.mark.parametrize("name", [DINO, REGISTERS])
def test_an_encoder_of_the_weights_own_image_size_gives_their_maps(name, tmp_path):
    whole, encoder = whole_and_encoder(f"{name},img_size=224", img_size=224)
    matched = match_weights(encoder, whole.state_dict(), tmp_path / "w.pt")
    assert (matched.missing, matched.fitted) == ((), ())
    encoder.load_state_dict(matched.weights)
    for side in (224, 140):
        he = torch.rand(1, 3, side, side)
        with torch.no_grad():
            expected = whole.forward_intermediates(he, intermediates_only=True)
            torch.testing.assert_close(encoder(he)[-1], expected[-1])


def test_a_teacher_of_dinov2_with_its_own_names_gives_its_maps(tmp_path):
    """Its positions include one of the class token, its blocks are in chunks, its registers have another name."""
    whole, encoder = whole_and_encoder(REGISTERS)
    state = whole.state_dict()
    at_class = torch.randn(1, 1, 384)
    teacher = {name.replace("blocks.", "blocks.0."): tensor for name, tensor in state.items() if name != "reg_token"}
    teacher |= {
        "register_tokens": state["reg_token"],
        "mask_token": torch.zeros(1, 384),
        "pos_embed": torch.cat([at_class, state["pos_embed"]], dim=1),
        "cls_token": state["cls_token"] - at_class,
    }
    path = tmp_path / "teacher_checkpoint.pth"
    torch.save({"teacher": {f"backbone.{name}": tensor for name, tensor in teacher.items()}}, path)
    matched = match_weights(encoder, read_weights(path), path)
    assert matched.missing == ()
    for name in encoder.state_dict():
        torch.testing.assert_close(matched.weights[name], state[name.removeprefix("model.")])


def test_weights_of_a_variant_that_would_compute_something_else_are_refused(tmp_path):
    timm_or_skip()
    path = tmp_path / "w.pt"
    whole, _ = whole_and_encoder("vit_tiny_patch16_224,depth=3", init_values=1e-5)
    plain = timm_unet.create_encoder("vit_tiny_patch16_224,depth=3")
    with pytest.raises(InputError, match=r"has blocks.0.ls1.gamma, which does not fit .*timm:NAME,init_values=1e-5"):
        check_variant(match_weights(plain, whole.state_dict(), path), path)
    scaled = timm_unet.create_encoder("vit_tiny_patch16_224,depth=3,init_values=1e-5")
    matched = match_weights(scaled, whole.state_dict(), path)
    check_variant(matched, path)
    assert matched.missing == ()
    whole, encoder = whole_and_encoder(REGISTERS, reg_tokens=8)
    with pytest.raises(InputError, match=r"has reg_token, which does not fit .*timm:NAME,reg_tokens=NUMBER"):
        check_variant(match_weights(encoder, whole.state_dict(), path), path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet18,width", "'width' is no argument of a model; write timm:NAME,ARGUMENT=VALUE"),
        ("resnet18,checkpoint_path=w.pt", "'checkpoint_path=w.pt' is no argument of a model"),
        ("resnet18,pretrained=True", "'pretrained=True' is no argument of a model"),
        ("resnet18,features_only=False", "is no argument of a model"),
        ("resnet18,foo=3", r"none with these arguments \(.*unexpected keyword argument 'foo'\)"),
        ("vit_tiny_patch16_224,mlp_layer=Foo", "none with these arguments"),
    ],
)
def test_arguments_that_a_model_does_not_take_are_refused(name, message):
    timm_or_skip()
    with pytest.raises(InputError, match=f"--encoder timm:{name}: .*{message}") as error:
        timm_unet.create_encoder(name)
    assert "\n" not in str(error.value)


def test_arguments_reach_the_model():
    timm_or_skip()
    name = "vit_small_patch14_reg4_dinov2,depth=3,reg_tokens=8,mlp_layer=SwiGLUPacked,act_layer=silu,init_values=1e-5"
    encoder = timm_unet.create_encoder(name)
    assert len(encoder.model.blocks) == 3
    assert encoder.model.reg_token.shape == (1, 8, 384)
    assert type(encoder.model.blocks[0].mlp).__name__ == "GluMlp"


def test_a_compiled_encoder_that_sees_the_image_resampled_predicts_the_same():
    timm_or_skip()
    torch.manual_seed(0)
    model = build_network(ModelOptions(encoder=f"timm:{REGISTERS}", **SMALL), 2).eval()
    he = torch.rand(1, 3, 100, 70)
    with torch.no_grad():
        # Without code generation: a compiler may be missing.
        compiled = torch.compile(model, dynamic=False, backend="aot_eager")(he)
        torch.testing.assert_close(compiled, model(he), atol=1e-5, rtol=0)
