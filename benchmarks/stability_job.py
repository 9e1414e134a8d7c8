"""One training of the stability benchmark, in a separate process: train with a recipe, then score the best model.

The job is a JSON object: ``options`` of the trainer, ``changes`` (names in CHANGES: changes of code, for which the
toolkit has no option), ``chosen`` and ``scored`` (names of the cores that choose the best epoch, and that score),
``baselines`` (whether to score the baselines too) and ``result`` (the file to write). The trainer writes its usual run
folder. The changes patch this process only.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stability_networks import BasicUNet, CoarseView, DynUNet, Pix2Pix

from orion_unet.checkpoint import BEST, checkpoint_path
from orion_unet.config import TrainConfig
from orion_unet.data import loaders, patches
from orion_unet.data.normalization import LOG_CURVATURE
from orion_unet.data.patches import PatchPlace, PatchReader
from orion_unet.data.randomness import SAMPLE, counter_rng
from orion_unet.data.transforms import Batch, BatchTransform, boundary_mask
from orion_unet.evaluation.baselines import fit_baselines
from orion_unet.evaluation.scored_folder import FolderOptions, ScoredFolder, open_folder
from orion_unet.evaluation.scores import score_core, sum_scores
from orion_unet.inference.model import TrainedModel, load_trained
from orion_unet.losses import CompositeLoss
from orion_unet.models import blocks, unet
from orion_unet.run_log import METRICS_FILE, write_json
from orion_unet.training.loop import DIVERGED, FINISHED, train

# Side of the square in the middle of a patch over which HEXIF takes its loss, pixels.
CENTRE = 12


def default_initialisation() -> None:
    """Keep torch's default initial weights."""
    unet.initialise = lambda module: None


def use_network(network: type[nn.Module]) -> None:
    """Replace our network by another one."""
    build = classmethod(lambda cls, options, channels: network(channels, options.base_features))
    unet.SpatialUNet.from_options = build


def geometry_of_he_alone() -> None:
    """Turn and flip the H&E but not the markers."""
    original = BatchTransform._channels_first

    def changed(self: BatchTransform, stored: Tensor, modality: str, geometry: Any) -> Tensor:
        return original(self, stored, modality, geometry if modality == "he" else None)

    BatchTransform._channels_first = changed


def patch_normalisation() -> None:
    """Stretch the targets of every training patch to [0, 1], marker by marker."""
    original = BatchTransform.__call__

    def changed(self: BatchTransform, raw: Any, augment: bool) -> Batch:
        batch = original(self, raw, augment)
        if augment:
            low, high = batch.target.amin((2, 3), keepdim=True), batch.target.amax((2, 3), keepdim=True)
            batch.target = (batch.target - low) / (high - low).clamp_min(1e-6)
        return batch

    BatchTransform.__call__ = changed


