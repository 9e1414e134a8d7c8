"""Does a run survive kills, frozen loaders, full disks, bad numbers and dying ranks? Uses real processes, no hooks.

    python benchmarks/faults.py                 every case, 50 kills; writes benchmarks/results/faults.md
    python benchmarks/faults.py --kills 3 --only kills,damaged --no_write

Each case trains a tiny network on generated pairs in a temporary folder, breaks the run, and checks what is left of it.
Wherever a broken run can go on, it must end with the weights and losses of the uninterrupted run, bit for bit. Exit
code 1 if a run does not survive.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faults_runs import (
    DEADLINE_S,
    LONG,
    ROOT,
    TINY,
    Training,
    assert_equal_runs,
    assert_no_process,
    assert_nothing_left,
    children,
    end_processes,
    finish,
    make_pairs,
    monitor,
    rank_processes,
    read_status,
    records,
    seconds_to_end,
    shared_pairs,
    start_ranks,
    stored,
    straight_run,
)

OFTEN = ("--save_every_minutes", "0.001")
RESUME = ("--resume", "auto")
ISO = "%Y-%m-%dT%H:%M:%SZ"
EQUAL = "then equal to the uninterrupted run"


@dataclass(frozen=True)
class Scale:
    """How much a case does: ``kills`` of one training, and where ``short``, each thing once."""

    kills: int = 50
    short: bool = False


def case_kills(folder: Path, scale: Scale) -> str:
    """SIGKILL at random moments of one training, also during saves"""
    run, rng, midway = folder / "run", random.Random(0), 0
    epochs = max(6, scale.kills)
    for _ in range(scale.kills):
        training = Training(run, *OFTEN, *RESUME, epochs=epochs)
        training.wait_for()
        # Short lives, so that the training does not end before the last kill.
        time.sleep(rng.random() * 0.35)
        assert training.process.poll() is None, "the training has ended before the last kill"
        training.kill()
        training.wait()
        midway += any(run.glob("checkpoints/.*"))
    finish(run, *OFTEN, *RESUME, epochs=epochs)
    assert_equal_runs(run, straight_run(epochs=epochs))
    assert_nothing_left(run)
    return f"{scale.kills} kills ({midway} in the middle of a save), {epochs} epochs; {EQUAL}"


def case_two_ranks(folder: Path, scale: Scale) -> str:
    """Two ranks under the launcher: SIGKILL to one, then to the other, then SIGTERM to the launcher"""
    run, outcomes = folder / "run", []
    for victim in (0, 1, None):
        training = Training(run, *RESUME, ranks=2, epochs=12)
        training.wait_for(line=len(records(run)) + 1)
        if victim is None:
            act = training.process.terminate
        else:
            act = partial(os.kill, rank_processes(training.process.pid)[victim], signal.SIGKILL)
        took, [(code, output)] = seconds_to_end(act, training)
        assert code == (143 if victim is None else 1), f"exit code {code}:\n{output}"
        assert_no_process(run)
        outcomes.append(f"{'SIGTERM' if victim is None else f'rank {victim} killed'}: exit {code} in {took:.1f} s")
    finish(run, *RESUME, ranks=2, epochs=12)
    assert_equal_runs(run, straight_run(ranks=2, epochs=12))
    assert_nothing_left(run)
    return f"{'; '.join(outcomes)}; {EQUAL}"


def case_lost_rank(folder: Path, scale: Scale) -> str:
    """Three ranks without a launcher: SIGKILL to one of them within an epoch, each in turn"""
    run, outcomes, words = folder / "run", [], ""
    for victim in (1,) if scale.short else (1, 0, 2):
        ranks = start_ranks(run, *LONG, *OFTEN, *RESUME, ranks=3)
        wait_for_saves(ranks[0])
        took, ended = seconds_to_end(ranks[victim].process.kill, *ranks)
        for rank, (code, output) in enumerate(ended):
            assert code == (-signal.SIGKILL if rank == victim else 1), f"rank {rank}: exit code {code}:\n{output}"
            if rank != victim:
                words = last_line(output)
                assert "error: lost another rank" in words and "Traceback" not in output, f"rank {rank}:\n{output}"
                assert re.search(r"\(.*(Connection|Broken pipe).*\)$", words), f"not the transport's words: {words}"
        assert_no_process(run)
        if victim == 0:
            # Nobody was left to say that the run failed: the monitor believes it when the heartbeat is late.
            limit = time.monotonic() + 30
            while (state := monitor(run)["state"]) != "crashed":
                assert time.monotonic() < limit, f"the monitor says {state}: {read_status(run)}"
                time.sleep(0.5)
        else:
            status = read_status(run)
            assert status["state"] == "failed" and status["message"].startswith("lost another rank"), status
        outcomes.append(f"rank {victim} killed after {where(run)}: the others exit 1 in {took:.1f} s")
    for training in start_ranks(run, *LONG, *RESUME, ranks=3):
        code, output = training.wait()
        assert code == 0, f"exit code {code}:\n{output}"
    assert_equal_runs(run, straight_run(*LONG, ranks=3))
    assert_nothing_left(run)
    return f"{'; '.join(outcomes)} ({words}); {EQUAL}"


def wait_for_saves(training: Training) -> None:
    """Wait until the training has saved twice, so that it is some steps into an epoch."""
    for _ in range(2):
        before = saved_at(training.run)
        training.until(lambda before=before: saved_at(training.run) > before, "a save")


def saved_at(run: Path) -> int:
    """When last.pt was written [ns]; 0 if there is none."""
    path = run / "checkpoints" / "last.pt"
    return path.stat().st_mtime_ns if path.exists() else 0


def where(run: Path) -> str:
    """Epoch and step of last.pt."""
    state = stored(run)
    assert state is not None, "last.pt does not load"
    return f"epoch {state['epoch'] + 1} step {state['step']}"


def last_line(output: str) -> str:
    """The last line that is not empty."""
    return [line for line in output.splitlines() if line.strip()][-1]


def case_launcher(folder: Path, scale: Scale) -> str:
    """The shell launcher with two ranks: SIGTERM, then the same command again"""
    run = folder / "run"
    environment = {**os.environ, "NPROC_PER_NODE": "2", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = ["./train_stable_learning.sh", "--pairs_dir", str(shared_pairs()), "--output_dir", str(run), *TINY]
    command += ["--epochs", "12", *RESUME]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
    limit = time.monotonic() + DEADLINE_S
    while len(records(run)) < 2:
        assert process.poll() is None and time.monotonic() < limit, "no second epoch"
        time.sleep(0.05)
    process.terminate()
    code = process.wait(DEADLINE_S)
    assert code == 143, f"exit code {code}"
    assert read_status(run)["state"] == "interrupted"
    code = subprocess.run(command, cwd=ROOT, env=environment, timeout=DEADLINE_S, capture_output=True).returncode
    assert code == 0, f"exit code {code}"
    assert_equal_runs(run, straight_run(ranks=2, epochs=12))
    assert_nothing_left(run)
    return f"exit 143, state interrupted; the same command resumes; {EQUAL}"


def case_validation(folder: Path, scale: Scale) -> str:
    """SIGTERM in the middle of a validation"""
    return interrupt_validation(folder / "run", ranks=1)


def case_validation_two_ranks(folder: Path, scale: Scale) -> str:
    """SIGTERM to the launcher of two ranks in the middle of a validation"""
    return interrupt_validation(folder / "run", ranks=2)


def interrupt_validation(run: Path, ranks: int) -> str:
    """The epoch's training must be kept, its validation done again."""
    training = Training(run, *LONG, ranks=ranks)
    steps = training.wait_for("validating")["steps_per_epoch"]
    took, [(code, output)] = seconds_to_end(training.process.terminate, training)
    assert code == 143, f"exit code {code}:\n{output}"
    status = read_status(run)
    assert status["state"] == "interrupted" and "before its validation" in status["message"], status
    state = stored(run)
    assert state is not None and (state["epoch"], state["step"]) == (0, steps), f"saved: {where(run)}"
    assert records(run) == []
    assert_nothing_left(run)
    finish(run, *LONG, *RESUME, ranks=ranks)
    assert_equal_runs(run, straight_run(*LONG, ranks=ranks))
    assert_nothing_left(run)
    return f"exit 143 in {took:.1f} s, all {steps} steps of the epoch kept and the epoch not counted; {EQUAL}"


