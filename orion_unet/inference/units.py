"""The unit of an output's values, and their levels in uint16."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from orion_unet.data.normalization import LOG_CURVATURE, Normalization

# Full intensity of an output in uint16.
LEVELS = 65535


class Unit:
    """The unit of an output: that of the training data, or [0, 1].

    A new image has no bounds of its own, so those of the data set apply, even if training used each core's.
    """

    def __init__(self, normalization: Normalization, kept: Sequence[int], normalized: bool) -> None:
        self.normalized = normalized
        self.names = [normalization.names[index] for index in kept]
        self.high = 1.0 if normalized else normalization.white
        self._channels = [
            replace(
                normalization,
                names=(normalization.names[index],),
                lower=normalization.lower[[index]],
                upper=normalization.upper[[index]],
                target_mean=normalization.target_mean[[index]],
                per_core={},
            )
            for index in kept
        ]

    def stored(self, target: Tensor, channel: int) -> Tensor:
        """One channel (h, W) of the output from blended predictions, which are in [0, 1] up to rounding."""
        target = target.clamp(0, 1)
        return target if self.normalized else self._channels[channel].inverse(target[None])[0]

    def quantized(self, values: Tensor) -> Tensor:
        """Values as levels 0 to 65535, clipped, still float32: 0 to ``high`` of the unit."""
        return (values * (LEVELS / self.high)).round_().clamp_(0, LEVELS)

    def displayed(self, stored: np.ndarray, channel: int) -> np.ndarray:
        """The network's [0, 1] from stored values, for a picture."""
        if self.normalized:
            return stored
        of = self._channels[channel]
        low, span = of.lower[0], of.upper[0] - of.lower[0]
        if not span > 0:
            return np.zeros_like(stored)
        target = np.clip((stored / of.white - low) / span, 0, 1)
        return np.log1p(LOG_CURVATURE * target) / np.log1p(LOG_CURVATURE) if of.transform == "log1p" else target
