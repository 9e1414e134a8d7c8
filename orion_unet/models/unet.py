"""The spatial U-Net: from an H&E image to one intensity map per marker, pixel by pixel."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Self, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orion_unet.config import UPSAMPLING, ModelOptions
from orion_unet.models.blocks import ConvBlock, UpBlock, sobel_magnitude
from orion_unet.models.freezing import freeze, hold_frozen

T = TypeVar("T")

# Closest to 0 or 1 that the untrained output may be: beyond it the sigmoid is nearly flat and learns too slowly.
SMALLEST_START = 0.01


class UNet(nn.Module, ABC):
    """What all our U-Nets share: decoder, head, padding, a sigmoid output. An encoder comes from a subclass.

    The encoder gives a map at every level ``i`` of ``depth`` levels, of ``base_features * 2**i`` channels at 1/2**i of
    the resolution, and one at level ``depth``.
    """

    decoder: nn.ModuleList
    head: nn.Conv2d
    # Whether every pixel of a prediction depends on the whole image, however large it is.
    sees_whole_image = False

    def __init__(self, depth: int, use_boundary_guidance: bool) -> None:
        super().__init__()
        self.depth = depth
        self.use_boundary_guidance = use_boundary_guidance

    def _add_decoder(self, out_channels: int, base_features: int, norm: str, upsampling: str) -> None:
        self.decoder = nn.ModuleList(
            UpBlock(base_features * 2**level, norm, upsampling) for level in reversed(range(self.depth))
        )
        self.head = nn.Conv2d(base_features, out_channels, 1)

    @abstractmethod
    def encode(self, he: Tensor) -> tuple[list[Tensor], Tensor]:
        """Maps of the levels from full resolution down, and the deepest one, of an H&E (B, 3, H, W) in [0, 1] whose
        sides are multiples of 2**depth."""

    @property
    @abstractmethod
    def encoder_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the encoder."""

    @abstractmethod
    def freeze_encoder(self, how: str) -> None:
        """Take the encoder out of training: ``frozen`` all of it, ``last`` all but its last stage, ``full`` nothing.

        Frozen stages keep their weights and the statistics of their norms, in training mode, too.
        """

    def forward(self, he: Tensor) -> Tensor:
        """Predict (B, out_channels, H, W) float32 in [0, 1] from an H&E batch (B, 3, H, W), float in [0, 1].

        H and W may be any size from 1 up: the image is padded by replication and the prediction cropped back.
        """
        height, width = he.shape[-2:]
        skips, x = self.encode(self._padded(he.float()))
        for block, skip in zip(self.decoder, reversed(skips), strict=True):
            x = block(x, skip)
        logits = self.head(x)[..., :height, :width]
        # In float32 also under autocast: losses and metrics need finer steps than bfloat16 has.
        return torch.sigmoid(logits.float())

    def train(self, mode: bool = True) -> Self:
        """Training or evaluation mode; frozen stages stay in evaluation mode."""
        super().train(mode)
        hold_frozen(self)
        return self

    @torch.no_grad()
    def start_at(self, means: Tensor) -> None:
        """Set the bias of the head so that the untrained network predicts about ``means`` (out_channels,) in [0, 1].

        Most markers are dark almost everywhere. A sigmoid starts at a half, and hundreds of steps would be spent on
        darkening all pixels alike.
        """
        bias = cast(Tensor, self.head.bias)
        bias.copy_(torch.logit(means.to(bias), eps=SMALLEST_START))

    def _inputs(self, he: Tensor) -> Tensor:
        """What convolutions at full resolution see: (B, 3 or 4, H, W).

        The H&E is inverted, so that blank glass is near 0, like the zero padding of the convolutions. Otherwise every
        patch border would look like an edge between black and glass.
        """
        return torch.cat((1 - he, sobel_magnitude(he)), dim=1) if self.use_boundary_guidance else 1 - he

    def _padded(self, he: Tensor) -> Tensor:
        """Pad right and bottom to a multiple of 2**depth."""
        multiple = 2**self.depth
        height, width = (-(-side // multiple) * multiple for side in he.shape[-2:])
        if height == width == multiple:
            # A bottleneck of one pixel fails: instance norm raises, batch norm raises for a batch of one, and group
            # norm with one channel per group sets it to 0.
            height = width = 2 * multiple
        right, bottom = width - he.shape[-1], height - he.shape[-2]
        return F.pad(he, (0, right, 0, bottom), mode="replicate") if right or bottom else he


class SpatialUNet(UNet):
    """U-Net after Ronneberger et al. (MICCAI 2015), with norm layers, padded convolutions and a sigmoid output.

    Level ``i`` of ``depth`` levels has ``base_features * 2**i`` feature maps, the bottleneck
    ``base_features * 2**depth``. ``dropout`` drops whole feature maps of the bottleneck in training.
    ``use_boundary_guidance`` adds the Sobel magnitude of the H&E as a fourth input channel.

    Raises ValueError for an unknown ``norm`` or ``upsampling``.
    """

    def __init__(
        self,
        out_channels: int,
        base_features: int = 32,
        depth: int = 4,
        norm: str = "batch",
        dropout: float = 0.0,
        use_boundary_guidance: bool = False,
        upsampling: str = UPSAMPLING,
    ) -> None:
        super().__init__(depth, use_boundary_guidance)
        widths = [base_features * 2**level for level in range(depth)]
        inputs = [4 if use_boundary_guidance else 3, *widths[:-1]]
        self.encoder = nn.ModuleList(
            ConvBlock(before, width, norm) for before, width in zip(inputs, widths, strict=True)
        )
        self.pool = nn.MaxPool2d(2)
        self.bottleneck = nn.Sequential(ConvBlock(widths[-1], 2 * widths[-1], norm), nn.Dropout2d(dropout))
        self._add_decoder(out_channels, base_features, norm, upsampling)
        self.apply(initialise)

    @classmethod
    def from_options(cls, options: ModelOptions, out_channels: int) -> Self:
        """Build the model from its options, for ``out_channels`` markers."""
        return cls(
            out_channels,
            base_features=options.base_features,
            depth=options.depth,
            norm=options.norm,
            dropout=options.dropout,
            use_boundary_guidance=options.use_boundary_guidance,
            upsampling=options.upsampling or UPSAMPLING,
        )

    def encode(self, he: Tensor) -> tuple[list[Tensor], Tensor]:
        """Maps of the levels from full resolution down, and the bottleneck."""
        x = self._inputs(he)
        skips = []
        for block in self.encoder:
            x = block(x)
            skips.append(x)
            x = self.pool(x)
        return skips, self.bottleneck(x)

    @property
    def encoder_stages(self) -> list[nn.Module]:
        """The encoder from full resolution down, the bottleneck last, without its dropout."""
        return [*self.encoder, self.bottleneck[0]]

    @property
    def encoder_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the encoder and the bottleneck."""
        return (parameter for stage in self.encoder_stages for parameter in stage.parameters())

    def freeze_encoder(self, how: str) -> None:
        """Take the encoder out of training, see the base class; the last stage is the bottleneck."""
        for stage in frozen_stages(self.encoder_stages, how):
            freeze(stage)


def frozen_stages(stages: Sequence[T], how: str) -> Sequence[T]:
    """Those of the encoder's stages that ``--encoder_train`` takes out of training."""
    return {"full": stages[:0], "last": stages[:-1], "frozen": stages}[how]


def memory_format(norm: str, device: torch.device) -> torch.memory_format:
    """Memory format in which the network runs fastest: channels last, except with instance norm on a CPU.

    GPUs need it for their tensor cores. On CPUs convolutions, norms and pools are a tenth to a third faster, but
    instance norm is slower by about as much.
    """
    contiguous = {"cpu": ("instance",)}.get(device.type, ("group", "instance"))
    return torch.contiguous_format if norm in contiguous else torch.channels_last


def initialise(module: nn.Module) -> None:
    """Kaiming-normal weights (He et al., ICCV 2015), zero biases; norms keep scale 1 and shift 0."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        # fan_in keeps the variance of the activations constant over the layers. For a 2×2 transposed convolution that
        # halves the channels, torch counts twice the true fan-in; that is the right gain here, as no ReLU follows.
        nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def parameter_count(model: nn.Module, trainable: bool = True) -> int:
    """Number of parameters of a model that train, or with ``trainable`` False of those that are frozen."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad == trainable)
