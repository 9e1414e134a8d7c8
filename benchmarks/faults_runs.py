"""Trainings of the fault benchmark as real processes, and what must be true of what they leave behind."""

from __future__ import annotations

import atexit
import json
import os
import pty
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache, wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
TRAINER = ROOT / "train_spatial_orion_unet.py"
# A machine busy with other work takes several times as long as a quiet one.
DEADLINE_S = 300
# "Within seconds": what a run may take to end once it is asked to or has lost a rank. The next longer limit of the
# toolkit is that of its watchdog, 540 s.
SOON_S = 60
TINY = [
    *("--patch_size", "32", "--base_features", "4", "--depth", "1", "--batch_size", "4", "--val_batch_size", "8"),
    *("--learning_rate", "1e-3", "--gpus", "0", "--num_workers", "1", "--dropout", "0.1", "--ema_decay", "0.9"),
    *("--sanity_check_freq", "0", "--early_stopping_patience", "0"),
]
# 90 steps an epoch and 81 batches to validate: enough to be hit in the middle of either.
LONG = ["--patches_per_image", "120", "--patches_per_image_val", "0", "--grid_stride", "4", "--val_batch_size", "1"]
LONG_EPOCHS = 2


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


def once(make: Callable[..., Path]) -> Callable[..., Path]:
    """functools.cache, but a value that several threads ask for is made only once."""
    cached, lock = cache(make), threading.Lock()

    @wraps(make)
    def get(*words: str, **how: int) -> Path:
        with lock:
            return cached(*words, **how)

    return get


