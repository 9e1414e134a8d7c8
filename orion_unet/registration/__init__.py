"""Alignment of an H&E with its markers."""
