"""The stability benchmark: its quick form end to end, its measures against hand calculations, its code changes."""

import argparse
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 200


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    """The modules of the benchmark import each other by name."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def quick(output, *words):
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "stability.py"), "--quick", "--output_dir", str(output), *words],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )


@pytest.mark.slow
def test_the_quick_form_runs_end_to_end_repeats_nothing_and_reports_what_fails(tmp_path):
    words = ("--only", "former", "stable", "BasicUNet, MSE, Adam", "--seeds", "1", "--sets", "demo")
    archive = tmp_path / "archive.jsonl.gz"
    done = quick(tmp_path, *words, "--archive", str(archive))
    # A recipe that fails is reported, and the others go on.
    missing = importlib.util.find_spec("monai") is None
    assert done.returncode == (1 if missing else 0), done.stderr
    assert ("- BasicUNet, MSE, Adam (demo): ModuleNotFoundError: No module named 'monai'" in done.stdout) == missing
    for recipe in ("former", "stable", "*regression from colours*"):
        assert f"| {recipe} |" in done.stdout
    assert done.stdout.strip() == (tmp_path / "stability.md").read_text(encoding="utf-8").strip()
    # No ablation was trained.
    assert not (tmp_path / "stability_ablation.png").exists()
    for name in ("curves", "markers"):
        assert (tmp_path / f"stability_{name}.png").stat().st_size > 5000
    results = {path: path.read_bytes() for path in tmp_path.glob("*/*/seed_0/result.json")}
    assert len(results) == (2 if missing else 3)
    assert {len(json.loads(content)["epochs"]) for content in results.values()} == {2}

    # Only the training whose result was deleted runs again; the other results stay as they were.
    lost = next(iter(results))
    lost.unlink()
    again = quick(tmp_path, *words)
    assert f"{2 if missing else 1} of 3 trainings" in again.stderr
    assert lost.exists()
    assert all(path.read_bytes() == content for path, content in results.items() if path != lost)

    # Another folder takes the trainings from the archive, and leaves its bytes as they are.
    packed = archive.read_bytes()
    other = quick(tmp_path / "other", *words, "--archive", str(archive), "--report")
    tables = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert tables and [line for line in other.stdout.splitlines() if line.startswith("| ")] == tables
    assert archive.read_bytes() == packed


def test_a_file_that_is_no_archive_is_refused(tmp_path):
    (tmp_path / "wrong.jsonl.gz").write_text("{}")
    done = quick(tmp_path, "--archive", str(tmp_path / "wrong.jsonl.gz"))
    assert done.returncode == 2
    assert f"--archive {tmp_path}/wrong.jsonl.gz: is no archive of this benchmark" in done.stderr


def test_an_unknown_recipe_is_refused(tmp_path):
    done = quick(tmp_path, "--only", "stabel")
    assert done.returncode == 2
    assert "--only stabel: no such recipe; the recipes are former, published" in done.stderr


@pytest.mark.parametrize("name", ["demo", "demo few patches", "a,b", "a/b"])
def test_a_name_of_the_real_pairs_that_would_be_ambiguous_is_refused(tmp_path, name):
    done = quick(tmp_path, "--real_pairs", str(tmp_path), "--real_names", name)
    assert done.returncode == 2
    assert f"--real_names {name}: use letters" in done.stderr


@pytest.fixture
def undrawn(monkeypatch):
    """Generated sets without their pixels."""
    import stability_recipes

    names = partial(map, "core_{:03d}".format)
    monkeypatch.setattr(stability_recipes, "make_demo", lambda folder, cores, size, seed: list(names(range(cores))))


def real_pairs(folder, groups, cores_of_group):
    folder.mkdir()
    names = [f"{group}{core}" for group in groups for core in range(cores_of_group)]
    (folder / "groups.csv").write_text("\n".join(["core,group", *(f"{name},{name[0]}" for name in names)]))
    (folder / "channel_names.txt").write_text("DAPI\n")
    for name in names:
        for kind in ("HE", "ORION"):
            (folder / f"{name}_{kind}.npy").touch()
    return folder


def test_the_cores_that_score_choose_nothing_and_a_group_is_in_one_part_only(tmp_path, undrawn):
    from stability_recipes import demo_sets, real_sets

    many = real_pairs(tmp_path / "many", "abcdefghijk", 5)
    (tmp_path / "data").mkdir()
    (places,) = real_sets(many, tmp_path / "data", "places", True)
    for seed in range(5):
        parts = places.parts(seed)
        groups = [{name[0] for name in names} for names in (parts.train, parts.chosen, parts.scored)]
        assert [len(some) for some in groups] == [5, 2, 4]
        assert len(set.union(*groups)) == 11
        split = json.loads(places.split_file(tmp_path / "data", seed, 0.2).read_text())
        assert {row["core"] for side in ("train", "val") for row in split[side]} == {*parts.train, *parts.chosen}
    assert len({places.parts(seed).scored for seed in range(5)}) > 1

    for each in demo_sets(tmp_path / "data"):
        parts = each.parts(0)
        # Two cores of a patient follow each other.
        patients = [
            {int(name[-3:]) // 2 for name in names} for names in (parts.train + parts.wider, parts.chosen, parts.scored)
        ]
        assert sum(map(len, patients)) == len(set.union(*patients)) == 20


def test_of_two_slides_one_trains_and_the_other_chooses_and_scores(tmp_path):
    from stability_recipes import FURTHER, real_sets

    (tmp_path / "data").mkdir()
    sets = real_sets(real_pairs(tmp_path / "two", "ab", 4), tmp_path / "data", "two", False)
    assert [each.name for each in sets] == ["two, a held out", "two, b held out"]
    parts = sets[0].parts(3)
    assert (parts.train, parts.chosen, parts.scored) == (("b0", "b1", "b2", "b3"), ("a0", "a2"), ("a1", "a3"))
    assert sets[0].groups == FURTHER


def test_a_recipe_that_changes_only_a_split_that_the_set_does_not_follow_is_trained_once(tmp_path, undrawn):
    import stability
    from stability_recipes import demo_sets, recipes

    (tmp_path / "data").mkdir()
    options = argparse.Namespace(seeds=1, output_dir=tmp_path, quick=False)
    wanted = [recipe for recipe in recipes() if recipe.name in ("former", "former, a fifth held out", "stable",
                                                                "stable, a quarter held out")]  # fmt: skip
    jobs = list(stability.plan(demo_sets(tmp_path / "data")[:1], wanted, options))
    assert {job.recipe.name for job in jobs} == {"former", "stable", "stable, a quarter held out"}
    parts = {job.recipe.name: json.loads(Path(job.content["options"]["split_file"]).read_text()) for job in jobs}
    assert len(parts["stable, a quarter held out"]["val"]) > len(parts["stable"]["val"])


def test_a_coarse_view_sees_what_lies_around_the_middle_that_it_predicts():
    from stability_networks import CoarseView

    from orion_unet.models.unet import SpatialUNet

    torch.manual_seed(0)
    network = CoarseView(3, 4, 2, norm="batch")
    he = torch.rand(2, 3, 128, 128, requires_grad=True)
    found = network.train()(he)
    assert found.shape == (2, 3, 64, 64)
    # One pixel in the middle, whose fine view ends long before the border of the patch.
    (gradient,) = torch.autograd.grad(network.eval()(he)[0, 0, 64, 64], he)
    reached = gradient[0].abs().sum(0).nonzero()
    plain = SpatialUNet(3, 4, 2).eval()
    (gradient,) = torch.autograd.grad(plain(he)[0, 0, 64, 64], he)
    fine = gradient[0].abs().sum(0).nonzero()
    assert network(he).shape == (2, 3, 128, 128)
    assert (reached.amin(0) < fine.amin(0) - 8).all() and (reached.amax(0) > fine.amax(0) + 8).all()


@pytest.mark.parametrize("name", ["BasicUNet", "DynUNet", "pix2pix"])
@pytest.mark.parametrize("size", [(64, 64), (80, 100)])
def test_a_peers_network_predicts_every_marker_at_full_resolution_and_learns(name, size):
    from stability_networks import BasicUNet, DynUNet, Pix2Pix

    if name != "pix2pix":
        pytest.importorskip("monai")
    torch.manual_seed(0)
    network = {"BasicUNet": BasicUNet, "DynUNet": DynUNet, "pix2pix": Pix2Pix}[name](3, 4)
    found = network(torch.rand(2, 3, *size))
    assert found.shape == (2, 3, *size)
    found.square().mean().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_the_benchmark_trains_the_recipes_of_the_toolkit():
    from stability_recipes import PUBLISHED, recipes

    from orion_unet.recipes import RECIPES

    known = {recipe.name: recipe for recipe in recipes()}
    for name in ("former", "published", "stable"):
        assert {**PUBLISHED, **known[name].options} == RECIPES[name].values


def test_former_differs_from_published_by_every_single_change_and_each_ablation_lacks_one():
    from stability_recipes import FORMER_CHANGES, PUBLISHED, recipes

    known = {recipe.name: recipe for recipe in recipes()}
    former = known["former"]
    assert all(PUBLISHED.get(name) != value for name, value in former.options.items())
    for name, change in FORMER_CHANGES.items():
        ablation = known[f"former, {name}"]
        lacking = former.options.keys() - ablation.options.keys()
        assert lacking == change.keys() - {"changes"}
        assert all(former.options[key] == value for key, value in ablation.options.items())


def result_of(train, val, error):
    epochs = [
        {"epoch": place + 1, "train": a, "val": b, "val_mse": c}
        for place, (a, b, c) in enumerate(zip(train, val, error, strict=True))
    ]
    return {"epochs": epochs, "scores": {"mse": [0.1, 0.3], "pearson": [0.5, None], "pearson_boxes": [0.6, None]}}


def test_measures_agree_with_a_hand_calculation():
    from stability_report import measures

    # Validation falls by 0.01 per epoch and alternates by ±0.002 about that line.
    val = [0.5 - 0.01 * epoch + 0.002 * (-1) ** epoch for epoch in range(20)]
    train = [0.4 - 0.01 * epoch for epoch in range(20)]
    found = measures(result_of(train, val, [0.3] * 4 + [0.1] * 16), level=0.2)
    assert found["movement"] == pytest.approx(0.09 + 0.004)
    assert found["improvement"] == pytest.approx(0.19)
    assert found["relative improvement"] == pytest.approx(0.19 / 0.4)
    assert found["gap"] == pytest.approx(0.1 - 0.002)
    assert found["relative gap"] == pytest.approx((0.1 - 0.002) / val[-1])
    assert found["best loss"] == pytest.approx(val[-1])
    assert found["epochs to level"] == 5
    assert found["mse"] == pytest.approx(0.2)
    assert found["pearson"] == 0.5
    time = np.arange(10)
    residual = np.array(val[-10:]) - np.poly1d(np.polyfit(time, val[-10:], 1))(time)
    assert found["noise"] == pytest.approx(math.sqrt((residual**2).sum() / 8))
    assert math.isinf(measures(result_of(train, val, [0.3] * 20), level=0.2)["epochs to level"])


def test_an_undefined_loss_leaves_its_measures_undefined():
    from stability_report import measures

    found = measures({"epochs": [{"epoch": 1, "train": None, "val": None, "val_mse": None}]}, level=0.2)
    assert math.isnan(found["improvement"]) and math.isnan(found["mse"])
    assert math.isnan(measures({"epochs": []}, level=0.2)["movement"])


def test_slides_held_out_in_turn_are_averaged_and_their_warnings_counted():
    from stability_report import MEASURES, epochs, over_slides, spread

    first, second = ({**dict.fromkeys(MEASURES, value), "warnings": warnings}
                     for value, warnings in ((0.2, 3.0), (0.4, 0.0)))  # fmt: skip
    found = over_slides([first, second])
    assert found["pearson"] == pytest.approx(0.3) and found["movement"] == pytest.approx(0.3)
    assert (found["warnings"], found["trainings"]) == (1, 2)
    assert math.isnan(over_slides([first, second | {"warnings": math.nan}])["warnings"])
    rows = [{"mse": 0.1, "epochs to level": 4.0}, {"mse": 0.3, "epochs to level": math.inf}]
    assert (spread(rows, "mse"), epochs(rows)) == ("0.200 (0.100 to 0.300)", "4")
    rows.append({"mse": math.nan, "epochs to level": math.inf})
    assert (spread(rows, "mse"), epochs(rows)) == ("0.200 (0.100 to 0.300) of 2", "never")


def test_rises_and_falls_are_measured_from_the_best_epoch_so_far():
    from stability_report import largest_fall, largest_rise, lowest, worst

    # The lowest V is 0.2 when it rises to 0.5; the best r2 is 0.6 when it falls to -0.3, and epoch 1 does not count.
    assert largest_rise(np.array([0.4, 0.2, 0.3, 0.5, 0.1])) == pytest.approx(2.5)
    r2 = np.array([-5.0, 0.1, 0.6, 0.2, -0.3, 0.7])
    assert (largest_fall(r2), lowest(r2)) == (pytest.approx(0.9), -0.3)
    assert (largest_rise(np.array([0.4, 0.2])), largest_fall(r2[:3])) == (1.0, 0.0)
    assert math.isnan(largest_fall(np.array([0.1, math.nan, 0.2])))
    rows = [{"largest rise": 1.1, "largest fall": 0.3, "lowest r2": -0.2},
            {"largest rise": 1.2, "largest fall": 0.1, "lowest r2": -0.9}]  # fmt: skip
    assert worst(rows) == {"largest rise": 1.2, "largest fall": 0.3, "lowest r2": -0.9}
    assert math.isnan(worst([rows[0], {**rows[1], "largest rise": math.nan}])["largest rise"])


@pytest.mark.parametrize(
    ("rise", "least", "stable", "bare"),
    [(1.3, -0.9, "yes", "yes"), (1.31, -0.9, "no", "yes"), (1.0, -1.0, "no", "no"), (math.nan, 0.1, "no", "yes")],
)
def test_one_bad_training_breaks_the_promise(rise, least, stable, bare):
    from stability_recipes import recipes
    from stability_report import promise_table

    good = {"largest rise": 1.0, "largest fall": 0.0, "lowest r2": 0.5, "trainings": 1.0}
    rows = [good, {**good, "largest rise": rise, "lowest r2": least}]
    found = {("demo", name): rows for name in ("former", "stable", "constant rate 1e-2, measured statistics")}
    table = [line.split(" | ") for line in promise_table(["demo", "other"], recipes(), found)[4:-1]]
    assert {(row[1], row[2], row[-1].strip("| ")) for row in table} == {
        ("former", "2", ""), ("stable", "2", stable), ("constant rate 1e-2, measured statistics", "2", bare),
    }  # fmt: skip


def scored(seed, error, raw, held_out="a"):
    """A result of ``stable`` on one of two slides: two markers and an empty one; the mean's errors are 0.2 and 0.1."""
    scores = {"names": ["CD3", "CD20", "Blank"], "pearson": [0.5, 0.3, None], "pearson_boxes": [0.6, 0.4, None]}
    baseline = {**scores, "mse": [0.2, 0.1, 0.0]}
    return {
        "set": f"two, {held_out} held out", "recipe": "stable", "job": {"options": {"seed": seed}}, "epochs": [],
        "scores": {**scores, "mse": error}, "raw_scores": {**scores, "mse": raw}, "level": [0.1],
        "baselines": {"training mean": baseline, "regression from colours": baseline},
    }  # fmt: skip


