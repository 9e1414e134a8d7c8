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
from orion_unet.cli.predict import main as predict_main
from orion_unet.data.digests import core_digests
from orion_unet.data.patches import PatchPlace, PatchReader
from orion_unet.data.stain import StainProfile, measure_stain
from orion_unet.errors import InputError
from orion_unet.evaluation import evaluate as evaluation
from orion_unet.evaluation import files
from orion_unet.evaluation.baselines import find_baselines, fit_baselines
from orion_unet.evaluation.files import FILES
from orion_unet.evaluation.scored_folder import FolderOptions, open_folder
from orion_unet.inference.model import load_trained
from orion_unet.inference.predict import predict
from orion_unet.slides.images import ArrayImage

pytestmark = pytest.mark.slow

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
    run = train(pairs_dir=str(named), use_boundary_guidance=True, noise_removal=True).dir
    describe_training(run, named)
    return run


def edit_checkpoint(run, change):
    path = run / "checkpoints" / "best.pt"
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def forget_training(run):
    """Make the checkpoint one of version 0.1, which describes neither its cores nor its baselines."""
    edit_checkpoint(run, lambda content: [content.pop(key, None) for key in ("cores", "colour_regression")])


def describe_training(run, pairs):
    """Put into the checkpoint what it has to say of its cores and of its baselines."""
    forget_training(run)
    folder = open_folder(load_trained(run, "cpu"), pairs, FolderOptions())
    regression = fit_baselines(folder).regression
    digests = core_digests(folder.table, range(len(folder.table)))
    described = {"cores": {"digests": digests}, "colour_regression": regression.document()}
    edit_checkpoint(run, lambda content: content.update(described))


