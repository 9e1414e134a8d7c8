"""What raises the score on tissue that was not trained on, at equal compute?

    python benchmarks/equal_compute.py --pairs DIR     # pairs with a groups.csv: places, patients or slides
    python benchmarks/equal_compute.py --quick         # seconds, on a few generated cores; its numbers mean nothing

Each way changes the stable recipe: context, width, depth, batch, loss or regularisation. Every training takes about as
long as the usual one: the seconds of a step of each way are measured first, in turns in one process, and its epochs
have as many more or fewer patches. Only "twice as long" takes twice as long, to show what compute is worth; "half of
the training groups" shows what tissue is worth.

Some groups are set apart: they never train, and are the only ones that may choose a way. For every seed, a few of the
other groups are drawn to train, and the rest of them score: Pearson's r over all their pixels, and r2, the share of
the variance that the prediction explains. The weights after the last step are judged. What is the best way on the
groups apart says nothing until the scoring groups agree.

Finished trainings are kept in --output_dir; the same command continues, with further seeds or ways. --report trains
nothing.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from encoders import spread
from held_out import Trials, core_sums, groups_of, run_trials, sides, step_seconds, train_once, trials_parser
from stability_job import CHANGES
from stability_recipes import spread_out

from orion_unet.cli.arguments import run_command
from orion_unet.config import ModelOptions
from orion_unet.correlation import pearson
from orion_unet.data import loaders, patches
from orion_unet.data.transforms import BatchTransform
from orion_unet.errors import InputError
from orion_unet.losses import CompositeLoss
from orion_unet.models.build import build_network
from orion_unet.models.unet import SpatialUNet

USUAL, LONGER, FEWER = "as it is", "twice as long", "half of the training groups"
THIRDS, VIEWS = "mean of three, a third as long", "predicted in eight views"
# Options of the usual way, and the optimiser steps of its training.
SIZES: dict[str, tuple[dict[str, Any], int]] = {
    "full": ({"base_features": 8, "depth": 4, "patch_size": 128, "batch_size": 12, "epochs": 6}, 400),
    "quick": ({"base_features": 2, "depth": 3, "patch_size": 32, "batch_size": 4, "epochs": 1}, 4),
}
# Options that change; those of the sizes as factors.
WAYS: dict[str, dict[str, Any]] = {
    USUAL: {},
    LONGER: {},
    FEWER: {},
    "patches twice as wide": {"patch_size": 2, "batch_size": 1 / 4},
    "patches half as wide": {"patch_size": 1 / 2, "batch_size": 4},
    "a third of the batch": {"batch_size": 1 / 3},
    "one level more": {"depth": 1},
    "one level less": {"depth": -1},
    "twice the width": {"base_features": 2},
    "correlation 1": {"correlation_weight": 1.0},
    "dropout 0.3": {"dropout": 0.3},
    "group norm": {"norm": "group"},
    "instance norm": {"norm": "instance"},
    "no variance term": {"variance_weight": 0.0},
    "learning rate 3e-3": {"learning_rate": 3e-3},
    THIRDS: {},
    VIEWS: {},
    "crops with scarce markers": {},
    "pyramid of errors": {},
    "turns and zoom": {},
    "coarse view": {"patch_size": 2},
}
# What the ways that change code replace.
PATCHED = ((CompositeLoss, "forward"), (BatchTransform, "__call__"), (patches, "draw_training_patch"),
           (loaders, "draw_training_patch"), (SpatialUNet, "from_options"))  # fmt: skip
# How many of each group's cores are scored, evenly spread.
CORES = 8


def options_of(way: str, usual: dict[str, Any]) -> dict[str, Any]:
    """The options of a way; sizes of the usual way are multiplied, levels added."""
    found = dict(usual)
    for name, value in WAYS[way].items():
        if name == "depth":
            found[name] += value
        elif name in usual:
            found[name] = max(1, round(usual[name] * value))
        else:
            found[name] = value
    return found


def step_ratio(way: str, usual: dict[str, Any]) -> float:
    """Seconds of a step over those of a usual one; 1 where nothing that takes time is different."""
    if not WAYS[way].keys() & {*usual, "norm"}:
        return 1.0
    networks = {}
    for name in (way, USUAL):
        found = options_of(name, usual)
        model = {key: found[key] for key in ("base_features", "depth", "norm") if key in found}
        options = ModelOptions(use_boundary_guidance=True, **model)
        with changed(name):
            networks[name] = build_network(options, 4), found["batch_size"], found["patch_size"]
    seconds = step_seconds(networks, rounds=8)
    return seconds[way] / seconds[USUAL]


def apart(pairs: Path, count: int) -> list[str]:
    """The groups that choose a way: the same whatever the seed."""
    groups = sorted(set(groups_of(pairs).values()))
    if not 0 < count < len(groups) - 1:
        raise InputError(f"--choosing_groups {count}: {pairs} has {len(groups)} groups, some of which train and score")
    return [groups[place] for place in np.unique(np.linspace(0, len(groups) - 1, count).round().astype(int))]


@contextmanager
def changed(way: str) -> Iterator[None]:
    """The toolkit with the code that a way changes, if any."""
    with ExitStack() as restored:
        for owner, name in PATCHED:
            restored.enter_context(mock.patch.object(owner, name, getattr(owner, name)))
        CHANGES.get(way, lambda: None)()
        yield


def trial(ratios: Trials, size: str, choosing: int, pairs: Path, seed: int, way: str, training: int, run: Path) -> Any:
    """Train, and score some cores of each group that did not train: sums for r by group."""
    usual, steps = SIZES[size]
    options, ratio = options_of(way, usual), ratios.get(way, run, lambda run: step_ratio(way, usual))
    choose = apart(pairs, choosing)
    fitted, others = sides(pairs, seed, training, choose)
    group_of = groups_of(pairs)
    if way == FEWER:
        groups = sorted({group_of[core] for core in fitted})
        fitted = [core for core in fitted if group_of[core] in groups[: max(1, len(groups) // 2)]]
    count = steps * {LONGER: 2, THIRDS: 1 / 3}.get(way, 1) / ratio * options["batch_size"]
    options["patches_per_image"] = math.ceil(count / options["epochs"] / len(fitted))
    runs = [run / str(member) for member in range(3 if way == THIRDS else 1)]
    cores = defaultdict(list)
    for core in others:
        cores[group_of[core]].append(core)
    with changed(way):
        seconds = [train_once(pairs, 100 * at + seed, (fitted, others), its, options) for at, its in enumerate(runs)]
        found = {
            group: core_sums(pairs, spread_out(its, CORES), *runs, tta=way == VIEWS) for group, its in cores.items()
        }
    return {
        "seconds": sum(seconds),
        "choosing": choose,
        "markers": next(iter(found.values()))["markers"],
        "sums": {group: each["sums"] for group, each in found.items()},
    }


def scores(found: dict[str, Any], groups: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Pearson's r and r2 by marker (C,), over the cores of these groups."""
    sums = np.sum([found["sums"][group] for group in groups], axis=0)
    count, _, t, pp, tt, pt = sums
    with np.errstate(divide="ignore", invalid="ignore"):
        return pearson(sums), 1 - (pp - 2 * pt + tt) / (tt - t * t / count)


