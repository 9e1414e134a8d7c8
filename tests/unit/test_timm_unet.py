"""Encoders from timm: shapes, strides, standardisation, freezing, and weights from a file."""

import sys
from types import SimpleNamespace

import pytest
import torch
from timm_here import TinyEncoder, timm_or_skip
from torch import nn

from orion_unet.config import ModelOptions
from orion_unet.errors import InputError
from orion_unet.models import timm_unet
from orion_unet.models.build import build_network
from orion_unet.models.encoder_weights import match_weights, read_weights
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


@pytest.mark.parametrize("strides", [[3, 6], [2, 8], [1, 2], [4, 4, 16]])
def test_strides_that_do_not_double_are_refused(strides):
    encoder = TinyEncoder()
    encoder.feature_info = SimpleNamespace(reduction=lambda: strides, channels=lambda: [5] * len(strides))
    with pytest.raises(InputError, match="--encoder timm:odd: its maps are at strides"):
        timm_unet._try_out(encoder, "odd")


def weights_of_tiny(prefix=""):
    """Its tensors under the names that files have: dots for the underscores that timm writes."""
    torch.manual_seed(5)
    state = TinyEncoder().state_dict()
    return {f"{prefix}{name.replace('stages_2', 'stages.2')}": tensor for name, tensor in state.items()}


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "encoder.", "backbone.", "module.model.encoder."])
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
