"""Several checkpoints predict as one: the mean of their intensities, and what does not fit together is refused."""

import json
import sys

import numpy as np
import pytest
import tifffile
import torch
from predictions import WHITE, image, predictor, write_checkpoint
from tiny_runs import ROOT

from orion_unet.cli.arguments import run_command
from orion_unet.cli.evaluate import main as evaluate_main
from orion_unet.cli.predict import main as predict_main
from orion_unet.errors import InputError
from orion_unet.inference.ensemble import join, load_models, shared_scorecard
from orion_unet.inference.model import load_trained
from orion_unet.inference.predict import predict as predict_array
from orion_unet.inference.trust import MarkerTrust, write_scorecard


def write_member(path, seed, lower=None, upper=None, change=None, **options):
    """A model of random weights; ``lower`` and ``upper`` are its normalisation of the three markers."""
    path.parent.mkdir(exist_ok=True)
    write_checkpoint(path, **options)
    content = torch.load(path, weights_only=True)
    rng = torch.Generator().manual_seed(seed)
    for name, tensor in content["model"].items():
        if name.endswith("weight") and tensor.ndim == 4:
            content["model"][name] = tensor + 0.05 * torch.randn(tensor.shape, generator=rng)
    for channel, place in enumerate(content["normalization"]["channels"]):
        if lower is not None:
            place |= {"lower": lower[channel], "upper": upper[channel]}
    if change is not None:
        change(content)
    torch.save(content, path)
    return path


@pytest.fixture
def members(tmp_path):
    """Three models; the second has other bounds, the third a log transform."""
    return [
        write_member(tmp_path / "a" / "best.pt", 1),
        write_member(tmp_path / "b" / "best.pt", 2, [0.0, 0.1, 0.2], [0.4, 0.9, 0.3]),
        write_member(tmp_path / "c" / "best.pt", 3, transform="log1p"),
    ]


def intensities(path, he):
    """Stored values (C, H, W) of one model, inverted by hand from its network's output."""
    content = torch.load(path, weights_only=True)["normalization"]
    output = load_trained(path, "cpu").predict(torch.from_numpy(he).permute(2, 0, 1)[None].float() / 255)[0].numpy()
    for channel, place in enumerate(content["channels"]):
        share = output[channel].astype(np.float64)
        if content["transform"] == "log1p":
            share = (101.0**share - 1) / 100
        output[channel] = (place["lower"] + share * (place["upper"] - place["lower"])) * WHITE
    return output


def test_the_mean_is_that_of_the_intensities_and_the_spread_their_standard_deviation(members):
    he = image(64, 64)
    alone = np.stack([intensities(path, he) for path in members])
    model = load_models(members, "cpu", spread=True)
    low, high = model.normalization.lower[:3], model.normalization.upper[:3]
    # By hand: the lowest of 0.01, 0.0 and 0.01, the highest of 0.5 and 0.4, and so on.
    assert low.tolist() == [0.0, 0.0, 0.2]
    assert high.tolist() == [0.5, 0.9, 0.3]
    found = model.predict(torch.from_numpy(he).permute(2, 0, 1)[None].float() / 255)[0].numpy()
    span = (high - low)[:, None, None] * WHITE
    np.testing.assert_allclose(found[:3] * span + low[:, None, None] * WHITE, alone.mean(axis=0), atol=0.05)
    np.testing.assert_allclose(found[3:] * span, alone.std(axis=0), atol=0.05)
    assert alone.std(axis=0).max() > 100
    assert found.min() >= 0
    assert found.max() <= 1


def test_models_of_one_normalisation_are_averaged_as_they_are(tmp_path):
    paths = [write_member(tmp_path / name / "best.pt", seed) for seed, name in enumerate("ab")]
    he = torch.rand(1, 3, 64, 64)
    mean = (load_trained(paths[0], "cpu").predict(he) + load_trained(paths[1], "cpu").predict(he)) / 2
    # The last marker is empty in both.
    np.testing.assert_allclose(load_models(paths, "cpu").predict(he)[:, :2], mean[:, :2], atol=1e-6)
    assert not load_models(paths, "cpu").predict(he)[:, 2].any()


