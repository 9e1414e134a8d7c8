"""A new run that starts from the weights of an earlier model: which are taken, and what is recorded about it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from orion_unet.checkpoint import BEST, checkpoint_path
from orion_unet.config import UNET, ModelOptions, TrainConfig
from orion_unet.errors import InputError
from orion_unet.inference.model import TrainedModel, load_trained
from orion_unet.models.build import build_network
from orion_unet.models.encoder_weights import check_variant, file_digest, match_weights, read_weights, weights_of_record
from orion_unet.models.timm_unet import TimmUNet
from orion_unet.models.unet import UNet, frozen_stages
from orion_unet.recipes import FINE_TUNE

# Options that decide which layers a network has, and of which shape.
ARCHITECTURE = ("encoder", "base_features", "depth", "norm", "use_boundary_guidance", "upsampling")
# Names that channels get when nobody has named them: they say nothing about the marker.
UNNAMED = re.compile(r"channel_\d+")
# Pixel sizes that differ by less than this fraction count as the same.
SAME_PIXEL_SIZE = 0.05
# Buffers of batch norm, which a network with another norm does not have.
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class Source:
    """The model that a new run starts from, on the CPU.

    ``weights`` are those that prediction uses: the averaged ones where the checkpoint has them. ``trained_on`` are
    the digests of the cores that it, and the models before it, were trained on; empty for version 0.1.
    """

    path: str
    sha256: str
    epoch: int
    weights: dict[str, Tensor]
    names: tuple[str, ...]
    options: ModelOptions
    target_transform: str
    pixel_size_um: float | None
    trained_on: tuple[str, ...]

    def check_markers(self, names: Sequence[str], partial: bool) -> None:
        """Raises InputError where the run shares no marker with the source and ``partial`` does not allow it."""
        if not partial and not set(self.names) & set(names):
            raise InputError(
                f"--init_from {self.path}: predicts {', '.join(self.names)} and none of this run's markers "
                f"({', '.join(names)}); name the channels alike (--channel_names), or add --init_partial to take the "
                "layers before the head"
            )


def find_source(config: TrainConfig, earlier: dict[str, Any] | None) -> Source | None:
    """The model named by ``--init_from``; None without it, or where the run continues the checkpoint ``earlier``.

    Raises InputError where it cannot be read or has another architecture.
    """
    options = config.transfer
    if earlier is not None:
        return None
    if options.init_from is None:
        if config.recipe == FINE_TUNE.name:
            raise InputError(f"--recipe {config.recipe}: needs a model to start from; name its run with --init_from")
        if options.encoder_train != "full" and options.encoder_weights is None:
            raise InputError(
                f"--encoder_train {options.encoder_train}: would keep random weights, because this run starts from no "
                "earlier model; name one with --init_from, or the weights of a timm encoder with --encoder_weights"
            )
        return None
    path = _checkpoint(options.init_from)
    try:
        digest = file_digest(path)
        model = load_trained(path, device="cpu", encoder_weights=options.encoder_weights)
    except InputError as error:
        raise InputError(f"--init_from {error}") from None
    if file_digest(path) != digest:
        raise InputError(f"--init_from {path}: was replaced while it was read, perhaps by a run in progress; try again")
    _check_architecture(path, model.config.model, config)
    return Source(
        str(path.resolve()),
        digest,
        model.epoch,
        {name: tensor.clone() for name, tensor in model.network.state_dict().items()},
        model.names,
        model.config.model,
        model.config.data.target_transform,
        model.pixel_size_um,
        _trained_on(model),
    )


@dataclass(frozen=True)
class EncoderFile:
    """Weights of a timm encoder by its own names, and the record of the file they came from."""

    weights: dict[str, Tensor]
    record: dict[str, Any]


def find_encoder(config: TrainConfig, earlier: dict[str, Any] | None) -> EncoderFile | None:
    """The weights named by ``--encoder_weights``, or, where the run continues, those its checkpoint does not contain.

    None where there are none to read. Raises InputError where the file or the encoder cannot be used.
    """
    options, name = config.transfer, config.model.encoder
    if name == UNET:
        if options.encoder_weights is not None:
            raise InputError("--encoder_weights: is for an encoder from timm; choose one with --encoder timm:NAME")
        return None
    # Built here as well, so that a name that cannot be used is refused before anything is written.
    encoder = cast(TimmUNet, build_network(config.model, 1)).encoder
    if earlier is not None:
        record = earlier.get("encoder_weights")
        if not record or not record["left_out"]:
            return None
        given = None if options.encoder_weights is None else Path(options.encoder_weights)
        try:
            return EncoderFile(weights_of_record(encoder, record, given), record)
        except InputError as error:
            raise InputError(f"--resume: the checkpoint cannot be continued: {error}") from None
    if options.encoder_weights is None or options.init_from is not None:
        return None
    path = Path(options.encoder_weights)
    matched = match_weights(encoder, read_weights(path), path)
    check_variant(matched, path)
    record = {
        "path": str(path.resolve()),
        "sha256": file_digest(path),
        "taken": len(matched.weights),
        "missing": list(matched.missing),
        "unexpected": list(matched.unexpected),
        "fitted": list(matched.fitted),
        "left_out": options.encoder_train == "frozen",
    }
    return EncoderFile(matched.weights, record)


def _checkpoint(given: str) -> Path:
    path = Path(given)
    return checkpoint_path(path, BEST) if path.is_dir() else path


def is_source(given: str, record: Mapping[str, Any] | None) -> bool:
    """Whether ``--init_from`` names the file of a record."""
    return record is not None and str(_checkpoint(given).resolve()) == record["path"]


def _trained_on(model: TrainedModel) -> tuple[str, ...]:
    trained = (str(row["core"]) for row in model.split.get("train", ()))
    own = {model.digests[name] for name in trained if name in model.digests}
    return tuple(sorted(own | set(model.earlier_digests)))


def _check_architecture(path: Path, there: ModelOptions, config: TrainConfig) -> None:
    here, how = config.model, config.transfer.encoder_train
    # What is left open follows the source.
    differing = [name for name in ARCHITECTURE if getattr(here, name) not in (None, getattr(there, name))]
    if here.encoder == there.encoder != UNET:
        # Its depth follows from its strides.
        differing = [name for name in differing if name != "depth"]
    different = (
        f"--init_from {path}: its network has {_flags(differing, there)}, this run's has {_flags(differing, here)}"
    )
    if needed := [f"--{name}" for name in ("encoder", "base_features") if name in differing]:
        raise InputError(f"{different}; use the same, because no layer fits another {' or '.join(needed)}")
    if differing and not config.transfer.init_partial:
        raise InputError(f"{different}; use the same, or add --init_partial to take the layers that fit")
    if here.encoder != UNET:
        return
    deepest = len(frozen_stages(range(here.depth + 1), how)) - 1
    if how != "full" and ("norm" in differing or deepest > there.depth):
        raise InputError(
            f"{different}, so --encoder_train {how} would keep random weights or statistics; train it full"
        )


def _flags(names: Sequence[str], options: ModelOptions) -> str:
    values = [(name, getattr(options, name)) for name in names]
    return " ".join(
        f"--{'' if value else 'no_'}{name}" if isinstance(value, bool) else f"--{name} {value}"
        for name, value in values
    )


@torch.no_grad()
def take_over(model: UNet, source: Source, names: Sequence[str], means: Tensor | None) -> dict[str, Any]:
    """Give a new model of the same base width the weights of ``source`` that fit; returns what was taken.

    Layers are matched by their level of resolution, so that a source of another depth fits at the levels that both
    have. Rows of the head are matched by marker name. A marker that the source does not know gets a row of zeros and
    the bias that predicts its entry of ``means`` (len(names),) in [0, 1], or a half where that is None. If only one of
    the two networks sees the Sobel gradient, that input of the first convolution starts at zero or is left out.

    The record holds ``path``, ``sha256`` and ``epoch`` of the source, ``parts`` (per part the taken and the new
    levels), ``markers`` (for every marker of the run its name in the source, or None), ``dropped`` markers, and
    ``trained_on``.
    """
    state = model.state_dict()
    depth = source.options.depth if source.options.encoder == UNET else model.depth
    theirs = {_place(name, depth): tensor for name, tensor in source.weights.items()}
    parts: dict[str, dict[int, list[bool]]] = {"encoder": {}, "decoder": {}}
    for name, tensor in state.items():
        part, level, rest = _place(name, model.depth)
        if part == "head":
            continue
        fits = _copy_fitting(tensor, theirs.get((part, level, rest)))
        if not name.endswith(STATISTICS):
            parts[part].setdefault(level, []).append(fits)
    markers = _take_head(model, source, names, means)
    return {
        "path": source.path,
        "sha256": source.sha256,
        "epoch": source.epoch,
        "parts": {
            part: {
                "taken": [level for level, taken in sorted(levels.items()) if all(taken)],
                "in_part": [level for level, taken in sorted(levels.items()) if any(taken) and not all(taken)],
                "new": [level for level, taken in sorted(levels.items()) if not any(taken)],
            }
            for part, levels in parts.items()
        },
        "markers": markers,
        "dropped": [name for name in source.names if name not in set(markers.values())],
        "trained_on": list(source.trained_on),
    }


def _place(name: str, depth: int) -> tuple[str, int, str]:
    """Part, level of resolution (0: full) and the rest of the name of a tensor.

    The bottleneck is level ``depth``, and so is all of a timm encoder.
    """
    part, _, rest = name.partition(".")
    if part == "head":
        return part, 0, rest
    if part in ("stem", "project", "standardise") or (part == "encoder" and not rest[0].isdecimal()):
        # Parts of a network with a timm encoder, which fits as a whole.
        return "encoder", depth, name
    number, _, rest = rest.partition(".")
    if part == "bottleneck":
        return "encoder", depth, rest
    return part, int(number) if part == "encoder" else depth - 1 - int(number), rest


def _copy_fitting(mine: Tensor, theirs: Tensor | None) -> bool:
    """Copy a tensor where the shape fits; of a first convolution with other inputs, the colours it shares."""
    if theirs is None:
        return False
    if mine.shape == theirs.shape:
        mine.copy_(theirs)
        return True
    inputs = {mine.shape[1], theirs.shape[1]} if mine.ndim == theirs.ndim == 4 else set()
    if inputs == {3, 4} and mine[:, :1].shape == theirs[:, :1].shape:
        mine.zero_()
        mine[:, :3].copy_(theirs[:, :3])
        return True
    return False


def _take_head(model: UNet, source: Source, names: Sequence[str], means: Tensor | None) -> dict[str, str | None]:
    """Set every row of the head; returns each marker's name in the source, None for a new one."""
    weight, bias = model.head.weight, cast(Tensor, model.head.bias)
    weight.zero_()
    bias.zero_()
    if means is not None:
        model.start_at(means)
    their_weight, their_bias = source.weights["head.weight"], source.weights["head.bias"]
    for row, name in enumerate(names):
        if name in source.names:
            weight[row].copy_(their_weight[source.names.index(name)])
            bias[row].copy_(their_bias[source.names.index(name)])
    return {name: name if name in source.names else None for name in names}


