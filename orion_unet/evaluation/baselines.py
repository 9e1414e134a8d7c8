"""What a model has to beat on new tissue: the mean of its training cores, and a regression from colours."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from orion_unet.data.colour_regression import ColourRegression, fit_colour_regression
from orion_unet.data.scale import Progress, no_progress
from orion_unet.evaluation.scored_folder import ScoredFolder
from orion_unet.inference.ensemble import members_of


@dataclass(frozen=True)
class Baselines:
    """Both baselines of the scored markers: ``mean`` (C,) and, unless there was nothing to fit it to, ``regression``.

    ``note`` says what they were fitted to.
    """

    mean: np.ndarray
    regression: ColourRegression | None
    note: str

    def predict_mean(self, like: Tensor) -> Tensor:
        """The mean image (C, H, W), in no memory of its own."""
        return torch.from_numpy(self.mean).to(like)[:, None, None].expand_as(like)


def find_baselines(folder: ScoredFolder, progress: Progress = no_progress) -> Baselines:
    """The baselines that training fitted and kept in the checkpoint; for a checkpoint without, ``fit_baselines``."""
    stored = folder.model.colour_regression
    if stored is None:
        return fit_baselines(folder, progress)
    regression = stored.of(folder.channels)
    return Baselines(regression.mean, regression, f"{_fitted_to(regression)} in training, kept in the checkpoint")


def fit_baselines(folder: ScoredFolder, progress: Progress = no_progress) -> Baselines:
    """Fit to the training cores that are in the folder, never to held-out ones.

    Without any, the mean is the one that training measured, and there is no regression.
    """
    train = folder.known.train
    ensemble = len(members_of(folder.model)) > 1
    if not len(train):
        reason = "an ensemble has no regression of its own" if ensemble else "the checkpoint is of version 0.1"
        return Baselines(
            folder.normalization.target_mean,
            None,
            f"{reason} and no training core is in the folder: the mean is the one measured in training, and there is "
            "no regression from colours to compare with",
        )
    patch_size = folder.model.config.data.patch_size
    regression = fit_colour_regression(
        folder.table, folder.scales, folder.transform, train, patch_size, progress=progress
    )
    reason = "each model of an ensemble has another" if ensemble else "the checkpoint is of version 0.1 and has none"
    note = f"{_fitted_to(regression)} in this folder, because {reason}"
    return Baselines(regression.mean, regression, note)


def _fitted_to(regression: ColourRegression) -> str:
    return f"fitted to {regression.pixels} pixels of {regression.cores} training cores"
