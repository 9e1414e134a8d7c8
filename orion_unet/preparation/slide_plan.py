"""What will be made of one slide: its panel, its grid, how the H&E lies on it, and its regions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from orion_unet.command_options import PrepareOptions
from orion_unet.data.channels import nuclear_channel
from orion_unet.errors import InputError
from orion_unet.preparation.panel import choose_panel, read_markers
from orion_unet.preparation.regions import Areas, Region, spread, tissue_regions, whole_regions
from orion_unet.preparation.slide_table import Slide
from orion_unet.preparation.tissue_map import tissue_map
from orion_unet.preparation.tma import find_cores
from orion_unet.registration.blocks import block_centres
from orion_unet.registration.coarse import find_coarse
from orion_unet.registration.stains import haematoxylin
from orion_unet.registration.transform import Affine, grid_points, within
from orion_unet.slides.images import HeImage
from orion_unet.slides.markers import MarkerImage
from orion_unet.slides.open import open_he, open_markers
from orion_unet.slides.thumbnails import he_thumbnail, marker_thumbnail

# Longest side of the thumbnails on which tissue is found and the slide registered [pixels].
THUMBNAIL = 1536
# A factor between pixel sizes beyond this is an error of units rather than a choice.
LARGEST_FACTOR = 4.0
# Bytes of two region files without a field, and of a node of a field, at most.
PLACE_BYTES, NODE_BYTES = 4096, 64


@dataclass(frozen=True)
class SlidePlan:
    """A slide as it will be prepared.

    ``affine`` takes points of the whole marker image to the H&E. ``step`` is pixels of the marker image in a pixel of
    the pairs, 1 where they have the same size. ``nuclear`` is the nuclear channel's index in the file. ``missing``
    are places of a microarray's lattice without a core.
    """

    slide: Slide
    channels: tuple[int, ...]
    names: tuple[str, ...]
    nuclear: int
    dtype: str
    he_itemsize: int
    pixel_size_um: float
    step: float
    affine: Affine
    orientation: str
    regions: list[Region]
    missing: list[str] = field(default_factory=list)

    def nbytes(self, region: Region, format: str) -> int:
        """Bytes of a region's pair, uncompressed; with the format none of the text of its places and its field."""
        if format == "none":
            return PLACE_BYTES + NODE_BYTES * int(np.prod(block_centres((region.height, region.width)).shape[:2]))
        pixels = round(region.height / self.step) * round(region.width / self.step)
        return pixels * (len(self.channels) * np.dtype(self.dtype).itemsize + 3 * self.he_itemsize)

    def document(self) -> dict[str, Any]:
        """What dataset.json says about the source."""
        return {
            "slide": self.slide.name, "he": str(self.slide.he), "orion": str(self.slide.orion),
            "affine": self.affine.matrix.tolist(), "orientation": self.orientation, "missing_cores": self.missing,
        }  # fmt: skip