def report(trials: dict[str, Any], ways: list[str]) -> str:
    """One table of the groups that choose, one of those that score; each way over the seeds of its trainings."""
    lines = []
    for title, chooses in (("On the groups that choose", True), ("On the groups that score", False)):
        rows = []
        for way in ways:
            seeds = [seed for seed in range(len(trials)) if {f"{seed} {way}", f"{seed} {USUAL}"} <= set(trials)]
            if not seeds:
                continue
            found = {
                name: np.array([
                    scores(its, [group for group in its["sums"] if (group in its["choosing"]) is chooses])
                    for its in (trials[f"{seed} {name}"] for seed in seeds)
                ])
                for name in (way, USUAL)
            }  # fmt: skip
            # (seeds, 2, markers): r and r2.
            r, gain = found[way][:, 0], np.nanmean(found[way] - found[USUAL], axis=2)
            cells = [*(f"{value:.3f}" for value in r.mean(axis=0)), f"{np.nanmean(r):.3f}"]
            by_seed = ", ".join(f"{value:+.3f}" for value in gain[:, 0])
            against = [""] * 3 if way == USUAL else [by_seed, spread(gain[:, 0]), f"{gain[:, 1].mean():+.3f}"]
            seconds = np.mean([trials[f"{seed} {way}"]["seconds"] for seed in seeds])
            rows.append([way, *cells, f"{len(seeds)}", *against, f"{seconds:.0f}"])
        if not rows:
            return "No seed is finished as it is."
        names = trials[f"{seeds[0]} {USUAL}"]["markers"] if seeds else next(iter(trials.values()))["markers"]
        head = ["way", *names, "mean", "seeds", f"r against {USUAL}, by seed", "mean", "r2", "s"]
        lines += ["", f"## {title}", "", f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines[1:])


def main(argv: list[str]) -> int:
    parser = trials_parser(__doc__, "equal_compute")
    parser.add_argument("--choosing_groups", type=int, default=3, metavar="N",
                        help="groups that never train, and choose a way; default: 3")  # fmt: skip
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY",
                        help=f"of {', '.join(WAYS)}; default: all")  # fmt: skip
    options = parser.parse_args(argv)
    ways = [way for way in WAYS if way == USUAL or way in options.ways]
    size = "quick" if options.quick else "full"
    choosing = 1 if options.quick else options.choosing_groups
    settings = {"sizes": SIZES[size], "choosing": choosing}
    ratios = Trials(options.output_dir / f"ratios_{size}.json", settings)
    trials = run_trials(options, ways, settings, partial(trial, ratios, size, choosing))
    print(report(trials, ways))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
