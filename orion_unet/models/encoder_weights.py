"""Weights of an encoder from a local file, matched to the names that the encoder has here."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orion_unet.errors import InputError
from orion_unet.extras import needed

# What training frameworks put before the names, and around the weights.
PREFIXES = ("module.", "model.", "encoder.", "backbone.")
CONTAINERS = ("state_dict", "model", "model_state_dict", "teacher")
# More of the encoder missing than this fraction means that the file is of another model.
MOST_MISSING = 0.1
# Counts of batch norm, which say nothing about a model.
IGNORED = "num_batches_tracked"


@dataclass(frozen=True)
class Matched:
    """``weights`` under the encoder's own names; names ``missing`` from the file, and those ``unexpected`` in it."""

    weights: dict[str, Tensor]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


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
    for name in CONTAINERS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
            break
    tensors = {}
    if isinstance(content, Mapping):
        tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise InputError(f"--encoder_weights {path}: has no weights in it")
    return tensors


def match_weights(encoder: nn.Module, stored: Mapping[str, Tensor], path: Path) -> Matched:
    """Find the encoder's tensors among those of a file; prefixes of PREFIXES are removed where that helps.

    timm writes the dots within some names of an encoder as underscores: both are taken for the same. A tensor of
    another shape counts as missing. Raises InputError where more than MOST_MISSING of the encoder's tensors are.
    """
    state = encoder.state_dict()
    own = {_plain(name): name for name in state}
    weights, unexpected = {}, []
    for name, tensor in stored.items():
        found = _find(name, own)
        if found is not None and state[found].shape == tensor.shape:
            weights[found] = tensor.to(state[found].dtype)
        elif not name.endswith(IGNORED):
            unexpected.append(name)
    wanted = [name for name in state if not name.endswith(IGNORED)]
    missing = tuple(name for name in wanted if name not in weights)
    if len(missing) > MOST_MISSING * len(wanted):
        raise InputError(
            f"--encoder_weights {path}: has {len(wanted) - len(missing)} of the {len(wanted)} tensors of this encoder, "
            f"so it is of another model; missing, or of another shape: {', '.join(missing[:3])}…; in the file: "
            f"{', '.join(unexpected[:3])}…"
        )
    return Matched(weights, missing, tuple(unexpected))


def _find(name: str, own: Mapping[str, str]) -> str | None:
    plain = _plain(name, strip=False)
    while plain not in own:
        prefix = next((prefix for prefix in PREFIXES if plain.startswith(prefix)), None)
        if prefix is None:
            return None
        plain = plain.removeprefix(prefix)
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
