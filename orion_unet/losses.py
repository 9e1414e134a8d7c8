"""The composite loss: a weighted sum of named terms, each of which is a mean over the pixels it covers."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from orion_unet.errors import InputError
from orion_unet.patch_sums import PatchSums

TERMS = ("mse", "l1", "boundary", "focal", "variance", "correlation")
VARIANCE_FORMS = ("target", "exponential")

# Slope of focal-R's scaling, as in the authors' own experiments (their exponent gamma is 1).
FOCAL_BETA = 0.2
# Rate of the exponential variance penalty, per unit of variance.
EXPONENTIAL_RATE = 100.0
# Added to both variances of a correlation, which fades to 0 for a marker whose sd is below a hundredth of its range.
FLAT_VARIANCE = 1e-4


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
    - ``correlation``, per channel over all pixels of the batch: 1 − cov(p, t) / √((var p + 10⁻⁴)(var t + 10⁻⁴)), one
      minus a Pearson r that fades to 0 where either side is flat. It is taken over the batch because a scarce marker
      is dark in most patches, where a correlation means nothing. With several ranks the batch is the one of all ranks
      together (``mean_over_ranks`` averages a small tensor over them); accumulated batches count separately.

    Where not every marker was measured in every core, each term is the mean over the measured pairs of patch and marker
    alone, and the correlation the mean over the markers that any patch of the batch has.

    ``weights`` maps names of TERMS to weights ≥ 0; a missing name has weight 0. ``channel_weights`` (C,) ≥ 0 are scaled
    to mean 1 and multiply the values of every term per channel.

    Raises InputError when all weights are 0, ValueError for unknown names and for weights that are negative or not
    finite.
    """

    channel_weights: Tensor | None

    def __init__(
        self,
        weights: dict[str, float],
        variance_form: str = "target",
        target_variance: float = 0.01,
        channel_weights: Tensor | None = None,
        mean_over_ranks: Callable[[Tensor], Tensor] | None = None,
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
        self.mean_over_ranks = mean_over_ranks
        self.register_buffer("channel_weights", channel_weights, persistent=False)

    def forward(
        self,
        prediction: Tensor,
        target: Tensor,
        boundary_mask: Tensor | None = None,
        boundary_count: Tensor | None = None,
        measured: Tensor | None = None,
        measured_count: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to train on, and its unweighted terms (detached scalars) except those of weight 0.

        Args:
            prediction, target: (B, C, H, W) in [0, 1].
            boundary_mask: (B, 1, H, W), bool or float in [0, 1]; needed when the boundary term has a weight.
            boundary_count: scalar tensor, the number of boundary pixels to divide by instead of this mask's own. If
                all ranks (or accumulated batches) divide by their mean count, the mean of their gradients is the
                gradient of one large batch, although their masks differ in size. See ``boundary_pixels``.
            measured: (B, C) bool, whether each marker was measured in each patch; None: all were.
            measured_count: scalar tensor, the number of measured pairs of patch and marker to divide by instead of this
                batch's own, for the same reason.

        A mean over nothing is 0. Never waits for the device. Raises ValueError when shapes differ or
        the mask is missing.
        """
        errors = _Errors(*_as_float32(prediction, target), measured)
        if measured is not None:
            pairs = measured.sum() if measured_count is None else measured_count
            pairs = torch.where(pairs > 0, pairs, 1).float()
        loss = errors.prediction.new_zeros(())
        terms = {}
        for name, weight in self.weights.items():
            if weight == 0:
                continue
            if name == "boundary":
                if boundary_mask is None:
                    raise ValueError("the boundary term has a weight, but there is no boundary mask")
                count = boundary_pixels(boundary_mask, measured) if boundary_count is None else boundary_count
                count = torch.where(count > 0, count * prediction.shape[1], 1).float()
                term = self._values(name, errors, boundary_mask).sum() / count
            elif name == "correlation":
                moments = _moments(errors)
                term = self._uncorrelated(self._shared(moments), some=measured is not None)
            elif measured is None:
                term = self._values(name, errors).mean()
            else:
                values = self._values(name, errors)
                term = values.sum() / (pairs * values[0, 0].numel())
            loss = loss + weight * term
            terms[name] = term.detach()
            if name == "correlation":
                # If only another rank's batch is not finite, do not report this rank's term as the culprit.
                terms[name] = torch.where(moments.isfinite().all(), terms[name].nan_to_num(), terms[name])
        return loss, terms

    def sums(self, patches: PatchSums) -> tuple[Tensor, Tensor]:
        """Numerators and denominators of every term, two float64 tensors (6,) in the order of TERMS.

        Summed over batches and ranks and passed to ``combine``, they give the value of one batch that holds all
        patches. Includes terms of weight 0. Both are 0 for the correlation, which ``combine`` computes from moments,
        and for the boundary term when there is no mask.
        """
        counted = (patches.pixels > 0).double()
        pixels = patches.pixels.clamp_min(1)
        variance = patches.pp / pixels - (patches.p / pixels) ** 2
        none = torch.zeros_like(variance)
        values = {
            "mse": (patches.squared, patches.pixels),
            "l1": (patches.absolute, patches.pixels),
            "boundary": (patches.masked, patches.masked_pixels),
            "focal": (_focal_sum(patches), patches.pixels),
            "variance": (self._variance_penalty(variance) * counted, counted),
            "correlation": (none, none),
        }
        numerators, denominators = (torch.stack([values[name][part] for name in TERMS]) for part in (0, 1))
        if self.channel_weights is not None:
            numerators = numerators * self.channel_weights
        return numerators.sum((1, 2)), denominators.sum((1, 2))

    def combine(
        self, numerators: Tensor, denominators: Tensor, moments: Tensor
    ) -> tuple[float, dict[str, float | None]]:
        """Loss and unweighted terms from the totals of ``sums``. Reads the tensors, so it waits for the device.

        ``moments`` (6, C) are the number of pixels, Σp, Σt, Σp², Σt² and Σpt: the first rows of ``MarkerSums.state``.
        A term that covered no pixel is None and counts as 0 in the loss. The correlation is over the markers that have
        any.
        """
        pairs = zip(TERMS, numerators.tolist(), denominators.tolist(), strict=True)
        terms = {name: total / count if count > 0 else None for name, total, count in pairs}
        present = moments[0] > 0
        if present.any():
            terms["correlation"] = float(self._uncorrelated(moments, some=not present.all()))
        loss = sum(
            weight * value for name, weight in self.weights.items() if weight > 0 and (value := terms[name]) is not None
        )
        return float(loss), terms

    def _shared(self, moments: Tensor) -> Tensor:
        """Mean of all ranks' moments, with the gradient of this rank's own.

        DistributedDataParallel averages gradients over ranks, which gives the gradient of the one large batch.
        """
        if self.mean_over_ranks is None:
            return moments
        own = moments.detach()
        return moments + (self.mean_over_ranks(own.clone()) - own)

    def _uncorrelated(self, moments: Tensor, some: bool) -> Tensor:
        """Mean over the channels of 1 − r, from moments (6, C); with ``some``, over those that have any pixels."""
        present = moments[0] > 0
        p, t, pp, tt, pt = moments[1:] / (torch.where(present, moments[0], 1) if some else moments[0])
        # Rounding can make the difference of two nearly equal numbers negative.
        spread = ((pp - p * p).clamp_min(0) + FLAT_VARIANCE) * ((tt - t * t).clamp_min(0) + FLAT_VARIANCE)
        values = 1 - (pt - p * t) / spread.sqrt()
        if self.channel_weights is not None:
            values = values * self.channel_weights
        return (values * present).sum() / present.sum().clamp_min(1) if some else values.mean()

    def _values(self, name: str, errors: _Errors, mask: Tensor | None = None) -> Tensor:
        """The values whose mean is the term: (B, C, H, W); (B, C, 1, 1) for the variance; for the boundary their sum
        over the channels (B, 1, H, W), so that the mask is multiplied only once."""
        if name == "variance":
            values = self._variance_penalty(errors.prediction.var(dim=(2, 3), correction=0, keepdim=True))
            if errors.measured is not None:
                values = values * errors.measured
        elif name == "l1":
            values = errors.plain.abs()
        elif name == "focal":
            # tanh(x / 2) equals 2σ(x) − 1, without the cancellation that loses the digits of a small error.
            values = errors.squared * torch.tanh(FOCAL_BETA / 2 * errors.plain.abs())
        else:
            values = errors.squared
        if self.channel_weights is not None:
            values = values * self.channel_weights.view(1, -1, 1, 1)
        return values if mask is None else values.sum(dim=1, keepdim=True) * mask

    def _variance_penalty(self, variance: Tensor) -> Tensor:
        if self.variance_form == "target":
            return (self.target_variance - variance).relu().square()
        return torch.exp(-EXPONENTIAL_RATE * variance)


class _Errors:
    """Prediction − target and its square, computed once and shared by all terms; 0 where nothing was measured.

    ``measured`` is (B, C, 1, 1) float32, or None.
    """

    def __init__(self, prediction: Tensor, target: Tensor, measured: Tensor | None = None) -> None:
        self.prediction = prediction
        self.target = target
        self.measured = None if measured is None else measured[:, :, None, None].float()
        self._plain: Tensor | None = None
        self._squared: Tensor | None = None

    # Not a cached_property, whose lock torch.compile cannot enter.
    @property
    def plain(self) -> Tensor:
        if self._plain is None:
            self._plain = self.prediction - self.target
            if self.measured is not None:
                self._plain = self._plain * self.measured
        return self._plain

    @property
    def squared(self) -> Tensor:
        if self._squared is None:
            self._squared = self.plain.square()
        return self._squared


def _moments(errors: _Errors) -> Tensor:
    """Number of pixels, Σp, Σt, Σp², Σt² and Σpt per channel: (6, C); of the patches in which it was measured."""
    p, t = errors.prediction, errors.target
    images = (p, t, p * p, t * t, p * t)
    if errors.measured is None:
        sums = torch.stack([each.sum(dim=(0, 2, 3)) for each in images])
        count = sums.new_full((1, p.shape[1]), p.numel() // p.shape[1])
        return torch.cat([count, sums])
    measured = errors.measured[:, :, 0, 0]
    sums = torch.stack([torch.ones_like(measured) * p[0, 0].numel(), *(each.sum(dim=(2, 3)) for each in images)])
    return (sums * measured).sum(1)


def boundary_pixels(mask: Tensor, measured: Tensor | None = None) -> Tensor:
    """Number of pixels of a mask (B, 1, H, W); with ``measured`` (B, C), a patch's pixels count by the share of the
    markers that it has. Scalar; times C, it is the number of values that the boundary term is the mean of."""
    if measured is None:
        return mask.sum()
    return (mask.sum((1, 2, 3)) * measured.double().mean(1)).sum()


def _focal_sum(patches: PatchSums) -> Tensor:
    """Sums of tanh(β|e| / 2) · e² by the series of tanh, whose error for |e| ≤ 1 is below a relative 1e-7."""
    slope = FOCAL_BETA / 2
    return slope * patches.absolute_3 - slope**3 / 3 * patches.absolute_5 + 2 * slope**5 / 15 * patches.absolute_7


def _as_float32(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape")
    return prediction.float(), target.float()
