"""Many runs at once, a run that is started again, and the command that is called on news."""

import io
import json
import os
import select
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from monitor_runs import former_losses, healthy_losses, write_run
from rich.cells import cell_len

from orion_unet.errors import InputError
from orion_unet.findings import NOTICE, WARNING, Finding
from orion_unet.monitor.all_runs import AllRuns, changed, find_runs
from orion_unet.monitor.diagnostics import Thresholds
from orion_unet.monitor.notify import News, Notifier
from orion_unet.monitor.terminal import make_console, runs_view
from orion_unet.run_log import write_json

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "monitor_training.py"
DEADLINE_S = 120


def monitor(*options):
    command = [sys.executable, str(SCRIPT), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, cwd=ROOT, check=False)


@pytest.fixture
def watcher():
    running = []

    def start(*options):
        command = [sys.executable, str(SCRIPT), "--interval", "0.1", *map(str, options)]
        # Unbuffered, so that a line which has come is never hidden from select.
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0, cwd=ROOT))
        return running[-1]

    yield start
    for process in running:
        if process.poll() is None:
            process.kill()
        process.communicate()


def lines(process, until):
    """Lines of output up to the first that satisfies ``until``."""
    seen = []
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        if select.select([process.stdout], [], [], 0.2)[0]:
            line = process.stdout.readline().decode()
            if not line:
                break
            seen.append(line)
            if until(line):
                return seen
    raise AssertionError(f"never came: {seen}")


def state_of(run, state, **fields):
    """Replace a run's status."""
    document = {"schema": 1, "state": state, "epoch": 3, "epochs": 30, "message": "", "host": "elsewhere", **fields}
    write_json(run / "status.json", document, durable=False)


def wait_for(path, lines_of_it, process=None):
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        if path.exists() and len(path.read_text().splitlines()) >= lines_of_it:
            return [json.loads(line) for line in path.read_text().splitlines()]
        time.sleep(0.05)
    raise AssertionError(path.read_text() if path.exists() else "no call")


@pytest.fixture
def many(tmp_path):
    """Three runs at different depths, a folder with none, and a run of another schema."""
    folder = tmp_path / "runs"
    write_run(folder / "calm", *healthy_losses(12))
    write_run(folder / "sweep" / "former", *former_losses())
    write_run(folder / "going", *healthy_losses(3), state="training", epoch=4, host="elsewhere")
    (folder / "empty").mkdir()
    write_run(folder / ".hidden", *healthy_losses(3))
    write_run(folder / "calm" / "checkpoints" / "inner", *healthy_losses(3))
    (write_run(folder / "foreign", *healthy_losses(3)) / "status.json").write_text('{"schema": 9}')
    return folder


def test_runs_are_found_at_any_depth_but_not_inside_runs_or_hidden(many):
    names = [str(path.relative_to(many)) for path in find_runs(many)]
    assert names == ["calm", "foreign", "going", "sweep/former"]


def test_a_link_to_a_folder_is_not_followed(many):
    (many / "sweep" / "loop").symlink_to(many)
    assert len(find_runs(many)) == 4


def test_every_run_is_one_row_those_that_go_on_first(many):
    rows = AllRuns(many, Thresholds()).poll()
    assert [(row.name, row.state) for row in rows] == [
        ("going", "training"),
        ("calm", "finished"),
        ("foreign", "unreadable"),
        ("sweep/former", "finished"),
    ]
    cells = {row.name: row.cells() for row in rows}
    assert cells["going"][1:5] == ["training", "4/30", "0.3315", "none"]
    assert cells["sweep/former"][4] == "unstable_validation, overfitting, slow_convergence"
    assert "schema 9" in cells["foreign"][4]
    assert all(row.age_s is not None and row.age_s < 60 for row in rows)


def test_runs_that_come_and_go_are_noticed(many, monkeypatch):
    monkeypatch.setattr("orion_unet.monitor.all_runs.SEARCH_SHARE", 1e9)
    runs = AllRuns(many, Thresholds())
    before = {row.name for row in runs.poll()}
    write_run(many / "new", *healthy_losses(1))
    for path in (many / "calm").glob("*.json*"):
        path.unlink()
    # Without its files, calm is no run any more, and what is below it comes to light.
    assert {row.name for row in runs.poll()} == before - {"calm"} | {"new", "calm/checkpoints/inner"}


