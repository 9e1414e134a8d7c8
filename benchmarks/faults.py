"""Does a run survive kills, full disks, bad numbers and dying ranks? Uses real processes and signals, no hooks.

    python benchmarks/faults.py                 every case, 50 kills; writes benchmarks/results/faults.md
    python benchmarks/faults.py --kills 3 --only kills,damaged --no_write

Each case trains a tiny network on generated pairs in a temporary folder, breaks the run, and checks what is left of it.
Exit code 1 if a run does not survive.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
TRAINER = ROOT / "train_spatial_orion_unet.py"
DEADLINE_S = 120
TINY = [
    *("--patch_size", "32", "--base_features", "4", "--depth", "1", "--batch_size", "4", "--val_batch_size", "8"),
    *("--learning_rate", "1e-3", "--gpus", "0", "--num_workers", "1", "--dropout", "0.1", "--ema_decay", "0.9"),
    *("--sanity_check_freq", "0", "--early_stopping_patience", "0"),
]


def make_pairs(folder: Path, dtype: str = "uint8", cores: int = 4) -> Path:
    """Small random pairs with something to learn: the markers are functions of the H&E."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for core in range(cores):
        he = rng.random((64, 64, 3))
        orion = np.stack([he[..., 0] * he[..., 1], 1 - he[..., 2]], axis=-1)
        scale = 255 if dtype == "uint8" else 1
        np.save(folder / f"core_{core}_HE.npy", (he * scale).astype(dtype))
        np.save(folder / f"core_{core}_ORION.npy", (orion * scale).astype(dtype))
    return folder


class Training:
    """A training process, or a launcher with its ranks."""

    def __init__(self, pairs: Path, run: Path, *options: str, ranks: int = 1, epochs: int = 4) -> None:
        self.run = run
        command = [sys.executable, str(TRAINER), "--pairs_dir", str(pairs), "--output_dir", str(run)]
        if ranks > 1:
            command[1:2] = ["-m", "orion_unet.cli.launch", "--standalone", "--nproc_per_node", str(ranks), str(TRAINER)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            [*command, *TINY, "--epochs", str(epochs), *options],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True,
        )  # fmt: skip

    def wait(self) -> tuple[int, str]:
        """Exit code and output. Kills a process that exceeds the deadline and raises AssertionError."""
        try:
            output, _ = self.process.communicate(timeout=DEADLINE_S)
        except subprocess.TimeoutExpired:
            self.kill_all()
            output, _ = self.process.communicate()
            raise AssertionError(f"still running after {DEADLINE_S} s:\n{output}") from None
        return self.process.returncode, output

    def kill_all(self) -> None:
        """SIGKILL for the whole process group."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def wait_for_training(self, line: int = 0) -> None:
        """Return once this process is training and metrics.jsonl has ``line`` lines."""
        while time.monotonic() - self.started < DEADLINE_S and self.process.poll() is None:
            status = read_status(self.run)
            mine = status.get("pid") in {self.process.pid, *children(self.process.pid)}
            if mine and status.get("state") in ("training", "validating") and len(records(self.run)) >= line:
                return
            time.sleep(0.01)


def children(pid: int) -> list[int]:
    """Direct child processes."""
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def read_status(run: Path) -> dict[str, Any]:
    """Content of status.json; empty if it cannot be read."""
    try:
        return dict(json.loads((run / "status.json").read_text()))
    except (OSError, ValueError):
        return {}


def records(run: Path) -> list[dict[str, Any]]:
    """Complete lines of metrics.jsonl."""
    try:
        lines = (run / "metrics.jsonl").read_text().split("\n")[:-1]
    except OSError:
        return []
    return [json.loads(line) for line in lines if line]


def assert_equal_runs(run: Path, straight: Path) -> None:
    """Check that final weights, averages and every logged loss equal those of the uninterrupted run."""
    ours, theirs = (torch.load(path / "checkpoints" / "last.pt", weights_only=True) for path in (run, straight))
    for part in (lambda c: c["model"], lambda c: c["ema"]["model"]):
        for name, tensor in part(theirs).items():
            assert torch.equal(part(ours)[name], tensor), f"{name} differs"
    latest = {record["epoch"]: record for record in records(run)}
    assert sorted(latest) == [record["epoch"] for record in records(straight)], "an epoch is missing"
    for record in records(straight):
        mine = latest[record["epoch"]]
        for side in ("train", "val"):
            assert mine[side] == record[side], f"epoch {record['epoch']}: {side} differs"
    assert [record["attempt"] for record in records(run)] == sorted(record["attempt"] for record in records(run))


def assert_nothing_left(run: Path) -> None:
    """Check that no temporary file, no lock and no process with the run folder on its command line is left."""
    left = [*run.glob(".*"), *run.glob("checkpoints/.*"), *run.glob("run.lock")]
    assert not left, f"left over: {left}"
    for _ in range(100):
        if not processes_of(run):
            return
        time.sleep(0.1)
    raise AssertionError(f"still alive: {processes_of(run)}")


def processes_of(run: Path) -> list[str]:
    """Command lines of processes that name the run folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if str(run) in words:
            found.append(" ".join(words))
    return found


