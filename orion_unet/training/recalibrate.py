"""After training: brings the best model's predictions to the level of the measurement, marker by marker."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from orion_unet.data.patches import PatchPlace, validation_patches
from orion_unet.distributed import all_reduce_sum, rank, world_size
from orion_unet.models.recalibration import Recalibration
from orion_unet.patch_sums import patch_sums
from orion_unet.training.build import Run

# Largest number of training patches that the lines are fitted to; never more than an epoch has.
MOST_PATCHES = 256


def recalibration_patches(run: Run) -> np.ndarray:
    """Training patches (N, 3) as rows core, y, x, evenly spread over the training cores, and the same on every rank."""
    data = run.config.data
    train = run.prepared.split.train
    wanted = min(MOST_PATCHES, len(train) * data.patches_per_image)
    cores = train[np.unique(np.linspace(0, len(train) - 1, min(wanted, len(train))).round().astype(int))]
    each = replace(data, patches_per_image_val=-(-wanted // len(cores)))
    places = validation_patches(run.feeds.reader, cores, each, run.config.optimisation.seed)
    return places[np.unique(np.linspace(0, len(places) - 1, min(wanted, len(places))).round().astype(int))]


@torch.no_grad()
def fit_recalibration(run: Run, progress: Callable[[], None]) -> Recalibration:
    """Fit the lines to predictions of ``run.validated`` on training patches of all ranks; every rank must call it.

    ``progress`` is called after every batch. Ranks may have different numbers of batches.
    """
    places = recalibration_patches(run)[rank() :: world_size()]
    reader, transform, precision = run.feeds.reader, run.feeds.transform, run.state.learner.precision
    sums = torch.zeros(6, len(run.prepared.table.kept_channels), dtype=torch.float64, device=run.device)
    size = run.config.optimisation.val_batch_size
    run.validated.eval()
    for first in range(0, len(places), size):
        raw = reader.read([PatchPlace(*row) for row in places[first : first + size].tolist()])
        batch = transform(raw, augment=False)
        with precision.autocast(run.device):
            prediction = run.validated(batch.he)
        found = patch_sums(prediction.float(), batch.target)
        if batch.measured is not None:
            found = found.where(batch.measured)
        sums += torch.stack([found.pixels, found.p, found.t, found.pp, found.tt, found.pt]).sum(1)
        progress()
    return Recalibration.fit(all_reduce_sum(sums).cpu().numpy())