def case_hang_up(folder: Path, scale: Scale) -> str:
    """The terminal of a run goes away"""
    return hang_up(folder / "run", ranks=1)


def case_hang_up_two_ranks(folder: Path, scale: Scale) -> str:
    """The terminal of a run of two ranks goes away"""
    return hang_up(folder / "run", ranks=2)


def hang_up(run: Path, ranks: int) -> str:
    """A run whose terminal goes away must save and end."""
    training = Training(run, *LONG, ranks=ranks, on_terminal=True)
    training.wait_for("training")
    took, [(code, _)] = seconds_to_end(training.close_terminal, training)
    assert code == 143 and read_status(run)["state"] == "interrupted", f"exit code {code}: {read_status(run)}"
    assert_nothing_left(run)
    finish(run, *LONG, *RESUME, ranks=ranks)
    assert_equal_runs(run, straight_run(*LONG, ranks=ranks))
    assert_nothing_left(run)
    return f"exit 143 in {took:.1f} s, state interrupted; {EQUAL}"


def case_nohup(folder: Path, scale: Scale) -> str:
    """The terminal of a run that ignores SIGHUP goes away"""
    return go_on_without_terminal(folder, 1, scale)


def case_nohup_two_ranks(folder: Path, scale: Scale) -> str:
    """The terminal of a run of two ranks that ignores SIGHUP goes away"""
    return go_on_without_terminal(folder, 2, scale)


