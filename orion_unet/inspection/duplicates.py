"""Finds the same tissue under two names: identical files, and copies re-saved, brightened, flipped or rotated."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from orion_unet.inspection.cores import CoreView

# Thumbnails of copies correlate above this; those of different tissue stay far below, even with the same outline.
ALIKE = 0.8
# A Gaussian blur of this many thumbnail pixels is subtracted; otherwise all round cores on glass would look alike.
OUTLINE = 3.0
ROWS_AT_A_TIME = 500


class Twins(NamedTuple):
    """Two cores that show the same tissue; ``likeness`` is 1 if the stored H&E is identical byte for byte."""

    first: CoreView
    second: CoreView
    likeness: float

    @property
    def across_groups(self) -> bool:
        """Whether the split may put one in training and the other in validation."""
        return self.first.group != self.second.group


def find_twins(cores: Sequence[CoreView]) -> list[Twins]:
    """Pairs of cores with the same H&E, and pairs whose thumbnails are alike in any of the eight orientations.

    Copies that were cropped, or shifted by more than about 1 % of their side, are not found.
    """
    same = defaultdict(list)
    for core in cores:
        same[core.digest].append(core)
    twins = [Twins(group[0], other, 1.0) for group in same.values() for other in group[1:]]
    # One of each set of identical cores is compared with the others.
    single = [group[0] for group in same.values()]
    upright = np.stack([_detail(core.thumbnail) for core in single])
    turned = np.stack([[_unit(each) for each in _orientations(detail)] for detail in upright])
    flat = np.stack([_unit(detail) for detail in upright])
    for start in range(0, len(single), ROWS_AT_A_TIME):
        rows = flat[start : start + ROWS_AT_A_TIME]
        likeness = np.max([rows @ turned[:, way].T for way in range(turned.shape[1])], axis=0)
        for row, column in np.argwhere(likeness > ALIKE).tolist():
            if start + row < column:
                twins.append(Twins(single[start + row], single[column], float(likeness[row, column])))
    return sorted(twins, key=lambda pair: (not pair.across_groups, -pair.likeness))


def _detail(thumbnail: np.ndarray) -> np.ndarray:
    """A thumbnail without its outline: minus its own blur."""
    side = np.fft.fftfreq(len(thumbnail))
    frequency = side[:, None] ** 2 + side**2
    keep = 1 - np.exp(-2 * (np.pi * OUTLINE) ** 2 * frequency)
    return np.fft.ifft2(np.fft.fft2(thumbnail) * keep).real.astype(np.float32)


def _orientations(image: np.ndarray) -> list[np.ndarray]:
    return [np.rot90(side, turns) for side in (image, image.T) for turns in range(4)]


def _unit(image: np.ndarray) -> np.ndarray:
    """The image with mean 0 and length 1, so that the product of two is their correlation; zeros if it is blank."""
    flat = (image - image.mean()).ravel()
    length = float(np.linalg.norm(flat))
    return flat / length if length > 1e-6 else np.zeros_like(flat)
