"""A U-Net with an encoder from timm. The decoder, and a stem at full resolution, are those of the spatial U-Net."""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orion_unet.config import TIMM, UPSAMPLING, ModelOptions, channel_values
from orion_unet.errors import InputError
from orion_unet.extras import needed
from orion_unet.models.blocks import ConvBlock, norm_layer
from orion_unet.models.freezing import freeze
from orion_unet.models.unet import UNet, initialise

# A last stage with more than this share of an encoder's weights is all of it but a stem: its own last block counts.
NEARLY_ALL = 0.95
# Some encoders take images of one size unless asked for any; which keyword asks differs from family to family.
ANY_SIZE: tuple[dict[str, Any], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})


def _timm() -> Any:
    try:
        return needed("timm", extra="encoders")
    except RuntimeError as error:
        # torchvision, which timm imports, was built for another torch.
        reason = str(error).splitlines()[0]
        raise InputError(
            f"timm cannot be imported ({reason}); install the torchvision that belongs to torch {torch.__version__}"
        ) from None


def create_encoder(name: str) -> nn.Module:
    """The timm model NAME or NAME.TAG with random weights, giving its maps; nothing is downloaded.

    Arguments of the model may follow: NAME,depth=24,reg_tokens=8. Raises InputError for a name timm does not know,
    naming the nearest, for arguments that the model does not take, and for a model without maps.
    """
    timm = _timm()
    model, arguments = _arguments(name, timm)
    base, _, tag = model.partition(".")
    known = timm.list_models()
    if base not in known:
        near = difflib.get_close_matches(base, known, n=3)
        hint = f"the nearest names are {', '.join(near)}" if near else "timm.list_models() lists the names"
        raise InputError(f"--encoder {TIMM}{name}: timm {timm.__version__} has no model of that name; {hint}")
    tagged = timm.list_pretrained(f"{base}.*")
    if tag and model not in tagged:
        there = ", ".join(f"{TIMM}{found}" for found in tagged[:5]) or f"{TIMM}{base} alone"
        raise InputError(f"--encoder {TIMM}{name}: there is no such variant; there is {there}")
    reason = ""
    for options in ANY_SIZE:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made = timm.create_model(model, pretrained=False, features_only=True, **{**options, **arguments})
                return cast(nn.Module, made)
        except Exception as error:
            # Models without maps raise one of several exceptions, and a TypeError for a keyword they do not know.
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            if not isinstance(error, TypeError):
                break
    problem = "gives no feature maps, or none with these arguments" if arguments else "gives no feature maps"
    raise InputError(f"--encoder {TIMM}{name}: {problem} ({reason})")


