"""The network that the options ask for."""

from __future__ import annotations

from orion_unet.config import UNET, ModelOptions
from orion_unet.models.timm_unet import TimmUNet
from orion_unet.models.unet import SpatialUNet, UNet


def build_network(options: ModelOptions, out_channels: int) -> UNet:
    """The untrained network for ``out_channels`` markers; needs timm only where ``--encoder`` names one of its models.

    Raises InputError for an encoder that cannot be used.
    """
    kind = SpatialUNet if options.encoder == UNET else TimmUNet
    return kind.from_options(options, out_channels)
