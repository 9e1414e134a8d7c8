"""What is kept of every scored core, of the model and its baselines, until all cores are put together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from orion_unet.evaluation.baselines import Baselines
from orion_unet.evaluation.scorecard import MEAN, MODEL, REGRESSION, Scorecard, make_scorecard
from orion_unet.evaluation.scored_folder import Region
from orion_unet.evaluation.scores import CoreScores, draw_pixels, score_core, take


@dataclass
class GatheredCores:
    """Sums and samples of cores, in the order in which they are added.

    A pixel is positive above ``thresholds`` (C,); a ``share`` of the pixels is sampled for the scores that need
    sorting. ``measured`` are the samples (C, n) of each core, NaN where a marker was not measured.
    """

    thresholds: np.ndarray
    share: float
    parts: dict[str, list[CoreScores]] = field(default_factory=dict)
    measured: list[np.ndarray] = field(default_factory=list)

    def add(self, core: int, region: Region, baselines: Baselines) -> None:
        """Score a whole core; ``core`` is its index, which decides the pixels that are drawn."""
        thresholds = torch.from_numpy(self.thresholds).to(region.measured.device, torch.float32)
        pixels = draw_pixels(core, region.measured[0].numel(), self.share)
        measured = take(region.measured, pixels)
        measured[~region.present] = np.nan
        self.measured.append(measured)
        for predictor, image in _predictions(region, baselines):
            found = score_core(image, region.measured, thresholds, pixels).of(region.present)
            self.parts.setdefault(predictor, []).append(found)

    def card(self, names: tuple[str, ...], left_out: np.ndarray | None) -> Scorecard:
        """The scores over all cores; ``left_out`` (U, K) counts the cores with each unit left out, or None."""
        return make_scorecard(names, self.parts, self.measured, self.thresholds, left_out)


def _predictions(region: Region, baselines: Baselines) -> Iterator[tuple[str, Tensor]]:
    yield MODEL, region.predicted
    yield MEAN, baselines.predict_mean(region.measured)
    if baselines.regression is not None:
        yield REGRESSION, baselines.regression.predict(region.he)
