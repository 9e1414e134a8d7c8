"""After training, the level of each marker: how the best model's predictions are brought to that of the measurement."""

from __future__ import annotations

import numpy as np
import torch

from orion_unet.data.patches import PatchPlace, grid_starts
from orion_unet.data.randomness import RECALIBRATION, counter_rng
from orion_unet.distributed import all_reduce_sum, rank, world_size
from orion_unet.models.recalibration import Recalibration
from orion_unet.patch_sums import patch_sums
from orion_unet.training.build import Run

# Training patches that the lines are fitted to, at most; and no more than an epoch has.
MOST_PATCHES = 256
# Where panels differ, each is represented by at least so many cores, if it has them.
CORES_OF_PANEL = 16


def recalibration_patches(run: Run) -> np.ndarray:
    """Training patches (N, 3) as rows core, y, x, the same on every rank, drawn without reading a file.

    They come from the grids of evenly spread training cores. Blank ones are among them, as they are in what is
    predicted.
    """
    data, table = run.config.data, run.prepared.table
    train = run.prepared.split.train
    wanted = min(MOST_PATCHES, len(train) * data.patches_per_image)
    cores = _spread(train, wanted)
    if table.measured is not None:
        panels = np.unique(table.measured[train], axis=0, return_inverse=True)[1].reshape(-1)
        some = [_spread(train[panels == panel], CORES_OF_PANEL) for panel in np.unique(panels)]
        cores = np.unique(np.concatenate([cores, *some]))
    rows = []
    for place, core in enumerate(cores.tolist()):
        size = table.he[core]
        ys, xs = (grid_starts(int(size[side]), data.patch_size, data.patch_size) for side in ("height", "width"))
        grid = [(core, y, x) for y in ys for x in xs]
        # As many of each core as of the others, but for one.
        share = max(1, wanted * (place + 1) // len(cores) - wanted * place // len(cores))
        order = counter_rng(run.config.optimisation.seed, RECALIBRATION, core).permutation(len(grid))
        rows += [grid[at] for at in sorted(order[:share].tolist())]
    return np.array(rows, dtype=np.int32)


def _spread(cores: np.ndarray, count: int) -> np.ndarray:
    """At most ``count`` of the cores, evenly spread."""
    return cores[np.unique(np.linspace(0, len(cores) - 1, min(count, len(cores))).round().astype(int))]


class RecalibrationSums:
    """Sums over training patches of what ``run.validated`` predicts of them, batch by batch, and the lines they give.

    ``batches`` are the patches of this rank. All ranks have the same number of them, of which the last may be empty.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        markers = len(run.prepared.table.kept_channels)
        # Count, Σp, Σt, Σp², Σt², Σpt, and the number of patches in which a marker was measured.
        self.sums = torch.zeros(7, markers, dtype=torch.float64, device=run.device)
        places, size = recalibration_patches(run), run.config.optimisation.val_batch_size
        turns = -(-len(places) // (size * world_size()))
        self.batches = [places[rank() :: world_size()][size * turn : size * (turn + 1)] for turn in range(turns)]
        run.validated.eval()

    @torch.no_grad()
    def add(self, places: np.ndarray) -> None:
        """Predict some of the patches, rows core, y, x."""
        if not len(places):
            return
        feeds, device = self.run.feeds, self.run.device
        raw = feeds.reader.read([PatchPlace(*row) for row in places.tolist()])
        batch = feeds.transform(raw, augment=False)
        with self.run.state.learner.precision.autocast(device):
            prediction = self.run.validated(batch.he)
        found = patch_sums(prediction.float(), batch.target)
        if batch.measured is not None:
            found = found.where(batch.measured)
        patches = (found.pixels > 0).double()
        self.sums += torch.stack([found.pixels, found.p, found.t, found.pp, found.tt, found.pt, patches]).sum(1)

    def fit(self) -> Recalibration:
        """The lines over all ranks; every rank must call it."""
        *sums, patches = all_reduce_sum(self.sums).cpu().numpy()
        normalization = self.run.prepared.normalization
        empty = np.isin(normalization.names, normalization.empty)
        return Recalibration.fit(np.stack(sums), patches, empty)
