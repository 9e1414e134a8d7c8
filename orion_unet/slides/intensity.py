"""The stored value of full intensity: fixed for integer types, derived from the value range for floats."""

from __future__ import annotations

import numpy as np

WHITE = {"uint8": 255.0, "uint16": 65535.0}
# Bytes scanned at a time, so that the maximum finds them still in the cache after the minimum.
CHUNK_BYTES = 1 << 21


def value_range(array: np.ndarray) -> tuple[float, float]:
    """Minimum and maximum in one pass. NaN makes both NaN; infinities are returned as they are."""
    flat = array.reshape(-1) if array.flags.c_contiguous else array.T.reshape(-1)
    size = CHUNK_BYTES // array.itemsize
    low, high = np.inf, -np.inf
    for start in range(0, flat.size, size):
        chunk = flat[start : start + size]
        low, high = np.minimum(low, chunk.min()), np.maximum(high, chunk.max())
    return float(low), float(high)


def declared_white(high: float, modality: str) -> float:
    """Stored value of full intensity of floats whose maximum is ``high``; modality is ``he`` or ``orion``."""
    levels = (1.0, 255.0) if modality == "he" else (1.0, 255.0, 65535.0)
    return next((level for level in levels if high <= level * 1.0001), levels[-1])
