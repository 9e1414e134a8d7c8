"""Epochs, optimisation and the wiring of a run."""
