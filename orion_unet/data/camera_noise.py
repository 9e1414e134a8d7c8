"""Channels that show nothing but the noise of the camera, told from rare markers by evidence along rows of pixels.

Noise of one pixel says nothing of the next. Tissue does: nuclei and fibres are several pixels wide, so pixels a few
columns apart are alike, and even the rarest positive cell is several bright pixels side by side. A channel counts as
noise only if nothing of that kind is found in any core.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

# Distance of the pixels that are compared [pixels]: beyond the blur of optics and of resampling, within a nucleus.
LAG = 4
# Pixels this alike, in any core, are tissue: an absolute limit, and one in standard errors for small samples.
LARGEST_CORRELATION, LARGEST_ERRORS = 0.05, 6.0
# A bright piece of a row is as long as a small cell is wide [pixels], and this many standard deviations above the row.
PIECE, STEP, BRIGHT_SD = 8, 2, 6.0
# Fewer bright pieces than this over all cores are dust.
LEAST_PIECES = 3
# Values beyond this count as this, so that a single hot pixel makes no bright piece [standard deviations].
CLIP_SD = 4.0
# Two pixels two columns apart, both above this, are a pair. Pairs of independent pixels are rare, and symmetrical.
PAIR_LAG, PAIR_SD = 2, 2.5
PAIR_EXCESS, PAIR_ERRORS = 1.5, 6.0
# Wider variation than this share of full scale is not the noise of a camera.
WIDEST_SD = 0.05
# Half the distance between these quantiles is the standard deviation of normal noise.
_ONE_SD = (0.158655, 0.841345)


@dataclass(frozen=True)
class NoiseEvidence:
    """What rows of pixels say about the channels of one core, or of several; arrays (C,).

    ``sd`` is the largest standard deviation in a core, as a share of full scale; ``correlation`` the largest
    correlation of pixels ``LAG`` columns apart in a core, less what its sample may show by chance; ``pieces`` the
    number of bright pieces; ``pairs`` and ``expected_pairs`` the bright pairs and how many noise would have.
    ``digital`` marks a background of one value, which no camera has.
    """

    sd: np.ndarray
    correlation: np.ndarray
    pieces: np.ndarray
    pairs: np.ndarray
    expected_pairs: np.ndarray
    digital: np.ndarray

    def joined(self, other: NoiseEvidence) -> NoiseEvidence:
        """The evidence of both."""
        return NoiseEvidence(
            np.maximum(self.sd, other.sd),
            np.maximum(self.correlation, other.correlation),
            self.pieces + other.pieces,
            self.pairs + other.pairs,
            self.expected_pairs + other.expected_pairs,
            self.digital | other.digital,
        )

    def placed(self, present: np.ndarray) -> NoiseEvidence:
        """The same as that of a core in which other channels were not measured: ``present`` (C,) bool are its own."""
        placed = {}
        for name, values in vars(self).items():
            nothing = -np.inf if name == "correlation" else 0
            placed[name] = np.full(len(present), nothing, bool if name == "digital" else float)
            placed[name][present] = values
        return NoiseEvidence(**placed)

    @property
    def noise(self) -> np.ndarray:
        """Whether each channel (C,) shows nothing but noise."""
        many = PAIR_EXCESS * self.expected_pairs + PAIR_ERRORS * np.sqrt(self.expected_pairs + 1)
        quiet = (self.pieces < LEAST_PIECES) & (self.pairs <= many) & (self.correlation <= LARGEST_CORRELATION)
        return quiet & (self.sd > 0) & (self.sd <= WIDEST_SD) & ~self.digital

    def record(self, channel: int) -> dict[str, Any]:
        """The evidence on one channel as plain values, with the verdict."""
        return {
            "noise": bool(self.noise[channel]),
            "sd": float(self.sd[channel]),
            "correlation": round(float(self.correlation[channel]), 4),
            "bright_pieces": int(self.pieces[channel]),
            "bright_pairs": int(self.pairs[channel]),
            "expected_pairs": round(float(self.expected_pairs[channel]), 1),
        }


def look_for_noise(rows: np.ndarray) -> NoiseEvidence:
    """The evidence in some whole rows (C, R, W) of one core, intensities as shares of full scale.

    Bright pieces and pairs are counted only where the correlation does not show tissue already.
    """
    found: dict[str, list[float]] = {name: [] for name in NoiseEvidence.__dataclass_fields__}
    for channel in rows:
        # Offsets between rows are the camera's, too.
        values = channel - channel.mean(axis=1, keepdims=True, dtype=np.float64).astype(np.float32)
        sd, correlation = float(values.std()), _correlation(values)
        counts: tuple[float, ...] = (0, 0, 0.0, False)
        if sd > 0 and correlation <= LARGEST_CORRELATION and values.shape[1] > 2 * PIECE:
            values = channel - np.median(channel, axis=1, keepdims=True)
            low, high = np.quantile(values, _ONE_SD)
            sd = float(high - low) / 2
            if sd > 0:
                clipped = np.clip(values / np.float32(sd), -CLIP_SD, CLIP_SD)
                # Without hot pixels, which hide it.
                correlation = _correlation(clipped - clipped.mean())
                counts = (_pieces(clipped), *_pairs(clipped), False)
            else:
                counts = (0, 0, 0.0, True)
        for name, value in zip(found, (sd, correlation, *counts), strict=True):
            found[name].append(value)
    return NoiseEvidence(**{name: np.array(values) for name, values in found.items()})


def _correlation(centred: np.ndarray) -> float:
    """Correlation of pixels ``LAG`` columns apart in rows (R, W) about 0, less what chance may add; 0 if constant."""
    products = centred[:, LAG:] * centred[:, :-LAG]
    variance = float((centred * centred).mean()) if products.size else 0.0
    if not variance > 0:
        return 0.0
    by_chance = max(0.0, LARGEST_ERRORS / np.sqrt(products.size) - LARGEST_CORRELATION)
    return float(products.mean()) / variance - by_chance


def _pieces(values: np.ndarray) -> int:
    """Bright pieces in rows (R, W) of standard deviations."""
    sums = np.cumsum(values, axis=1, dtype=np.float64)
    means = (sums[:, PIECE::STEP] - sums[:, :-PIECE:STEP]) / PIECE
    low, middle, high = np.quantile(means, [_ONE_SD[0], 0.5, _ONE_SD[1]])
    above = means - middle > BRIGHT_SD * (high - low) / 2
    # Pieces overlap; what is bright side by side counts once.
    return int(above[:, 0].sum() + (above[:, 1:] & ~above[:, :-1]).sum())


def _pairs(values: np.ndarray) -> tuple[int, float]:
    """Bright pairs in rows (R, W) of standard deviations, and how many noise would have."""
    bright, dark = values > PAIR_SD, values < -PAIR_SD
    pairs, dark_pairs = (int((side[:, PAIR_LAG:] & side[:, :-PAIR_LAG]).sum()) for side in (bright, dark))
    return pairs, max(bright[:, PAIR_LAG:].size * float(bright.mean()) ** 2, float(dark_pairs))
