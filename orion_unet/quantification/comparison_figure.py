"""Draws measured beside predicted cells: who is positive, how many, and how close together."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from orion_unet.inference.trust import MarkerTrust, verdict_mark
from orion_unet.quantification.comparison import Comparison, RegionRow
from orion_unet.text import for_figure

MOST_MARKERS, COLUMNS, PANELS = 24, 2, 3
# In inches: a panel, and the lines of text around it.
SIDE, TEXT = 1.55, 0.75
# So many bold letters lie between the edges of two panels.
TITLE_LETTERS = 28
DPI = 110
MEASURED_COLOUR, PREDICTED_COLOUR = "#222222", "#d9480f"


def draw_comparison(comparison: Comparison, trust: Mapping[str, MarkerTrust] | None = None) -> bytes:
    """A PNG with three panels for each of the first 24 markers with both cut-offs; ``trust`` as in the overview.

    The confusion matrix of all cells; the positive cells of each image, measured against predicted, as a density where
    the pixel size is known; and the share of positive cells whose nearest other positive cell is within a distance.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [name for name, found in comparison.markers.items() if found.confusion is not None][:MOST_MARKERS]
    across = min(COLUMNS, len(names))
    down = math.ceil(len(names) / across)
    wide, tall = PANELS * (SIDE + TEXT) + 0.3, SIDE + TEXT
    figure = Figure(figsize=(across * wide, down * tall + 0.2))
    FigureCanvasAgg(figure)
    width, height = figure.get_size_inches()
    for place, name in enumerate(names):
        row, column = divmod(place, across)
        rows = [found for found in comparison.rows if found.marker == name]
        panels = []
        for panel in range(PANELS):
            left = column * wide + 0.65 + panel * (SIDE + TEXT)
            top = 0.3 + row * tall
            panels.append(figure.add_axes((left / width, 1 - (top + SIDE) / height, SIDE / width, SIDE / height)))
        found = comparison.markers[name]
        assert found.confusion is not None
        mark = verdict_mark(name, trust)
        title = for_figure(name, TITLE_LETTERS - len(mark)) + mark
        _matrix(panels[0], found.confusion, title, found.scores["f1"])
        _counts(panels[1], rows)
        _distances(panels[2], rows, with_legend=place == 0)
    drawn = io.BytesIO()
    with warnings.catch_warnings():
        # Letters that the font lacks are drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(drawn, format="png", dpi=DPI)
    return drawn.getvalue()


def _number(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "-"


def _matrix(axes: Any, confusion: np.ndarray, title: str, f1: float) -> None:
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row in range(2):
        for column in range(2):
            text = f"{confusion[row, column]:,}\n{100 * shares[row, column]:.0f} %"
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color=colour)
    axes.set_xticks([0, 1], ["−", "+"])
    axes.set_yticks([0, 1], ["−", "+"])
    axes.tick_params(length=0, labelsize=8, pad=1)
    _named(axes, f"predicted (F1 {_number(f1)})", "measured")
    axes.set_title(title, fontsize=8.5, loc="left", pad=3, fontweight="bold")


def _counts(axes: Any, rows: Sequence[RegionRow]) -> None:
    in_mm = all(math.isfinite(row.area_mm2) for row in rows)
    measured, predicted = (
        np.array([getattr(row, side) / (row.area_mm2 if in_mm else 1) for row in rows])
        for side in ("measured", "predicted")
    )
    high = 1.08 * max(measured.max(initial=0), predicted.max(initial=0)) or 1.0
    axes.plot([0, high], [0, high], color="#bbbbbb", linewidth=0.8)
    axes.scatter(measured, predicted, s=9, color=PREDICTED_COLOUR, alpha=0.7, linewidths=0)
    axes.set_xlim(-0.03 * high, high)
    axes.set_ylim(-0.03 * high, high)
    axes.tick_params(labelsize=6.5, length=2, pad=1)
    axes.locator_params(nbins=4)
    _named(axes, "measured", "predicted")
    axes.set_title("positive per mm²" if in_mm else "positive per image", fontsize=8, loc="left", pad=3)


def _distances(axes: Any, rows: Sequence[RegionRow], with_legend: bool) -> None:
    in_um = all(math.isfinite(row.pixel_size_um) for row in rows)
    furthest = 0.0
    for side, colour in (("measured", MEASURED_COLOUR), ("predicted", PREDICTED_COLOUR)):
        parts = [getattr(row, f"{side}_nearest") * (row.pixel_size_um if in_um else 1) for row in rows]
        values = np.sort(np.concatenate(parts))
        if len(values):
            axes.step(values, (np.arange(len(values)) + 1) / len(values), color=colour, linewidth=1.1, label=side)
            furthest = max(furthest, float(np.quantile(values, 0.98)))
    axes.set_xlim(0, furthest or 1)
    axes.set_ylim(0, 1)
    axes.tick_params(labelsize=6.5, length=2, pad=1)
    axes.locator_params(nbins=4)
    _named(axes, f"nearest positive [{'µm' if in_um else 'pixels'}]", "")
    axes.set_title("share of positive cells", fontsize=8, loc="left", pad=3)
    if with_legend and furthest:
        axes.legend(fontsize=7, frameon=False, loc="lower right", handlelength=1.2)


def _named(axes: Any, x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=7, labelpad=1)
    axes.set_ylabel(y, fontsize=7, labelpad=1)
