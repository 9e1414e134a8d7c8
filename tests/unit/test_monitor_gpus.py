"""GPU use as nvidia-smi tells it: a script in its place that answers, hangs, fails or prints rubbish."""

import json
import os
import socket
import time

import numpy as np
import pytest
from monitor_runs import epoch_record, healthy_losses, write_run

from orion_unet.cli.monitor import main
from orion_unet.monitor import gpus as module
from orion_unet.monitor.all_runs import AllRuns
from orion_unet.monitor.diagnostics import Thresholds
from orion_unet.monitor.gpus import Gpu, Gpus, busiest, parsed, summary
from orion_unet.monitor.liveness import process_lives
from orion_unet.monitor.page import page
from orion_unet.monitor.report import Run

ANSWER = "0, NVIDIA H100 80GB HBM3, 31, 11264, 81559\n1, NVIDIA H100 80GB HBM3, 7, 4, 81559\n"


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """Puts a script in the place of nvidia-smi, and counts how often it was started."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def put(body):
        script = folder / "nvidia-smi"
        script.write_text(f"#!/bin/sh\necho x >> {folder}/calls\n{body}\n")
        script.chmod(0o755)

    put.calls = lambda: len((folder / "calls").read_text().split()) if (folder / "calls").exists() else 0
    return put


def says(text):
    return f"cat <<'END'\n{text}END"


def write_gpu_run(folder, waits=(0.4, 0.45, 0.41), world_size=1, device="1 x NVIDIA H100 80GB HBM3", **status):
    """A run that goes on on this machine, in this process, and waits for its data."""
    train, val = healthy_losses(len(waits))
    given = {"state": "training", "host": socket.gethostname(), "pid": os.getpid(), **status}
    write_run(folder, train, val, **given)
    records = [
        epoch_record(e, t, v) | {"data_wait_fraction": wait}
        for e, (t, v, wait) in enumerate(zip(train, val, waits, strict=True), 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = json.loads((folder / "config.json").read_text())
    config |= {"device": device, "world_size": world_size, "loader_processes": 2, "usable_cores": 16}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_answer_is_read_in_the_units_of_nvidia_smi():
    first, second = parsed(ANSWER.encode())
    assert first == Gpu(0, "NVIDIA H100 80GB HBM3", 0.31, 1, 11264 * 2**20, 81559 * 2**20)
    assert second.busy == 0.07
    assert first.text() == "GPU 0 31 % busy, 11 of 79.6 GiB"
    # A partitioned GPU gives no utilisation, and a name may contain a comma.
    (odd,) = parsed(b"3, A, B, [N/A], 5, 1024")
    assert (odd.name, np.isnan(odd.busy), odd.text()) == ("A,B", True, "GPU 3, 0.00488 of 1 GiB")
    assert odd.document()["busy"] is None


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"No devices were found\n",
        b"NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n",
        b"0, x, 31\n",
        b"x, y, 1, 2, 3\n",
        b"0, x, 1, 2, nan\n",
        b"0, x, 1, 2, 1e300\n",
        "٣, x, 1, 2, 3\n".encode(),
        b"\xff\xfe\x00" * 100,
        b"0, x, 31, 1, 2\n<html>\n",
    ],
)
def test_rubbish_is_no_answer(answer):
    assert parsed(answer) == []


def test_a_busier_gpu_than_the_runs_own_cannot_be_left_out_and_many_are_a_range():
    many = [Gpu(at, "x", busy, 1, 2**30 * (at + 1), 80 * 2**30) for at, busy in enumerate((0.1, 0.9, np.nan, 0.5))]
    assert [gpu.index for gpu in busiest(many, 2)] == [1, 3]
    assert summary(many) == "4 GPUs 10 to 90 % busy, 1.0 to 4.0 of 80.0 GiB each"


def test_report_page_and_warning_show_how_busy_the_gpus_are(tmp_path, smi, capsys):
    smi(says(ANSWER))
    folder = write_gpu_run(tmp_path / "run")
    assert main(["--output_dir", str(folder)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "GPU 0 31 % busy, 11 of 79.6 GiB | GPU 1 7 % busy, 0.00391 of 79.6 GiB" in text
    assert "in the last two epochs; the busiest GPU is busy 31 % of the time (nvidia-smi, 1 look)" in text
    document = json.loads((folder / "monitor.json").read_text())
    assert [gpu["busy"] for gpu in document["gpus"]] == [0.31, 0.07]
    found = Run(folder, Thresholds()).poll()
    assert "<td>GPU 0 31 % busy, 11 of 79.6 GiB | GPU 1" in page(found, b"")
    both = Run(write_gpu_run(tmp_path / "both", world_size=2), Thresholds()).poll()
    assert "; its GPUs are busy 31 %, 7 % of the time" in both.findings[0].message


@pytest.mark.parametrize(
    "other", [{"host": "elsewhere"}, {"state": "finished"}, {"device": "CPU (2 threads)"}, {"device": ["x"]}]
)
def test_gpus_of_another_machine_or_of_a_run_without_them_are_not_asked_for(tmp_path, smi, other):
    smi(says(ANSWER))
    found = Run(write_gpu_run(tmp_path / "run", **other), Thresholds()).poll()
    assert (list(found.gpus), smi.calls()) == ([], 0)
    assert "nvidia-smi" not in "".join(finding.message for finding in found.findings)


def test_it_is_asked_once_an_interval_even_for_many_runs_and_looks_are_averaged(tmp_path, smi, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    smi(says(ANSWER))
    for name in "abc":
        write_gpu_run(tmp_path / "runs" / name)
    runs = AllRuns(tmp_path / "runs", Thresholds(), 10.0)
    rows = runs.poll()
    assert all("busiest GPU is busy 31 %" in row.report.findings[0].message for row in rows)
    assert smi.calls() == 1
    now[0] += 5
    runs.poll()
    assert smi.calls() == 1
    smi(says(ANSWER.replace(", 31,", ", 61,")))
    now[0] += 5
    assert "busy 46 % of the time (nvidia-smi, 2 looks)" in runs.poll()[0].report.findings[0].message
    assert smi.calls() == 2


@pytest.mark.parametrize(
    "body",
    [
        "exit 9",
        says(ANSWER) + "\nexit 6",
        "echo No devices were found",
        "head -c 10000000 /dev/zero",
        "yes '0, x, 1, 2, 3'",
        "kill -9 $$",
    ],
)
def test_a_failure_or_rubbish_shows_no_gpus_and_is_not_asked_again_for_long(smi, body):
    smi(body)
    gpus = Gpus(0.0)
    begun = time.monotonic()
    assert gpus.read() == []
    assert time.monotonic() - begun < 1.5
    gpus._asked_at -= 100
    assert gpus.read() == [] and smi.calls() == 1
    gpus._not_before -= module.PAUSE_S
    smi(says(ANSWER))
    gpus._asked_at -= 100
    assert len(gpus.read()) == 2


def test_one_that_hangs_is_left_after_two_seconds_with_what_it_has_started(tmp_path, smi):
    smi(f"sleep 300 & echo $! > {tmp_path}/child; wait")
    folder = write_gpu_run(tmp_path / "run")
    run = Run(folder, Thresholds())
    begun = time.monotonic()
    found = run.poll()
    assert 1.9 < time.monotonic() - begun < 4
    assert (list(found.gpus), found.findings[0].code) == ([], "starving")
    child = int((tmp_path / "child").read_text())
    for _ in range(100):
        if not process_lives(child, None):
            break
        time.sleep(0.02)
    else:
        pytest.fail("what nvidia-smi had started goes on")
    begun = time.monotonic()
    run.poll()
    assert time.monotonic() - begun < 0.5
    assert smi.calls() == 1


def test_one_that_closes_its_output_and_goes_on_is_ended_too(smi):
    smi("exec >&-; sleep 300")
    begun = time.monotonic()
    assert Gpus().read() == []
    assert 1.9 < time.monotonic() - begun < 4


def test_without_one_nothing_is_started(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(module.subprocess, "Popen", lambda *words, **more: pytest.fail("a process was started"))
    found = Run(write_gpu_run(tmp_path / "run"), Thresholds()).poll()
    assert list(found.gpus) == [] and "nvidia-smi" not in found.findings[0].message


def test_a_file_of_that_name_that_is_no_program_is_no_answer(tmp_path, smi):
    smi("")
    (tmp_path / "bin" / "nvidia-smi").write_bytes(b"\x7fELF rubbish")
    assert Gpus().read() == []
