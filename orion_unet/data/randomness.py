"""Counter-based randomness: every draw is a pure function of what it is for, never of what was drawn before."""

from __future__ import annotations

import numpy as np

# What a stream is for. A stream's numbers never move when another one draws more.
SPLIT, ORDER, SAMPLE, VALIDATION, NORMALIZATION, SCORED_PIXELS, DIGEST, REGRESSION = range(8)


def counter_rng(seed: int, purpose: int, first: int = 0, second: int = 0) -> np.random.Generator:
    """Generator of the stream (seed, purpose, first, second), e.g. (seed, SAMPLE, epoch, index).

    Philox (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011) with the identifying numbers in
    key and counter: the lowest 128 bits of the counter stay free, so streams cannot overlap.
    """
    counter = np.array([0, 0, second, first], dtype=np.uint64)
    key = np.array([seed, purpose], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(counter=counter, key=key))
