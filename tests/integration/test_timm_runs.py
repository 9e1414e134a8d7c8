"""Runs with an encoder from timm: weights from a file, frozen ones left out of checkpoints, ranks, prediction."""

import hashlib
import json
import os
import shutil

import numpy as np
import pytest
import torch
from test_transfer_runs import started_from
from timm_here import PatchEncoder, TinyEncoder, timm_or_skip
from tiny_runs import ROOT, TINY, differing, losses, weights

from orion_unet.cli.predict import main as predict_command
from orion_unet.config import TrainConfig
from orion_unet.errors import InputError
from orion_unet.inference.model import load_trained
from orion_unet.inference.predict import predict
from orion_unet.inference.tiling import choose_tiling
from orion_unet.models import timm_unet
from orion_unet.models.build import build_network

pytestmark = pytest.mark.slow

OPTIONS = {"encoder": "timm:tiny", "ema_decay": 0.9}


@pytest.fixture
def tiny(monkeypatch):
    """An encoder of three layers instead of timm's."""
    monkeypatch.setattr(timm_unet, "create_encoder", lambda name: TinyEncoder())
    monkeypatch.setattr(timm_unet, "_colours", lambda name: ((0.5, 0.4, 0.3), (0.2, 0.2, 0.1)))


@pytest.fixture
def file(tmp_path):
    """Weights of the encoder, with one tensor missing and one too many."""
    torch.manual_seed(8)
    state = {f"model.{name}": tensor for name, tensor in TinyEncoder().state_dict().items()}
    state["model.fc.bias"] = torch.zeros(3)
    path = tmp_path / "encoder.pt"
    torch.save(state, path)
    return path


def stored(run_dir, name="best.pt"):
    return torch.load(run_dir / "checkpoints" / name, weights_only=True)


def inside(state):
    return {name.removeprefix("encoder."): tensor for name, tensor in state.items() if name.startswith("encoder.")}


def test_an_encoder_with_random_weights_trains(tiny, train):
    made = train(**OPTIONS)
    assert made.code == 0
    config = json.loads((made.dir / "config.json").read_text())
    assert config["encoder_weights"] is None
    network = load_trained(made.dir, "cpu").network
    assert differing(network.state_dict(), stored(made.dir)["model"]) == []


def test_a_frozen_encoder_keeps_the_weights_of_the_file_and_is_not_in_the_checkpoints(tiny, file, train):
    made = train(**OPTIONS, encoder_weights=str(file), encoder_train="frozen")
    assert made.code == 0
    record = json.loads((made.dir / "config.json").read_text())["encoder_weights"]
    assert record == {
        "path": str(file.resolve()),
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "taken": 11,
        "missing": [],
        "unexpected": ["model.fc.bias"],
        "fitted": [],
        "left_out": True,
    }
    for name, part in (("best.pt", "model"), ("last.pt", "model"), ("last.pt", "ema")):
        assert inside(weights(made.dir, name, part)) == {}
    found = inside(load_trained(made.dir, "cpu").network.state_dict())
    expected = {name.removeprefix("model."): tensor for name, tensor in torch.load(file, weights_only=True).items()}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    log = (made.dir / "train.log").read_text()
    lines = (f"encoder weights {file.resolve()}: 11 tensors\n", "in the file and not used: model.fc.bias\n")
    assert all(log.count(line) == 1 for line in (*lines, "the checkpoints leave them out"))


def test_the_prediction_is_the_same_wherever_the_file_is_and_refuses_another(tiny, file, train, tmp_path):
    made = train(**OPTIONS, encoder_weights=str(file), encoder_train="frozen")
    he = np.random.default_rng(0).integers(0, 255, (40, 56, 3), np.uint8)
    before = predict(he, load_trained(made.dir, "cpu"))
    moved = tmp_path / "elsewhere.pt"
    shutil.move(file, moved)
    with pytest.raises(
        InputError, match=r"best.pt: the weights of its frozen encoder are not in it, and .* is not ther"
    ):
        load_trained(made.dir, "cpu")
    after = predict(he, load_trained(made.dir, "cpu", encoder_weights=moved))
    assert np.array_equal(before, after)
    state = torch.load(moved, weights_only=True)
    state["model.one.0.bias"] += 1
    torch.save(state, moved)
    with pytest.raises(InputError, match="is another file than the one the model was trained with"):
        load_trained(made.dir, "cpu", encoder_weights=moved)


