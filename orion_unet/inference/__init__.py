"""Applying a trained model: images of any size to markers, and what predict writes."""
