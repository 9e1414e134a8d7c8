"""Reads the markers of an OME-Zarr image (NGFF 0.4 and 0.5: https://ngff.openmicroscopy.org) by region."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from orion_unet.errors import InputError, RunError
from orion_unet.slides.markers import MarkerImage
from orion_unet.slides.pixel_size import UNKNOWN_PIXEL_SIZE, PixelSize, square_pixel
from orion_unet.slides.remote import RemotePath
from orion_unet.slides.tiff import LOOSE
from orion_unet.slides.tiles import TiledArray
from orion_unet.slides.zarr_tiles import ZarrTiles

UNITS_UM = {"micrometer": 1.0, "nanometer": 1e-3, "millimeter": 1e3, "centimeter": 1e4, "meter": 1e6}


class ZarrMarkers(MarkerImage):
    """One level of an OME-Zarr image with the axes c, y, x."""

    def __init__(
        self,
        tiles: ZarrTiles,
        names: Sequence[str] = (),
        pixel_size: PixelSize = UNKNOWN_PIXEL_SIZE,
        levels: Sequence[ZarrTiles] = (),
    ) -> None:
        super().__init__(tiles.path, (tiles.channels, *tiles.shape), tiles.dtype, names, pixel_size)
        self._array, self._levels = TiledArray(tiles, "chw"), levels

    def read(self, channels: Sequence[int], y: int, x: int, height: int, width: int) -> np.ndarray:
        region = self._array.read(y, x, height, width, channels)
        return np.ascontiguousarray(region.transpose(2, 0, 1))

    def nearest_level(self, factor: float) -> MarkerImage:
        fitting = [tiles for tiles in self._levels if self.shape[1] / tiles.shape[0] <= factor * LOOSE]
        return ZarrMarkers(fitting[-1]) if fitting else self


class ZarrImage(NamedTuple):
    """What an OME-Zarr folder says of itself: its arrays, the largest first, their axes, names, and a pixel's size."""

    arrays: list[Any]
    axes: str
    names: list[str]
    pixel_size: PixelSize


def open_marker_zarr(path: Path) -> MarkerImage:
    """Open the markers of an OME-Zarr folder; raises InputError if it is damaged or no image."""
    image = zarr_image(path)
    tiles, *levels = [zarr_tiles(path, image, level) for level in range(len(image.arrays))]
    return ZarrMarkers(tiles, image.names, image.pixel_size, levels)


def zarr_tiles(path: Path, image: ZarrImage, level: int) -> ZarrTiles:
    """The chunks of a level; raises InputError if they cannot be used."""
    try:
        return ZarrTiles(path, image.arrays[level], image.axes, level)
    except (InputError, RunError):
        raise
    except Exception as error:
        raise InputError(f"{path}: level {level} is damaged ({type(error).__name__}: {error})") from None


def zarr_image(path: Path) -> ZarrImage:
    """Read the metadata of an OME-Zarr folder; raises InputError if it is damaged or no image of y and x and at most
    one other axis of several positions, that of the channels."""
    import zarr

    try:
        group: Any = zarr.open_group(_store(path), mode="r")
        attributes: Any = dict(group.attrs)
        attributes = attributes.get("ome", attributes)
        multiscale = attributes["multiscales"][0]
        axes = "".join(axis["name"] for axis in multiscale["axes"])
        datasets = multiscale["datasets"]
    except (InputError, RunError):
        # Those of a store that does not give its objects.
        raise
    except Exception as error:
        # Metadata of unknown origin can lack anything.
        raise InputError(f"{path}: is damaged or no OME-Zarr image ({type(error).__name__}: {error})") from None
    arrays = [_array(path, group, dataset, level) for level, dataset in enumerate(datasets)]
    try:
        pixel_size = square_pixel(*_sides_um(multiscale, datasets[0]))
        channels = (attributes.get("omero") or {}).get("channels") or []
        names = [str(channel.get("label") or "").strip() for channel in channels]
        sides = dict(zip(axes, arrays[0].shape, strict=True))
    except Exception as error:
        raise InputError(f"{path}: is damaged or no OME-Zarr image ({type(error).__name__}: {error})") from None
    if not {"y", "x"} <= set(axes):
        raise InputError(f"{path}: has axes {axes}; an image has y and x")
    if any(side > 1 for axis, side in sides.items() if axis not in "cyx"):
        raise InputError(f"{path}: has axes {axes} of shape {arrays[0].shape}; markers are one plane per channel")
    if len(names) != sides.get("c", 1) or not all(names):
        names = []
    return ZarrImage(arrays, axes, names, pixel_size)


def _store(path: Path) -> Any:
    """What zarr opens; raises InputError where a store has no such folder."""
    if not isinstance(path, RemotePath):
        return str(path)
    # Only now: it imports zarr.
    from orion_unet.slides.zarr_store import RemoteStore

    try:
        return RemoteStore(path)
    except FileNotFoundError:
        raise InputError(f"{path}: cannot be read (no such folder)") from None


def _array(path: Path, group: Any, dataset: dict[str, Any], level: int) -> Any:
    name = dataset.get("path")
    try:
        return group[name]
    except KeyError:
        raise InputError(
            f"{path}: lacks the array {name} of level {level}, which its metadata lists; copy it again"
        ) from None
    except (InputError, RunError):
        raise
    except Exception as error:
        kind, reason = type(error).__name__, str(error).splitlines()[0] if str(error) else ""
        if "codec" in f"{kind} {reason}".lower():
            raise InputError(
                f"{path}: level {level} is compressed with a codec that is not installed ({reason}): update the "
                "readers with pip install -U zarr numcodecs, or save the image with zstd or blosc"
            ) from None
        raise InputError(f"{path}: level {level} is damaged or no OME-Zarr image ({kind}: {reason})") from None


def _sides_um(multiscale: dict[str, Any], dataset: dict[str, Any]) -> tuple[float | None, float | None]:
    """Side of a pixel across and down, None where no unit of length is stated."""
    # The transformations of the whole pyramid come after those of its levels.
    steps = [*dataset.get("coordinateTransformations", ()), *multiscale.get("coordinateTransformations", ())]
    scales = [step["scale"] for step in steps if step.get("type") == "scale"]
    found: dict[str, float | None] = {"x": None, "y": None}
    if scales:
        for axis, *along in zip(multiscale["axes"], *scales, strict=True):
            unit = UNITS_UM.get(axis.get("unit", ""))
            if axis["name"] in found and unit is not None:
                found[axis["name"]] = math.prod(float(scale) for scale in along) * unit
    return found["x"], found["y"]
