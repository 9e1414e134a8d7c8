"""The cells of an image as a label image that is read by region, numbered 1 to n."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from orion_unet.errors import InputError
from orion_unet.slides.markers import MarkerImage

# Pixels of a band of rows. It has at most BAND_ROWS, as many as a tile of the OME-TIFF that predict writes: fewer
# would decode a tile twice.
BAND_PIXELS, BAND_ROWS, LEAST_ROWS = 1 << 24, 512, 32
# Up to this label, labels are found and renumbered by a table, which is faster than sorting them.
LARGEST_IN_TABLE = 1 << 26


def bands(shape: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """First row and number of rows of every band of an image (H, W)."""
    height, width = shape
    rows = max(LEAST_ROWS, min(BAND_ROWS, BAND_PIXELS // width // LEAST_ROWS * LEAST_ROWS))
    for top in range(0, height, rows):
        yield top, min(rows, height - top)


class CellLabels:
    """Labels (H, W) of any integers, 0 outside of cells, read as int32 numbers 1 to n in the order of the labels.

    ``source`` says in words where the cells come from, ``numbers`` (n,) are the labels in the file. Raises InputError
    where the file is damaged or has negative labels.
    """

    def __init__(self, image: MarkerImage, source: str) -> None:
        self.image, self.source = image, source
        self.shape = (image.shape[1], image.shape[2])
        self.numbers = self._find()
        self.count = len(self.numbers)
        self._largest = largest = int(self.numbers[-1]) if self.count else 0
        self._table: np.ndarray | None = None
        if largest != self.count and largest <= LARGEST_IN_TABLE:
            self._table = np.zeros(largest + 1, np.int32)
            self._table[self.numbers] = np.arange(1, self.count + 1)

    def _find(self) -> np.ndarray:
        seen = np.zeros(1, bool)
        large: list[np.ndarray] = []
        for top, rows in bands(self.shape):
            band = self.image.read([0], top, 0, rows, self.shape[1])[0]
            if band.dtype.kind == "i" and band.min() < 0:
                raise InputError(f"{self.image.path}: holds negative labels; 0 is outside of cells")
            highest = int(band.max())
            if highest > LARGEST_IN_TABLE:
                found = np.unique(band)
                large.append(found[found > LARGEST_IN_TABLE])
                band = found[found <= LARGEST_IN_TABLE]
                highest = int(band.max(initial=0))
            if highest >= len(seen):
                seen = np.append(seen, np.zeros(highest + 1 - len(seen), bool))
            seen[band] = True
        seen[0] = False
        numbers = np.flatnonzero(seen)
        if large:
            numbers = np.concatenate([numbers.astype(large[0].dtype), np.unique(np.concatenate(large))])
        return numbers

    def read(self, top: int, rows: int) -> np.ndarray:
        """Rows (rows, W) int32, numbered 1 to n, 0 outside; raises InputError where the file is damaged."""
        band = self.image.read([0], top, 0, rows, self.shape[1])[0]
        if self._table is not None:
            return self._table[band]
        if self._largest == self.count:
            return band.astype(np.int32, copy=False)
        found = np.searchsorted(self.numbers, band) + 1
        return np.where(band == 0, 0, found).astype(np.int32)