def test_only_a_run_that_has_changed_is_a_new_line(many):
    runs = AllRuns(many, Thresholds())
    first = changed({}, runs.poll())
    assert len(first) == 4
    state_of(many / "going", "finished")
    assert list(changed(first, runs.poll())) == ["going"]


@pytest.mark.parametrize("width", [80, 140])
def test_the_table_fits_the_window(many, width):
    write_run(many / ("a long name " * 12), *former_losses())
    rows = AllRuns(many, Thresholds()).poll()
    for height, footer in ((None, ""), (6, "5 runs"), (4, "5 runs"), (9, "")):
        console = make_console(io.StringIO(), width=width)
        console.print(runs_view(rows, width, height, footer))
        shown = console.file.getvalue().splitlines()
        assert max(map(cell_len, shown)) <= width and (height is None or len(shown) <= height)
        assert "going" in shown[1] and "training" in shown[1]
        assert any("more runs" in line for line in shown) == (footer != "")
        assert footer in shown[-1]


@pytest.mark.slow
def test_runs_are_printed_as_table_and_as_json_and_set_the_exit_code(many):
    done = monitor("--runs", many)
    assert (done.returncode, done.stderr) == (0, "") and "\x1b" not in done.stdout
    assert "4 runs, 1 not over, 1 with warnings" in done.stdout
    done = monitor("--runs", many, "--json", "--fail_on", "warning")
    found = {run["name"]: run for run in json.loads(done.stdout)["runs"]}
    assert done.returncode == 4
    assert (found["going"]["epoch"], found["going"]["epochs_planned"]) == (4, 30)
    assert found["sweep/former"]["warnings"][0]["code"] == "unstable_validation"
    assert not list(many.rglob("monitor.json")) and not list(many.rglob("*.png"))
    assert "no runs below" in monitor("--runs", many / "empty").stdout


@pytest.mark.slow
@pytest.mark.parametrize(("options", "message"), [
    (["--runs", "absent"], "--runs absent does not exist"),
    (["--runs", ".", "--compare", "x"], "--runs and --compare"),
    (["--runs", ".", "--html", "x.html"], "--runs and --html"),
    (["--until_finished", "--show"], "--until_finished and --show"),
    (["--notify", "mail"], "--notify needs --watch"),
    (["--watch", "--notify", "'"], "cannot be split"),
    (["--watch", "--notify", " "], "--notify"),
])  # fmt: skip
def test_options_that_do_not_fit_are_one_sentence(tmp_path, options, message):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options], capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False
    )
    assert done.returncode == 2 and done.stdout == ""
    assert message in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_watching_many_runs_prints_what_changes_and_ends_when_all_are_over(tmp_path, watcher):
    for name in "ab":
        write_run(tmp_path / name, *healthy_losses(3), state="training", epoch=4, host="elsewhere")
    process = watcher("--runs", tmp_path, "--until_finished")
    lines(process, lambda line: line.startswith("b: training"))
    state_of(tmp_path / "a", "finished")
    assert len(lines(process, lambda line: line.startswith("a: finished"))) == 1
    state_of(tmp_path / "b", "interrupted")
    lines(process, lambda line: line.startswith("b: interrupted"))
    assert process.poll() is None
    state_of(tmp_path / "b", "finished")
    assert process.wait(DEADLINE_S) == 0


@pytest.mark.slow
@pytest.mark.parametrize("until_finished", [True, False])
def test_an_interrupted_run_is_followed_to_its_next_attempt_only_if_asked(tmp_path, watcher, until_finished):
    run = write_run(tmp_path / "run", *healthy_losses(3), state="interrupted")
    process = watcher("--output_dir", run, "--until_finished" if until_finished else "--watch", "--json")
    lines(process, lambda line: json.loads(line)["state"] == "interrupted")
    if not until_finished:
        assert process.wait(DEADLINE_S) == 0
        return
    state_of(run, "training")
    lines(process, lambda line: json.loads(line)["state"] == "training")
    state_of(run, "finished")
    lines(process, lambda line: json.loads(line)["state"] == "finished")
    assert process.wait(DEADLINE_S) == 0