def test_predict_writes_the_mean_and_on_request_the_spread(members, tmp_path, capsys):
    np.save(tmp_path / "core_HE.npy", image(96, 80))
    call = predictor(members[0], tmp_path, capsys)
    made = call(tmp_path / "core_HE.npy", checkpoint=members[0])
    assert made.code == 0
    words = ["--input", tmp_path / "core_HE.npy", "--device", "cpu", "--checkpoint", *members]
    for form, extra in (("npy", []), ("ome-tiff", ["--dtype", "float32"])):
        out = tmp_path / form
        argv = ["--output_dir", out, "--spread", "--format", form, *extra, *words]
        assert run_command(predict_main, [str(word) for word in argv]) == 0
    alone = [predict_array(image(96, 80), load_trained(path, "cpu")) for path in members]
    mean, spread = (np.load(tmp_path / "npy" / f"core{end}.npy") for end in ("", "_spread"))
    assert mean.shape == spread.shape == (3, 96, 80)
    np.testing.assert_allclose(mean, np.mean(alone, axis=0), atol=2)
    # Tiles are blended after the standard deviation is taken, which is the same where one tile covers the image.
    np.testing.assert_allclose(spread, np.std(alone, axis=0), atol=2)
    for end, expected in (("", mean), ("_spread", spread)):
        np.testing.assert_allclose(tifffile.imread(tmp_path / "ome-tiff" / f"core{end}.ome.tiff"), expected, rtol=1e-6)
    assert not list((tmp_path / "npy").glob(".*"))
    assert "3 models" in capsys.readouterr().out


def test_a_spread_of_one_model_is_refused(members, tmp_path, capsys):
    np.save(tmp_path / "core_HE.npy", image(64, 64))
    made = predictor(members[0], tmp_path, capsys)(tmp_path / "core_HE.npy", spread=True)
    assert made.code == 2
    assert "--spread: is the standard deviation over several models" in made.err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"names": ("Hoechst", "CD3e", "CD20")}, "only models of the same markers"),
        ({"names": ("CD3e", "Hoechst", "Blank")}, "in the same order"),
        ({"pixel_size_um": 0.5}, "was trained at an unknown pixel size and .* at 0.5 µm"),
        ({"depth": 3}, "--depth 2 and .* 3"),
        ({"norm": "group"}, "--norm batch and .* group"),
    ],
)
def test_models_that_do_not_fit_are_refused_in_one_sentence(change, words, tmp_path):
    first = write_member(tmp_path / "a" / "best.pt", 1)
    other = tmp_path / "b" / "best.pt"
    other.parent.mkdir()
    write_checkpoint(other, **change)
    with pytest.raises(InputError, match=words) as caught:
        load_models([first, other], "cpu")
    assert "\n" not in str(caught.value)


def test_models_that_need_other_tiles_are_refused(members):
    first, other = (load_trained(path, "cpu") for path in members[:2])
    # --depth is the same, but an encoder from timm decides on its own.
    other.network.depth += 1
    with pytest.raises(InputError, match=r"has --encoder unet and .* need other tiles"):
        join([first, other])
    other.network.depth, other.network.sees_whole_image = first.network.depth, True
    with pytest.raises(InputError, match="only models that are tiled alike can be averaged"):
        join([first, other])


def test_a_checkpoint_given_twice_is_refused(members):
    with pytest.raises(InputError, match="names a checkpoint twice"):
        load_models([members[0], members[0]], "cpu")


def rows(*cores):
    return [{"core": core, "group": core} for core in cores]


