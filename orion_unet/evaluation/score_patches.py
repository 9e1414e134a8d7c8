"""Which patches a model predicts best and worst."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from orion_unet.data.patches import grid_starts
from orion_unet.evaluation.scored_folder import Region
from orion_unet.evaluation.scores import moments, overall, pearson


@dataclass(frozen=True)
class PatchScore:
    """A patch, its upper left corner, its Pearson r (mean over markers), and whether it shows tissue."""

    score: float
    core: int
    y: int
    x: int
    tissue: bool


def patch_scores(region: Region, side: int) -> Iterator[tuple[float, int, int]]:
    """Mean Pearson r over markers, y and x of every patch of a grid over a whole core, where r is defined."""
    predicted, measured = region.predicted.cpu().numpy(), region.measured.cpu().numpy()
    height, width = measured.shape[1:]
    for y in grid_starts(height, side, side):
        for x in grid_starts(width, side, side):
            parts = [image[:, y : y + side, x : x + side].reshape(len(image), -1) for image in (predicted, measured)]
            score = float(overall(pearson(moments(*parts))))
            if np.isfinite(score):
                yield score, y, x


def best_median_worst(patches: list[PatchScore]) -> list[tuple[str, PatchScore]]:
    """The patches to show with their titles, of those with tissue unless there are none; empty without patches."""
    ranked = sorted([p for p in patches if p.tissue] or patches, key=lambda p: -p.score)
    if not ranked:
        return []
    places = {"best": 0, "median": len(ranked) // 2, "worst": len(ranked) - 1}
    return [(title, ranked[place]) for title, place in places.items()]