def describe(record: Mapping[str, Any]) -> list[str]:
    """The record as lines for a person."""
    lines = [f"started from    {record['path']}, epoch {record['epoch']}"]
    for part, levels in record["parts"].items():
        if not levels["in_part"] and not levels["new"]:
            lines.append(f"  {part:14}all levels")
            continue
        found = [
            f"{word} {', '.join(map(str, levels[key]))}"
            for key, word in (("taken", "levels"), ("in_part", "in part"), ("new", "new:"))
            if levels[key]
        ]
        lines.append(f"  {part:14}{'; '.join(found)}")
    taken = [name for name, found in record["markers"].items() if found is not None]
    new = [name for name, found in record["markers"].items() if found is None]
    head = f"{len(taken)} of {len(record['markers'])} markers by name"
    head += f"; new: {', '.join(new)}" if new else ""
    head += f"; dropped: {', '.join(record['dropped'])}" if record["dropped"] else ""
    return [*lines, f"  {'head':14}{head}"]


def describe_encoder(record: Mapping[str, Any]) -> list[str]:
    """The record of a file of weights as lines for a person."""
    lines = [f"encoder weights {record['path']}: {record['taken']} tensors"]
    for key, words in (
        ("missing", "not in the file, so random"),
        ("unexpected", "in the file and not used"),
        ("fitted", "of another size in the file, resampled"),
    ):
        # Checkpoints from before positions were resampled do not have "fitted".
        names = record.get(key)
        if names:
            lines.append(f"  {words}: {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}")
    if record["left_out"]:
        lines.append("  the checkpoints leave them out and keep the file's digest: keep the file to predict")
    return lines


