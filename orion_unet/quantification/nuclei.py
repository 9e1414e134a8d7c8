"""Nuclei of an image of any size, found tile by tile as ``evaluate`` finds them in a whole core."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from orion_unet.data.normalization import LOWER_QUANTILE, UPPER_QUANTILE
from orion_unet.quantification.cell_labels import bands
from orion_unet.segmentation import GROWTH, LEAST_CONTRAST, OTSU_BINS, grown, nuclei_above, smoothed
from orion_unet.slides.intensity import WHITE, declared_white
from orion_unet.slides.markers import ArrayMarkers, MarkerImage

# Side of a tile, and how far around it nuclei are found, too: more than the largest nucleus. Where a nucleus reaches
# that far, it is doubled, up to the largest. In pixels; an image up to ONE_TILE on each side is one tile.
TILE, AROUND, LARGEST_AROUND, ONE_TILE = 1536, 64, 512, 2048
# The smoothing reaches so many pixels.
SMOOTHING_REACH = 4
# Quantiles are those of about so many pixels, evenly spaced.
SAMPLED_PIXELS = 2_000_000
# An image whose quantiles differ by less, of full intensity, is empty: its noise is not taken for nuclei.
LEAST_SPAN = 1 / 500

# Brings stored values of the nuclear marker into [0, 1].
Scaled = Callable[[np.ndarray], np.ndarray]
Step = Callable[[], None]
Region = tuple[int, int, int, int]


def own_range(image: MarkerImage, channel: int) -> Scaled:
    """What brings a channel into [0, 1] by its own quantiles, the same ones by which training normalises cores."""
    shape = (image.shape[1], image.shape[2])
    every = max(1, shape[0] * shape[1] // SAMPLED_PIXELS)
    sample = np.concatenate(
        [image.read([channel], top, 0, rows, shape[1]).ravel()[::every] for top, rows in bands(shape)]
    ).astype(np.float32)
    sample = sample[np.isfinite(sample)]
    low, high = np.quantile(sample, [LOWER_QUANTILE, UPPER_QUANTILE]) if sample.size else (0.0, 0.0)
    white = WHITE.get(image.dtype.name) or declared_white(float(np.max(sample, initial=0)), "orion")
    span = high - low if high - low >= LEAST_SPAN * white else np.inf

    def scaled(values: np.ndarray) -> np.ndarray:
        return np.clip((values.astype(np.float32) - np.float32(low)) / np.float32(span), 0, 1)

    return scaled


def find_nuclei(image: MarkerImage, channel: int, scaled: Scaled, path: Path, step: Step) -> tuple[MarkerImage, int]:
    """The nuclei (1, H, W) int32 of a channel, written to the scratch file ``path``, and how many there are.

    An image of one tile gives those of ``segment_nuclei``, a larger one the same nuclei in another order: every
    nucleus belongs to the tile that its centre is in, and each tile also sees AROUND pixels of its neighbours. Raises
    InputError where the image is damaged, OSError where the disk is full.
    """
    shape = (image.shape[1], image.shape[2])

    def read(region: Region) -> np.ndarray:
        top, left, bottom, right = region
        return scaled(image.read([channel], top, left, bottom - top, right - left)[0])

    np.lib.format.open_memmap(path, mode="w+", dtype=np.int32, shape=(1, *shape))
    # A full disk would otherwise end the process when the map is written to.
    with open(path, "rb+") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    threshold = _threshold(read, shape, step)
    count = 0
    if threshold is not None:
        for tile in _tiles(shape):
            count = _add_tile(read, shape, tile, threshold, path, count)
            step()
    return ArrayMarkers(path, lambda: np.load(path, mmap_mode="r"), "chw"), count


def tile_steps(shape: tuple[int, int]) -> int:
    """How often ``find_nuclei`` calls ``step`` at most."""
    return 3 * len(list(_tiles(shape)))


def _tiles(shape: tuple[int, int]) -> Iterator[Region]:
    side = ONE_TILE if max(shape) <= ONE_TILE else TILE
    for top in range(0, shape[0], side):
        for left in range(0, shape[1], side):
            yield top, left, min(top + side, shape[0]), min(left + side, shape[1])


def _widened(tile: Region, by: int, shape: tuple[int, int]) -> Region:
    top, left, bottom, right = tile
    return max(0, top - by), max(0, left - by), min(shape[0], bottom + by), min(shape[1], right + by)


def _part(array: np.ndarray, around: Region, tile: Region) -> np.ndarray:
    """Of the pixels of a widened tile those of the tile."""
    top, left = tile[0] - around[0], tile[1] - around[1]
    return array[top : top + tile[2] - tile[0], left : left + tile[3] - tile[1]]


def _threshold(read: Callable[[Region], np.ndarray], shape: tuple[int, int], step: Step) -> float | None:
    """Otsu's threshold of the whole smoothed image, None where it has too little contrast to show nuclei."""
    from skimage.filters import threshold_otsu

    def smooth_tiles() -> Iterator[np.ndarray]:
        for tile in _tiles(shape):
            around = _widened(tile, SMOOTHING_REACH, shape)
            yield _part(smoothed(read(around)), around, tile)
            step()

    low, high = np.inf, -np.inf
    for smooth in smooth_tiles():
        low, high = min(low, float(smooth.min())), max(high, float(smooth.max()))
    if not high - low >= LEAST_CONTRAST:
        return None
    counts = np.zeros(OTSU_BINS, np.int64)
    edges = np.linspace(low, high, OTSU_BINS + 1, dtype=np.float32)
    for smooth in smooth_tiles():
        counts += np.histogram(smooth, OTSU_BINS, (low, high))[0]
    return float(threshold_otsu(hist=(counts, (edges[:-1] + edges[1:]) / 2)))


