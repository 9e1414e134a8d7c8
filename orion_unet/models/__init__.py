"""The spatial U-Net."""
