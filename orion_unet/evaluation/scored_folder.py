"""A folder of pairs as a trained model sees it: what it was trained on, and whole cores, measured and predicted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from orion_unet.config import DataOptions
from orion_unet.data.channels import NAMES_FILE, excluded_channels
from orion_unet.data.normalization import Normalization, fit_normalization
from orion_unet.data.pairs import PairTable, find_pairs
from orion_unet.data.patches import PatchReader, RawBatch, grid_starts
from orion_unet.data.scale import Progress, Scales, measure_scales, no_progress
from orion_unet.data.split import GROUPS_FILE, core_groups
from orion_unet.data.transforms import BatchTransform
from orion_unet.errors import InputError
from orion_unet.inference.model import TrainedModel

# Square windows of twice the training patch (but of one where the norm measures the window itself, and would see
# another spread than in training); a sixteenth of a window is only context on every inner side.
WINDOW_PATCHES, CONTEXT_FRACTION = 2, 1 / 16


@dataclass(frozen=True)
class FolderOptions:
    """How a folder is read where that differs from what the model was trained on; None: as in training."""

    channel_names: str | None = None
    exclude_channels: str | None = None
    he_layout: str | None = None
    orion_layout: str | None = None
    groups_csv: str | None = None


@dataclass(frozen=True)
class Region:
    """A rectangle of a core: ``he`` (3, H, W), ``measured`` and ``predicted`` (C, H, W), float32 in [0, 1]."""

    he: Tensor
    measured: Tensor
    predicted: Tensor


@dataclass(frozen=True)
class ScoredFolder:
    """Pairs matched by name with the markers of a model.

    ``names`` are the C scored markers, in the model's order; ``channels`` their places in its output. ``train``
    and ``val`` are indices of cores in ``table``: those the model was trained on, and those it can be judged by.
    ``groups`` names the patient or slide of every core, ``grouped`` says whether there are any but the cores
    themselves. ``warnings`` are sentences for a person.
    """

    model: TrainedModel
    table: PairTable
    scales: Scales
    normalization: Normalization
    names: tuple[str, ...]
    channels: tuple[int, ...]
    train: np.ndarray
    val: np.ndarray
    groups: tuple[str, ...]
    grouped: bool
    warnings: tuple[str, ...]
    transform: BatchTransform
    reader: PatchReader

    def size(self, core: int) -> tuple[int, int]:
        """Height and width of a core in pixels."""
        row = self.table.he[core]
        return int(row["height"]), int(row["width"])

    def read(self, core: int, top: int, left: int, side: int) -> tuple[Tensor, Tensor]:
        """H&E (1, 3, S, S) and measured markers (1, C, S, S) of a square, on the device, as training made them."""
        stored = []
        for modality in ("he", "orion"):
            whole, form = self.table.open(core, modality), self.reader.formats[modality]
            layout = getattr(self.table, modality)[core]["layout"]
            rows, columns = slice(top, top + side), slice(left, left + side)
            part = whole[rows, columns] if layout == "hwc" else whole[:, rows, columns]
            if layout != form.layout:
                part = part.transpose(2, 0, 1) if form.layout == "chw" else part.transpose(1, 2, 0)
            white = self.scales.white(modality, part.dtype)
            if white == form.white:
                part = np.array(part, dtype=form.dtype, order="C")
            else:
                part = np.divide(part, np.float32(white), dtype=np.float32)
            stored.append(torch.from_numpy(np.ascontiguousarray(part))[None])
        raw = RawBatch(
            stored[0],
            stored[1],
            torch.tensor([core]),
            torch.tensor([(top, left)]),
            torch.zeros(1, 3, dtype=torch.bool),
            torch.zeros(1, 8),
        )
        batch = self.transform(raw, augment=False)
        return batch.he, batch.target

    def region(self, core: int, top: int = 0, left: int = 0, height: int = 0, width: int = 0) -> Region:
        """A rectangle of a core (the whole of it without one), predicted window by window, each pixel once.

        Neighbouring windows overlap and meet in the middle of their overlap, so that no pixel is predicted at the
        edge of one, but at the edge of the core. Memory is that of the three images and of one window.
        """
        full = self.size(core)
        height, width = height or full[0], width or full[1]
        device = self.model.device
        found = Region(
            torch.empty(3, height, width, device=device),
            torch.empty(len(self.names), height, width, device=device),
            torch.empty(len(self.names), height, width, device=device),
        )
        index = torch.tensor(self.channels, device=device)
        config = self.model.config
        side = min((WINDOW_PATCHES if config.model.norm == "batch" else 1) * config.data.patch_size, *full)
        for y, own_y in _windows(full[0], side, top, height):
            for x, own_x in _windows(full[1], side, left, width):
                he, measured = self.read(core, y, x, side)
                predicted = self.model.predict(he).index_select(1, index)
                inner = (slice(own_y.start - y, own_y.stop - y), slice(own_x.start - x, own_x.stop - x))
                outer = (slice(own_y.start - top, own_y.stop - top), slice(own_x.start - left, own_x.stop - left))
                for target, image in ((found.he, he), (found.measured, measured), (found.predicted, predicted)):
                    target[:, *outer] = image[0][:, *inner]
        return found


def _windows(length: int, side: int, start: int, size: int) -> Iterator[tuple[int, slice]]:
    """Windows along one axis of a core that own a part of [start, start + size): where each begins, and the part.

    The windows are those of the whole core, whatever is asked for.
    """
    starts = grid_starts(length, side, side - 2 * int(side * CONTEXT_FRACTION))
    meetings = [(a + side + b) // 2 for a, b in pairwise(starts)]
    for begin, low, high in zip(starts, [0, *meetings], [*meetings, length], strict=True):
        low, high = max(low, start), min(high, start + size)
        if low < high:
            yield begin, slice(low, high)


def open_folder(
    model: TrainedModel, pairs_dir: Path, options: FolderOptions, progress: Progress = no_progress
) -> ScoredFolder:
    """Find and check the pairs of a folder, match their channels with the model's markers by name, and split them.

    The split is the one in the checkpoint. Cores that it does not name were held out too, unless their group was
    trained on: those belong to neither side. Raises InputError.
    """
    data = _data_options(model, pairs_dir, options)
    table = find_pairs(data)
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
    channels = tuple(model.names.index(name) for name in names)
    normalization = _normalization(model.normalization, table, scales, channels, progress)
    reader = PatchReader(table, scales, data.patch_size)
    transform = BatchTransform(table, reader.formats, normalization, model.config.data.noise_removal, model.device)
    train, val, groups, warnings = _sides(model, table, data.groups_csv)
    grouped = len(set(groups)) < len(groups)
    return ScoredFolder(
        model, table, scales, normalization, names, channels, train, val, groups, grouped,
        (*table.warnings, *warnings), transform, reader,
    )  # fmt: skip


def _data_options(model: TrainedModel, pairs_dir: Path, options: FolderOptions) -> DataOptions:
    """The options of the training, for another folder: what the folder says of itself wins over what training was
    told of its own. Cores may be smaller than a training patch."""
    trained = model.config.data
    same = Path(trained.pairs_dir).resolve() == pairs_dir.resolve()
    names, groups = options.channel_names, options.groups_csv
    if names is None and (same or not (pairs_dir / NAMES_FILE).is_file()):
        names = trained.channel_names
    if groups is None and same and trained.groups_csv and Path(trained.groups_csv).is_file():
        groups = trained.groups_csv
    return replace(
        trained,
        pairs_dir=str(pairs_dir),
        channel_names=names,
        exclude_channels=None,
        groups_csv=groups,
        he_layout=options.he_layout or trained.he_layout,
        orion_layout=options.orion_layout or trained.orion_layout,
        patch_size=1,
    )


def _normalization(
    trained: Normalization, table: PairTable, scales: Scales, channels: tuple[int, ...], progress: Progress
) -> Normalization:
    """The model's normalisation of the scored markers; where each core is measured by itself, of new cores too."""
    index = list(channels)
    per_core = {name: bounds[:, index] for name, bounds in trained.per_core.items()}
    new = [core for core, name in enumerate(table.names.tolist()) if name not in per_core]
    if trained.method == "core" and new:
        part = replace(table, names=table.names[new], he=table.he[new], orion=table.orion[new])
        per_core |= fit_normalization(part, scales, np.arange(len(new)), "core", trained.transform, progress).per_core
    return replace(
        trained,
        names=tuple(trained.names[channel] for channel in index),
        lower=trained.lower[index],
        upper=trained.upper[index],
        target_mean=trained.target_mean[index],
        per_core=per_core,
    )


def _sides(
    model: TrainedModel, table: PairTable, groups_csv: str | None
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...], list[str]]:
    """Cores trained on, cores held out, the group of every core, and warnings."""
    try:
        known = {side: {str(row["core"]): str(row["group"]) for row in model.split[side]} for side in ("train", "val")}
    except (KeyError, TypeError):
        raise InputError(f"{model.path}: is damaged, its split cannot be read") from None
    names = table.names.tolist()
    if groups_csv or (table.folder / GROUPS_FILE).is_file():
        groups = core_groups(table, groups_csv)
    else:
        stored = known["train"] | known["val"]
        groups = [stored.get(name, name) for name in names]
    trained_groups = set(known["train"].values())
    train = [core for core, name in enumerate(names) if name in known["train"]]
    related = [
        core
        for core, name in enumerate(names)
        if name not in known["train"] and name not in known["val"] and groups[core] in trained_groups
    ]
    val = sorted(set(range(len(names))) - set(train) - set(related))
    warnings = []
    if related:
        listed = ", ".join(names[core] for core in related)
        warnings.append(
            f"{len(related)} cores are new, but of patients or slides that were trained on; they do not count as held "
            f"out: {listed}"
        )
    return np.array(train, int), np.array(val, int), tuple(groups), warnings