def _add_tile(
    read: Callable[[Region], np.ndarray],
    shape: tuple[int, int],
    tile: Region,
    threshold: float,
    path: Path,
    count: int,
) -> int:
    """Write the nuclei of a tile, numbered from ``count`` + 1, where there is none yet; returns the last number."""
    by = AROUND
    while True:
        around = _widened(tile, by, shape)
        found = nuclei_above(smoothed(read(around)), threshold)
        own = _owned(found, around, tile)
        if by >= LARGEST_AROUND or not _reach_the_rim(found, own, around, shape):
            break
        by *= 2
    # Those of other tiles, too: they limit the growth.
    found = grown(found)
    canvas = np.load(path, mmap_mode="r+")[0, around[0] : around[2], around[1] : around[3]]
    numbers = np.cumsum(own) * own
    new = np.where(canvas == 0, numbers[found], 0)
    # Drop a nucleus that other tiles cover completely, so that the numbers have no gaps.
    left = np.bincount(new.ravel(), minlength=int(numbers.max()) + 1) > 0
    left[0] = False
    dense = np.cumsum(left) * left
    np.copyto(canvas, dense[new] + count, where=new > 0)
    return count + int(left.sum())


def _owned(labels: np.ndarray, around: Region, tile: Region) -> np.ndarray:
    """For each label, whether its centre is in the tile; whole numbers, so that two tiles agree."""
    flat = labels.ravel()
    inside = np.flatnonzero(flat)
    label = flat[inside]
    y, x = np.divmod(inside, labels.shape[1])
    size = int(labels.max()) + 1
    area = np.maximum(np.bincount(label, minlength=size), 1)
    middle_y = (np.bincount(label, y, size).astype(np.int64) + area * around[0]) // area
    middle_x = (np.bincount(label, x, size).astype(np.int64) + area * around[1]) // area
    own = (middle_y >= tile[0]) & (middle_y < tile[2]) & (middle_x >= tile[1]) & (middle_x < tile[3])
    own[0] = False
    return own


def _reach_the_rim(labels: np.ndarray, own: np.ndarray, around: Region, shape: tuple[int, int]) -> bool:
    """Whether an owned nucleus, grown, comes to where the widened tile ends and the image goes on."""
    margin = GROWTH + 1
    rims = [
        labels[:margin] if around[0] > 0 else None,
        labels[:, :margin] if around[1] > 0 else None,
        labels[-margin:] if around[2] < shape[0] else None,
        labels[:, -margin:] if around[3] < shape[1] else None,
    ]
    return any(bool(own[rim].any()) for rim in rims if rim is not None)
