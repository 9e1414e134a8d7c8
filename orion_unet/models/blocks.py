"""Building blocks of the U-Net, and the Sobel gradient for boundary guidance."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORMS = ("batch", "group", "instance")
UPSAMPLINGS = ("bilinear", "transposed")
MAX_GROUPS = 8


def norm_layer(kind: str, channels: int) -> nn.Module:
    """A normalisation layer with a learnt scale and shift per channel.

    ``group`` uses the largest number of groups up to 8 that divides the channels. Raises ValueError if the kind is
    not in ``NORMS``.
    """
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "group":
        groups = max(n for n in range(1, MAX_GROUPS + 1) if channels % n == 0)
        return nn.GroupNorm(groups, channels)
    if kind == "instance":
        return nn.InstanceNorm2d(channels, affine=True)
    raise ValueError(f"norm must be one of {', '.join(NORMS)}, not {kind!r}")


class BilinearUp(nn.Conv2d):
    """A convolution, then bilinear interpolation to twice the size."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, in, H, W) to (B, out, 2H, 2W)."""
        # The convolution first: it commutes with the interpolation, and has a quarter of the pixels.
        return F.interpolate(super().forward(input), scale_factor=2, mode="bilinear")


def upsampling_layer(kind: str, in_channels: int, out_channels: int) -> nn.Module:
    """(B, in, H, W) to (B, out, 2H, 2W). Raises ValueError if the kind is not in ``UPSAMPLINGS``."""
    if kind == "transposed":
        return nn.ConvTranspose2d(in_channels, out_channels, 2, stride=2)
    if kind == "bilinear":
        return BilinearUp(in_channels, out_channels, 1)
    raise ValueError(f"upsampling must be one of {', '.join(UPSAMPLINGS)}, not {kind!r}")


class ConvBlock(nn.Sequential):
    """Two 3×3 convolutions, each with norm and ReLU: (B, in, H, W) to (B, out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, norm: str) -> None:
        # No bias: the norm that follows cancels it or adds its own.
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
            norm_layer(norm, out_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            norm_layer(norm, out_channels),
            nn.ReLU(inplace=True),
        )


class UpBlock(nn.Module):
    """Upsample by 2, concatenate the skip and convolve: (B, 2C, H, W) and (B, C, 2H, 2W) to (B, C, 2H, 2W).

    ``upsampling`` is one of UPSAMPLINGS: a transposed convolution, whose 2×2 pixels have weights of their own, or a 1×1
    convolution and bilinear interpolation, which treat all pixels alike.
    """

    def __init__(self, out_channels: int, norm: str, upsampling: str) -> None:
        super().__init__()
        self.up = upsampling_layer(upsampling, 2 * out_channels, out_channels)
        self.block = ConvBlock(2 * out_channels, out_channels, norm)

    def forward(self, deep: Tensor, skip: Tensor) -> Tensor:
        """Features at the resolution of the skip."""
        return self.block(torch.cat((skip, self.up(deep)), dim=1))


def sobel_magnitude(he: Tensor) -> Tensor:
    """Gradient magnitude of the luminance, (B, 3, H, W) in [0, 1] to (B, 1, H, W) float32 in [0, 1].

    Luminance as in ITU-R BT.601. The Sobel kernels are scaled by 1/4, so that a vertical or horizontal step from 0 to
    1 has magnitude 1; a diagonal step would have 1.06 and is clipped to 1. Edges are replicated. The result flips and
    turns with the image.
    """
    # Sums of slices instead of a convolution: always float32 (no TF32, no autocast), and added in a symmetric order, so
    # that flipped and turned images give the same result bit for bit.
    red, green, blue = he.float().split(1, dim=1)
    luminance = 0.299 * red + 0.587 * green + 0.114 * blue
    padded = F.pad(luminance, (1, 1, 1, 1), mode="replicate")
    down = (padded[..., :-2, :] + padded[..., 2:, :]) + 2 * padded[..., 1:-1, :]
    along = (padded[..., :-2] + padded[..., 2:]) + 2 * padded[..., 1:-1]
    dx = (down[..., 2:] - down[..., :-2]) / 4
    dy = (along[..., 2:, :] - along[..., :-2, :]) / 4
    squared = dx.square() + dy.square()
    # The gradient of sqrt is infinite at 0: mask flat pixels before the root as well as after it.
    edge = squared > 0
    magnitude = torch.where(edge, torch.where(edge, squared, 1.0).sqrt(), 0.0)
    return magnitude.clamp(max=1.0)