def go_on_without_terminal(folder: Path, ranks: int, scale: Scale) -> str:
    """A run that ignores SIGHUP must go on, also where, unlike under nohup, its output still goes to the terminal."""
    ways = {"trap": ("sh", "-c", "trap '' HUP; exec \"$@\"", "sh"), "nohup": ("nohup",)}
    for name, prefix in list(ways.items())[: 1 if scale.short else None]:
        run = folder / name
        training = Training(run, *LONG, ranks=ranks, prefix=prefix, on_terminal=True)
        training.wait_for()
        training.close_terminal()
        os.killpg(training.process.pid, signal.SIGHUP)
        code, _ = training.wait()
        assert code == 0, f"{name}: exit code {code}: {read_status(run)}"
        assert_equal_runs(run, straight_run(*LONG, ranks=ranks))
        assert_nothing_left(run)
    return f"with trap '' HUP and under nohup it goes on; {EQUAL}"


def case_frozen_loader(folder: Path, scale: Scale) -> str:
    """SIGSTOP to the loader process in the middle of an epoch, then SIGCONT"""
    run, stalled_after_s = folder / "run", 8
    training = Training(run, *LONG, *OFTEN)
    wait_for_saves(training)
    (loader,) = children(training.process.pid)
    frozen = freeze(training, loader)
    later = training.until(partial(written_after, run, frozen["updated"]), "a heartbeat")
    same = ("state", "epoch", "step", "progressed")
    assert [later[name] for name in same] == [frozen[name] for name in same], f"{frozen} became {later}"
    report = training.until(
        lambda: without_progress(monitor(run, "--stalled_after", str(stalled_after_s))), "the monitor's stalled"
    )
    assert [finding["code"] for finding in report["warnings"] if finding["code"] == "stalled"], report
    assert read_status(run)["progressed"] == frozen["progressed"]
    os.kill(loader, signal.SIGCONT)
    code, output = training.wait()
    assert code == 0, f"exit code {code}:\n{output}"
    after = monitor(run)
    assert after["state"] == "finished" and "stalled" not in [finding["code"] for finding in after["warnings"]], after
    assert_equal_runs(run, straight_run(*LONG))
    assert_nothing_left(run)
    return (
        f"the heartbeat goes on and `progressed` does not; the monitor says stalled: “{report['reason']}”; after "
        f"SIGCONT it goes on; {EQUAL}"
    )


