"""The heat map of validation Pearson: a row per marker, best at the top, a column per epoch."""

from __future__ import annotations

from typing import Any

import numpy as np

from orion_unet.monitor.report import Report
from orion_unet.text import for_figure

MAX_MARKERS = 40


def draw_markers(figure: Any, axes: Any, report: Report) -> None:
    """Fill the axes with the heat map, its labels in the room at their left and its colour bar underneath."""
    from matplotlib.image import AxesImage
    from matplotlib.transforms import Bbox

    epochs, values = report.reader.channels.pearson()
    names = report.reader.channels.names
    axes.set_title("Validation Pearson per marker", fontsize=11, loc="left")
    axes.set_xlabel("epoch")
    if not names or not len(epochs):
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no markers in the log", transform=axes.transAxes, ha="center", color="#777777")
        return
    newest = np.where(np.isfinite(values[:, -1]), values[:, -1], -2)
    order = np.argsort(-newest, kind="stable")
    left_out = len(order) - MAX_MARKERS
    if left_out > 0:
        order = np.concatenate([order[: MAX_MARKERS // 2], order[-MAX_MARKERS // 2 :]])
        title = f"Validation Pearson, best and worst markers\n({left_out} between them left out)"
        axes.set_title(title, fontsize=11, loc="left")
    shown = values[order]
    # From 0 or, where a marker lies lower, from the next fifth under it.
    lowest = min(0.0, float(np.floor(5 * np.nanmin(shown)) / 5)) if np.isfinite(shown).any() else 0.0
    axes.set_facecolor("#dddddd")
    # One column an epoch, as wide as the epochs it stands for where a long log is thinned.
    step = float(np.median(np.diff(epochs))) if len(epochs) > 1 else 1.0
    image = AxesImage(axes, cmap="viridis", interpolation="nearest", origin="upper")
    image.set_data(np.ma.masked_invalid(shown))
    image.set_clim(lowest, 1)
    left, right = epochs[0] - step / 2, epochs[-1] + step / 2
    image.set_extent((left, right, len(order) - 0.5, -0.5))
    image.set_clip_path(axes.patch)
    axes.add_image(image)
    axes.set_xlim(left, right)
    axes.set_ylim(len(order) - 0.5, -0.5)
    size = 9 if len(order) <= 24 else 7
    labels = [f"{for_figure(names[at], 18)}  {_two(values[at, -1])}" for at in order]
    axes.set_yticks(range(len(order)), labels, fontsize=size)
    axes.tick_params(axis="y", length=0)
    whole_epochs(axes)
    if left_out > 0:
        axes.axhline(MAX_MARKERS // 2 - 0.5, color="white", linewidth=2)
    room = axes.get_position()
    widest = max(len(label) for label in labels)
    shift = min(0.0048 * widest * size / 9 + 0.005, 0.6 * room.width)
    axes.set_position(Bbox.from_extents(room.x0 - 0.02 + shift, room.y0 + 0.055, room.x1, room.y1))
    axes.xaxis.labelpad = 2
    bar = figure.add_axes((room.x0 - 0.02 + shift, room.y0 - 0.005, room.x1 - room.x0 + 0.02 - shift, 0.012))
    colours = figure.colorbar(image, cax=bar, orientation="horizontal")
    colours.set_label("Pearson r; grey: none", fontsize=9, labelpad=1)
    bar.tick_params(labelsize=8)


def whole_epochs(axes: Any) -> None:
    """Ticks at whole epochs."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, steps=[1, 2, 5, 10], min_n_ticks=1))


def _two(value: float) -> str:
    return f"{value:.2f}" if np.isfinite(value) else "-"
