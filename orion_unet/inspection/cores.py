"""Measures one core, from all of its H&E, some rows of its markers, and one window of its nuclear marker."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from orion_unet.data.pairs import PairTable
from orion_unet.data.scale import Scales
from orion_unet.data.tissue import tissue_fraction
from orion_unet.registration.shift import WINDOW, Registration, register
from orion_unet.registration.stains import haematoxylin

# Sides of the picture on the contact sheet, and of the thumbnails that duplicates are found by.
THUMBNAIL, DESCRIPTOR = 128, 32


@dataclass(frozen=True)
class CoreView:
    """What was measured in one core.

    ``tissue`` is the share of pixels that are not glass, ``he_level`` the brightness in [0, 1] that 1 % of the H&E
    exceeds, ``digest`` a hash of the stored H&E pixels, ``constant`` the channels with a single value in the sample,
    ``thumbnail`` (32, 32) float32 the darkness of the H&E. ``registration`` is None if no nuclear marker is known, or
    it was not measured here. ``panel`` is empty where panels do not differ.
    """

    name: str
    group: str
    height: int
    width: int
    tissue: float
    he_level: float
    digest: str
    constant: tuple[str, ...]
    registration: Registration | None
    thumbnail: np.ndarray
    panel: str = ""


def view_core(
    table: PairTable, scales: Scales, core: int, group: str, nuclear: int | None, sample: np.ndarray
) -> CoreView:
    """Measure one core. ``sample`` (C, N) are intensities of the kept channels, ``nuclear`` indexes all channels."""
    # Of tiles, all are decoded here, once.
    he = np.asarray(table.open(core, "he"))
    row = table.he[core]
    layout = str(row["layout"])
    white = scales.white("he", he.dtype)
    picture = _picture(_channels_last(he, layout), white, THUMBNAIL)
    registration = None
    nuclear = -1 if nuclear is None else int(table.places(core)[nuclear])
    if nuclear >= 0:
        top, left = _densest_window(he, layout, white)
        density = haematoxylin(_channels_last(he, layout)[top : top + WINDOW, left : left + WINDOW] / np.float32(white))
        orion = table.image(core, "orion")
        marker = orion[top : top + WINDOW, left : left + WINDOW, nuclear : nuclear + 1][..., 0].astype(np.float32)
        registration = register(density, marker)
    return CoreView(
        name=str(table.names[core]),
        group=group,
        height=int(row["height"]),
        width=int(row["width"]),
        tissue=tissue_fraction(he, layout, white),
        he_level=float(np.quantile(picture.mean(axis=2), 0.99)),
        digest=_digest(he),
        constant=tuple(
            name
            for name, values, measured in zip(table.kept_names, sample, table.measured_in(core), strict=True)
            if measured and np.ptp(values) == 0
        ),
        registration=registration,
        thumbnail=block_means(1 - picture.mean(axis=2), DESCRIPTOR, DESCRIPTOR),
        panel="" if table.panels is None else table.panels.of_core[core],
    )


def sample_rows(table: PairTable, scales: Scales, core: int, pixels: int) -> np.ndarray:
    """Intensities (C, R, W) float32 of the kept channels on as many rows, evenly spaced, as have ``pixels`` pixels.

    A memory map reads whole rows in one piece, in either axis order.
    """
    return marker_rows(table, scales, core, list(table.kept_channels), -(-pixels // int(table.orion[core]["width"])))


def thinned(rows: np.ndarray, pixels: int) -> np.ndarray:
    """Pixels (C, N) of rows (C, R, W), about ``pixels`` of them, evenly spaced."""
    flat = rows.reshape(len(rows), -1)
    return flat[:, np.arange(min(pixels, flat.shape[1])) * flat.shape[1] // min(pixels, flat.shape[1])]


def marker_rows(table: PairTable, scales: Scales, core: int, channels: list[int], count: int) -> np.ndarray:
    """Intensities (C, R, W) float32 of channels on up to ``count`` rows, evenly spaced over the core."""
    height = table.shape(core, "orion")[0]
    count = max(1, min(count, height))
    rows = (np.arange(count) + 0.5) * height / count
    values = table.marker_rows(core, rows.astype(int), channels)
    return values.astype(np.float32) / np.float32(scales.white("orion", values.dtype))


def he_thumbnail(table: PairTable, scales: Scales, core: int, side: int) -> np.ndarray:
    """The H&E (h, w, 3) float32 in [0, 1], block means, its longer side at most ``side`` pixels."""
    image = np.asarray(table.image(core, "he"))
    return _picture(image, scales.white("he", image.dtype), side)


def _picture(image: np.ndarray, white: float, side: int) -> np.ndarray:
    return np.clip(_smaller(image, side) / white, 0, 1)


def marker_thumbnail(table: PairTable, scales: Scales, core: int, channel: int, side: int) -> np.ndarray:
    """One channel (h, w) float32, intensities, its longer side at most ``side``: means over parts of rows."""
    row = table.orion[core]
    step = -(-max(int(row["height"]), int(row["width"])) // side)
    rows = marker_rows(table, scales, core, [channel], int(row["height"]) // step)[0]
    return block_means(rows, len(rows), max(1, int(row["width"]) // step))


def _smaller(image: np.ndarray, side: int) -> np.ndarray:
    step = -(-max(image.shape[:2]) // side)
    return block_means(image, *(max(1, length // step) for length in image.shape[:2]))


def block_means(image: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Means (rows, columns, ...) float32 over blocks of an image (H, W, ...); along a side with fewer pixels than
    blocks, the pixel that each block starts in."""
    for axis, parts in enumerate((rows, columns)):
        if parts > image.shape[axis]:
            image = image.take(np.arange(parts) * image.shape[axis] // parts, axis).astype(np.float32)
            continue
        edges = np.linspace(0, image.shape[axis], parts + 1).astype(int)
        shape = [-1 if each == axis else 1 for each in range(image.ndim)]
        sums = np.add.reduceat(image, edges[:-1], axis=axis, dtype=np.float32)
        image = sums / np.diff(edges).reshape(shape).astype(np.float32)
    return image


def _channels_last(stored: np.ndarray, layout: str) -> np.ndarray:
    return stored if layout == "hwc" else stored.transpose(1, 2, 0)


def _densest_window(he: np.ndarray, layout: str, white: float) -> tuple[int, int]:
    """Upper left corner of the window with most tissue, among 3 x 3 windows spread over the core."""
    image = _channels_last(he, layout)
    # The middle comes first: it wins among equal windows.
    corners = [
        (int(down * max(0, image.shape[0] - WINDOW)), int(right * max(0, image.shape[1] - WINDOW)))
        for down in (0.5, 0.0, 1.0)
        for right in (0.5, 0.0, 1.0)
    ]
    return max(
        corners,
        key=lambda at: tissue_fraction(image[at[0] : at[0] + WINDOW, at[1] : at[1] + WINDOW], "hwc", white),
    )


def _digest(he: np.ndarray) -> str:
    return hashlib.blake2b(np.ascontiguousarray(he).data, digest_size=16).hexdigest()
