"""A straight line for each marker, from the network's prediction to the measured level."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from orion_unet.correlation import spread
from orion_unet.errors import InputError

# Patches in which a marker must have been measured for a line.
LEAST_PATCHES = 8


@dataclass(frozen=True)
class Recalibration:
    """``scale`` and ``offset`` (C,) of C markers, and the number of ``pixels`` of training patches they were fitted to.

    A loss that rewards correlation leaves the level of a marker open: its predictions may rank the pixels well, spread
    too far, and be further from the measured values than the marker's mean is. Correlations do not change, except
    where values are cut off at 0 or 1.
    """

    scale: np.ndarray
    offset: np.ndarray
    pixels: int

    @classmethod
    def fit(cls, sums: np.ndarray, patches: np.ndarray, empty: np.ndarray) -> Self:
        """The least-squares lines from sums (6, C) over pixels as of ``correlation.moments``.

        ``patches`` (C,) is the number of patches that each marker was measured in. A marker with few of them, or whose
        prediction does not rise with the measurement, is left as it is. One that is ``empty`` (C,) becomes 0. Lines
        only narrow: a scale above 1 would widen whatever differs in other tissue, and raised errors on real pairs of
        other places and slides.
        """
        count, p, t, pp, _, pt = sums
        with np.errstate(divide="ignore", invalid="ignore"):
            slope = (pt - p * t / count) / spread(count, p, pp)
            fits = (patches >= LEAST_PATCHES) & (slope > 0) & (slope < 1)
            scale = np.where(empty, 0.0, np.where(fits, slope, 1.0))
            offset = np.where(fits & ~empty, (t - scale * p) / count, 0.0)
        return cls(scale, offset, int(count.max(initial=0)))

    def apply_(self, prediction: Tensor) -> Tensor:
        """Recalibrate predictions (B, C, H, W) in place; they stay in [0, 1]."""
        lines = torch.from_numpy(np.stack([self.scale, self.offset])[:, None, :, None, None]).to(prediction)
        return prediction.mul_(lines[0]).add_(lines[1]).clamp_(0, 1)

    def sentence(self) -> str:
        """What it does, for the console."""
        changed = (self.scale != 1) & (self.scale != 0)
        if not changed.any():
            return "changes no marker"
        least, most = self.scale[changed].min(), self.scale[changed].max()
        return f"{changed.sum()} of {len(changed)} markers, scales {least:.2f} to {most:.2f}"

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
