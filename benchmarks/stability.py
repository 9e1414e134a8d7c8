"""Is the recipe stable, what made it so, and is it better than the alternatives?

    python benchmarks/stability.py --real_pairs DIR          # everything: 4 core hours of training
    python benchmarks/stability.py --quick                   # the whole way in small, in minutes: numbers of no worth
    python benchmarks/stability.py --only former stable      # some recipes

Trains the recipes of ``stability_recipes.py`` with up to five seeds on generated tissue and, where ``--real_pairs``
names a folder of real ones with a groups.csv, with every slide held out in turn. All recipes of a set see the same
pairs, are judged by the same held-out cores, and have the same network, patches and epochs but where that is what is
changed. Because recipes weigh loss terms differently, they are compared on one yardstick: the mean squared error and
the correlation of the best model on the held-out cores, before any hot pixel is removed. (Its unit, the range of each
marker in the training cores, differs slightly where a recipe holds out more cores.)

It goes on where it was stopped: a training that has ended is not repeated. A recipe that fails is named, and the
others go on. Tables and figures of whatever is finished are written at the end, or with ``--report`` at once.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stability_recipes import STABLE, Recipe, TrainingSet, demo_set, real_sets, recipes
from stability_report import write_report

from orion_unet.cli.arguments import Parser, run_command
from orion_unet.distributed import usable_cores
from orion_unet.errors import InputError
from orion_unet.run_log import write_json

DEADLINE_S = 1800
INTERRUPTED = (130, 143, -2, -15)
# Processes are forked from one that has imported torch and what a training needs.
PROCESSES = multiprocessing.get_context("forkserver")


def main(argv: list[str]) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/stability"), metavar="DIR",
                        help="where everything is kept; default: runs/stability")  # fmt: skip
    parser.add_argument("--real_pairs", type=Path, metavar="DIR", help="real pairs of several slides; default: none")
    parser.add_argument("--only", nargs="+", metavar="RECIPE", help="recipes, or groups of them; default: all")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="trainings of a recipe at most; default: 5")
    parser.add_argument("--jobs", type=int, metavar="N", help="trainings at a time; default: the usable cores")
    parser.add_argument("--quick", action="store_true", help="two seeds of a few steps on a few cores")
    parser.add_argument("--report", action="store_true", help="train nothing, write what is there")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="where figures go; default: the output folder")
    options = parser.parse_args(argv)
    if options.quick:
        options.seeds = min(options.seeds, 2)
    chosen = select(options.only)
    output: Path = options.output_dir
    (output / "data").mkdir(parents=True, exist_ok=True)
    sets = training_sets(options)
    jobs = list(plan(sets, chosen, options))
    if not options.report:
        train(jobs, options.jobs or usable_cores())
    results = [json.loads(job.result.read_text(encoding="utf-8")) | {"set": job.set, "recipe": job.recipe.name}
               for job in jobs if job.finished()]  # fmt: skip
    failed = sorted({f"{job.recipe.name} ({job.set}): {job.why()}" for job in jobs if job.failed()})
    text = write_report(results, chosen, [each.name for each in sets], failed,
                        options.figures or output)  # fmt: skip
    (output / "stability.md").write_text(text, encoding="utf-8")
    print(text)
    return 1 if failed else 0


def select(words: list[str] | None) -> list[Recipe]:
    """The recipes with one of these names, or of one of these groups."""
    known = recipes()
    if not words:
        return known
    unknown = [word for word in words if word not in {name for r in known for name in (r.name, r.group)}]
    if unknown:
        raise InputError(
            f"--only {unknown[0]}: is no recipe; there are {', '.join(recipe.name for recipe in known)}, "
            f"and the groups {', '.join(sorted({recipe.group for recipe in known}))}"
        )
    return [recipe for recipe in known if recipe.name in words or recipe.group in words]


def training_sets(options: argparse.Namespace) -> list[TrainingSet]:
    """The generated set, and a set for each slide of the real pairs held out."""
    data = options.output_dir / "data"
    sets = [demo_set(data, 12, 2) if options.quick else demo_set(data)]
    if options.real_pairs:
        if not (options.real_pairs / "groups.csv").is_file():
            raise InputError(f"--real_pairs {options.real_pairs}: has no groups.csv that names the slide of every core")
        sets += real_sets(options.real_pairs, data, 6 if options.quick else 32)
    return sets


@dataclass(frozen=True)
class Job:
    """One training: a recipe on a set with a seed, and where it is kept."""

    set: str
    recipe: Recipe
    folder: Path
    content: dict[str, Any]

    @property
    def result(self) -> Path:
        return self.folder / "result.json"

    def finished(self) -> bool:
        """Whether this very training has ended before."""
        try:
            return bool(json.loads(self.result.read_text(encoding="utf-8"))["job"] == self.content)
        except (OSError, ValueError, KeyError):
            return False

    def failed(self) -> bool:
        return (self.folder / "log.txt").exists() and not self.finished()

    def why(self) -> str:
        """The last lines that it said, and how it ended."""
        lines = (self.folder / "log.txt").read_text(encoding="utf-8", errors="replace").split("\n")
        return "; ".join([line.strip() for line in lines if line.strip()][-2:]) or "no word"


def plan(sets: list[TrainingSet], chosen: list[Recipe], options: argparse.Namespace) -> Iterator[Job]:
    """All trainings, one seed of everything before the next."""
    for seed in range(options.seeds):
        for each in sets:
            known: list[Any] = []
            for recipe in (recipe for recipe in chosen if seed < recipe.seeds):
                merged = {**STABLE, **each.options, **recipe.options, "seed": seed, "pairs_dir": str(each.pairs_dir)}
                if not each.wider:
                    # The slides are the split: a recipe that would change nothing else is one that is there already.
                    merged["val_split"] = STABLE["val_split"]
                    if (merged, recipe.changes) in known:
                        continue
                    known.append((dict(merged), recipe.changes))
                if options.quick:
                    merged |= {"epochs": 2, "warmup_epochs": 0, "base_features": 2}
                split = each.split_file(options.output_dir / "data", merged["val_split"])
                name = recipe.name.replace(" ", "_").replace("/", "-").replace(",", "")
                folder = options.output_dir / each.name.replace(" ", "_").replace(",", "") / name / f"seed_{seed}"
                merged |= {"split_file": str(split), "output_dir": str(folder / "run")}
                yield Job(each.name, recipe, folder, {
                    "options": merged,
                    "changes": list(recipe.changes),
                    "scored": list(each.scored),
                    "baselines": recipe.name == "stable",
                    "result": str(folder / "result.json"),
                })  # fmt: skip


def train(jobs: list[Job], at_once: int) -> None:
    """Run what has not been run, several at a time, each on one thread."""
    waiting = [job for job in jobs if not job.finished()]
    if not waiting:
        return
    print(f"{len(waiting)} of {len(jobs)} trainings, {at_once} at a time", file=sys.stderr, flush=True)
    started, done = time.monotonic(), 0
    os.environ["OMP_NUM_THREADS"] = "1"
    # The process that is forked from finds what it is to import only there.
    here = Path(__file__).resolve().parent
    os.environ["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    PROCESSES.set_forkserver_preload(["stability_job"])

    def one(job: Job) -> None:
        nonlocal done
        run_one(job)
        done += 1
        taken = time.monotonic() - started
        print(
            f"{done}/{len(waiting)} {job.set}: {job.recipe.name}{' FAILED' if job.failed() else ''}; "
            f"{taken / 60:.0f} min, {taken / done * (len(waiting) - done) / 60:.0f} to go", file=sys.stderr, flush=True,
        )  # fmt: skip

    with ThreadPoolExecutor(at_once) as pool:
        for _ in pool.map(one, waiting):
            pass


def run_one(job: Job) -> None:
    """Train in a process of its own; what it says goes to log.txt."""
    from stability_job import train_and_score

    job.folder.mkdir(parents=True, exist_ok=True)
    job.result.unlink(missing_ok=True)
    spec = job.folder / "job.json"
    write_json(spec, job.content)
    log = job.folder / "log.txt"
    log.write_bytes(b"")
    process = PROCESSES.Process(target=train_and_score, args=(spec, log), daemon=True)
    process.start()
    process.join(DEADLINE_S)
    if process.is_alive():
        process.kill()
        process.join()
        why = f"ended after {DEADLINE_S} s"
    elif process.exitcode in INTERRUPTED:
        log.unlink()
        return
    else:
        why = f"ended with exit code {process.exitcode}"
    if not job.finished():
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"\n{why}\n")


if __name__ == "__main__":
    sys.exit(run_command(main))
