"""Is the recipe stable, what made it so, and is it better than the alternatives?

    python benchmarks/stability.py --real_pairs DIR [DIR ...]    # everything: hours of training
    python benchmarks/stability.py --quick                   # a few steps each: tests that the benchmark runs, no more
    python benchmarks/stability.py --only former stable      # some recipes

Trains the recipes of ``stability_recipes.py`` with up to five seeds on generated tissue and, with ``--real_pairs``, on
real pairs whose groups.csv names their slides or places. All recipes of a set train on the same pairs, with the same
network, patches and epochs except where the recipe changes them. Groups are in three parts: some train, some choose
the best epoch, and others, which choose nothing, score the best model. Recipes weigh loss terms differently, so their
losses cannot be compared. They are compared by the mean squared error and the correlation of the best model on the
cores that score, whose hot pixels are kept. (The unit of the error is the range of each marker in the training cores,
which differs slightly when a recipe holds out more cores.)

The benchmark can be interrupted: the same command skips the trainings that have ended. A recipe that fails is reported
and does not stop the others. Tables and figures are written at the end, or at once with ``--report``. An archive
(``--archive FILE``) carries finished trainings to another folder or machine.
"""

from __future__ import annotations

import argparse
import gzip
import json
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stability_figures import kind
from stability_recipes import PUBLISHED, Recipe, TrainingSet, demo_sets, real_sets, recipes, slug
from stability_report import write_report

from orion_unet.cli.arguments import Parser, run_command
from orion_unet.distributed import usable_cores
from orion_unet.errors import InputError
from orion_unet.run_log import write_json

DEADLINE_S = 1800
# Options that say where a training lies, not what it is.
PATHS = ("pairs_dir", "split_file", "output_dir")
INTERRUPTED = (130, 143, -2, -15)
# Trainings are forked from a server process that has already imported torch.
PROCESSES = multiprocessing.get_context("forkserver")


def main(argv: list[str]) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/stability"), metavar="DIR",
                        help="folder of data and results; default: runs/stability")  # fmt: skip
    parser.add_argument("--real_pairs", type=Path, nargs="+", default=[], metavar="DIR",
                        help="real pairs of several slides; all recipes train on the first; default: none")  # fmt: skip
    parser.add_argument(
        "--real_names", nargs="+", metavar="NAME", help="their names in the report; default: the folders'"
    )
    parser.add_argument("--sets", nargs="+", metavar="NAME", help="sets to train on, by name; default: all")
    parser.add_argument("--only", nargs="+", metavar="RECIPE", help="recipes, or groups of them; default: all")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="seeds per recipe, at most; default: 5")
    parser.add_argument("--jobs", type=int, metavar="N", help="trainings at a time; default: the usable cores")
    parser.add_argument("--quick", action="store_true", help="two seeds of a few steps on a few cores")
    parser.add_argument("--report", action="store_true", help="train nothing, report what has been trained")
    parser.add_argument("--archive", type=Path, metavar="FILE",
                        help="finished trainings, read first and written last: .jsonl.gz")  # fmt: skip
    parser.add_argument("--figures", type=Path, metavar="DIR", help="folder of the figures; default: the output folder")
    options = parser.parse_args(argv)
    if options.quick:
        options.seeds = min(options.seeds, 2)
    chosen = select(options.only)
    output: Path = options.output_dir
    archived = read_archive(options.archive) if options.archive else {}
    (output / "data").mkdir(parents=True, exist_ok=True)
    sets = training_sets(options)
    jobs = list(plan(sets, chosen, options))
    restore(archived, jobs)
    if not options.report:
        train(jobs, options.jobs or usable_cores())
    results = [job.read() | {"set": job.set, "recipe": job.recipe.name} for job in jobs if job.finished()]
    if options.archive:
        write_archive(options.archive, archived | {job.archived_as: job.read() for job in jobs if job.finished()})
    failed = sorted({f"{job.recipe.name} ({job.set}): {job.why()}" for job in jobs if job.failed()})
    text = write_report(results, chosen, [each.name for each in sets], failed,
                        options.figures or output)  # fmt: skip
    (output / "stability.md").write_text(text, encoding="utf-8")
    print(text)
    return 1 if failed else 0