def test_the_level_of_the_markers_is_compared_with_the_training_mean():
    from stability_report import baselines, below_mean, level_table

    results = [
        scored(seed, [0.1, 0.05, 0.0], [0.1 + 0.2 * seed, 0.11, 0.1], slide) for seed in (0, 1) for slide in "ab"
    ]
    assert below_mean(results[0]["raw_scores"], results[0]["baselines"]["training mean"]) == ["CD20"]
    assert below_mean(results[2]["raw_scores"], results[2]["baselines"]["training mean"]) == ["CD3", "CD20"]
    after, before = level_table(results)[-3:-1]
    assert after == "| recalibrated | 0.05000 | 0.400 | 0 of 3 (0 to 0) |"
    # Of the seeds' means, 0.31 / 3 and 0.51 / 3, the median.
    assert before == "| as the network gives them | 0.13667 | 0.400 | 1.5 of 3 (1 to 2): CD20, CD3 |"
    assert level_table([{**results[0], "recipe": "former"}]) == []
    found = baselines(results, ["two, a held out", "two, b held out"])
    assert found["training mean"] == pytest.approx({"mse": 0.1, "pearson": 0.4, "pearson_boxes": 0.5})


def transformed(write_pairs, change, augment=True):
    from orion_unet.config import DataOptions
    from orion_unet.data.normalization import fit_normalization
    from orion_unet.data.pairs import find_pairs
    from orion_unet.data.patches import PatchPlace, PatchReader
    from orion_unet.data.scale import measure_scales
    from orion_unet.data.transforms import BatchTransform

    change()
    table = find_pairs(DataOptions(pairs_dir=str(write_pairs()), patch_size=16))
    scales = measure_scales(table, False)
    reader = PatchReader(table, scales, 16)
    normalization = fit_normalization(table, scales, np.arange(len(table)), "dataset", "linear")
    transform = BatchTransform(table, reader.formats, normalization, False, torch.device("cpu"))
    plain, turned = (
        reader.read([PatchPlace(0, 0, 0, flips, (0.0,) * 8)]) for flips in ((False,) * 3, (True, False, True))
    )
    return transform(plain, augment), transform(turned, augment)


