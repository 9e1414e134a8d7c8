"""Is a pretrained encoder worth it, on tissue that was not trained on?

    python benchmarks/encoders.py --pairs DIR --encoder timm:tf_efficientnet_lite0 --encoder_weights FILE
    python benchmarks/encoders.py --pairs DIR ... --report          # train nothing, show what is finished

DIR needs a groups.csv: places, patients or slides. For every seed a few groups are drawn, the stable recipe trains on
them in several ways, and the weights after the last step are scored on all other groups: Pearson's r over all their
pixels, by marker. Nothing is chosen on what scores. In a seed all ways have the same cores, patches and batches.

The U-Net is trained twice: for the steps of the others, and for as many more as one training with the encoder takes in
time. For that the seconds of a step are measured first, in turns in one process.

Finished trainings are kept in --output_dir/trials.json; the same command continues.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import sem, t

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from held_out import Trials, core_sums, sides, step_seconds, train_once

from orion_unet.cli.arguments import Parser, run_command
from orion_unet.config import ModelOptions
from orion_unet.correlation import pearson
from orion_unet.models.build import build_network

UNET, UNET_LONGER = "U-Net", "U-Net, seconds of the encoder"
RANDOM, PRETRAINED, SLOWER, FROZEN = (
    "encoder, random weights", "encoder, pretrained", "encoder, pretrained, rate 0.1", "encoder, pretrained, frozen",
)  # fmt: skip
WAYS = (UNET, UNET_LONGER, RANDOM, PRETRAINED, SLOWER, FROZEN)
EPOCHS, BASE, PATCH, PATCHES, BATCH = 6, 12, 128, 8, 12


def options_of(way: str, options: argparse.Namespace, epochs: int, patches: int) -> dict[str, Any]:
    """The options of a way to train, with so many patches of a core."""
    found = {
        "epochs": epochs, "base_features": BASE, "patch_size": PATCH, "patches_per_image": patches, "batch_size": BATCH,
    }  # fmt: skip
    if way in (UNET, UNET_LONGER):
        return found
    found |= {"encoder": options.encoder}
    if way == RANDOM:
        return found
    changed: dict[str, Any] = {SLOWER: {"encoder_rate_factor": 0.1}, FROZEN: {"encoder_train": "frozen"}}
    return {**found, "encoder_weights": options.encoder_weights, **changed.get(way, {})}


def trial(options: argparse.Namespace, seed: int, values: dict[str, Any], run: Path) -> dict[str, Any]:
    """Train once and score the held-out cores: sums for r of each core, by marker."""
    cores = sides(options.pairs, seed, options.training_groups)
    seconds = train_once(options.pairs, seed, cores, run, values, options.training_cores)
    return core_sums(options.pairs, cores[1], run) | {"seconds": seconds}


def step_ratio(options: argparse.Namespace) -> float:
    """Seconds of a step with the encoder over those of the U-Net."""
    usual = ModelOptions(base_features=BASE, use_boundary_guidance=True)
    networks = {name: (build_network(replace(usual, encoder=encoder), 4), BATCH, PATCH)
                for name, encoder in (("unet", "unet"), ("encoder", options.encoder))}  # fmt: skip
    seconds = step_seconds(networks, rounds=8)
    return seconds["encoder"] / seconds["unet"]


def report(found: dict[str, Any], ways: list[str], ratio: float, cores: int | None = None) -> str:
    """The table of the seeds of which all ways are finished, on so many cores; None: on all."""
    end = "" if cores is None else f", {cores} cores"
    found = {
        key.removesuffix(end): value
        for key, value in found.items()
        if key != "step ratio" and re.search(r", \d+ cores$|$", key)[0] == end
    }
    seeds = sorted({int(key.split()[0]) for key in found})
    complete = [seed for seed in seeds if all(f"{seed} {way}" in found for way in ways)]
    if not complete:
        return "No seed is finished in every way."
    names = found[f"{complete[0]} {ways[0]}"]["markers"]
    lines = ["| way | " + " | ".join([*names, "mean", "by seed", "against the U-Net, by seed", "s"]) + " |"]
    lines += ["| --- " * (len(names) + 5) + "|"]
    r = {way: np.stack([pearson(np.array(found[f"{seed} {way}"]["sums"])) for seed in complete]) for way in ways}
    unet = np.nanmean(r[ways[0]], axis=1)
    for way in ways:
        means = np.nanmean(r[way], axis=1)
        cells = [*(f"{value:.3f}" for value in np.nanmean(r[way], axis=0)), f"{means.mean():.3f}"]
        cells += [", ".join(f"{value:.3f}" for value in means), ", ".join(f"{value:+.3f}" for value in means - unet)]
        seconds = np.mean([found[f"{seed} {way}"]["seconds"] for seed in complete])
        lines.append(f"| {way} | " + " | ".join([*cells, f"{seconds:.0f}"]) + " |")
    longer = np.nanmean(r[UNET_LONGER], axis=1)
    gains = {way: np.nanmean(r[way], axis=1) - longer for way in ways if way not in (UNET, UNET_LONGER)}
    lines += ["", f"A step with the encoder takes {ratio:.2f} times as long as one of the U-Net.", ""]
    lines += [f"- {way} against the U-Net at equal seconds: {spread(gain)}" for way, gain in gains.items()]
    return "\n".join(lines)


def spread(values: np.ndarray) -> str:
    """The mean over seeds, with its 95 % interval by Student's t from 3 seeds on."""
    if len(values) < 3:
        return f"{values.mean():+.3f}"
    low, high = t.interval(0.95, len(values) - 1, values.mean(), sem(values))
    return f"{values.mean():+.3f} (95 % interval over {len(values)} seeds {low:+.3f} to {high:+.3f})"