def plan_slide(slide: Slide, options: PrepareOptions) -> SlidePlan:
    """Look at a slide's thumbnails and decide what will be made; raises InputError where it cannot be used."""
    # Many small operations, in one of several processes: more threads would wait for each other.
    torch.set_num_threads(1)
    with open_he(slide.he) as he, open_markers(slide.orion) as orion:
        he_um = _pixel_size(he, slide.he_pixel_size_um, "he_pixel_size_um")
        own_um = _pixel_size(orion, slide.orion_pixel_size_um, "orion_pixel_size_um")
        listed = slide.markers or options.markers
        panel = choose_panel(
            slide.orion, orion.shape[0], orion.channel_names, read_markers(listed) if listed is not None else None
        )
        nuclear = panel.channels[_nuclear(slide, panel.names, options)]
        step = (options.pixel_size_um or own_um) / own_um
        if not 1 / LARGEST_FACTOR <= step <= LARGEST_FACTOR:
            raise InputError(
                f"--pixel_size_um {options.pixel_size_um:g}: {slide.orion} has {own_um:g} µm; a factor over "
                f"{LARGEST_FACTOR:g} is not resampled"
            )
        if options.format == "none" and step != 1:
            raise InputError(
                f"--pixel_size_um {options.pixel_size_um:g}: {slide.orion} has {own_um:g} µm, and --format none "
                "resamples no markers: leave the option out, or choose another --format"
            )
        shape = (orion.shape[1], orion.shape[2])
        picture = he_thumbnail(he, THUMBNAIL)
        if not (tissue := tissue_map(picture.pixels)).any():
            raise InputError(f"{slide.he}: shows no tissue")
        affine, orientation = Affine.scaling(own_um / he_um), "as the markers"
        if options.register == "auto":
            marker = marker_thumbnail(orion, [nuclear], THUMBNAIL)
            density = np.where(tissue, haematoxylin(picture.pixels), 0).astype(np.float32)
            expected = own_um * marker.factor / (he_um * picture.factor)
            found = find_coarse(density, contrast(marker.pixels[..., 0]), expected)
            if not found.trusted:
                raise InputError(f"{slide.he}: does not fit {slide.orion}: {found.reason}; are they the same tissue?")
            affine = found.affine.between(marker.factor, picture.factor)
            orientation = found.orientation
        moved, factor = _on_markers(tissue, picture.factor, affine, shape)
        side = round(options.region_size * step)
        missing: list[str] = []
        if options.regions == "tma":
            regions, missing = find_cores(moved, factor, shape, slide.name)
            if options.regions_per_slide is not None:
                kept = spread(
                    [_place(region) for region in regions], options.regions_per_slide, _seed(options.seed, slide.name)
                )
                regions = [region for region in regions if _place(region) in kept]
        else:
            choose = tissue_regions if options.regions == "tissue" else whole_regions
            places = spread(
                choose(Areas(moved, factor), shape, side), options.regions_per_slide, _seed(options.seed, slide.name)
            )
            regions = [Region(f"{slide.name}_r{i:04d}", *place) for i, place in enumerate(places, 1)]
        if not regions:
            raise InputError(f"{slide.he}: no square of {side} pixels is half tissue; lower --region_size")
        return SlidePlan(
            slide=slide,
            channels=panel.channels,
            names=panel.names,
            nuclear=nuclear,
            dtype=orion.dtype.name,
            he_itemsize=1 if he.white == 255 else 2,
            pixel_size_um=own_um * step,
            step=step,
            affine=affine,
            orientation=orientation,
            regions=regions,
            missing=missing,
        )


def contrast(marker: np.ndarray) -> np.ndarray:
    """A marker (h, w) between its 1 % and 99.8 % quantiles as [0, 1], on a square-root scale."""
    low, high = np.quantile(marker, [0.01, 0.998])
    return np.sqrt(np.clip((marker - low) / max(float(high - low), 1e-9), 0, 1)).astype(np.float32)


def _pixel_size(image: HeImage | MarkerImage, given: float | None, column: str) -> float:
    size = given or image.pixel_size_um
    if size is None:
        doubt = f" ({image.pixel_size_doubt})" if image.pixel_size_doubt else ""
        raise InputError(f"{image.path}: states no pixel size that can be used{doubt}; give it in the column {column}")
    return size


def _nuclear(slide: Slide, names: tuple[str, ...], options: PrepareOptions) -> int:
    if options.register_on is not None:
        if options.register_on not in names:
            raise InputError(
                f"--register_on {options.register_on}: {slide.orion} has no such channel; there are {', '.join(names)}"
            )
        return names.index(options.register_on)
    found = nuclear_channel(names)
    if found is None and options.register != "off":
        raise InputError(
            f"{slide.orion}: no channel has the name of a nuclear stain; name the one that shows nuclei with "
            f"--register_on, of {', '.join(names)}"
        )
    return found or 0


def _seed(seed: int, name: str) -> int:
    """Another seed for every slide, whatever the order of the rows."""
    return int(np.random.SeedSequence([seed, *name.encode()]).generate_state(1)[0])


def _place(region: Region) -> tuple[int, int, int, int, float]:
    return region.y, region.x, region.height, region.width, region.tissue_fraction


def _on_markers(
    tissue: np.ndarray, he_factor: float, affine: Affine, shape: tuple[int, int]
) -> tuple[np.ndarray, float]:
    """The map of tissue, moved from the H&E's thumbnail onto one of the markers, and that one's factor."""
    factor = max(1.0, max(shape) / THUMBNAIL)
    rows, columns = (np.arange(max(1, int(side / factor)), dtype=np.float64) for side in shape)
    points = grid_points(affine.between(1 / factor, 1 / he_factor), None, rows, columns)
    inside = within(points, tissue.shape, 0.5)
    y, x = (
        np.rint(places[inside]).astype(int).clip(0, side - 1) for places, side in zip(points, tissue.shape, strict=True)
    )
    moved = np.zeros(inside.shape, bool)
    moved[inside] = tissue[y, x]
    return moved, factor
