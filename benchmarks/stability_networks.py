"""Networks that the stability benchmark trains instead of ours: those of peers, and ours with a coarse view beside."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orion_unet.models import blocks, unet


def padded(he: Tensor, depth: int) -> Tensor:
    """The image (B, 3, H, W), padded right and bottom to sides that are multiples of 2**depth."""
    right, bottom = (-side % 2**depth for side in (he.shape[3], he.shape[2]))
    return F.pad(he.float(), (0, right, 0, bottom), mode="replicate")


class BasicUNet(nn.Module):
    """MONAI's network at our width, used as it comes: linear output, no sigmoid."""

    # Its instance norm takes its statistics from the whole tile.
    sees_whole_image = True

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        from monai.networks.nets import BasicUNet as Monai

        widths = [width * 2**level for level in range(5)]
        self.network = Monai(spatial_dims=2, in_channels=3, out_channels=channels, features=(*widths, width))
        self.depth = 4

    def forward(self, he: Tensor) -> Tensor:
        found: Tensor = self.network(padded(he, self.depth))
        return found.float()[..., : he.shape[2], : he.shape[3]]

    @torch.no_grad()
    def start_at(self, means: Tensor) -> None:
        """Start at each marker's mean, as our network does; there is no sigmoid."""
        self.network.final_conv.bias.copy_(means)


class DynUNet(BasicUNet):
    """MONAI's DynUNet, which is nnU-Net's network, at our width, used as it comes: linear output, no sigmoid."""

    def __init__(self, channels: int, width: int) -> None:
        nn.Module.__init__(self)
        from monai.networks.nets import DynUNet as Monai

        self.depth = 4
        levels = self.depth + 1
        self.network = Monai(
            spatial_dims=2, in_channels=3, out_channels=channels, kernel_size=[3] * levels,
            strides=[1] + [2] * self.depth, upsample_kernel_size=[2] * self.depth,
            filters=[width * 2**level for level in range(levels)],
        )  # fmt: skip

    @torch.no_grad()
    def start_at(self, means: Tensor) -> None:
        """Start at each marker's mean, as our network does; there is no sigmoid."""
        self.network.output_block.conv.conv.bias.copy_(means)


class Pix2Pix(nn.Module):
    """The generator of pix2pix (Isola et al., CVPR 2017) at our width, for patches of at least 64 pixels.

    Six convolutions of stride 2 and six transposed ones with skips, batch norm, dropout 0.5 in the three deepest. Its
    tanh output, in [-1, 1], is rescaled to [0, 1].
    """

    depth = 6
    sees_whole_image = False

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        widths = [min(width * 2**level, 8 * width) for level in range(self.depth)]
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, (before, after) in enumerate(pairwise([3, *widths])):
            inner = 0 < level < self.depth - 1
            self.down.append(nn.Sequential(
                nn.LeakyReLU(0.2) if level else nn.Identity(), nn.Conv2d(before, after, 4, 2, 1, bias=not inner),
                nn.BatchNorm2d(after) if inner else nn.Identity(),
            ))  # fmt: skip
        for level in reversed(range(self.depth)):
            before = widths[level] * (1 if level == self.depth - 1 else 2)
            after = widths[level - 1] if level else channels
            self.up.append(nn.Sequential(
                nn.ReLU(), nn.ConvTranspose2d(before, after, 4, 2, 1, bias=not level),
                nn.BatchNorm2d(after) if level else nn.Tanh(),
                nn.Dropout(0.5) if self.depth - 3 <= level else nn.Identity(),
            ))  # fmt: skip

    def forward(self, he: Tensor) -> Tensor:
        x = 2 * padded(he, self.depth) - 1
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
        x = self.up[0](skips.pop())
        for block in self.up[1:]:
            x = block(torch.cat((x, skips.pop()), dim=1))
        found: Tensor = (x.float() + 1) / 2
        return found[..., : he.shape[2], : he.shape[3]]


class CoarseView(unet.SpatialUNet):
    """Our network, which also sees the tissue around a patch at half the resolution.

    Training patches are read twice as wide as their target is: the usual encoder sees the middle half, a second one of
    the same size the whole patch, each pixel a mean of four. Both meet at the bottleneck.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        widths = [stage[0].out_channels for stage in self.encoder_stages]
        blocks_of = zip([4 if self.use_boundary_guidance else 3, *widths[:-1]], widths, strict=True)
        self.coarse = nn.ModuleList(blocks.ConvBlock(before, width, options["norm"]) for before, width in blocks_of)
        self.merge = nn.Conv2d(2 * widths[-1], widths[-1], 1)
        self.apply(unet.initialise)

    def forward(self, he: Tensor) -> Tensor:
        seen = padded(he, self.depth + 1)
        margin = he.shape[-1] // 4 if self.training else 0
        middle = seen[..., margin : seen.shape[-2] - margin, margin : seen.shape[-1] - margin]
        skips, x = self.encode(middle)
        wide = self._inputs(F.avg_pool2d(seen, 2))
        for level, block in enumerate(self.coarse):
            wide = block(self.pool(wide) if level else wide)
        wide = F.interpolate(wide, scale_factor=2.0, mode="bilinear", align_corners=False)
        edge = margin // 2**self.depth
        wide = wide[..., edge : wide.shape[-2] - edge, edge : wide.shape[-1] - edge]
        x = self.merge(torch.cat((x, wide), dim=1))
        for up, skip in zip(self.decoder, reversed(skips), strict=True):
            x = up(x, skip)
        found: Tensor = torch.sigmoid(self.head(x).float())
        return found if self.training else found[..., : he.shape[-2], : he.shape[-1]]
