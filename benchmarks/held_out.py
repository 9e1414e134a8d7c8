"""Trainings on some groups of real pairs, judged on all other groups: what several benchmarks have in common.

The weights after the last step are judged, so the held-out groups choose nothing.
"""

from __future__ import annotations

import csv
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn

from orion_unet import load_model, predict
from orion_unet.cli.arguments import parse_train_config
from orion_unet.data.split import GROUPS_FILE
from orion_unet.errors import InputError
from orion_unet.run_log import METRICS_FILE, write_json
from orion_unet.training.loop import train

Predictions = Iterator[tuple[np.ndarray, np.ndarray]]


def sides(pairs: Path, seed: int, training: int) -> tuple[list[str], list[str]]:
    """Training cores and held-out cores: ``training`` groups drawn by the seed, and all others."""
    with open(pairs / GROUPS_FILE, newline="", encoding="utf-8") as file:
        group_of = {row["core"]: row["group"] for row in csv.DictReader(file)}
    groups = sorted(set(group_of.values()))
    if not 0 < training < len(groups):
        raise InputError(f"--training_groups {training}: {pairs} has {len(groups)} groups, and some must be held out")
    drawn = {groups[place] for place in np.random.default_rng(seed).permutation(len(groups))[:training]}
    fitted, held_out = (
        [core for core in sorted(group_of) if (group_of[core] in drawn) is side] for side in (True, False)
    )
    return fitted, held_out


def train_once(
    pairs: Path, seed: int, training: int, run: Path, words: list[str], most_cores: int | None = None
) -> float:
    """Train the stable recipe on the groups of a seed with the options ``words``; returns the seconds of its epochs.

    ``most_cores`` of the groups' cores train, drawn by the seed; None: all. A training that was stopped goes on. Raises
    InputError if it does not finish.
    """
    there, held_out = sides(pairs, seed, training)
    fitted = [there[at] for at in sorted(np.random.default_rng([seed, 1]).permutation(len(there))[:most_cores])]
    run.mkdir(parents=True, exist_ok=True)
    split, alone = run / "given_split.json", run / "given_groups.csv"
    # Validation chooses nothing here, so one core of the held-out groups is enough for it.
    parts = {"train": fitted, "val": held_out[:1]}
    write_json(split, {"schema": 1, **{k: [{"core": c, "group": c} for c in cores] for k, cores in parts.items()}})
    alone.write_text("\n".join(["core,group", *(f"{core},{core}" for core in (*there, *held_out))]), encoding="utf-8")
    config = parse_train_config([
        "--pairs_dir", str(pairs), "--output_dir", str(run / "run"), "--resume", "auto", "--gpus", "0",
        "--split_file", str(split), "--groups_csv", str(alone), "--seed", str(seed), "--patches_per_image_val", "4",
        "--early_stopping_patience", "0", "--sanity_check_freq", "0", "--num_workers", "0", *words,
    ])  # fmt: skip
    if train(config) != 0:
        raise InputError(f"{run}: the training did not finish; the same command continues")
    lines = (run / "run" / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    return sum(float(json.loads(line)["duration_s"]) for line in lines)


def predictions(pairs: Path, seed: int, training: int, run: Path) -> tuple[tuple[str, ...], Predictions]:
    """The markers, and predicted and measured images (C, H, W) of every held-out core."""
    model = load_model(run / "run" / "checkpoints" / "last.pt", device="cpu")

    def images() -> Predictions:
        for core in sides(pairs, seed, training)[1]:
            he, measured = (np.load(pairs / f"{core}_{kind}.npy", mmap_mode="r") for kind in ("HE", "ORION"))
            measured = np.asarray(measured if measured.shape[0] == len(model.names) else np.moveaxis(measured, -1, 0))
            yield predict(he, model), measured

    return model.names, images()


class Trials:
    """Finished trials in a file, each under a name; what is missing is made.

    ``settings`` are what all of them share. Raises InputError where the file is of other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        # As they are read again.
        self._settings = json.loads(json.dumps(settings))
        stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"settings": self._settings}
        if stored["settings"] != self._settings:
            raise InputError(f"{path}: its trials have other settings ({stored['settings']}); use another --output_dir")
        self.found: dict[str, Any] = stored.get("trials", {})

    def get(self, name: str, run: Path, make: Callable[[Path], Any]) -> Any:
        """The result of a trial, made in the folder ``run`` unless it is known; the folder is removed."""
        if name not in self.found:
            self.found[name] = make(run)
            write_json(self._path, {"settings": self._settings, "trials": self.found})
            shutil.rmtree(run, ignore_errors=True)
        return self.found[name]


def step_seconds(networks: Mapping[str, nn.Module], batch: int, patch: int, rounds: int) -> dict[str, float]:
    """Median seconds of forward and backward of each network on a batch of patches, taken in turns."""
    he = torch.rand(batch, 3, patch, patch).contiguous(memory_format=torch.channels_last)
    models = {name: network.to(memory_format=torch.channels_last) for name, network in networks.items()}  # type: ignore[call-overload]
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds + 1):
        for name, model in models.items():
            began = time.perf_counter()
            model(he).square().mean().backward()
            model.zero_grad()
            seconds[name].append(time.perf_counter() - began)
    return {name: median(found[1:]) for name, found in seconds.items()}