def test_the_predict_command_takes_the_file(tiny, file, train, pairs, tmp_path):
    made = train(**OPTIONS, encoder_weights=str(file), encoder_train="frozen", epochs=1)
    moved = tmp_path / "elsewhere.pt"
    shutil.move(file, moved)
    words = [
        "--checkpoint",
        str(made.dir),
        "--input",
        str(pairs / "core_00_HE.npy"),
        "--no_overview",
        "--device",
        "cpu",
    ]
    with pytest.raises(InputError, match="give the file they came from with --encoder_weights"):
        predict_command([*words, "--output_dir", str(tmp_path / "a")])
    assert not (tmp_path / "a").exists()
    assert predict_command([*words, "--output_dir", str(tmp_path / "a"), "--encoder_weights", str(moved)]) == 0
    assert len(list((tmp_path / "a").glob("*.npy"))) == 1


@pytest.mark.parametrize("how", ["full", "last"])
def test_weights_that_train_are_in_the_checkpoints(how, tiny, file, train):
    made = train(**OPTIONS, encoder_weights=str(file), encoder_train=how)
    expected = {name.removeprefix("model."): tensor for name, tensor in torch.load(file, weights_only=True).items()}
    found = inside(stored(made.dir)["model"])
    trained = {name for name, tensor in found.items() if not torch.equal(tensor, expected[name])}
    # "spare" reaches no map; the last stage that can train is the convolution before it.
    assert not any("spare" in name for name in trained)
    assert "stages_2.weight" in trained
    assert ("one.0.weight" in trained) == (how == "full")
    file.unlink()
    assert differing(load_trained(made.dir, "cpu").network.state_dict(), stored(made.dir)["model"]) == []
    with pytest.raises(InputError, match="contains the weights of its encoder; leave out --encoder_weights"):
        load_trained(made.dir, "cpu", encoder_weights=file)


@pytest.mark.parametrize("how", ["frozen", "full"])
def test_an_interrupted_run_continues_to_the_same_weights(how, tiny, file, train, killed_in_epoch_2):
    options = {**OPTIONS, "encoder_weights": str(file), "encoder_train": how}
    straight = train("straight", **options)
    with killed_in_epoch_2():
        train("run", **options, resume="auto")
    if how == "frozen":
        moved = file.rename(file.with_name("moved.pt"))
        with pytest.raises(InputError, match="--resume: the checkpoint cannot be continued: the weights of its frozen"):
            train("run", **{**options, "encoder_weights": None}, resume="auto")
        moved.rename(file)
    # A run that left weights out reads them from the file of its record.
    made = train("run", **{**options, "encoder_weights": None}, resume="auto")
    assert losses(made.dir) == losses(straight.dir)
    for name, part in (("last.pt", "model"), ("last.pt", "ema"), ("best.pt", "model")):
        assert differing(weights(made.dir, name, part), weights(straight.dir, name, part)) == []
    config = json.loads((made.dir / "config.json").read_text())
    assert config["encoder_weights"] == json.loads((straight.dir / "config.json").read_text())["encoder_weights"]


def test_a_new_run_starts_from_one_with_the_same_encoder(tiny, file, train):
    first = train("first", **OPTIONS, encoder_weights=str(file), encoder_train="frozen")
    made = train("second", **OPTIONS, init_from=str(first.dir), encoder_train="frozen", learning_rate=1e-12, epochs=1)
    before = load_trained(first.dir, "cpu").network.state_dict()
    # It has no file of its own: its checkpoints hold all weights.
    assert inside(weights(made.dir)).keys() == inside(before).keys()
    assert differing(inside(weights(made.dir)), inside(before)) == []
    assert all(levels["new"] == [] for levels in started_from(made.dir)["parts"].values())
    with pytest.raises(InputError, match="its network has --encoder timm:tiny, this run's has --encoder unet"):
        train("third", init_from=str(first.dir))
    with pytest.raises(InputError, match="use the same, because no layer fits another --encoder"):
        train("third", init_from=str(first.dir), init_partial=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": "unet", "encoder_weights": "FILE"}, "--encoder_weights: is for an encoder from timm"),
        ({"encoder_weights": "absent.pt"}, "--encoder_weights absent.pt: cannot be read"),
        ({"encoder_train": "frozen"}, "would keep random weights"),
        ({"encoder_weights": "REGISTERS"}, r"has model.reg_token, which does not fit this encoder"),
    ],
)
def test_what_cannot_be_used_is_refused_and_nothing_is_written(options, message, tiny, file, train, tmp_path):
    registers = tmp_path / "registers.pt"
    torch.save({**torch.load(file, weights_only=True), "model.reg_token": torch.zeros(1, 4, 5)}, registers)
    files = {"FILE": str(file), "REGISTERS": str(registers)}
    given = {**OPTIONS, **{name: files.get(value, value) for name, value in options.items()}}
    with pytest.raises(InputError, match=message) as error:
        train("refused", **given)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    ("pixel_size", "pixels"), [({}, "16/14 times larger"), ({"pixel_size_um": 0.325}, "of 0.371 µm")]
)
def test_an_encoder_with_patches_of_14_pixels_trains_on_any_patch_size_and_predicts(
    pixel_size, pixels, tiny, monkeypatch, train
):
    monkeypatch.setattr(timm_unet, "create_encoder", lambda name: PatchEncoder(14))
    made = train(encoder="timm:patches", patch_size=52, epochs=1, **pixel_size)
    assert made.code == 0
    line = f"encoder input   the H&E at 14/16 of its size, hence pixels {pixels}, because its stride is 14\n"
    assert (made.dir / "train.log").read_text().count(line) == 1
    model = load_trained(made.dir, "cpu")
    assert model.network.strides == (14, 16)
    assert differing(model.network.state_dict(), stored(made.dir)["model"]) == []
    assert choose_tiling(model, (1000, 1000)).tile == 64
    he = np.random.default_rng(0).integers(0, 255, (90, 150, 3), np.uint8)
    whole, crop = predict(he, model), predict(he[:50], model)
    assert whole.shape == (3, 90, 150) and crop.shape == (3, 50, 150)


