"""Tiny trainings in this process, and commands in processes of their own."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_runs import TINY, Command

from orion_unet.config import TrainConfig
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
def train(pairs, tmp_path):
    """Train in this process with TINY options; returns exit code and run folder."""

    def fit(name="run", **options):
        given = {**TINY, "pairs_dir": str(pairs), "output_dir": str(tmp_path / name), **options}
        code = train_run(TrainConfig.from_options(given))
        return SimpleNamespace(code=code, dir=Path(given["output_dir"]))

    return fit
