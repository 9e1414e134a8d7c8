"""evaluate on tiny trained models: numbers, files, splits, and bad input."""

import csv
import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import pearsonr
from skimage.metrics import peak_signal_noise_ratio
from tiny_runs import ROOT

from orion_unet.cli.arguments import run_command
from orion_unet.cli.evaluate import main
from orion_unet.errors import InputError
from orion_unet.evaluation.baselines import fit_baselines
from orion_unet.evaluation.files import FILES
from orion_unet.evaluation.scored_folder import FolderOptions, open_folder
from orion_unet.inference.model import load_trained

NAMES = ("Hoechst", "CD3_e", "$CD20$")


@pytest.fixture
def named(pairs):
    """Pairs with named markers, the first of which shows nuclei: dark discs of the H&E, bright in the marker."""
    (pairs / "channel_names.txt").write_text("\n".join(NAMES))
    rng = np.random.default_rng(1)
    rows, columns = np.mgrid[:80, :72]
    for path in sorted(pairs.glob("*_ORION.npy")):
        orion, he = np.load(path), np.load(str(path).replace("ORION", "HE"))
        orion[..., 0] //= 20
        for y, x in ((12, 12), (12, 40), (40, 25), (40, 55), (65, 15), (65, 50)):
            inside = np.hypot(rows - y, columns - x) < 6
            orion[inside, 0] = 40000 + rng.integers(0, 2000)
            orion[inside, 1] = rng.choice([1000, 50000])
            he[inside] = (60, 40, 120)
        np.save(path, orion)
        np.save(str(path).replace("ORION", "HE"), he)
    return pairs


@pytest.fixture
def run(train, named):
    return train(pairs_dir=str(named), use_boundary_guidance=True, noise_removal=True).dir


def evaluate(run, pairs, *words):
    """Exit code of the command in this process."""
    words = [str(word) for word in ("--checkpoint", run, "--pairs_dir", pairs, *words)]
    return run_command(main, words)


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return {row["marker"]: row for row in csv.DictReader(file)}


def read_json(path):
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=refuse)


def split_of(run):
    document = read_json(run / "split.json")
    return {side: [row["core"] for row in document[side]] for side in ("train", "val")}


def test_scores_equal_those_calculated_from_the_network_and_the_files(train, named):
    # Square cores no larger than a window: what the network sees is the whole of one.
    for path in named.glob("*.npy"):
        np.save(path, np.load(path)[:72])
    run = train(pairs_dir=str(named)).dir
    assert evaluate(run, named, "--bootstrap", 0) == 0
    rows = read_csv(run / "evaluation" / "scores.csv")
    assert list(rows) == [*NAMES, "overall"]
    model = load_trained(run, "cpu")
    (core,) = split_of(run)["val"]
    he = np.load(named / f"{core}_HE.npy").astype(np.float32) / 255
    predicted = model.predict(torch.from_numpy(he).permute(2, 0, 1)[None])[0].numpy()
    stored = read_json(run / "normalization.json")["channels"]
    for marker, name in enumerate(NAMES):
        intensity = np.load(named / f"{core}_ORION.npy")[..., marker] / 65535
        low, high = stored[marker]["lower"], stored[marker]["upper"]
        target = np.clip((intensity - low) / (high - low), 0, 1)
        r = pearsonr(predicted[marker].ravel(), target.ravel()).statistic
        assert float(rows[name]["pearson"]) == pytest.approx(r, abs=1e-4)
        psnr = peak_signal_noise_ratio(target, predicted[marker].astype(float), data_range=1)
        assert float(rows[name]["psnr_db"]) == pytest.approx(psnr, abs=1e-3)
        assert float(rows[name]["fraction_positive"]) == pytest.approx((target > 0.5).mean(), abs=1e-5)
        assert rows[name]["pearson_low"] == ""
    mean = np.mean([float(rows[name]["pearson"]) for name in NAMES])
    assert float(rows["overall"]["pearson"]) == pytest.approx(mean, abs=1e-5)


