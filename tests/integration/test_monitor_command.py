"""The command as a person runs it: one report, a live view, comparisons, pages, and a trainer that is killed."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
import urllib.request
import zipfile
from pathlib import Path

import pytest
from monitor_runs import epoch_record, former_losses, healthy_losses, write_run

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "monitor_training.py"
DEADLINE_S = 120

TRAINER = """
import sys, time
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
from monitor_runs import epoch_record, healthy_losses
from orion_unet.run_log import Heartbeat, MetricsWriter, write_json
run = Path(sys.argv[1])
run.mkdir()
write_json(run / "config.json", {{"schema": 1, "options": {{"epochs": int(sys.argv[2])}}, "global_batch": 12}})
writer = MetricsWriter(run)
losses = zip(*healthy_losses(int(sys.argv[2])))
with Heartbeat(run, interval_s=0.1) as heart:
    for epoch, (train, val) in enumerate(losses, 1):
        heart.update(state="training", epoch=epoch, epochs=int(sys.argv[2]), step=0, steps_per_epoch=11)
        for step in range(1, 11):
            time.sleep(float(sys.argv[3]) / 10)
            # In the middle of an epoch: before its first step, patience is 15 minutes.
            while step == 5 and (run / "frozen").exists():
                time.sleep(0.05)
            heart.progress(step=step)
        writer.append(epoch_record(epoch, train, val))
    heart.update(state="finished")