def freeze(training: Training, loader: int) -> dict[str, Any]:
    """Stop the loader so that the training waits for it after some steps of an epoch; returns the status of then."""
    while True:
        os.kill(loader, signal.SIGSTOP)
        # By then the steps whose batches were ready are done.
        later = datetime.now(UTC) + timedelta(seconds=2)
        status = training.until(partial(written_after, training.run, f"{later:{ISO}}"), "a heartbeat")
        if status["state"] == "training" and status["step"] < status["steps_per_epoch"] and status["step_s"]:
            return dict(status)
        os.kill(loader, signal.SIGCONT)
        time.sleep(0.05)


def written_after(run: Path, moment: str) -> dict[str, Any] | None:
    """The status, if it was written after this moment (as status.json spells it)."""
    status = read_status(run)
    return status if status.get("updated", "") > moment else None


def without_progress(report: dict[str, Any]) -> dict[str, Any] | None:
    """The monitor's report, if it calls the run stalled although its heartbeat is fresh."""
    return report if report["state"] == "stalled" and "training step" in report["reason"] else None


ELSEWHERE = "import socket; socket.gethostname = lambda: 'elsewhere'"
# The lock stays fresh for 6 s after the trainer's modules are loaded, however long that takes.
SOON_STALE = """
import os, sys, time
from orion_unet.training import run_folder
run = sys.argv[sys.argv.index("--output_dir") + 1]
run_folder.STALE_S = time.time() - os.stat(os.path.join(run, "status.json")).st_mtime + 6
"""


def case_lost_loader(folder: Path, scale: Scale) -> str:
    """SIGKILL to the loader process in the middle of an epoch"""
    run = folder / "run"
    training = Training(run, *LONG, *OFTEN)
    wait_for_saves(training)
    (loader,) = children(training.process.pid)
    took, [(code, output)] = seconds_to_end(partial(os.kill, loader, signal.SIGKILL), training)
    assert code == 1 and "error: a loader process was lost" in output and "Traceback" not in output, output
    assert_nothing_left(run)
    finish(run, *LONG, *RESUME)
    assert_equal_runs(run, straight_run(*LONG))
    return f"exit 1 in {took:.1f} s, plain message; {EQUAL}"


def case_foreign_lock(folder: Path, scale: Scale) -> str:
    """A second run in the folder of a live one on another host; then SIGKILL to that one, and a run in its place"""
    run = folder / "run"
    holder = Training(run, *LONG, *OFTEN, before=ELSEWHERE)
    wait_for_saves(holder)
    # It stays alive, with its heartbeat, for as long as this takes.
    (loader,) = children(holder.process.pid)
    os.kill(loader, signal.SIGSTOP)
    code, output = Training(run, *LONG, *RESUME).wait()
    refusal = f"another run is writing there (process {holder.process.pid} on elsewhere)"
    assert code == 2 and refusal in output, f"exit code {code}:\n{output}"
    assert holder.process.poll() is None, "the holder has ended"
    holder.kill()
    holder.wait()
    killed_in = where(run)
    assert (run / "run.lock").exists()
    output = finish(run, *LONG, *RESUME, before=SOON_STALE)
    waiting = re.search(r"silent for \d+ s; waiting up to \d+ s to take it over", output)
    assert waiting, output
    assert_equal_runs(run, straight_run(*LONG))
    assert_nothing_left(run)
    return (
        f"while the holder lives: exit 2, “{refusal}”; killed in {killed_in}: the next run says “{waiting[0]}”, takes "
        f"the lock over; {EQUAL}"
    )


