"""Turns stored batches into network inputs and targets, batched on the training device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from orion_unet.data.normalization import LOG_CURVATURE, Normalization
from orion_unet.data.pairs import PairTable
from orion_unet.data.patches import RawBatch, StoredFormat
from orion_unet.models.blocks import sobel_magnitude
from orion_unet.patch_sums import SUM_PIXELS
from orion_unet.registration.stains import STAINS

# At strength 1: largest change of a stain's density (relative) and offset (optical density), of brightness, of contrast
# (relative).
STAIN_SCALE, STAIN_SHIFT, BRIGHTNESS, CONTRAST = 0.15, 0.02, 0.04, 0.10
# Smallest Sobel gradient of a boundary, above camera noise; and the threshold of a hot pixel in standard deviations.
BOUNDARY_FLOOR = 0.08
HOT_PIXEL_SD = 3.0
# Offsets of a pixel's 3 x 3 neighbourhood from its upper left corner.
NEIGHBOURHOOD = tuple((dy, dx) for dy in range(3) for dx in range(3))


@dataclass
class Batch:
    """A batch for the network: ``he`` (B, 3, P, P) and ``target`` (B, C, P, P) float32 in [0, 1], ``boundary``
    (B, 1, P, P) bool, ``core`` (B,) the indices of the cores, on the CPU. Images have the network's memory format.

    ``measured`` (B, C) bool says which markers were measured in the core of each patch; where not, ``target`` is 0. It
    is None where every core of the folder has every marker.
    """

    he: Tensor
    target: Tensor
    boundary: Tensor
    core: Tensor
    measured: Tensor | None = None


class BatchTransform:
    """Scaling, noise removal, normalisation, augmentation and boundary mask of whole batches.

    ``stain_augmentation`` is the strength of the colour jitter: 1 for the ranges of ``jitter_colour``, 0 for none.
    """

    def __init__(
        self,
        table: PairTable,
        formats: dict[str, StoredFormat],
        normalization: Normalization,
        noise_removal: bool,
        device: torch.device,
        memory_format: torch.memory_format = torch.contiguous_format,
        stain_augmentation: float = 1.0,
    ) -> None:
        self.formats = formats
        self.device = device
        self.noise_removal = noise_removal
        self.memory_format = memory_format
        self.stain_augmentation = stain_augmentation
        self.log_transform = normalization.transform == "log1p"
        kept = table.kept_channels
        whole = kept == tuple(range(len(table.channel_names)))
        self.kept = None if whole else torch.tensor(kept, device=device)
        bounds = np.stack([normalization.bounds(str(name)) for name in table.names])
        lower, upper = bounds[:, 0], bounds[:, 1]
        # normalised = stored * factor + offset, per core and channel; an empty channel is 0 everywhere.
        factor = np.divide(1.0, upper - lower, out=np.zeros_like(upper), where=upper > lower)
        stored_factor = torch.from_numpy(factor / formats["orion"].white).float()
        offset = torch.from_numpy(-lower * factor).float()
        # One row for all cores, unless each core is normalised separately.
        rows = len(table) if normalization.method == "core" else 1
        self.factor, self.offset = stored_factor[:rows].to(device), offset[:rows].to(device)
        self.measured = None if table.measured is None else torch.from_numpy(table.measured).to(device)

    def __call__(self, raw: RawBatch, augment: bool) -> Batch:
        """Move a stored batch to the device and turn it into a network batch."""
        geometry = self._geometry(raw.geometry) if augment else None
        he = self._channels_first(raw.he, "he", geometry).div_(self.formats["he"].white)
        target = self._channels_first(raw.orion, "orion", geometry)
        if self.kept is not None:
            target = target.index_select(1, self.kept).contiguous(memory_format=self.memory_format)
        if self.noise_removal:
            target = remove_hot_pixels(target)
        factor, offset = self.factor, self.offset
        measured = None
        if len(factor) > 1 or self.measured is not None:
            core = raw.core.to(self.device, non_blocking=True)
            if len(factor) > 1:
                factor, offset = factor[core], offset[core]
            if self.measured is not None:
                measured = self.measured[core]
        target = torch.addcmul(offset[:, :, None, None], target, factor[:, :, None, None]).clamp_(0, 1)
        if self.log_transform:
            target = target.mul_(LOG_CURVATURE).log1p_().div_(float(np.log1p(LOG_CURVATURE)))
        if measured is not None:
            target = target.mul_(measured[:, :, None, None])
        # Before the colour jitter, so that the mask shows the tissue only.
        boundary = boundary_mask(he)
        if augment and self.stain_augmentation > 0:
            he = jitter_colour(he, self.stain_augmentation * raw.colour)
        return Batch(he.contiguous(memory_format=self.memory_format), target, boundary, raw.core, measured)

    def _geometry(self, drawn: Tensor) -> Tensor | list[list[bool]]:
        """Flips and turns as ``_channels_first`` needs them: for a GPU on the device, without waiting for it."""
        return drawn.tolist() if self.device.type == "cpu" else drawn.to(self.device, non_blocking=True)

    def _channels_first(self, stored: Tensor, modality: str, geometry: Tensor | list[list[bool]] | None) -> Tensor:
        """The images (B, C, P, P) as float32 in new memory, each flipped and turned by its row of geometry.

        One pass turns the stored values and converts them to float; turning floats would take several more passes.
        """
        moved = stored.to(self.device, non_blocking=True)
        if self.formats[modality].layout == "hwc":
            moved = moved.permute(0, 3, 1, 2)
        images = torch.empty(moved.shape, device=self.device, memory_format=self.memory_format)
        if geometry is None:
            return images.copy_(moved)
        if isinstance(geometry, Tensor):
            # A few launches for the batch instead of a few for each image.
            turned = turn_batch(images.copy_(moved), geometry)
            return turned.contiguous(memory_format=self.memory_format)
        for image, source, row in zip(images, moved, geometry, strict=True):
            image.copy_(turn(source, row))
        return images


def turn(image: Tensor, geometry: Sequence[bool]) -> Tensor:
    """Flip the rows, flip the columns and transpose (..., H, W), as the three values of ``geometry`` say.

    Together they give all eight flips and quarter turns of a square.
    """
    rows, columns, swap = geometry
    flipped = [axis for axis, wanted in ((-2, rows), (-1, columns)) if wanted]
    if flipped:
        # Not every device can flip uint16. Moving values as int16 is the same.
        moved = image.view(torch.int16) if image.dtype == torch.uint16 else image
        image = moved.flip(flipped).view(image.dtype)
    return image.transpose(-1, -2) if swap else image


def turn_batch(images: Tensor, geometry: Tensor) -> Tensor:
    """``turn`` of every image of a batch (B, C, P, P) by its row of ``geometry`` (B, 3) bool, on the same device."""
    rows, columns, swap = geometry[:, :, None, None, None].unbind(1)
    images = torch.where(rows, images.flip(-2), images)
    images = torch.where(columns, images.flip(-1), images)
    return torch.where(swap, images.transpose(-1, -2), images)


def jitter_colour(he: Tensor, drawn: Tensor) -> Tensor:
    """Change stain density, brightness and contrast of each H&E (B, 3, H, W) in [0, 1].

    ``drawn`` (B, 8) in [-1, 1] times the strength, on the CPU or the device of ``he``: factors of three stains, offsets
    of three stains, brightness, contrast; zeros change nothing. Stains are separated as in Ruifrok and Johnston (2001)
    and perturbed as in Tellez et al., Medical Image Analysis 2019.
    """
    # Compute the small matrices where the numbers were drawn: inverting a matrix on a GPU makes the host wait.
    stains = torch.tensor(STAINS, device=drawn.device)
    stains = stains / stains.norm(dim=1, keepdim=True)
    separate = torch.linalg.inv(stains)
    factor = torch.diag_embed(1 + STAIN_SCALE * drawn[:, :3])
    mix = (separate @ factor @ stains).to(he.device, non_blocking=True)
    shift = ((STAIN_SHIFT * drawn[:, 3:6]) @ stains).to(he.device, non_blocking=True)
    drawn = drawn.to(he.device, non_blocking=True)
    density = -torch.log(he.clamp(min=1 / 255))
    density = torch.einsum("bchw,bcd->bdhw", density, mix) + shift[:, :, None, None]
    jittered = torch.exp(-density)
    mean = jittered.mean(dim=(1, 2, 3), keepdim=True)
    brightness = BRIGHTNESS * drawn[:, 6, None, None, None]
    contrast = 1 + CONTRAST * drawn[:, 7, None, None, None]
    return ((jittered - mean) * contrast + mean + brightness).clamp(0, 1)


def boundary_mask(he: Tensor) -> Tensor:
    """Pixels (B, 1, H, W) bool on edges of the H&E: Sobel gradient above the patch's mean + sd and BOUNDARY_FLOOR."""
    gradient = sobel_magnitude(he)
    spread, mean = torch.std_mean(gradient, dim=(2, 3), keepdim=True, correction=0)
    return gradient > (mean + spread).clamp(min=BOUNDARY_FLOOR)


