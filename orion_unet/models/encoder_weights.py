"""Weights of an encoder from a local file, matched to the names that the encoder has here."""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orion_unet.errors import InputError
from orion_unet.extras import needed

# What training frameworks put before the names, and around the weights.
PREFIXES = ("module.", "model.", "encoder.", "backbone.", "teacher.", "_orig_mod.")
CONTAINERS = ("state_dict", "model", "model_state_dict", "teacher")
# DINOv2 trains its blocks in chunks: blocks.CHUNK.BLOCK, where the numbers of blocks run through all chunks.
CHUNKED = re.compile(r"\bblocks\.\d+\.(?=\d+\.)")
# Without these a vision transformer computes something else, even if the file has every tensor of it.
VARIANT = {
    re.compile(r"blocks\.0\.(ls1\.gamma|gamma_1)"): "init_values=1e-5",
    re.compile(r"reg_token|register_tokens"): "reg_tokens=NUMBER",
}
# More of the encoder missing than this fraction means that the file is of another model.
MOST_MISSING = 0.1
# Counts of batch norm, which say nothing about a model.
IGNORED = "num_batches_tracked"


@dataclass(frozen=True)
class Matched:
    """``weights`` under the encoder's own names; names ``missing`` from the file, and those ``unexpected`` in it;
    ``fitted`` are names of tensors in the file that had another shape and were brought to the encoder's."""

    weights: dict[str, Tensor]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    fitted: tuple[str, ...] = ()


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a .safetensors file, or of a .pt, .pth or .bin file, without executing code in it.

    Raises InputError.
    """
    try:
        with open(path, "rb"):
            pass
        if path.suffix == ".safetensors":
            content: Any = needed("safetensors.torch", "safetensors", extra="encoders").load_file(path)
        else:
            # Checkpoints of DINO, iBOT and MAE also hold the options of their run.
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"--encoder_weights {path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:
        # On damaged or foreign bytes, the readers can raise almost any exception.
        raise InputError(
            f"--encoder_weights {path}: cannot be read as weights ({type(error).__name__}); a .safetensors file or a "
            ".pt file of tensors alone is needed"
        ) from None
    while isinstance(content, Mapping):
        inner = next((content[name] for name in CONTAINERS if isinstance(content.get(name), Mapping)), None)
        if inner is None:
            break
        content = inner
    tensors = {}
    if isinstance(content, Mapping):
        tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise InputError(f"--encoder_weights {path}: has no weights in it")
    return tensors


def match_weights(encoder: nn.Module, stored: Mapping[str, Tensor], path: Path) -> Matched:
    """Find the encoder's tensors among those of a file; prefixes of PREFIXES are removed where that helps.

    timm writes the dots within some names of an encoder as underscores: both are taken for the same. Weights of a
    vision transformer are first converted as timm does: names of DINOv2, positions of another image size. A tensor of
    another shape or type counts as missing. Raises InputError where more than MOST_MISSING of the encoder's tensors
    are, for two different tensors whose names differ only in their prefix, and for values that are not finite.
    """
    state = encoder.state_dict()
    own = {_plain(name): name for name in state}
    converted = _converted(encoder, stored)
    weights: dict[str, Tensor] = {}
    unexpected: list[str] = []
    for name, tensor in converted.items():
        found = _find(name, own)
        if found is None or not _fits(tensor, state[found]):
            if not name.endswith(IGNORED):
                unexpected.append(name)
            continue
        taken = tensor.to(state[found].dtype)
        if found in weights and not torch.equal(weights[found], taken):
            raise InputError(
                f"--encoder_weights {path}: has two tensors for {found} of this encoder; make a file with one network"
            )
        if not taken.isfinite().all():
            raise InputError(
                f"--encoder_weights {path}: {name} has values that are not finite, so the file cannot be used"
            )
        weights[found] = taken
    wanted = [name for name in state if not name.endswith(IGNORED)]
    missing = tuple(name for name in wanted if name not in weights)
    if len(missing) > MOST_MISSING * len(wanted):
        raise InputError(
            f"--encoder_weights {path}: has {len(wanted) - len(missing)} of the {len(wanted)} tensors of this encoder, "
            f"so it is of another model; missing, or of another shape: {', '.join(missing[:3])}…; in the file: "
            f"{', '.join(unexpected[:3])}…"
        )
    shapes = {_bare(name): tensor.shape for name, tensor in stored.items()}
    fitted = (name for name, tensor in converted.items() if shapes.get(_bare(name), tensor.shape) != tensor.shape)
    return Matched(weights, missing, tuple(unexpected), tuple(fitted))


def check_variant(matched: Matched, path: Path) -> None:
    """Raise InputError for weights of a vision transformer with LayerScale or registers that the encoder lacks."""
    for name, (pattern, argument) in product(matched.unexpected, VARIANT.items()):
        if pattern.fullmatch(_bare(name)):
            raise InputError(
                f"--encoder_weights {path}: has {name}, which does not fit this encoder; it is of a variant that may "
                f"be --encoder timm:NAME,{argument} (docs/transfer.md)"
            )


def _fits(tensor: Tensor, own: Tensor) -> bool:
    return tensor.shape == own.shape and tensor.is_floating_point() == own.is_floating_point()


def _converted(encoder: nn.Module, stored: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors of a file as timm converts them for its vision transformers; for other encoders as they are."""
    # A wrapper has the vision transformer, complete except for its head, as its "model".
    model = getattr(encoder, "model", None)
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return stored
    bare = {_bare(name): tensor for name, tensor in stored.items()}
    if len(bare) < len(stored):
        return stored
    if not any(CHUNKED.search(name) for name in encoder.state_dict()):
        bare = {CHUNKED.sub("blocks.", name): tensor for name, tensor in bare.items()}
    try:
        return dict(convert(bare, model))
    except Exception:
        # timm expects weights of this network. Those of another network are refused later, by their names.
        return stored


def _bare(name: str) -> str:
    while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), None):
        name = name.removeprefix(prefix)
    return name


def _find(name: str, own: Mapping[str, str]) -> str | None:
    while (plain := _plain(name, strip=False)) not in own:
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
        if prefix is None:
            return None
        name = name.removeprefix(prefix)
    return own[plain]


def _plain(name: str, strip: bool = True) -> str:
    # A vision transformer's maps come from a wrapper that names the network "model".
    name = name.replace("_", ".")
    return name.removeprefix("model.") if strip else name


def weights_of_record(encoder: nn.Module, record: Mapping[str, Any], given: Path | None) -> dict[str, Tensor]:
    """The encoder's weights that a checkpoint does not contain, from the file of its ``record`` or from ``given``.

    Raises InputError where the file is not there, or is another one than the model was trained with.
    """
    path = given or Path(str(record["path"]))
    if not path.is_file():
        raise InputError(
            f"the weights of its frozen encoder are not in it, and {path} is not there; give the file they came from "
            f"with --encoder_weights (SHA-256 {record['sha256']})"
        )
    if file_digest(path) != record["sha256"]:
        raise InputError(
            f"--encoder_weights {path}: is another file than the one the model was trained with, whose SHA-256 is "
            f"{record['sha256']}"
        )
    return match_weights(encoder, read_weights(path), path).weights


def file_digest(path: Path) -> str:
    """SHA-256 of a file in hexadecimal; raises InputError."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
