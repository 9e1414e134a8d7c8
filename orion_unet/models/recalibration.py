"""A straight line for each marker, from the network's prediction to the measured level."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from orion_unet.correlation import spread
from orion_unet.errors import InputError


@dataclass(frozen=True)
class Recalibration:
    """``scale`` and ``offset`` (C,) of C markers, and the number of ``pixels`` of training patches they were fitted to.

    A loss that rewards correlation leaves the level of a marker open: its predictions may rank the pixels well and
    still be further from the measured values than the marker's mean is. Correlations do not change, except where values
    are cut off at 0 or 1.
    """

    scale: np.ndarray
    offset: np.ndarray
    pixels: int

    @classmethod
    def fit(cls, sums: np.ndarray) -> Self:
        """The least-squares lines from sums (6, C) over pixels, as ``correlation.moments`` returns them.

        A marker whose prediction does not rise with the measurement is left as it is. A marker whose measurement is the
        same in every pixel becomes that constant.
        """
        count, p, t, _, _, pt = sums
        spread_p, spread_t = spread(count, p, sums[3]), spread(count, t, sums[4])
        with np.errstate(divide="ignore", invalid="ignore"):
            covariance = pt - p * t / count
            slope = covariance / spread_p
            rises = (spread_p > 0) & (covariance > 0)
            constant = (spread_t == 0) & (count > 0)
            scale = np.where(constant, 0.0, np.where(rises, slope, 1.0))
            offset = np.where(constant | rises, (t - scale * p) / count, 0.0)
        return cls(scale, offset, int(count.max(initial=0)))

    def apply_(self, prediction: Tensor) -> Tensor:
        """Recalibrate predictions (B, C, H, W) in place; they stay in [0, 1]."""
        lines = torch.from_numpy(np.stack([self.scale, self.offset])[:, None, :, None, None]).to(prediction)
        return prediction.mul_(lines[0]).add_(lines[1]).clamp_(0, 1)

    def document(self) -> dict[str, Any]:
        """Plain Python values for a checkpoint."""
        return {"scale": self.scale.tolist(), "offset": self.offset.tolist(), "pixels": self.pixels}

    @classmethod
    def from_document(cls, document: Any, markers: int) -> Self:
        """Inverse of ``document``; raises InputError if it is damaged or has another number of markers."""
        try:
            scale, offset = (np.array(document[name], np.float64) for name in ("scale", "offset"))
            found = cls(scale, offset, int(document["pixels"]))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"is damaged, its recalibration cannot be read ({error!r})") from None
        if scale.shape != (markers,) or offset.shape != (markers,) or not np.isfinite([scale, offset]).all():
            raise InputError(f"is damaged, its recalibration is not for {markers} markers")
        return found