def finish(pairs: Path, run: Path, *options: str, ranks: int = 1, epochs: int = 4) -> str:
    """Train to the end; returns the output."""
    code, output = Training(pairs, run, *options, ranks=ranks, epochs=epochs).wait()
    assert code == 0, f"exit code {code}:\n{output}"
    return output


def case_kills(folder: Path, kills: int) -> str:
    """SIGKILL at random moments of one training, also during saves; then equality with the uninterrupted run."""
    pairs, rng = make_pairs(folder / "pairs"), random.Random(0)
    epochs = max(6, kills // 2)
    saving = ("--save_every_minutes", "0.001", "--resume", "auto")
    finish(pairs, folder / "straight", epochs=epochs)
    run, done, midway, between = folder / "run", 0, 0, 0
    while done < kills:
        training = Training(pairs, run, *saving, epochs=epochs)
        training.wait_for_training()
        # Short lives, so that the training does not end before the last kill.
        time.sleep(rng.random() * 0.35)
        if training.process.poll() is not None:
            training.wait()
            break
        training.kill_all()
        training.wait()
        done += 1
        midway += any(run.glob("checkpoints/.*"))
        between += not (run / "checkpoints" / "last.pt").exists()
    finish(pairs, run, *saving, epochs=epochs)
    assert_equal_runs(run, folder / "straight")
    assert_nothing_left(run)
    assert done >= kills, f"the training ended after {done} kills of {kills}"
    return f"{done} kills ({midway} in the middle of a save), {epochs} epochs, weights and losses equal"


def case_two_ranks(folder: Path, kills: int) -> str:
    """SIGKILL to either rank, and SIGTERM to the launcher: all ranks end, and the resumed run ends the same."""
    pairs = make_pairs(folder / "pairs")
    finish(pairs, folder / "straight", ranks=2, epochs=12)
    run, outcomes = folder / "run", []
    for victim in (0, 1, None):
        training = Training(pairs, run, "--resume", "auto", ranks=2, epochs=12)
        training.wait_for_training(line=len(records(run)) + 1)
        ranks = children(training.process.pid)
        began = time.monotonic()
        if victim is None:
            training.process.terminate()
        else:
            os.kill(sorted(ranks)[victim], signal.SIGKILL)
        code, output = training.wait()
        took = time.monotonic() - began
        assert took < 30, f"took {took:.0f} s to end"
        assert code == (143 if victim is None else 1), f"exit code {code}:\n{output}"
        for _ in range(100):
            if not processes_of(run):
                break
            time.sleep(0.1)
        assert not processes_of(run), "ranks are left"
        outcomes.append(f"{'SIGTERM' if victim is None else f'rank {victim} killed'}: exit {code} in {took:.1f} s")
    finish(pairs, run, "--resume", "auto", ranks=2, epochs=12)
    assert_equal_runs(run, folder / "straight")
    assert_nothing_left(run)
    return "; ".join(outcomes) + "; then equal to the uninterrupted run"


def case_launcher(folder: Path, kills: int) -> str:
    """The shell launcher with two ranks: SIGTERM, then --resume auto."""
    pairs, run = make_pairs(folder / "pairs"), folder / "run"
    environment = {**os.environ, "NPROC_PER_NODE": "2", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = ["./train_stable_learning.sh", "--pairs_dir", str(pairs), "--output_dir", str(run), *TINY]
    command += ["--epochs", "12", "--resume", "auto"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        for _ in range(DEADLINE_S * 20):
            if len(records(run)) >= 2:
                break
            time.sleep(0.05)
        process.terminate()
        code = process.wait(DEADLINE_S)
        assert code == 143, f"exit code {code}"
        assert read_status(run)["state"] == "interrupted"
        code = subprocess.run(command, cwd=ROOT, env=environment, timeout=DEADLINE_S, capture_output=True).returncode
        assert code == 0, f"exit code {code}"
        assert [record["epoch"] for record in records(run)] == list(range(1, 13))
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert_nothing_left(run)
    return "exit 143, state interrupted; the same command resumes and reaches epoch 12"


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


def case_full_disk(folder: Path, kills: int) -> str:
    """A disk that fills up during training: plain message, exit 1, and a checkpoint that loads."""
    pairs = make_pairs(folder / "pairs")
    with small_disk(folder / "disk", "2m") as disk:
        training = Training(pairs, disk / "run", epochs=2000)
        training.wait_for_training(line=3)
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
        usable = [load(disk / "run" / "checkpoints" / name) for name in ("last.pt", "last_previous.pt")]
        assert any(usable), "no checkpoint loads"
    return f"exit 1: {output.strip().splitlines()[-1].replace(str(folder), '…')}"


def case_read_only(folder: Path, kills: int) -> str:
    """A disk that turns read-only during training."""
    pairs = make_pairs(folder / "pairs")
    with small_disk(folder / "disk", "8m") as disk:
        training = Training(pairs, disk / "run", epochs=2000)
        training.wait_for_training(line=3)
        for _ in range(200):
            # Refused while a file is open for writing.
            if subprocess.run(["mount", "-o", "remount,ro", str(disk)], capture_output=True).returncode == 0:
                break
        code, output = training.wait()
        assert code == 1 and "Traceback" not in output, f"exit code {code}:\n{output}"
        assert load(disk / "run" / "checkpoints" / "best.pt"), "best.pt does not load"
    return "exit 1, plain message, checkpoints load"


def case_file_size(folder: Path, kills: int) -> str:
    """A limit on file size below that of a checkpoint, while a run is being resumed."""
    pairs, run = make_pairs(folder / "pairs"), folder / "run"
    finish(pairs, run, epochs=2)
    before = (run / "checkpoints" / "last.pt").read_bytes()
    limited = f"ulimit -f 16; exec {sys.executable} {TRAINER} --pairs_dir {pairs} --output_dir {run} "
    limited += " ".join(TINY) + " --epochs 4 --resume auto"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-c", limited], capture_output=True, text=True, timeout=DEADLINE_S, env=environment)
    assert done.returncode == 1 and "Traceback" not in done.stderr, f"exit code {done.returncode}:\n{done.stderr}"
    assert (run / "checkpoints" / "last.pt").read_bytes() == before, "last.pt has changed"
    finish(pairs, run, "--resume", "auto", epochs=4)
    assert_nothing_left(run)
    return "exit 1, last.pt unchanged; without the limit the run resumes"


def load(path: Path) -> bool:
    """Whether a checkpoint loads."""
    try:
        return bool(torch.load(path, weights_only=True))
    except (OSError, RuntimeError, EOFError):
        return False


def case_bad_numbers(folder: Path, kills: int) -> str:
    """NaN appears in the files during training: steps are skipped, and ten in a row end the run with exit code 3."""
    pairs, run = make_pairs(folder / "pairs", "float32"), folder / "run"
    training = Training(pairs, run, epochs=2000)
    training.wait_for_training(line=2)
    for path in pairs.glob("*_HE.npy"):
        np.load(path, mmap_mode="r+")[:] = np.nan
    code, output = training.wait()
    assert code == 3, f"exit code {code}:\n{output}"
    assert read_status(run)["state"] == "diverged" and "step skipped; cores in the batch: core_" in output, output
    for name in ("best.pt", "last.pt"):
        model = torch.load(run / "checkpoints" / name, weights_only=True)["model"]
        assert all(tensor.isfinite().all() for tensor in model.values()), f"{name} is not finite"
    assert_nothing_left(run)
    return "exit 3, state diverged, core and term named, best.pt and last.pt finite"


def case_two_writers(folder: Path, kills: int) -> str:
    """A second run in the folder of a live one is refused; a run takes over the lock of a dead one."""
    pairs, run = make_pairs(folder / "pairs"), folder / "run"
    first = Training(pairs, run, epochs=2000)
    first.wait_for_training(line=1)
    code, output = Training(pairs, run, "--resume", "auto", epochs=2000).wait()
    assert code == 2 and "another run is writing there" in output, f"exit code {code}:\n{output}"
    assert first.process.poll() is None, "the first run has ended"
    first.kill_all()
    first.wait()
    assert (run / "run.lock").exists()
    finish(pairs, run, "--resume", "auto", epochs=max(record["epoch"] for record in records(run)) + 2)
    assert_nothing_left(run)
    return "second run: exit 2; the lock of the dead run is taken over"


def case_damaged(folder: Path, kills: int) -> str:
    """A truncated last.pt: the run falls back to the one before it and ends like the uninterrupted run."""
    pairs, run = make_pairs(folder / "pairs"), folder / "run"
    finish(pairs, folder / "straight", epochs=4)
    finish(pairs, run, epochs=3)
    last = run / "checkpoints" / "last.pt"
    last.write_bytes(last.read_bytes()[:1000])
    output = finish(pairs, run, "--resume", "auto", epochs=4)
    assert "warning" in output and "last_previous.pt" in output, output
    assert_equal_runs(run, folder / "straight")
    return "falls back to last_previous.pt with a warning, and ends like the uninterrupted run"


CASES: dict[str, Callable[[Path, int], str]] = {
    "kills": case_kills,
    "two_ranks": case_two_ranks,
    "launcher": case_launcher,
    "full_disk": case_full_disk,
    "read_only": case_read_only,
    "file_size": case_file_size,
    "bad_numbers": case_bad_numbers,
    "two_writers": case_two_writers,
    "damaged": case_damaged,
}


def main() -> int:
    """Run the cases; returns 1 if a run did not survive one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="SIGKILLs in one training; default: 50")
    parser.add_argument("--only", default=",".join(CASES), help="cases, separated by commas; default: all")
    parser.add_argument("--no_write", action="store_true", help="do not write benchmarks/results/faults.md")
    options = parser.parse_args()
    rows, failed = [], False
    for name in options.only.split(","):
        folder = Path(tempfile.mkdtemp(prefix=f"faults_{name}_"))
        began = time.monotonic()
        try:
            outcome, verdict = CASES[name](folder, options.kills), "survived"
        except PermissionError as error:
            outcome, verdict = str(error), "not tried"
        except (AssertionError, subprocess.TimeoutExpired) as error:
            outcome, verdict, failed = str(error), "NOT SURVIVED", True
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        rows.append((name, verdict, outcome, time.monotonic() - began))
        print(f"{name:<12} {verdict:<13} {rows[-1][3]:6.1f} s  {outcome}", flush=True)
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
        what = (CASES[name].__doc__ or "").strip().rstrip(".")
        outcome = " ".join(outcome.split()).replace("|", "\\|")
        lines.append(f"| {name} | {what} | {verdict} | {outcome} | {took:.0f} |")
    (ROOT / "benchmarks" / "results" / "faults.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
