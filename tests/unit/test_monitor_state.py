"""Waiting, stalled, crashed: judged by the file system's clock and the process, whatever the local clock says."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest
from monitor_runs import healthy_losses, write_run

from orion_unet.errors import InputError
from orion_unet.monitor import liveness
from orion_unet.monitor.diagnostics import Thresholds
from orion_unet.monitor.liveness import Liveness, filesystem_now, process_lives
from orion_unet.monitor.report import Run

HERE = socket.gethostname()


def status(state="training", pid=None, host=HERE):
    return {"state": state, "pid": os.getpid() if pid is None else pid, "host": host}


@pytest.fixture
def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize("state", ["finished", "early_stopped", "interrupted", "diverged", "failed"])
def test_a_final_state_stands_however_old_and_whoever_is_gone(tmp_path, state, dead_pid):
    assert Liveness(tmp_path, 30).judge(status(state, dead_pid), 0.0).state == state


def test_a_fresh_heartbeat_of_a_living_process_is_its_state(tmp_path):
    life = Liveness(tmp_path, 30).judge(status("validating"), filesystem_now(tmp_path))
    assert life.state == "validating" and life.age_s < 5


def test_an_old_heartbeat_of_a_living_process_is_stalled(tmp_path, monkeypatch):
    monkeypatch.setattr(liveness, "process_lives", lambda pid, age: True)
    life = Liveness(tmp_path, 30).judge(status(), filesystem_now(tmp_path) - 31)
    assert life.state == "stalled" and 31 <= life.age_s < 40


@pytest.mark.parametrize("hours", [-5, 5])
def test_another_machines_clock_makes_no_false_stall(tmp_path, monkeypatch, hours):
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 3600 * hours)
    now = filesystem_now(tmp_path)
    judge = Liveness(tmp_path, 30)
    assert judge.judge(status(host="elsewhere"), now - 1).state == "training"
    assert judge.judge(status(host="elsewhere"), now - 60).state == "stalled"


def test_a_folder_that_cannot_be_written_is_judged_by_what_changes_between_polls(tmp_path, monkeypatch):
    monkeypatch.setattr(liveness, "filesystem_now", lambda folder: None)
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    judge = Liveness(tmp_path, 30)
    assert judge.judge(status(host="elsewhere"), 5.0).state == "training"
    clock[0] = 140.0
    assert judge.judge(status(host="elsewhere"), 6.0).state == "training"
    clock[0] = 171.0
    assert judge.judge(status(host="elsewhere"), 6.0).state == "stalled"


def test_a_process_seen_alive_and_gone_is_crashed_at_once(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    judge = Liveness(tmp_path, 30)
    beat = filesystem_now(tmp_path)
    assert judge.judge(status(pid=process.pid), beat).state == "training"
    process.kill()
    # Not waited for: a zombie is as dead as a process can be.
    deadline = time.monotonic() + 5
    while judge.judge(status(pid=process.pid), beat).state != "crashed" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert judge.judge(status(pid=process.pid), beat).state == "crashed"
    process.wait()


def test_a_process_never_seen_is_crashed_once_its_heartbeat_is_due(tmp_path, dead_pid):
    now = filesystem_now(tmp_path)
    assert Liveness(tmp_path, 30).judge(status(pid=dead_pid), now).state == "training"
    assert Liveness(tmp_path, 30).judge(status(pid=dead_pid), now - 10).state == "crashed"


def test_a_process_of_another_machine_is_never_crashed(tmp_path, dead_pid):
    judge = Liveness(tmp_path, 30)
    assert judge.judge(status(pid=dead_pid, host="elsewhere"), filesystem_now(tmp_path) - 20).state == "training"


def test_a_number_given_to_a_later_process_is_not_the_trainer():
    assert process_lives(os.getpid(), 0.0)
    assert not process_lives(os.getpid(), 1e6)


@pytest.mark.parametrize("pid", [None, True, 0, -1, 2**40, "1", 1.5])
def test_a_process_number_that_is_none_does_not_live(pid):
    assert not process_lives(pid, 1.0)


@pytest.mark.parametrize("document", [None, {}, {"state": "dancing"}, {"state": ["training"]}, {"state": None}])
def test_a_status_that_tells_nothing_is_waiting(tmp_path, document):
    assert Liveness(tmp_path, 30).judge(document, 1.0).state == "waiting"


def test_the_clock_probe_leaves_nothing_behind(tmp_path):
    before = time.time()
    assert filesystem_now(tmp_path) == pytest.approx(before, abs=2)
    assert list(tmp_path.iterdir()) == []
    assert filesystem_now(tmp_path / "absent") is None


def test_a_report_holds_what_the_contract_names(tmp_path):
    train, val = healthy_losses(12)
    val[6] = 0.01
    document = Run(write_run(tmp_path / "run", train, val), Thresholds()).poll().document()
    assert document["state"] == "finished" and document["epochs"] == 12 and document["epochs_planned"] == 30
    assert document["best_epoch"] == 7 and document["best_val_loss"] == 0.01
    assert {"run", "warnings", "config_findings"} <= set(document)
    json.dumps(document, allow_nan=False)


def test_time_left_counts_the_epochs_that_remain(tmp_path):
    run = write_run(tmp_path, *healthy_losses(12), state="training", pid=os.getpid(), host=HERE)
    assert Run(run, Thresholds()).poll().left_s == 18 * 40
    assert Run(write_run(tmp_path, *healthy_losses(12)), Thresholds()).poll().left_s is None


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "is not a run folder"),
        ({"metrics.jsonl": '{"iter": 1}\n'}, "holds no line"),
        ({"metrics.jsonl": '{"schema": 2, "epoch": 1}\n'}, "schema 2"),
        ({"status.json": '{"schema": 3}'}, "schema 3"),
        ({"config.json": '{"schema": "x"}', "metrics.jsonl": ""}, "schema 'x'"),
    ],
)
def test_what_is_no_run_is_one_plain_sentence(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        Run(tmp_path, Thresholds()).poll()
    assert "\n" not in str(caught.value)


def test_an_unreadable_file_is_named(tmp_path):
    run = write_run(tmp_path, *healthy_losses(3))
    (run / "status.json").unlink()
    (run / "status.json").mkdir()
    with pytest.raises(InputError, match=r"status\.json cannot be read"):
        Run(run, Thresholds()).poll()


def test_damaged_documents_are_notes_and_no_failure(tmp_path):
    run = write_run(tmp_path, *healthy_losses(3))
    (run / "config.json").write_bytes(b"\x00\xff")
    with open(run / "metrics.jsonl", "a") as file:
        file.write("garbage\n")
    report = Run(run, Thresholds()).poll()
    assert len(report.epochs) == 3
    assert [note.split()[0] for note in report.notes] == ["config.json", "1"]
