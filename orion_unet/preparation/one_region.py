"""Prepares one region: read, registered, judged, and written as a pair, or rejected with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from orion_unet.command_options import PrepareOptions
from orion_unet.data.slide_regions import SlideRegion, write_region
from orion_unet.data.zarr_writing import write_zarr
from orion_unet.preparation.one_pair import KEPT, REJECTED, largest_inside
from orion_unet.preparation.regions import Region
from orion_unet.preparation.slide_plan import SlidePlan
from orion_unet.preparation.writing import BAND, pair_paths, resampled_bands, write_npy
from orion_unet.registration.fine import Fine, refine
from orion_unet.registration.shift import LEAST_SIDE
from orion_unet.registration.stains import haematoxylin
from orion_unet.registration.transform import Affine, Field, covered, move
from orion_unet.slides.images import HeImage
from orion_unet.slides.markers import MarkerImage

# With --register check, a region that lies farther off than this is rejected [pixels of the pairs].
LARGEST_SHIFT = 2.0


@dataclass(frozen=True)
class PreparedRegion:
    """The outcome for one region: a row of regions.csv.

    ``y``, ``x``, ``height`` and ``width`` are in pixels of the marker image at full resolution. Shifts (found after the
    coarse registration) and residuals are in pixels of the pairs. ``rotation_deg`` and ``scale`` take the markers to
    the H&E. None where not measured.
    """

    core: str
    slide: str
    y: float
    x: float
    height: float
    width: float
    shift_down: float | None
    shift_right: float | None
    rotation_deg: float | None
    scale: float | None
    correlation: float | None
    correlation_before: float | None
    tissue_fraction: float
    state: str
    residual_px: float | None = None
    residual_95_px: float | None = None
    reason: str = ""

    def record(self) -> dict[str, Any]:
        """Column and value."""
        return asdict(self)


def prepare_region(
    plan: SlidePlan, region: Region, options: PrepareOptions, he: HeImage, orion: MarkerImage
) -> PreparedRegion:
    """Prepare one region into ``options.output_dir``; files appear under their names only when they are complete.

    Raises InputError where an image is damaged, and OSError where the disk fails.
    """
    torch.set_num_threads(1)
    limits = (orion.shape[1], orion.shape[2])
    size = (round(region.height / plan.step), round(region.width / plan.step))

    # From the centre of a pixel of the region to the markers, and on to the H&E.
    lies = Affine.scaling(plan.step).then(Affine.shift(region.y, region.x)).then(plan.affine)
    found: Fine | None = None
    field: Field | None = None
    reason, final = "", lies
    if options.register != "off":
        # What is only measured need not be interpolated as well as what is written.
        unmoved, _ = move(he.stored, he.shape, lies, None, (0, 0, *size), "bilinear")
        bands = resampled_bands(_channels(orion, (plan.nuclear,)), (region.y, region.x), size, plan.step, limits)
        marker = np.concatenate(list(bands))[..., 0].astype(np.float32)
        found = refine(haematoxylin(unmoved.astype(np.float32) / np.float32(he.white)), marker)
        reason = found.reason or _refusal(found, size, options)
        if not reason and options.register == "auto":
            final, field = found.affine.then(lies), found.field
    top, left, height, width = largest_inside(covered(he.shape, final, field, (0, 0, *size)))
    if not reason and min(height, width) < LEAST_SIDE:
        reason = f"only {height} x {width} pixels lie inside the H&E, at least {LEAST_SIDE} are needed"
    corner = (region.y + top * plan.step, region.x + left * plan.step)
    if not reason:
        part = (top, left, height, width)
        paths = pair_paths(Path(options.output_dir), region.core, options.format)
        if options.format == "none":
            _write_places(plan, region, paths, part, final, field)
        else:
            places = ((top + first, left, min(BAND, height - first), width) for first in range(0, height, BAND))
            moved = (move(he.stored, he.shape, final, field, place)[0] for place in places)
            markers = resampled_bands(_channels(orion, plan.channels), corner, (height, width), plan.step, limits)
            _write(plan, options.format, paths, (height, width), moved, markers)
    else:
        corner, (height, width) = (region.y, region.x), size
    return _row(plan, region, found, final, (*corner, height * plan.step, width * plan.step), reason)


def unread(plan: SlidePlan, region: Region, reason: str) -> PreparedRegion:
    """The outcome for a region that could not be read."""
    lies = Affine.scaling(plan.step).then(Affine.shift(region.y, region.x)).then(plan.affine)
    return _row(plan, region, None, lies, (region.y, region.x, region.height, region.width), reason)


def _channels(orion: MarkerImage, channels: tuple[int, ...]) -> Any:
    return lambda y, x, height, width: orion.read(channels, y, x, height, width)


def _shift(found: Fine, size: tuple[int, int]) -> np.ndarray:
    centre = (np.array(size) - 1) / 2
    shift: np.ndarray = found.affine.points(centre) - centre
    return shift


def _refusal(found: Fine, size: tuple[int, int], options: PrepareOptions) -> str:
    """Why a measured alignment is not used; empty where it is."""
    checking = options.register == "check"
    correlation = found.correlation_before if checking else found.correlation
    if not correlation >= options.min_correlation:
        after = "" if checking else " after registration"
        return f"correlation {correlation:.2f}{after}, under --min_correlation {options.min_correlation:g}"
    distance = float(np.linalg.norm(_shift(found, size)))
    if checking and distance > LARGEST_SHIFT:
        return f"off by {distance:.1f} pixels; use --register auto to move it"
    return ""


def _write(
    plan: SlidePlan,
    format: str,
    paths: dict[str, Path],
    size: tuple[int, int],
    he: Iterator[np.ndarray],
    markers: Iterator[np.ndarray],
) -> None:
    """Write the pixels of a pair, which come in bands."""
    first = next(he)
    he = chain([first], he)
    shape, dtype = (*size, len(plan.channels)), np.dtype(plan.dtype)
    if format == "npy":
        write_npy(paths["orion"], shape, dtype, markers)
        write_npy(paths["he"], (*size, 3), first.dtype, he)
        return
    about = {"pixel_size_um": plan.pixel_size_um}
    write_zarr(paths["orion"], shape, dtype, markers, {**about, "names": plan.names})
    write_zarr(paths["he"], (*size, 3), first.dtype, he, {**about, "names": ("red", "green", "blue")})


def _write_places(
    plan: SlidePlan,
    region: Region,
    paths: dict[str, Path],
    part: tuple[int, int, int, int],
    affine: Affine,
    field: Field | None,
) -> None:
    """Write where the pixels of a pair are in their slide."""
    top, left, height, width = part
    place = (region.y + top, region.x + left, height, width)
    markers = SlideRegion(plan.slide.name, place, plan.pixel_size_um, plan.channels, plan.names)
    he = SlideRegion(
        plan.slide.name, place, plan.pixel_size_um, origin=(region.y, region.x), affine=affine, field=field
    )
    write_region(paths["orion"], markers)
    write_region(paths["he"], he)


def _row(
    plan: SlidePlan, region: Region, found: Fine | None, final: Affine, place: tuple[float, ...], reason: str
) -> PreparedRegion:
    size = (round(region.height / plan.step), round(region.width / plan.step))
    shift = _shift(found, size) if found is not None and found.trusted else (np.nan, np.nan)
    y, x, height, width = (round(value) if plan.step == 1 else value for value in place)
    measured = [
        found.correlation if found is not None and found.trusted else np.nan,
        *((found.correlation_before, found.residual_px, found.residual_95_px) if found is not None else (np.nan,) * 3),
    ]
    correlation, before, residual, residual_95 = (_number(value) for value in measured)
    return PreparedRegion(
        core=region.core, slide=plan.slide.name, y=y, x=x, height=height, width=width,
        shift_down=_number(shift[0]), shift_right=_number(shift[1]), rotation_deg=final.rotation_deg,
        scale=final.scale, correlation=correlation, correlation_before=before, tissue_fraction=region.tissue_fraction,
        state=REJECTED if reason else KEPT, residual_px=residual, residual_95_px=residual_95, reason=reason,
    )  # fmt: skip


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