def test_a_core_that_any_member_was_trained_on_is_trained_on(tmp_path):
    def split(train, val, digests):
        return lambda content: content.update(
            split={"train": rows(*train), "val": rows(*val)}, cores={"digests": digests}
        )

    first = write_member(
        tmp_path / "a" / "best.pt", 1, change=split("AB", "CD", dict(zip("ABCD", "abcd", strict=True)))
    )
    # Its D is other tissue than that of the first.
    second = write_member(
        tmp_path / "b" / "best.pt", 2, change=split("CD", "AE", dict(zip("ACDE", "acxe", strict=True)))
    )
    model = join([load_trained(first, "cpu"), load_trained(second, "cpu")])
    trained = {row["core"] for row in model.split["train"]}
    assert trained == {"A", "B", "C", "D of model 2"}
    assert {row["core"] for row in model.split["val"]} == {"D", "E"}
    assert model.digests == {"A": "a", "B": "b", "C": "c", "D": "d", "D of model 2": "x", "E": "e"}


def test_a_core_whose_group_any_member_was_trained_on_is_not_held_out(tmp_path):
    def split(train, val):
        listed = [[{"core": core, "group": core[0]} for core in cores] for cores in (train, val)]
        return lambda content: content.update(split=dict(zip(("train", "val"), listed, strict=True)))

    first = write_member(tmp_path / "a" / "best.pt", 1, change=split(["p1"], ["q1", "r1"]))
    second = write_member(tmp_path / "b" / "best.pt", 2, change=split(["q2"], ["r2"]))
    model = join([load_trained(first, "cpu"), load_trained(second, "cpu")])
    assert [row["core"] for row in model.split["val"]] == ["r1", "r2"]
    assert [row["core"] for row in model.split["train"]] == ["p1", "q2", "q1"]


TRUST = {"CD3e": MarkerTrust(0.5, 0.4, 0.6, float("nan"), "supported")}


def test_verdicts_of_an_ensemble_are_those_that_all_its_members_share(members):
    for path in members:
        write_scorecard(path, TRUST, {"command": "crossval"})
    model = load_models(members, "cpu")
    assert shared_scorecard(model)[0]["CD3e"].verdict == "supported"
    write_scorecard(members[1], {"CD3e": MarkerTrust(0.1, -0.1, 0.2, 0.3, "not supported")}, {"command": "evaluate"})
    found, why = shared_scorecard(model)
    assert found is None
    assert "scorecards of these checkpoints differ" in why


def evaluate(*words):
    return run_command(evaluate_main, [str(word) for word in words])


@pytest.mark.slow
def test_evaluate_scores_only_cores_that_no_member_was_trained_on(train, pairs, tmp_path, capsys):
    splits = []
    for name, training in (("first", ("core_00", "core_01")), ("second", ("core_01", "core_02"))):
        held = [core for core in (f"core_{index:02d}" for index in range(4)) if core not in training]
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"train": rows(*training), "val": rows(*held)}))
        splits.append(train(name, epochs=1, split_file=str(path)).dir)
    out = tmp_path / "scores"
    assert evaluate("--checkpoint", *splits, "--pairs_dir", pairs, "--output_dir", out, "--device", "cpu") == 0
    document = json.loads((out / "scores.json").read_text())
    assert [row["core"] for row in document["cores"]] == ["core_03"]
    assert len(document["ensemble"]) == 2
    assert "each model of an ensemble has another" in document["baselines"]
    assert not (splits[0] / "scorecard.json").exists()
    assert evaluate("--checkpoint", *splits, "--pairs_dir", pairs) == 2
    assert "give --output_dir" in capsys.readouterr().err


@pytest.mark.slow
def test_evaluate_refuses_the_folds_of_one_cross_validation(train, pairs, tmp_path, capsys):
    runs = [train(f"fold_{number}", epochs=1, fold=f"{number}/2").dir for number in (1, 2)]
    out = tmp_path / "scores"
    assert evaluate("--checkpoint", *runs, "--pairs_dir", pairs, "--output_dir", out, "--device", "cpu") == 2
    assert "has no held-out core of this ensemble, held out by all 2 models" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.slow
def test_the_benchmark_of_ensembles_runs(call):
    made = call(sys.executable, ROOT / "benchmarks" / "ensemble.py", "--quick")
    assert made.code == 0
    rows = [line for line in made.out.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + 19 + 1
    numbers = [float(cell) for cell in rows[-1].split("|")[2:5]]
    assert all(-1 <= number <= 1 for number in numbers)