def remove_hot_pixels(images: Tensor) -> Tensor:
    """Replace isolated hot pixels of (B, C, H, W) by the median of their 3 x 3 neighbourhood.

    A pixel is hot if it is above mean + 3 sd of its patch and channel and none of its eight neighbours is. A bright
    cell, however rare, covers several pixels and stays.
    """
    pixels = images.shape[2] * images.shape[3]
    above = images - _pixel_sums(images) / pixels
    spread = (_pixel_sums(above.square()) / pixels).sqrt()
    bright = above > HOT_PIXEL_SD * spread
    if images.device.type == "cpu":
        return _replace_isolated(images, bright)
    # Compute every median: listing the hot pixels would make the host wait for the device.
    around = F.avg_pool2d(bright.float(), 3, stride=1, padding=1, divisor_override=1)
    return torch.where(bright & (around < 1.5), median_3x3(images), images)


def _pixel_sums(images: Tensor) -> Tensor:
    """Sums (B, C, 1, 1) over the pixels of (B, C, H, W).

    Where the channels are last, torch adds one pixel after another. Adding SUM_PIXELS neighbours side by side fills the
    processor's vectors and is five times as fast.
    """
    if images.is_contiguous() or not images.is_contiguous(memory_format=torch.channels_last):
        return images.sum((2, 3), keepdim=True)
    pixels = images.permute(0, 2, 3, 1).flatten(1, 2)
    side_by_side = math.gcd(pixels.shape[1], SUM_PIXELS)
    stretches = pixels.unflatten(1, (-1, side_by_side)).sum(1)
    return stretches.sum(1)[:, :, None, None]


