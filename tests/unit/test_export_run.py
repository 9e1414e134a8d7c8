"""A run's logs as CSV tables, TensorBoard events and an MLflow store, read back by other readers."""

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from monitor_runs import MARKERS, epoch_record, step_record, write_run, write_steps

from orion_unet.__main__ import dispatch
from orion_unet.cli.arguments import run_command

ROOT = Path(__file__).resolve().parents[2]
TRAIN, VAL = [0.4, 0.3, 0.25], [0.45, 1 / 3, 0.35]


@pytest.fixture
def run(tmp_path):
    """Three epochs, of which the second was run again by a second attempt, and their steps."""
    folder = write_run(tmp_path / "run", TRAIN, VAL, steps_per_epoch=20)
    replaced = [epoch_record(epoch, 9.0, 9.0, attempt=1) for epoch in (1, 2, 3)]
    again = [epoch_record(e, TRAIN[e - 1], VAL[e - 1], attempt=1 if e == 1 else 2) for e in (1, 2, 3)]
    lines = [again[0], *replaced[1:], *again[1:]]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "{damaged\n")
    steps = [step_record(1, 10, 0.5), step_record(1, 20, 0.4), step_record(2, 10, 9.0)]
    steps += [step_record(2, 10, 0.3, attempt=2), step_record(2, 20, None, attempt=2, grad_norm=None)]
    write_steps(folder, steps)
    return folder


def export(*words):
    return run_command(dispatch, ["export-run", *map(str, words)])


