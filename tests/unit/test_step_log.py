"""The lines of steps.jsonl, against sums by hand."""

import json
import math

import pytest

from orion_unet.run_log import StepsWriter
from orion_unet.training import steps
from orion_unet.training.engine import Step
from orion_unet.training.steps import StepLog, line_interval


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is moved."""
    now = [100.0]
    monkeypatch.setattr(steps.time, "perf_counter", lambda: now[0])
    return now


@pytest.fixture
def said():
    return []


@pytest.fixture
def log(tmp_path, clock, said):
    def make(every, length=100):
        made = StepLog(StepsWriter(tmp_path), every, length, patches=6, attempt=3, say=said.append)
        made.begin(2)
        return made

    return make


def lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]


def test_a_line_is_the_mean_loss_the_largest_norm_and_the_counts_since_the_last(log, clock, tmp_path):
    made = log(3)
    for step, (loss, norm, waited) in enumerate([(0.5, 1.0, 0.1), (0.3, 4.0, 0.2), (0.1, 2.0, 1.0)]):
        clock[0] += 2
        made.add(Step(step, loss, grad_norm=norm), 1e-4 * (step + 1), waited)
    clock[0] += 8
    for step in (3, 4, 5):
        made.add(Step(step, 0.2, grad_norm=0.5), 5e-4, 5.0)
    first, second = lines(tmp_path)
    assert first["loss"] == pytest.approx(0.3) and first["lr"] == pytest.approx(3e-4)
    assert (first["epoch"], first["step"], first["attempt"], first["grad_norm"]) == (2, 3, 3, 4.0)
    # Three steps of six patches in 6 s, of which 1 s was waiting; then in 8 s, of which 4 s.
    assert (first["samples_per_s"], first["data_wait_fraction"]) == (3.0, pytest.approx(1 / 6))
    assert (second["samples_per_s"], second["data_wait_fraction"], second["grad_norm"]) == (2.25, 0.5, 0.5)
    assert first.keys() == second.keys() == {
        "schema", "epoch", "step", "attempt", "time", "loss", "lr", "grad_norm", "samples_per_s", "data_wait_fraction",
        "skipped_steps", "non_finite_steps",
    }  # fmt: skip


def test_what_is_not_finite_counts_and_spoils_no_mean(log, clock, tmp_path):
    made = log(4)
    clock[0] += 1
    made.add(Step(0, math.nan, bad=True, grad_norm=math.nan), 1e-4, 0)
    made.add(Step(1, 0.4, bad=True, overflow=True, grad_norm=math.inf), 1e-4, 0)
    # The gradient of this one is not whole yet.
    made.add(Step(2, 0.2), 1e-4, 0)
    made.add(Step(3, math.inf, bad=True, grad_norm=3.0), 1e-4, 0)
    (line,) = lines(tmp_path)
    assert line["loss"] == pytest.approx(0.3) and line["grad_norm"] == 3.0
    assert (line["skipped_steps"], line["non_finite_steps"]) == (3, 2)


def test_nothing_finite_is_null(log, tmp_path):
    made = log(1)
    made.add(Step(0, math.nan, bad=True, grad_norm=math.nan), 1e-4, 0)
    (line,) = lines(tmp_path)
    # The clock stands still: there is no speed either.
    for name in ("loss", "grad_norm", "samples_per_s", "data_wait_fraction"):
        assert line[name] is None


def test_lines_end_at_saves_at_stops_and_with_the_epoch(log, tmp_path):
    made = log(10, length=25)
    for step in range(25):
        made.add(Step(step, 0.5, save=step == 3, stop=step == 15), 1e-4, 0)
    assert [line["step"] for line in lines(tmp_path)] == [4, 10, 16, 20, 25]


def test_no_lines_write_no_file(log, tmp_path):
    log(0).add(Step(99, 0.5, stop=True), 1e-4, 0)
    assert not (tmp_path / "steps.jsonl").exists()


def test_a_failure_is_said_once_and_ends_nothing(log, said, tmp_path):
    (tmp_path / "steps.jsonl").mkdir()
    made = log(1)
    made.add(Step(0, 0.5), 1e-4, 0)
    made.add(Step(1, 0.5), 1e-4, 0)
    assert len(said) == 1 and "steps.jsonl: cannot be written" in said[0]
    (tmp_path / "steps.jsonl").rmdir()
    made.add(Step(2, 0.7), 1e-4, 0)
    assert [line["loss"] for line in lines(tmp_path)] == [0.7]


def test_half_a_line_of_a_killed_writer_is_ended_first(log, tmp_path):
    (tmp_path / "steps.jsonl").write_text('{"epoch": 1, "st')
    log(1).add(Step(0, 0.5), 1e-4, 0)
    half, whole = (tmp_path / "steps.jsonl").read_text().splitlines()
    assert half == '{"epoch": 1, "st' and json.loads(whole)["step"] == 1


@pytest.mark.parametrize(
    ("wanted", "length", "every"), [(None, 1, 1), (None, 29, 1), (None, 1000, 50), (7, 1000, 7), (0, 1000, 0)]
)
def test_the_automatic_interval_gives_about_twenty_lines(wanted, length, every):
    assert line_interval(wanted, length) == every
