"""Agreement of predicted and measured markers: sums per marker, added over batches and ranks, divided once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from orion_unet.correlation import pearson, spread
from orion_unet.patch_sums import PatchSums, patch_sums

METRICS = ("pearson", "mae", "psnr_db", "ssim")
# The first fields of PatchSums, which are the rows of a state.
STATE_ROWS = 10


class MarkerSums:
    """Running sums per marker on the device, from which Pearson r, MAE, PSNR and SSIM follow.

    ``state`` is one float64 tensor (10, C). Adding the states of all ranks (one all_reduce) gives the state of a
    single process that has seen every patch. Its rows: number of pixels, Σp, Σt, Σp², Σt², Σpt, Σ|p−t|, Σ(p−t)²,
    ΣSSIM over patches, number of patches with an SSIM.
    """

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        self.state = torch.zeros(STATE_ROWS, channels, dtype=torch.float64, device=device)

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add a batch, both (B, C, H, W) in [0, 1]; never waits for the device. ValueError when shapes differ."""
        self.add(patch_sums(prediction, target))

    def add(self, patches: PatchSums) -> None:
        """Add the patches of a batch. ValueError when they have another number of channels."""
        rows = torch.stack(patches[:STATE_ROWS]).sum(1)
        if rows.shape != self.state.shape:
            raise ValueError(f"the patches have {rows.shape[1]} channels, not {self.state.shape[1]}")
        self.state += rows

    def compute(self, names: Sequence[str]) -> tuple[dict[str, float | int | None], dict[str, dict[str, float | None]]]:
        """Metrics over all markers, and per marker under its name. Waits for the device.

        Per marker, over all pixels of all patches together, and None where no patch has it:

        - ``pearson`` in [−1, 1]; None where the prediction or the target is constant.
        - ``mae``, in units of the normalised target.
        - ``psnr_db``: 10 · log10(1 / mse), data range 1; None where the mse is 0.
        - ``ssim``: mean over patches of each patch's SSIM (see ``patch_sums``); None where patches are smaller than
          its window.

        Over all markers: for each metric its mean over the markers that have a value (None without any), and under
        ``<metric>_markers`` how many those are. And ``r2``, 1 − Σ(p−t)² / Σ(t − mean of the marker)², both sums over
        all markers: the share of their variance that is explained, 1 at most, 0 for each marker's mean as the
        prediction, below 0 where it is worse than that; None where no marker varies. What is not finite is None.
        All within 1e-6 of float64 arithmetic (see ``patch_sums``). Raises ValueError when ``names`` does not name
        every channel.
        """
        state = self.state.cpu().numpy()
        if len(names) != state.shape[1]:
            raise ValueError(f"{len(names)} names for {state.shape[1]} channels")
        pixels, _, sum_t, _, sum_tt, _, absolute, squared, ssim, patches = state
        with np.errstate(divide="ignore", invalid="ignore"):
            found = {
                "pearson": pearson(state[:6]),
                "mae": absolute / pixels,
                "psnr_db": -10 * np.log10(squared / pixels),
                "ssim": ssim / patches,
            }
            known = pixels > 0
            r2 = 1 - squared[known].sum() / spread(pixels, sum_t, sum_tt)[known].sum()
        columns = {metric: [_finite(value) for value in values.tolist()] for metric, values in found.items()}
        per_channel = {name: {metric: columns[metric][c] for metric in METRICS} for c, name in enumerate(names)}
        overall: dict[str, float | int | None] = {}
        for metric in METRICS:
            known = [value for value in columns[metric] if value is not None]
            overall[metric] = math.fsum(known) / len(known) if known else None
            overall[f"{metric}_markers"] = len(known)
        overall["r2"] = _finite(float(r2))
        return overall, per_channel


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
