"""The composite loss: named terms, each a mean over what it covers, and their weighted sum."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor, nn

from orion_unet.errors import InputError

TERMS = ("mse", "l1", "boundary", "focal", "variance")
VARIANCE_FORMS = ("target", "exponential")

# Slope of focal-R's scaling, as in the authors' own experiments (their exponent gamma is 1).
FOCAL_BETA = 0.2
# Rate of the exponential variance penalty, per unit of variance.
EXPONENTIAL_RATE = 100.0


class CompositeLoss(nn.Module):
    """Weighted sum of the terms, all computed in float32. With e = prediction − target, per pixel and channel:

    - ``mse``: e².
    - ``l1``: |e|.
    - ``boundary``: e² over the pixels of the boundary mask only, divided by their number.
    - ``focal``: focal-R (Yang et al., Delving into Deep Imbalanced Regression, ICML 2021) over squared errors
      with sigmoid scaling: (2σ(β|e|) − 1) · e², β = 0.2, γ = 1. For values in [0, 1] the scaling is at most
      0.0997, so this term is small beside ``mse``.
    - ``variance``, per sample and channel over the spatial variance v of the prediction (biased: divided by H·W):
      relu(τ − v)² (``variance_form="target"``, τ = ``target_variance``) or exp(−100 v) (``"exponential"``).

    ``weights`` maps names of TERMS to weights ≥ 0; a name left out weighs 0. ``channel_weights`` (C,) ≥ 0 multiply
    every term's values per channel, after scaling to mean 1; without them each term is its plain definition.

    Raises InputError when no weight is above 0, ValueError for unknown names and weights that are negative or
    not finite.
    """

    channel_weights: Tensor | None

    def __init__(
        self,
        weights: dict[str, float],
        variance_form: str = "target",
        target_variance: float = 0.01,
        channel_weights: Tensor | None = None,
    ) -> None:
        super().__init__()
        unknown = sorted(set(weights) - set(TERMS))
        if unknown:
            raise ValueError(f"unknown loss terms {', '.join(unknown)}: the terms are {', '.join(TERMS)}")
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights.values()):
            raise ValueError(f"loss weights must be finite and at least 0: {weights}")
        if not any(weights.values()):
            names = ", ".join(f"--{name}_weight" for name in TERMS)
            raise InputError(f"all loss weights are 0, so there is nothing to train: raise one of {names}")
        if variance_form not in VARIANCE_FORMS:
            raise ValueError(f"variance_form must be one of {', '.join(VARIANCE_FORMS)}, not {variance_form!r}")
        if channel_weights is not None:
            channel_weights = channel_weights.to(torch.float32)
            if not (channel_weights.isfinite().all() and (channel_weights >= 0).all() and channel_weights.any()):
                raise ValueError("channel weights must be finite, at least 0 and not all 0")
            channel_weights = channel_weights / channel_weights.mean()
        self.weights = {name: float(weights.get(name, 0.0)) for name in TERMS}
        self.variance_form = variance_form
        self.target_variance = target_variance
        self.register_buffer("channel_weights", channel_weights, persistent=False)

    def forward(
        self,
        prediction: Tensor,
        target: Tensor,
        boundary_mask: Tensor | None = None,
        boundary_count: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to train on, and its unweighted terms (detached scalars), those of weight 0 left out.

        Args:
            prediction, target: (B, C, H, W) in [0, 1].
            boundary_mask: (B, 1, H, W), bool or float in [0, 1]; needed when the boundary term has a weight.
            boundary_count: scalar tensor, the number of boundary pixels to divide by in place of this mask's own.
                Ranks (or accumulated batches) that share their mean count get, averaged, the gradient of one
                batch that holds them all, although their masks differ in size.

        An empty mask gives a boundary term of 0. Nothing here waits for the device. Raises ValueError when shapes
        differ or the mask is missing.
        """
        errors = _Errors(*_as_float32(prediction, target))
        loss = errors.prediction.new_zeros(())
        terms = {}
        for name, weight in self.weights.items():
            if weight == 0:
                continue
            if name == "boundary":
                if boundary_mask is None:
                    raise ValueError("the boundary term has a weight, but there is no boundary mask")
                count = boundary_mask.sum() if boundary_count is None else boundary_count
                count = torch.where(count > 0, count * prediction.shape[1], 1).float()
                term = self._values(name, errors, boundary_mask).sum() / count
            else:
                term = self._values(name, errors).mean()
            loss = loss + weight * term
            terms[name] = term.detach()
        return loss, terms

    @torch.no_grad()
    def sums(self, prediction: Tensor, target: Tensor, boundary_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Numerators and denominators of every term, two float64 tensors (5,) in the order of TERMS.

        Added over batches and ranks and handed to ``combine`` they give the value of one batch that holds all.
        Terms of weight 0 are computed too. Without a mask the boundary term has numerator and denominator 0.
        Arguments and ValueError as in ``forward``; carries no gradient.
        """
        errors = _Errors(*_as_float32(prediction, target))
        numerators = torch.zeros(len(TERMS), dtype=torch.float64, device=prediction.device)
        denominators = torch.zeros_like(numerators)
        for index, name in enumerate(TERMS):
            if name != "boundary":
                values = self._values(name, errors)
                denominators[index] = values.numel()
            elif boundary_mask is not None:
                values = self._values(name, errors, boundary_mask)
                denominators[index] = boundary_mask.sum(dtype=torch.float64) * prediction.shape[1]
            else:
                continue
            # Each sample in float32, which torch adds pairwise: several times as fast as in float64 throughout.
            numerators[index] = values.sum(dim=(1, 2, 3)).sum(dtype=torch.float64)
        return numerators, denominators

    def combine(self, numerators: Tensor, denominators: Tensor) -> tuple[float, dict[str, float | None]]:
        """Loss and unweighted terms from added ``sums``. Reads the tensors, so it waits for the device.

        A term that covered nothing is None and counts as 0 in the loss.
        """
        pairs = zip(TERMS, numerators.tolist(), denominators.tolist(), strict=True)
        terms = {name: total / count if count > 0 else None for name, total, count in pairs}
        loss = sum(
            weight * value for name, weight in self.weights.items() if weight > 0 and (value := terms[name]) is not None
        )
        return float(loss), terms

    def _values(self, name: str, errors: _Errors, mask: Tensor | None = None) -> Tensor:
        """What the term averages: (B, C, H, W); (B, C, 1, 1) for the variance; for the boundary the sum over the
        channels (B, 1, H, W), so that the mask is applied to that alone."""
        if name == "variance":
            variance = errors.prediction.var(dim=(2, 3), correction=0, keepdim=True)
            if self.variance_form == "target":
                values = (self.target_variance - variance).relu().square()
            else:
                values = torch.exp(-EXPONENTIAL_RATE * variance)
        elif name == "l1":
            values = errors.plain.abs()
        elif name == "focal":
            # tanh(x / 2) is 2σ(x) − 1, without the cancellation that leaves few digits of a small error.
            values = errors.squared * torch.tanh(FOCAL_BETA / 2 * errors.plain.abs())
        else:
            values = errors.squared
        if self.channel_weights is not None:
            values = values * self.channel_weights.view(1, -1, 1, 1)
        return values if mask is None else values.sum(dim=1, keepdim=True) * mask


class _Errors:
    """Prediction − target and its square, computed once for all terms that want them."""

    def __init__(self, prediction: Tensor, target: Tensor) -> None:
        self.prediction = prediction
        self.target = target

    @cached_property
    def plain(self) -> Tensor:
        return self.prediction - self.target

    @cached_property
    def squared(self) -> Tensor:
        return self.plain.square()


def _as_float32(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape")
    return prediction.float(), target.float()
