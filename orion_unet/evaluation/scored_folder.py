"""A folder of pairs as a model sees it: whole cores, measured as in training and predicted as ``predict`` does."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from orion_unet.config import DataOptions
from orion_unet.data.channels import NAMES_FILE, excluded_channels
from orion_unet.data.dataset import DATASET_FILE, pairs_at_size, pixel_size
from orion_unet.data.normalization import Normalization, fit_normalization
from orion_unet.data.pairs import PairTable, find_pairs
from orion_unet.data.panels import PANELS_FILE
from orion_unet.data.patches import PatchPlace, PatchReader, grid_starts
from orion_unet.data.scale import Progress, Scales, he_image, measure_scales, no_progress
from orion_unet.data.transforms import BatchTransform
from orion_unet.errors import InputError
from orion_unet.evaluation.known_cores import KnownCores, recognise_cores
from orion_unet.inference.model import TrainedModel
from orion_unet.inference.resampled import LARGEST_FACTOR, SAME, ResampledImage, on_model_grid
from orion_unet.inference.tiling import TiledPrediction, choose_tiling
from orion_unet.slides.images import HeImage
from orion_unet.slides.remote import input_path


@dataclass(frozen=True)
class FolderOptions:
    """How a folder is read where that differs from what the model was trained on; None: as in training."""

    channel_names: str | None = None
    exclude_channels: str | None = None
    he_layout: str | None = None
    orion_layout: str | None = None
    level: int | None = None
    groups_csv: str | None = None


@dataclass(frozen=True)
class Region:
    """A core or a part of one: ``he`` (3, H, W), ``measured`` and ``predicted`` (C, H, W), float32 in [0, 1].

    ``present`` (C,) bool are the markers that were measured there; ``measured`` is 0 for the others.
    """

    he: Tensor
    measured: Tensor
    predicted: Tensor
    present: np.ndarray

    def crop(self, y: int, x: int, side: int) -> Region:
        """A square of it, in memory of its own on the CPU."""
        square = (..., slice(y, y + side), slice(x, x + side))
        he, measured, predicted = (image[square].cpu().clone() for image in (self.he, self.measured, self.predicted))
        return Region(he, measured, predicted, self.present)


@dataclass(frozen=True)
class ScoredFolder:
    """Pairs whose markers are those of a model.

    ``names`` are the C scored markers, in the model's order; ``channels`` their places in its output. ``known`` says
    which cores the model was trained on, and which it can be judged by. ``pixel_size_um`` is the side of their pixels,
    None if unknown. ``warnings`` are sentences for a person.
    """

    model: TrainedModel
    table: PairTable
    scales: Scales
    names: tuple[str, ...]
    channels: tuple[int, ...]
    normalization: Normalization
    transform: BatchTransform
    known: KnownCores
    pixel_size_um: float | None
    warnings: tuple[str, ...]

    @property
    def grouped(self) -> bool:
        """Whether several cores come from one patient or slide."""
        return len(set(self.known.groups)) < len(self.table)

    def size(self, core: int) -> tuple[int, int]:
        """Height and width of a core in pixels."""
        row = self.table.he[core]
        return int(row["height"]), int(row["width"])

    def he(self, core: int) -> HeImage:
        """The H&E of a core, as it is stored."""
        return he_image(self.table, self.scales, core)

    def he_for_model(self, core: int) -> HeImage:
        """The H&E of a core on the pixel grid of the training."""
        return on_model_grid(self.he(core), self.pixel_size_um, self.model.pixel_size_um)

    def region(self, core: int) -> Region:
        """The whole of a core, on the model's device. Memory is that of its three images and of a row of tiles."""
        image = self.he(core)
        he = torch.from_numpy(image.read(0, 0, *image.shape)).to(self.model.device)
        present = self.table.measured_in(core)
        return Region(he.permute(2, 0, 1).contiguous(), self._measured(core), self._predicted(core), present)

    def _measured(self, core: int) -> Tensor:
        """Targets (C, H, W) in [0, 1] as validation sees them: made patch by patch of the size trained on."""
        height, width = self.size(core)
        side = min(self.model.config.data.patch_size, height, width)
        reader = PatchReader(self.table, self.scales, side)
        measured = torch.empty(len(self.names), height, width, device=self.model.device)
        for y, x in product(grid_starts(height, side, side), grid_starts(width, side, side)):
            batch = self.transform(reader.read([PatchPlace(core, y, x)]), augment=False)
            measured[:, y : y + side, x : x + side] = batch.target[0]
        return measured

    def _predicted(self, core: int) -> Tensor:
        """Markers (C, H, W) in [0, 1] as ``predict`` gives them, on the pixels of the core."""
        fitted = self.he_for_model(core)
        tiles = TiledPrediction(self.model, fitted, choose_tiling(self.model, fitted.shape), kept=self.channels)
        predicted = torch.empty(len(self.names), *fitted.shape, device=self.model.device)
        for y, rows in tiles.run():
            predicted[:, y : y + rows.shape[1]] = rows
        if isinstance(fitted, ResampledImage):
            # The prediction, because measured markers are never interpolated.
            predicted = fitted.back(predicted)
        return predicted.clamp_(0, 1)


