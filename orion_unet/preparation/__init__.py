"""Pairs that can be trusted, from what a scanner and an alignment program leave."""