"""


def monitor(*options, **more):
    command = [sys.executable, str(SCRIPT), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, cwd=ROOT, **more)


@pytest.fixture
def start():
    """Start processes that do not outlive the test."""
    running = []

    def popen(command, **more):
        process = subprocess.Popen(list(map(str, command)), cwd=ROOT, **more)
        running.append(process)
        return process

    yield popen
    for process in running:
        if process.poll() is None:
            process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


@pytest.fixture
def trainer(start):
    code = TRAINER.format(root=str(ROOT), tests=str(ROOT / "tests"))
    return lambda run, epochs, seconds: start([sys.executable, "-c", code, run, epochs, seconds])


@pytest.fixture
def watcher(start):
    def popen(run, *options):
        command = [sys.executable, SCRIPT, "--output_dir", run, "--watch", "--json", "--interval", 0.2, *options]
        return start(command, stdout=subprocess.PIPE, bufsize=0)  # select sees what a buffer would hide

    return popen


def documents(process, until):
    """The JSON lines of a watching monitor, up to the first that satisfies ``until``."""
    seen = []
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        if select.select([process.stdout], [], [], 0.2)[0]:
            line = process.stdout.readline()
            if not line:
                break
            seen.append(json.loads(line))
            if until(seen[-1]):
                return seen
    raise AssertionError(f"never came: {[d['state'] for d in seen]}")


def strict(text):
    def refuse(constant):
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)


def test_one_report_is_plain_text_and_leaves_exactly_two_files(tmp_path):
    run = write_run(tmp_path / "former", *former_losses(), options={"learning_rate": 5e-4})
    before = {path.name for path in run.iterdir()}
    done = monitor("--output_dir", run)
    assert done.returncode == 0 and done.stderr == ""
    assert "\x1b" not in done.stdout and "\r" not in done.stdout
    for code in ("unstable_validation", "slow_convergence", "overfitting", "learning rate"):
        assert code in done.stdout
    assert {path.name for path in run.iterdir()} - before == {"training_progress.png", "monitor.json"}
    assert (run / "training_progress.png").read_bytes().startswith(b"\x89PNG")


def test_json_is_strict_and_the_same_as_monitor_json(tmp_path):
    run = write_run(tmp_path / "run", *healthy_losses(12))
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(epoch_record(13, None, None)) + "\n")
    done = monitor("--output_dir", run, "--json")
    document = strict(done.stdout)
    assert document == strict((run / "monitor.json").read_text())
    assert document["state"] == "finished" and document["epochs"] == 13 and document["best_epoch"] == 12
    assert [w["code"] for w in document["warnings"]] == ["diverged"]
    assert set(document["warnings"][0]) == {"code", "severity", "message", "value", "threshold", "advice", "lines"}
    assert document["warnings"][0]["lines"] == {"log": "metrics.jsonl", "first": [9], "last": [13]}


@pytest.mark.parametrize(
    ("losses", "fail_on", "code"),
    [
        (former_losses(), "warning", 4),
        (healthy_losses(12), "warning", 0),
        (healthy_losses(60), "warning", 0),
        (healthy_losses(60), "notice", 4),
    ],
)
def test_fail_on_sets_the_exit_code(tmp_path, losses, fail_on, code):
    run = write_run(tmp_path / "run", *losses)
    assert monitor("--output_dir", run, "--json", "--fail_on", fail_on).returncode == code


def test_thresholds_are_options(tmp_path):
    run = write_run(tmp_path / "run", *former_losses())
    document = json.loads(monitor("--output_dir", run, "--json", "--max_gap", 0.2, "--max_relative_gap", 1).stdout)
    assert [w["code"] for w in document["warnings"]] == ["unstable_validation", "slow_convergence"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output_dir", "absent"], "does not exist"),
        (["--output_dir", "."], "is not a run folder"),
        (["--output_dir", "x", "--nonsense"], "--help"),
        (["--output_dir", "x", "--interval", "0"], "--interval"),
        (["--output_dir", "x", "--max_gap", "nan"], "--max_gap"),
        (["--output_dir", "x", "--watch", "--show"], "--watch and --show"),
        (["--output_dir", "x", "--html", "absent/page.html"], "--html"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(tmp_path, options, message):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options], capture_output=True, text=True, cwd=tmp_path, timeout=DEADLINE_S
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1


def test_help_and_report_import_no_torch_and_help_nothing_slow():
    code = (
        "import sys; from orion_unet.cli.monitor import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "import orion_unet.monitor.plots, orion_unet.monitor.terminal, orion_unet.monitor.watch\n"
        "print(sorted({'torch', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=DEADLINE_S)
    assert done.stdout.endswith("[]\n") and "--watch" in done.stdout


def test_the_page_is_one_file_and_the_comparison_draws_one_figure(tmp_path):
    first = write_run(tmp_path / "first", *healthy_losses(25))
    second = write_run(tmp_path / "second", *former_losses(), options={"learning_rate": 5e-4})
    page, figure = tmp_path / "page.html", tmp_path / "both.png"
    done = monitor("--output_dir", first, "--compare", second, "--html", page, "--figure", figure)
    assert done.returncode == 0 and "--learning_rate" in done.stdout
    assert figure.read_bytes().startswith(b"\x89PNG")
    for text in (page.read_text(), monitor("--output_dir", first, "--html", page) and page.read_text()):
        assert "data:image/png;base64," in text and "http:" not in text and "https:" not in text
        assert 'http-equiv="refresh"' not in text
    seen = strict(monitor("--output_dir", first, "--compare", second, "--json").stdout)
    assert len(seen["runs"]) == 2 and list(seen["differing_options"]) == ["learning_rate"]


def test_a_closed_pipe_is_no_failure(tmp_path):
    run = write_run(tmp_path / "run", *former_losses())
    command = f"{sys.executable} {SCRIPT} --output_dir {run} | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0 and "Traceback" not in done.stderr


def test_a_folder_that_cannot_be_written_still_gives_a_report(tmp_path):
    run = write_run(tmp_path / "run", *healthy_losses(12))
    # Folders with the names of the files stop even a superuser, unlike permissions.
    (run / "monitor.json").mkdir()
    (run / "training_progress.png").mkdir()
    done = monitor("--output_dir", run)
    assert done.returncode == 0 and "epoch 12" in done.stdout
    assert done.stderr.count("cannot write") == 1


def test_watch_follows_a_run_from_before_its_start_to_its_end(tmp_path, trainer, watcher):
    run, page = tmp_path / "run", tmp_path / "page.html"
    process = watcher(run, "--html", page)
    seen = documents(process, lambda d: d["state"] == "waiting")
    assert "does not exist" in seen[0]["reason"]
    trainer(run, 12, 0.5)
    seen = documents(process, lambda d: d["state"] == "training" and d["epochs"] >= 2)
    assert 'http-equiv="refresh"' in page.read_text()
    seen += documents(process, lambda d: d["state"] == "finished")
    assert seen[-1]["epochs"] == 12
    assert [d.get("epochs", 0) for d in seen] == sorted(d.get("epochs", 0) for d in seen)
    assert process.wait(DEADLINE_S) == 0
    assert 'http-equiv="refresh"' not in page.read_text()


def test_a_served_page_follows_the_run_and_ends_with_ctrl_c(tmp_path, trainer, start):
    run = tmp_path / "run"
    words = [sys.executable, SCRIPT, "--output_dir", run, "--serve", "0", "--interval", "0.2"]
    process = start(words, stdout=subprocess.PIPE, text=True)
    address = re.match(r"http://127\.0\.0\.1:\d+/", process.stdout.readline())[0]

    def body():
        with urllib.request.urlopen(f"{address}body", timeout=DEADLINE_S) as answer:
            return answer.read().decode()

    def wait_for(text):
        end = time.monotonic() + DEADLINE_S
        while text not in (seen := body()) and time.monotonic() < end:
            time.sleep(0.1)
        assert text in seen

    wait_for("Waiting for the run")
    trainer(run, 4, 0.5)
    wait_for("<td>4 of 4</td>")
    wait_for("<td>finished</td>")
    assert (run / "training_progress.png").exists()
    process.send_signal(signal.SIGINT)
    assert process.wait(DEADLINE_S) == 0


def test_a_killed_trainer_is_crashed_within_two_intervals(tmp_path, trainer, watcher):
    process = watcher(tmp_path / "run")
    victim = trainer(tmp_path / "run", 1000, 0.2)
    documents(process, lambda d: d.get("epochs", 0) >= 1)
    victim.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    seen = documents(process, lambda d: d["state"] == "crashed")
    # Two intervals, and the time a busy machine needs to draw the last figure.
    assert time.monotonic() - killed < 2 * 0.2 + 10
    assert seen[-1]["warnings"][0]["code"] == "crashed"
    assert process.wait(DEADLINE_S) == 0


def test_a_stopped_trainer_is_stalled_and_recovers(tmp_path, trainer, watcher):
    process = watcher(tmp_path / "run", "--stalled_after", 1)
    victim = trainer(tmp_path / "run", 1000, 0.2)
    documents(process, lambda d: d.get("epochs", 0) >= 1)
    victim.send_signal(signal.SIGSTOP)
    seen = documents(process, lambda d: d["state"] == "stalled")
    assert seen[-1]["warnings"][0]["code"] == "stalled"
    victim.send_signal(signal.SIGCONT)
    documents(process, lambda d: d["state"] == "training")


def test_a_trainer_whose_loader_is_frozen_is_stalled_and_recovers(tmp_path, trainer, watcher):
    """The heartbeat's own thread goes on; only the steps stop."""
    run = tmp_path / "run"
    process = watcher(run, "--stalled_after", 2)
    trainer(run, 1000, 0.4)
    documents(process, lambda d: d.get("epochs", 0) >= 2)
    (run / "frozen").touch()
    seen = documents(process, lambda d: d["state"] == "stalled")
    assert seen[-1]["heartbeat_age_s"] < 2
    assert "no training step has finished for" in seen[-1]["reason"]
    assert "loader process" in seen[-1]["warnings"][0]["message"]
    (run / "frozen").unlink()
    seen = documents(process, lambda d: d["state"] == "training")
    assert "stalled" not in [warning["code"] for warning in seen[-1]["warnings"]]