def test_every_file_is_written_whole_and_readable(run, named, capsys):
    assert evaluate(run, named, "--split", "all", "--cells", "--bootstrap", 50) == 0
    folder = run / "evaluation"
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    for path in folder.glob("*.png"):
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            assert min(image.size) > 100
    document = read_json(folder / "scores.json")
    assert document["checkpoint"]["epoch"] == load_trained(run, "cpu").epoch
    assert document["sample"]["pixels"] == 4 * 80 * 72
    assert [row["core"] for row in document["cores"]] == [f"core_{index:02d}" for index in range(4)]
    assert {row["split"] for row in document["cores"]} == {"train", "val"}
    assert document["target"]["noise_removal"] is True
    for name in NAMES:
        score = document["markers"][name]["model"]["pearson"]
        assert score["low"] <= score["value"] <= score["high"]
        assert document["cells"]["markers"][name]["pearson"]["value"] is not None
    assert document["cells"]["count"] == 24
    assert "nan" not in "".join(path.read_text().lower() for path in folder.glob("*.csv"))
    with open(folder / "cores.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 4 * 4
    said = capsys.readouterr().out
    assert "3 of the 4 scored cores were trained on" in said


def test_the_held_out_core_alone_is_scored_by_default_and_new_cores_with_it(run, named):
    for name in ("HE", "ORION"):
        np.save(named / f"new_{name}.npy", np.load(named / f"core_00_{name}.npy"))
    assert evaluate(run, named) == 0
    document = read_json(run / "evaluation" / "scores.json")
    assert [row["core"] for row in document["cores"]] == [*split_of(run)["val"], "new"]
    assert "no intervals: 2 cores" in document["intervals"]["missing_because"]
    assert document["overall"]["model"]["pearson"]["low"] is None


def test_a_new_core_of_a_trained_patient_is_not_held_out(run, named, capsys):
    known = split_of(run)
    for name in ("HE", "ORION"):
        np.save(named / f"new_{name}.npy", np.load(named / f"core_00_{name}.npy"))
    rows = [f"{core},{core}" for core in known["val"]] + [f"{core},patient" for core in [*known["train"], "new"]]
    (named / "groups.csv").write_text("\n".join(["core,group", *rows]))
    # The run knew no groups: what the folder says now holds for the new core too.
    content = torch.load(run / "checkpoints" / "best.pt", weights_only=True)
    for row in content["split"]["train"]:
        row["group"] = "patient"
    torch.save(content, run / "checkpoints" / "best.pt")
    assert evaluate(run, named) == 0
    assert [row["core"] for row in read_json(run / "evaluation" / "scores.json")["cores"]] == known["val"]
    assert "1 cores are new" in capsys.readouterr().out


def test_the_baselines_are_fitted_on_training_cores_alone(run, named):
    before = fit_baselines(open_folder(load_trained(run, "cpu"), named, FolderOptions()))
    (held_out,) = split_of(run)["val"]
    path = named / f"{held_out}_ORION.npy"
    np.save(path, 65535 - np.load(path))
    after = fit_baselines(open_folder(load_trained(run, "cpu"), named, FolderOptions()))
    assert (before.mean == after.mean).all()
    assert (before.coefficients == after.coefficients).all()
    path = named / f"{split_of(run)['train'][0]}_ORION.npy"
    np.save(path, 65535 - np.load(path))
    changed = fit_baselines(open_folder(load_trained(run, "cpu"), named, FolderOptions()))
    assert (before.mean != changed.mean).all()


def test_without_training_cores_only_the_mean_is_left_to_beat(run, named, tmp_path, capsys):
    (held_out,) = split_of(run)["val"]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for path in (*named.glob(f"{held_out}_*"), named / "channel_names.txt"):
        (elsewhere / path.name).write_bytes(path.read_bytes())
    assert evaluate(run, elsewhere, "--cells", "--output_dir", tmp_path / "out") == 0
    document = read_json(tmp_path / "out" / "scores.json")
    assert set(document["overall"]["baselines"]) == {"mean"}
    assert document["cells"]["overall"]["f1"]["value"] is None
    assert document["cells"]["overall"]["auc"]["value"] is not None
    said = capsys.readouterr().out
    assert "there is no regression" in said
    assert "No F1" in said


def test_channels_are_matched_by_name_whatever_their_order(run, named, tmp_path):
    assert evaluate(run, named, "--output_dir", tmp_path / "first") == 0
    for path in named.glob("*_ORION.npy"):
        stored = np.load(path)
        np.save(path, np.concatenate([stored[..., :1], stored[..., ::-1]], axis=2))
    (named / "channel_names.txt").write_text("\n".join(["Extra", *NAMES[::-1]]))
    assert evaluate(run, named, "--output_dir", tmp_path / "second") == 0
    first, second = (read_csv(tmp_path / name / "scores.csv") for name in ("first", "second"))
    assert list(first) == list(second)
    for name in NAMES:
        assert float(first[name]["pearson"]) == pytest.approx(float(second[name]["pearson"]), abs=1e-5)


def test_a_marker_left_out_is_not_scored(run, named):
    assert evaluate(run, named, "--exclude_channels", "CD3_e") == 0
    assert list(read_csv(run / "evaluation" / "scores.csv")) == ["Hoechst", "$CD20$", "overall"]


def test_cells_of_label_files_are_those_scored(run, named, tmp_path, capsys):
    labels = tmp_path / "labels"
    labels.mkdir()
    (held_out,) = split_of(run)["val"]
    assert evaluate(run, named, "--cells", labels) == 2
    assert f"{held_out}_LABELS.npy" in capsys.readouterr().err
    drawn = np.zeros((80, 72), int)
    drawn[:10, :10], drawn[20:30, 20:30], drawn[50:60, 50:60] = 1, 2, 3
    np.save(labels / f"{held_out}_LABELS.npy", drawn)
    assert evaluate(run, named, "--cells", labels) == 0
    cells = read_json(run / "evaluation" / "scores.json")["cells"]
    assert cells["count"] == 3
    # No training core has labels, so there is nothing to choose a cut-off on.
    assert cells["overall"]["f1"]["value"] is None


class ColourMean(torch.nn.Module):
    """Predicts each pixel from itself alone: the mean of its colours, for every marker."""

    def forward(self, he):
        return he.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)


