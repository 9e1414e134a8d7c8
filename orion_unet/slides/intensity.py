"""The stored value that means full intensity: fixed by an integer type, declared by the range of floats."""

from __future__ import annotations

import numpy as np

WHITE = {"uint8": 255.0, "uint16": 65535.0}
# Bytes scanned at a time: few enough to stay in the cache between minimum and maximum.
CHUNK_BYTES = 1 << 21


def value_range(array: np.ndarray) -> tuple[float, float]:
    """Minimum and maximum in one pass; NaN and infinity come through in either."""
    flat = array.reshape(-1) if array.flags.c_contiguous else array.T.reshape(-1)
    size = CHUNK_BYTES // array.itemsize
    low, high = np.inf, -np.inf
    for start in range(0, flat.size, size):
        chunk = flat[start : start + size]
        low, high = np.minimum(low, chunk.min()), np.maximum(high, chunk.max())
    return float(low), float(high)


def declared_white(high: float, modality: str) -> float:
    """Stored value of full intensity that floats up to ``high`` declare; modality is ``he`` or ``orion``."""
    levels = (1.0, 255.0) if modality == "he" else (1.0, 255.0, 65535.0)
    return next((level for level in levels if high <= level * 1.0001), levels[-1])
