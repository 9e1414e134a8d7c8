"""What is a start from an earlier model worth, when one core of the new set is all there is to train on?

    python benchmarks/transfer.py                        # generated tissue: other stains, another panel
    python benchmarks/transfer.py --pairs DIR [DIR ...]  # real pairs, too: every group is once the new set
    python benchmarks/transfer.py --panels               # one model for two panels, against a model for each
    python benchmarks/transfer.py --quick                # seconds; its numbers mean nothing

A source model is trained on one set. Then one core of the new set is trained on (four in one of the ways), in several
ways with the same number of steps (half of them in one of the ways). Every way is scored on the same other cores of the
new set: Pearson's r after the last epoch, mean over the markers. The held-out cores choose nothing, neither an epoch
nor a rate. In real pairs (with groups.csv) the new set is one group and the source is trained on all the others.

With --panels, two sets of generated cores share four of their markers. One model is trained on both with panels.csv,
and one on each; all are scored on further cores, in which every marker was measured. This answers another question
than the rest, so nothing else is trained.

Finished trainings are kept in --output_dir/trials.json; the same command continues. --report trains nothing and shows
the seeds of which all ways are finished.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any, cast

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from orion_unet.cli.arguments import Parser, parse_train_config, run_command
from orion_unet.data.channels import NAMES_FILE
from orion_unet.data.panels import PANELS_FILE, panel_file
from orion_unet.data.split import GROUPS_FILE
from orion_unet.demo.stains import MARKERS, VECTORS, Stain, render_he, render_orion, stain_dyes
from orion_unet.demo.tissue import Habit, draw_tissue
from orion_unet.run_log import write_json
from orion_unet.training.loop import train

SCRATCH = "from random weights"
# With this many cores to train on, where at least as many remain to be scored.
MORE, MORE_CORES = 4, "from random weights, 4 cores"
# The options of each way to train on the one core; {source} is the run of the source model.
WAYS: dict[str, list[str]] = {
    SCRATCH: [],
    "from random weights, rate 1e-3": ["--learning_rate", "1e-3"],
    "init_from": ["--init_from", "{source}"],
    "init_from, half the steps": ["--init_from", "{source}", "--epochs", "{half}"],
    "init_from, no warm-up": ["--init_from", "{source}", "--warmup_epochs", "0"],
    "init_from, rate 3e-3": ["--init_from", "{source}", "--learning_rate", "3e-3"],
    "init_from, rate 1e-3": ["--init_from", "{source}", "--learning_rate", "1e-3"],
    "init_from, encoder rate 0.1": ["--init_from", "{source}", "--encoder_rate_factor", "0.1"],
    "init_from, encoder last": ["--init_from", "{source}", "--encoder_train", "last"],
    "init_from, encoder frozen": ["--init_from", "{source}", "--encoder_train", "frozen"],
    # So low a rate that the weights stay where they are; only batch norm's statistics are those of the new core.
    "the source, batch norm measured anew": ["--init_from", "{source}", "--learning_rate", "1e-12"],
}
SOURCE_PANEL = ("Hoechst", "CD3e", "CD20", "Pan-CK", "SMA", "Ki67")
# Of a large group, only so many cores, evenly spread: validation would take most of the time.
MOST_CORES = 13
NEW_PANEL = ("Pan-CK", "Hoechst", "CD68", "CD3e", "SMA")
# Of the panels, the training cores of each that a seed draws, those that it draws from, and the scored cores.
PANELS = {"A": SOURCE_PANEL, "B": NEW_PANEL}
ALL_MARKERS = tuple(dict.fromkeys((*SOURCE_PANEL, *NEW_PANEL)))
DRAWN, POOL, SCORED = 4, 10, 6
MIXED = "one model, panels differ"
# Each way: the folder, the panels whose cores are trained on, and how many times the steps of a single model.
PANEL_WAYS = {
    "a model for panel A": ("panels", "A", 1),
    "a model for panel B": ("panels", "B", 1),
    "a model for panel A, steps of both": ("panels", "A", 2),
    "a model for panel B, steps of both": ("panels", "B", 2),
    MIXED: ("panels", "AB", 1),
    f"{MIXED}, steps of both": ("panels", "AB", 2),
    "one model, every marker measured": ("complete", "AB", 1),
    "one model, every marker measured, steps of both": ("complete", "AB", 2),
}


@dataclass(frozen=True)
class Size:
    """How much is trained: of the source and of each way."""

    side: int
    cores: int
    patch: int
    base: int
    source_epochs: int
    source_patches: int
    epochs: int
    patches: int
    batch: int


FULL = Size(side=256, cores=12, patch=96, base=8, source_epochs=20, source_patches=192, epochs=20, patches=64, batch=8)
QUICK = Size(side=96, cores=3, patch=32, base=4, source_epochs=1, source_patches=4, epochs=2, patches=4, batch=2)


@dataclass(frozen=True)
class Task:
    """A source set and a new set: folders, and the cores of each."""

    name: str
    source: Path
    source_cores: tuple[str, ...]
    new: Path
    new_cores: tuple[str, ...]


def main(argv: list[str]) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, nargs="+", default=[], metavar="DIR", help="real pairs; default: none")
    parser.add_argument("--targets", type=int, default=2, metavar="N", help="groups that are the new set; default: 2")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="trainings of each kind; default: 3")
    parser.add_argument("--ways", nargs="+", choices=[*WAYS, MORE_CORES], metavar="WAY",
                        help=f"only these, beside random weights: {', '.join([*WAYS, MORE_CORES][1:])}")  # fmt: skip
    parser.add_argument("--panels", action="store_true", help="one model for two panels, and nothing else")
    parser.add_argument("--quick", action="store_true", help="seconds, to try the benchmark; one seed")
    parser.add_argument("--report", action="store_true", help="train nothing, report what is finished")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/transfer"), metavar="DIR", help="default: runs/…")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    size, seeds = (QUICK, 1) if options.quick else (FULL, options.seeds)
    output = options.output_dir
    output.mkdir(parents=True, exist_ok=True)
    if options.panels:
        text = mixed_panels(output, size, seeds, options.report)
        (output / "panels.md").write_text(text, encoding="utf-8")
        print(text)
        return 0
    tasks = [generated(output, size), *(task for folder in options.pairs for task in real(folder, options.targets))]
    trials = Trials(output / "trials.json", size)
    # All tasks once before any is repeated, so that an interrupted benchmark has something to say of each.
    for seed in range(0 if options.report else seeds):
        for task in tasks:
            run_task(task, seed, size, trials, output / "runs", options.ways)
    text = report(tasks, seeds, size, trials, options.ways)
    (output / "transfer.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


class Trials:
    """Finished trainings by task, seed and way, in a file that is whole after each of them."""

    def __init__(self, path: Path, size: Size, ways: dict[str, Any] = WAYS) -> None:
        self.path = path
        # As they are read again.
        settings = json.loads(json.dumps({**vars(size), "ways": ways}))
        stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        # Trials of other settings cannot be compared with these.
        self.document = stored if stored.get("settings") == settings else {"settings": settings, "trials": {}}

    @staticmethod
    def key(task: Task | str, seed: int, way: str) -> str:
        return f"{task if isinstance(task, str) else task.name} | {seed} | {way}"

    def get(self, task: Task | str, seed: int, way: str) -> dict[str, Any] | None:
        return self.document["trials"].get(self.key(task, seed, way))

    def add(self, task: Task | str, seed: int, way: str, found: dict[str, Any]) -> None:
        self.document["trials"][self.key(task, seed, way)] = found
        write_json(self.path, self.document)


def generated(output: Path, size: Size) -> Task:
    """Two sets of generated cores: the usual stains, and stains from elsewhere with another panel."""
    folders = [
        draw_set(output / "usual", size, 0, SOURCE_PANEL, False),
        draw_set(output / "other", size, 1, NEW_PANEL, True),
    ]
    cores = [tuple(core_names(folder)) for folder in folders]
    return Task("generated", folders[0], cores[0], folders[1], cores[1])


def draw_set(folder: Path, size: Size, seed: int, panel: tuple[str, ...], elsewhere: bool) -> Path:
    """Cores of one patient each. ``elsewhere``: half the haematoxylin, twice the eosin, shifted colours, grey glass."""
    if (folder / NAMES_FILE).exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    columns = [MARKERS.index(name) for name in panel]
    for core in range(size.cores):
        rng = np.random.default_rng([seed, core])
        patient = np.random.default_rng([seed, core, 1])
        tissue = draw_tissue(rng, size.side, Habit.draw(patient))
        stain = Stain.draw(patient, rng)
        dyes = stain_dyes(rng, tissue)
        if elsewhere:
            vectors = np.clip(stain.vectors + 0.35 * np.roll(VECTORS, 1, axis=1), 0.02, None)
            stain = replace(
                stain,
                haematoxylin=0.5 * stain.haematoxylin,
                eosin=2.0 * stain.eosin,
                vectors=vectors / np.linalg.norm(vectors, axis=1, keepdims=True),
                glass=stain.glass - np.array([30.0, 20.0, 12.0]),
            )
        np.save(folder / f"core_{core:02d}_HE.npy", render_he(rng, dyes, stain))
        orion = render_orion(rng, tissue, dyes, stain)
        np.save(
            folder / f"core_{core:02d}_ORION.npy",
            orion[..., columns] if orion.shape[-1] == len(MARKERS) else orion[columns],
        )
    # Last: a folder without it was interrupted and is drawn again.
    (folder / NAMES_FILE).write_text("\n".join(panel) + "\n", encoding="utf-8")
    return folder


def core_names(folder: Path) -> list[str]:
    return sorted(path.name.removesuffix("_HE.npy") for path in folder.glob("*_HE.npy"))


def real(folder: Path, targets: int) -> Iterator[Task]:
    """A task for each of the first groups with at least three cores: it is the new set, all others are the source."""
    with open(folder / GROUPS_FILE, newline="", encoding="utf-8") as file:
        group_of = {row["core"]: row["group"] for row in csv.DictReader(file)}
    groups = sorted(set(group_of.values()))
    large = [group for group in groups if sum(found == group for found in group_of.values()) >= 3]
    for group in large[:targets]:
        cores = sorted(core for core, found in group_of.items() if found == group)
        new = tuple(cores[place] for place in np.unique(np.linspace(0, len(cores) - 1, MOST_CORES).round().astype(int)))
        source = tuple(sorted(core for core, found in group_of.items() if found != group))
        yield Task(f"{folder.resolve().name}, {group} is new", folder, source, folder, new)


def ways_of(task: Task, chosen: list[str] | None) -> dict[str, list[str]]:
    """The ways to train on a task, or those of them that were chosen: more cores only where enough remain to be
    scored."""
    known = WAYS | ({MORE_CORES: []} if has_more(task) else {})
    return {way: words for way, words in known.items() if chosen is None or way in (SCRATCH, *chosen)}


def has_more(task: Task) -> bool:
    return len(task.new_cores) >= 2 * MORE


def run_task(task: Task, seed: int, size: Size, trials: Trials, runs: Path, chosen: list[str] | None) -> None:
    """Train the source where a way still needs it, and every way that is not finished."""
    ways = ways_of(task, chosen)
    missing = [way for way in ways if trials.get(task, seed, way) is None]
    if not missing:
        return
    base = runs / "".join(char if char.isalnum() else "_" for char in task.name) / f"seed_{seed}"
    order = np.random.default_rng(seed).permutation(len(task.source_cores))
    held_out = max(1, len(order) // 6)
    sides = [task.source_cores[core] for core in order]
    source = base / "source"
    if not (source / "finished").exists():
        fit(
            source,
            task.source,
            sides[held_out:],
            sides[:held_out],
            seed,
            size,
            size.source_epochs,
            size.source_patches,
            [],
        )
        (source / "finished").touch()
    drawn = np.random.default_rng([seed, 1]).permutation(len(task.new_cores)).tolist()
    known = MORE if has_more(task) else 1
    cores, scored = ([task.new_cores[at] for at in part] for part in (drawn[:known], sorted(drawn[known:])))
    for way in missing:
        print(f"{task.name}, seed {seed}: {way}", file=sys.stderr, flush=True)
        words = [word.format(source=source, half=size.epochs // 2) for word in ways[way]]
        run = base / f"way_{list(ways_of(task, None)).index(way)}"
        trained = cores if way == MORE_CORES else cores[:1]
        epochs = fit(run, task.new, trained, scored, seed, size, size.epochs, size.patches, words)
        trials.add(task, seed, way, {"cores": trained, "epochs": epochs})
        shutil.rmtree(run)


def fit(
    run: Path,
    pairs: Path,
    train_cores: list[str],
    val_cores: list[str],
    seed: int,
    size: Size,
    epochs: int,
    patches: int,
    words: list[str],
) -> list[dict[str, float | None]]:
    """Train with the stable recipe; r per marker on the held-out cores after every epoch."""
    run.mkdir(parents=True, exist_ok=True)
    split = run.with_name(f"{run.name}_split.json")
    sides = {"train": train_cores, "val": val_cores}
    write_json(split, {"schema": 1, **{k: [{"core": c, "group": c} for c in cores] for k, cores in sides.items()}})
    # The source's validation only chooses its epoch, so it may be of a group that is trained on.
    alone = run.with_name(f"{run.name}_groups.csv")
    alone.write_text("\n".join(["core,group", *(f"{core},{core}" for core in core_names(pairs))]), encoding="utf-8")
    # As many patches an epoch whatever the number of cores.
    patches_per_core = max(1, round(patches / len(train_cores)))
    config = parse_train_config([
        "--split_file", str(split), "--groups_csv", str(alone),
        "--recipe", "stable", "--pairs_dir", str(pairs), "--output_dir", str(run), "--overwrite", "--gpus", "0",
        "--seed", str(seed), "--epochs", str(epochs), "--early_stopping_patience", "0",
        "--patch_size", str(size.patch), "--patches_per_image", str(patches_per_core), "--patches_per_image_val", "4",
        "--batch_size", str(size.batch), "--base_features", str(size.base), "--depth", "3", "--num_workers", "0",
        "--sanity_check_freq", "0", *words,
    ])  # fmt: skip
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        code = train(config)
    if code != 0:
        raise RuntimeError(f"{run}: the training ended with {code}")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: m["pearson"] for name, m in line["val"]["per_channel"].items()} for line in lines]


def over_markers(values: dict[str, float | None], among: set[str] | None = None) -> float:
    """Mean r; a marker without a correlation counts as 0 if its prediction is flat, so that no way gains by it."""
    return mean(value or 0.0 for name, value in values.items() if among is None or name in among)


def report(tasks: list[Task], seeds: int, size: Size, trials: Trials, chosen: list[str] | None) -> str:
    """A table for each task, over the seeds of which every way is finished."""
    lines = [f"{os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}", ""]
    for task in tasks:
        ways = ways_of(task, chosen)
        whole = [seed for seed in range(seeds) if all(trials.get(task, seed, way) for way in ways)]
        if not whole:
            continue
        found = {way: [cast(dict, trials.get(task, seed, way))["epochs"] for seed in whole] for way in ways}
        scratch = [over_markers(epochs[-1]) for epochs in found[SCRATCH]]
        lines += [
            f"## {task.name}: {len(task.source_cores)} cores of the source, 1 core to train on, "
            f"{len(task.new_cores) - (MORE if has_more(task) else 1)} to score, {len(whole)} "
            f"{'seed' if len(whole) == 1 else 'seeds'}",
            "",
            "| way | r, last epoch | lowest, highest seed | against random weights, seed by seed "
            "| steps until as good as random weights at their end |",
            "| --- | --- | --- | --- | --- |",
        ]
        steps = size.patches // size.batch
        for way, runs in found.items():
            last = [over_markers(epochs[-1]) for epochs in runs]
            gains = ", ".join(f"{a - b:+.2f}" for a, b in zip(last, scratch, strict=True))
            reached = ", ".join(
                next((str(steps * epoch) for epoch, values in enumerate(epochs, 1) if over_markers(values) >= end), "-")
                for epochs, end in zip(runs, scratch, strict=True)
            )
            lines.append(f"| {way} | {mean(last):.3f} | {min(last):.2f}, {max(last):.2f} | {gains} | {reached} |")
        lines.append("")
        if task.name == "generated":
            lines += new_marker(found)
    return "\n".join(lines)


def new_marker(found: dict[str, list[list[dict[str, float | None]]]]) -> list[str]:
    """The markers that both panels have, and the one that only the new panel has."""
    shared = set(SOURCE_PANEL) & set(NEW_PANEL)
    (new,) = set(NEW_PANEL) - shared
    lines = [f"| way | r of the {len(shared)} shared markers | r of {new}, which is new |", "| --- | --- | --- |"]
    for way, runs in found.items():
        parts = [mean(over_markers(epochs[-1], among) for epochs in runs) for among in (shared, {new})]
        lines.append(f"| {way} | {parts[0]:.3f} | {parts[1]:.3f} |")
    return [*lines, ""]


def mixed_panels(output: Path, size: Size, seeds: int, only_report: bool) -> str:
    """Train every way of PANEL_WAYS for every seed that is not finished; the table of those that are."""
    trials = Trials(output / "panel_trials.json", size, PANEL_WAYS)
    folders = {"panels": output / "panels", "complete": output / "complete"}
    scored = [f"t_{core:02d}" for core in range(SCORED)]
    for seed in range(0 if only_report else seeds):
        draw_cohorts(folders["panels"], folders["complete"], size)
        drawn = {panel: np.random.default_rng([seed, ord(panel)]).permutation(POOL)[:DRAWN] for panel in PANELS}
        for way, (folder, trained, times) in PANEL_WAYS.items():
            if trials.get("panels", seed, way) is not None:
                continue
            print(f"panels, seed {seed}: {way}", file=sys.stderr, flush=True)
            cores = [f"{panel.lower()}_{core:02d}" for panel in trained for core in sorted(drawn[panel])]
            known = {name for panel in trained for name in PANELS[panel]}
            others = [name for name in ALL_MARKERS if name not in known]
            words = ["--exclude_channels", ",".join(others)] if others else []
            run = output / "runs" / f"panels_{seed}_{list(PANEL_WAYS).index(way)}"
            patches = size.patches * len(PANELS) * times
            epochs = fit(run, folders[folder], cores, scored, seed, size, size.epochs, patches, words)
            trials.add("panels", seed, way, {"cores": cores, "epochs": epochs})
            shutil.rmtree(run)
    return panel_report(seeds, trials)


def draw_cohorts(panels: Path, complete: Path, size: Size) -> None:
    """Cores a_NN and b_NN, one patient each, of which one folder has the markers of their panel and the other all; and
    t_NN, of which both have all."""
    if (panels / PANELS_FILE).exists():
        return
    for folder in (panels, complete):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / NAMES_FILE).write_text("\n".join(ALL_MARKERS) + "\n", encoding="utf-8")
    listed = {**PANELS, "all": ALL_MARKERS}
    lines = ["core,panel"]
    for cohort, (panel, markers) in enumerate(listed.items()):
        for core in range(SCORED if panel == "all" else POOL):
            name = f"{'t' if panel == 'all' else panel.lower()}_{core:02d}"
            rng = np.random.default_rng([2, cohort, core])
            patient = np.random.default_rng([2, cohort, core, 1])
            tissue = draw_tissue(rng, size.side, Habit.draw(patient))
            stain, dyes = Stain.draw(patient, rng), stain_dyes(rng, tissue)
            he, orion = render_he(rng, dyes, stain), render_orion(rng, tissue, dyes, stain)
            for folder, kept in ((panels, markers), (complete, ALL_MARKERS)):
                columns = [MARKERS.index(marker) for marker in kept]
                np.save(folder / f"{name}_HE.npy", he)
                np.save(folder / f"{name}_ORION.npy", np.take(orion, columns, list(orion.shape).index(len(MARKERS))))
            lines.append(f"{name},{panel}")
    for panel, markers in listed.items():
        (panels / panel_file(panel)).write_text("\n".join(markers) + "\n", encoding="utf-8")
    # Last: a folder without it was interrupted and is drawn again.
    (panels / PANELS_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")


def panel_report(seeds: int, trials: Trials) -> str:
    """A table over the seeds of which every way is finished."""
    whole = [seed for seed in range(seeds) if all(trials.get("panels", seed, way) for way in PANEL_WAYS)]
    if not whole:
        return "no seed is finished\n"
    shared = set(PANELS["A"]) & set(PANELS["B"])
    kinds = [shared, set(PANELS["A"]) - shared, set(PANELS["B"]) - shared]
    lines = [
        f"{os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}",
        "",
        f"## Panels that differ: {DRAWN} cores to train on of each panel, {SCORED} to score, {len(whole)} "
        f"{'seed' if len(whole) == 1 else 'seeds'}",
        "",
        f"| way | steps | r of the {len(shared)} shared markers | r of {', '.join(sorted(kinds[1]))} (A) "
        f"| r of {', '.join(sorted(kinds[2]))} (B) |",
        "| --- | --- | --- | --- | --- |",
    ]
    size = trials.document["settings"]
    for way, (_, trained, times) in PANEL_WAYS.items():
        last = [cast(dict, trials.get("panels", seed, way))["epochs"][-1] for seed in whole]
        steps = size["epochs"] * size["patches"] * len(PANELS) * times // size["batch"]
        cells = []
        for kind, panel in zip(kinds, ("", "A", "B"), strict=True):
            values = [over_markers(markers, kind) for markers in last] if panel in trained else []
            each = ", ".join(f"{value:.2f}" for value in values)
            cells.append(f"{mean(values):.3f} ({each})" if values else "-")
        lines.append(f"| {way} | {steps} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(run_command(main))
