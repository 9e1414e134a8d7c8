"""To which cores should the level of the markers be fitted: those that train, or those that choose the best epoch?

    python benchmarks/recalibration.py --real_pairs DIR ... --real_names NAME ...    # pairs with a groups.csv
    python benchmarks/recalibration.py --quick     # seconds, on a few generated cores; its numbers mean nothing

Trains the recipe ``stable`` on the sets of the stability benchmark, and fits the lines of ``--recalibrate`` to the
network's predictions of different cores: by the trainer, to training patches; to all cores that chose the best epoch;
and to both, the training cores counting as much as four of the others. The squared error is that of the cores that
score, which neither train nor choose; values are not cut off at 0 and 1.

What is fitted to the cores that choose flatters their own scores. By how much: their error with lines of the other half
of them, over that with lines of all of them.

Finished trainings are kept in --output_dir; the same command continues. --report trains nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from held_out import Trials
from stability import Job, plan, select, training_sets
from stability_figures import kind
from stability_job import trained_model
from stability_recipes import spread_out

from orion_unet.cli.arguments import Parser, run_command
from orion_unet.config import TrainConfig
from orion_unet.correlation import moments
from orion_unet.errors import InputError
from orion_unet.evaluation.scored_folder import FolderOptions, ScoredFolder, open_folder
from orion_unet.models.recalibration import LEAST_PATCHES, Recalibration
from orion_unet.training.loop import train

# Training cores whose predictions are looked at, and as how many cores they count beside those that choose.
TRAINING_CORES, COUNT_AS = 16, 4


def trial(job: Job, run: Path) -> dict[str, Any]:
    """Train, and take the sums (cores, 6, C) of the network's own predictions of the three kinds of cores."""
    config = TrainConfig.from_options(job.content["options"])
    if train(config) != 0:
        raise InputError(f"{run}: the training did not finish; the same command continues")
    model = trained_model(Path(config.output.output_dir))
    lines = model.recalibration
    assert lines is not None
    folder = open_folder(replace(model, recalibration=None), Path(config.data.pairs_dir), FolderOptions())
    split = json.loads(Path(str(config.data.split_file)).read_text(encoding="utf-8"))
    cores = {
        "training": spread_out([each["core"] for each in split["train"]], TRAINING_CORES),
        "chosen": job.content["chosen"],
        "scored": job.content["scored"],
    }
    return {
        "lines": lines.document(),
        "empty": [name in model.normalization.empty for name in folder.names],
        "sums": {name: [core_sums(folder, core) for core in of_kind] for name, of_kind in cores.items()},
    }


def core_sums(folder: ScoredFolder, core: str) -> list[Any]:
    """Sums (6, C) over the pixels of a core."""
    region = folder.region(folder.table.names.tolist().index(core))
    found = (image.numpy().reshape(len(folder.names), -1) for image in (region.predicted, region.measured))
    return list(moments(*found).tolist())


def mean_error(sums: np.ndarray, lines: Recalibration) -> np.ndarray:
    """Mean squared error (C,) of the predictions once recalibrated, from sums (6, C)."""
    count, p, t, pp, tt, pt = sums
    a, b = lines.scale, lines.offset
    return np.asarray((a * a * pp + 2 * a * b * p - 2 * a * pt - 2 * b * t + tt) / count + b * b)


