"""Judging a trained model: scores on the cores it was not trained on, beside two baselines, with intervals."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from orion_unet.data.patches import TISSUE_FRACTION, PatchReader
from orion_unet.data.scale import Progress, no_progress
from orion_unet.errors import InputError, RunError
from orion_unet.evaluation.baselines import Baselines, fit_baselines
from orion_unet.evaluation.bootstrap import draw_units, why_no_interval
from orion_unet.evaluation.cell_scores import CellScores, best_cutoffs, otsu_thresholds, score_cells
from orion_unet.evaluation.cells import (
    LABEL_SUFFIXES,
    Cells,
    label_file,
    load_labels,
    measure_cells,
    nuclear_marker,
    segment_nuclei,
)
from orion_unet.evaluation.files import FILES, write_files
from orion_unet.evaluation.score_patches import PatchScore, patch_scores
from orion_unet.evaluation.score_tables import cell_table, marker_table, show
from orion_unet.evaluation.scorecard import MEAN, MODEL, REGRESSION, Scorecard, make_scorecard, verdicts
from orion_unet.evaluation.scored_folder import FolderOptions, Region, ScoredFolder, open_folder
from orion_unet.evaluation.scores import CoreScores, draw_pixels, positive_thresholds, sampled_share, score_core, take
from orion_unet.inference.model import load_trained
from orion_unet.run_log import CHECKPOINT_DIR

OUTPUT_FOLDER = "evaluation"
# The predicted cut-off of positive cells is found on so many training cores, evenly spaced among all.
CUTOFF_CORES = 20
EXTRA = {"scipy": "scipy", "sklearn": "scikit-learn", "skimage": "scikit-image"}

Say = Callable[[str], None]


@dataclass(frozen=True)
class EvaluateOptions:
    """What ``evaluate`` is asked for. ``cells`` is None (no cells), "" (nuclei are found) or a folder of labels."""

    checkpoint: Path
    pairs_dir: Path
    split: str = "val"
    output_dir: Path | None = None
    positive_threshold: str | None = None
    cells: str | None = None
    nuclear_marker: str | None = None
    device: str = "auto"
    use_amp: bool = False
    bootstrap: int = 1000
    overwrite: bool = False
    folder: FolderOptions = field(default_factory=FolderOptions)


@dataclass(frozen=True)
class CellResult:
    """Cells of the scored cores, how they were found, and in words what their thresholds rest on."""

    scores: CellScores
    source: str
    threshold_note: str
    cutoff_note: str


@dataclass(frozen=True)
class Evaluation:
    """All that was found out, as the files and the terminal show it."""

    options: EvaluateOptions
    folder: ScoredFolder
    cores: tuple[int, ...]
    card: Scorecard
    baselines: Baselines
    thresholds: np.ndarray
    share: float
    no_interval: str
    samples: tuple[np.ndarray, np.ndarray]
    patches: list[PatchScore]
    patch_side: int
    cells: CellResult | None
    warnings: tuple[str, ...]


def evaluate(options: EvaluateOptions, say: Say, progress: Progress = no_progress) -> Path:
    """Score a checkpoint on a folder of pairs and write scores, figures and tables; returns the folder they are in.

    Raises InputError for a checkpoint, folder or option that cannot be used, RunError where the result cannot be
    written.
    """
    _require(options.cells is not None)
    output_dir = options.output_dir or _beside(options.checkpoint)
    present = [name for name in FILES if (output_dir / name).exists()]
    if present and not options.overwrite:
        raise InputError(f"{output_dir}: already holds {present[0]}; add --overwrite, or give another --output_dir")
    if output_dir.exists() and not output_dir.is_dir():
        raise InputError(f"--output_dir {output_dir}: is a file")
    parent = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    if not os.access(parent, os.W_OK):
        raise RunError(f"{output_dir}: cannot be written (no permission in {parent}); give another --output_dir")
    model = load_trained(options.checkpoint, options.device, options.use_amp)
    folder = open_folder(model, options.pairs_dir, options.folder, progress)
    found = _score(options, folder, say, progress)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_files(found, output_dir)
    except OSError as error:
        raise RunError(f"{output_dir}: cannot be written ({error.strerror or error})") from None
    show(
        marker_table(found.card),
        f"{len(found.cores)} core{'s' * (len(found.cores) != 1)}, epoch {model.epoch} of {model.path}",
    )
    for sentence in verdicts(found.card):
        say(sentence)
    say(f"Baselines: {found.baselines.note}.")
    if found.no_interval:
        say(f"{found.no_interval[0].upper()}{found.no_interval[1:]}.")
    if found.cells is not None:
        show(
            cell_table(found.folder.names, found.cells.scores),
            f"{found.cells.scores.count} cells, {found.cells.source}",
        )
        for sentence in (found.cells.threshold_note, found.cells.cutoff_note):
            say(f"{sentence[0].upper()}{sentence[1:]}.")
    return output_dir


def _require(with_cells: bool) -> None:
    for module, package in EXTRA.items():
        if module == "skimage" and not with_cells:
            continue
        try:
            importlib.import_module(module)
        except ImportError:
            raise InputError(f'evaluate needs {package}: pip install "orion-unet[inference]"') from None


def _beside(checkpoint: Path) -> Path:
    """The evaluation folder of the run that a checkpoint belongs to."""
    run = checkpoint if checkpoint.is_dir() else checkpoint.parent
    return (run.parent if run.name == CHECKPOINT_DIR else run) / OUTPUT_FOLDER


def _chosen(folder: ScoredFolder, split: str) -> tuple[tuple[int, ...], list[str]]:
    """The cores to score, and warnings."""
    cores = {"val": folder.val, "train": folder.train, "all": np.arange(len(folder.table))}[split].tolist()
    if not cores:
        side = "held-out" if split == "val" else "training"
        raise InputError(f"--split {split}: {folder.table.folder} has no {side} core of this model; try --split all")
    trained = len(set(cores) & set(folder.train.tolist()))
    if not trained:
        return tuple(cores), []
    return tuple(cores), [f"{trained} of the {len(cores)} scored cores were trained on: these scores flatter the model"]


def _score(options: EvaluateOptions, folder: ScoredFolder, say: Say, progress: Progress) -> Evaluation:
    cores, warnings = _chosen(folder, options.split)
    warnings = [*folder.warnings, *warnings]
    for warning in warnings:
        say(f"warning: {warning}")
    thresholds = positive_thresholds(options.positive_threshold, folder.names)
    groups = [folder.groups[core] for core in cores]
    no_interval = why_no_interval(groups, options.bootstrap, folder.grouped)
    draws = None if no_interval else draw_units(groups, options.bootstrap)
    finder = CellFinder(options, folder, cores) if options.cells is not None else None

    step = progress(len(folder.train), "fitting the baselines")
    baselines = fit_baselines(folder, step)
    sizes = [folder.size(core) for core in cores]
    share = sampled_share(sum(height * width for height, width in sizes), len(folder.names))
    side = min(folder.model.config.data.patch_size, *(min(size) for size in sizes))
    tissue = PatchReader(folder.table, folder.scales, side)
    on_device = torch.from_numpy(thresholds).to(folder.model.device, torch.float32)
    parts: dict[str, list[CoreScores]] = {}
    measured, patches, cells = [], [], []
    step = progress(len(cores), "scoring")
    for core in cores:
        region = folder.region(core)
        pixels = draw_pixels(core, region.measured[0].numel(), share)
        measured.append(take(region.measured, pixels))
        for predictor, image in _predictions(region, baselines):
            parts.setdefault(predictor, []).append(score_core(image, region.measured, on_device, pixels))
        patches += [
            PatchScore(score, core, y, x, tissue.tissue_fraction(core, y, x) >= TISSUE_FRACTION)
            for score, y, x in patch_scores(region, side)
        ]
        if finder is not None:
            cells.append(finder.find(core, region))
        # Else this core would stand in memory beside the next.
        del region, image
        step()
    card = make_scorecard(folder.names, parts, measured, thresholds, draws)
    result = None
    if finder is not None:
        joined = Cells.joined(cells, len(folder.names))
        result = _cell_result(options, finder, joined, thresholds, draws, progress)
    samples = (
        np.concatenate(measured, axis=1),
        np.concatenate([part.sample for part in parts[MODEL]], axis=1),
    )
    return Evaluation(
        options, folder, cores, card, baselines, thresholds, share, no_interval, samples, patches, side, result,
        tuple(warnings),
    )  # fmt: skip


def _predictions(region: Region, baselines: Baselines) -> Iterator[tuple[str, torch.Tensor]]:
    yield MODEL, region.predicted
    yield MEAN, baselines.predict_mean(region.measured)
    if baselines.coefficients is not None:
        yield REGRESSION, baselines.predict_regression(region.he)


class CellFinder:
    """The cells of a core: nuclei of the measured nuclear marker, or those of its label file."""

    def __init__(self, options: EvaluateOptions, folder: ScoredFolder, cores: tuple[int, ...]) -> None:
        self.folder = folder
        self.labels = Path(options.cells) if options.cells else None
        # A marker is needed only where nuclei are to be found in it.
        self.nuclear = 0 if self.labels else nuclear_marker(folder.names, options.nuclear_marker)
        self.source = f"labels from {self.labels}" if self.labels else f"nuclei found in {folder.names[self.nuclear]}"
        lacking = [str(folder.table.names[core]) for core in cores if not self.knows(core)]
        if lacking:
            raise InputError.listing(
                f"--cells {self.labels}: lacks the labels of these cores:",
                [" or ".join(f"{name}{suffix}" for suffix in LABEL_SUFFIXES) for name in lacking],
            )

    def knows(self, core: int) -> bool:
        """Whether the cells of a core can be found."""
        return self.labels is None or label_file(self.labels, str(self.folder.table.names[core])) is not None

    def find(self, core: int, region: Region) -> Cells:
        """The cells of a core, given the whole of it."""
        if self.labels is None:
            labels = segment_nuclei(region.measured[self.nuclear].cpu().numpy())
        else:
            path = label_file(self.labels, str(self.folder.table.names[core]))
            assert path is not None, "looked for before anything was scored"
            labels = load_labels(path, self.folder.size(core))
        return measure_cells(labels, region.measured, region.predicted)


def _cell_result(
    options: EvaluateOptions,
    finder: CellFinder,
    cells: Cells,
    pixel_thresholds: np.ndarray,
    draws: np.ndarray | None,
    progress: Progress,
) -> CellResult:
    """Scores over cells. Positive is what lies above a threshold that rests on measured values alone; the predicted
    cut-off is chosen on training cells, so that nothing is tuned on what is scored."""
    folder = finder.folder
    usable = [core for core in folder.train.tolist() if finder.knows(core)]
    places = np.linspace(0, len(usable) - 1, min(CUTOFF_CORES, len(usable))).round().astype(int)
    step = progress(len(places), "cells of training cores")
    parts = []
    for place in places.tolist():
        parts.append(finder.find(usable[place], folder.region(usable[place])))
        step()
    training = Cells.joined(parts, len(folder.names))
    if options.positive_threshold is not None:
        thresholds, note = pixel_thresholds, "positive cells: measured mean above --positive_threshold"
    elif len(training.core):
        thresholds = otsu_thresholds(training)
        note = f"positive cells: measured mean above Otsu's threshold of {len(training.core)} training cells"
    else:
        thresholds = otsu_thresholds(cells)
        note = "positive cells: measured mean above Otsu's threshold of the scored cells, there being no training cells"
    if len(training.core):
        cutoffs = best_cutoffs(training, thresholds)
        cutoff_note = f"predicted cut-off: the best F1 on {len(training.core)} cells of {len(places)} training cores"
    else:
        cutoffs = np.full(len(folder.names), np.nan)
        cutoff_note = "no F1: without training cores in the folder there is nothing to choose a predicted cut-off on"
    return CellResult(score_cells(cells, thresholds, cutoffs, draws), finder.source, note, cutoff_note)