@pytest.mark.parametrize(("name", "state", "epochs"), [("complete", "finished", 2), ("interrupted", "interrupted", 1)])
def test_runs_of_version_0_1_are_reported(tmp_path, name, state, epochs):
    with zipfile.ZipFile(ROOT / "tests/integration/data/runs_of_version_0_1.zip") as archive:
        archive.extractall(tmp_path)
        expected = json.loads(archive.read("expected.json"))[name]
    run, page = tmp_path / name, tmp_path / "page.html"
    done = monitor("--output_dir", run, "--json", "--html", page)
    assert (done.returncode, done.stderr) == (0, "")
    document = strict(done.stdout)
    assert (document["state"], document["epochs"]) == (state, epochs)
    assert (document["damaged_lines"], document["notes"], document["warnings"]) == (0, [], [])
    assert [document["train_loss"], document["val_loss"]] == expected[str(epochs)][:2]
    assert "data:image/png;base64," in page.read_text()
    own = (run / "training_progress.png").read_bytes()
    done = monitor("--output_dir", run, "--compare", tmp_path / "complete")
    assert (done.returncode, done.stderr) == (0, "") and state in done.stdout
    assert (run / "comparison.png").exists() and (run / "training_progress.png").read_bytes() == own
    done = monitor("--output_dir", run)
    assert (done.returncode, done.stderr) == (0, "") and f"epoch {epochs} of" in done.stdout


def on_terminal(run, leave, start):
    """Watch in an 80 x 24 terminal, then ``leave``; returns exit code and everything sent to the terminal."""
    master, slave = pty.openpty()
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}
    command = [sys.executable, SCRIPT, "--output_dir", run, "--watch", "--interval", 0.3]
    process = start(command, stdin=slave, stdout=slave, stderr=slave, env=env, start_new_session=True)
    os.close(slave)
    sent = b""
    left = False
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        if select.select([master], [], [], 0.2)[0]:
            try:
                chunk = os.read(master, 65536)
            except OSError:
                break
            if not chunk:
                break
            sent += chunk
        if not left and (b"epoch" in sent or b"waiting for" in sent) and b"leave" in sent:
            leave(process)
            left = True
    os.close(master)
    return process.wait(DEADLINE_S), sent.decode("utf-8", "replace")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_leaving_the_live_view_restores_the_terminal(tmp_path, start, trainer, number, code):
    trainer(tmp_path / "run", 1000, 0.1)
    deadline = time.monotonic() + DEADLINE_S
    while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    returned, sent = on_terminal(tmp_path / "run", lambda process: process.send_signal(number), start)
    assert returned == code and "Traceback" not in sent
    # Alternate screen entered and left, cursor hidden and shown again.
    assert sent.rindex("\x1b[?1049l") > sent.rindex("\x1b[?1049h")
    assert sent.rindex("\x1b[?25h") > sent.rindex("\x1b[?25l")
    assert re.search(r"epoch \d+ of 1000", sent)