def case_two_writers(folder: Path, scale: Scale) -> str:
    """A second run in the folder of a live one on this host; then SIGKILL to that one, and a run in its place"""
    run = folder / "run"
    first = Training(run, epochs=2000)
    first.wait_for(line=1)
    code, output = Training(run, *RESUME, epochs=2000).wait()
    assert code == 2 and "another run is writing there" in output, f"exit code {code}:\n{output}"
    assert first.process.poll() is None, "the first run has ended"
    first.kill()
    first.wait()
    assert (run / "run.lock").exists()
    finish(run, *RESUME, epochs=max(record["epoch"] for record in records(run)) + 2)
    assert_nothing_left(run)
    return "second run: exit 2; the lock of the dead run is taken over at once"


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """Mount a tmpfs of this size; raises PermissionError if mounting is not allowed."""
    folder.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        raise PermissionError(f"a small disk cannot be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def case_full_disk(folder: Path, scale: Scale) -> str:
    """A disk that fills up during training"""
    with small_disk(folder / "disk", "2m") as disk:
        training = Training(disk / "run", epochs=2000)
        training.wait_for(line=3)
        try:
            with open(disk / "filler", "wb") as filler:
                while True:
                    filler.write(b"\0" * 4096)
                    filler.flush()
        except OSError:
            pass
        code, output = training.wait()
        assert code == 1 and "Traceback" not in output, f"exit code {code}:\n{output}"
        assert "cannot be written" in output, output
        assert any(stored(disk / "run", name) for name in ("last.pt", "last_previous.pt")), "no checkpoint loads"
    return f"exit 1, a checkpoint loads: {last_line(output).replace(str(folder), '…')}"


def case_read_only(folder: Path, scale: Scale) -> str:
    """A disk that turns read-only during training"""
    with small_disk(folder / "disk", "8m") as disk:
        training = Training(disk / "run", epochs=2000)
        training.wait_for(line=3)
        # Refused while a file is open for writing.
        training.until(
            lambda: subprocess.run(["mount", "-o", "remount,ro", str(disk)], capture_output=True).returncode == 0,
            "the disk turns read-only",
        )
        code, output = training.wait()
        assert code == 1 and "Traceback" not in output, f"exit code {code}:\n{output}"
        assert stored(disk / "run", "best.pt"), "best.pt does not load"
    return "exit 1, plain message, checkpoints load"


def case_file_size(folder: Path, scale: Scale) -> str:
    """A limit on file size below that of a checkpoint"""
    run = folder / "run"
    limited = Training(run, *LONG)
    limited.wait_for("validating")
    before = (run / "checkpoints" / "last.pt").read_bytes()
    limit_file_size(limited.process.pid)
    code, output = limited.wait()
    assert code == 1 and "Traceback" not in output, f"exit code {code}:\n{output}"
    assert re.search(r"error: \S+\.pt: cannot be written", output), output
    assert (run / "checkpoints" / "last.pt").read_bytes() == before, "last.pt has changed"
    finish(run, *LONG, *RESUME)
    assert_equal_runs(run, straight_run(*LONG))
    assert_nothing_left(run)
    return f"exit 1, plain message, last.pt unchanged; without the limit the run resumes; {EQUAL}"


def case_rank_0_cannot_save(folder: Path, scale: Scale) -> str:
    """Two ranks under the launcher, and a limit on file size for rank 0 alone"""
    run = folder / "run"
    training = Training(run, *LONG, ranks=2)
    training.wait_for("training")
    first = rank_processes(training.process.pid)[0]
    took, [(code, output)] = seconds_to_end(partial(limit_file_size, first), training)
    message = re.search(r"^error: (\S+/checkpoints/\S+: cannot be written \(.*\))", output, re.MULTILINE)
    assert code == 1 and message and "Traceback" not in output, f"exit code {code}:\n{output}"
    assert message[1] in read_status(run)["message"], read_status(run)
    assert_nothing_left(run)
    outcome = f"all ranks end within {took:.1f} s, exit 1: {message[1].replace(str(folder), '…')}"
    if scale.short:
        return outcome
    finish(run, *LONG, *RESUME, ranks=2)
    assert_equal_runs(run, straight_run(*LONG, ranks=2))
    assert_nothing_left(run)
    return f"{outcome}; {EQUAL}"


def limit_file_size(pid: int) -> None:
    """Let a process write no file longer than 16 KiB, which a checkpoint is."""
    _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (16384, hard))


