"""Commands on a folder whose cores have different panels: train, resume, check-data, evaluate, crossval, refusals."""

import csv
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from panel_files import write_panels
from scipy.stats import pearsonr
from tiny_runs import TINY, command_line, differing, losses, read_metrics, weights

from orion_unet.__main__ import dispatch
from orion_unet.cli.arguments import run_command
from orion_unet.command_options import DeviceOptions
from orion_unet.errors import InputError
from orion_unet.evaluation.crossval import score_folds
from orion_unet.evaluation.scored_folder import FolderOptions, open_folder
from orion_unet.inference.model import load_trained
from orion_unet.training.loop import Loop

pytestmark = pytest.mark.slow

UNION = ("Hoechst", "CD3", "CD20", "SMA")
PANELS = {"one": ("CD20", "Hoechst", "CD3"), "two": ("SMA", "Hoechst")}
OF_CORE = ("one", "two") * 3
TERMS = {"mse_weight": 0.8, "boundary_weight": 0.2, "variance_weight": 0.1, "correlation_weight": 0.2}


@pytest.fixture
def folder(write_pairs):
    """Six cores, every second with another panel; markers follow the H&E, each in its own way."""
    pairs = write_pairs("two_panels", cores=6, size=(80, 72), channels=4)
    for core, panel in enumerate(OF_CORE):
        he, path = (pairs / f"core_{core:02d}_{kind}.npy" for kind in ("HE", "ORION"))
        stored = (np.load(path) // 8 + 100 * np.load(he)[..., [0, 1, 2, 0]].astype(np.uint16)).astype(np.uint16)
        np.save(path, stored[..., [UNION.index(name) for name in PANELS[panel]]])
    write_panels(pairs, PANELS, OF_CORE)
    (pairs / "channel_names.txt").write_text("\n".join(UNION))
    return pairs


def split_file(pairs, val):
    sides = {"train": [core for core in range(6) if core not in val], "val": val}
    rows = {side: [{"core": f"core_{c:02d}", "group": f"core_{c:02d}"} for c in cores] for side, cores in sides.items()}
    path = pairs.with_name("split.json")
    path.write_text(json.dumps({"schema": 1, **rows}))
    return str(path)


def strict(path):
    return json.loads(Path(path).read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def test_a_folder_with_two_panels_trains_one_model_that_evaluate_scores_marker_by_marker(folder, tmp_path):
    options = {
        **TINY,
        **TERMS,
        "pairs_dir": folder,
        "output_dir": tmp_path / "run",
        "epochs": 1,
        "sanity_check_freq": 1,
    }
    words = command_line({**options, "split_file": split_file(folder, [4, 5])})
    assert run_command(dispatch, ["train", "--recipe", "none", *words]) == 0
    last = read_metrics(tmp_path / "run")[-1]["val"]
    assert tuple(last["per_channel"]) == UNION
    assert all(values["pearson"] is not None for values in last["per_channel"].values())
    config = strict(tmp_path / "run" / "config.json")
    assert config["panels"]["of"] == {
        panel: {"markers": list(markers), "cores": 3} for panel, markers in PANELS.items()
    }
    assert config["unvalidated_channels"] == []
    assert (tmp_path / "run" / "sanity" / "epoch_0001.png").exists()

    words = ["--checkpoint", tmp_path / "run", "--pairs_dir", folder, "--output_dir", tmp_path / "scores"]
    assert run_command(dispatch, ["evaluate", *map(str, words)]) == 0
    scores = strict(tmp_path / "scores" / "scores.json")
    scored = open_folder(load_trained(tmp_path / "run", "cpu"), folder, FolderOptions())
    regions = {core: scored.region(core) for core in (4, 5)}
    for marker, name in enumerate(UNION):
        own = [region for core, region in regions.items() if name in PANELS[OF_CORE[core]]]
        assert scores["markers"][name]["cores"] == len(own)
        images = (np.concatenate([getattr(r, kind)[marker].ravel().numpy() for r in own]).astype(float)
                  for kind in ("predicted", "measured"))  # fmt: skip
        expected = pearsonr(*images).statistic
        assert scores["markers"][name]["model"]["pearson"]["value"] == pytest.approx(expected, abs=2e-5)
        assert np.isfinite(scores["markers"][name]["model"]["spearman"]["value"])
    with open(tmp_path / "scores" / "cores.csv", newline="") as file:
        empty = {(row["core"], row["marker"]) for row in csv.DictReader(file) if not row["mae"]}
    assert empty == {("core_04", "SMA"), ("core_05", "CD3"), ("core_05", "CD20")}


def test_a_run_stopped_within_an_epoch_goes_on_bit_for_bit_and_not_with_other_panels(folder, train, monkeypatch):
    options = {**TERMS, "pairs_dir": str(folder), "split_file": split_file(folder, [4, 5]), "accumulate_steps": 2}
    straight = train("straight", **options)
    progress = Loop._progress

    def stop(self, **fields):
        progress(self, **fields)
        if (self.state.epoch + 1, fields.get("step")) == (2, 4):
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Loop, "_progress", stop)
        assert train("run", **options).code == 143
    write_panels(folder, {"two": ("Hoechst", "SMA")}, OF_CORE)
    with pytest.raises(InputError, match=r"panels.csv: says of the cores of the run to resume"):
        train("run", **options, resume="auto")
    write_panels(folder, PANELS, OF_CORE)
    run = train("run", **options, resume="auto")
    assert losses(run.dir) == losses(straight.dir)
    assert differing(weights(run.dir), weights(straight.dir)) == []


def test_where_every_core_has_every_marker_panels_change_no_bit(pairs, train):
    plain = train("plain", **TERMS, epochs=1)
    write_panels(pairs, {"all": [f"channel_{index:02d}" for index in range(3)]}, ["all"] * 4)
    listed = train("listed", **TERMS, epochs=1)
    assert losses(listed.dir) == losses(plain.dir)
    assert differing(weights(listed.dir), weights(plain.dir)) == []


def test_folds_of_two_panels_are_scored_together(folder, train, tmp_path):
    rows = [f"core_{core:02d},patient_{core // 2}" for core in range(6)]
    (folder / "groups.csv").write_text("\n".join(["core,group", *rows]))
    runs = [train(f"cv/fold_{k}", epochs=1, fold=f"{k}/3", pairs_dir=str(folder)).dir for k in (1, 2, 3)]
    said = []
    score_folds(runs, tmp_path / "cv", DeviceOptions(device="cpu"), said.append)
    document = strict(tmp_path / "cv" / "crossval.json")
    assert tuple(document["markers"]) == UNION
    assert all(found["model"]["mae"]["value"] > 0 for found in document["markers"].values())
    # Each core once, each in the fold that held it out.
    assert sorted(core for fold in document["folds"] for core in fold["cores"]) == [f"core_{c:02d}" for c in range(6)]


def test_a_fold_without_a_training_core_for_a_marker_is_refused_before_any_fold_is_trained(folder, tmp_path, capsys):
    (folder / "groups.csv").write_text("core,group\n" + "".join(f"core_{c:02d},{'xy'[c % 2]}\n" for c in range(6)))
    own = ["--folds", "2", "--output_dir", str(tmp_path / "cv"), "--", "--recipe", "none"]
    assert run_command(dispatch, ["crossval", *own, *command_line({**TINY, "pairs_dir": folder})]) == 2
    assert "--fold 1/2: " in (shown := capsys.readouterr().err) and "measured in no training core" in shown
    assert not (tmp_path / "cv").exists()


def test_check_data_lists_the_panels_and_takes_no_missing_marker_for_a_constant_one(folder, capsys):
    (folder / "groups.csv").write_text("core,group\n" + "".join(f"core_{c:02d},{'xy'[c % 2]}\n" for c in range(6)))
    assert run_command(dispatch, ["check-data", str(folder), "--patch_size", "64", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["panels"]["two"] == {"markers": list(PANELS["two"]), "cores": 3}
    assert [row["channel"] for row in found["channels"]] == list(UNION)
    own = np.concatenate([np.load(folder / f"core_{c:02d}_ORION.npy")[..., 0].ravel() for c in (1, 3, 5)]) / 65535
    sma = next(row for row in found["channels"] if row["channel"] == "SMA")
    assert sma["min"] >= own.min() * (1 - 1e-6) > 0
    assert sma["mean"] == pytest.approx(own.mean(), rel=0.02)
    warnings = {warning["code"]: warning["message"] for warning in found["warnings"]}
    assert "missing_in_core" not in warnings
    assert "CD3 (x), CD20 (x), SMA (y)" in warnings["marker_in_one_group"]
    assert any(note.startswith("panel one, 3 cores: CD20, Hoechst, CD3") for note in found["notes"])


@pytest.mark.parametrize(
    ("val", "change", "words"),
    [
        ([4, 5], lambda f: (f / "panels.csv").open("a").write("\nghost,one"), "ghost: is not among the pairs"),
        ([4, 5], lambda f: (f / "panel_two.txt").write_text("SMA\nHoechst\nCD3"), "names 3 markers"),
        ([4, 5], lambda f: (f / "channel_names.txt").write_text("\n".join([*UNION, "Ki67"])), "no panel measures it"),
        ([1, 3, 5], lambda f: None, "measured in no training core, so that nothing can be learned of it: SMA"),
    ],
)
def test_bad_panels_are_one_message_with_exit_code_2_and_nothing_is_written(
    folder, tmp_path, capsys, val, change, words
):
    split = split_file(folder, val)
    change(folder)
    options = {**TINY, "pairs_dir": folder, "output_dir": tmp_path / "run", "split_file": split}
    assert run_command(dispatch, ["train", "--recipe", "none", *command_line(options)]) == 2
    shown = capsys.readouterr().err
    assert words in shown and "Traceback" not in shown
    assert not (tmp_path / "run").exists()


def test_register_refuses_cores_without_the_nuclear_marker_by_name(folder, tmp_path, capsys):
    words = ["register", str(folder), "--output_dir", str(tmp_path / "fixed"), "--register_on", "CD3"]
    assert run_command(dispatch, words) == 2
    assert "CD3 was not measured in these cores" in (shown := capsys.readouterr().err)
    assert all(f"core_{core:02d}" in shown for core in (1, 3, 5))
    assert not (tmp_path / "fixed").exists()
