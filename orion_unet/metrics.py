"""Agreement of predicted and measured markers: sums per marker, added over batches and ranks, divided once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

METRICS = ("pearson", "mae", "psnr_db", "ssim")

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2

# A spread this small against the values themselves is the rounding of a constant, not a signal.
CONSTANT_SPREAD = 1e-5

# Values of one intermediate float64 map: bounds the memory whatever the batch. On a CPU 2 MB, which a core's cache
# holds (twice as fast as 32 MB); a GPU wants few large pieces of work.
BLOCK_VALUES = {"cpu": 2**18, "cuda": 2**22}


class MarkerSums:
    """Running sums per marker on the device, from which Pearson r, MAE, PSNR and SSIM follow.

    ``state`` is one float64 tensor (10, C). Adding the states of all ranks (one all_reduce) gives the state of a
    single process that has seen every patch. Its rows: number of pixels, Σp, Σt, Σp², Σt², Σpt, Σ|p−t|, Σ(p−t)²,
    ΣSSIM over patches, number of patches with an SSIM.
    """

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        self.state = torch.zeros(10, channels, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add a batch, both (B, C, H, W) in [0, 1]; never waits for the device. ValueError when shapes differ."""
        channels = self.state.shape[1]
        if prediction.shape != target.shape or prediction.shape[1] != channels:
            raise ValueError(
                f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} are not both "
                f"(B, {channels}, H, W)"
            )
        planes = max(1, BLOCK_VALUES[prediction.device.type] // (prediction.shape[2] * prediction.shape[3]))
        samples = max(1, planes // channels)
        # Image by image in memory: the windows of the SSIM move along rows.
        prediction, target = prediction.contiguous(), target.contiguous()
        for p, t in zip(prediction.split(samples), target.split(samples), strict=True):
            for first in range(0, channels, planes):
                block = slice(first, first + planes)
                self.state[:, block] += _sums(p[:, block].double(), t[:, block].double())

    def compute(self, names: Sequence[str]) -> tuple[dict[str, float | int | None], dict[str, dict[str, float | None]]]:
        """Metrics over all markers, and per marker under its name. Waits for the device.

        Per marker, over all pixels of all patches together:

        - ``pearson`` in [−1, 1]; None where the prediction or the target is constant.
        - ``mae``, in units of the normalised target.
        - ``psnr_db``: 10 · log10(1 / mse), data range 1; None where the mse is 0.
        - ``ssim``: mean over patches of each patch's SSIM (Wang et al., IEEE TIP 2004; Gaussian window 11 × 11 of
          sigma 1.5, K1 0.01, K2 0.03, data range 1, over the pixels whose window lies inside the patch); None
          where patches are smaller than the window.

        Over all markers: for each metric its mean over the markers that have a value (None without any), and under
        ``<metric>_markers`` how many those are. And ``r2``, 1 − Σ(p−t)² / Σ(t − mean of the marker)², both sums over
        all markers: the share of their variance that is explained, 1 at most, 0 for each marker's mean as the
        prediction, below 0 where it is worse than that; None where no marker varies. What is not finite is None.
        Raises ValueError when ``names`` does not name every channel.
        """
        columns = self.state.T.tolist()
        if len(names) != len(columns):
            raise ValueError(f"{len(names)} names for {len(columns)} channels")
        per_channel = {name: _metrics(column) for name, column in zip(names, columns, strict=True)}
        overall: dict[str, float | int | None] = {}
        for metric in METRICS:
            known = [value for values in per_channel.values() if (value := values[metric]) is not None]
            overall[metric] = math.fsum(known) / len(known) if known else None
            overall[f"{metric}_markers"] = len(known)
        overall["r2"] = _explained(columns)
        return overall, per_channel


def _metrics(column: list[float]) -> dict[str, float | None]:
    pixels, sum_p, sum_t, sum_pp, sum_tt, sum_pt, absolute, squared, ssim_sum, patches = column
    return {
        "pearson": _pearson(pixels, sum_p, sum_t, sum_pp, sum_tt, sum_pt),
        "mae": _finite(absolute / pixels) if pixels else None,
        "psnr_db": _finite(-10 * math.log10(squared / pixels)) if squared > 0 else None,
        "ssim": _finite(ssim_sum / patches) if patches else None,
    }


def _explained(columns: list[list[float]]) -> float | None:
    """Coefficient of determination over all markers, each about its own mean."""
    spreads = [_spread(pixels, sum_t, sum_tt) for pixels, _, sum_t, _, sum_tt, *_ in columns]
    total = math.fsum(spreads)
    return _finite(1 - math.fsum(column[7] for column in columns) / total) if total > 0 else None


def _spread(pixels: float, total: float, squares: float) -> float:
    """Sum of squares about the mean; 0 where that is the rounding of a constant."""
    spread = squares - total * total / pixels if pixels else 0.0
    return spread if spread > CONSTANT_SPREAD**2 * squares else 0.0


def _pearson(pixels: float, sum_p: float, sum_t: float, sum_pp: float, sum_tt: float, sum_pt: float) -> float | None:
    """Pearson r from raw moments: in float64, right to 1e-6 down to the spread that counts as constant."""
    spread_p, spread_t = _spread(pixels, sum_p, sum_pp), _spread(pixels, sum_t, sum_tt)
    if not (spread_p > 0 and spread_t > 0):
        return None
    r = (sum_pt - sum_p * sum_t / pixels) / math.sqrt(spread_p) / math.sqrt(spread_t)
    return _finite(min(1.0, max(-1.0, r)))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _sums(p: Tensor, t: Tensor) -> Tensor:
    """The rows of ``MarkerSums.state`` for float64 (B, C, H, W)."""
    samples, _, height, width = p.shape
    pixels = (0, 2, 3)
    error = p - t
    zero = p.new_zeros(p.shape[1])
    covered = min(height, width) >= SSIM_WINDOW
    rows = (
        zero + samples * height * width,
        p.sum(pixels),
        t.sum(pixels),
        p.square().sum(pixels),
        t.square().sum(pixels),
        (p * t).sum(pixels),
        error.abs().sum(pixels),
        error.square().sum(pixels),
        ssim_map(p, t).mean((2, 3)).sum(0) if covered else zero,
        zero + samples if covered else zero,
    )
    return torch.stack(rows)


def ssim_map(p: Tensor, t: Tensor) -> Tensor:
    """Structural similarity of (B, C, H, W) in [0, 1], at the pixels whose window is whole: (B, C, H−10, W−10).

    Wang et al., IEEE Transactions on Image Processing 13(4), 2004, with covariances over the weighted window.
    Give it float64: the local variances are differences of nearly equal numbers.
    """
    mean_p, mean_t = _gaussian(p), _gaussian(t)
    product = mean_p * mean_t
    squares = mean_p.square() + mean_t.square()
    covariance = _gaussian(p * t) - product
    # Only the sum of the two variances enters, so one filtering serves both.
    variances = _gaussian(p.square() + t.square()) - squares
    return ((2 * product + SSIM_C1) * (2 * covariance + SSIM_C2)) / ((squares + SSIM_C1) * (variances + SSIM_C2))


def _gaussian(x: Tensor) -> Tensor:
    """Gaussian mean over the window, whole windows only.

    Shifted sums instead of a convolution: on float64, 20 times as fast on a CPU, and on a GPU out of reach of
    TF32 and autocast.
    """
    radius = SSIM_WINDOW // 2
    taps = [math.exp(-0.5 * (offset / SSIM_SIGMA) ** 2) for offset in range(radius + 1)]
    total = taps[0] + 2 * sum(taps[1:])
    for dim in (-2, -1):
        size = x.shape[dim] - 2 * radius
        y = x.narrow(dim, radius, size) * (taps[0] / total)
        for offset in range(1, radius + 1):
            both = x.narrow(dim, radius - offset, size) + x.narrow(dim, radius + offset, size)
            y.add_(both, alpha=taps[offset] / total)
        x = y
    return x
