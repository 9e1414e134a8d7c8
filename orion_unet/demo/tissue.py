"""The anatomy of one generated tissue core: positions of glands, vessels, follicles, fibres and cells.

This module is geometry only; ``stains.py`` renders the stains and the markers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from orion_unet.demo import shapes
from orion_unet.demo.shapes import FAR, Cells, Floats, Ints, Outline, grow, noise, pick, scatter, soft


@dataclass(frozen=True)
class Habit:
    """Composition that the cores of one patient share."""

    glands: float
    """share of the tissue that is glands"""
    solid: float
    """fraction of the glands that are nests without a lumen"""
    goblets: float
    """fraction of the epithelial cells with a drop of mucin"""
    crowding: float
    """density of the second row of epithelial nuclei, in [0, 1]"""
    inflammation: float
    """density of lymphocytes, about 1"""

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Habit:
        """A random patient."""
        return cls(
            glands=rng.uniform(0.28, 0.42),
            solid=rng.uniform(0.0, 0.5),
            goblets=rng.uniform(0.0, 0.4),
            crowding=rng.uniform(0.3, 0.9),
            inflammation=rng.uniform(0.6, 1.5),
        )


@dataclass(frozen=True)
class Ground:
    """The maps of one core without its cells, (S, S) each. Masks are soft, in [0, 1]; depths are signed pixels."""

    present: Floats
    """tissue, as opposed to glass and tears"""
    epithelium: Floats
    lumen: Floats
    gland_depth: Floats
    """distance to the nearest gland's outline, negative inside"""
    gland_band: Floats
    """thickness of that gland's epithelium, FAR in a solid nest"""
    wall: Floats
    """smooth muscle of vessels"""
    vessel_depth: Floats
    follicle_depth: Floats
    mantle: Floats
    """thickness of the nearest follicle's mantle, which surrounds its germinal centre"""
    stroma: Floats
    angle: Floats
    """direction of the fibres, radians"""
    fibres: Floats
    """collagen and muscle bundles, in [0, 1]"""


@dataclass(frozen=True)
class Tissue(Ground):
    """The maps of one core with its cells."""

    cells: Cells
    depth: Floats
    """distance to the nearest nucleus's outline, negative inside"""
    owner: Ints
    """row of the cell at each pixel, -1 for none"""
    erythrocytes: Floats
    """distance to the nearest erythrocyte's outline, negative inside"""
    goblets: Floats
    """mucin in epithelial cells"""
    nucleoli: Floats


def _outline(rng: np.random.Generator, radius: float, roughness: float, stretch: float, band: float) -> Outline:
    orders = np.arange(2, 8)
    return Outline(
        y=0.0,
        x=0.0,
        radius=radius,
        stretch=rng.uniform(1, stretch),
        angle=rng.uniform(0, np.pi),
        waves=(roughness * rng.standard_normal(6) / orders).astype(np.float32),
        phases=rng.uniform(0, 2 * np.pi, 6).astype(np.float32),
        band=band,
    )


def _plan(rng: np.random.Generator, size: int, radius: float, habit: Habit) -> dict[str, list[Outline]]:
    """Follicles, glands, vessels and capillaries, placed so that they do not touch."""
    area = np.pi * radius**2
    wanted: list[tuple[str, Outline]] = []
    for _ in range(round(area / 90_000 * habit.inflammation + rng.uniform(0, 0.7))):
        follicle = min(rng.uniform(28, 44), 0.3 * radius)
        wanted.append(("follicles", _outline(rng, follicle, 0.12, 1.4, 0.5 * follicle if follicle > 32 else FAR)))
    covered = 0.0
    while covered < habit.glands * area:
        gland = _outline(rng, min(rng.uniform(26, 54), 0.4 * radius), 0.22, 1.7, rng.uniform(21, 27))
        if rng.random() < habit.solid:
            gland = _outline(rng, 0.75 * gland.radius, 0.32, 1.9, FAR)
        wanted.append(("glands", gland))
        covered += np.pi * gland.radius**2
    for _ in range(round(area / 45_000 + rng.uniform(0, 1))):
        wanted.append(("vessels", _outline(rng, rng.uniform(7, 15), 0.12, 2.0, rng.uniform(5, 9))))
    for _ in range(round(area / 11_000)):
        wanted.append(("capillaries", _outline(rng, rng.uniform(3, 4.5), 0.1, 2.6, 0)))

    plan: dict[str, list[Outline]] = {"follicles": [], "glands": [], "vessels": [], "capillaries": []}
    taken = np.empty((0, 3))
    for name, shape in wanted:
        room = shape.radius * shape.stretch**0.5 + (shape.band if name == "vessels" else 0) + 5
        for _ in range(60):
            distance, turn = (radius - 0.6 * room) * rng.random() ** 0.5, rng.uniform(0, 2 * np.pi)
            y, x = size / 2 + distance * np.sin(turn), size / 2 + distance * np.cos(turn)
            if (np.hypot(taken[:, 0] - y, taken[:, 1] - x) > taken[:, 2] + room).all():
                taken = np.vstack([taken, [y, x, room]])
                plan[name].append(replace(shape, y=y, x=x))
                break
    return plan


