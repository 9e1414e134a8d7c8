"""Judging a trained model: scores on the cores it was not trained on, beside two baselines, with intervals."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from orion_unet.command_options import DeviceOptions, EvaluateOptions
from orion_unet.data.patches import PatchReader
from orion_unet.data.scale import Progress, no_progress
from orion_unet.data.stain import OUTSIDE, StainJudgement, measure_stain
from orion_unet.errors import InputError, RunError
from orion_unet.evaluation.baselines import find_baselines
from orion_unet.evaluation.cell_scores import judge_cells
from orion_unet.evaluation.cells import CellFinder, Cells, reads_images
from orion_unet.evaluation.files import FILES, write_files
from orion_unet.evaluation.gathering import GatheredCores
from orion_unet.evaluation.patches import PatchGallery
from orion_unet.evaluation.results import Evaluation
from orion_unet.evaluation.scorecard import MODEL, trust_of, verdicts
from orion_unet.evaluation.scored_folder import FolderOptions, ScoredFolder, open_folder
from orion_unet.evaluation.scores import positive_thresholds, sampled_share
from orion_unet.evaluation.tables import cell_table, marker_table, show
from orion_unet.extras import needed
from orion_unet.inference.ensemble import load_models, members_of
from orion_unet.inference.trust import run_folder_of, summary, write_scorecard
from orion_unet.intervals import leave_one_out, why_no_interval
from orion_unet.text import clean

OUTPUT_FOLDER = "evaluation"

Say = Callable[[str], None]


def evaluate(
    options: EvaluateOptions,
    where: DeviceOptions,
    reading: FolderOptions,
    say: Say,
    progress: Progress = no_progress,
) -> Path:
    """Score a checkpoint on a folder of pairs and write scores, figures and tables; returns the folder they are in.

    Raises InputError for a checkpoint, folder or option that cannot be used, RunError where the result cannot be
    written.
    """

    def say_clean(text: str) -> None:
        say(clean(text, None))

    require_packages(options.cells)
    output_dir = _output_dir(options)
    model = load_models(options.checkpoint, where.device, where.use_amp, encoder_weights=where.encoder_weights)
    folder = open_folder(model, options.pairs_dir, reading, progress)
    found = _score(options, folder, say_clean, progress)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_files(found, output_dir)
    except OSError as error:
        raise RunError(f"{output_dir}: cannot be written ({error.strerror or error})") from None
    _report(found, say_clean)
    if options.split == "val" and len(options.checkpoint) == 1:
        _keep_verdicts(found, say_clean)
    return output_dir


def _keep_verdicts(found: Evaluation, say: Say) -> None:
    """Write scorecard.json beside the checkpoint, for predict; a warning where the disk does not allow it."""
    trust = trust_of(found.card)
    say(f"{summary(trust, found.card.names)}.")
    folder = found.folder
    source = {
        "command": "evaluate",
        "pairs_dir": str(found.options.pairs_dir),
        "unit": "group" if folder.grouped else "core",
        "units": len({folder.known.groups[core] for core in found.cores}),
    }
    try:
        write_scorecard(folder.model.path, trust, source)
    except OSError as error:
        say(f"warning: {error.filename}: cannot be written ({error.strerror}), so predict will not know the verdicts")


def require_packages(cells: str | None = None) -> None:
    """Raise InputError where a package is missing that scoring needs; ``cells`` is the option of that name."""
    needed("scipy")
    needed("sklearn", "scikit-learn")
    if cells is not None:
        needed("skimage", "scikit-image")
        if reads_images(cells):
            needed("tifffile")


def _output_dir(options: EvaluateOptions) -> Path:
    """The folder of the results: the one given, else ``evaluation`` in the run that the checkpoint belongs to.

    Raises InputError where it has results and they may not be replaced, RunError where it cannot be written.
    """
    if options.output_dir is not None:
        folder = options.output_dir
    else:
        if len(options.checkpoint) > 1:
            raise InputError("several --checkpoint have no run folder in common: give --output_dir")
        folder = run_folder_of(options.checkpoint[0]) / OUTPUT_FOLDER
    present = [name for name in FILES if (folder / name).exists()]
    if present and not options.overwrite:
        raise InputError(f"{folder}: already holds {present[0]}; add --overwrite, or give another --output_dir")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output_dir {folder}: is a file")
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not os.access(parent, os.W_OK):
        raise RunError(f"{folder}: cannot be written (no permission in {parent}); give another --output_dir")
    return folder


def _chosen(folder: ScoredFolder, split: str) -> tuple[tuple[int, ...], list[str]]:
    """The cores to score, and warnings."""
    known = folder.known
    cores = {"val": known.val, "train": known.train, "all": np.arange(len(folder.table))}[split].tolist()
    if not cores:
        side = "held-out" if split == "val" else "training"
        several = len(members_of(folder.model))
        of = "this model" if several == 1 else f"this ensemble, held out by all {several} models"
        if split == "train":
            of = of.partition(",")[0]
        raise InputError(f"--split {split}: {folder.table.folder} has no {side} core of {of}; try --split all")
    warnings = []
    if bare := [core for core in cores if not folder.table.measured_in(core).any()]:
        cores = [core for core in cores if core not in bare]
        listed = ", ".join(str(folder.table.names[core]) for core in bare)
        warnings.append(f"{len(bare)} cores are not scored, because none of the model's markers was measured: {listed}")
    if not cores:
        raise InputError(f"--split {split}: none of the model's markers was measured in any of these cores")
    if unscored := folder.table.never_measured(cores):
        warnings.append(f"measured in none of the scored cores, so not scored: {', '.join(unscored)}")
    trained = len(set(cores) & set(known.train.tolist()))
    if trained:
        warnings.append(f"{trained} of the {len(cores)} scored cores were trained on: these scores flatter the model")
    return tuple(cores), warnings


def _score(options: EvaluateOptions, folder: ScoredFolder, say: Say, progress: Progress) -> Evaluation:
    cores, flattered = _chosen(folder, options.split)
    warnings = (*folder.warnings, *flattered)
    if folder.known.matching:
        say(f"{folder.known.matching}.")
    for warning in warnings:
        say(f"warning: {warning}")
    thresholds = positive_thresholds(options.positive_threshold, folder.names)
    groups = [folder.known.groups[core] for core in cores]
    no_interval = why_no_interval(groups, folder.grouped)
    left_out = None if no_interval else leave_one_out(groups)
    finder = None
    if options.cells is not None:
        finder = CellFinder(folder, options.cells, options.nuclear_marker, cores)

    baselines = find_baselines(folder, progress)
    sizes = [folder.size(core) for core in cores]
    share = sampled_share(sum(height * width for height, width in sizes), len(folder.names))
    gallery = PatchGallery(min(folder.model.config.data.patch_size, *(min(size) for size in sizes)))
    tissue = PatchReader(folder.table, folder.scales, gallery.side)
    gathered = GatheredCores(thresholds, share)
    cells = []
    step = progress(len(cores), "scoring")
    for core in cores:
        region = folder.region(core)
        gathered.add(core, region, baselines)
        gallery.add(str(folder.table.names[core]), region, partial(tissue.tissue_fraction, core))
        if finder is not None:
            cells.append(finder.find(core, region))
        # Else this core would be in memory beside the next.
        del region
        step()
    card = gathered.card(folder.names, left_out)
    stain = _judge_stain(folder, cores)
    if foreign := _foreign(folder, cores, stain):
        warnings = (*warnings, foreign)
        say(f"warning: {foreign}")
    result = None
    if finder is not None:
        given = None if options.positive_threshold is None else thresholds
        result = judge_cells(finder, Cells.joined(cells, len(folder.names)), given, left_out, progress)
    samples = (
        np.concatenate(gathered.measured, axis=1),
        np.concatenate([part.sample for part in gathered.parts[MODEL]], axis=1),
    )
    return Evaluation(
        options, folder, cores, card, baselines, thresholds, share, samples, gallery.shown(), result, stain,
        no_interval, warnings,
    )  # fmt: skip


def _judge_stain(folder: ScoredFolder, cores: Sequence[int]) -> tuple[StainJudgement, ...]:
    profile = folder.model.stain
    if profile is None:
        return ()
    return tuple(profile.judge(measure_stain(folder.he_for_model(core))) for core in cores)


def _foreign(folder: ScoredFolder, cores: Sequence[int], stain: Sequence[StainJudgement]) -> str:
    """A sentence where scored cores are stained unlike those of the training, else nothing."""
    outside = [(found, core) for core, found in zip(cores, stain, strict=False) if found.state == OUTSIDE]
    if not outside:
        return ""
    worst, core = max(outside, key=lambda pair: pair[0].distance)
    return (
        f"{len(outside)} of the {len(stain)} scored cores have an H&E stain outside that of the training; the furthest "
        f"is {folder.table.names[core]} (distance {worst.distance:.1f}, limit {worst.limit:.1f}; {worst.reason})"
    )


def _report(found: Evaluation, say: Say) -> None:
    """Show the scores on the terminal."""
    model, count = found.folder.model, len(found.cores)
    scored = " + ".join(f"epoch {member.epoch} of {member.path}" for member in members_of(model))
    show(marker_table(found.card), f"{count} core{'s' * (count != 1)}, {scored}")
    for sentence in verdicts(found.card):
        say(sentence)
    say(f"Baselines: {found.baselines.note}.")
    if found.no_interval:
        say(_sentence(found.no_interval))
    if found.cells is not None:
        scores = found.cells.scores
        show(cell_table(found.folder.names, scores), f"{scores.count} cells, {found.cells.source}")
        say(_sentence(found.cells.threshold_note))
        say(_sentence(found.cells.cutoff_note))


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
