"""Draws the markers of an image, each with its positive cells."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from orion_unet.inference.overview import DISPLAY_QUANTILE, DPI, FONT_SIZE, GAP, MARGIN, TITLE, WIDTH, title_within
from orion_unet.inference.trust import MarkerTrust, verdict_mark
from orion_unet.quantification.cells import ImageCells
from orion_unet.quantification.measure import ToUnit
from orion_unet.quantification.positives import Positives
from orion_unet.slides.intensity import WHITE, declared_white
from orion_unet.slides.markers import MarkerImage
from orion_unet.slides.thumbnails import marker_thumbnail

LONGEST_SIDE, MOST_MARKERS = 1000, 60
# A marker without a known range is shown from 0 to its 99.8 % quantile, and never over less than this part of full
# intensity: an empty marker must look empty.
SMALLEST_RANGE = 0.05
WIDEST_CELL, MOST_COLUMNS = 4.0, 7
RING_COLOUR = "#30e0ff"


def draw_positives(
    image: MarkerImage,
    cells: ImageCells,
    names: Sequence[str],
    positives: Positives,
    to_unit: ToUnit | None,
    trust: Mapping[str, MarkerTrust] | None = None,
) -> bytes:
    """A PNG with one panel a marker, the first 60 of them. With ``to_unit`` a marker that has a range of training is
    shown from 0 to 1, the same in every image; each positive cell has a ring around its centre. With ``trust`` a
    marker that is not supported has its verdict beside its name.

    Raises InputError where the image is damaged.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = names[:MOST_MARKERS]
    thumbnail = marker_thumbnail(image, range(len(shown)), LONGEST_SIDE)
    pixels = np.moveaxis(thumbnail.pixels, -1, 0)
    aspect = pixels.shape[2] / pixels.shape[1]
    columns = min(MOST_COLUMNS, max(1, math.ceil(math.sqrt(len(shown) / aspect))))
    rows = -(-len(shown) // columns)
    wide = min(WIDEST_CELL, (WIDTH - 2 * MARGIN + GAP) / columns - GAP)
    tall = wide / aspect
    width, height = 2 * MARGIN + columns * (wide + GAP) - GAP, 2 * MARGIN + rows * (tall + TITLE + GAP) - GAP
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    called = positives.called(names, cells.means)
    # The centres in pixels of the thumbnail.
    y, x = ((centre + 0.5) / thumbnail.factor - 0.5 for centre in (cells.geometry.y, cells.geometry.x))
    radius = max(1.0, math.sqrt(float(np.median(cells.geometry.area)) / math.pi) / thumbnail.factor)
    # Areas of marks are in square points.
    size = (2 * radius * wide / pixels.shape[2] * 72) ** 2
    for place, (name, marker) in enumerate(zip(shown, pixels, strict=True)):
        row, column = divmod(place, columns)
        left, top = MARGIN + column * (wide + GAP), MARGIN + TITLE + row * (tall + TITLE + GAP)
        axes = figure.add_axes((left / width, 1 - (top + tall) / height, wide / width, tall / height))
        values, high = _displayed(marker, image, place, to_unit)
        axes.imshow(values, aspect="auto", interpolation="auto", cmap="gray", vmin=0, vmax=high)
        ending = f"  0–{high:,.0f}" if high >= 100 else f"  0–{high:.3g}"
        if name in called:
            flags = called[name]
            ending += f", {int(flags.sum()):,} of {len(flags):,} positive"
            axes.scatter(
                x[flags], y[flags], s=size, facecolors="none", edgecolors=RING_COLOUR, linewidths=0.6, marker="o"
            )
        _frame(axes, pixels.shape[1:], title_within(name, verdict_mark(name, trust) + ending, wide))
    drawn = io.BytesIO()
    with warnings.catch_warnings():
        # Letters that the font lacks are drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(drawn, format="png", dpi=DPI)
    return drawn.getvalue()


def _displayed(
    marker: np.ndarray, image: MarkerImage, channel: int, to_unit: ToUnit | None
) -> tuple[np.ndarray, float]:
    """The values to show, and the highest one of the scale."""
    if to_unit is not None:
        values = to_unit(marker, channel)
        if np.isfinite(values).any():
            return values, 1.0
    white = WHITE.get(image.dtype.name) or declared_white(float(np.nanmax(marker, initial=0)), "orion")
    return marker, max(SMALLEST_RANGE * white, float(np.nanquantile(marker, DISPLAY_QUANTILE)))


def _frame(axes: Any, shape: Sequence[int], title: str) -> None:
    axes.set_xlim(-0.5, shape[1] - 0.5)
    axes.set_ylim(shape[0] - 0.5, -0.5)
    axes.set_title(title, fontsize=FONT_SIZE, pad=3, loc="left", parse_math=False)
    axes.set_xticks([])
    axes.set_yticks([])