def errors_of(found: dict[str, Any]) -> tuple[dict[str, np.ndarray], np.ndarray, float]:
    """Errors (C,) on the scored cores by what the lines were fitted to, those of the training means, and the flattery.

    Every core counts as much as any other. Markers that are empty are left out.
    """
    of_core = {name: np.array(sums) / np.array(sums)[:, :1] for name, sums in found["sums"].items()}
    empty = np.array(found["empty"])
    fit = partial(Recalibration.fit, patches=np.full(len(empty), LEAST_PATCHES), empty=empty)
    training, chosen, scored = (of_core[name] for name in ("training", "chosen", "scored"))
    untouched = Recalibration(np.ones(len(empty)), np.zeros(len(empty)), 0)

    def both(cores: np.ndarray) -> Recalibration:
        return fit(cores.sum(axis=0) + COUNT_AS * training.mean(axis=0))

    ways = {
        "as the network gives them": untouched,
        "training patches": Recalibration.from_document(found["lines"], len(empty)),
        "cores that choose": fit(chosen.sum(axis=0)),
        "both": both(chosen),
    }
    total = scored.mean(axis=0)
    means = mean_error(total, Recalibration(0 * untouched.scale, training[:, 2].mean(axis=0), 0))
    # Groups follow each other, so that two groups are parted.
    halves = [chosen[: len(chosen) // 2], chosen[len(chosen) // 2 :]]
    own = np.mean([mean_error(core, both(chosen))[~empty].mean() for core in chosen])
    others = np.mean([
        mean_error(core, both(rest))[~empty].mean()
        for half, rest in (halves, halves[::-1]) if len(rest) for core in half
    ])  # fmt: skip
    return {name: mean_error(total, lines)[~empty] for name, lines in ways.items()}, means[~empty], float(others / own)


def report(trials: dict[str, Any]) -> str:
    """A table of each set: medians over the seeds of means over markers and slides."""
    by_seed: dict[str, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    for name, found in trials.items():
        seed, _, training_set = name.partition(" ")
        by_seed[kind(training_set)][seed].append(errors_of(found))
    lines = []
    for name, seeds in by_seed.items():
        ways = next(iter(seeds.values()))[0][0]
        lines += ["", f"## {name}, {len(seeds)} seed{'s' * (len(seeds) > 1)}", ""]
        lines += ["| lines fitted to | squared error | against the training means | markers worse than their mean |"]
        lines += ["| --- " * 4 + "|"]
        for way in ways:
            of_seed = [[(errors[way], means) for errors, means, _ in found] for found in seeds.values()]
            error = np.median([np.mean([each.mean() for each, _ in found]) for found in of_seed])
            share = np.median([np.mean([(each / means).mean() for each, means in found]) for found in of_seed])
            worse = [int((each > means).sum()) for found in of_seed for each, means in found]
            lines.append(f"| {way} | {error:.5f} | {share:.3f} | {sum(worse)} in {len(worse)} trainings |")
        flattery = np.median([np.mean([each[2] for each in found]) for found in seeds.values()])
        lines += ["", f"Lines of both flatter the cores that choose by {100 * (flattery - 1):.1f} % of their error."]
    return "\n".join(lines[1:])


def main(argv: list[str]) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real_pairs", type=Path, nargs="+", default=[], metavar="DIR", help="as of stability.py")
    parser.add_argument("--real_names", nargs="+", metavar="NAME", help="their names in the report")
    parser.add_argument("--sets", nargs="+", metavar="NAME", help="sets to train on, by name; default: all")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="trainings on each set; default: 5")
    parser.add_argument("--quick", action="store_true", help="one seed of a few steps on a few cores")
    parser.add_argument("--report", action="store_true", help="train nothing, report what is finished")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/recalibration"), metavar="DIR",
                        help="default: runs/recalibration")  # fmt: skip
    options = parser.parse_args(argv)
    if options.quick:
        options.seeds = 1
    torch.set_num_threads(1)
    trials = Trials(options.output_dir / f"trials_{'quick' if options.quick else 'full'}.json", {})
    if not options.report:
        (options.output_dir / "data").mkdir(parents=True, exist_ok=True)
        for job in plan(training_sets(options), select(["stable"]), options):
            name = f"{job.content['options']['seed']} {job.set}"
            print(name, file=sys.stderr, flush=True)
            job.folder.mkdir(parents=True, exist_ok=True)
            trials.get(name, job.folder, partial(trial, job))
    print(report(trials.found))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
