"""The mean of several models, which have the same markers but each a normalisation of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from orion_unet.data.normalization import Normalization
from orion_unet.data.stain import StainProfile
from orion_unet.errors import InputError
from orion_unet.inference.model import TrainedModel, load_trained
from orion_unet.inference.resampled import SAME
from orion_unet.inference.trust import MarkerTrust, read_scorecard


@dataclass(frozen=True)
class Ensemble(TrainedModel):
    """Several models that predict as one: the mean of their intensities, in a linear range that holds all of theirs.

    Each member's [0, 1] means other intensities, because its normalisation was measured on its own training cores. So
    its prediction is inverted to intensities before the mean is taken. ``normalization`` is linear, from the lowest
    ``lower`` to the highest ``upper`` of the members, so that no member is clipped. ``split`` counts a core as trained
    on if any member was trained on it.

    With ``spread``, C further channels follow the C markers in ``predict``, ``names`` and ``normalization``: the
    standard deviation of the intensities over the N members (divided by N).

    The weights of all members stay on the device. The activations are those of one member at a time, beside the sums.
    """

    members: tuple[TrainedModel, ...] = ()
    spread: bool = False

    @torch.inference_mode()
    def predict(self, he: Tensor) -> Tensor:
        """Markers (B, C, H, W) float32 in [0, 1] from H&E (B, 3, H, W), with ``spread`` (B, 2 C, H, W)."""
        mean = deviations = None
        for count, member in enumerate(self.members, start=1):
            found = self._normalized(member.normalization.inverse(member.predict(he).clamp_(0, 1)))
            if mean is None:
                mean = found
                deviations = torch.zeros_like(found) if self.spread else None
                continue
            # Welford's sums: the squares of large and similar values would lose the difference.
            step = found - mean
            mean += step / count
            if deviations is not None:
                deviations += step * (found - mean)
        assert mean is not None
        if deviations is None:
            return mean
        return torch.cat([mean, (deviations / len(self.members)).sqrt_()], dim=1)

    def _normalized(self, stored: Tensor) -> Tensor:
        """Stored values (B, C, H, W) in the common range, which becomes [0, 1]."""
        count = stored.shape[1]
        low = torch.from_numpy(self.normalization.lower[:count]).to(stored)[:, None, None]
        high = torch.from_numpy(self.normalization.upper[:count]).to(stored)[:, None, None]
        span = high - low
        return torch.where(span > 0, (stored / self.normalization.white - low) / torch.where(span > 0, span, 1.0), 0.0)


def load_models(
    paths: Sequence[Path],
    device: str = "auto",
    use_amp: bool = False,
    spread: bool = False,
    encoder_weights: str | Path | None = None,
) -> TrainedModel:
    """Load one checkpoint, or several as an Ensemble; ``encoder_weights`` is for all of them.

    Raises InputError as ``load_trained`` does, and where checkpoints differ in what they predict or need.
    """
    members = tuple(load_trained(path, device, use_amp, encoder_weights) for path in paths)
    if spread and len(members) < 2:
        raise InputError("--spread: is the standard deviation over several models; give several to --checkpoint")
    return members[0] if len(members) == 1 else join(members, spread)


def join(members: Sequence[TrainedModel], spread: bool = False) -> Ensemble:
    """The ensemble of models on one device. Raises InputError, in one sentence, for models that do not fit together."""
    first = members[0]
    for member in members[1:]:
        _check_fits(first, member)
    seen = {member.path.resolve() for member in members}
    if len(seen) < len(members):
        raise InputError("--checkpoint: names a checkpoint twice; name each once")
    split, digests = _cores(members)
    stains = [member.stain for member in members if member.stain is not None]
    fields = {name: getattr(first, name) for name in TrainedModel.__dataclass_fields__}
    normalization = _common_range([member.normalization for member in members])
    if spread:
        zero, span = np.zeros(len(first.names)), normalization.upper - normalization.lower
        normalization = replace(
            normalization,
            names=(*first.names, *(f"{name} spread" for name in first.names)),
            lower=np.concatenate([normalization.lower, zero]),
            upper=np.concatenate([normalization.upper, span]),
            target_mean=np.concatenate([normalization.target_mean, zero]),
        )
    return Ensemble(
        **{
            **fields,
            "names": normalization.names,
            "normalization": normalization,
            "split": split,
            "digests": digests,
            "earlier_digests": tuple(digest for member in members for digest in member.earlier_digests),
            # Each member has its own, in its own range: evaluate fits one anew.
            "colour_regression": None,
            "stain": StainProfile.joined(stains) if len(stains) == len(members) else None,
        },
        members=tuple(members),
        spread=spread,
    )


def members_of(model: TrainedModel) -> tuple[TrainedModel, ...]:
    """The members of an ensemble, or the model alone."""
    return model.members if isinstance(model, Ensemble) else (model,)


def shared_scorecard(model: TrainedModel) -> tuple[dict[str, MarkerTrust] | None, str]:
    """The verdicts that belong to a model; those of an ensemble where all its members have the same.

    crossval writes the same into each of its folds. None, and a sentence that says why, without any.
    """
    found: list[dict[str, MarkerTrust]] = []
    members = members_of(model)
    for member in members:
        trust, why = read_scorecard(member.path)
        if trust is None:
            return None, why
        found.append(trust)
    # As text, in which undefined equals undefined.
    if len({json.dumps({name: str(verdict) for name, verdict in trust.items()}) for trust in found}) > 1:
        return None, (
            "no verdict on the markers: the scorecards of these checkpoints differ; crossval writes one for all folds"
        )
    return found[0], ""


def _check_fits(first: TrainedModel, other: TrainedModel) -> None:
    if other.names != first.names:
        raise InputError(
            f"--checkpoint: {other.path} predicts {', '.join(other.names)} and {first.path} {', '.join(first.names)}; "
            "only models of the same markers in the same order can be averaged"
        )
    sizes = (first.pixel_size_um, other.pixel_size_um)
    if (sizes[0] is None) != (sizes[1] is None) or (sizes[0] and sizes[1] and abs(sizes[1] / sizes[0] - 1) > SAME):
        shown = [f"{size:g} µm" if size else "an unknown pixel size" for size in sizes]
        raise InputError(
            f"--checkpoint: {first.path} was trained at {shown[0]} and {other.path} at {shown[1]}; only models of one "
            "pixel size can be averaged"
        )
    if other.normalization.white != first.normalization.white:
        raise InputError(
            f"--checkpoint: full intensity is {first.normalization.white:g} in the training data of {first.path} and "
            f"{other.normalization.white:g} in that of {other.path}; only models of one unit can be averaged"
        )
    for group, name in (("model", "depth"), ("model", "norm"), ("data", "patch_size"), ("data", "noise_removal")):
        values = [getattr(getattr(model.config, group), name) for model in (first, other)]
        if values[0] != values[1]:
            raise InputError(
                f"--checkpoint: {first.path} has --{name} {values[0]} and {other.path} {values[1]}; only models that "
                "are tiled and trained alike can be averaged"
            )
    # The depth of a timm encoder follows from its strides, whatever --depth says.
    tiling = [(model.network.depth, model.network.sees_whole_image) for model in (first, other)]
    if tiling[0] != tiling[1]:
        raise InputError(
            f"--checkpoint: {first.path} has --encoder {first.config.model.encoder} and {other.path} "
            f"{other.config.model.encoder}, which need other tiles; only models that are tiled alike can be averaged"
        )


def _common_range(members: Sequence[Normalization]) -> Normalization:
    lower = np.min([member.lower for member in members], axis=0)
    upper = np.max([member.upper for member in members], axis=0)
    means = []
    for member in members:
        target = torch.from_numpy(member.target_mean)[:, None, None]
        intensity = member.inverse(target)[:, 0, 0].numpy() / member.white
        means.append(np.divide(intensity - lower, upper - lower, out=np.zeros_like(lower), where=upper > lower))
    return Normalization(
        members[0].names, lower, upper, np.mean(means, axis=0), members[0].white,
        method="none" if all(member.method == "none" for member in members) else "dataset",
    )  # fmt: skip


def _cores(members: Sequence[TrainedModel]) -> tuple[dict[str, Any], dict[str, str]]:
    """Split and digests of an ensemble: a core is trained on if any member was trained on it or on its group.

    Cores of one name and other tissue get names of their own. Without the digests of every member there are none, and
    cores count by name.
    """
    described = all(member.digests for member in members)
    digests: dict[str, str] = {}
    sides: dict[str, dict[str, str]] = {"train": {}, "val": {}}
    for number, member in enumerate(members, start=1):
        for side in sides:
            try:
                rows = [(str(row["core"]), str(row["group"])) for row in member.split[side]]
            except (KeyError, TypeError):
                # A checkpoint can predict without it; evaluate says what is missing.
                return {}, {}
            for core, group in rows:
                name = core
                if described and digests.get(core, member.digests.get(core)) != member.digests.get(core):
                    name = f"{core} of model {number}"
                    group = name if group == core else group
                if described and core in member.digests:
                    digests[name] = member.digests[core]
                sides[side][name] = group
    trained = set(sides["train"].values())
    held_out = {core: group for core, group in sides["val"].items() if core not in sides["train"]}
    related = {core: group for core, group in held_out.items() if group in trained}
    document = {
        side: [{"core": core, "group": group} for core, group in cores.items()]
        for side, cores in (
            ("train", sides["train"] | related),
            ("val", {core: group for core, group in held_out.items() if core not in related}),
        )
    }
    return document, digests
