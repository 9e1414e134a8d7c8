"""Which learning rate suits which number of optimiser steps?

    python benchmarks/learning_rates.py --pairs DIR      # pairs with a groups.csv: places, patients or slides
    python benchmarks/learning_rates.py --quick          # seconds, on a few generated cores; its numbers mean nothing

For every seed a few groups are drawn, and the stable recipe trains on them at each length with each learning rate, to
the end of its cosine. The weights after the last step are scored on the cores of all other groups: Pearson's r over all
their pixels, mean over markers. Nothing is chosen on them. Within a seed, all rates have the same cores, and those of a
length the same patches and batches.

Finished trainings are kept in --output_dir; the same command continues. --report trains nothing.
"""

from __future__ import annotations

import argparse
import math
import sys
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from encoders import spread
from held_out import core_sums, run_trials, sides, train_once, trials_parser

from orion_unet.cli.arguments import run_command
from orion_unet.correlation import pearson
from orion_unet.training.optim import automatic_rate

# Most epochs of a training; a short one has as many as there are patches for.
EPOCHS, DEPTH = 8, 3


def name_of(steps: int, rate: float) -> str:
    return f"{steps} steps at {rate:g}"


def trial(
    options: argparse.Namespace, of_name: dict[str, tuple[int, float]], pairs: Path, seed: int, way: str, training: int,
    run: Path,
) -> dict[str, Any]:  # fmt: skip
    """Train for about so many steps at one rate and score the held-out cores."""
    steps, rate = of_name[way]
    fitted, held_out = sides(pairs, seed, training)
    patches = steps * options.batch_size
    # An epoch has at least one batch.
    epochs = int(np.clip(round(patches / max(len(fitted), options.batch_size)), 1, EPOCHS))
    numbers = {
        "epochs": epochs, "patches_per_image": math.ceil(patches / len(fitted) / epochs), "learning_rate": rate,
        "batch_size": options.batch_size, "base_features": options.base_features, "patch_size": options.patch_size,
        "depth": DEPTH,
    }  # fmt: skip
    seconds = train_once(pairs, seed, (fitted, held_out), run, numbers)
    return core_sums(pairs, held_out, run) | {"seconds": seconds}


def report(trials: dict[str, Any], lengths: list[int], rates: list[float]) -> str:
    """A row for each length, over the seeds for which it is finished at all rates."""
    lines = [
        "| steps | auto | " + " | ".join(f"{rate:g}" for rate in rates) + " | best, against the one nearest auto |"
    ]
    lines += ["| --- " * (len(rates) + 3) + "|"]
    for steps in lengths:
        seeds = sorted({int(key.split()[0]) for key in trials})
        complete = [seed for seed in seeds if all(f"{seed} {name_of(steps, rate)}" in trials for rate in rates)]
        if not complete:
            continue
        r = np.array([
            [np.nanmean(pearson(np.array(trials[f"{seed} {name_of(steps, rate)}"]["sums"]))) for seed in complete]
            for rate in rates
        ])  # fmt: skip
        auto = automatic_rate(steps)
        nearest = int(np.argmin(np.abs(np.log(np.array(rates) / auto))))
        best = int(r.mean(axis=1).argmax())
        cells = [f"{row.mean():.3f} ({', '.join(f'{value:.3f}' for value in row)})" for row in r]
        against = f"{rates[best]:g}: {spread(r[best] - r[nearest])}" if best != nearest else ""
        lines.append(f"| {steps} | {auto:.2g} | " + " | ".join([*cells, against]) + " |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = trials_parser(__doc__, "learning_rates")
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 1000, 8000], metavar="N",
                        help="optimiser steps, about; default: 100 1000 8000")  # fmt: skip
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2], metavar="RATE",
                        help="learning rates; default: 1e-3 3e-3 1e-2")  # fmt: skip
    parser.add_argument("--base_features", type=int, default=8, metavar="N", help="as of the trainer; default: 8")
    parser.add_argument("--batch_size", type=int, default=4, metavar="N", help="as of the trainer; default: 4")
    parser.add_argument("--patch_size", type=int, default=64, metavar="N", help="as of the trainer; default: 64")
    options = parser.parse_args(argv)
    if options.quick:
        options.steps, options.base_features, options.patch_size = [4, 8], 4, 32
    ways = {name_of(steps, rate): (steps, rate) for steps, rate in product(options.steps, options.rates)}
    settings = {name: getattr(options, name) for name in ("base_features", "batch_size", "patch_size")}
    print(report(run_trials(options, ways, settings, partial(trial, options, ways)), options.steps, options.rates))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
