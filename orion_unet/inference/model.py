"""A trained model, ready to predict: network, marker names, normalisation, options."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from orion_unet import checkpoint
from orion_unet.config import TrainConfig
from orion_unet.data.colour_regression import ColourRegression
from orion_unet.data.normalization import Normalization
from orion_unet.data.stain import StainProfile
from orion_unet.errors import InputError
from orion_unet.models.build import build_network
from orion_unet.models.encoder_weights import weights_of_record
from orion_unet.models.recalibration import Recalibration
from orion_unet.models.timm_unet import TimmUNet
from orion_unet.models.unet import UNet, memory_format


@dataclass(frozen=True)
class TrainedModel:
    """The network of a checkpoint, ready to predict on one device.

    ``names`` are its C markers, ``normalization`` inverts [0, 1] to the unit of the training data, ``config`` holds
    the options it was trained with, ``epoch`` the epoch whose weights these are. ``split`` is the content
    of split.json: which cores it was trained on. ``digests`` are those of their H&E by name, and
    ``colour_regression`` is what the model has to beat; a checkpoint of version 0.1 has neither. ``earlier_digests``
    are those of the cores that the models it started from were trained on. ``stain`` is that of its training cores,
    None in a checkpoint that does not keep it. ``recalibration`` is applied to every prediction; None in last.pt, and
    for a run that did not end or was trained without --recalibrate.
    """

    path: Path
    network: UNet
    names: tuple[str, ...]
    normalization: Normalization
    config: TrainConfig
    epoch: int
    split: dict[str, Any]
    device: torch.device
    precision: torch.dtype | None = None
    digests: dict[str, str] = field(default_factory=dict)
    colour_regression: ColourRegression | None = None
    earlier_digests: tuple[str, ...] = ()
    stain: StainProfile | None = None
    recalibration: Recalibration | None = None

    @property
    def pixel_size_um(self) -> float | None:
        """Side of a pixel of the training data in micrometres; None if unknown."""
        return self.config.data.pixel_size_um

    @torch.inference_mode()
    def predict(self, he: Tensor) -> Tensor:
        """Markers (B, C, H, W) float32 in [0, 1] on the model's device, from H&E (B, 3, H, W) float in [0, 1].

        Any height and width. Runs under autocast where the model was loaded with mixed precision.
        """
        layout = memory_format(self.config.model.norm, self.device)
        he = he.to(self.device, non_blocking=True).contiguous(memory_format=layout)
        mixed = nullcontext() if self.precision is None else torch.autocast(self.device.type, self.precision)
        with mixed:
            prediction: Tensor = self.network(he)
        prediction = prediction.float()
        return prediction if self.recalibration is None else self.recalibration.apply_(prediction)


def load_trained(
    path: str | Path, device: str = "auto", use_amp: bool = False, encoder_weights: str | Path | None = None
) -> TrainedModel:
    """Load best.pt or last.pt (its averaged weights where it has them), or the best model of a run folder.

    ``device`` is auto (the first GPU, else the CPU), cpu, cuda or cuda:N. ``use_amp`` is mixed precision on a GPU:
    bfloat16 where it has it, else float16; on a CPU it does nothing. A checkpoint without the weights of its frozen
    encoder takes them from the file that its training read, or from ``encoder_weights``. Nothing in the file is
    executed. Raises InputError where the file is missing, damaged or of another kind, or the device is not there.
    """
    chosen = _device(device)
    path = Path(path)
    if path.is_dir():
        path = checkpoint.checkpoint_path(path, checkpoint.BEST)
    content = checkpoint.load(path)
    averaged = content.get("ema")
    weights = averaged["model"] if isinstance(averaged, dict) and "model" in averaged else content["model"]
    names = tuple(str(name) for name in content["channel_names"])
    normalization = Normalization.from_document(content["normalization"])
    try:
        config = TrainConfig.of_run(content["options"])
    except (TypeError, InputError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: contains no model of this version ({reason})") from None
    left_out = _left_out(content)
    if encoder_weights is not None and left_out is None:
        raise InputError(f"{path}: contains the weights of its encoder; leave out --encoder_weights")
    try:
        network = build_network(config.model, len(names))
        if left_out is not None:
            given = None if encoder_weights is None else Path(encoder_weights)
            found = weights_of_record(cast(TimmUNet, network).encoder, left_out, given)
            weights = {**{f"encoder.{name}": tensor for name, tensor in found.items()}, **weights}
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    try:
        network.load_state_dict(weights)
    except (RuntimeError, TypeError, KeyError, ValueError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: contains no model of this version ({reason})") from None
    if normalization.names != names:
        raise InputError(f"{path}: is damaged, its normalisation is of other markers than its model")
    digests, regression = _cores_and_baselines(path, content, names)
    network = network.eval().requires_grad_(False)
    network = network.to(chosen, memory_format=memory_format(config.model.norm, chosen))  # type: ignore[call-overload]
    return TrainedModel(
        path,
        network,
        names,
        normalization,
        config,
        int(content["epoch"]),
        content["split"],
        chosen,
        _precision(chosen) if use_amp else None,
        digests,
        regression,
        _earlier_digests(path, content),
        _stain(path, content),
        _recalibration(path, content, len(names)),
    )


def _cores_and_baselines(
    path: Path, content: dict[str, Any], names: tuple[str, ...]
) -> tuple[dict[str, str], ColourRegression | None]:
    """Digests by core and the colour regression of a checkpoint, ({}, None) where it has none; raises InputError."""
    try:
        digests = {str(name): str(digest) for name, digest in content.get("cores", {}).get("digests", {}).items()}
        stored = content.get("colour_regression")
        regression = None if stored is None else ColourRegression.from_document(stored)
    except AttributeError:
        raise InputError(f"{path}: is damaged, the digests of its cores cannot be read") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    if regression is not None and regression.names != names:
        raise InputError(f"{path}: is damaged, its regression from colours is of other markers than its model")
    return digests, regression


def _stain(path: Path, content: dict[str, Any]) -> StainProfile | None:
    stored = content.get("stain")
    try:
        return None if stored is None else StainProfile.from_document(stored)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _recalibration(path: Path, content: dict[str, Any], markers: int) -> Recalibration | None:
    stored = content.get("recalibration")
    try:
        return None if stored is None else Recalibration.from_document(stored, markers)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _left_out(content: dict[str, Any]) -> dict[str, Any] | None:
    """The record of the file with the encoder's weights; None where the checkpoint has them."""
    record = content.get("encoder_weights")
    return record if isinstance(record, dict) and record.get("left_out") else None


def _earlier_digests(path: Path, content: dict[str, Any]) -> tuple[str, ...]:
    earlier = content.get("cores", {}).get("earlier", [])
    if not isinstance(earlier, list):
        raise InputError(f"{path}: is damaged, the digests of the cores of its first model cannot be read")
    return tuple(str(digest) for digest in earlier)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name}: is no device; use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name}: is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: there are {torch.cuda.device_count()} GPUs here")
    return device


def _precision(device: torch.device) -> torch.dtype | None:
    if device.type != "cuda":
        return None
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def describe(model: TrainedModel) -> str:
    """The model and its device in two lines for a person."""
    kind = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "CPU"
    precision = "float32" if model.precision is None else str(model.precision).removeprefix("torch.")
    threads = f", {torch.get_num_threads()} threads" if model.device.type == "cpu" else ""
    return (
        f"model           {model.path}, epoch {model.epoch}, {len(model.names)} markers\n"
        f"device          {kind}{threads}, {precision}"
    )
