"""Do the models of four folds predict new tissue better together than each alone, and at what cost?

    python benchmarks/ensemble.py            # minutes
    python benchmarks/ensemble.py --quick    # seconds; its numbers mean nothing, it only tests that the benchmark runs

Generated tissue, two cores a patient. Some patients are kept out of every fold. Each fold's model is scored on them,
and so is the mean of all. Only correlations are compared: they hardly depend on the range that a model is normalised
to.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from orion_unet.cli.arguments import Parser, run_command
from orion_unet.config import TrainConfig
from orion_unet.data.pairs import HE_SUFFIX, ORION_SUFFIX
from orion_unet.demo.make import CORES_PER_PATIENT, make_demo
from orion_unet.evaluation.scored_folder import FolderOptions, open_folder
from orion_unet.evaluation.scores import overall
from orion_unet.inference.ensemble import load_models
from orion_unet.inference.model import TrainedModel
from orion_unet.metrics import MarkerSums
from orion_unet.recipes import find_recipe
from orion_unet.training.loop import train

Sizes = dict[str, Any]
USUAL: Sizes = {"folds": 4, "cores": 24, "new": 8, "side": 192}
QUICK: Sizes = {"folds": 2, "cores": 6, "new": 2, "side": 64}
SMALL: dict[str, Any] = {
    **find_recipe("demo").values, "patch_size": 96, "base_features": 8, "epochs": 4, "num_workers": 0, "gpus": 0,
    "sanity_check_freq": 0,
}  # fmt: skip
TINY: dict[str, Any] = {
    **SMALL, "patch_size": 32, "base_features": 4, "depth": 2, "epochs": 2, "patches_per_image": 4, "batch_size": 2,
    "warmup_epochs": 0.0,
}  # fmt: skip


def main(argv: list[str]) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny, to test the benchmark itself")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    sizes, training = (QUICK, TINY) if options.quick else (USUAL, SMALL)
    with tempfile.TemporaryDirectory(prefix="ensemble_") as scratch:
        folder = Path(scratch)
        known, new = draw(folder, sizes)
        runs = [
            fit(known, folder / f"fold_{k}", f"{k}/{sizes['folds']}", training) for k in range(1, sizes["folds"] + 1)
        ]
        models = [*(load_models([run], "cpu") for run in runs), load_models(runs, "cpu")]
        found = [score(model, new) for model in models]
    print(report(models[0].names, found, sizes, training))
    return 0


def draw(folder: Path, sizes: Sizes) -> tuple[Path, Path]:
    """Two folders of generated pairs of different patients: those of the folds, and the new ones."""
    known, new = folder / "known", folder / "new"
    names = make_demo(known, sizes["cores"], sizes["side"])
    new.mkdir()
    for name in ("channel_names.txt", "groups.csv", "dataset.json"):
        shutil.copy(known / name, new / name)
    assert sizes["new"] % CORES_PER_PATIENT == 0
    for name in names[-sizes["new"] :]:
        for suffix in (HE_SUFFIX, ORION_SUFFIX):
            (known / f"{name}{suffix}").rename(new / f"{name}{suffix}")
    return known, new


def fit(pairs: Path, run: Path, fold: str, options: dict[str, Any]) -> Path:
    """Train the model of one fold; returns its run folder."""
    config = TrainConfig.from_options({**options, "pairs_dir": str(pairs), "output_dir": str(run), "fold": fold})
    if train(config) != 0:
        raise RuntimeError(f"fold {fold} has not finished")
    return run


def score(model: TrainedModel, new: Path) -> tuple[np.ndarray, float]:
    """Pearson (C,) over the pixels of all new cores together, and the seconds of their predictions."""
    folder = open_folder(model, new, FolderOptions())
    if len(folder.known.val) != len(folder.table):
        raise RuntimeError("a model was trained on tissue that is to be new to it")
    sums, seconds = MarkerSums(len(folder.names), model.device), 0.0
    for core in range(len(folder.table)):
        began = time.perf_counter()
        region = folder.region(core)
        seconds += time.perf_counter() - began
        sums.update(region.predicted[None], region.measured[None])
    _, markers = sums.compute(folder.names)
    return np.array([markers[name]["pearson"] for name in folder.names], np.float64), seconds


def report(
    names: tuple[str, ...], found: list[tuple[np.ndarray, float]], sizes: Sizes, training: dict[str, Any]
) -> str:
    """The table, as Markdown."""
    *alone, together = [pearson for pearson, _ in found]
    singles = np.stack(alone)
    lines = [
        f"{os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}, one thread",
        f"{sizes['cores'] - sizes['new']} cores of {sizes['side']} pixels in {sizes['folds']} folds, {sizes['new']} "
        f"new cores of other patients, {training['epochs']} epochs",
        "",
        "| marker | mean of single models | best single model | ensemble |",
        "| --- | --- | --- | --- |",
    ]
    rows = [
        (name, singles[:, marker], together[marker])
        for marker, name in enumerate(names)
        if np.isfinite(together[marker])
    ]
    rows.append(("mean over markers", overall(singles), float(overall(together))))
    lines += [f"| {name} | {np.mean(one):.3f} | {np.max(one):.3f} | {both:.3f} |" for name, one, both in rows]
    better = sum(both > np.mean(one) for _, one, both in rows[:-1])
    best = sum(both > np.max(one) for _, one, both in rows[:-1])
    once = np.mean([seconds for _, seconds in found[:-1]])
    lines += [
        "",
        f"The ensemble is above the mean single model for {better} of {len(rows) - 1} markers, above the best one of "
        f"each marker for {best}.",
        f"Reading and predicting the new cores took {found[-1][1] / once:.1f} times as long as with one model.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_command(main))
