"""How well predicted markers agree with measured ones: what is kept of each core, and the scores that follow.

Undefined is NaN in here (a constant marker has no correlation); it is written as null or an empty cell.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from orion_unet.cell_metrics import CELL_BOUNDS, RankBins
from orion_unet.correlation import pearson
from orion_unet.data.randomness import SCORED_PIXELS, counter_rng
from orion_unet.errors import InputError
from orion_unet.metrics import MarkerSums

SUM_METRICS = ("pearson", "pearson_boxes", "mae", "psnr_db", "ssim")
RANK_METRICS = ("spearman", "auc", "average_precision")
METRICS = (*SUM_METRICS, *RANK_METRICS, "fraction_positive")
BOUNDS = {
    **dict.fromkeys(("pearson", "pearson_boxes", "ssim", "spearman"), (-1.0, 1.0)),
    **CELL_BOUNDS,
}
"""Smallest and largest value of a score over pixels or cells; the others have no bounds that matter."""
# GigaTIME (Valanarasu et al., Cell) correlates means over boxes of this many pixels a side.
BOX_PIXELS = 8
# A pixel is positive above this share of the normalised range: with dataset quantiles, half-way from background to
# the brightest thousandth of the training pixels.
POSITIVE_THRESHOLD = 0.5
# Pixels drawn over all scored cores for what needs sorting; values bound the memory where markers are many.
SAMPLED_PIXELS, SAMPLED_VALUES = 500_000, 20_000_000
SAMPLE_SEED = 0


@dataclass(frozen=True)
class CoreScores:
    """What one core adds to the scores of one predictor: ``sums`` (11, C) float64, and ``sample`` (C, n) float32.

    The rows of ``sums`` are those of ``MarkerSums.state`` and the number of measured positive pixels; ``boxes``
    (10, C) are ``MarkerSums.state`` of the means over boxes. ``sample`` holds the prediction at the pixels drawn.
    """

    sums: np.ndarray
    boxes: np.ndarray
    sample: np.ndarray

    def of(self, present: np.ndarray) -> CoreScores:
        """The same with no pixels of the markers that are not ``present`` (C,) bool."""
        return replace(self, sums=np.where(present, self.sums, 0.0), boxes=np.where(present, self.boxes, 0.0))


def score_core(predicted: Tensor, measured: Tensor, thresholds: Tensor, pixels: np.ndarray) -> CoreScores:
    """Sums of one core, both (C, H, W) in [0, 1] on one device; ``pixels`` (n,) index the flattened (H, W)."""
    channels = len(measured)
    whole, boxes = MarkerSums(channels, measured.device), MarkerSums(channels, measured.device)
    whole.update(predicted[None], measured[None])
    if min(measured.shape[1:]) >= BOX_PIXELS:
        boxes.update(F.avg_pool2d(predicted[None], BOX_PIXELS), F.avg_pool2d(measured[None], BOX_PIXELS))
    positive = torch.stack([(m > t).sum() for m, t in zip(measured, thresholds, strict=True)])
    sums = torch.cat([whole.state, positive[None].double()]).cpu().numpy()
    return CoreScores(sums, boxes.state.cpu().numpy(), take(predicted, pixels))


def take(images: Tensor, pixels: np.ndarray) -> np.ndarray:
    """Values (C, n) float32 of images (C, H, W) at indices of the flattened (H, W)."""
    # By row and column: flattening would copy an image that is expanded from one value.
    row, column = (torch.from_numpy(index).to(images.device) for index in np.divmod(pixels, images.shape[2]))
    return images[:, row, column].float().cpu().numpy()


def sampled_share(total_pixels: int, markers: int) -> float:
    """Share of the pixels that is drawn for the scores that need sorting, 1 where all fit."""
    return min(1.0, min(SAMPLED_PIXELS, SAMPLED_VALUES // markers) / total_pixels)


def draw_pixels(core: int, total: int, share: float) -> np.ndarray:
    """Ascending indices of pixels of a core, one drawn with a fixed seed from each of equal strata."""
    count = min(total, max(1, round(total * share)))
    drawn = counter_rng(SAMPLE_SEED, SCORED_PIXELS, core).random(count)
    return ((np.arange(count) + drawn) * (total / count)).astype(np.int64).clip(max=total - 1)


def sum_scores(sums: np.ndarray, boxes: np.ndarray) -> dict[str, np.ndarray]:
    """Scores (..., C) from sums (..., 11, C) and boxes (..., 10, C), added over any cores.

    ``pearson``, ``mae`` and ``psnr_db`` (data range 1) over all pixels together; ``pearson_boxes`` over the means
    of 8 x 8 pixels; ``ssim`` the mean over cores of each core's; ``fraction_positive`` of the measured pixels.
    """
    pixels, absolute, squared, ssim, patches = (sums[..., row, :] for row in (0, 6, 7, 8, 9))
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            "pearson": pearson(sums[..., :6, :]),
            "pearson_boxes": pearson(boxes[..., :6, :]),
            "mae": absolute / pixels,
            "psnr_db": np.where(squared > 0, -10 * np.log10(squared / pixels), np.nan),
            "ssim": np.where(patches > 0, ssim / patches, np.nan),
            "fraction_positive": sums[..., 10, :] / pixels,
        }


def rank_scores(predicted: np.ndarray, measured: np.ndarray, positive: np.ndarray) -> dict[str, float]:
    """Spearman, area under the ROC and average precision of samples (n,); ``positive`` (n,) bool.

    NaN where undefined: one side constant, or not both positive and negative pixels. By scipy and scikit-learn.
    """
    from scipy.stats import spearmanr
    from sklearn.metrics import average_precision_score, roc_auc_score

    found = dict.fromkeys(RANK_METRICS, np.nan)
    if len(measured) > 1 and np.ptp(predicted) > 0 and np.ptp(measured) > 0:
        found["spearman"] = float(spearmanr(predicted, measured).statistic)
    if positive.any() and not positive.all():
        found["auc"] = float(roc_auc_score(positive, predicted))
        found["average_precision"] = float(average_precision_score(positive, predicted))
    return found


def counted_rank_scores(
    predicted: np.ndarray, measured: np.ndarray, positive: np.ndarray, core: np.ndarray, counts: np.ndarray
) -> dict[str, np.ndarray]:
    """The scores of ``rank_scores`` (N,) where each of K cores counts as often as ``counts`` (N, K) says.

    ``core`` (n,) is the core of each sampled value. Ranks for Spearman are those among all cores, held fixed; the
    curves are followed in steps of 1/512 of the positive and of the negative values: exact ones would have to be
    sorted anew for every row.
    """
    from scipy.stats import rankdata

    # Centred, so that the sums of squares do not swamp the spread.
    p, t = ((rankdata(values) - (len(values) + 1) / 2) / len(values) for values in (predicted, measured))
    by_core = [np.bincount(core, values, counts.shape[1]) for values in (np.ones_like(p), p, t, p * p, t * t, p * t)]
    bins = RankBins(predicted, positive, core, counts.shape[1])
    return {
        "spearman": pearson((counts @ np.stack(by_core, axis=1))[:, :, None])[:, 0],
        "auc": bins.auc(counts),
        "average_precision": bins.average_precision(counts),
    }


def by_marker(
    predicted: np.ndarray, measured: np.ndarray, core: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of each marker, its predicted and measured values (C, n) and their cores (n,), where measured is not NaN."""
    for p, t in zip(predicted, measured, strict=True):
        known = ~np.isnan(t)
        yield (p, t, core) if known.all() else (p[known], t[known], core[known])


def overall(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis, the markers, of those that have a value; NaN without any."""
    known = np.isfinite(values)
    count = known.sum(axis=-1)
    total = np.where(known, values, 0.0).sum(axis=-1)
    return np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0)


def positive_thresholds(given: str | None, names: Sequence[str]) -> np.ndarray:
    """Threshold (C,) in the normalised range from ``--positive_threshold``: a number, NAME=X, or both in a list.

    Raises InputError where a name or a number cannot be used.
    """
    found = dict.fromkeys(names, POSITIVE_THRESHOLD)
    named: dict[str, float] = {}
    problems = []
    for item in (part.strip() for part in (given or "").split(",") if part.strip()):
        name, separator, text = item.rpartition("=")
        try:
            value = float(text)
        except ValueError:
            value = np.nan
        if not 0 <= value < 1:
            problems.append(f"{item!r}: write X or NAME=X with 0 <= X < 1")
        elif not separator:
            found = dict.fromkeys(names, value)
        elif name.strip() not in found:
            problems.append(f"{name.strip()}: is not scored; there are {', '.join(names)}")
        else:
            named[name.strip()] = value
    if problems:
        raise InputError.listing("--positive_threshold cannot be used:", problems)
    return np.array([{**found, **named}[name] for name in names])