# From here on with timm itself.


def real_options(tmp_path, **options):
    """A small convolutional encoder whose weights are in a file."""
    timm = timm_or_skip()
    torch.manual_seed(4)
    path = tmp_path / "resnet.pt"
    torch.save(timm.create_model("resnet10t", pretrained=False).state_dict(), path)
    return {**TINY, "encoder": "timm:resnet10t", "encoder_weights": str(path), "ema_decay": 0.9, **options}


@pytest.mark.parametrize("how", ["frozen", "last"])
def test_ranks_continue_to_the_same_weights(how, pairs, train_on_ranks, tmp_path):
    options = real_options(tmp_path, pairs_dir=str(pairs), batch_size=1, encoder_train=how)
    # timm may be on a path of its own.
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    run, straight = train_on_ranks(2, options, PYTHONPATH=path)
    assert losses(run) == losses(straight)
    assert differing(weights(run), weights(straight)) == []
    assert bool(inside(weights(run))) == (how != "frozen")


def test_a_vision_transformer_trains_and_predicts(train, tmp_path):
    timm = timm_or_skip()
    path = tmp_path / "vit.pt"
    torch.save(timm.create_model("vit_tiny_patch16_224", pretrained=False).state_dict(), path)
    made = train(encoder="timm:vit_tiny_patch16_224", encoder_weights=str(path), encoder_train="frozen", epochs=1)
    assert "encoder input" not in (made.dir / "train.log").read_text()
    he = np.random.default_rng(0).integers(0, 255, (90, 50, 3), np.uint8)
    assert predict(he, load_trained(made.dir, "cpu")).shape == (3, 90, 50)
    assert (made.dir / "checkpoints" / "best.pt").stat().st_size < path.stat().st_size / 4


def test_a_vision_transformer_of_patch_14_takes_the_positions_of_another_image_size(train, tmp_path):
    timm = timm_or_skip()
    path = tmp_path / "vit.pt"
    small = timm.create_model("vit_small_patch14_reg4_dinov2", pretrained=False, img_size=224, depth=3)
    torch.save(small.state_dict(), path)
    name = "timm:vit_small_patch14_reg4_dinov2,depth=3"
    made = train(encoder=name, encoder_weights=str(path), encoder_train="frozen", patch_size=60, epochs=1)
    log = (made.dir / "train.log").read_text()
    assert "the H&E at 14/16 of its size" in log
    assert "  of another size in the file, resampled: pos_embed\n" in log
    assert inside(stored(made.dir)["model"]) == {}
    he = np.random.default_rng(0).integers(0, 255, (90, 50, 3), np.uint8)
    assert predict(he, load_trained(made.dir, "cpu")).shape == (3, 90, 50)


def test_a_name_that_timm_does_not_know_is_refused_before_anything_is_written(train, tmp_path):
    timm_or_skip()
    with pytest.raises(InputError, match=r"--encoder timm:resnet51: timm .* has no model of that name; the nearest"):
        train("refused", encoder="timm:resnet51")
    assert not (tmp_path / "refused").exists()


def test_the_options_of_an_encoder_reach_the_network(tiny):
    config = TrainConfig.from_options({"encoder": "timm:tiny", "encoder_mean": "0.1,0.2,0.3", "base_features": 4})
    assert build_network(config.model, 1).standardise.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
