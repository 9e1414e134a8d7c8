"""Predicts an image of any size in overlapping tiles, blended, one row of tiles at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor

from orion_unet.errors import InputError
from orion_unet.inference.model import TrainedModel
from orion_unet.inference.tissue import CELL, tissue_cells
from orion_unet.slides.images import HeImage

# Sides of tiles if the network allows any (batch norm), and the most memory for a blended row of tiles: the wider the
# image, the smaller its tiles.
LARGEST_TILE, SMALLEST_TILE, ROW_BYTES = 640, 160, 11 * 10**8
# Overlap of tiles in steps of the deepest level, 2**depth pixels.
OVERLAP_STEPS = 6
BATCH_CPU, BATCH_GPU = 1, 8
# A tile's share of the prediction at its border. The outermost pixels see least of their surroundings and hardly count.
SHARE_AT_BORDER = 0.001


@dataclass(frozen=True)
class Tiling:
    """Square tiles of side ``tile`` that overlap their neighbours by ``overlap``, both multiples of 2**depth.

    The grid begins ``overlap / 2`` (rounded up to such a multiple) outside the image, whose edges are reflected, so
    that a tile surrounds the pixels at the edge like any others.
    """

    tile: int
    overlap: int
    margin: int

    @property
    def stride(self) -> int:
        """Distance between the starts of neighbouring tiles."""
        return self.tile - self.overlap

    def starts(self, length: int) -> list[int]:
        """Starts of the tiles along an axis of ``length`` pixels; the first is negative."""
        count = 1 + max(0, -(-(length + 2 * self.margin - self.tile) // self.stride))
        return [index * self.stride - self.margin for index in range(count)]

    def shares(self, count: int) -> np.ndarray:
        """Share (count, tile) float32 of every tile along an axis; the shares at a pixel add up to 1.

        The weights are Gaussian, like nnU-Net's (Isensee et al., Nature Methods 2021), but as wide as the overlap, so
        that one tile fades into the next over all of it. The share of one of two Gaussians is a logistic curve; it is
        computed as such, because far from its centre a Gaussian underflows. It runs from SHARE_AT_BORDER to
        1 - SHARE_AT_BORDER.
        """
        steepness = np.log((1 - SHARE_AT_BORDER) / SHARE_AT_BORDER)
        rising = 1 / (1 + np.exp(-steepness * (2 * np.arange(self.overlap) + 1 - self.overlap) / self.overlap))
        shares = np.ones((count, self.tile), np.float32)
        shares[1:, : self.overlap] = rising
        shares[:-1, self.stride :] = rising[::-1]
        return shares


def choose_tiling(
    model: TrainedModel, shape: tuple[int, int], tile: int | None = None, overlap: int | None = None
) -> Tiling:
    """The tiling for an image (H, W), with the ``tile`` and ``overlap`` that the user chose (pixels), if any.

    With batch norm, tiles are large and divide the image evenly. Group and instance norm measure the tile itself, and a
    vision transformer relates each of its pixels to all others, so their tiles have the size of the training patches.
    Raises InputError for impossible numbers.
    """
    multiple = 2**model.network.depth
    patch = max(-(-model.config.data.patch_size // multiple), 4) * multiple
    measured = model.config.model.norm != "batch" or model.network.sees_whole_image
    if tile is not None and (tile < 4 * multiple or tile % multiple):
        raise InputError(
            f"--tile {tile}: must be a multiple of {multiple} for this network, and at least {4 * multiple}"
        )
    largest = tile or (patch if measured else _largest_tile(model, shape[1], multiple))
    if overlap is None:
        overlap = min(OVERLAP_STEPS * multiple, largest // (4 * multiple) * multiple)
    elif not 0 < overlap <= largest // 2 or overlap % multiple:
        raise InputError(
            f"--overlap {overlap}: must be a multiple of {multiple} for this network, at most half of {largest}"
        )
    margin = -(-overlap // (2 * multiple)) * multiple
    side = largest
    if tile is None and not measured:
        lengths = [length + 2 * margin - overlap for length in shape]
        side = max(-(-length // -(-length // (largest - overlap))) for length in lengths) + overlap
        side = max(-(-side // multiple) * multiple, 2 * overlap, 2 * multiple)
    return Tiling(side, overlap, margin)


def _largest_tile(model: TrainedModel, width: int, multiple: int) -> int:
    side = LARGEST_TILE
    while side > SMALLEST_TILE and len(model.names) * 4 * side * width > ROW_BYTES:
        side //= 2
    return max(side // multiple, 4) * multiple


def reflected(start: int, count: int, length: int) -> np.ndarray:
    """Indices (count,) from ``start`` on into an axis of ``length`` pixels, reflected at its ends."""
    period = max(2 * (length - 1), 1)
    index = np.arange(start, start + count) % period
    return np.where(index < length, index, period - index)


class TiledPrediction:
    """The prediction of one image, one row of tiles at a time: memory depends on the image's width, not its height.

    ``kept`` are the indices of the markers to return. With ``tissue_only``, tiles without tissue are not predicted: a
    pixel is blended from the predicted tiles that cover it, and 0 if there are none. With ``augmented``, a tile is
    predicted in its eight flips and turns, and averaged.
    """

    def __init__(
        self,
        model: TrainedModel,
        image: HeImage,
        tiling: Tiling,
        *,
        kept: Sequence[int] | None = None,
        tissue_only: bool = False,
        augmented: bool = False,
        batch_size: int | None = None,
    ) -> None:
        self.model = model
        self.image = image
        self.tiling = tiling
        self.tissue_only = tissue_only
        self.augmented = augmented
        self.batch_size = batch_size or (BATCH_GPU if model.device.type == "cuda" else BATCH_CPU)
        self.rows, self.columns = (tiling.starts(length) for length in image.shape)
        whole = kept is None or list(kept) == list(range(len(model.names)))
        self._kept = None if whole else torch.tensor(kept, device=model.device)
        self._channels = len(model.names) if whole or kept is None else len(kept)
        down, across = (torch.from_numpy(tiling.shares(len(starts))) for starts in (self.rows, self.columns))
        self._down, self._across = down.to(model.device), across.to(model.device)
        self._sources = [reflected(start, tiling.tile, image.shape[1]) for start in self.columns]

    def run(self, first: int = 0, progress: Callable[[int], None] = lambda tiles: None) -> Iterator[tuple[int, Tensor]]:
        """Yield (y, rows) from tile row ``first`` on: the finished rows (C, h, W) float32 that begin at row y.

        Values are in [0, 1] up to rounding. The rows are on the model's device, in a buffer that the next step
        overwrites. ``progress`` is called with the number of tiles after each batch.
        """
        if first >= len(self.rows):
            return
        tile, stride, margin = self.tiling.tile, self.tiling.stride, self.tiling.margin
        height, width = self.image.shape
        span = self.columns[-1] + margin + tile
        # With tissue_only, one more channel sums the shares of the predicted tiles. Otherwise they add up to 1.
        channels = self._channels + self.tissue_only
        blended = torch.zeros((channels, tile, span), device=self.model.device)
        # The tile row before ``first`` reaches into it.
        begin = max(first - 1, 0)
        with ThreadPoolExecutor(max_workers=1) as reader:
            coming = reader.submit(self._read, begin)
            for row in range(begin, len(self.rows)):
                strip, shows_tissue = coming.result()
                if row + 1 < len(self.rows):
                    coming = reader.submit(self._read, row + 1)
                report = progress if row >= first else lambda tiles: None
                self._add_row(blended, row, strip, shows_tissue, report)
                last = row + 1 == len(self.rows)
                y = self.rows[row]
                top, bottom = max(y, 0), height if last else y + stride
                if row >= first:
                    finished = blended[:, top - y : bottom - y, margin : margin + width]
                    if self.tissue_only:
                        finished[:-1] /= finished[-1].clamp(min=SHARE_AT_BORDER**3)
                    yield top, finished[: self._channels]
                overlap = self.tiling.overlap
                blended[:, :overlap] = blended[:, stride:].clone()
                blended[:, overlap:] = 0

    def _read(self, row: int) -> tuple[np.ndarray, list[bool]]:
        """The image under a row of tiles as stored, (tile, W, 3), reflected; and which of the tiles to predict."""
        source = reflected(self.rows[row], self.tiling.tile, self.image.shape[0])
        low, high = int(source.min()), int(source.max()) + 1
        stored = self.image.stored(low, 0, high - low, self.image.shape[1])
        strip = stored if len(stored) == len(source) and source[0] == low else stored[source - low]
        if not self.tissue_only:
            return strip, [True] * len(self.columns)
        cells = tissue_cells(strip, self.image.white)
        return strip, [
            bool(cells[:, source.min() // CELL : source.max() // CELL + 1].any()) for source in self._sources
        ]

    def _add_row(
        self, blended: Tensor, row: int, strip: np.ndarray, shows_tissue: list[bool], progress: Callable[[int], None]
    ) -> None:
        wanted: list[int] = []
        tiles: list[np.ndarray] = []
        for column, source in enumerate(self._sources):
            if shows_tissue[column]:
                wanted.append(column)
                tiles.append(strip[:, source])
            else:
                progress(1)
            if len(wanted) == self.batch_size or (wanted and column + 1 == len(self._sources)):
                predicted = self._predict(np.stack(tiles))
                for one, place in zip(predicted, wanted, strict=True):
                    share = self._down[row, :, None] * self._across[place]
                    start = place * self.tiling.stride
                    under = blended[:, :, start : start + self.tiling.tile]
                    under[: self._channels].addcmul_(one, share)
                    under[self._channels :] += share
                progress(len(wanted))
                wanted, tiles = [], []

    def _predict(self, stored: np.ndarray) -> Tensor:
        """Markers (B, C, tile, tile) in [0, 1] of tiles as stored, (B, tile, tile, 3)."""
        if stored.dtype == np.uint16:
            # torch has few operations for uint16.
            stored = stored.astype(np.int32)
        he = torch.from_numpy(stored).to(self.model.device, non_blocking=True)
        he = he.permute(0, 3, 1, 2).float() / self.image.white
        if not self.augmented:
            return self._markers(he)
        total = torch.zeros((), device=he.device)
        for mirrored, quarters in product((False, True), range(4)):
            seen = torch.rot90(he.flip(-1) if mirrored else he, quarters, (-2, -1))
            back = torch.rot90(self._markers(seen), -quarters, (-2, -1))
            total = total + (back.flip(-1) if mirrored else back)
        return total / 8

    def _markers(self, he: Tensor) -> Tensor:
        predicted = self.model.predict(he)
        return predicted if self._kept is None else predicted.index_select(1, self._kept)
