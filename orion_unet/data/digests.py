"""A core is known by its tissue: a digest of the H&E that survives another file name, layout, byte order or folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from orion_unet.data.measured import reading_threads
from orion_unet.data.pairs import PairTable
from orion_unet.data.randomness import DIGEST, counter_rng
from orion_unet.slides.tiles import TiledArray

# Pixels are compared at fixed random places, in pieces of a row: enough for two images of tissue to differ, and so
# few that a core on a disk costs a hundred reads at most.
PIECES, PIECE_PIXELS = 96, 16
SEED = 0
# Hexadecimal digits of a digest: 80 bits, in which a million cores do not collide.
DIGITS = 20


def core_digests(table: PairTable, cores: Iterable[int]) -> dict[str, str]:
    """Digest of the H&E of each of the cores, by the core's name.

    Depends on height, width and the stored numbers at fixed places, not on axis order, byte order or dtype, and not
    on the ORION file. About a millisecond a core where the file is in memory. Raises InputError where a file has gone.
    """
    cores = list(cores)
    with ThreadPoolExecutor(max_workers=reading_threads(table.folder)) as pool:
        found = pool.map(lambda core: _digest(table, core), cores)
        return {str(table.names[core]): digest for core, digest in zip(cores, found, strict=True)}


def _digest(table: PairTable, core: int) -> str:
    height, width, _ = table.shape(core, "he")
    length = min(PIECE_PIXELS, width)
    corners = counter_rng(SEED, DIGEST, height, width).random((2, PIECES, 1)) * [[[height]], [[width - length + 1]]]
    rows, columns = corners.astype(int)
    columns = columns + np.arange(length)
    image = table.image(core, "he")
    if isinstance(image, TiledArray):
        pieces = np.stack(
            [image.read(y, x, 1, length)[0] for y, x in zip(rows[:, 0].tolist(), columns[:, 0].tolist(), strict=True)]
        )
    else:
        pieces = np.asarray(image)[rows, columns]
    digest = hashlib.sha256(f"{height} x {width}".encode())
    digest.update(np.ascontiguousarray(pieces, "<f8").tobytes())
    return digest.hexdigest()[:DIGITS]