def source_warnings(
    source: Source,
    target_transform: str,
    pixel_size_um: float | None,
    names: Sequence[str],
    validated: Mapping[str, str],
) -> Iterator[str]:
    """Sentences on what differs between the source's training and a run with these options and marker names.

    ``validated`` are the digests of the run's validation cores by name.
    """
    known = sorted(name for name, digest in validated.items() if digest in source.trained_on)
    if known:
        yield (
            f"--init_from: the source was trained on {len(known)} of this run's {len(validated)} validation cores, "
            f"so their scores flatter this run: {', '.join(known[:5])}{', …' if len(known) > 5 else ''}"
        )
    unnamed = [name for name in names if UNNAMED.fullmatch(name) and name in source.names]
    if unnamed:
        yield (
            f"--init_from: {len(unnamed)} markers have no names of their own ({unnamed[0]}) and were matched by their "
            "position; give --channel_names if the panels differ"
        )
    if source.target_transform != target_transform:
        yield (
            f"--init_from: the source was trained with --target_transform {source.target_transform}, this run with "
            f"{target_transform}; the rows of the head start on another curve"
        )
    there = source.pixel_size_um
    if there and pixel_size_um and abs(there / pixel_size_um - 1) > SAME_PIXEL_SIZE:
        yield (
            f"--init_from: the source was trained at {there:g} µm a pixel, this run at {pixel_size_um:g} µm: cells "
            "have another size in pixels"
        )
