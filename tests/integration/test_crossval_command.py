"""crossval: trainings of its own, continued after an end of any kind, and scored together."""

import csv
import json
import signal
import sys

import numpy as np
import pytest
from scipy.stats import pearsonr
from tiny_runs import TINY, command_line, read_metrics, read_status, wait_for

from orion_unet.cli.arguments import run_command
from orion_unet.cli.crossval import main
from orion_unet.command_options import DeviceOptions
from orion_unet.evaluation.crossval import score_folds
from orion_unet.evaluation.scored_folder import FolderOptions, open_folder
from orion_unet.inference.model import load_trained

pytestmark = pytest.mark.slow


def words(pairs, output, *own, folds=2, **options):
    trainer = command_line({**TINY, "epochs": 1, "pairs_dir": str(pairs), **options})
    return ["--folds", str(folds), "--output_dir", str(output), *own, "--", "--recipe", "none", *trainer]


def command(pairs, output, *own, **options):
    return [sys.executable, "-m", "orion_unet", "crossval", *words(pairs, output, *own, **options)]


def strict(path):
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


@pytest.fixture
def folds(train, tmp_path):
    """Both folds of four cores, trained in this process."""
    return [train(f"cv/fold_{number}", epochs=1, fold=f"{number}/2").dir for number in (1, 2)]


def test_folds_are_scored_together_as_calculated_from_each_ones_held_out_cores(folds, pairs, tmp_path):
    said = []
    score_folds(folds, tmp_path / "cv", DeviceOptions(device="cpu"), said.append)
    document = strict(tmp_path / "cv" / "crossval.json")
    predicted, measured, cores = [], [], []
    for run in folds:
        held = {row["core"] for row in strict(run / "split.json")["val"]}
        folder = open_folder(load_trained(run, "cpu"), pairs, FolderOptions())
        for core, name in enumerate(folder.table.names.tolist()):
            if name in held:
                region = folder.region(core)
                predicted.append(region.predicted.flatten(1).numpy())
                measured.append(region.measured.flatten(1).numpy())
                cores.append(name)
    assert sorted(cores) == [f"core_{index:02d}" for index in range(4)]
    predicted, measured = np.concatenate(predicted, axis=1), np.concatenate(measured, axis=1)
    for marker, (name, found) in enumerate(document["markers"].items()):
        assert found["model"]["pearson"]["value"] == pytest.approx(
            pearsonr(predicted[marker].astype(float), measured[marker].astype(float)).statistic, abs=2e-5
        ), name
        assert found["baselines"]["mean"]["pearson"] is None
        # Four cores are too few for an interval, so nothing is judged.
        assert found["verdict"] == "not judged"
    assert [fold["cores"] for fold in document["folds"]] == [cores[:2], cores[2:]]
    assert document["intervals"]["units"] == 4
    assert any("too few cores" in text.lower() for text in said)
    with open(tmp_path / "cv" / "crossval.csv", newline="") as file:
        assert [row["verdict"] for row in csv.DictReader(file)] == ["not judged"] * 3 + [""]
    assert (tmp_path / "cv" / "crossval.png").read_bytes().startswith(b"\x89PNG")
    for run in folds:
        assert strict(run / "scorecard.json")["source"]["command"] == "crossval"


def test_folds_that_hold_out_a_core_twice_are_refused(train, tmp_path, capsys):
    for number in (1, 2):
        train(f"cv/fold_{number}", epochs=1, fold="1/2")
    runs = [tmp_path / "cv" / f"fold_{number}" for number in (1, 2)]
    with pytest.raises(Exception, match="held out by fold_1, fold_2"):
        score_folds(runs, tmp_path / "cv", DeviceOptions(device="cpu"), print)
    assert not (tmp_path / "cv" / "crossval.json").exists()


@pytest.mark.parametrize("option", [["--fold", "1/2"], ["--resume", "auto"], ["--output_dir", "x"], ["--overwrite"]])
def test_what_crossval_chooses_itself_is_refused_behind_the_dashes(option, pairs, tmp_path, capsys):
    assert run_command(main, [*words(pairs, tmp_path / "cv"), *option]) == 2
    assert f"{option[0]}: crossval chooses this" in capsys.readouterr().err
    assert not (tmp_path / "cv").exists()


def test_a_fold_that_does_not_exist_is_refused(pairs, tmp_path, capsys):
    assert run_command(main, words(pairs, tmp_path / "cv", "--fold", "3")) == 2
    assert "--fold 3: there are --folds 2" in capsys.readouterr().err


def test_finished_folds_are_skipped_and_the_others_trained(call, train, pairs, tmp_path):
    best = train("cv/fold_2", epochs=1, fold="2/2").dir / "checkpoints" / "best.pt"
    written = best.stat().st_mtime_ns
    made = call(*command(pairs, tmp_path / "cv"))
    assert (made.code, made.err) == (0, "")
    assert "fold 2 of 2 is finished" in made.out
    assert best.stat().st_mtime_ns == written
    assert strict(tmp_path / "cv" / "fold_1" / "config.json")["options"]["fold"] == "1/2"
    assert len(strict(tmp_path / "cv" / "crossval.json")["folds"]) == 2


def test_a_finished_fold_of_other_options_is_refused(train, pairs, tmp_path, capsys):
    train("cv/fold_1", epochs=1, fold="1/2")
    assert run_command(main, words(pairs, tmp_path / "cv", seed=7)) == 2
    assert "--seed: 42 in the run, 7 now" in capsys.readouterr().err


def test_a_fold_that_fails_is_named_and_its_exit_code_passed_on(call, pairs, tmp_path):
    made = call(*command(pairs, tmp_path / "cv", folds=5))
    assert made.code == 2
    assert "5 folds need at least 5 cores, and there are 4" in made.err
    assert "fold 1 of 5 ended with exit code 2" in made.err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_reaches_the_training_which_saves_and_goes_on_with_the_next_call(
    number, code, start, call, pairs, tmp_path
):
    run = tmp_path / "cv" / "fold_1"
    begun = start(*command(pairs, tmp_path / "cv", "--fold", "1", epochs=200))
    wait_for(lambda: (run / "metrics.jsonl").exists(), "the first epoch")
    begun.signal(number)
    made = begun.end()
    assert made.code == code
    assert "interrupted in fold 1 of 2" in made.err
    assert not begun.others()
    assert read_status(run)["state"] == "interrupted"
    assert (run / "checkpoints" / "last.pt").exists()
    if number == signal.SIGTERM:
        again = call(*command(pairs, tmp_path / "cv", "--fold", "1", epochs=read_metrics(run)[-1]["epoch"] + 1))
        assert (again.code, again.err) == (0, "")
        assert strict(run / "config.json")["attempt"] == 2
        assert read_status(run)["state"] in ("finished", "early_stopped")
