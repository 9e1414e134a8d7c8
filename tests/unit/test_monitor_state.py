"""Waiting, stalled, crashed: judged by the file system's clock, the steps and the process, not by the local clock."""

import json
import os
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime

import pytest
from monitor_runs import healthy_losses, write_run

from orion_unet.errors import InputError
from orion_unet.monitor import liveness
from orion_unet.monitor.diagnostics import Thresholds
from orion_unet.monitor.liveness import Liveness, filesystem_now, process_lives
from orion_unet.monitor.report import Run
from orion_unet.run_log import Heartbeat, read_document

HERE = socket.gethostname()


def status(state="training", pid=None, host=HERE):
    return {"state": state, "pid": os.getpid() if pid is None else pid, "host": host}


@pytest.fixture
def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize("state", ["finished", "early_stopped", "interrupted", "diverged", "failed"])
def test_a_final_state_is_kept_when_old_and_when_its_process_is_gone(tmp_path, state, dead_pid):
    assert Liveness(tmp_path, 30).judge(status(state, dead_pid), 0.0).state == state


def test_a_fresh_heartbeat_of_a_living_process_is_its_state(tmp_path):
    life = Liveness(tmp_path, 30).judge(status("validating"), filesystem_now(tmp_path))
    assert life.state == "validating" and life.age_s < 5


def test_an_old_heartbeat_of_a_living_process_is_stalled(tmp_path, monkeypatch):
    monkeypatch.setattr(liveness, "process_lives", lambda pid, age: True)
    life = Liveness(tmp_path, 30).judge(status(), filesystem_now(tmp_path) - 31)
    assert life.state == "stalled" and 31 <= life.age_s < 40
    assert life.finding.value == life.age_s and "no heartbeat for 3" in life.finding.message