RECORDER = "import sys; open(sys.argv[1], 'a').write(sys.stdin.readline())"


@pytest.mark.slow
def test_the_command_hears_of_new_warnings_and_of_the_end_once(tmp_path, watcher):
    heard, run = tmp_path / "heard; touch evil", write_run(tmp_path / "run", *former_losses(), state="training")
    state_of(run, "training")
    command = shlex.join([sys.executable, "-c", RECORDER, str(heard)])
    process = watcher("--output_dir", run, "--watch", "--notify", command)
    (first,) = wait_for(heard, 1)
    assert (first["event"], first["state"]) == ("warning", "training")
    assert first["new_warnings"] == ["unstable_validation", "overfitting", "slow_convergence"]
    assert [w["code"] for w in first["warnings"]] == first["new_warnings"]
    time.sleep(0.5)
    state_of(run, "finished")
    assert process.wait(DEADLINE_S) == 0
    told = wait_for(heard, 2)
    assert [one["event"] for one in told] == ["warning", "ended"] and told[1]["state"] == "finished"
    assert not (tmp_path / "evil").exists()


@pytest.mark.slow
def test_a_command_that_fails_is_reported_once_and_ends_nothing(tmp_path, watcher):
    run = write_run(tmp_path / "run", *former_losses())
    process = watcher("--output_dir", run, "--watch", "--notify", "/no/such/command --flag")
    out, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0 and b"epoch 20" in out
    assert err.count(b"--notify /no/such/command: cannot be run") == 1


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_who_leaves_does_not_wait_for_a_slow_command(tmp_path, watcher, number, code):
    run, begun = write_run(tmp_path / "run", *former_losses(), state="training"), tmp_path / "begun"
    state_of(run, "training")
    slow = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(30)"
    process = watcher("--runs", tmp_path, "--watch", "--notify", shlex.join([sys.executable, "-c", slow, str(begun)]))
    (command,) = wait_for(begun, 1)
    left = time.monotonic()
    process.send_signal(number)
    try:
        assert process.wait(DEADLINE_S) == code
        assert time.monotonic() - left < 15
    finally:
        os.kill(command, signal.SIGKILL)


def finding(code, severity=WARNING):
    return Finding(code, severity, "")


def test_news_are_told_once_but_a_stall_each_time():
    news = News()
    told = [
        news.update("training", False, [finding("overfitting"), finding("plateau", NOTICE)]),
        news.update("training", False, [finding("overfitting")]),
        news.update("stalled", False, [finding("stalled")]),
        news.update("training", False, [finding("overfitting")]),
        news.update("stalled", False, [finding("stalled")]),
        news.update("interrupted", True, []),
        news.update("interrupted", True, []),
        news.update("training", False, []),
        news.update("finished", True, []),
    ]
    shown = [[(event["event"], *event["new_warnings"]) for event in events] for events in told]
    assert shown == [
        [("warning", "overfitting")], [], [("warning", "stalled")], [], [("warning", "stalled")],
        [("ended",)], [], [], [("ended",)],
    ]  # fmt: skip


@pytest.mark.parametrize(("code", "problem"), [
    ("import sys; sys.exit('no \\x1b server')", "ended with code 1 (no \\x1b server)"),
    ("import time; time.sleep(60)", "took longer than 0.5 s and was killed"),
])  # fmt: skip
def test_a_failure_names_its_cause_and_the_first_one_is_said(code, problem):
    said = []
    notifier = Notifier([sys.executable, "-c", code], said.append, longest_s=0.5 if "sleep" in code else 30)
    notifier.tell([{"event": "warning"}, {"event": "ended"}], {"run": "x"})
    notifier.close()
    assert len(said) == 1 and problem in said[0] and notifier.problem == said[0]


@pytest.mark.skipif(os.geteuid() == 0, reason="a superuser reads every folder")
def test_a_folder_that_cannot_be_read_is_bad_input(tmp_path):
    tmp_path.chmod(0)
    try:
        with pytest.raises(InputError, match="cannot be read"):
            find_runs(tmp_path)
    finally:
        tmp_path.chmod(0o700)
