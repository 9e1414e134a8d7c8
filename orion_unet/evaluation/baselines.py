"""What a model has to beat: the mean of the training cores, and a linear regression from the colour of each pixel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from orion_unet.data.patches import grid_starts
from orion_unet.data.randomness import REGRESSION, counter_rng
from orion_unet.evaluation.scored_folder import ScoredFolder

# Pixels the regression is fitted to, in patches drawn from every training core.
FITTED_PIXELS = 2_000_000
SEED = 0
# Optical density is -ln(intensity), of intensities no darker than one level of 255.
DARKEST = 1 / 255
FEATURES = ("1", "R", "G", "B", "OD of R", "OD of G", "OD of B")


def colour_features(he: Tensor) -> Tensor:
    """Features (7, ...) of H&E (3, ...) in [0, 1]: one, the three colours, and their optical densities."""
    density = -torch.log(he.clamp(min=DARKEST))
    return torch.cat([torch.ones_like(he[:1]), he, density])


class NormalEquations:
    """Least squares of C markers on the colour of a pixel, from sums: any number of pixels in the same memory."""

    def __init__(self, markers: int) -> None:
        self.gram = np.zeros((len(FEATURES), len(FEATURES)))
        self.moment = np.zeros((len(FEATURES), markers))

    def add(self, he: Tensor, measured: Tensor) -> None:
        """Add the pixels of H&E (3, H, W) and markers (C, H, W)."""
        features = colour_features(he.flatten(1)).double()
        self.gram += (features @ features.T).cpu().numpy()
        self.moment += (features @ measured.flatten(1).double().T).cpu().numpy()

    @property
    def pixels(self) -> int:
        """How many were added."""
        return int(self.gram[0, 0])

    def mean(self) -> np.ndarray:
        """Mean (C,) of the markers."""
        return self.moment[0] / self.gram[0, 0]

    def solve(self) -> np.ndarray:
        """Coefficients (7, C); the smallest where colours are collinear, as in a grey image."""
        # Equilibrated, so that "collinear" does not depend on the unit of a feature.
        scale = np.sqrt(np.diag(self.gram))
        scale[scale == 0] = 1.0
        solution = np.linalg.lstsq(self.gram / np.outer(scale, scale), self.moment / scale[:, None], rcond=1e-12)[0]
        return solution / scale[:, None]


@dataclass(frozen=True)
class Baselines:
    """Both baselines: ``mean`` (C,) and, where there were training cores to fit it to, ``coefficients`` (7, C).

    ``note`` is a sentence on what they were fitted to.
    """

    mean: np.ndarray
    coefficients: np.ndarray | None
    note: str

    def predict_mean(self, like: Tensor) -> Tensor:
        """The mean image (C, H, W), in no memory of its own."""
        return torch.from_numpy(self.mean).to(like)[:, None, None].expand_as(like)

    def predict_regression(self, he: Tensor) -> Tensor:
        """The regression's markers (C, H, W) in [0, 1] from H&E (3, H, W)."""
        coefficients = torch.from_numpy(self.coefficients).to(he)
        markers = he.new_empty(coefficients.shape[1], *he.shape[1:])
        # Row by row of the image: the features of a whole core need not stand beside its markers.
        for row, colours in enumerate(he.unbind(1)):
            markers[:, row] = coefficients.T @ colour_features(colours)
        return markers.clamp_(0, 1)


def fit_baselines(folder: ScoredFolder, progress: Callable[[], None] = lambda: None) -> Baselines:
    """Fit to the training cores that are in the folder, never to held-out ones.

    Without any, the mean is the one that training measured, and there is no regression.
    """
    if not len(folder.train):
        return Baselines(
            folder.normalization.target_mean,
            None,
            "no training core is in the folder: the mean is the one measured in training, and there is no regression "
            "from colours to compare with",
        )
    equations = NormalEquations(len(folder.names))
    for core in folder.train.tolist():
        for place in _places(folder, core):
            he, measured = folder.read(core, *place)
            equations.add(he[0], measured[0])
        progress()
    return Baselines(
        equations.mean(),
        equations.solve(),
        f"fitted to {equations.pixels} pixels of {len(folder.train)} training cores",
    )


def _places(folder: ScoredFolder, core: int) -> Iterator[tuple[int, int, int]]:
    """Patches (top, left, side) of a training core, as many as its share of the budget allows."""
    height, width = folder.size(core)
    side = min(folder.model.config.data.patch_size, height, width)
    grid = [(y, x) for y in grid_starts(height, side, side) for x in grid_starts(width, side, side)]
    order = counter_rng(SEED, REGRESSION, core).permutation(len(grid))
    wanted = max(1, round(FITTED_PIXELS / len(folder.train) / side**2))
    for index in order[:wanted].tolist():
        yield *grid[index], side