@once
def shared_folder() -> Path:
    """A folder for what several cases use; removed when this process ends."""
    folder = Path(tempfile.mkdtemp(prefix="faults_shared_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@once
def shared_pairs() -> Path:
    """Pairs for every case that does not change them."""
    return make_pairs(shared_folder() / "pairs")


@once
def straight_run(*options: str, ranks: int = 1, epochs: int = LONG_EPOCHS) -> Path:
    """The run folder of an uninterrupted training, made once for all cases that compare with it."""
    run = shared_folder() / f"straight_{len(list(shared_folder().iterdir()))}"
    finish(run, *options, ranks=ranks, epochs=epochs)
    return run


class Training:
    """A training process, or a launcher with its ranks.

    ``before`` is Python code that runs in the process before the trainer's own, ``prefix`` the words of a command that
    starts it, in the folder above the run's. With ``on_terminal`` it has a terminal, which ``close_terminal`` takes
    away, as when an ssh connection is lost; ``wait`` then returns no output.
    """

    def __init__(
        self,
        run: Path,
        *options: str,
        pairs: Path | None = None,
        ranks: int = 1,
        epochs: int = LONG_EPOCHS,
        before: str = "",
        prefix: tuple[str, ...] = (),
        on_terminal: bool = False,
    ) -> None:
        self.run = run
        start = [str(TRAINER)]
        if before:
            start = ["-c", f"{before}\nimport runpy\nrunpy.run_path({str(TRAINER)!r}, run_name='__main__')"]
        if ranks > 1:
            start[:0] = ["-m", "orion_unet.cli.launch", "--standalone", "--nproc_per_node", str(ranks)]
        words = ["--pairs_dir", str(pairs or shared_pairs()), "--output_dir", str(run), "--epochs", str(epochs)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self._gone = threading.Event()
        self._reader: threading.Thread | None = None
        terminal, side = pty.openpty() if on_terminal else (-1, subprocess.PIPE)
        self.process = subprocess.Popen(
            [*(("setsid", "-c") if on_terminal else ()), *prefix, sys.executable, *start, *words, *TINY, *options],
            stdin=side if on_terminal else subprocess.DEVNULL,
            stdout=side,
            stderr=side if on_terminal else subprocess.STDOUT,
            text=True,
            env=environment,
            cwd=run.parent,
            # With -c, setsid makes the session itself, and the terminal the one that controls it.
            start_new_session=not on_terminal,
        )
        if on_terminal:
            os.close(side)
            self._reader = threading.Thread(target=self._read, args=(terminal,), daemon=True)
            self._reader.start()

    def _read(self, terminal: int) -> None:
        """Take what is written to the terminal, until it is closed or nobody can write to it any more."""
        with suppress(OSError):
            while not self._gone.is_set():
                if select.select([terminal], [], [], 0.05)[0]:
                    os.read(terminal, 65536)
        os.close(terminal)

    def close_terminal(self) -> None:
        """Take the terminal away: the kernel sends SIGHUP, and every further line fails."""
        self._gone.set()
        if self._reader is not None:
            self._reader.join()

    def wait(self) -> tuple[int, str]:
        """Exit code and output. Kills a process that exceeds the deadline and raises AssertionError."""
        try:
            output, _ = self.process.communicate(timeout=DEADLINE_S)
        except subprocess.TimeoutExpired:
            end_processes(self.run)
            output, _ = self.process.communicate()
            raise AssertionError(f"still running after {DEADLINE_S} s:\n{output}") from None
        self._gone.set()
        return self.process.returncode, output or ""

    def kill(self) -> None:
        """SIGKILL for the whole process group: the training and its loader processes, or the launcher."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def wait_for(self, *states: str, line: int = 0, epoch: int = 1) -> dict[str, Any]:
        """Wait until this training is in one of the states (training or validating, if none is given), in this epoch or
        a later one, with ``line`` epochs logged; returns its status. Raises AssertionError if it ends before.
        """
        states = states or ("training", "validating")

        def reached() -> dict[str, Any] | None:
            status = read_status(self.run)
            mine = status.get("pid") in {self.process.pid, *children(self.process.pid)}
            here = mine and status["state"] in states and status["epoch"] >= epoch
            return status if here and len(records(self.run)) >= line else None

        return dict(self.until(reached, f"{' or '.join(states)}, epoch {epoch}, {line} epochs logged"))

    def until(self, condition: Callable[[], Any], what: str) -> Any:
        """Poll until the condition returns something true, and return it; AssertionError if the training ends first."""
        limit = time.monotonic() + DEADLINE_S
        while time.monotonic() < limit:
            ended = self.process.poll() is not None
            if found := condition():
                return found
            assert not ended, f"ended with {self.wait()} before {what}"
            time.sleep(0.01)
        raise AssertionError(f"waited {DEADLINE_S} s in vain for {what}")


def start_ranks(run: Path, *options: str, ranks: int) -> list[Training]:
    """The ranks of one run as processes of their own, as on several machines: no launcher ends the survivors."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    places = [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in range(ranks)]
    prefixes = [("env", *(f"{name}={value}" for name, value in place.items())) for place in places]
    return [Training(run, *options, prefix=prefix) for prefix in prefixes]


def finish(run: Path, *options: str, **how: Any) -> str:
    """Train to the end; returns the output. ``how`` as for Training."""
    code, output = Training(run, *options, **how).wait()
    assert code == 0, f"exit code {code}:\n{output}"
    return output


def children(pid: int) -> list[int]:
    """Direct child processes."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found += [int(word) for word in path.read_text().split()]
    return found


def rank_processes(launcher: int) -> list[int]:
    """Process ids of a launcher's ranks, in order of rank."""
    found = {}
    for pid in children(launcher):
        with suppress(OSError):
            words = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
            found[next(word for word in words if word.startswith("RANK="))] = pid
    return [found[name] for name in sorted(found)]


def processes_of(folder: Path) -> dict[int, str]:
    """Processes that name the folder, or a path in it, on their command line: process id to command line."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = path.read_bytes().decode(errors="replace").split("\0")
            if any(word == str(folder) or word.startswith(f"{folder}/") for word in words):
                found[int(path.parent.name)] = " ".join(words)
    return found


def end_processes(folder: Path) -> None:
    """SIGKILL for every process of a run, frozen ones included."""
    while found := processes_of(folder):
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


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


def stored(run: Path, name: str = "last.pt") -> dict[str, Any] | None:
    """Content of a checkpoint; None if it does not load."""
    try:
        return dict(torch.load(run / "checkpoints" / name, weights_only=True))
    except (OSError, RuntimeError, EOFError):
        return None


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
    assert read_status(run)["state"] == "finished"


def assert_nothing_left(run: Path) -> None:
    """Check that no temporary file, no lock and no process of the run is left."""
    left = [*run.glob(".*"), *run.glob("checkpoints/.*"), *run.glob("run.lock")]
    assert not left, f"left over: {left}"
    assert_no_process(run)


def assert_no_process(run: Path) -> None:
    """Check that all processes of a run end within a few seconds."""
    limit = time.monotonic() + SOON_S
    while left := processes_of(run):
        assert time.monotonic() < limit, f"still alive: {left}"
        time.sleep(0.05)


def monitor(run: Path, *options: str) -> dict[str, Any]:
    """What the monitor reports of a run."""
    command = [sys.executable, str(ROOT / "monitor_training.py"), "--output_dir", str(run), "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, f"the monitor ended with {done.returncode}:\n{done.stderr}"
    return dict(json.loads(done.stdout))


def seconds_to_end(act: Callable[[], Any], *trainings: Training) -> tuple[float, list[tuple[int, str]]]:
    """Do something; returns how many seconds the trainings then take to end, and the exit code and output of each."""
    began = time.monotonic()
    act()
    for training in trainings:
        with suppress(subprocess.TimeoutExpired):
            training.process.wait(DEADLINE_S)
    took = time.monotonic() - began
    ended = [training.wait() for training in trainings]
    assert took < SOON_S, f"took {took:.0f} s to end: {ended}"
    return took, ended
