"""Tiny trainings: their options, their results, and real processes that never outlive their test."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 120
MARK = "ORION_TEST_PROCESS"

# Seconds of training at most: three of the four cores of ``pairs`` train, six steps of two patches each.
TINY = {
    "patch_size": 64,
    "patches_per_image": 4,
    "patches_per_image_val": 3,
    "batch_size": 2,
    "val_batch_size": 2,
    "base_features": 4,
    "depth": 2,
    "epochs": 2,
    "learning_rate": 1e-2,
    "num_workers": 0,
    "gpus": 0,
    "sanity_check_freq": 0,
}


def command_line(options):
    """Options as words of a command line."""
    words = []
    for name, value in options.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no_{name}")
        else:
            words += [f"--{name}", str(value)]
    return words


def read_metrics(run_dir, name="metrics.jsonl"):
    """Records of a log; anything that is no strict JSON fails, and a missing log is empty."""

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    log = Path(run_dir) / name
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    return [json.loads(line, parse_constant=refuse) for line in lines]


def read_steps(run_dir):
    return read_metrics(run_dir, "steps.jsonl")


def read_status(run_dir):
    return json.loads((Path(run_dir) / "status.json").read_text(encoding="utf-8"))


def losses(run_dir):
    """Of every epoch, by its latest attempt: training loss and terms, validation loss and terms, learning rate."""
    return {r["epoch"]: (r["train"], r["val"], r["lr"], r["grad_norm"]) for r in read_metrics(run_dir)}


def weights(run_dir, name="last.pt", part="model"):
    """Tensors of a checkpoint."""
    state = torch.load(Path(run_dir) / "checkpoints" / name, weights_only=True)[part]
    return state["model"] if part == "ema" else state


def differing(first, second):
    """Names of the tensors that are not bit for bit the same."""
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environments(ranks):
    """What a launcher tells each rank."""
    shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in range(ranks)]


def processes_with(mark):
    """Ids of the running processes that carry the mark in their environment; launchers give it to their ranks."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        with suppress(OSError):
            if folder.name.isdecimal() and wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def command_of(pid):
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


class Command:
    """A command in a session of its own; everything it starts carries one mark and dies with the test."""

    def __init__(self, words, cwd, env):
        self.mark = uuid.uuid4().hex
        clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PYTHONPATH")}
        clean |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), MARK: self.mark}
        self.process = subprocess.Popen(
            [str(word) for word in words],
            cwd=cwd,
            env=clean | env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def end(self, deadline_s=DEADLINE_S):
        """Wait for the end; code, out and err as a person would see them in a file."""
        out, err = self.process.communicate(timeout=deadline_s)
        return SimpleNamespace(code=self.process.returncode, out=out.decode(), err=err.decode())

    def signal(self, number):
        self.process.send_signal(number)

    def others(self):
        """Processes it has started that still run."""
        return [pid for pid in processes_with(self.mark) if pid != self.process.pid]

    def ranks(self):
        """Ids of the training ranks under a launcher, by rank."""
        found = {}
        for pid in self.others():
            with suppress(OSError):
                pairs = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
                environment = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
                parent = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
                # A loader's process has its rank's environment, but the rank for its parent.
                if "LOCAL_RANK" in environment and parent == self.process.pid:
                    found[int(environment["RANK"])] = pid
        return found

    def kill(self):
        while pids := processes_with(self.mark):
            for pid in pids:
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            self.process.poll()
            time.sleep(0.02)
        for pipe in (self.process.stdout, self.process.stderr):
            pipe.close()
        self.process.wait()


def trainer(*launcher, **options):
    """Words of a training command, alone or under a launcher; without a recipe, as TINY runs in this process."""
    script = str(ROOT / "train_spatial_orion_unet.py")
    return [sys.executable, *launcher, script, "--recipe", "none", *command_line({**TINY, **options})]


LAUNCH = ("-m", "orion_unet.cli.launch", "--standalone", "--nproc_per_node")


def wait_for(condition, what, deadline_s=DEADLINE_S):
    """Poll until the condition gives something true, and return it."""
    until = time.monotonic() + deadline_s
    while time.monotonic() < until:
        if found := condition():
            return found
        time.sleep(0.01)
    raise AssertionError(f"waited {deadline_s} s in vain for {what}")
