"""Out-of-fold scores: every core predicted by the one model of a cross-validation that held it out.

The folds differ slightly in their normalisation, which is measured on their training cores. Measured and predicted
values of a core are normalised alike, and correlations are over the pixels of all cores together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from orion_unet.command_options import DeviceOptions
from orion_unet.data.scale import Progress, no_progress
from orion_unet.errors import InputError, RunError
from orion_unet.evaluation.baselines import find_baselines
from orion_unet.evaluation.evaluate import require_packages
from orion_unet.evaluation.figures import draw_markers
from orion_unet.evaluation.files import interval_document, json_scores, score_columns, score_rows, versions
from orion_unet.evaluation.gathering import GatheredCores
from orion_unet.evaluation.scorecard import MEAN, MODEL, Scorecard, trust_of, verdicts
from orion_unet.evaluation.scored_folder import FolderOptions, ScoredFolder, open_folder
from orion_unet.evaluation.scores import POSITIVE_THRESHOLD, sampled_share, sum_scores
from orion_unet.evaluation.tables import marker_table, show
from orion_unet.inference.model import load_trained
from orion_unet.inference.trust import RULE, summary, write_scorecard
from orion_unet.intervals import leave_one_out, why_no_interval
from orion_unet.run_log import utc_now, write_atomic, write_json
from orion_unet.slides.remote import input_path
from orion_unet.text import clean, csv_bytes

SCHEMA = 1
JSON_FILE, CSV_FILE, FIGURE_FILE = "crossval.json", "crossval.csv", "crossval.png"


@dataclass(frozen=True)
class Fold:
    """A finished fold: its best checkpoint, the indices of the cores it held out, and their correlation (C,)."""

    run: Path
    checkpoint: Path
    epoch: int
    cores: tuple[int, ...]
    pearson: np.ndarray


def score_folds(
    runs: list[Path],
    output_dir: Path,
    where: DeviceOptions,
    say: Callable[[str], None],
    progress: Progress = no_progress,
) -> None:
    """Score the folds together and write crossval.json, crossval.csv and crossval.png into ``output_dir``, and
    scorecard.json into every run.

    Each core is predicted by the best model of the fold that held it out, in [0, 1] by that fold's own normalisation.
    Raises InputError where the runs are not the folds of one set of pairs, RunError where nothing can be written.
    """
    require_packages()
    folds: list[Fold] = []
    gathered: GatheredCores | None = None
    folder: ScoredFolder | None = None
    for run in runs:
        model = load_trained(run, where.device, where.use_amp)
        if folder is not None and model.names != folder.model.names:
            raise InputError(f"{run}: was trained on other markers than {runs[0]}; these are not folds of one training")
        folder = open_folder(model, input_path(model.config.data.pairs_dir), FolderOptions(), progress)
        held = {str(row["core"]) for row in model.split["val"]}
        cores = tuple(core for core in folder.known.val.tolist() if folder.known.names[core] in held)
        if gathered is None:
            sizes = [folder.size(core) for core in range(len(folder.table))]
            share = sampled_share(sum(height * width for height, width in sizes), len(folder.names))
            gathered = GatheredCores(np.full(len(folder.names), POSITIVE_THRESHOLD), share)
        baselines = find_baselines(folder, progress)
        step = progress(len(cores), f"scoring {run.name}")
        for core in cores:
            gathered.add(core, folder.region(core), baselines)
            step()
        own = gathered.parts[MODEL][-len(cores) :] if cores else []
        sums, boxes = (np.sum([getattr(part, kind) for part in own], axis=0) for kind in ("sums", "boxes"))
        pearson = sum_scores(sums, boxes)["pearson"] if own else np.full(len(folder.names), np.nan)
        folds.append(Fold(run, model.path, model.epoch, cores, pearson))
    assert gathered is not None
    assert folder is not None
    _check_parts(folds, folder)
    order = [core for fold in folds for core in fold.cores]
    groups = [folder.known.groups[core] for core in order]
    no_interval = why_no_interval(groups, folder.grouped)
    card = gathered.card(folder.names, None if no_interval else leave_one_out(groups))
    # The mean is constant within a fold and differs between folds: that is no correlation.
    for scores in (card.values, card.without):
        for metric in scores.get(MEAN, {}):
            if metric not in ("mae", "psnr_db", "ssim", "fraction_positive"):
                scores[MEAN][metric] = np.full_like(scores[MEAN][metric], np.nan)
    document = _document(folds, folder, card, groups, no_interval)
    trust = trust_of(card)
    source = {
        "command": "crossval",
        "pairs_dir": str(folder.table.folder),
        "unit": "group" if folder.grouped else "core",
        "units": len(set(groups)),
        "folds": len(folds),
    }
    try:
        write_atomic(output_dir / CSV_FILE, csv_bytes(["marker", *score_columns()], score_rows(card)))
        write_atomic(output_dir / FIGURE_FILE, draw_markers(card, [trust[name].verdict for name in card.names]))
        write_json(output_dir / JSON_FILE, document)
        for fold in folds:
            write_scorecard(fold.checkpoint, trust, source)
    except OSError as error:
        raise RunError(f"{error.filename or output_dir}: cannot be written ({error.strerror or error})") from None
    show(marker_table(card), f"{len(order)} cores, each predicted by the fold of {len(folds)} that held it out")
    for sentence in verdicts(card):
        say(clean(sentence, None))
    say(clean(f"{summary(trust, card.names)}.", None))
    if no_interval:
        say(f"{no_interval[0].upper()}{no_interval[1:]}.")


def _check_parts(folds: list[Fold], folder: ScoredFolder) -> None:
    """Raise InputError unless every core was held out by exactly one fold."""
    names = folder.table.names.tolist()
    held: dict[int, list[str]] = {core: [] for core in range(len(names))}
    for fold in folds:
        for core in fold.cores:
            held[core].append(fold.run.name)
    problems = [f"{names[core]}: held out by {', '.join(by) or 'no fold'}" for core, by in held.items() if len(by) != 1]
    if problems:
        raise InputError.listing(
            f"{folds[0].run.parent}: its folds do not hold out each core of {folder.table.folder} once:",
            problems,
            "The pairs have changed since, or contain one core twice; run crossval into another --output_dir.",
        )


def _document(
    folds: list[Fold], folder: ScoredFolder, card: Scorecard, groups: list[str], no_interval: str
) -> dict[str, Any]:
    """Content of crossval.json; what is undefined is null."""
    names = folder.table.names.tolist()
    trust = trust_of(card)
    return {
        "schema": SCHEMA,
        "created": utc_now(),
        "versions": versions(),
        "pairs_dir": str(folder.table.folder),
        "folds": [
            {
                "run": fold.run.name,
                "epoch": fold.epoch,
                "cores": [names[core] for core in fold.cores],
                "pearson": dict(zip(card.names, fold.pearson.tolist(), strict=True)),
            }
            for fold in folds
        ],
        "positive_threshold": POSITIVE_THRESHOLD,
        "intervals": interval_document(folder.grouped, len(set(groups)), no_interval),
        "rule": RULE,
        "statements": [sentence.strip() for sentence in verdicts(card)],
        "overall": json_scores(card, None),
        "markers": {
            name: {"verdict": trust[name].verdict, **json_scores(card, marker)}
            for marker, name in enumerate(card.names)
        },
    }
