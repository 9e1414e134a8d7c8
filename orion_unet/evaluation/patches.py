"""Patches to look at: the one that a model predicts best, a typical one and the worst, as they were scored."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from orion_unet.correlation import moments, pearson
from orion_unet.data.patches import TISSUE_FRACTION, grid_starts
from orion_unet.evaluation.scored_folder import Region
from orion_unet.evaluation.scores import overall

# Patches in memory; the one nearest to the median of all is shown as typical.
MOST_KEPT = 8


class ScoredPatch(NamedTuple):
    """A patch: Pearson r (mean over markers), its core and upper left corner, and its pixels."""

    score: float
    core: str
    y: int
    x: int
    region: Region


class PatchGallery:
    """Looks at whole cores, one after the other, and keeps few of their patches of ``side`` pixels.

    Patches that are mostly glass count only as long as none shows tissue.
    """

    def __init__(self, side: int) -> None:
        self.side = side
        self._with_tissue = False
        self._scores: list[float] = []
        self._kept: list[ScoredPatch] = []

    def add(self, core: str, region: Region, tissue_fraction: Callable[[int, int], float]) -> None:
        """Look at the patches of a core, of which ``tissue_fraction`` gives that of the one at (y, x)."""
        found = patch_scores(region, self.side)
        on_tissue = [(score, y, x) for score, y, x in found if tissue_fraction(y, x) >= TISSUE_FRACTION]
        if on_tissue and not self._with_tissue:
            self._with_tissue = True
            self._scores.clear()
            self._kept.clear()
        if self._with_tissue:
            found = on_tissue
        if not found:
            return
        ranked = sorted(found)
        self._scores += [score for score, _, _ in ranked]
        for score, y, x in {ranked[0], ranked[len(ranked) // 2], ranked[-1]}:
            self._kept.append(ScoredPatch(score, core, y, x, region.crop(y, x, self.side)))
        if len(self._kept) > MOST_KEPT:
            worst, *between, best = sorted(self._kept, key=lambda patch: patch[:-1])
            middle = np.median(self._scores)
            between.sort(key=lambda patch: abs(patch.score - middle))
            self._kept = [worst, *between[: MOST_KEPT - 2], best]

    def shown(self) -> list[tuple[str, ScoredPatch]]:
        """Best, typical and worst patch, or as many as there are."""
        ranked = sorted(self._kept, key=lambda patch: patch[:-1], reverse=True)
        if len(ranked) < 3:
            return list(zip(("best", "worst"), ranked, strict=False))
        middle = np.median(self._scores)
        typical = min(ranked[1:-1], key=lambda patch: abs(patch.score - middle))
        return [("best", ranked[0]), ("typical", typical), ("worst", ranked[-1])]


def patch_scores(region: Region, side: int) -> list[tuple[float, int, int]]:
    """Mean Pearson r over markers, y and x of every patch of a grid over a whole core, where r is defined."""
    predicted, measured = region.predicted.cpu().numpy(), region.measured.cpu().numpy()
    height, width = measured.shape[1:]
    found = []
    for y in grid_starts(height, side, side):
        for x in grid_starts(width, side, side):
            parts = [image[:, y : y + side, x : x + side].reshape(len(image), -1) for image in (predicted, measured)]
            score = float(overall(pearson(moments(*parts))))
            if np.isfinite(score):
                found.append((score, y, x))
    return found
