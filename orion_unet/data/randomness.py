"""Counter-based random numbers: every draw depends only on its purpose and index, never on earlier draws."""

from __future__ import annotations

import numpy as np

# Purposes of streams. Drawing more numbers from one stream never changes another. 6 was the bootstrap of version 0.1.
SPLIT, ORDER, SAMPLE, VALIDATION, NORMALIZATION, SCORED_PIXELS = range(6)
REGRESSION, DIGEST, STAIN, RECALIBRATION = 7, 8, 9, 10


def counter_rng(seed: int, purpose: int, first: int = 0, second: int = 0) -> np.random.Generator:
    """Generator of the stream (seed, purpose, first, second), e.g. (seed, SAMPLE, epoch, index).

    Philox (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011) with these four numbers in key and
    counter. The lowest 128 bits of the counter are left for drawing, so streams cannot overlap.
    """
    counter = np.array([0, 0, second, first], dtype=np.uint64)
    key = np.array([seed, purpose], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(counter=counter, key=key))
