"""Tiny trainings in this process, and commands in processes of their own."""

import json
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_runs import ROOT, TINY, Command, environments, free_port

from orion_unet.config import TrainConfig
from orion_unet.training.loop import Loop
from orion_unet.training.loop import train as train_run


@pytest.fixture
def start(tmp_path):
    """Start a command without waiting for it."""
    begun = []

    def begin(*words, cwd=tmp_path, **env):
        begun.append(Command(words, cwd, {name: str(value) for name, value in env.items()}))
        return begun[-1]

    yield begin
    for command in begun:
        command.kill()


@pytest.fixture
def call(start):
    """Run a command to its end."""
    return lambda *words, **env: start(*words, **env).end()


@pytest.fixture(autouse=True)
def determinism_ends_with_the_test():
    """A training in this process may have asked for deterministic algorithms."""
    yield
    # Setting it, even to what it is, imports the compiler: seconds.
    if torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def pairs(write_pairs):
    """Four cores of 80 x 72 pixels with three markers, each core brighter than the one before it."""
    folder = write_pairs("pairs", cores=4, size=(80, 72), channels=3)
    for index, path in enumerate(sorted(folder.glob("*_ORION.npy"))):
        np.save(path, np.load(path) // (4 - index))
    return folder


@pytest.fixture
def learnable(pairs):
    """Pairs whose markers can be seen in the H&E: one is as dark as its red, another half as much, a third empty."""
    for path in pairs.glob("*_HE.npy"):
        dark = 255 - np.load(path)[..., :1]
        np.save(path.with_name(path.name.replace("_HE", "_ORION")), np.concatenate([dark, dark // 2, 0 * dark], axis=2))
    return pairs


@pytest.fixture
def train(pairs, tmp_path):
    """Train in this process with TINY options; returns exit code and run folder."""

    def fit(name="run", **options):
        given = {**TINY, "pairs_dir": str(pairs), "output_dir": str(tmp_path / name), **options}
        code = train_run(TrainConfig.from_options(given))
        return SimpleNamespace(code=code, dir=Path(given["output_dir"]))

    return fit


@pytest.fixture
def killed_in_epoch_2(monkeypatch):
    """A context in which a training in this process dies at the start of its second epoch."""
    epoch = Loop._epoch

    def die_in_the_second(self, number):
        if number == 2:
            raise ConnectionError("killed")
        epoch(self, number)

    @contextmanager
    def context():
        with monkeypatch.context() as patched, pytest.raises(ConnectionError, match="killed"):
            patched.setattr(Loop, "_epoch", die_in_the_second)
            yield

    return context


@pytest.fixture
def train_on_ranks(start, tmp_path):
    """Train on ranks of this machine: a run stopped after two steps and resumed, and one without a stop.

    Returns the folders of both.
    """

    def fit(ranks, options, **env):
        runs = [
            {"port": free_port(), "stop_at": stop, "options": {**options, "output_dir": str(tmp_path / name), **resume}}
            for name, stop, resume in (("run", 2, {}), ("run", None, {"resume": "auto"}), ("straight", None, {}))
        ]
        (tmp_path / "runs.json").write_text(json.dumps(runs))
        script = ROOT / "tests" / "integration" / "rank_runs.py"
        begun = [
            start(sys.executable, script, tmp_path / "runs.json", **{**each, **env}) for each in environments(ranks)
        ]
        for ended in [rank.end() for rank in begun]:
            assert ended.code == 0, ended.err
            assert json.loads(ended.err.splitlines()[-1]) == [143, 0, 0]
        return tmp_path / "run", tmp_path / "straight"

    return fit
