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
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

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


def padded(he: Tensor, depth: int) -> Tensor:
    """The image (B, 3, H, W), padded right and bottom to sides that are multiples of 2**depth."""
    right, bottom = (-side % 2**depth for side in (he.shape[3], he.shape[2]))
    return F.pad(he.float(), (0, right, 0, bottom), mode="replicate")


class BasicUNet(nn.Module):
    """MONAI's network at our width, used as it comes: linear output, no sigmoid."""

    # Its instance norm takes its statistics from the whole tile.
    sees_whole_image = True

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        from monai.networks.nets import BasicUNet as Monai

        widths = [width * 2**level for level in range(5)]
        self.network = Monai(spatial_dims=2, in_channels=3, out_channels=channels, features=(*widths, width))
        self.depth = 4

    def forward(self, he: Tensor) -> Tensor:
        found: Tensor = self.network(padded(he, self.depth))
        return found.float()[..., : he.shape[2], : he.shape[3]]

    @torch.no_grad()
    def start_at(self, means: Tensor) -> None:
        """Start at each marker's mean, as our network does; there is no sigmoid."""
        self.network.final_conv.bias.copy_(means)


class DynUNet(BasicUNet):
    """MONAI's DynUNet, which is nnU-Net's network, at our width, used as it comes: linear output, no sigmoid."""

    def __init__(self, channels: int, width: int) -> None:
        nn.Module.__init__(self)
        from monai.networks.nets import DynUNet as Monai

        self.depth = 4
        levels = self.depth + 1
        self.network = Monai(
            spatial_dims=2, in_channels=3, out_channels=channels, kernel_size=[3] * levels,
            strides=[1] + [2] * self.depth, upsample_kernel_size=[2] * self.depth,
            filters=[width * 2**level for level in range(levels)],
        )  # fmt: skip

    @torch.no_grad()
    def start_at(self, means: Tensor) -> None:
        """Start at each marker's mean, as our network does; there is no sigmoid."""
        self.network.output_block.conv.conv.bias.copy_(means)


class Pix2Pix(nn.Module):
    """The generator of pix2pix (Isola et al., CVPR 2017) at our width, for patches of at least 64 pixels.

    Six convolutions of stride 2 and six transposed ones with skips, batch norm, dropout 0.5 in the three deepest. Its
    tanh output, in [-1, 1], is rescaled to [0, 1].
    """

    depth = 6
    sees_whole_image = False

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        widths = [min(width * 2**level, 8 * width) for level in range(self.depth)]
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, (before, after) in enumerate(pairwise([3, *widths])):
            inner = 0 < level < self.depth - 1
            self.down.append(nn.Sequential(
                nn.LeakyReLU(0.2) if level else nn.Identity(), nn.Conv2d(before, after, 4, 2, 1, bias=not inner),
                nn.BatchNorm2d(after) if inner else nn.Identity(),
            ))  # fmt: skip
        for level in reversed(range(self.depth)):
            before = widths[level] * (1 if level == self.depth - 1 else 2)
            after = widths[level - 1] if level else channels
            self.up.append(nn.Sequential(
                nn.ReLU(), nn.ConvTranspose2d(before, after, 4, 2, 1, bias=not level),
                nn.BatchNorm2d(after) if level else nn.Tanh(),
                nn.Dropout(0.5) if self.depth - 3 <= level else nn.Identity(),
            ))  # fmt: skip

    def forward(self, he: Tensor) -> Tensor:
        x = 2 * padded(he, self.depth) - 1
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
        x = self.up[0](skips.pop())
        for block in self.up[1:]:
            x = block(torch.cat((x, skips.pop()), dim=1))
        found: Tensor = (x.float() + 1) / 2
        return found[..., : he.shape[2], : he.shape[3]]


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


class CoarseView(unet.SpatialUNet):
    """Our network, which also sees the tissue around a patch at half the resolution.

    Training patches are read twice as wide as their target is: the usual encoder sees the middle half, a second one of
    the same size the whole patch, each pixel a mean of four. Both meet at the bottleneck.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        widths = [stage[0].out_channels for stage in self.encoder_stages]
        blocks_of = zip([4 if self.use_boundary_guidance else 3, *widths[:-1]], widths, strict=True)
        self.coarse = nn.ModuleList(blocks.ConvBlock(before, width, options["norm"]) for before, width in blocks_of)
        self.merge = nn.Conv2d(2 * widths[-1], widths[-1], 1)
        self.apply(unet.initialise)

    def forward(self, he: Tensor) -> Tensor:
        seen = padded(he, self.depth + 1)
        margin = he.shape[-1] // 4 if self.training else 0
        middle = seen[..., margin : seen.shape[-2] - margin, margin : seen.shape[-1] - margin]
        skips, x = self.encode(middle)
        wide = self._inputs(F.avg_pool2d(seen, 2))
        for level, block in enumerate(self.coarse):
            wide = block(self.pool(wide) if level else wide)
        wide = F.interpolate(wide, scale_factor=2.0, mode="bilinear", align_corners=False)
        edge = margin // 2**self.depth
        wide = wide[..., edge : wide.shape[-2] - edge, edge : wide.shape[-1] - edge]
        x = self.merge(torch.cat((x, wide), dim=1))
        for up, skip in zip(self.decoder, reversed(skips), strict=True):
            x = up(x, skip)
        found: Tensor = torch.sigmoid(self.head(x).float())
        return found if self.training else found[..., : he.shape[-2], : he.shape[-1]]


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
