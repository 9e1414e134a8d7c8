"""Applying and judging a trained model."""