def test_every_pixel_of_a_core_of_many_windows_is_predicted_and_measured_once(train, named):
    run = train(pairs_dir=str(named), patch_size=16).dir
    model = load_trained(run, "cpu")
    folder = open_folder(replace(model, network=ColourMean()), named, FolderOptions())
    region = folder.region(2)
    he = torch.from_numpy(np.load(named / "core_02_HE.npy")).permute(2, 0, 1) / 255
    assert torch.allclose(region.he, he)
    assert torch.allclose(region.predicted, he.mean(0).expand(3, -1, -1), atol=1e-6)
    for y, x in ((0, 0), (8, 0)):
        assert torch.equal(region.measured[:, y : y + 72, x : x + 72], folder.read(2, y, x, 72)[1][0])
    part = open_folder(model, named, FolderOptions()).region(2, 13, 30, 25, 40)
    full = open_folder(model, named, FolderOptions()).region(2)
    for name in ("he", "measured", "predicted"):
        assert torch.equal(getattr(part, name), getattr(full, name)[:, 13:38, 30:70])


def test_cores_normalised_by_themselves_are_measured_where_they_are_new(train, named):
    run = train(pairs_dir=str(named), target_normalization="core").dir
    for name in ("HE", "ORION"):
        np.save(named / f"new_{name}.npy", np.load(named / f"core_00_{name}.npy") // (2 if name == "ORION" else 1))
    folder = open_folder(load_trained(run, "cpu"), named, FolderOptions())
    # Half as bright, normalised by itself: the same target as the core it was made from.
    assert folder.table.names[-1] == "new"
    made, new = folder.region(0).measured, folder.region(4).measured
    assert torch.allclose(made, new, atol=2e-3)


def test_an_earlier_evaluation_is_kept_unless_told_otherwise(run, named, capsys):
    assert evaluate(run, named, "--cells") == 0
    assert evaluate(run, named) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert evaluate(run / "checkpoints" / "best.pt", named, "--overwrite") == 0
    assert not (run / "evaluation" / "cells.csv").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--channel_names", "Hoechst,CD3_e,Other"], "$CD20$"),
        (["--exclude_channels", ",".join(NAMES)], "--exclude_channels"),
        (["--positive_threshold", "Blank=0.3"], "Blank"),
        (["--cells", "--nuclear_marker", "DAPI"], "--nuclear_marker DAPI"),
        (["--device", "tpu"], "--device tpu"),
        (["--bootstrap", "-1"], "--bootstrap"),
        (["--pairs_dir", "nowhere"], "nowhere"),
        (["--checkpoint", "nowhere.pt"], "nowhere.pt"),
    ],
)
def test_bad_input_is_one_plain_message(run, named, words, said, capsys):
    before = sorted(run.rglob("*"))
    assert evaluate(run, named, *words) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert said in shown
    assert sorted(run.rglob("*")) == before


def test_a_folder_of_training_cores_has_nothing_held_out(run, named, tmp_path, capsys):
    (held_out,) = split_of(run)["val"]
    for path in named.glob(f"{held_out}_*"):
        path.unlink()
    assert evaluate(run, named) == 2
    assert "--split" in capsys.readouterr().err
    assert evaluate(run, named, "--split", "train") == 0


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc, where no folder can be made")
def test_a_place_that_cannot_be_written_is_a_failure_of_the_machine(run, named, tmp_path, capsys):
    assert evaluate(run, named, "--output_dir", "/proc/evaluation") == 1
    assert "/proc/evaluation: cannot be written" in capsys.readouterr().err


def test_a_checkpoint_without_a_readable_split_is_refused(run, named):
    model = replace(load_trained(run, "cpu"), split={"train": 3})
    with pytest.raises(InputError, match="split"):
        open_folder(model, named, FolderOptions())


@pytest.mark.parametrize("columns", [80, 140])
def test_the_command_fits_the_terminal(run, named, call, columns):
    words = [sys.executable, "-m", "orion_unet", "evaluate", "--checkpoint", run, "--pairs_dir", named]
    done = call(*words, "--split", "all", "--bootstrap", "50", "--cells", COLUMNS=columns, PYTHONPATH=ROOT)
    assert done.code == 0, done.err
    tables = [line for line in done.out.splitlines() if line.startswith(("marker", *NAMES, "overall"))]
    assert len(tables) == 2 * 5
    assert max(map(len, tables)) <= columns
    assert ("Spearman" in done.out) == (columns == 140)
    assert f"Written to {run / 'evaluation'}" in done.out.replace("\n", "")