def loss_in_the_centre() -> None:
    """Take the training loss from the middle of each patch only; validation uses the whole patch."""
    original = CompositeLoss.forward

    def changed(self: CompositeLoss, prediction: Tensor, target: Tensor, mask: Any = None, count: Any = None) -> Any:
        top, left = ((side - CENTRE) // 2 for side in prediction.shape[2:])
        middle = (..., slice(top, top + CENTRE), slice(left, left + CENTRE))
        return original(self, prediction[middle], target[middle], None if mask is None else mask[middle])

    CompositeLoss.forward = changed


def scarce_crops() -> None:
    """Draw a marker and four random crops, and train on the crop that shows most of this marker."""
    original = patches.draw_training_patch

    def changed(reader: PatchReader, core: int, seed: int, epoch: int, index: int, augment: bool) -> PatchPlace:
        rng = counter_rng(seed, SAMPLE, epoch, index)
        drawn = original(reader, core, seed, epoch, index, augment)
        size = reader.table.he[core]
        room = [int(size[side]) - reader.patch_size + 1 for side in ("height", "width")]
        marker = int(rng.choice(np.array(reader.table.kept_channels)))
        hwc = reader.formats["orion"].layout == "hwc"

        def shown(corner: tuple[int, int]) -> float:
            crop = reader.crop("orion", core, *corner)
            plane = crop[::2, ::2, marker] if hwc else crop[marker, ::2, ::2]
            return float(plane.mean(dtype=np.float64))

        corners = [(int(rng.integers(room[0])), int(rng.integers(room[1]))) for _ in range(4)]
        y, x = max(corners, key=shown)
        return replace(drawn, y=y, x=x)

    patches.draw_training_patch = loaders.draw_training_patch = changed


def pyramid() -> None:
    """Add the squared errors of means over 2 x 2 and 4 x 4 pixels, with weight 0.5 each: they ignore small shifts."""
    original = CompositeLoss.forward

    def changed(self: CompositeLoss, prediction: Tensor, target: Tensor, *rest: Any) -> Any:
        loss, terms = original(self, prediction, target, *rest)
        for side in (2, 4):
            coarse = (F.avg_pool2d(each.float(), side) for each in (prediction, target))
            loss = loss + 0.5 * F.mse_loss(*coarse)
        return loss, terms

    CompositeLoss.forward = changed


def turns_and_zoom() -> None:
    """Turn every training patch by any angle and zoom it by up to 1.25 either way, mirrored beyond its borders."""
    original = BatchTransform.__call__

    def changed(self: BatchTransform, raw: Any, augment: bool) -> Batch:
        batch = original(self, raw, augment)
        if augment:
            angle = 2 * math.pi * torch.rand(len(batch.he))
            zoom = 1.25 ** (2 * torch.rand(len(batch.he)) - 1)
            rows = torch.stack((torch.cos(angle), -torch.sin(angle), torch.sin(angle), torch.cos(angle)), dim=1)
            theta = F.pad((rows / zoom[:, None]).view(-1, 2, 2), (0, 1))
            grid = F.affine_grid(theta, list(batch.he.shape), align_corners=False)
            for name in ("he", "target"):
                moved = F.grid_sample(getattr(batch, name), grid, padding_mode="reflection", align_corners=False)
                setattr(batch, name, moved.clamp(0, 1).contiguous(memory_format=self.memory_format))
            batch.boundary = boundary_mask(batch.he)
        return batch

    BatchTransform.__call__ = changed


def residual() -> None:
    """Add a residual connection, a 1 x 1 convolution, to every block of two convolutions."""

    class Residual(blocks.ConvBlock):
        def __init__(self, in_channels: int, out_channels: int, norm: str) -> None:
            super().__init__(in_channels, out_channels, norm)
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y = x
            for name, module in self.named_children():
                if name != "shortcut":
                    y = module(y)
            found: Tensor = y + self.shortcut(x)
            return found

    blocks.ConvBlock = unet.ConvBlock = Residual


def coarse_view() -> None:
    """Give the network a coarse view around each patch, and take the training loss from the middle of the patch."""
    original = CompositeLoss.forward

    def changed(self: CompositeLoss, prediction: Tensor, target: Tensor, mask: Any = None, *rest: Any) -> Any:
        edge = (target.shape[-1] - prediction.shape[-1]) // 2
        if not edge:
            return original(self, prediction, target, mask, *rest)
        middle = (..., slice(edge, -edge), slice(edge, -edge))
        return original(self, prediction, target[middle], None if mask is None else mask[middle])

    CompositeLoss.forward = changed
    unet.SpatialUNet.from_options = classmethod(lambda cls, options, channels: CoarseView(
        channels, options.base_features, options.depth, norm=options.norm,
        use_boundary_guidance=options.use_boundary_guidance,
    ))  # fmt: skip


CHANGES: dict[str, Callable[[], None]] = {
    "default initialisation": default_initialisation,
    "BasicUNet": partial(use_network, BasicUNet),
    "DynUNet": partial(use_network, DynUNet),
    "pix2pix": partial(use_network, Pix2Pix),
    "geometry of the H&E alone": geometry_of_he_alone,
    "normalisation of each patch": patch_normalisation,
    "loss in the centre": loss_in_the_centre,
    "crops with scarce markers": scarce_crops,
    "pyramid of errors": pyramid,
    "turns and zoom": turns_and_zoom,
    "coarse view": coarse_view,
    "residual blocks": residual,
}


def trained_model(run_dir: Path) -> TrainedModel:
    """The best model of a run, set up to be scored on targets whose hot pixels are kept."""
    model = load_trained(run_dir, "cpu")
    return replace(model, config=replace(model.config, data=replace(model.config.data, noise_removal=False)))


def score(folder: ScoredFolder, cores: list[str], predict: Callable[[Any], Tensor]) -> dict[str, Any]:
    """Per marker, over all pixels of the cores: mean squared error, Pearson r, and Pearson r of 8 x 8 boxes."""
    places = [folder.table.names.tolist().index(name) for name in cores]
    thresholds, nothing = torch.full((len(folder.names),), 0.5), np.zeros(0, np.int64)
    # Undo the log transform on both sides, so that every recipe is scored in the same unit.
    curve = math.log1p(LOG_CURVATURE) if folder.normalization.transform == "log1p" else 0.0
    parts = []
    for core in places:
        region = folder.region(core)
        images = [predict(region).clamp(0, 1), region.measured]
        if curve:
            images = [torch.expm1(image * curve) / LOG_CURVATURE for image in images]
        parts.append(score_core(images[0], images[1], thresholds, nothing))
    sums, boxes = sum(part.sums for part in parts), sum(part.boxes for part in parts)
    found = sum_scores(sums, boxes)
    values = {"mse": sums[7] / sums[0], "pearson": found["pearson"], "pearson_boxes": found["pearson_boxes"]}
    return {
        "names": list(folder.names),
        **{name: [None if np.isnan(value) else float(value) for value in column] for name, column in values.items()},
    }


def train_and_score(spec: Path, log: Path) -> None:
    """Run the job, write the trainer's output to ``log``, and exit: call it in a separate process."""
    with open(log, "wb", buffering=0) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.exit(_train_and_score(json.loads(spec.read_text(encoding="utf-8"))))


def _train_and_score(job: dict[str, Any]) -> int:
    torch.set_num_threads(1)
    for name in job["changes"]:
        CHANGES[name]()
    config = TrainConfig.from_options(job["options"])
    run_dir = Path(config.output.output_dir)
    started = time.perf_counter()
    code = train(config)
    seconds = time.perf_counter() - started
    if code not in (FINISHED, DIVERGED):
        # Interrupted: the benchmark runs it again.
        return code
    result: dict[str, Any] = {"job": job, "exit_code": code, "train_s": seconds}
    log = run_dir / METRICS_FILE
    # A training that diverges in its first epoch writes no log.
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    result["epochs"] = [
        {
            "epoch": record["epoch"],
            "lr": record["lr"],
            "train": record["train"]["loss"],
            "val": record["val"]["loss"],
            "train_mse": record["train"]["terms"]["mse"],
            "val_mse": record["val"]["terms"]["mse"],
            "val_pearson": record["val"]["metrics"]["pearson"],
            "val_r2": record["val"]["metrics"]["r2"],
        }
        for record in map(json.loads, lines)
    ]
    if checkpoint_path(run_dir, BEST).exists():
        model = trained_model(run_dir)
        folder = open_folder(model, Path(config.data.pairs_dir), FolderOptions())
        result["best_epoch"] = model.epoch
        result["scores"] = score(folder, job["scored"], lambda region: region.predicted)
        if model.recalibration is not None:
            raw = open_folder(replace(model, recalibration=None), Path(config.data.pairs_dir), FolderOptions())
            result["raw_scores"] = score(raw, job["scored"], lambda region: region.predicted)
        if job["baselines"]:
            baselines = fit_baselines(folder)
            regression = baselines.regression
            # The level that the epochs are counted to, on the cores that every epoch is validated on.
            result["level"] = score(folder, job["chosen"], lambda region: regression.predict(region.he))["mse"]
            result["baselines"] = {
                "training mean": score(folder, job["scored"], lambda region: baselines.predict_mean(region.measured)),
                "regression from colours": score(folder, job["scored"], lambda region: regression.predict(region.he)),
            }
    write_json(Path(job["result"]), result)
    return code