def table(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_tables_have_the_epochs_markers_and_steps_that_count(run, tmp_path):
    assert export(run, "--to", "csv", "--output_dir", tmp_path / "out") == 0
    assert sorted(os.listdir(tmp_path / "out")) == ["epochs.csv", "markers.csv", "steps.csv"]
    epochs = table(tmp_path / "out" / "epochs.csv")
    assert [(row["epoch"], row["attempt"]) for row in epochs] == [("1", "1"), ("2", "2"), ("3", "2")]
    assert [float(row["train_loss"]) for row in epochs] == TRAIN
    assert [float(row["val_loss"]) for row in epochs] == pytest.approx(VAL, rel=1e-11)
    assert {row["train_focal"] for row in epochs} == {""}
    assert {row["val_focal"] for row in epochs} != {""}
    assert epochs[0]["time"] == "2026-01-31T10:00:00Z"
    markers = table(tmp_path / "out" / "markers.csv")
    assert [row["marker"] for row in markers] == list(MARKERS) * 3
    assert [row["pearson"] for row in markers[:4]] == ["0.9", "0.8", "0.7", ""]
    steps = table(tmp_path / "out" / "steps.csv")
    assert [(row["epoch"], row["step"], row["loss"]) for row in steps] == [
        ("1", "10", "0.5"),
        ("1", "20", "0.4"),
        ("2", "10", "0.3"),
        ("2", "20", ""),
    ]
    assert {row["time"] for row in steps} == {"2026-01-31T10:00:00Z"}


def test_tensorboard_reads_the_events(run, tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert export(run, "--to", "tensorboard", "--output_dir", tmp_path / "out") == 0
    read = event_accumulator.EventAccumulator(str(tmp_path / "out"), size_guidance={"scalars": 0})
    read.Reload()
    found = {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}
    assert found["loss/val"] == [(epoch, pytest.approx(loss)) for epoch, loss in enumerate(VAL, 1)]
    assert found["loss/train"] == [(epoch, pytest.approx(loss)) for epoch, loss in enumerate(TRAIN, 1)]
    assert found["metrics/pearson"] == [(epoch, pytest.approx(0.6)) for epoch in (1, 2, 3)]
    assert found["pearson/CD45"] == [(epoch, pytest.approx(0.8)) for epoch in (1, 2, 3)]
    assert "pearson/Blank" not in found
    assert "train/focal" not in found
    assert found["steps/loss"] == [(10, 0.5), (20, pytest.approx(0.4)), (30, pytest.approx(0.3))]
    assert [step for step, _ in found["steps/grad_norm"]] == [10, 20, 30]
    assert read.Scalars("loss/val")[0].wall_time == 1769853600.0


def test_the_tags_are_those_of_a_training_that_writes_events_itself(run, tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from orion_unet.training.tensorboard import EventWriter

    writer = EventWriter(tmp_path / "trained", True)
    writer.write(epoch_record(1, 0.4, 0.45))
    writer.close()
    assert export(run, "--to", "tensorboard", "--output_dir", tmp_path / "out") == 0
    tags = []
    for folder in (tmp_path / "trained" / "tensorboard", tmp_path / "out"):
        read = event_accumulator.EventAccumulator(str(folder))
        tags.append(set(read.Reload().Tags()["scalars"]))
    assert len(tags[0]) > 15
    assert tags[0] <= tags[1]


def test_numbers_that_are_not_finite_and_foreign_values_make_empty_cells(tmp_path):
    folder = write_run(tmp_path / "run", [math.nan, 0.3], [math.inf, 0.4])
    record = epoch_record(3, 1e300, "high")
    record["val"]["metrics"] |= {"epoch": 99, "note": [1], "=1+1\n": 2}
    record["time"] = ["now"]
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")
    assert export(folder, "--to", "csv", "--output_dir", tmp_path / "out") == 0
    rows = table(tmp_path / "out" / "epochs.csv")
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert [row["train_loss"] for row in rows] == ["", "0.3", ""]
    assert [row["val_loss"] for row in rows] == ["", "0.4", ""]
    assert rows[2]["time"] == ""
    assert rows[2]["=1+1\\x0a"] == "2"
    assert "note" not in rows[2]


def test_mlflow_reads_its_store(run, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    mlflow = pytest.importorskip("mlflow")
    odd = ("CD3/é", "CD3_é", "..", "a" * 300)
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(epoch_record(4, 0.2, 0.3, attempt=2, markers=odd)) + "\n")
    assert export(run, "--to", "mlflow", "--output_dir", tmp_path / "out") == 0
    client = mlflow.MlflowClient((tmp_path / "out").as_uri())
    (experiment,) = [e for e in client.search_experiments() if e.name == "orion-unet"]
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_name, found.info.status) == ("run", "FINISHED")
    assert (found.data.params["learning_rate"], found.data.params["epochs"]) == ("0.0001", "30")
    losses = client.get_metric_history(found.info.run_id, "loss/val")
    assert [(m.step, m.value, m.timestamp) for m in losses[:3]] == [
        (epoch, pytest.approx(value, rel=1e-11), 1769853600000) for epoch, value in zip((1, 2, 3), VAL, strict=True)
    ]
    steps = client.get_metric_history(found.info.run_id, "steps/loss")
    assert [(m.step, m.value) for m in steps] == [(10, 0.5), (20, 0.4), (30, 0.3)]
    names = [name for name in found.data.metrics if name.startswith("pearson/")]
    assert len(names) == len(MARKERS) - 1 + len(odd)
    assert {"pearson/CD3__", "pearson/CD3___2", "pearson/_2"} <= set(names)
    assert not list((tmp_path / "out").glob(f".{os.getpid()}*")) and str(os.getpid()) not in found.info.artifact_uri


@pytest.mark.parametrize("to", ["csv", "tensorboard", "mlflow"])
def test_bad_input_is_one_sentence_and_nothing_is_written(to, run, tmp_path, capsys):
    if to == "mlflow":
        pytest.importorskip("mlflow")
    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    file.write_text("")
    empty = tmp_path / "empty"
    empty.mkdir()
    foreign = write_run(tmp_path / "foreign", [0.3], [0.4])
    (foreign / "metrics.jsonl").write_text(json.dumps(epoch_record(1, 0.3, 0.4) | {"schema": 7}) + "\n")
    before = sorted(tmp_path.rglob("*"))
    for source, output, said in (
        (tmp_path / "absent", tmp_path / "out", "does not exist"),
        (file, tmp_path / "out", "is not a folder"),
        (empty, tmp_path / "out", "no epoch in metrics.jsonl"),
        (foreign, tmp_path / "out", "schema 7"),
        (run, full, "is not empty"),
        (run, file, "is a file"),
        (run, file / "below", "cannot be written"),
    ):
        assert export(source, "--to", to, "--output_dir", output) == 2
        message = capsys.readouterr().err
        assert said in message
        assert message.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_failure_while_writing_leaves_nothing(run, tmp_path, monkeypatch, capsys):
    from orion_unet.monitor import export as module

    def full(logs, folder, final):
        (folder / "epochs.csv").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(module.WRITERS, "csv", lambda: full)
    before = sorted(tmp_path.rglob("*"))
    assert export(run, "--to", "csv", "--output_dir", tmp_path / "out") == 2
    assert "No space left on device" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("to", "module"), [("tensorboard", "tensorboard.summary.writer.event_file_writer"), ("mlflow", "mlflow")]
)
def test_without_its_package_one_sentence_says_what_to_install(to, module, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, to, None)
    monkeypatch.setitem(sys.modules, module, None)
    assert export(run, "--to", to, "--output_dir", tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert f'pip install "orion-unet[{to}]"' in message
    assert message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_empty_folder_is_filled_and_a_link_to_it_stays(run, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert export(run, "--to", "csv", "--output_dir", tmp_path / "link") == 0
    assert (tmp_path / "link").is_symlink()
    assert len(list((tmp_path / "real").iterdir())) == 3


@pytest.mark.slow
def test_no_export_imports_torch(run, tmp_path):
    script = (
        "import sys; from orion_unet.__main__ import dispatch; dispatch(sys.argv[1:]); print('torch' in sys.modules)"
    )
    for to in ("csv", "tensorboard"):
        words = [sys.executable, "-c", script, "export-run", str(run), "--to", to, "--output_dir", str(tmp_path / to)]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
        assert done.stdout.splitlines()[-1] == "False", done.stderr
