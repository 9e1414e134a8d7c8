"""Registers one pair that exists: measured, judged, and written moved and cropped, or rejected with the reason."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from orion_unet.data.pairs import PairTable
from orion_unet.data.scale import Scales
from orion_unet.data.tissue import tissue_fraction
from orion_unet.registration.coarse import UPRIGHT, find_coarse
from orion_unet.registration.fine import Fine, refine
from orion_unet.registration.shift import LEAST_SIDE
from orion_unet.registration.stains import haematoxylin
from orion_unet.registration.transform import move

KEPT, REJECTED = "kept", "rejected"


@dataclass(frozen=True)
class Judgement:
    """What it takes to be kept: channel of the nuclear marker, least correlation after the registration, longest shift
    [pixels]."""

    nuclear: int
    min_correlation: float
    max_shift: float


@dataclass(frozen=True)
class Registered:
    """The outcome for one core: a row of registration.csv.

    ``top`` and ``left`` are where the written crop begins in the stored markers, ``height`` and ``width`` its size.
    Shifts, residuals and ``field_px``, the largest displacement of the field, are in pixels of the markers. None where
    not measured.
    """

    core: str
    top: int
    left: int
    height: int
    width: int
    shift_down: float | None
    shift_right: float | None
    rotation_deg: float | None
    scale: float | None
    field_px: float | None
    correlation: float | None
    correlation_before: float | None
    residual_px: float | None
    residual_95_px: float | None
    peak: float | None
    tissue_fraction: float
    state: str
    reason: str

    def record(self) -> dict[str, Any]:
        """Column and value."""
        return asdict(self)


def register_pair(table: PairTable, scales: Scales, core: int, judgement: Judgement, output: Path) -> Registered:
    """Register one core, and write NAME_HE.npy and NAME_ORION.npy into ``output`` where it is kept.

    The H&E is moved onto the markers, which are cropped and never interpolated; both keep their dtype and axis order,
    whatever format they are stored in.
    Files appear under their names only when they are complete. Raises InputError if a file has changed, and OSError
    where the disk fails.
    """
    torch.set_num_threads(1)
    name = str(table.names[core])
    he, orion = (np.asarray(table.image(core, modality)) for modality in ("he", "orion"))
    white = scales.white("he", he.dtype)
    density = haematoxylin(he / np.float32(white))
    marker = orion[..., table.places(core)[judgement.nuclear]].astype(np.float32)
    tissue = tissue_fraction(he, "hwc", white)
    found = refine(density, marker)
    reason = found.reason and (_other_way_round(density, marker) or found.reason)
    shift = found.affine.points(_centre(marker)) - _centre(marker)
    if not reason:
        reason = _refusal(found, shift, judgement)
    top, left, height, width = 0, 0, *marker.shape
    if not reason:
        moved, inside = move(_reader(he), marker.shape, found.affine, found.field, (0, 0, *marker.shape))
        top, left, height, width = largest_inside(inside)
        if min(height, width) < LEAST_SIDE:
            reason = f"only {height} x {width} pixels overlap, at least {LEAST_SIDE} are needed"
        else:
            part = np.s_[top : top + height, left : left + width]
            for modality, image in (("he", moved[part]), ("orion", orion[part])):
                _write(table, core, modality, image, output)
    measured = found.trusted
    field = 0.0 if found.field is None else found.field.largest
    return Registered(
        core=name,
        top=top,
        left=left,
        height=height,
        width=width,
        shift_down=_number(shift[0], measured),
        shift_right=_number(shift[1], measured),
        rotation_deg=_number(found.affine.rotation_deg, measured),
        scale=_number(found.affine.scale, measured),
        field_px=_number(field, measured),
        correlation=_number(found.correlation, measured),
        correlation_before=_number(found.correlation_before),
        residual_px=_number(found.residual_px),
        residual_95_px=_number(found.residual_95_px),
        peak=_number(found.peak),
        tissue_fraction=float(tissue),
        state=REJECTED if reason else KEPT,
        reason=reason,
    )


def _refusal(found: Fine, shift: np.ndarray, judgement: Judgement) -> str:
    """Why a measured alignment is not used; empty where it is."""
    distance = float(np.linalg.norm(shift))
    if distance > judgement.max_shift:
        return f"shifted by {distance:.1f} pixels, more than --max_shift {judgement.max_shift:g}"
    if not found.correlation >= judgement.min_correlation:
        return f"correlation {found.correlation:.2f} after registration, under {judgement.min_correlation:g}"
    return ""


def _other_way_round(density: np.ndarray, marker: np.ndarray) -> str:
    """A sentence where the H&E fits only mirrored or turned: such a pair was exported wrongly, and is not corrected."""
    if min(density.shape) < LEAST_SIDE:
        return ""
    found = find_coarse(density, marker)
    if not found.trusted or found.orientation == UPRIGHT:
        return ""
    return f"the H&E looks {found.orientation} against the markers: export the pair again"


def largest_inside(inside: np.ndarray) -> tuple[int, int, int, int]:
    """A rectangle (y, x, height, width) that is inside everywhere: from the whole, the side with the largest share
    outside is moved in until there is none."""
    top, left, bottom, right = 0, 0, *inside.shape
    while top < bottom and left < right:
        part = ~inside[top:bottom, left:right]
        sides = [part[0].mean(), part[-1].mean(), part[:, 0].mean(), part[:, -1].mean()]
        worst = int(np.argmax(sides))
        if sides[worst] == 0:
            if not part.any():
                return top, left, bottom - top, right - left
            # A hole in the middle: there is no edge to follow.
            return top, left, 0, 0
        if worst == 0:
            top += 1
        elif worst == 1:
            bottom -= 1
        elif worst == 2:
            left += 1
        else:
            right -= 1
    return 0, 0, 0, 0


def _reader(he: np.ndarray) -> Any:
    return lambda y, x, height, width: he[y : y + height, x : x + width]


def _centre(image: np.ndarray) -> np.ndarray:
    return (np.array(image.shape) - 1) / 2


def _number(value: float, measured: bool = True) -> float | None:
    return float(value) if measured and np.isfinite(value) else None


def _write(table: PairTable, core: int, modality: str, image: np.ndarray, output: Path) -> None:
    row = getattr(table, modality)[core]
    stored = image if row["layout"] == "hwc" else image.transpose(2, 0, 1)
    target = output / table.npy_name(core, modality)
    temporary = target.with_name(f".{target.name}.partial")
    try:
        with open(temporary, "wb") as file:
            np.save(file, np.ascontiguousarray(stored, np.dtype(str(row["dtype"])).newbyteorder("<")))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