def select(words: list[str] | None) -> list[Recipe]:
    """The recipes with one of these names or in one of these groups; without words, all of them."""
    known = recipes()
    if not words:
        return known
    unknown = [word for word in words if word not in {name for r in known for name in (r.name, r.group)}]
    if unknown:
        raise InputError(
            f"--only {unknown[0]}: no such recipe; the recipes are {', '.join(recipe.name for recipe in known)}, "
            f"the groups {', '.join(sorted({recipe.group for recipe in known}))}"
        )
    return [recipe for recipe in known if recipe.name in words or recipe.group in words]


def training_sets(options: argparse.Namespace) -> list[TrainingSet]:
    """The generated sets, and those of the real pairs. Raises InputError."""
    data, quick = options.output_dir / "data", options.quick
    names = options.real_names or [folder.resolve().name for folder in options.real_pairs]
    if len(names) != len(options.real_pairs):
        raise InputError(f"--real_names: {len(names)} names for the {len(options.real_pairs)} folders of --real_pairs")
    for place, name in enumerate(names):
        if slug(name) in map(slug, names[:place]) or not re.fullmatch(r"[\w -]+", name) or name.startswith("demo"):
            raise InputError(
                f"--real_names {name}: use letters, digits, spaces and -, each name once; none may start with demo"
            )
    sets = demo_sets(data, 12, 3, 2) if quick else demo_sets(data)
    for place, (folder, name) in enumerate(zip(options.real_pairs, names, strict=True)):
        if not (folder / "groups.csv").is_file():
            raise InputError(f"--real_pairs {folder}: has no groups.csv with the slide of every core")
        sets += real_sets(folder, data, name, place == 0, 1 if quick else 10)
    kinds = list(dict.fromkeys(kind(each.name) for each in sets))
    unknown = [name for name in options.sets or () if name not in kinds]
    if unknown:
        raise InputError(f"--sets {unknown[0]}: no such set; the sets are {', '.join(kinds)}")
    return [each for each in sets if kind(each.name) in (options.sets or kinds)]


@dataclass(frozen=True)
class Job:
    """One training: a recipe, a set, a seed, and the folder of its results."""

    set: str
    recipe: Recipe
    folder: Path
    content: dict[str, Any]

    @property
    def result(self) -> Path:
        return self.folder / "result.json"

    def read(self) -> dict[str, Any]:
        """Its result."""
        found: dict[str, Any] = json.loads(self.result.read_text(encoding="utf-8"))
        return found

    def finished(self) -> bool:
        """Whether this training, with exactly these settings, has ended."""
        try:
            return bool(self.read()["job"] == self.content)
        except (OSError, ValueError, KeyError):
            return False

    @property
    def archived_as(self) -> str:
        """What tells this training from others wherever its folders lie."""
        content = {name: value for name, value in self.content.items() if name != "result"}
        content["options"] = {name: value for name, value in content["options"].items() if name not in PATHS}
        return json.dumps({"set": self.set, **content}, sort_keys=True)

    def failed(self) -> bool:
        return (self.folder / "log.txt").exists() and not self.finished()

    def why(self) -> str:
        """The last two lines of its log, which say how it ended."""
        lines = (self.folder / "log.txt").read_text(encoding="utf-8", errors="replace").split("\n")
        return "; ".join([line.strip() for line in lines if line.strip()][-2:]) or "the log is empty"


