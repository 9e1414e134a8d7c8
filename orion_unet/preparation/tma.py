"""The cores of a tissue microarray: discs on a lattice, named by row and column, missing ones listed."""

from __future__ import annotations

import numpy as np

from orion_unet.errors import InputError
from orion_unet.preparation.regions import Region

# A disc's area lies between these multiples of the median disc's; torn and folded cores are smaller.
SMALLEST, LARGEST = 0.25, 2.5
LEAST_CORES = 3
# A core is cut out with this margin, as a share of its diameter.
MARGIN = 0.05


def find_cores(tissue: np.ndarray, factor: float, shape: tuple[int, int], name: str) -> tuple[list[Region], list[str]]:
    """Cores of a map of tissue (h, w), as regions of the marker image (H, W) whose pixels are ``factor`` times smaller.

    Returns the regions, named NAME_A01 and so on by row and column, and the names of places without a core. Raises
    InputError where the tissue shows no lattice of discs.
    """
    from scipy import ndimage

    labels, count = ndimage.label(ndimage.binary_fill_holes(tissue))
    sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    if not count:
        raise InputError(f"slide {name}: shows no cores of a microarray")
    # Pieces torn off must not set the scale.
    typical = float(np.median(sizes[sizes >= 0.2 * np.sort(sizes)[-max(1, count // 4)]]))
    kept = np.flatnonzero((sizes >= SMALLEST * typical) & (sizes <= LARGEST * typical)) + 1
    if len(kept) < LEAST_CORES:
        raise InputError(
            f"slide {name}: {len(kept)} discs of one size found, no lattice of at least {LEAST_CORES}; use --regions "
            "tissue for a section"
        )
    centres = np.array(ndimage.center_of_mass(tissue, labels, kept))
    diameter = 2 * np.sqrt(typical / np.pi)
    centres = centres @ _upright(centres).T
    rows, columns = (_lines(centres[:, axis], diameter) for axis in (0, 1))
    found: dict[tuple[int, int], int] = {}
    for index, place in enumerate(zip(rows, columns, strict=True)):
        # Of two pieces in one place, the larger one is the core.
        if place not in found or sizes[kept[index] - 1] > sizes[kept[found[place]] - 1]:
            found[place] = index
    boxes = ndimage.find_objects(labels)
    regions = []
    for place in sorted(found):
        box = boxes[kept[found[place]] - 1]
        regions.append(_region(f"{name}_{_label(*place)}", box, tissue, factor, shape, diameter))
    everywhere = [(row, column) for row in range(max(rows) + 1) for column in range(max(columns) + 1)]
    return regions, [_label(*place) for place in everywhere if place not in found]


def _label(row: int, column: int) -> str:
    letters = chr(ord("A") + row % 26)
    return f"{letters if row < 26 else chr(ord('A') + row // 26 - 1) + letters}{column + 1:02d}"


def _upright(centres: np.ndarray) -> np.ndarray:
    """The rotation (2, 2) that turns the lattice upright, from the directions to nearest neighbours."""
    vectors = centres[None] - centres[:, None]
    distances = np.linalg.norm(vectors, axis=-1)
    np.fill_diagonal(distances, np.inf)
    nearest = vectors[np.arange(len(centres)), distances.argmin(1)]
    # Modulo a quarter turn: the mean of the angles four times as large.
    angles = np.arctan2(nearest[:, 0], nearest[:, 1])
    turn = np.angle(np.exp(4j * angles).mean()) / 4
    cosine, sine = np.cos(turn), np.sin(turn)
    return np.array([[cosine, -sine], [sine, cosine]])


def _lines(places: np.ndarray, diameter: float) -> list[int]:
    """Number of the row (or column) of every core, from 0; rows without any core count where there is room for them."""
    order = np.argsort(places)
    groups: list[list[int]] = [[int(order[0])]]
    for index in order[1:]:
        if places[index] - np.mean(places[groups[-1]]) > diameter / 2:
            groups.append([])
        groups[-1].append(int(index))
    middles = np.array([places[group].mean() for group in groups])
    pitch = float(np.median(np.diff(middles))) if len(middles) > 1 else diameter
    numbers = np.rint((middles - middles[0]) / pitch).astype(int)
    # Uneven lines must not fall on one number.
    numbers = np.maximum.accumulate(np.maximum(numbers, np.arange(len(numbers))))
    lines = [0] * len(places)
    for number, group in zip(numbers, groups, strict=True):
        for index in group:
            lines[index] = int(number)
    return lines


def _region(
    core: str, box: tuple[slice, slice], tissue: np.ndarray, factor: float, shape: tuple[int, int], diameter: float
) -> Region:
    margin = MARGIN * diameter
    low = [max(0, int((part.start - margin) * factor)) for part in box]
    high = [min(side, int(np.ceil((part.stop + margin) * factor))) for part, side in zip(box, shape, strict=True)]
    share = float(tissue[box].sum() / ((high[0] - low[0]) * (high[1] - low[1]) / factor**2))
    return Region(core, low[0], low[1], high[0] - low[0], high[1] - low[1], min(share, 1.0))
