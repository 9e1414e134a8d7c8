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

import sys
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from held_out import predictions, run_trials, sides, step_seconds, train_once, trials_parser

from orion_unet.cli.arguments import run_command
from orion_unet.correlation import moments, pearson
from orion_unet.models.blocks import UPSAMPLINGS
from orion_unet.models.unet import SpatialUNet, parameter_count

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


def trial(size: str, pairs: Path, seed: int, upsampling: str, training: int, run: Path) -> dict[str, Any]:
    """Train once and score the held-out cores: r by marker, and the grid of every core, predicted and measured."""
    epochs, base, patch, patches, batch = SIZES[size]
    numbers = {
        "epochs": epochs, "base_features": base, "patch_size": patch, "patches_per_image": patches, "batch_size": batch,
        "upsampling": upsampling,
    }  # fmt: skip
    cores = sides(pairs, seed, training)
    train_once(pairs, seed, cores, run, numbers)
    names, images = predictions(pairs, cores[1], run)
    sums = np.zeros((6, len(names)))
    grids: dict[str, list[Any]] = {"predicted": [], "measured": []}
    for found, measured in images:
        sums += moments(found.reshape(len(found), -1), measured.reshape(len(measured), -1))
        grids["predicted"].append(grid_ratios(found).tolist())
        grids["measured"].append(grid_ratios(measured).tolist())
    return {"markers": list(names), "pearson": pearson(sums).tolist(), **grids}


def step_times(base: int, patch: int, batch: int, rounds: int) -> tuple[dict[str, float], dict[str, int]]:
    """Median seconds of a step with each upsampling, and the numbers of parameters."""
    networks = {kind: SpatialUNet(4, base_features=base, use_boundary_guidance=True, upsampling=kind)
                for kind in UPSAMPLINGS}  # fmt: skip
    sized = {kind: (net, batch, patch) for kind, net in networks.items()}
    return step_seconds(sized, rounds), {kind: parameter_count(net) for kind, net in networks.items()}


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
        # A constant marker has no correlation, in any seed.
        cells = [*(f"{value:.3f}" for value in found.mean(axis=0)), f"{means.mean():.3f}"]
        lines.append(f"| {kind} | " + " | ".join([*cells, ", ".join(f"{value:.3f}" for value in means)]) + " |")
    lines += ["", "## Grid: steps at multiples of a period over steps elsewhere", ""]
    lines += ["| | period | median | 95 % | highest | cores at most 1.05 | at most the measured ratio + 0.05 |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    grids = {
        kind: {
            side: np.concatenate([np.array(trials[f"{seed} {kind}"][side], float) for seed in complete])
            for side in ("predicted", "measured")
        }
        for kind in UPSAMPLINGS
    }
    rows: list[tuple[str, np.ndarray, np.ndarray | None]] = [("measured", grids[UPSAMPLINGS[0]]["measured"], None)]
    rows += [(kind, found["predicted"], found["measured"]) for kind, found in grids.items()]
    for (index, period), (what, values, beside) in product(enumerate(PERIODS), rows):
        for marker, name in enumerate(names):
            its = values[:, marker, index]
            if not np.isfinite(its).any():
                # A constant marker has no steps.
                continue
            low, high, most = (np.nanquantile(its, q) for q in (0.5, 0.95, 1))
            share = ""
            if beside is not None:
                other = beside[:, marker, index]
                both = np.isfinite(its) & np.isfinite(other)
                share = f"{100 * np.mean(its[both] <= other[both] + MORE):.1f} %" if both.any() else ""
            even = f"{100 * np.mean(its[np.isfinite(its)] <= 1 + MORE):.1f} %"
            lines.append(f"| {what}, {name} | {period} | {low:.3f} | {high:.3f} | {most:.3f} | {even} | {share} |")
    if speed is not None:
        lines += ["", "## A training step", "", "| | s | parameters |", "| --- | --- | --- |"]
        lines += [f"| {kind} | {speed[0][kind]:.3f} | {speed[1][kind]:,} |" for kind in UPSAMPLINGS]
    lines += ["", f"Seeds {', '.join(map(str, complete))}; goal: {100 * SHARE:.0f} % of the cores for every marker."]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    options = trials_parser(__doc__, "upsampling").parse_args(argv)
    size = "quick" if options.quick else "full"
    found = run_trials(options, UPSAMPLINGS, {"sizes": SIZES[size]}, partial(trial, size))
    _, base, patch, _, batch = SIZES[size]
    print(report(found, None if options.report else step_times(base, patch, batch, 2 if options.quick else 12)))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