def case_bad_numbers(folder: Path, scale: Scale) -> str:
    """NaN appears in the files during training"""
    pairs, run = make_pairs(folder / "pairs", "float32"), folder / "run"
    training = Training(run, pairs=pairs, epochs=2000)
    training.wait_for(line=2)
    for path in pairs.glob("*_HE.npy"):
        np.load(path, mmap_mode="r+")[:] = np.nan
    code, output = training.wait()
    assert code == 3, f"exit code {code}:\n{output}"
    assert read_status(run)["state"] == "diverged" and "step skipped; cores in the batch: core_" in output, output
    for name in ("best.pt", "last.pt"):
        state = stored(run, name)
        assert state is not None and all(tensor.isfinite().all() for tensor in state["model"].values()), name
    assert_nothing_left(run)
    return "steps skipped, after ten in a row exit 3, state diverged, core and term named, best.pt and last.pt finite"


def case_damaged(folder: Path, scale: Scale) -> str:
    """SIGKILL, and last.pt cut short"""
    run = folder / "run"
    training = Training(run, *LONG, *OFTEN)
    wait_for_saves(training)
    training.kill()
    training.wait()
    last = run / "checkpoints" / "last.pt"
    last.write_bytes(last.read_bytes()[:1000])
    output = finish(run, *LONG, *RESUME)
    assert "warning" in output and "last_previous.pt" in output, output
    assert_equal_runs(run, straight_run(*LONG))
    assert_nothing_left(run)
    return f"falls back to last_previous.pt with a warning; {EQUAL}"


CASES: dict[str, Callable[[Path, Scale], str]] = {
    name.removeprefix("case_"): case for name, case in list(globals().items()) if name.startswith("case_")
}


def run_case(name: str, folder: Path, scale: Scale) -> str:
    """Run one case in a folder of its own, of which no process is left; returns the outcome.

    Raises AssertionError if the run has not survived, PermissionError if this machine does not allow the case.
    """
    try:
        return CASES[name](folder, scale)
    finally:
        end_processes(folder)


def main() -> int:
    """Run the cases; returns 1 if a run did not survive one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="SIGKILLs in one training; default: 50")
    parser.add_argument("--only", default=",".join(CASES), help="cases, separated by commas; default: all")
    parser.add_argument("--no_write", action="store_true", help="do not write benchmarks/results/faults.md")
    options = parser.parse_args()
    # Under nohup, every run would inherit that it is to ignore a terminal that goes away.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    rows, failed = [], False
    for name in options.only.split(","):
        folder = Path(tempfile.mkdtemp(prefix=f"faults_{name}_"))
        began = time.monotonic()
        try:
            outcome, verdict = run_case(name, folder, Scale(options.kills)), "survived"
        except PermissionError as error:
            outcome, verdict = str(error), "not tried"
        except (AssertionError, subprocess.TimeoutExpired) as error:
            outcome, verdict, failed = str(error), "NOT SURVIVED", True
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        rows.append((name, verdict, outcome, time.monotonic() - began))
        print(f"{name:<19} {verdict:<13} {rows[-1][3]:6.1f} s  {outcome}", flush=True)
    if not options.no_write:
        write_results(rows, options.kills)
    return int(failed)


def write_results(rows: list[tuple[str, str, str, float]], kills: int) -> None:
    """Write the table of cases and verdicts."""
    lines = [
        "# Faults that a run survives",
        "",
        f"`python benchmarks/faults.py --kills {kills}`, {os.cpu_count()} CPU cores, {platform.system()}, Python "
        f"{platform.python_version()}, torch {torch.__version__}.",
        "",
        "| case | what was done | verdict | outcome | time (s) |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, verdict, outcome, took in rows:
        what = (CASES[name].__doc__ or "").strip()
        outcome = " ".join(outcome.split()).replace("|", "\\|")
        lines.append(f"| {name} | {what} | {verdict} | {outcome} | {took:.0f} |")
    (ROOT / "benchmarks" / "results" / "faults.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