def utc(seconds):
    return datetime.fromtimestamp(1769853600 + seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def working(quiet, state="training", step_s=None, step=20, steps=100, **fields):
    """A status written just now by a trainer whose clock is wrong by years; its last progress is ``quiet`` s old."""
    times = {"since": utc(-5000), "progressed": utc(-quiet), "updated": utc(0), "step_s": step_s}
    return {**status(state), "epoch": 2, "step": step, "steps_per_epoch": steps, **times, **fields}


def judged(tmp_path, document, stalled_after=30, interval=10, epoch_s=None):
    return Liveness(tmp_path, stalled_after, interval).judge(document, filesystem_now(tmp_path), epoch_s)


# The seconds without progress that are allowed. Each test tries a little less and a little more.
LIMITS = {
    "short steps: the least": (30, {"step_s": 0.1}, {}),
    "a longer interval between polls": (60, {"step_s": 0.1}, {"interval": 60}),
    "--stalled_after": (90, {"step_s": 0.1}, {"stalled_after": 90}),
    "steps of half a minute": (300, {"step_s": 30}, {}),
    "steps of four minutes": (2400, {"step_s": 240}, {}),
    "before an epoch's first step": (900, {"step": 0}, {}),
    "before an epoch's first step, which the run did before": (2400, {"step": 0}, {"epoch_s": 24_000}),
    "no step was timed yet": (900, {"step": 2}, {}),
    "after an epoch's last step": (900, {"step_s": 0.1, "step": 100}, {}),
    "before the first validation batch": (900, {"state": "validating"}, {}),
    "short validation batches": (120, {"state": "validating", "step_s": 0.1}, {}),
    "validation batches of a minute": (600, {"state": "validating", "step_s": 60}, {}),
    "before the first step of all": (900, {"state": "starting", "step": 0}, {}),
}


@pytest.mark.parametrize(("allowed", "document", "options"), LIMITS.values(), ids=LIMITS)
def test_a_fresh_heartbeat_without_progress_is_a_stall(tmp_path, allowed, document, options):
    state = document.get("state", "training")
    life = judged(tmp_path, working(allowed - 3, **document), **options)
    assert (life.state, life.finding) == (state, None)
    life = judged(tmp_path, working(allowed + 3, **document), **options)
    assert life.state == "stalled" and life.age_s < 5
    assert life.finding.code == "stalled" and life.finding.severity == "warning"
    assert life.finding.threshold == pytest.approx(allowed) and life.finding.value == pytest.approx(allowed + 3, abs=3)


@pytest.fixture
def simulate(tmp_path, monkeypatch):
    """Factory: a trainer's heartbeat beside a monitor that polls every 10 s, both in simulated time."""
    now = [1769853600.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(liveness, "filesystem_now", lambda folder: now[0])
    monkeypatch.setattr(liveness, "process_lives", lambda pid, age: True)
    heart, judge = Heartbeat(tmp_path), Liveness(tmp_path, 30, 10)
    states = []

    def work(seconds):
        """Let time pass, with a beat and a poll every 10 s; returns when the run was first called stalled, or None."""
        began, stalled_after = now[0], None
        while now[0] < began + seconds:
            now[0] = min(now[0] + 10, began + seconds)
            heart._write()
            states.append(judge.judge(read_document(heart.path)[0], now[0]).state)
            if states[-1] == "stalled" and stalled_after is None:
                stalled_after = now[0] - began
        return stalled_after

    return heart, work, states


@pytest.mark.parametrize(("step_s", "batch_s"), [(0.5, 0.2), (25, 8), (240, 100)])
def test_a_healthy_run_of_any_speed_is_never_stalled_and_a_hang_is_found(simulate, step_s, batch_s):
    heart, work, states = simulate
    work(60)
    for epoch in (1, 2):
        heart.update(state="training", epoch=epoch, step=0, steps_per_epoch=12)
        # The first step compiles, the validation starts its loader, and the checkpoint goes to slow storage.
        work(400 if epoch == 1 else 90)
        for step in range(12):
            work(step_s)
            heart.progress(step=step + 1)
        heart.update(state="validating", epoch=epoch)
        work(200)
        for _ in range(8):
            work(batch_s)
            heart.progress()
        work(100)
    assert set(states) == {"starting", "training", "validating"}
    heart.update(state="training", epoch=3, step=0)
    for step in range(6):
        work(step_s)
        heart.progress(step=step + 1)
    assert 0 <= work(10_000) - max(30, 10 * step_s) <= 20
    heart.progress(step=7)
    assert work(step_s) is None and states[-1] == "training"


def test_before_the_first_step_the_start_counts(tmp_path):
    for quiet, state in ((890, "starting"), (910, "stalled")):
        assert judged(tmp_path, working(0, "starting", progressed=None, since=utc(-quiet))).state == state


def test_a_new_epoch_or_validation_restarts_the_patience(tmp_path):
    """The last validation batch was long ago, because the next epoch's loader takes its time."""
    assert judged(tmp_path, working(1000, step=0, since=utc(-800))).state == "training"
    assert judged(tmp_path, working(1000, step=0, since=utc(-910))).state == "stalled"


def test_a_stall_names_likely_causes_and_what_to_do(tmp_path):
    life = judged(tmp_path, working(95, step_s=0.42))
    assert "no training step has finished for 9" in life.reason
    for word in ("usually takes 0.42 s", "loader process", "storage", "lost rank"):
        assert word in life.finding.message
    assert any("--resume auto" in step for step in life.finding.advice)
    assert any("ps: state T or D" in step for step in life.finding.advice)
    life = judged(tmp_path, working(910, "validating"))
    assert "no validation batch has finished for 15 min" in life.reason and "usually" not in life.finding.message


def test_a_stalled_run_that_goes_on_is_training_again(tmp_path):
    judge = Liveness(tmp_path, 30)
    for quiet, state in ((1, "training"), (100, "stalled"), (200, "stalled"), (0, "training")):
        assert judge.judge(working(quiet, step_s=0.5), filesystem_now(tmp_path)).state == state


def test_a_run_of_version_0_1_is_judged_by_its_heartbeat_alone(tmp_path):
    document = working(10_000, step_s=0.1)
    for name in ("progressed", "since", "step_s"):
        del document[name]
    judge = Liveness(tmp_path, 30)
    assert judge.judge(document, filesystem_now(tmp_path)).state == "training"
    document["host"] = "elsewhere"
    assert judge.judge(document, filesystem_now(tmp_path) - 60).state == "stalled"


def test_a_writer_that_times_no_steps_is_judged_by_the_epochs_so_far(tmp_path):
    document = working(45)
    del document["step_s"], document["since"]
    assert judged(tmp_path, document, epoch_s=40).state == "stalled"
    assert judged(tmp_path, document, epoch_s=500).state == "training"
    assert judged(tmp_path, document).state == "training"


@pytest.mark.parametrize(
    "fields",
    [
        {"progressed": 3, "since": []},
        {"updated": "yesterday"},
        {"updated": None},
        {"step_s": "fast", "since": "x"},
        {"step_s": 1e300},
        {"progressed": "9999-12-31T23:59:59Z"},
        {"updated": "9999-12-31T23:59:59Z", "step": {}, "steps_per_epoch": -1},
    ],
)
def test_hostile_times_are_no_failure(tmp_path, fields):
    assert judged(tmp_path, working(0, **fields), epoch_s=40).state in ("training", "stalled")


def test_the_report_of_a_stall_carries_its_warning_first(tmp_path):
    document = {**working(900, step_s=0.5), "epoch": 12}
    del document["state"]
    run = write_run(tmp_path / "run", *healthy_losses(12), state="training", **document)
    report = Run(run, Thresholds()).poll().document()
    assert report["state"] == "stalled" and report["warnings"][0]["code"] == "stalled"
    assert report["left_s"] is None
    assert report["warnings"][0]["threshold"] == 30 and report["heartbeat_age_s"] < 10


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
    # The process is not waited for, so it stays a zombie.
    deadline = time.monotonic() + 60
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
def test_an_invalid_process_number_is_not_alive(pid):
    assert not process_lives(pid, 1.0)


@pytest.mark.parametrize("document", [None, {}, {"state": "dancing"}, {"state": ["training"]}, {"state": None}])
def test_a_status_without_a_known_state_is_waiting(tmp_path, document):
    assert Liveness(tmp_path, 30).judge(document, 1.0).state == "waiting"


def test_the_clock_probe_leaves_nothing_behind(tmp_path):
    before = time.time()
    assert filesystem_now(tmp_path) == pytest.approx(before, abs=2)
    assert list(tmp_path.iterdir()) == []
    assert filesystem_now(tmp_path / "absent") is None


def test_a_report_has_the_fields_that_programs_rely_on(tmp_path):
    train, val = healthy_losses(12)
    val[6] = 0.01
    document = Run(write_run(tmp_path / "run", train, val), Thresholds()).poll().document()
    assert document["state"] == "finished" and document["epochs"] == 12 and document["epochs_planned"] == 30
    assert document["best_epoch"] == 7 and document["best_val_loss"] == 0.01
    assert {"run", "warnings", "config_findings"} <= set(document)
    json.dumps(document, allow_nan=False)


def test_the_best_epoch_is_the_one_that_the_run_chooses(tmp_path):
    pearsons = [0.2, 0.6, None, 0.5]
    for best_by, epoch, value in (("loss", 4, 0.05), ("pearson", 2, 0.6), (None, 4, 0.05)):
        options = {} if best_by is None else {"best_by": best_by}
        run = write_run(tmp_path / str(best_by), [0.4, 0.3, 0.2, 0.1], [0.3, 0.2, 0.1, 0.05], options=options)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for line, pearson in zip(lines, pearsons, strict=True):
            line["val"]["metrics"]["pearson"] = pearson
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        report = Run(run, Thresholds()).poll()
        document = report.document()
        assert (document["best_by"], document["best_epoch"]) == (best_by or "loss", epoch)
        assert document["best_val_loss"] == [0.3, 0.2, 0.1, 0.05][epoch - 1]
        assert report.best_value == value


def test_time_left_counts_the_epochs_that_remain(tmp_path):
    run = write_run(tmp_path, *healthy_losses(12), state="training", pid=os.getpid(), host=HERE)
    assert Run(run, Thresholds()).poll().left_s == 18 * 40
    assert Run(write_run(tmp_path, *healthy_losses(12)), Thresholds()).poll().left_s is None


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "is not a run folder"),
        ({"metrics.jsonl": '{"iter": 1}\n'}, "contains no line"),
        ({"metrics.jsonl": '{"schema": 2, "epoch": 1}\n'}, "schema 2"),
        ({"status.json": '{"schema": 3}'}, "schema 3"),
        ({"config.json": '{"schema": "x"}', "metrics.jsonl": ""}, "schema 'x'"),
    ],
)
def test_a_folder_that_is_not_a_run_gives_one_plain_sentence(tmp_path, files, message):
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
