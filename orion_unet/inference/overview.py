"""Draws an overview PNG: thumbnails of the H&E and of every predicted marker."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from orion_unet.errors import RunError
from orion_unet.run_log import write_atomic
from orion_unet.text import clean

# Longest side of a thumbnail, and rows averaged for each of its pixels: not all are needed for a picture.
LONGEST_SIDE, ROWS_PER_BOX = 1000, 4
BAND_PIXELS = 1 << 21
# A marker is shown from 0 to this quantile of its values, and never over less than the smallest range: a marker
# that was predicted nearly empty must look so.
DISPLAY_QUANTILE, SMALLEST_RANGE = 0.998, 0.05
MOST_MARKERS = 60
# Widest and tallest figure, tallest cell; margins, gap between cells and the line of text over each. In inches.
WIDTH, HEIGHT, TALLEST_CELL = 22.0, 12.0, 4.0
MARGIN, GAP, TITLE = 0.08, 0.06, 0.24
DPI = 90
FONT_SIZE = 9
LETTER_INCHES = 0.62 * FONT_SIZE / 72
# The scale bar is the longest round length of at most this share of the H&E's width.
BAR_SHARE = 0.25


def box_size(shape: tuple[int, int]) -> int:
    """Side of the boxes, in pixels, that bring an image (H, W) down to a thumbnail."""
    return max(1, -(-max(shape) // LONGEST_SIDE))


def thumbnail(read: Callable[[slice], np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """Means over boxes, (h, w, ...) float32, of an image that ``read`` returns by rows, (n, W, ...).

    Rows and columns beyond the last whole box are left out, unless the image is smaller than a box.
    """
    high, wide = (min(box_size(shape), side) for side in shape)
    rows, columns = shape[0] // high, shape[1] // wide
    at_once = max(1, BAND_PIXELS // (high * shape[1]))
    bands = []
    for row in range(0, rows, at_once):
        count = min(at_once, rows - row)
        band = read(slice(row * high, (row + count) * high))[:, : columns * wide]
        boxes = band.reshape(count, high, columns, wide, *band.shape[2:])
        bands.append(boxes[:, :: max(1, high // ROWS_PER_BOX)].mean(axis=(1, 3), dtype=np.float32))
    return np.concatenate(bands)


def write_overview(
    path: Path,
    he: np.ndarray,
    image: np.ndarray,
    names: Sequence[str],
    *,
    pixel_size_um: float | None = None,
    title: str = "H&E",
) -> None:
    """Draw the H&E (h, w, 3) in [0, 1] beside its markers (C, h, w) in [0, 1] and write it as PNG, atomically.

    Both are thumbnails, and ``pixel_size_um`` is the side of a *thumbnail's* pixel in micrometres: with it a scale
    bar is drawn. Each marker is shown from 0 to its 99.8 % quantile (at least 0.05), which its title states; of
    more than 60 markers the first 60 are shown. Raises RunError where the file cannot be written.
    """
    figure = _draw(he, image[:MOST_MARKERS], names[:MOST_MARKERS], pixel_size_um, title)
    drawn = io.BytesIO()
    with warnings.catch_warnings():
        # Letters that the font lacks are drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(drawn, format="png", dpi=DPI)
    try:
        write_atomic(path, drawn.getvalue(), durable=False)
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror or error})") from error


def _draw(
    he: np.ndarray, image: np.ndarray, names: Sequence[str], pixel_size_um: float | None, title: str = "H&E"
) -> Any:
    # Imported here, because matplotlib would delay the message about a wrong option.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    aspect = he.shape[1] / he.shape[0]
    layout = Layout.of(len(image), aspect)
    wide, tall = layout.cell_height * aspect, layout.cell_height
    width = 2 * MARGIN + layout.columns * (wide + GAP) - GAP
    height = 2 * MARGIN + layout.rows * (tall + TITLE + GAP) - GAP
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)

    def axes_at(row: int, column: int, wide: float, tall: float) -> Any:
        left = MARGIN + column * (layout.cell_height * aspect + GAP)
        top = MARGIN + TITLE + row * (layout.cell_height + TITLE + GAP)
        return figure.add_axes((left / width, 1 - (top + tall) / height, wide / width, tall / height))

    stain_width = layout.block * (wide + GAP) - GAP
    stain = axes_at(0, 0, stain_width, stain_width / aspect)
    _show(stain, np.clip(he, 0, 1), title_within(title, "", stain_width), stain_width)
    if pixel_size_um:
        _scale_bar(stain, he.shape, pixel_size_um, stain_width)
    for place, marker, name in zip(layout.places(), image, names, strict=False):
        high = max(SMALLEST_RANGE, float(np.quantile(marker, DISPLAY_QUANTILE)))
        _show(axes_at(*place, wide, tall), marker, title_within(name, f"  0–{high:.2f}", wide), wide, high)
    return figure


class Layout(NamedTuple):
    """A grid of equal cells; the H&E takes ``block`` x ``block`` of them at the upper left, the markers the others."""

    block: int
    rows: int
    columns: int
    cell_height: float

    @classmethod
    def of(cls, count: int, aspect: float) -> Layout:
        """The layout in which so many markers of a width-to-height ratio are drawn largest, and with fewest gaps."""
        block = next(block for block, most in ((1, 3), (2, 30), (3, MOST_MARKERS)) if count <= most)
        layouts = []
        for columns in range(block, count + block * block + 1):
            rows = max(block, math.ceil((count + block * block) / columns))
            tall = (HEIGHT - 2 * MARGIN + GAP) / rows - TITLE - GAP
            wide = (WIDTH - 2 * MARGIN + GAP) / columns - GAP
            layouts.append(cls(block, rows, columns, min(TALLEST_CELL, tall, wide / aspect)))
        return max(layouts, key=lambda layout: (layout.cell_height, -layout.rows * layout.columns, -layout.rows))

    def places(self) -> Iterator[tuple[int, int]]:
        """Row and column of the markers, row by row, around the H&E."""
        for row in range(self.rows):
            for column in range(self.columns):
                if row >= self.block or column >= self.block:
                    yield row, column


def title_within(name: str, ending: str, inches: float) -> str:
    """The name, cut with an ellipsis where it and its ending would be wider than its image."""
    return clean(name, max(3, int(inches / LETTER_INCHES) - len(ending))) + ending


def _show(axes: Any, image: np.ndarray, title: str, inches: float, high: float | None = None) -> None:
    # Averages where there are more pixels than can be drawn, and keeps their squares where there are fewer.
    axes.imshow(image, aspect="auto", interpolation="auto", cmap="inferno", vmin=0, vmax=high)
    # Over an image too narrow for any text there is none.
    if inches > 0.3:
        axes.set_title(title, fontsize=FONT_SIZE, pad=3, loc="left", parse_math=False)
    axes.set_xticks([])
    axes.set_yticks([])


def bar_length(width_um: float) -> float:
    """The longest of 1, 2 and 5 times a power of ten, in micrometres, that is at most BAR_SHARE of the width."""
    longest = BAR_SHARE * width_um
    power = 10.0 ** math.floor(math.log10(longest))
    return next(factor * power for factor in (5.0, 2.0, 1.0) if factor * power <= longest)


def _scale_bar(axes: Any, shape: Sequence[int], pixel_size_um: float, inches: float) -> None:
    from matplotlib.patches import Rectangle

    length = bar_length(shape[1] * pixel_size_um)
    text = f"{length / 1000:g} mm" if length >= 1000 else f"{length:g} µm"
    # In pixels of the thumbnail: a text's line, and the bar's thickness.
    pixel = shape[1] / inches
    line, thick, pad = 0.16 * pixel, 0.05 * pixel, 0.07 * pixel
    wide = max(length / pixel_size_um, len(text) * LETTER_INCHES * pixel)
    top = shape[0] - 0.5 - line - thick - 3 * pad
    axes.add_patch(
        Rectangle((-0.5, top), wide + 2 * pad, line + thick + 3 * pad, facecolor="white", alpha=0.8, linewidth=0)
    )
    axes.add_patch(
        Rectangle((pad - 0.5, top + 2 * pad + line), length / pixel_size_um, thick, facecolor="black", linewidth=0)
    )
    axes.text(pad - 0.5, top + pad + line / 2, text, fontsize=FONT_SIZE, va="center", parse_math=False)