@pytest.fixture
def changed(monkeypatch):
    """The changes of code, undone after the test."""
    import stability_job

    from orion_unet.data.transforms import BatchTransform
    from orion_unet.losses import CompositeLoss

    for owner, name in ((BatchTransform, "_channels_first"), (BatchTransform, "__call__"), (CompositeLoss, "forward")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    return stability_job.CHANGES


def test_geometry_of_the_he_alone_does_not_move_the_markers(write_pairs, changed):
    plain, turned = transformed(write_pairs, changed["geometry of the H&E alone"])
    assert torch.equal(plain.target, turned.target)
    torch.testing.assert_close(turned.he, plain.he.flip(-2).transpose(-1, -2))
    assert not torch.equal(turned.he, plain.he)


def test_training_patches_are_normalised_one_by_one(write_pairs, changed):
    trained, _ = transformed(write_pairs, changed["normalisation of each patch"])
    assert torch.equal(trained.target.amin((2, 3)), torch.zeros(1, trained.target.shape[1]))
    assert trained.target.amax((2, 3)).numpy() == pytest.approx(1.0)


def test_validation_is_not_normalised_patch_by_patch(write_pairs, changed):
    validated, _ = transformed(write_pairs, changed["normalisation of each patch"], augment=False)
    assert (validated.target.amin((2, 3)) > 0).any() or (validated.target.amax((2, 3)) < 1).any()


def test_the_loss_in_the_centre_sees_144_pixels(changed):
    from orion_unet.losses import CompositeLoss
    from orion_unet.patch_sums import patch_sums

    changed["loss in the centre"]()
    prediction, target = torch.zeros(1, 2, 64, 64), torch.zeros(1, 2, 64, 64)
    prediction[..., 26:38, 26:38] = 0.5
    criterion = CompositeLoss({"mse": 1.0})
    assert criterion(prediction, target)[0].item() == pytest.approx(0.25)
    prediction[..., 25, :] = prediction[..., :, 38] = 1.0
    assert criterion(prediction, target)[0].item() == pytest.approx(0.25)
    assert criterion.sums(patch_sums(prediction, target))[1][0].item() == 2 * 64 * 64


def tables(path):
    """Every table of a Markdown file: the heading above it, its columns, and its rows as dicts of cells."""
    heading, header, found = "", None, []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else None
        if cells is None:
            header = None
        elif header is None:
            header = cells
            found.append((heading, header, []))
        elif set(line) - set("|- :"):
            found[-1][2].append(dict(zip(header, cells, strict=False)))
    return found


def measured_rows(name):
    """The rows of a results page, by the kind of set in brackets at the end of their heading, and by recipe."""
    return {
        (heading.rpartition("(")[2].partition(",")[0], row[header[0]].strip("*")): row
        for heading, header, rows in tables(ROOT / "benchmarks" / "results" / name)
        for row in rows
    }


def test_the_document_repeats_the_results_of_the_benchmark():
    """A table of TRAINING_IMPROVEMENTS.md that is headed by a kind of set repeats cells of a results page."""
    recipes, changes = measured_rows("stability.md"), measured_rows("single_changes.md")
    compared = {"stability": 0, "single changes": 0}
    for _, header, rows in tables(ROOT / "TRAINING_IMPROVEMENTS.md"):
        kind, _, part = header[0].partition(", ")
        measured = changes if part == "single changes" else recipes
        if kind in {known for known, _ in measured}:
            for row in rows:
                found = measured[kind, row[header[0]].strip("*")]
                assert {name: row[name] for name in header[1:]} == {name: found[name] for name in header[1:]}
                compared[part or "stability"] += 1
    assert compared["stability"] >= 18 and compared["single changes"] >= 8


def test_the_readme_repeats_the_correlations_of_the_benchmark():
    measured, compared = measured_rows("stability.md"), 0
    for _, header, rows in tables(ROOT / "README.md"):
        kinds = [re.search(r"\((demo|he_mif|Ki67 IHC registered)\)", column) for column in header]
        if any(kinds):
            for row in rows:
                for column, kind in zip(header[1:], kinds[1:], strict=True):
                    found = measured[kind[1], row[header[0]].strip("*`")]["Pearson"]
                    assert row[column].strip("*") == f"{float(found.split()[0]):.2f}", (row[header[0]], column)
                    compared += 1
    assert compared >= 12
    (promised,) = (rows for heading, _, rows in tables(ROOT / "benchmarks" / "results" / "stability.md")
                   if heading.startswith("All epochs"))  # fmt: skip
    stable = [row for row in promised if row["recipe"] == "stable"]
    trainings, sets = sum(int(row["trainings"]) for row in stable), len(stable)
    rise = max(float(row["largest rise of V"]) for row in stable)
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    words = {5: "five"}[sets]
    assert f"In all {trainings} trainings of `stable`, on {words} sets" in text
    assert f"the validation loss never rose above {rise:.2f} times" in text
    assert "worse than predicting each marker's mean by more than a third" in text
    assert min(float(row["lowest r2 after epoch 1"]) for row in stable) > -1 / 3


def test_every_page_with_numbers_of_real_pairs_names_their_stain():
    results = sorted((ROOT / "benchmarks" / "results").glob("*.md"))
    pages = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), *results]
    texts = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in pages}
    real = {name: text for name, text in texts.items() if re.search("real[ _]([^ ]+ )?pairs", text)}
    assert {"README.md", "TRAINING_IMPROVEMENTS.md", "benchmarks/results/registration.md"} <= real.keys()
    unnamed = [name for name, text in real.items() if not re.search(r"Ki67\s+(IHC|immunohisto)|real H&E", text)]
    assert unnamed == []


def test_the_results_name_the_recipes_and_groups_of_the_benchmark():
    from stability_recipes import recipes
    from stability_report import BASELINES, GROUPS, LEVEL, PROMISED

    known = {recipe.name for recipe in recipes()} | set(BASELINES)
    groups = 0
    for heading, header, rows in tables(ROOT / "benchmarks" / "results" / "stability.md"):
        if heading not in (LEVEL, PROMISED):
            assert heading.rpartition(" (")[0] in GROUPS.values()
            assert {re.sub(r", \d seeds?$| \(\d of \d\)$", "", row[header[0]].strip("*")) for row in rows} <= known
            groups += 1
    assert groups >= 15
