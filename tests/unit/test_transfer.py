"""Which weights of an earlier model a new one takes: by level, by shape, and by marker name in the head."""

import pytest
import torch

from orion_unet.config import ModelOptions
from orion_unet.errors import InputError
from orion_unet.models.unet import SpatialUNet
from orion_unet.training.transfer import Source, describe, source_warnings, take_over

OLD = ("Hoechst", "CD3", "CD20", "Pan-CK")
NEW = ("CD20", "SMA", "Hoechst")
MEANS = torch.tensor([0.3, 0.2, 0.1])


def options(**changes):
    return ModelOptions(**{"base_features": 4, "depth": 2, **changes})


def network(seed, markers, **changes):
    """A network whose weights, biases and running statistics all differ from their defaults."""
    torch.manual_seed(seed)
    model = SpatialUNet.from_options(options(**changes), markers)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.train()(torch.rand(2, 3, 32, 32))
    return model.eval()


def source(names=OLD, trained_on=(), pixel_size_um=None, **changes):
    weights = network(0, len(names), **changes).state_dict()
    return Source("old.pt", "00", 7, weights, names, options(**changes), "linear", pixel_size_um, trained_on)


def test_a_marker_known_by_name_is_predicted_exactly_as_before_whatever_its_position():
    given, he = source(), torch.rand(2, 3, 40, 24)
    before = SpatialUNet.from_options(options(), len(OLD)).eval()
    before.load_state_dict(given.weights)
    model = network(1, len(NEW))
    record = take_over(model, given, NEW, MEANS)
    with torch.no_grad():
        old, new = before(he), model(he)
    for name in ("CD20", "Hoechst"):
        torch.testing.assert_close(new[:, NEW.index(name)], old[:, OLD.index(name)], rtol=0, atol=1e-6)
    assert record["markers"] == {"CD20": "CD20", "SMA": None, "Hoechst": "Hoechst"}
    assert record["dropped"] == ["CD3", "Pan-CK"]


@pytest.mark.parametrize(("means", "expected"), [(MEANS, 0.2), (None, 0.5)])
def test_a_new_marker_starts_at_its_mean_everywhere(means, expected):
    model = network(1, len(NEW))
    take_over(model, source(), NEW, means)
    with torch.no_grad():
        prediction = model(torch.rand(2, 3, 40, 24))[:, NEW.index("SMA")]
    torch.testing.assert_close(prediction, torch.full_like(prediction, expected))


def test_a_network_of_the_same_shape_is_taken_whole():
    model, given = network(1, len(OLD)), source()
    record = take_over(model, given, OLD, None)
    assert all(torch.equal(tensor, given.weights[name]) for name, tensor in model.state_dict().items())
    assert record["parts"] == {
        "encoder": {"taken": [0, 1, 2], "in_part": [], "new": []},
        "decoder": {"taken": [0, 1], "in_part": [], "new": []},
    }
    assert describe(record) == [
        "started from    old.pt, epoch 7",
        "  encoder       all levels",
        "  decoder       all levels",
        "  head          4 of 4 markers by name",
    ]


def test_a_deeper_network_takes_the_levels_of_the_same_resolution():
    model, given = network(1, len(NEW), depth=3), source(depth=2)
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    record = take_over(model, given, NEW, MEANS)
    assert record["parts"] == {
        "encoder": {"taken": [0, 1, 2], "in_part": [], "new": [3]},
        "decoder": {"taken": [0, 1], "in_part": [], "new": [2]},
    }
    state = model.state_dict()
    # Level 2 is the bottleneck of the shallower network; the decoder counts its levels from the deepest one.
    for mine, theirs in (
        ("encoder.2.0.weight", "bottleneck.0.0.weight"),
        ("decoder.1.up.weight", "decoder.0.up.weight"),
    ):
        assert torch.equal(state[mine], given.weights[theirs])
    for name in ("bottleneck.0.0.weight", "decoder.0.up.weight"):
        assert torch.equal(state[name], fresh[name])
    assert describe(record)[1:] == [
        "  encoder       levels 0, 1, 2; new: 3",
        "  decoder       levels 0, 1; new: 2",
        "  head          2 of 3 markers by name; new: SMA; dropped: CD3, Pan-CK",
    ]


def test_a_shallower_network_takes_what_it_has_levels_for():
    record = take_over(network(1, 3, depth=1), source(depth=3), NEW, MEANS)
    assert record["parts"]["encoder"]["taken"] == [0, 1]
    assert record["parts"]["decoder"]["taken"] == [0]


@pytest.mark.parametrize(("there", "here"), [(False, True), (True, False)])
def test_the_first_convolution_keeps_its_colours_where_only_one_network_sees_the_gradient(there, here):
    given = source(use_boundary_guidance=there)
    model = network(1, len(NEW), use_boundary_guidance=here)
    take_over(model, given, NEW, MEANS)
    first = model.state_dict()["encoder.0.0.weight"]
    assert torch.equal(first[:, :3], given.weights["encoder.0.0.weight"][:, :3])
    assert not first[:, 3:].any()


def test_another_norm_keeps_convolutions_scales_and_shifts():
    given, model = source(norm="batch"), network(1, len(NEW), norm="group")
    record = take_over(model, given, NEW, MEANS)
    assert record["parts"]["encoder"]["new"] == []
    assert all(torch.equal(p, given.weights[name]) for name, p in model.named_parameters() if "head" not in name)


def test_a_run_without_a_shared_marker_is_refused_unless_a_part_is_enough():
    source().check_markers(["CD3"], partial=False)
    source().check_markers(["CD8"], partial=True)
    with pytest.raises(InputError, match=r"predicts Hoechst, CD3, CD20, Pan-CK and none of this run's markers \(CD8\)"):
        source().check_markers(["CD8"], partial=False)


def test_what_makes_a_start_misleading_is_said():
    assert list(source_warnings(source(), "linear", 0.5, OLD, {"a": "1"})) == []
    given = source(("channel_00", "CD3"), trained_on=("1", "2"), pixel_size_um=0.25)
    said = list(source_warnings(given, "log1p", 0.5, ("channel_00", "CD3"), {"a": "1", "b": "9"}))
    wanted = ("trained on 1 of this run's 2 validation cores", "matched by their position", "log1p", "0.25 µm")
    assert len(said) == len(wanted)
    assert all(part in sentence for part, sentence in zip(wanted, said, strict=True))
