"""Renders drawn tissue twice: stained with haematoxylin and eosin, and as the 20 markers of an ORION image."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orion_unet.demo import shapes
from orion_unet.demo.shapes import KINDS, Floats, blur, noise, pick, soft
from orion_unet.demo.tissue import Tissue
from orion_unet.registration.stains import STAINS

BACKGROUNDS = {
    "Hoechst": 0.0068,
    "AF1": 0.0075,
    "CD31": 0.0032,
    "CD45": 0.0029,
    "CD68": 0.0028,
    "Blank": 0.0045,  # no antibody: the noise of the camera and nothing else
    "CD4": 0.0030,
    "FOXP3": 0.0027,
    "CD8a": 0.0033,
    "CD45RO": 0.0030,
    "CD20": 0.0030,
    "PD-L1": 0.0032,
    "CD3e": 0.0033,
    "CD163": 0.0030,
    "E-cadherin": 0.0029,
    "PD-1": 0.0031,
    "Ki67": 0.0029,
    "Pan-CK": 0.0060,
    "SMA": 0.0034,
    "Granzyme B": 0.0029,
}
"""The markers in channel order, each with its background level as a fraction of full scale."""
MARKERS: tuple[str, ...] = tuple(BACKGROUNDS)

VECTORS = np.array(STAINS)
"""Optical density of red, green and blue per unit of haematoxylin, eosin and a brown third stain, after Ruifrok and
Johnston, Analytical and Quantitative Cytology and Histology 23, 2001. Their third stain is DAB; here it represents
whatever else absorbs blue light: haemoglobin, and protein slightly."""

FULL_SCALE = 65535
PSF_SIGMA = 0.8
"""Optical blur of the fluorescence microscope, pixels."""
READ_NOISE = 0.00025
SHOT_NOISE = 3e-5
"""Variance per unit of signal: a tenth of full scale is about 3,300 photoelectrons."""
HOT_PIXELS = 1.2e-5
"""Fraction of the pixels of a channel that are hot; at least three."""


@dataclass(frozen=True)
class Stain:
    """How one core was stained and scanned."""

    haematoxylin: float
    eosin: float
    vectors: NDArray[np.float64]
    """(3, 3): haematoxylin, eosin and brown by red, green and blue"""
    glass: NDArray[np.float64]
    """(3,): level of red, green and blue on blank glass"""
    antibodies: NDArray[np.float64]
    """(C,): brightness of each marker, about 1"""

    @classmethod
    def draw(cls, patient: np.random.Generator, core: np.random.Generator) -> Stain:
        """A random staining: most of the variation is between patients (one block, one day), a little between cores."""
        vectors = VECTORS * (1 + 0.04 * patient.standard_normal((3, 3)) + 0.01 * core.standard_normal((3, 3)))
        return cls(
            haematoxylin=float(np.exp(0.09 * patient.standard_normal() + 0.03 * core.standard_normal())),
            eosin=float(np.exp(0.14 * patient.standard_normal() + 0.05 * core.standard_normal())),
            vectors=vectors / np.linalg.norm(vectors, axis=1, keepdims=True),
            glass=np.array([243.0, 242.0, 244.0]) + 0.7 * core.standard_normal(3),
            antibodies=np.exp(0.08 * patient.standard_normal(len(MARKERS)) + 0.04 * core.standard_normal(len(MARKERS))),
        )


@dataclass(frozen=True)
class Absorbers:
    """The absorbers of an H&E as optical densities (S, S)."""

    chromatin: Floats
    """haematoxylin in nuclei, where Hoechst binds too"""
    basophilia: Floats
    """haematoxylin elsewhere"""
    eosin: Floats
    haemoglobin: Floats


def stain_dyes(rng: np.random.Generator, tissue: Tissue) -> Absorbers:
    """Densities of the dyes that bind to the tissue."""
    cells, size = tissue.cells, tissue.depth.shape[0]
    chromatin_of, clumps_of = np.array([(kind.chromatin, kind.clumps) for kind in KINDS], np.float32)[cells.kind].T
    dye = chromatin_of * np.exp(0.13 * rng.standard_normal(len(cells.y), dtype=np.float32))
    clumps = clumps_of[tissue.owner] * (0.62 * noise(rng, size, 2.2) + 0.54 * noise(rng, size, 4.5))
    rim = 0.30 * np.exp(-((tissue.depth + 0.9) ** 2))
    chromatin = dye[tissue.owner] * np.clip(0.86 + clumps + rim, 0.3, 1.7) + 0.22 * tissue.nucleoli
    nucleus = soft(tissue.depth)

    loose = 1 + 0.22 * noise(rng, size, 70)
    grain = 0.6 * noise(rng, size, 3) + 0.6 * noise(rng, size, 7)
    collagen = (0.03 + 0.23 * np.clip(tissue.fibres * 1.3 - 0.12, 0, 1) ** 1.2) * loose
    cellular = np.exp(-np.maximum(tissue.follicle_depth + 3, 0) / 6)
    cytoplasm = (0.18 - 0.05 * np.clip(-tissue.gland_depth / 26, 0, 1)) * (1 + 0.12 * grain)
    eosin = (
        tissue.stroma * (collagen * (1 - 0.6 * cellular) + 0.04 * cellular)
        + tissue.epithelium * cytoplasm * (1 - 0.85 * tissue.goblets)
        + tissue.wall * (0.17 + 0.13 * tissue.fibres)
        + tissue.lumen * 0.03 * np.clip(noise(rng, size, 14) - 0.2, 0, 2)
    )
    eosin = np.where(_bodies(tissue, shapes.MACROPHAGE), 0.15 + 0.03 * grain, eosin) * (1 - 0.3 * nucleus)
    blood: Floats = soft(tissue.erythrocytes) * (0.72 + 0.28 * soft(-tissue.erythrocytes - 1.6, 2))
    basophilia = 0.07 * tissue.epithelium * (1 - 0.3 * tissue.goblets) + 0.02 * tissue.stroma
    return Absorbers(
        chromatin=nucleus * chromatin * tissue.present,
        basophilia=basophilia * tissue.present,
        eosin=(eosin * (1 - blood) + 0.30 * blood) * tissue.present,
        haemoglobin=0.38 * blood * tissue.present,
    )


def _bodies(tissue: Tissue, kind: int) -> NDArray[np.bool_]:
    """Mask of the cytoplasm of all cells of a kind."""
    return (tissue.cells.kind == kind)[tissue.owner] & (tissue.owner >= 0) & (tissue.depth > 0)


def render_he(rng: np.random.Generator, dyes: Absorbers, stain: Stain) -> NDArray[np.uint8]:
    """H&E image (S, S, 3) by the Beer-Lambert law, I = glass * 10^-(density of the three stains)."""
    size = dyes.eosin.shape[0]
    thickness = 1 + np.float32(0.05) * noise(rng, size, size / 3)
    haematoxylin = (dyes.chromatin + dyes.basophilia) * np.float32(stain.haematoxylin) * thickness
    eosin = dyes.eosin * np.float32(stain.eosin) * thickness
    # Protein is faintly brown; without this, eosin would look magenta.
    brown = dyes.haemoglobin + np.float32(0.28) * eosin
    he = np.empty((size, size, 3), np.uint8)
    for channel, vector in enumerate(stain.vectors.T.astype(np.float32)):
        density = vector[0] * haematoxylin + vector[1] * eosin + vector[2] * brown
        light = np.float32(stain.glass[channel]) * np.float32(10) ** -blur(density, 0.65)
        light += np.float32(1.3) * rng.standard_normal((size, size), dtype=np.float32)
        he[..., channel] = np.clip(np.rint(light), 0, 255)
    return he


def _phenotypes(rng: np.random.Generator, tissue: Tissue) -> dict[str, Floats]:
    """How strongly each cell (N,) expresses the markers of cells (as opposed to markers of structures).

    T-cell subsets are drawn at random within their parents, so that an H&E shows where T cells are but not which of
    them are CD8. One lymphocyte in eight is not of the type that its place suggests.
    """
    kind = tissue.cells.kind
    chance = rng.random((10, len(kind)), dtype=np.float32)
    macrophage, centroblast = kind == shapes.MACROPHAGE, kind == shapes.CENTROBLAST
    lymphocyte = np.isin(kind, (shapes.T_CELL, shapes.B_CELL, shapes.CENTROBLAST))
    t_cell = lymphocyte & ((kind == shapes.T_CELL) ^ (chance[0] < 0.12))
    cd8 = t_cell & (chance[1] < 0.35)
    cd4 = t_cell & ~cd8
    helper = (kind != shapes.T_CELL) & cd4
    basal = pick(tissue.gland_depth, tissue.cells.y, tissue.cells.x) > -11
    cycling = np.select([centroblast, kind == shapes.EPITHELIUM, t_cell], [0.7, 0.06 + 0.2 * basal, 0.04], 0.01)
    positive = {
        "CD45": lymphocyte + 0.35 * macrophage,
        "CD3e": t_cell,
        "CD4": cd4 + 0.2 * macrophage,
        "CD8a": cd8,
        "FOXP3": cd4 & (chance[2] < 0.15),
        "CD45RO": t_cell & (chance[3] < 0.5),
        "PD-1": t_cell & (chance[4] < np.where(helper, 0.8, 0.12)),
        "Granzyme B": cd8 & (chance[5] < 0.35),
        "CD20": lymphocyte & ~t_cell,
        "CD68": macrophage & (chance[6] < 0.9),
        "CD163": macrophage & (chance[7] < 0.6),
        "PD-L1": macrophage & (chance[8] < 0.4),
        "Ki67": chance[9] < cycling,
    }
    levels = np.exp(0.3 * rng.standard_normal((len(positive), len(kind)), dtype=np.float32))
    return {
        marker: level * where.astype(np.float32)
        for level, (marker, where) in zip(levels, positive.items(), strict=True)
    }


def _signals(rng: np.random.Generator, tissue: Tissue, dyes: Absorbers) -> Iterator[tuple[str, Floats]]:
    """Signal of each marker except Blank, without background: one map (S, S) at a time, as a fraction of full scale."""
    size, owner, depth = tissue.depth.shape[0], tissue.owner, tissue.depth
    nucleus = soft(depth)
    own = owner >= 0
    # Chromatin binds haematoxylin and Hoechst, but their ratio varies between nuclei.
    uptake = np.exp(0.18 * rng.standard_normal(len(tissue.cells.y), dtype=np.float32))
    yield "Hoechst", 0.3 * uptake[owner] * dyes.chromatin**1.35
    yield "AF1", 0.045 * dyes.eosin + np.clip(0.9 * (dyes.eosin - 0.22), 0, 0.075) + 0.2 * dyes.haemoglobin

    cells = _phenotypes(rng, tissue)
    grain = np.clip(1 + 0.4 * noise(rng, size, 2.5), 0, 2)
    membrane = own * np.exp(-(((depth - 0.8) / 1.1) ** 2)) * grain
    for marker, level in (
        ("CD45", 0.06),
        ("CD3e", 0.05),
        ("CD4", 0.05),
        ("CD8a", 0.06),
        ("CD45RO", 0.05),
        ("CD20", 0.06),
        ("PD-1", 0.05),
    ):
        yield marker, level * cells[marker][owner] * membrane
    for marker, level in (("FOXP3", 0.03), ("Ki67", 0.03)):
        yield marker, level * cells[marker][owner] * nucleus * own * grain
    body = own * soft(depth - 4.5, 2) * (1 - 0.8 * nucleus) * grain
    for marker, level in (("CD68", 0.05), ("CD163", 0.05), ("Granzyme B", 0.05)):
        yield marker, level * cells[marker][owner] * body
    islands = np.clip(noise(rng, size, 60) - 1, 0, 1)
    yield "PD-L1", 0.05 * cells["PD-L1"][owner] * body + 0.02 * islands * tissue.epithelium * (1 - nucleus)

    glandular = ((tissue.cells.kind == shapes.EPITHELIUM)[owner] & own) * tissue.epithelium
    border = np.zeros((size, size), np.float32)
    border[:-1] = owner[1:] != owner[:-1]
    border[:, :-1] = np.maximum(border[:, :-1], owner[:, 1:] != owner[:, :-1])
    yield "E-cadherin", 0.105 * blur(border * glandular * grain, 0.7)
    patchy = np.exp(0.45 * noise(rng, size, 60))
    yield "Pan-CK", 0.052 * patchy * tissue.epithelium * (1 - 0.8 * nucleus) * (1 - 0.6 * tissue.goblets) * grain
    sheath = np.exp(-(((tissue.gland_depth - 3) / 2) ** 2)) * np.clip(noise(rng, size, 50), 0, 1)
    muscle = tissue.wall + tissue.stroma * (0.8 * sheath + 0.12 * np.clip(noise(rng, size, 40), 0, 2))
    yield "SMA", 0.14 * muscle * tissue.fibres * (1 - 0.6 * nucleus)
    yield "CD31", 0.09 * np.exp(-(((tissue.vessel_depth - 0.3) / 1.1) ** 2)) * grain


def render_orion(rng: np.random.Generator, tissue: Tissue, dyes: Absorbers, stain: Stain) -> NDArray[np.uint16]:
    """ORION image (S, S, C) of ``MARKERS``: background, blurred signal, shot and read noise, a few hot pixels."""
    size = tissue.depth.shape[0]
    orion = np.zeros((size, size, len(MARKERS)), np.uint16)
    illumination = 1 + np.float32(0.06) * noise(rng, size, size / 2)

    def record(channel: int, light: Floats, sd: Floats | np.float32) -> None:
        light += sd * rng.standard_normal((size, size), dtype=np.float32)
        hot = rng.choice(size * size, max(3, round(HOT_PIXELS * size * size)), replace=False)
        light.ravel()[hot] = rng.uniform(0.18, 0.45, len(hot))
        orion[..., channel] = np.clip(np.rint(light * FULL_SCALE), 0, FULL_SCALE)

    for marker, signal in _signals(rng, tissue, dyes):
        channel = MARKERS.index(marker)
        background = np.float32(BACKGROUNDS[marker])
        light = blur(signal * tissue.present, PSF_SIGMA) * np.float32(stain.antibodies[channel])
        light = (light + background * (0.8 + 0.3 * tissue.present)) * illumination
        record(channel, light, np.sqrt(np.float32(SHOT_NOISE) * light + np.float32(READ_NOISE**2)))
    record(MARKERS.index("Blank"), np.full((size, size), BACKGROUNDS["Blank"], np.float32), np.float32(READ_NOISE))
    return orion