def plan(sets: list[TrainingSet], chosen: list[Recipe], options: argparse.Namespace) -> Iterator[Job]:
    """All trainings, ordered by seed."""
    for seed, each in product(range(options.seeds), sets):
        known: list[Any] = []
        parts = each.parts(seed)
        for recipe in chosen:
            if seed >= recipe.seeds or (each.groups and recipe.group not in each.groups):
                continue
            merged = {**PUBLISHED, **each.options, **recipe.options, "seed": seed, "pairs_dir": str(each.pairs_dir)}
            split = each.split_file(options.output_dir / "data", seed, merged["val_split"])
            # A recipe that differs from another only in a val_split which this set does not follow is a duplicate.
            same = (merged | {"val_split": None}, split, recipe.changes)
            if same in known:
                continue
            known.append(same)
            if options.quick:
                merged |= {"epochs": 2, "warmup_epochs": 0, "base_features": 2}
            folder = options.output_dir / slug(each.name) / slug(recipe.name) / f"seed_{seed}"
            merged |= {"split_file": str(split), "output_dir": str(folder / "run")}
            yield Job(each.name, recipe, folder, {
                "options": merged,
                "changes": list(recipe.changes),
                "chosen": list(parts.chosen),
                "scored": list(parts.scored),
                "baselines": recipe.name == "stable",
                "result": str(folder / "result.json"),
            })  # fmt: skip


def restore(archived: dict[str, Any], jobs: list[Job]) -> None:
    """Write archived results to the folders of these jobs, where they have none yet."""
    for job in jobs:
        result = archived.get(job.archived_as)
        if result is not None and not job.finished():
            job.folder.mkdir(parents=True, exist_ok=True)
            write_json(job.result, result | {"job": job.content})


def write_archive(archive: Path, found: dict[str, Any]) -> None:
    """One line for each training, numbers to six digits; without a time, so that equal results give equal bytes."""

    def short(number: str) -> float:
        return float(f"{float(number):.6g}")

    with open(archive, "wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=0) as packed:
        for name in sorted(found):
            result = {key: value for key, value in found[name].items() if key != "job"}
            result = json.loads(json.dumps(result), parse_float=short)
            packed.write(json.dumps({"training": json.loads(name), "result": result}).encode() + b"\n")


def read_archive(archive: Path) -> dict[str, Any]:
    """Results by training; none where there is no archive. Raises InputError."""
    try:
        with gzip.open(archive, "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        return {json.dumps(row["training"], sort_keys=True): row["result"] for row in rows}
    except FileNotFoundError:
        return {}
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--archive {archive}: is no archive of this benchmark ({error})") from error


def train(jobs: list[Job], at_once: int) -> None:
    """Run the trainings that have not ended yet, several at a time, one thread each."""
    waiting = [job for job in jobs if not job.finished()]
    if not waiting:
        return
    print(f"{len(waiting)} of {len(jobs)} trainings, {at_once} at a time", file=sys.stderr, flush=True)
    started, done = time.monotonic(), 0
    os.environ["OMP_NUM_THREADS"] = "1"
    # The fork server imports stability_job and the package by these paths.
    here = Path(__file__).resolve().parent
    os.environ["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    PROCESSES.set_forkserver_preload(["stability_job"])
    signal.signal(signal.SIGTERM, stop)

    def one(job: Job) -> None:
        nonlocal done
        run_one(job)
        done += 1
        taken = time.monotonic() - started
        print(
            f"{done}/{len(waiting)} {job.set}: {job.recipe.name}{' FAILED' if job.failed() else ''}; "
            f"{taken / 60:.0f} min, {taken / done * (len(waiting) - done) / 60:.0f} min left",
            file=sys.stderr, flush=True,
        )  # fmt: skip

    with ThreadPoolExecutor(at_once) as pool:
        for _ in pool.map(one, waiting):
            pass


def stop(signum: int, frame: Any) -> None:
    """End the trainings with the benchmark; the next start trains them again."""
    for process in multiprocessing.active_children():
        process.terminate()
    os._exit(128 + signum)


def run_one(job: Job) -> None:
    """Train in a separate process that writes its output to log.txt."""
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
        why = f"killed after {DEADLINE_S} s"
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
