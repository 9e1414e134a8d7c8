"""Does the decoder's upsampling leave a grid in the predictions, and what does it cost to be rid of it?

    python benchmarks/upsampling.py --pairs DIR          # pairs with a groups.csv: places, patients or slides
    python benchmarks/upsampling.py --quick              # seconds, on a few generated cores; its numbers mean nothing

For every seed, most groups are held out, at random, and the stable recipe trains on the others with each upsampling:
same cores, patches, steps and first seed. The weights after the last step predict every held-out core; nothing is
chosen on them.

A grid shows as steps between neighbouring columns (and rows) that are larger at multiples of 4 or 8 pixels, where the
patches of the coarse levels meet, than elsewhere. The ratio of both is 1 without a grid. It is taken for every core and
marker, in the prediction and in the measured image.

The time of a step is measured in turns in one process. Finished trainings are kept in --output_dir/trials.json; the
same command continues. --report trains nothing.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from orion_unet import load_model, predict
from orion_unet.cli.arguments import Parser, parse_train_config, run_command
from orion_unet.correlation import moments, pearson
from orion_unet.data.split import GROUPS_FILE
from orion_unet.demo.make import make_demo
from orion_unet.errors import InputError
from orion_unet.models.blocks import UPSAMPLINGS
from orion_unet.models.unet import SpatialUNet, parameter_count
from orion_unet.run_log import write_json
from orion_unet.training.loop import train

PERIODS = (4, 8)
# A prediction may have so much more of a grid than the measured image, in so many of the cores.
MORE, SHARE = 0.05, 0.95
SIZES = {"full": (8, 16, 128, 16, 12), "quick": (1, 4, 32, 1, 2)}


def grid_ratios(image: np.ndarray) -> np.ndarray:
    """Mean step at multiples of each period over the mean step elsewhere (C, periods) of an image (C, H, W).

    Steps are absolute differences of neighbouring columns and of neighbouring rows; NaN for a constant marker.
    """
    image = image.astype(np.float64)
    found = []
    for period in PERIODS:
        at, elsewhere = 0.0, 0.0
        for axis in (1, 2):
            steps = np.abs(np.diff(image, axis=axis)).mean(axis=3 - axis)
            # The step from x - 1 to x is at place x - 1.
            on = np.arange(1, image.shape[axis]) % period == 0
            at, elsewhere = at + steps[:, on].mean(axis=1), elsewhere + steps[:, ~on].mean(axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            found.append(np.asarray(at) / np.asarray(elsewhere))
    return np.stack(found, axis=1)


def sides(pairs: Path, seed: int, training: int) -> tuple[list[str], list[str]]:
    """Training cores and held-out cores: ``training`` groups drawn by the seed, and all others."""
    with open(pairs / GROUPS_FILE, newline="", encoding="utf-8") as file:
        group_of = {row["core"]: row["group"] for row in csv.DictReader(file)}
    groups = sorted(set(group_of.values()))
    if not 0 < training < len(groups):
        raise InputError(f"--training_groups {training}: {pairs} has {len(groups)} groups, and some must be held out")
    drawn = {groups[place] for place in np.random.default_rng(seed).permutation(len(groups))[:training]}
    return ([core for core in sorted(group_of) if (group_of[core] in drawn) is wanted] for wanted in (True, False))  # type: ignore[return-value]


def trial(pairs: Path, seed: int, upsampling: str, training: int, size: str, run: Path, words: list[str]) -> dict:
    """Train once and score the held-out cores: r by marker, and the grid of every core, predicted and measured."""
    epochs, base, patch, patches, batch = SIZES[size]
    fitted, held_out = sides(pairs, seed, training)
    run.mkdir(parents=True, exist_ok=True)
    split = run / "given_split.json"
    # Validation chooses nothing here, so one core of the held-out groups is enough for it.
    parts = {"train": fitted, "val": held_out[:1]}
    write_json(split, {"schema": 1, **{k: [{"core": c, "group": c} for c in cores] for k, cores in parts.items()}})
    alone = run / "given_groups.csv"
    alone.write_text("\n".join(["core,group", *(f"{core},{core}" for core in (*fitted, *held_out))]), encoding="utf-8")
    config = parse_train_config([
        "--pairs_dir", str(pairs), "--output_dir", str(run / "run"), "--resume", "auto", "--gpus", "0",
        "--split_file", str(split), "--groups_csv", str(alone), "--seed", str(seed), "--epochs", str(epochs),
        "--patch_size", str(patch), "--patches_per_image", str(patches), "--patches_per_image_val", "4",
        "--batch_size", str(batch), "--base_features", str(base), "--early_stopping_patience", "0",
        "--sanity_check_freq", "0", "--num_workers", "0", "--upsampling", upsampling, *words,
    ])  # fmt: skip
    if train(config) != 0:
        raise InputError(f"{run}: the training did not finish; the same command continues")
    model = load_model(run / "run" / "checkpoints" / "last.pt", device="cpu")
    sums = np.zeros((6, len(model.names)))
    grids: dict[str, list[Any]] = {"predicted": [], "measured": []}
    for core in held_out:
        he, measured = (np.load(pairs / f"{core}_{kind}.npy", mmap_mode="r") for kind in ("HE", "ORION"))
        measured = np.asarray(measured if measured.shape[0] == len(model.names) else np.moveaxis(measured, -1, 0))
        found = predict(he, model)
        sums += moments(found.reshape(len(found), -1), measured.reshape(len(measured), -1))
        grids["predicted"].append(grid_ratios(found).tolist())
        grids["measured"].append(grid_ratios(measured).tolist())
    shutil.rmtree(run)
    return {"markers": list(model.names), "pearson": pearson(sums).tolist(), **grids}


def step_times(base: int, patch: int, batch: int, rounds: int) -> tuple[dict[str, float], dict[str, int]]:
    """Median seconds of a training step with each upsampling, taken in turns, and the numbers of parameters."""
    seconds: dict[str, list[float]] = {kind: [] for kind in UPSAMPLINGS}
    models, inputs = {}, torch.rand(batch, 3, patch, patch).contiguous(memory_format=torch.channels_last)
    for kind in UPSAMPLINGS:
        model = SpatialUNet(4, base_features=base, use_boundary_guidance=True, upsampling=kind)
        models[kind] = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for _ in range(rounds):
        for kind, model in models.items():
            began = time.perf_counter()
            model(inputs).square().mean().backward()
            model.zero_grad()
            seconds[kind].append(time.perf_counter() - began)
    return {kind: median(found[1:] or found) for kind, found in seconds.items()}, {
        kind: parameter_count(model) for kind, model in models.items()
    }


def report(trials: dict[str, Any], speed: tuple[dict[str, float], dict[str, int]] | None) -> str:
    """The tables of all finished trials."""
    seeds = sorted({int(key.split()[0]) for key in trials})
    complete = [seed for seed in seeds if all(f"{seed} {kind}" in trials for kind in UPSAMPLINGS)]
    if not complete:
        return "No seed is finished with every upsampling."
    first = trials[f"{complete[0]} {UPSAMPLINGS[0]}"]
    names, lines = first["markers"], ["## Correlation on held-out groups", ""]
    lines += ["| | " + " | ".join([*names, "mean", "by seed"]) + " |", "| --- " * (len(names) + 3) + "|"]
    r = {kind: np.array([trials[f"{seed} {kind}"]["pearson"] for seed in complete], float) for kind in UPSAMPLINGS}
    for kind, found in r.items():
        means = np.nanmean(found, axis=1)
        cells = [*(f"{value:.3f}" for value in np.nanmean(found, axis=0)), f"{means.mean():.3f}"]
        lines.append(f"| {kind} | " + " | ".join([*cells, ", ".join(f"{value:.3f}" for value in means)]) + " |")
    lines += ["", "## Grid: steps at multiples of a period over steps elsewhere", ""]
    lines += ["| | period | median | 95 % | highest | cores of which the ratio is at most the measured one + 0.05 |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    grids = {
        kind: {
            side: np.concatenate([np.array(trials[f"{seed} {kind}"][side], float) for seed in complete])
            for side in ("predicted", "measured")
        }
        for kind in UPSAMPLINGS
    }
    rows = [("measured", grids[UPSAMPLINGS[0]]["measured"], None)]
    rows += [(kind, found["predicted"], found["measured"]) for kind, found in grids.items()]
    for (index, period), (what, values, beside) in product(enumerate(PERIODS), rows):
        for marker, name in enumerate(names):
            its = values[:, marker, index]
            low, high, most = (np.nanquantile(its, q) for q in (0.5, 0.95, 1))
            share = ""
            if beside is not None:
                other = beside[:, marker, index]
                share = f"{100 * np.nanmean((its <= other + MORE)[np.isfinite(its) & np.isfinite(other)]):.1f} %"
            lines.append(f"| {what}, {name} | {period} | {low:.3f} | {high:.3f} | {most:.3f} | {share} |")
    if speed is not None:
        lines += ["", "## A training step", "", "| | s | parameters |", "| --- | --- | --- |"]
        lines += [f"| {kind} | {speed[0][kind]:.3f} | {speed[1][kind]:,} |" for kind in UPSAMPLINGS]
    lines += ["", f"Seeds {', '.join(map(str, complete))}; goal: {100 * SHARE:.0f} % of the cores for every marker."]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, metavar="DIR", help="pairs with a groups.csv")
    parser.add_argument("--training_groups", type=int, default=4, metavar="N", help="groups to train on; default: 4")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="trainings of each kind; default: 3")
    parser.add_argument("--quick", action="store_true", help="seconds, to try the benchmark; one seed")
    parser.add_argument("--report", action="store_true", help="train nothing, report what is finished")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of torch; default: 1")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("runs/upsampling"), metavar="DIR", help="default: runs/…"
    )
    options, words = parser.parse_known_args(argv)
    if options.pairs is None and not options.quick:
        raise InputError("--pairs DIR: is needed; or try the benchmark with --quick")
    torch.set_num_threads(options.threads)
    size = "quick" if options.quick else "full"
    options.output_dir.mkdir(parents=True, exist_ok=True)
    kept = options.output_dir / f"trials_{size}.json"
    trials = json.loads(kept.read_text()) if kept.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        pairs = options.pairs or demo(Path(scratch))
        training = options.training_groups if options.pairs else 1
        seeds = 1 if options.quick else options.seeds
        for seed, kind in product(range(0 if options.report else seeds), UPSAMPLINGS):
            if f"{seed} {kind}" not in trials:
                print(f"seed {seed}: {kind}", file=sys.stderr, flush=True)
                run = options.output_dir / f"seed_{seed}_{kind}"
                trials[f"{seed} {kind}"] = trial(pairs, seed, kind, training, size, run, words)
                write_json(kept, trials)
    _, base, patch, _, batch = SIZES[size]
    print(report(trials, None if options.report else step_times(base, patch, batch, 2 if options.quick else 12)))
    return 0


def demo(folder: Path) -> Path:
    """A few small generated cores of as many groups."""
    make_demo(folder / "pairs", cores=6, size=128)
    return folder / "pairs"


if __name__ == "__main__":
    sys.exit(run_command(main))