def write_new_core(pairs, name="new", source="core_00", **scaled):
    """A core with the pixels of another, upside down: other tissue, of the same kind."""
    for modality in ("HE", "ORION"):
        stored = np.load(pairs / f"{source}_{modality}.npy")[::-1]
        np.save(pairs / f"{name}_{modality}.npy", stored // scaled.get(modality, 1))


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


def one_line(capsys):
    """What was said on the terminal, without its line breaks."""
    return " ".join(capsys.readouterr().out.split())


def split_of(run):
    document = read_json(run / "split.json")
    return {side: [row["core"] for row in document[side]] for side in ("train", "val")}


def test_scores_equal_those_calculated_from_the_prediction_and_the_files(train, named):
    run = train(pairs_dir=str(named)).dir
    assert evaluate(run, named) == 0
    rows = read_csv(run / "evaluation" / "scores.csv")
    assert list(rows) == [*NAMES, "overall"]
    (core,) = split_of(run)["val"]
    predicted = predict(np.load(named / f"{core}_HE.npy"), load_trained(run, "cpu"), normalized=True)
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
    assert evaluate(run, named, "--split", "all", "--cells") == 0
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
        assert document["cells"]["markers"][name]["pearson"]["value"] is not None
    assert document["cells"]["count"] == 24
    assert "nan" not in "".join(path.read_text().lower() for path in folder.glob("*.csv"))
    with open(folder / "cores.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 4 * 4
    said = capsys.readouterr().out
    assert "3 of the 4 scored cores were trained on" in said


def test_a_scored_core_of_a_foreign_stain_is_named(run, named, capsys):
    def usual(content):
        he = np.load(sorted(named.glob("*_HE.npy"))[0])
        values = measure_stain(ArrayImage(Path("he"), lambda: he // 2))
        values = values + np.random.default_rng(0).normal(0, 0.02, (9, len(values)))
        content["stain"] = StainProfile(values, tuple("abcdefghi")).document()

    edit_checkpoint(run, usual)
    assert evaluate(run, named) == 0
    folder = run / "evaluation"
    assert "1 of the 1 scored cores have an H&E stain outside that of the training" in one_line(capsys)
    scores = read_json(folder / "scores.json")
    assert scores["cores"][0]["stain"] == "outside"
    assert scores["cores"][0]["stain_distance"] > scores["stain_limit"]
    assert {row["stain"] for row in read_csv(folder / "cores.csv").values()} == {"outside"}


def test_the_held_out_core_alone_is_scored_by_default_and_new_cores_with_it(run, named):
    write_new_core(named)
    assert evaluate(run, named) == 0
    document = read_json(run / "evaluation" / "scores.json")
    assert [row["core"] for row in document["cores"]] == [*split_of(run)["val"], "new"]
    assert "too few cores (2) for an interval" in document["intervals"]["missing_because"]
    assert document["overall"]["model"]["pearson"]["low"] is None


def test_a_new_core_of_a_trained_patient_is_not_held_out(run, named, capsys):
    known = split_of(run)
    write_new_core(named)
    rows = [f"{core},{core}" for core in known["val"]] + [f"{core},patient" for core in [*known["train"], "new"]]
    (named / "groups.csv").write_text("\n".join(["core,group", *rows]))
    # The run knew no groups: what the folder says now holds for the new core too.
    edit_checkpoint(run, lambda content: [row.update(group="patient") for row in content["split"]["train"]])
    assert evaluate(run, named) == 0
    assert [row["core"] for row in read_json(run / "evaluation" / "scores.json")["cores"]] == known["val"]
    assert "1 cores are new, but in groups with the names of groups that were trained on" in one_line(capsys)


def test_the_baselines_are_fitted_on_training_cores_alone(run, named):
    before = fit_baselines(open_folder(load_trained(run, "cpu"), named, FolderOptions()))
    (held_out,) = split_of(run)["val"]
    path = named / f"{held_out}_ORION.npy"
    np.save(path, 65535 - np.load(path))
    after = fit_baselines(open_folder(load_trained(run, "cpu"), named, FolderOptions()))
    assert (before.mean == after.mean).all()
    assert (before.regression.coefficients == after.regression.coefficients).all()
    path = named / f"{split_of(run)['train'][0]}_ORION.npy"
    np.save(path, 65535 - np.load(path))
    changed = fit_baselines(open_folder(load_trained(run, "cpu"), named, FolderOptions()))
    assert (before.mean != changed.mean).all()


@pytest.fixture
def elsewhere(run, named, tmp_path):
    """A folder with the held-out core alone."""
    (held_out,) = split_of(run)["val"]
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    for path in (*named.glob(f"{held_out}_*"), named / "channel_names.txt"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_a_folder_of_new_cores_alone_has_both_baselines_of_the_training(run, named, elsewhere, tmp_path, capsys):
    assert evaluate(run, named, "--output_dir", tmp_path / "all") == 0
    assert evaluate(run, elsewhere, "--output_dir", tmp_path / "alone") == 0
    both, alone = (read_json(tmp_path / name / "scores.json") for name in ("all", "alone"))
    assert set(alone["overall"]["baselines"]) == {"mean", "regression"}
    assert alone["overall"]["baselines"] == both["overall"]["baselines"]
    assert "of 3 training cores in training, kept in the checkpoint" in one_line(capsys)


def test_the_baselines_of_a_marker_are_those_of_its_name(run, named):
    folder = open_folder(load_trained(run, "cpu"), named, FolderOptions(exclude_channels="CD3_e"))
    fitted, kept = fit_baselines(folder), find_baselines(folder)
    assert kept.regression.names == folder.names == ("Hoechst", "$CD20$")
    assert kept.mean == pytest.approx(fitted.mean)
    assert kept.regression.coefficients == pytest.approx(fitted.regression.coefficients, abs=1e-6)


def test_without_baselines_in_the_checkpoint_and_training_cores_the_mean_alone_is_left(
    run, elsewhere, tmp_path, capsys
):
    forget_training(run)
    assert evaluate(run, elsewhere, "--cells", "--output_dir", tmp_path / "out") == 0
    document = read_json(tmp_path / "out" / "scores.json")
    assert set(document["overall"]["baselines"]) == {"mean"}
    assert document["cells"]["overall"]["f1"]["value"] is None
    assert document["cells"]["overall"]["auc"]["value"] is not None
    said = one_line(capsys)
    assert "there is no regression" in said
    assert "No F1" in said


def cores_of(run, pairs):
    """The cores of a folder by side, and their names in the training."""
    known = open_folder(load_trained(run, "cpu"), pairs, FolderOptions()).known
    return known.train.tolist(), known.val.tolist(), known.names


def test_cores_of_another_folder_with_the_same_names_are_other_cores(run, named, tmp_path, write_pairs, capsys):
    other = write_pairs("other", size=(80, 72), seed=7)
    (other / "channel_names.txt").write_bytes((named / "channel_names.txt").read_bytes())
    assert cores_of(run, other) == ([], [0, 1, 2, 3], (None,) * 4)
    assert evaluate(run, other) == 0
    document = read_json(run / "evaluation" / "scores.json")
    assert [row["split"] for row in document["cores"]] == ["val"] * 4
    assert document["matching"] == "0 of 4 cores are those of training, 4 share only their names and count as new"
    assert f"{document['matching']}." in one_line(capsys)
    kept = load_trained(run, "cpu").colour_regression
    assert find_baselines(open_folder(load_trained(run, "cpu"), other, FolderOptions())).mean.tolist() == [*kept.mean]


def test_cores_are_recognised_under_other_names_and_in_another_layout(run, named):
    train, val, names = cores_of(run, named)
    assert names == ("core_00", "core_01", "core_02", "core_03")
    for path in named.glob("core_00_*"):
        path.rename(path.with_name(path.name.replace("core_00", "z")))
    write_new_core(named, "core_00", "core_01")
    for path in named.glob("*_HE.npy"):
        np.save(path, np.load(path).transpose(2, 0, 1))
    known = open_folder(load_trained(run, "cpu"), named, FolderOptions(he_layout="chw")).known
    assert known.names == (None, "core_01", "core_02", "core_03", "core_00")
    sides = {0: 4, 1: 1, 2: 2, 3: 3}
    assert known.train.tolist() == sorted(sides[core] for core in train)
    assert known.val.tolist() == sorted([0, *(sides[core] for core in val)])
    assert known.groups == ("core_00", "core_01", "core_02", "core_03", "core_00")
    assert known.matching == (
        "4 of 5 cores are those of training (1 under another name), 1 shares only its name and counts as new"
    )


def test_a_copy_of_a_training_core_is_not_held_out(run, named):
    train, val, _ = cores_of(run, named)
    for name in ("HE", "ORION"):
        np.save(named / f"copy_{name}.npy", np.load(named / f"core_{train[0]:02d}_{name}.npy"))
    assert cores_of(run, named)[1] == [core + 1 for core in val]


def test_an_old_checkpoint_recognises_cores_by_name_and_says_so_once(run, named, write_pairs, capsys):
    forget_training(run)
    other = write_pairs("other", size=(80, 72), seed=7)
    (other / "channel_names.txt").write_bytes((named / "channel_names.txt").read_bytes())
    assert evaluate(run, other) == 0
    assert [row["core"] for row in read_json(run / "evaluation" / "scores.json")["cores"]] == split_of(run)["val"]
    assert one_line(capsys).count("recognised by name alone") == 1


@pytest.mark.parametrize("damage", [{"cores": 3}, {"cores": {"digests": [1]}}, {"colour_regression": {"mean": 1}}])
def test_a_checkpoint_whose_description_is_damaged_is_refused(run, named, damage, capsys):
    edit_checkpoint(run, lambda content: content.update(damage))
    assert evaluate(run, named) == 2
    assert "damaged" in capsys.readouterr().err


def test_a_namesake_is_not_normalised_by_the_core_whose_name_it_has(train, named, write_pairs):
    run = train(pairs_dir=str(named), target_normalization="core").dir
    describe_training(run, named)
    other = write_pairs("other", size=(80, 72), seed=7)
    (other / "channel_names.txt").write_bytes((named / "channel_names.txt").read_bytes())
    model = load_trained(run, "cpu")
    found = open_folder(model, other, FolderOptions()).normalization.per_core["core_00"]
    low, high = np.quantile(np.load(other / "core_00_ORION.npy")[..., 0] / 65535, [0.01, 0.999])
    assert found[:, 0] == pytest.approx([low, high])
    assert (found != model.normalization.per_core["core_00"]).any()


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


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_the_prediction_that_is_scored_is_the_one_that_predict_writes(train, named, store, tmp_path, dtype):
    run = train(pairs_dir=str(named), norm="group" if dtype == "uint16" else "batch").dir
    for path in named.glob("*_HE.npy"):
        store(path, np.load(path), dtype)
    folder = open_folder(load_trained(run, "cpu"), named, FolderOptions(exclude_channels="Hoechst"))
    region = folder.region(2)
    words = ["--checkpoint", run, "--input", named / "core_02_HE.npy", "--output_dir", tmp_path, "--normalized"]
    assert run_command(predict_main, [str(word) for word in [*words, "--no_overview"]]) == 0
    assert np.array_equal(region.predicted.numpy(), np.load(tmp_path / "core_02.npy")[1:])


def test_what_is_scored_is_what_validation_measures(train, named):
    run = train(pairs_dir=str(named), patch_size=16, noise_removal=True).dir
    folder = open_folder(load_trained(run, "cpu"), named, FolderOptions())
    region = folder.region(2)
    assert torch.allclose(region.he, torch.from_numpy(np.load(named / "core_02_HE.npy")).permute(2, 0, 1) / 255)
    reader = PatchReader(folder.table, folder.scales, 16)
    for y, x in ((0, 0), (64, 16), (32, 56)):
        target = folder.transform(reader.read([PatchPlace(2, y, x)]), augment=False).target[0]
        assert torch.equal(region.measured[:, y : y + 16, x : x + 16], target)


def test_the_patches_that_are_shown_are_pieces_of_the_scored_prediction(run, named, monkeypatch):
    shown = []
    monkeypatch.setattr(files, "draw_patches", lambda patches, names: shown.extend(patches) or b"")
    assert evaluate(run, named, "--split", "all") == 0
    folder = open_folder(load_trained(run, "cpu"), named, FolderOptions())
    assert [word for word, _ in shown] == ["best", "typical", "worst"]
    scores = []
    for _, patch in shown:
        whole = folder.region(folder.table.names.tolist().index(patch.core))
        for name in ("he", "measured", "predicted"):
            piece = getattr(whole, name)[:, patch.y : patch.y + 64, patch.x : patch.x + 64]
            assert torch.equal(getattr(patch.region, name), piece)
        pairs = zip(patch.region.predicted, patch.region.measured, strict=True)
        r = np.mean([pearsonr(p.flatten().double(), t.flatten().double()).statistic for p, t in pairs])
        assert patch.score == pytest.approx(r, abs=1e-6)
        scores.append(patch.score)
    assert scores == sorted(scores, reverse=True)


def test_cores_normalised_by_themselves_are_measured_where_they_are_new(train, named):
    run = train(pairs_dir=str(named), target_normalization="core").dir
    write_new_core(named, ORION=2)
    folder = open_folder(load_trained(run, "cpu"), named, FolderOptions())
    # Half as bright, normalised by itself: the same target as the core it was made from.
    assert folder.table.names[-1] == "new"
    made, new = folder.region(0).measured, folder.region(4).measured
    assert torch.allclose(made.flip(1), new, atol=2e-3)


def test_an_earlier_evaluation_is_kept_unless_told_otherwise(run, named, capsys):
    assert evaluate(run, named, "--cells") == 0
    assert evaluate(run, named) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert evaluate(run / "checkpoints" / "best.pt", named, "--overwrite") == 0
    assert not (run / "evaluation" / "cells.csv").exists()


@pytest.mark.parametrize("failing", ["draw_markers", "draw_patches", "write_json"])
def test_an_evaluation_that_fails_half_way_leaves_the_earlier_one_whole(run, named, failing, monkeypatch, capsys):
    folder = run / "evaluation"
    assert evaluate(run, named, "--cells") == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*words):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, failing, fail)
    assert evaluate(run, named, "--split", "all", "--overwrite") == 1
    assert "No space left on device" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_terminal_escapes_in_names_reach_the_tables_and_not_the_terminal(train, named, capsys):
    names = ["Hoechst", "\x1b[31mCD3\x1b]0;title\x07", "C\u202eD20"]
    (named / "channel_names.txt").write_text("\n".join(names), encoding="utf-8")
    run = train(pairs_dir=str(named)).dir
    describe_training(run, named)
    capsys.readouterr()
    assert evaluate(run, named, "--split", "all", "--cells", "--nuclear_marker", names[1]) == 0
    said = capsys.readouterr().out
    assert not set(said) & {"\x1b", "\x07", "\u202e"}
    assert "\\x1b[31mCD3" in said
    assert list(read_csv(run / "evaluation" / "scores.csv")) == [*names, "overall"]
    assert list(read_json(run / "evaluation" / "scores.json")["markers"]) == names


@pytest.mark.parametrize(
    ("module", "package", "words"),
    [
        ("scipy", "scipy", []),
        ("sklearn", "scikit-learn", []),
        ("skimage", "scikit-image", ["--cells"]),
        ("tifffile", "tifffile", ["--cells", "labels"]),
    ],
)
def test_a_missing_package_is_named_before_any_work(run, named, module, package, words, monkeypatch, tmp_path, capsys):
    def work(*words):
        raise AssertionError("the model was loaded")

    monkeypatch.chdir(tmp_path)
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "core_00_LABELS.tif").touch()
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(evaluation, "load_models", work)
    assert evaluate(run, named, *words) == 2
    assert f'the package {package} is needed for this: pip install "orion-unet[inference]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--channel_names", "Hoechst,CD3_e,Other"], "$CD20$"),
        (["--exclude_channels", ",".join(NAMES)], "--exclude_channels"),
        (["--positive_threshold", "Blank=0.3"], "Blank"),
        (["--cells", "--nuclear_marker", "DAPI"], "--nuclear_marker DAPI"),
        (["--device", "tpu"], "--device tpu"),
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
    done = call(*words, "--split", "all", "--cells", COLUMNS=columns, PYTHONPATH=ROOT)
    assert done.code == 0, done.err
    tables = [line for line in done.out.splitlines() if line.startswith(("marker", *NAMES, "overall"))]
    assert len(tables) == 2 * 5
    assert max(map(len, tables)) <= columns
    assert ("Spearman" in done.out) == (columns == 140)
    assert f"Written to {run / 'evaluation'}" in done.out.replace("\n", "")