def open_folder(
    model: TrainedModel, pairs_dir: Path, options: FolderOptions, progress: Progress = no_progress
) -> ScoredFolder:
    """Find and check the pairs of a folder, match their channels with the model's markers by name, and recognise the
    cores of the training. Raises InputError."""
    data = _data_options(model, pairs_dir, options)
    table = pairs_at_size(data)
    stored = table.channel_names
    excluded = {stored[index] for index in excluded_channels(options.exclude_channels, stored)}
    names = tuple(name for name in model.names if name not in excluded)
    missing = [name for name in names if name not in stored]
    if missing:
        raise InputError(
            f"--pairs_dir {pairs_dir}: lacks {len(missing)} of the model's {len(model.names)} markers: "
            f"{', '.join(missing)}. Its channels are {', '.join(stored)}; name them in channel order with "
            f"--channel_names, or leave markers out with --exclude_channels"
        )
    if not names:
        raise InputError("--exclude_channels: leaves no marker of the model to score")
    table = replace(table, kept_channels=tuple(stored.index(name) for name in names))
    scales = measure_scales(table, model.normalization.method == "none", progress)
    size = _pixel_size(model, table, data)
    others = _other_pixels(model, table, size)
    known = recognise_cores(model, table, data.groups_csv, other_pixels=bool(others))
    channels = tuple(model.names.index(name) for name in names)
    normalization = _normalization(model.normalization, table, scales, channels, known, progress)
    formats = PatchReader(table, scales, 1).formats
    transform = BatchTransform(table, formats, normalization, model.config.data.noise_removal, model.device)
    warnings = (*table.warnings, *others, *known.warnings)
    return ScoredFolder(model, table, scales, names, channels, normalization, transform, known, size, warnings)


def _pixel_size(model: TrainedModel, table: PairTable, data: DataOptions) -> float | None:
    """Side of the pairs' pixels: what the training took it for in its own folder, else what the folder states."""
    trained = model.config.data
    same = Path(trained.pairs_dir).resolve() == table.folder.resolve() and trained.level == data.level
    return model.pixel_size_um if same else pixel_size(table, None)


def _other_pixels(model: TrainedModel, table: PairTable, own: float | None) -> tuple[str, ...]:
    """A warning where the pairs have other pixels than the training, else nothing; raises InputError where they are too
    far apart for a prediction."""
    trained = model.pixel_size_um
    if own is None or trained is None or abs(own / trained - 1) <= SAME:
        return ()
    if not 1 / LARGEST_FACTOR <= own / trained <= LARGEST_FACTOR:
        raise InputError(
            f"--pairs_dir {table.folder}: its {DATASET_FILE} or its files state pixels of {own:g} µm, and the model "
            f"was trained on {trained:g} µm; more than a factor of {LARGEST_FACTOR:g} apart, nothing can be predicted"
        )
    return (
        f"the pairs have pixels of {own:g} µm and the training had {trained:g} µm: the H&E is resampled for the model, "
        "and the prediction brought back to the pixels of the pairs, which are scored as they were measured",
    )


def _data_options(model: TrainedModel, pairs_dir: Path, options: FolderOptions) -> DataOptions:
    """The options of the training, for another folder: what the folder says of itself wins over what training was
    told of its own. Cores may be smaller than a training patch."""
    trained = model.config.data
    same = input_path(trained.pairs_dir).resolve() == pairs_dir.resolve()
    names, groups = options.channel_names, options.groups_csv
    if names is None and (same or not any((pairs_dir / file).is_file() for file in (NAMES_FILE, PANELS_FILE))):
        names = trained.channel_names
    if groups is None and same and trained.groups_csv and Path(trained.groups_csv).is_file():
        groups = trained.groups_csv
    found = replace(
        trained,
        pairs_dir=str(pairs_dir),
        channel_names=names,
        exclude_channels=None,
        groups_csv=groups,
        he_layout=options.he_layout or trained.he_layout,
        orion_layout=options.orion_layout or trained.orion_layout,
        level=trained.level if options.level is None else options.level,
        patch_size=1,
    )
    if same or options.channel_names is not None or names is None:
        return found
    own = replace(found, channel_names=None)
    return own if find_pairs(own).stated_names else found


def _normalization(
    trained: Normalization,
    table: PairTable,
    scales: Scales,
    channels: tuple[int, ...],
    known: KnownCores,
    progress: Progress,
) -> Normalization:
    """The model's normalisation of the scored markers; where each core is measured by itself, of new cores too."""
    index = list(channels)
    names = table.names.tolist()
    bounds = [trained.per_core.get(name or "") for name in known.names]
    per_core = {name: found[:, index] for name, found in zip(names, bounds, strict=True) if found is not None}
    new = [core for core, name in enumerate(names) if name not in per_core]
    if trained.method == "core" and new:
        part = table.of(new)
        measured = fit_normalization(
            part, scales, np.arange(len(new)), "core", trained.transform, progress, keep=part.kept_names
        ).per_core
        # What was empty in training is empty here.
        flat = ~(trained.upper > trained.lower)[index]
        for found in measured.values():
            found[:, flat] = trained.lower[index][flat]
        per_core |= measured
    return replace(
        trained,
        names=tuple(trained.names[channel] for channel in index),
        lower=trained.lower[index],
        upper=trained.upper[index],
        target_mean=trained.target_mean[index],
        per_core=per_core,
    )