def _thin(cells: Cells, spacing: float) -> Cells:
    """Keep one cell, the first, in every square of the given side."""
    bins = (cells.y // spacing).astype(np.int64) * 100_000 + (cells.x // spacing).astype(np.int64)
    return cells.select(np.sort(np.unique(bins, return_index=True)[1]))


def _flow(rng: np.random.Generator, size: int, nearest: Floats) -> tuple[Floats, Floats]:
    """Unit vectors (y, x) along wavy bundles, which bend around the nearest structures."""
    around = 2.5 * np.exp(-np.maximum(nearest, 0) / 14)
    hill = (noise(rng, size, 110) + 0.35 * noise(rng, size, 45) + around).astype(np.float32)
    for _ in range(5):
        hill = shapes.blur(hill, 2.0)  # smooths the creases midway between two structures
    gy, gx = np.gradient(hill)
    steepness = np.hypot(gy, gx) + np.float32(1e-9)
    return gx / steepness, -gy / steepness


def _ground(rng: np.random.Generator, size: int, plan: dict[str, list[Outline]], radius: float) -> Ground:
    """Rasterise the plan: masks of each kind of tissue, distances to their edges, and directions of the fibres."""
    gland_depth, gland_band = shapes.measure(size, plan["glands"])
    vessel_depth, wall_band = shapes.measure(size, plan["vessels"] + plan["capillaries"])
    follicle_depth, mantle = shapes.measure(size, plan["follicles"])
    ripple = noise(rng, size, 9)
    gland_depth += 0.9 * ripple
    angle_y, angle_x = _flow(rng, size, np.minimum(np.minimum(gland_depth, vessel_depth), follicle_depth))

    rows, columns = np.mgrid[0:size, 0:size].astype(np.float32) - np.float32((size - 1) / 2)
    edge = np.hypot(rows, columns) - radius + 0.014 * size * noise(rng, size, size / 4) + 2.5 * noise(rng, size, 14)
    tear = 1 + np.abs(noise(rng, size, 60)) * 22 - np.maximum(noise(rng, size, 70) - 0.9, 0) * 4
    # Glands shrink away from the stroma when tissue is fixed.
    retraction = 1 + np.abs(gland_depth - 2) - np.maximum(noise(rng, size, 40) - 0.8, 0) * 2.2

    gland = soft(gland_depth)
    lumen = soft(gland_depth + gland_band + 2.2 * ripple) * gland
    vessel_lumen = soft(vessel_depth)
    wall = soft(vessel_depth - wall_band - 0.8 * ripple) * (1 - vessel_lumen) * (wall_band > 0)
    return Ground(
        present=soft(edge) * soft(-np.minimum(tear, retraction)),
        epithelium=gland - lumen,
        lumen=lumen,
        gland_depth=gland_depth,
        gland_band=gland_band,
        wall=wall,
        vessel_depth=vessel_depth,
        follicle_depth=follicle_depth,
        mantle=mantle,
        stroma=(1 - gland) * (1 - wall) * (1 - vessel_lumen),
        angle=np.arctan2(angle_y, angle_x),
        fibres=shapes.streaks(rng, angle_y, angle_x),
    )


def _lining(rng: np.random.Generator, plan: dict[str, list[Outline]], habit: Habit) -> list[Cells]:
    """Rows of epithelial nuclei along the glands, and flat nuclei along the vessels."""
    parts = []
    for gland in plan["glands"]:
        for depth, spacing, density in ((7.5, 7.4, 1.0), (13.5, 8.4, habit.crowding)):
            y, x, outward = gland.along(depth, spacing)
            kept = rng.random(len(y)) < density
            jitter = rng.standard_normal((3, len(y)), dtype=np.float32)
            y = y + 1.9 * jitter[0] * np.sin(outward) + 0.5 * jitter[1]
            x = x + 1.9 * jitter[0] * np.cos(outward) + 0.5 * jitter[1]
            parts.append(grow(rng, shapes.EPITHELIUM, y[kept], x[kept], (outward + 0.2 * jitter[2])[kept]))
    for vessel in plan["vessels"] + plan["capillaries"]:
        y, x, outward = vessel.along(-0.6, 17)
        flat = grow(rng, shapes.ENDOTHELIUM, y, x, outward + np.float32(np.pi / 2))
        # Bent like the wall of the vessel.
        parts.append(replace(flat, bend=-(flat.length**2) / (2 * np.float32(vessel.radius) * flat.width)))
    return parts


def _filling(rng: np.random.Generator, size: int, ground: Ground, habit: Habit) -> list[Cells]:
    """All cells that are not in a row. Of two cells at one place, ``_thin`` keeps the one added first."""
    parts = []

    def add(kind: int, spacing: float, chance: Callable[..., Floats], wobble: float) -> None:
        """Scatter cells of a kind; ``chance`` gets a function that samples maps, and returns probabilities."""
        y, x = scatter(rng, size, spacing)
        chosen = rng.random(len(y)) < chance(lambda field: pick(field, y, x))
        turn = pick(ground.angle, y, x) + wobble * rng.standard_normal(len(y), dtype=np.float32)
        parts.append(grow(rng, kind, y[chosen], x[chosen], turn[chosen]))

    follicle, centre = ground.follicle_depth, ground.follicle_depth + ground.mantle
    crowd = noise(rng, size, 45)
    lymphocytes = 0.9 * np.exp(-np.maximum(follicle, 0) / 8) + 0.13 * habit.inflammation * np.maximum(crowd, 0)
    solid = (ground.gland_depth < -17) & (ground.gland_depth > 9 - ground.gland_band)
    add(shapes.EPITHELIUM, 9.5, lambda at: at(solid), 2)
    add(shapes.CENTROBLAST, 9.0, lambda at: 0.97 * (at(centre) <= 0), 3)
    add(shapes.B_CELL, 7.9, lambda at: 0.95 * ((at(follicle) < -2) & (at(centre) > 0)), 3)
    add(shapes.T_CELL, 7.9, lambda at: at(lymphocytes) * at(ground.stroma) * (at(follicle) > -2), 3)
    add(shapes.T_CELL, 12, lambda at: 0.02 * habit.inflammation * at(ground.epithelium), 3)
    add(shapes.MUSCLE, 9, lambda at: 0.7 * (at(ground.wall) > 0.7), 0.15)
    quiet = ground.stroma * (follicle > 3) * (ground.gland_depth > 2) * (ground.vessel_depth > 2)
    add(shapes.MACROPHAGE, 22, lambda at: at(quiet) * np.clip(0.16 + 0.16 * at(crowd), 0, 1), 1)
    add(shapes.FIBROBLAST, 13, lambda at: at(quiet) * np.clip(0.62 + 0.2 * at(crowd), 0, 1), 0.2)
    return parts


def draw_tissue(rng: np.random.Generator, size: int, habit: Habit) -> Tissue:
    """One core of S x S pixels: a disc of tissue on glass, with the composition of ``habit``."""
    radius = 0.455 * size
    plan = _plan(rng, size, radius, habit)
    ground = _ground(rng, size, plan, radius)
    cells = Cells.join([*_lining(rng, plan, habit), *_filling(rng, size, ground, habit)])
    cells = cells.select((np.minimum(cells.y, cells.x) > 0) & (np.maximum(cells.y, cells.x) < size - 1))
    cells = _thin(cells.select(pick(ground.present, cells.y, cells.x) > 0.5), 4.0)
    depth, owner = shapes.stamp(size, cells)

    # Erythrocytes in vessels, nucleoli in the larger nuclei, and mucin on the lumen side of some glandular cells.
    y, x = scatter(rng, size, 8)
    blood = (pick(ground.vessel_depth, y, x) < -2) & (pick(noise(rng, size, 16), y, x) > -0.3)
    erythrocytes, _ = shapes.stamp(size, grow(rng, shapes.ERYTHROCYTE, y[blood], x[blood], x[blood]))

    large = cells.select(np.isin(cells.kind, (shapes.EPITHELIUM, shapes.CENTROBLAST)))
    along = 0.45 * large.length * rng.uniform(-1, 1, len(large.y)).astype(np.float32)
    y, x = large.y + along * np.sin(large.angle), large.x + along * np.cos(large.angle)
    nucleoli, _ = shapes.stamp(size, grow(rng, shapes.NUCLEOLUS, y, x, large.angle))

    full = large.select((large.kind == shapes.EPITHELIUM) & (rng.random(len(large.y)) < habit.goblets))
    y, x = full.y - 10 * np.sin(full.angle), full.x - 10 * np.cos(full.angle)
    apical = (pick(ground.epithelium, y, x) > 0.5) & (pick(ground.gland_band, y, x) < FAR)
    goblets, _ = shapes.stamp(size, grow(rng, shapes.GOBLET, y[apical], x[apical], full.angle[apical]))
    return Tissue(
        **vars(ground),
        cells=cells,
        depth=depth + 0.35 * noise(rng, size, 3.5),
        owner=owner,
        erythrocytes=erythrocytes,
        goblets=soft(goblets) * ground.epithelium,
        nucleoli=soft(nucleoli),
    )