def _replace_isolated(images: Tensor, bright: Tensor) -> Tensor:
    """Replace the isolated pixels among the bright ones, visiting only the isolated pixels."""
    # Bytes throughout: their sums are cheap, and listing every bright pixel is not.
    one = bright.view(torch.uint8)
    padded = F.pad(one, (1, 1, 1, 1))
    rows = padded[..., :-2, :] + padded[..., 1:-1, :]
    rows += padded[..., 2:, :]
    around = rows[..., :-2] + rows[..., 1:-1]
    around += rows[..., 2:]
    # A bright pixel counts itself, so that 1 becomes 0 only where it is alone; below 0 a byte wraps to its largest.
    isolated = one - torch.minimum(one, around - 1)
    image, channel, row, column = _positions(isolated)
    height, width = images.shape[-2:]
    values = [
        images[image, channel, (row + dy - 1).clamp(0, height - 1), (column + dx - 1).clamp(0, width - 1)]
        for dy, dx in NEIGHBOURHOOD
    ]
    cleaned = images.clone()
    cleaned[image, channel, row, column] = torch.stack(values).median(dim=0).values
    return cleaned


def _positions(flags: Tensor) -> tuple[Tensor, ...]:
    """Indices (image, channel, row, column) of the few bytes of (B, C, H, W) that are not 0, in any order."""
    last = flags.permute(0, 2, 3, 1)
    if flags.is_contiguous() or not last.is_contiguous() or last.numel() % 8:
        return flags.nonzero(as_tuple=True)
    # Nearly all are 0: look at eight bytes at once first.
    flat = last.reshape(-1)
    words = flat.view(torch.int64).nonzero()[:, 0]
    found = (8 * words[:, None] + torch.arange(8)).flatten()
    found = found[flat[found] != 0]
    image, row, column, channel = torch.unravel_index(found, last.shape)
    return image, channel, row, column


def median_3x3(images: Tensor) -> Tensor:
    """Median over the 3 x 3 neighbourhood of every pixel of (B, C, H, W), edges replicated.

    Sorts the three pixels of each column once and shares them between neighbours. The median of nine is the median of
    the largest minimum, the median median and the smallest maximum of its three sorted columns.
    """
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    low, middle, high = _sort_three(padded[..., :-2, :], padded[..., 1:-1, :], padded[..., 2:, :])
    largest_low = torch.maximum(torch.maximum(low[..., :-2], low[..., 1:-1]), low[..., 2:])
    median_middle = _sort_three(middle[..., :-2], middle[..., 1:-1], middle[..., 2:])[1]
    smallest_high = torch.minimum(torch.minimum(high[..., :-2], high[..., 1:-1]), high[..., 2:])
    return _sort_three(largest_low, median_middle, smallest_high)[1]


def _sort_three(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    a, b = torch.minimum(a, b), torch.maximum(a, b)
    b, c = torch.minimum(b, c), torch.maximum(b, c)
    a, b = torch.minimum(a, b), torch.maximum(a, b)
    return a, b, c