def main(argv: list[str]) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, required=True, metavar="DIR", help="pairs with a groups.csv")
    parser.add_argument("--encoder", required=True, metavar="timm:NAME", help="as of the trainer")
    parser.add_argument("--encoder_weights", type=Path, required=True, metavar="FILE", help="as of the trainer")
    parser.add_argument("--training_groups", type=int, default=4, metavar="N", help="groups to train on; default: 4")
    parser.add_argument("--training_cores", type=int, metavar="N",
                        help="cores of them to train on, drawn by the seed; as many steps; default: all")  # fmt: skip
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="trainings of each kind; default: 3")
    parser.add_argument("--only", nargs="+", choices=WAYS, default=WAYS, metavar="WAY", help=f"of {', '.join(WAYS)}")
    parser.add_argument("--report", action="store_true", help="train nothing, report what is finished")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/encoders"), metavar="DIR", help="default: runs/…")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    settings = {
        "pairs": options.pairs.resolve().name, "groups": options.training_groups, "encoder": options.encoder,
        "sizes": [EPOCHS, BASE, PATCH, PATCHES, BATCH],
    }  # fmt: skip
    trials = Trials(options.output_dir / "trials.json", settings)
    ratio = float(trials.get("step ratio", options.output_dir / "none", lambda run: step_ratio(options)))
    ways = [way for way in WAYS if way in options.only or way in (UNET, UNET_LONGER)]
    for seed, way in product(range(0 if options.report else options.seeds), ways):
        print(f"seed {seed}: {way}", file=sys.stderr, flush=True)
        epochs = max(1, round(EPOCHS * ratio)) if way == UNET_LONGER else EPOCHS
        there = len(sides(options.pairs, seed, options.training_groups)[0])
        cores = min(options.training_cores or there, there)
        make = partial(trial, options, seed, options_of(way, options, epochs, round(PATCHES * there / cores)))
        name = f"{seed} {way}" if cores == there else f"{seed} {way}, {cores} cores"
        trials.get(name, options.output_dir / f"seed_{seed}_{WAYS.index(way)}_{cores}", make)
    text = report(trials.found, ways, ratio, options.training_cores)
    (options.output_dir / "encoders.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