def _arguments(name: str, timm: Any) -> tuple[str, dict[str, Any]]:
    """The name of a model, and the arguments that follow it, separated by commas."""
    model, *words = name.split(",")
    # Those of create_model itself would read weights from elsewhere.
    reserved = {*inspect.signature(timm.create_model).parameters, "features_only"}
    arguments: dict[str, Any] = {}
    for word in words:
        key, _, text = word.partition("=")
        if not key.isidentifier() or not text or key in reserved:
            raise InputError(
                f"--encoder {TIMM}{name}: {word!r} is no argument of a model; write {TIMM}NAME,ARGUMENT=VALUE"
            )
        try:
            arguments[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            arguments[key] = getattr(timm.layers, text, text) if key == "mlp_layer" else text
    return model, arguments


def _colours(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of red, green and blue that the published weights of a model expect."""
    config = importlib.import_module("timm.models").get_pretrained_cfg(name.partition(",")[0])
    if config is None:
        data = importlib.import_module("timm.data")
        return data.IMAGENET_DEFAULT_MEAN, data.IMAGENET_DEFAULT_STD
    return tuple(config.mean), tuple(config.std)


class Standardise(nn.Module):
    """Colours (B, 3, H, W) minus a mean, over a standard deviation. Never trained, and stored with the weights."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))
        freeze(self)

    def forward(self, he: Tensor) -> Tensor:
        """Standardised colours."""
        return (he - self.mean) / self.std


class Projection(nn.Sequential):
    """A 1×1 convolution to the decoder's width, with norm and ReLU: (B, in, H, W) to (B, out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, norm: str) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 1, bias=False), norm_layer(norm, out_channels), nn.ReLU(inplace=True)
        )


class TimmUNet(UNet):
    """A timm encoder, projected to the widths of our decoder, beside a stem of ours.

    The stem covers full resolution and every level above the encoder's first map, so that detail does not depend on
    the encoder's stride. The encoder sees the H&E standardised by ``mean`` and ``std`` (timm's for that model where
    None), the stem sees it as the spatial U-Net does. ``depth`` follows from the encoder's largest stride.

    ``strides`` are those of the encoder's first map: in the encoder's own pixels, and in pixels of the H&E, where it is
    rounded up to a power of 2. If they differ (14 and 16), the encoder sees the H&E at 14/16 of its size, so that its
    map fits the decoder.

    Raises InputError where the encoder is unknown or its strides do not double.
    """

    def __init__(
        self,
        out_channels: int,
        name: str,
        base_features: int = 32,
        norm: str = "batch",
        dropout: float = 0.0,
        use_boundary_guidance: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        upsampling: str = UPSAMPLING,
    ) -> None:
        encoder = create_encoder(name)
        own_mean, own_std = _colours(name)
        own_stride, maps = _try_out(encoder, name)
        levels = [level for level, *_ in maps]
        super().__init__(levels[-1], use_boundary_guidance)
        self.strides = own_stride, 2 ** levels[0]
        # Maps at a single resolution are those of a plain vision transformer.
        self.sees_whole_image = len(levels) == 1
        self.chosen = [index for _, index, _, _ in maps]
        self.channels_last_maps = maps[0][3]
        widths = [base_features * 2**level for level in range(self.depth + 1)]
        inputs = [4 if use_boundary_guidance else 3, *widths]
        self.stem = nn.ModuleList(ConvBlock(inputs[level], widths[level], norm) for level in range(levels[0]))
        self.pool = nn.MaxPool2d(2)
        projections = [Projection(channels, widths[level], norm) for level, _, channels, _ in maps]
        self.project = nn.ModuleList(projections[:-1])
        self.bottleneck = nn.Sequential(projections[-1], nn.Dropout2d(dropout))
        self._add_decoder(out_channels, base_features, norm, upsampling)
        self.apply(initialise)
        # Only now: the encoder keeps timm's own initialisation.
        self.standardise = Standardise(mean or own_mean, std or own_std)
        self.encoder = encoder

    @classmethod
    def from_options(cls, options: ModelOptions, out_channels: int) -> Self:
        """Build the model from its options, for ``out_channels`` markers. Raises InputError."""
        return cls(
            out_channels,
            options.encoder.removeprefix(TIMM),
            base_features=options.base_features,
            norm=options.norm,
            dropout=options.dropout,
            use_boundary_guidance=options.use_boundary_guidance,
            mean=channel_values(options.encoder_mean),
            std=channel_values(options.encoder_std),
            upsampling=options.upsampling or UPSAMPLING,
        )

    def encode(self, he: Tensor) -> tuple[list[Tensor], Tensor]:
        """Maps of the stem, then of the encoder, from full resolution down, and the deepest one."""
        x = self._inputs(he)
        skips = []
        for level, block in enumerate(self.stem):
            x = block(self.pool(x) if level else x)
            skips.append(x)
        found = self.encoder(self.standardise(self._resampled(he)))
        maps = [found[index] for index in self.chosen]
        if self.channels_last_maps:
            maps = [each.permute(0, 3, 1, 2) for each in maps]
        skips += [project(each) for project, each in zip(self.project, maps[:-1], strict=True)]
        return skips, self.bottleneck(maps[-1])

    def _resampled(self, he: Tensor) -> Tensor:
        """The H&E at the size at which the encoder sees it; its sides are multiples of 2**depth."""
        own, stride = self.strides
        if own == stride:
            return he
        size = [side * own // stride for side in he.shape[-2:]]
        return F.interpolate(he, size, mode="bilinear", antialias=True)

    @property
    def encoder_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the timm encoder."""
        return self.encoder.parameters()

    def freeze_encoder(self, how: str) -> None:
        """Take the timm encoder out of training, see the base class. Stem and projections go on."""
        if how == "frozen":
            freeze(self.encoder)
        elif how == "last":
            freeze(self.encoder, but=last_stage(self.encoder))


def _try_out(encoder: nn.Module, name: str) -> tuple[int, list[tuple[int, int, int, bool]]]:
    """The encoder's first stride; and level, index, channels and channels-last of the maps to use.

    They are found by sending an image through the encoder. Of several maps at one resolution the last counts.
    Parameters that reach no map that is used, such as those of a last norm, stop requiring a gradient: ranks would wait
    for it. Raises InputError.
    """
    reductions = list(encoder.feature_info.reduction())  # type: ignore[operator, union-attr]
    channels = list(encoder.feature_info.channels())  # type: ignore[operator, union-attr]
    last = {reduction: index for index, reduction in enumerate(reductions)}
    strides = sorted(last)
    if strides[0] < 2 or strides != [strides[0] << step for step in range(len(strides))]:
        raise InputError(
            f"--encoder {TIMM}{name}: its maps are at strides {', '.join(map(str, strides))}; the decoder needs a "
            "first stride above 1, and then each the double of the one before"
        )
    side = 2 * max(32 // strides[-1], 1) * strides[-1]
    encoder.eval()
    try:
        found = encoder(torch.zeros(1, 3, side, side))
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"--encoder {TIMM}{name}: cannot take images of any size ({reason})") from None
    maps = []
    for level, stride in enumerate(strides, start=(strides[0] - 1).bit_length()):
        index = last[stride]
        shape, wanted = tuple(found[index].shape[1:]), (channels[index], side // stride, side // stride)
        if shape not in (wanted, (*wanted[1:], wanted[0])):
            raise InputError(f"--encoder {TIMM}{name}: a map has the shape {shape} where {wanted} was announced")
        maps.append((level, index, channels[index], shape != wanted))
    torch.stack([found[index].sum() for _, index, _, _ in maps]).sum().backward()
    for parameter in encoder.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None
    encoder.train()
    return strides[0], maps


def last_stage(encoder: nn.Module) -> nn.Module:
    """The last part of an encoder with weights that can train, smaller than nearly all of it."""
    whole = _size(encoder)
    stage = encoder
    while _size(stage) > NEARLY_ALL * whole and (parts := [part for part in stage.children() if _size(part)]):
        stage = parts[-1]
    return stage


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
