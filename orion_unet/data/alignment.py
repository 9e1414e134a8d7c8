"""A quick look, before training, at whether the H&E and the markers of a folder are aligned."""

from __future__ import annotations

import shlex

import numpy as np

from orion_unet.data.channels import nuclear_channel
from orion_unet.data.pairs import PairTable
from orion_unet.data.scale import Scales
from orion_unet.registration.shift import LEAST_PEAK, register
from orion_unet.registration.stains import haematoxylin
from orion_unet.slides.remote import beside

# Cores that are looked at, evenly spread, and the side of the window in their middle [pixels]: under a second in all.
LOOKED_AT, SIDE = 16, 384
# Warn where more than this share of them is off by more than this [pixels].
LARGEST_SHARE, LARGEST_SHIFT = 0.1, 2.0


def alignment_warning(table: PairTable, scales: Scales) -> str:
    """A sentence if more than a tenth of the cores looked at are over 2 pixels off register; else empty.

    Also empty where no channel is named like a nuclear stain. Cores without a clear match say nothing.
    """
    nuclear = nuclear_channel(table.channel_names)
    if nuclear is None:
        return ""
    stained = [core for core in range(len(table)) if table.places(core)[nuclear] >= 0]
    chosen = np.unique(np.linspace(0, len(stained) - 1, min(LOOKED_AT, len(stained))).round().astype(int))
    cores = [stained[index] for index in chosen]
    off = []
    for core in cores:
        he = _middle(table, core, "he")
        found = register(
            haematoxylin(he.astype(np.float32) / np.float32(scales.white("he", he.dtype))),
            _middle(table, core, "orion")[..., table.places(core)[nuclear]].astype(np.float32),
        )
        if found.shift is not None and found.peak >= LEAST_PEAK and np.hypot(*found.shift) > LARGEST_SHIFT:
            off.append(str(table.names[core]))
    if len(off) <= LARGEST_SHARE * len(cores):
        return ""
    return (
        f"{len(off)} of {len(cores)} cores looked at are more than {LARGEST_SHIFT:g} pixels off register "
        f"({', '.join(off[:3])}{', ...' if len(off) > 3 else ''}), which limits what can be learned; align them first: "
        f"{register_command(table)}"
    )


def register_command(table: PairTable) -> str:
    """The command that registers this folder, to be pasted."""
    folder = table.folder if table.folder.name not in ("", "..") else table.folder.resolve()
    registered = beside(folder, "_registered")
    return f"python -m orion_unet register {shlex.quote(str(folder))} --output_dir {shlex.quote(str(registered))}"


def _middle(table: PairTable, core: int, modality: str) -> np.ndarray:
    """The middle of a core, (h, w, C), read and nothing else."""
    image = table.image(core, modality)
    rows, columns = (slice(max(0, (side - SIDE) // 2), max(0, (side - SIDE) // 2) + SIDE) for side in image.shape[:2])
    found: np.ndarray = image[rows, columns]
    return found
