"""Spatial U-Net that predicts multiplexed immunofluorescence from H&E."""

__version__ = "0.1.0"
