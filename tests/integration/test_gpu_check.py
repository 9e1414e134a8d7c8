"""The check of a GPU works from end to end on a CPU, and reports what fails or hangs without stopping at it."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_runs import processes_with

from orion_unet.cli.arguments import run_command
from orion_unet.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
# The sections that are quick on a CPU. The others are whole benchmarks and the tests of a GPU; the check runs them all.
SECTIONS = ("memory", "norms")


@pytest.fixture
def check(monkeypatch):
    """The benchmark as a module."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("gpu_check")


@pytest.fixture
def sections(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("gpu_sections")


def table(text):
    """Rows (section, what, result, seconds) of the first table."""
    lines = [line for line in text.split("\n## ")[0].splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.slow
def test_the_check_runs_on_a_cpu_and_reports_every_section_asked_for(tmp_path):
    report = tmp_path / "report.md"
    words = ["--device", "cpu", "--quick", "--output", "report.md", "--only", *SECTIONS]
    before = os.environ.get("OMP_NUM_THREADS")
    done = subprocess.run(
        [ROOT / "scripts" / "gpu_check.sh", *words],
        cwd=tmp_path, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True, timeout=550,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert os.environ.get("OMP_NUM_THREADS") == before
    text = report.read_text()
    rows = table(text)
    assert list(dict.fromkeys(row[0] for row in rows)) == list(SECTIONS)
    results = {(section, what): result for section, what, result, _ in rows}
    assert not [result for result in results.values() if "failed" in result or "missed" in result]
    assert "nothing about a GPU" in text and "none failed" in text
    # What needs a GPU is left out and says so; all else has run.
    left_out = {what for (_, what), result in results.items() if result.startswith("skipped")}
    assert left_out == {"a batch that cannot fit"}
    assert any("a step with group norm takes" in result for result in results.values())
    assert str(tmp_path) not in text and str(ROOT) not in text


def test_a_result_of_a_gpu_is_not_overwritten_by_a_cpu(check, capsys):
    before = check.RESULT.read_bytes() if check.RESULT.exists() else None
    assert run_command(check.main, ["--device", "cpu", "--output", str(check.RESULT)]) == 2
    assert "is for results of a GPU" in capsys.readouterr().err
    assert (check.RESULT.read_bytes() if check.RESULT.exists() else None) == before


def test_without_a_gpu_the_check_says_so(check, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="torch sees no GPU here; --device cpu"):
        check.main([])


def python(folder, code):
    """The command of a section that runs this code."""
    (folder / "section.py").write_text(code)
    return [sys.executable, str(folder / "section.py")]


NOTING = """
import json, os, subprocess, sys, time
def note(**row):
    with open({rows!r}, "a") as file:
        file.write(json.dumps(row) + "\\n")
note(what="first step", result="fine", state="ok", seconds=0.5)
open({now!r}, "w").write("second step")
"""


def section(folder, code):
    noting = NOTING.format(rows=str(folder / "speed.jsonl"), now=str(folder / "speed.now"))
    return python(folder, noting + code)


def test_a_section_that_hangs_is_ended_with_all_it_started_and_keeps_its_rows(check, tmp_path, monkeypatch):
    monkeypatch.setattr(check.uuid, "uuid4", lambda: SimpleNamespace(hex="gpu-check-that-hangs"))
    monkeypatch.setattr("tiny_runs.MARK", check.MARK)
    code = """
subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"],
                 start_new_session=True)
time.sleep(600)
"""
    started = time.monotonic()
    first, second = check.run_section("speed", section(tmp_path, code), tmp_path, limit_s=3)
    assert time.monotonic() - started < 60
    assert (first.what, first.result, first.state) == ("first step", "fine", "ok")
    assert (second.what, second.result, second.state) == ("second step", "ran past its limit of 3 s", "failed")
    assert processes_with("gpu-check-that-hangs") == []


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("raise SystemExit('the driver is gone')", "ended with code 1: the driver is gone"),
        ("os.abort()", "ended with code -6"),
    ],
)
def test_a_section_that_dies_is_reported_with_its_last_words(code, problem, check, tmp_path):
    *_, last = check.run_section("speed", section(tmp_path, code), tmp_path, limit_s=60)
    assert (last.what, last.state) == ("second step", "failed")
    assert last.result.startswith(problem)


def test_no_section_begins_when_the_time_is_over(check, tmp_path):
    (row,) = check.run_section("speed", ["does-not-exist"], tmp_path, limit_s=-1)
    assert row.state == "failed" and "not run" in row.result


def test_a_step_that_fails_is_noted_with_its_first_line_and_the_next_follows(sections, tmp_path):
    check = sections.Check("speed", "cpu", True, tmp_path)

    def broken():
        raise ValueError("no kernel\nfor this")

    def left_out():
        raise sections.Skipped("one GPU here")

    check.step("broken", broken)
    check.step("command", lambda: check.command("-c", "print('error: no such option'); raise SystemExit(2)"))
    check.step("left out", left_out)
    check.step("fine", lambda: ("1.2 times as fast", "| a table |"))
    rows = [json.loads(line) for line in (tmp_path / "speed.jsonl").read_text().splitlines()]
    assert [(row["what"], row["result"], row["state"]) for row in rows] == [
        ("broken", "ValueError: no kernel", "failed"),
        ("command", "exit code 2: error: no such option", "failed"),
        ("left out", "one GPU here", "skipped"),
        ("fine", "1.2 times as fast", "ok"),
    ]
    assert "Traceback" in rows[0]["detail"] and "error: no such option" in rows[1]["detail"]
    assert rows[3]["detail"] == "| a table |"


def test_a_failure_is_the_exit_code_and_in_the_report(check, tmp_path, monkeypatch, capsys):
    def run_section(name, command, folder, limit_s):
        assert limit_s > 0
        return [check.Row(name, f"{folder}/x | y", "failed" if name == "ranks" else "ok", 1.0, "more")]

    monkeypatch.setattr(check, "run_section", run_section)
    monkeypatch.setattr(check, "described", lambda device: "CPU")
    report = tmp_path / "new" / "report.md"
    assert check.main(["--device", "cpu", "--only", "norms", "--output", str(report)]) == 0
    assert check.main(["--device", "cpu", "--only", "norms", "ranks", "--output", str(report)]) == 1
    assert "failed  ranks" in capsys.readouterr().out
    text = report.read_text()
    assert table(text) == [
        ["norms", "norms", "FOLDER/x / y", "1.0"],
        ["ranks", "ranks", "**failed**: FOLDER/x / y", "1.0"],
    ]
    assert "2 steps in 0 s, 1 failed" in text
    assert "## ranks: ranks through the launcher\n\nranks:\n\nmore" in text


def test_goals_are_missed_on_a_gpu_only(sections, tmp_path):
    on_gpu, on_cpu = (sections.Check("speed", device, True, tmp_path) for device in ("cuda", "cpu"))
    assert [on_gpu.goal(value, 0.95) for value in (0.95, 0.94)] == ["goal 0.95", "goal 0.95, **missed**"]
    assert on_cpu.goal(0.1, 0.95) == "goal 0.95"


def test_idle_gaps_are_the_times_without_any_work(sections):
    # Two streams: b runs within a, c begins before a ends, then nothing for 5; d ends before e begins.
    work = [(20, 24, "d"), (0, 10, "a"), (2, 4, "b"), (8, 15, "c"), (25, 30, "e")]
    assert sections.idle_gaps(work) == (30, [(5, "c", "d"), (1, "d", "e")])
    assert sections.idle_gaps([]) is None


JUNIT = """<testsuites><testsuite>
<testcase name="test_a_thing[one]" time="1.5"/><testcase name="test_a_thing[two]" time="0.5"/>
<testcase name="test_a_thing[three]" time="0"><skipped message="no bfloat16"/></testcase>
<testcase name="test_another[x]" time="2">
<failure message="assert 1 == 2&#10;more">line\nE  assert 1 == 2</failure></testcase>
<testcase name="test_another[y]" time="1"/>
<testcase name="test_last" time="0"><skipped message="needs a GPU"/></testcase>
</testsuite></testsuites>"""


def test_tests_are_reported_by_function(sections, tmp_path):
    (tmp_path / "tests.xml").write_text(JUNIT)
    rows = sections.test_rows(tmp_path / "tests.xml")
    assert [(row.what, row.result, row.state, row.seconds) for row in rows] == [
        ("a thing", "2 passed, 1 skipped", "ok", 2.0),
        ("another", "test_another[x]: assert 1 == 2 (1 failed, 1 passed)", "failed", 3.0),
        ("last", "needs a GPU (1 skipped)", "skipped", 0.0),
    ]
    assert "E  assert 1 == 2" in rows[1].detail
