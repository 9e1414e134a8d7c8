"""Reads the markers of an OME-Zarr image (NGFF 0.4 and 0.5: https://ngff.openmicroscopy.org) by region."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from orion_unet.errors import InputError
from orion_unet.slides.markers import MarkerImage
from orion_unet.slides.pixel_size import UNKNOWN_PIXEL_SIZE, PixelSize, square_pixel
from orion_unet.slides.tiff import LOOSE

UNITS_UM = {"micrometer": 1.0, "nanometer": 1e-3, "millimeter": 1e3, "centimeter": 1e4, "meter": 1e6}


class ZarrMarkers(MarkerImage):
    """One level of an OME-Zarr image with the axes c, y, x; others must have one position."""

    def __init__(
        self,
        path: Path,
        array: Any,
        axes: str,
        names: Sequence[str] = (),
        pixel_size: PixelSize = UNKNOWN_PIXEL_SIZE,
        levels: Sequence[Any] = (),
    ) -> None:
        sides = dict(zip(axes, array.shape, strict=True))
        if any(side > 1 for axis, side in sides.items() if axis not in "cyx"):
            raise InputError(f"{path}: has axes {axes} of shape {array.shape}; markers are one plane per channel")
        super().__init__(path, (sides.get("c", 1), sides["y"], sides["x"]), array.dtype, names, pixel_size)
        self._array, self._axes, self._levels = array, axes, levels

    def read(self, channels: Sequence[int], y: int, x: int, height: int, width: int) -> np.ndarray:
        where = {"y": slice(y, y + height), "x": slice(x, x + width)}
        region = np.empty((len(channels), height, width), self.dtype)
        try:
            for place, channel in enumerate(channels):
                index = tuple({**where, "c": channel}.get(axis, 0) for axis in self._axes)
                region[place] = self._array[index]
        except Exception as error:
            # On damaged chunks a decoder can raise almost anything.
            where_it_is = f"level {self._array.name.strip('/')}, row {y}, column {x}"
            raise InputError(f"{self.path}: is damaged at {where_it_is} ({error})") from None
        return region

    def nearest_level(self, factor: float) -> MarkerImage:
        fitting = [
            array for array in self._levels if self.shape[1] / array.shape[self._axes.index("y")] <= factor * LOOSE
        ]
        return ZarrMarkers(self.path, fitting[-1], self._axes) if fitting else self


def open_marker_zarr(path: Path) -> MarkerImage:
    """Open the markers of an OME-Zarr folder; raises InputError if it is damaged or no image."""
    import zarr

    try:
        group: Any = zarr.open_group(str(path), mode="r")
        attributes: Any = dict(group.attrs)
        attributes = attributes.get("ome", attributes)
        multiscale = attributes["multiscales"][0]
        axes = "".join(axis["name"] for axis in multiscale["axes"])
        datasets = multiscale["datasets"]
        arrays = [group[dataset["path"]] for dataset in datasets]
        sides = _sides_um(multiscale, datasets[0])
        channels = (attributes.get("omero") or {}).get("channels") or []
        names = [str(channel.get("label") or "").strip() for channel in channels]
    except Exception as error:
        # Metadata of unknown origin can lack anything.
        raise InputError(f"{path}: is damaged or no OME-Zarr image ({type(error).__name__}: {error})") from None
    if not {"y", "x"} <= set(axes):
        raise InputError(f"{path}: has axes {axes}; an image has y and x")
    if len(names) != dict(zip(axes, arrays[0].shape, strict=True)).get("c", 1) or not all(names):
        names = []
    return ZarrMarkers(path, arrays[0], axes, names, square_pixel(*sides), arrays[1:])


def _sides_um(multiscale: dict[str, Any], dataset: dict[str, Any]) -> tuple[float | None, float | None]:
    """Side of a pixel across and down, None where no unit of length is stated."""
    scales = [t["scale"] for t in dataset.get("coordinateTransformations", ()) if t.get("type") == "scale"]
    found: dict[str, float | None] = {"x": None, "y": None}
    if scales:
        for axis, scale in zip(multiscale["axes"], scales[0], strict=True):
            unit = UNITS_UM.get(axis.get("unit", ""))
            if axis["name"] in found and unit is not None:
                found[axis["name"]] = float(scale) * unit
    return found["x"], found["y"]
