"""Trainings on some groups of real pairs, judged on all other groups: what several benchmarks have in common.

The weights after the last step are judged, so the held-out groups choose nothing.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn

from orion_unet import load_model, predict
from orion_unet.cli.arguments import Parser, parse_train_config
from orion_unet.correlation import moments
from orion_unet.data.split import GROUPS_FILE
from orion_unet.demo.make import make_demo
from orion_unet.errors import InputError
from orion_unet.run_log import METRICS_FILE, write_json
from orion_unet.training.loop import train

Predictions = Iterator[tuple[np.ndarray, np.ndarray]]


# Names of the training cores, and of the held-out cores.
Sides = tuple[list[str], list[str]]


def groups_of(pairs: Path) -> dict[str, str]:
    """The group of every core."""
    with open(pairs / GROUPS_FILE, newline="", encoding="utf-8") as file:
        return {row["core"]: row["group"] for row in csv.DictReader(file)}


def sides(pairs: Path, seed: int, training: int, never: Collection[str] = ()) -> Sides:
    """``training`` groups, drawn by the seed from those that are not in ``never``; and all others."""
    group_of = groups_of(pairs)
    groups = sorted(set(group_of.values()) - set(never))
    if not 0 < training < len(groups):
        raise InputError(
            f"--training_groups {training}: {pairs} has {len(groups)} groups to draw from, and some must be held out"
        )
    drawn = {groups[place] for place in np.random.default_rng(seed).permutation(len(groups))[:training]}
    fitted, held_out = (
        [core for core in sorted(group_of) if (group_of[core] in drawn) is side] for side in (True, False)
    )
    return fitted, held_out


def train_once(
    pairs: Path, seed: int, cores: Sides, run: Path, values: Mapping[str, Any], most_cores: int | None = None
) -> float:
    """Train the stable recipe on one side with these options, by name; returns the seconds of its epochs.

    ``most_cores`` of its cores train, drawn by the seed; None: all. A training that was stopped goes on. Raises
    InputError if it does not finish.
    """
    there, held_out = cores
    fitted = [there[at] for at in sorted(np.random.default_rng([seed, 1]).permutation(len(there))[:most_cores])]
    run.mkdir(parents=True, exist_ok=True)
    split, alone = run / "given_split.json", run / "given_groups.csv"
    # Validation chooses nothing here, so one core of the held-out groups is enough for it.
    parts = {"train": fitted, "val": held_out[:1]}
    write_json(split, {"schema": 1, **{k: [{"core": c, "group": c} for c in cores] for k, cores in parts.items()}})
    alone.write_text("\n".join(["core,group", *(f"{core},{core}" for core in groups_of(pairs))]), encoding="utf-8")
    config = parse_train_config([
        "--pairs_dir", str(pairs), "--output_dir", str(run / "run"), "--resume", "auto", "--gpus", "0",
        "--split_file", str(split), "--groups_csv", str(alone), "--seed", str(seed), "--patches_per_image_val", "4",
        "--early_stopping_patience", "0", "--sanity_check_freq", "0", "--num_workers", "0",
        *(word for name, value in values.items() for word in (f"--{name}", str(value))),
    ])  # fmt: skip
    if train(config) != 0:
        raise InputError(f"{run}: the training did not finish; the same command continues")
    lines = (run / "run" / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    return sum(float(json.loads(line)["duration_s"]) for line in lines)


def predictions(
    pairs: Path, cores: Iterable[str], *runs: Path, tta: bool = False
) -> tuple[tuple[str, ...], Predictions]:
    """The markers, and predicted and measured images (C, H, W) of every core: the mean over the runs' last models."""
    models = [load_model(run / "run" / "checkpoints" / "last.pt", device="cpu") for run in runs]
    names = models[0].names

    def images() -> Predictions:
        for core in cores:
            he, measured = (np.load(pairs / f"{core}_{kind}.npy", mmap_mode="r") for kind in ("HE", "ORION"))
            measured = np.asarray(measured if measured.shape[0] == len(names) else np.moveaxis(measured, -1, 0))
            yield np.mean([predict(he, model, tta=tta) for model in models], axis=0), measured

    return names, images()


def core_sums(pairs: Path, cores: Iterable[str], *runs: Path, tta: bool = False) -> dict[str, Any]:
    """The markers, and the sums for their r over all cores (6, C)."""
    names, images = predictions(pairs, cores, *runs, tta=tta)
    sums = [moments(p.reshape(len(p), -1), m.reshape(len(m), -1)) for p, m in images]
    return {"markers": list(names), "sums": np.sum(sums, axis=0).tolist()}


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


def trials_parser(doc: str | None, name: str) -> Parser:
    """The options of a benchmark that trains in several ways with several seeds."""
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, metavar="DIR", help="pairs with a groups.csv, as .npy")
    parser.add_argument("--training_groups", type=int, default=4, metavar="N", help="groups to train on; default: 4")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="trainings of each way; default: 3")
    parser.add_argument("--quick", action="store_true", help="seconds, to try the benchmark; one seed")
    parser.add_argument("--report", action="store_true", help="train nothing, report what is finished")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads of torch; default: 1")
    parser.add_argument("--output_dir", type=Path, default=Path("runs") / name, metavar="DIR", help="default: runs/…")
    return parser


def run_trials(
    options: argparse.Namespace,
    ways: Iterable[str],
    settings: dict[str, Any],
    trial: Callable[[Path, int, str, int, Path], Any],
) -> dict[str, Any]:
    """Every way with every seed, by "SEED WAY": ``trial`` of pairs, seed, way, training groups and run folder.

    Finished ones are kept in --output_dir; --report makes none. With --quick, the pairs may be generated ones. Raises
    InputError without pairs.
    """
    if options.pairs is None and not options.quick:
        raise InputError("--pairs DIR: is needed; or try the benchmark with --quick")
    torch.set_num_threads(options.threads)
    training = options.training_groups if options.pairs else 1
    shared = {"pairs": options.pairs and options.pairs.resolve().name, "groups": training}
    size = "quick" if options.quick else "full"
    trials = Trials(options.output_dir / f"trials_{size}.json", shared | settings)
    with tempfile.TemporaryDirectory() as scratch:
        pairs = options.pairs or Path(scratch) / "pairs"
        if options.pairs is None and not options.report:
            make_demo(pairs, cores=6, size=128)
        seeds = 0 if options.report else 1 if options.quick else options.seeds
        for seed, way in product(range(seeds), ways):
            print(f"seed {seed}: {way}", file=sys.stderr, flush=True)
            make = partial(trial, pairs, seed, way, training)
            folder = options.output_dir / f"seed_{seed}_{re.sub(r'[^a-zA-Z0-9.-]+', '_', way)}"
            trials.get(f"{seed} {way}", folder, make)
    return trials.found


def step_seconds(networks: Mapping[str, tuple[nn.Module, int, int]], rounds: int) -> dict[str, float]:
    """Median seconds of forward and backward of each network on as many patches, of this side, taken in turns."""
    models = {
        name: (network.to(memory_format=torch.channels_last),  # type: ignore[call-overload]
               torch.rand(batch, 3, patch, patch).contiguous(memory_format=torch.channels_last))
        for name, (network, batch, patch) in networks.items()
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds + 1):
        for name, (model, he) in models.items():
            began = time.perf_counter()
            model(he).square().mean().backward()
            model.zero_grad()
            seconds[name].append(time.perf_counter() - began)
    return {name: median(found[1:]) for name, found in seconds.items()}
