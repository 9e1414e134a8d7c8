"""Contact sheets: every core, its H&E above one marker, 48 cores to a page."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from orion_unet.data.scale import Progress, no_progress
from orion_unet.errors import RunError
from orion_unet.inspection.check import Inspection
from orion_unet.inspection.cores import THUMBNAIL, he_thumbnail, marker_thumbnail
from orion_unet.inspection.findings import remark
from orion_unet.run_log import write_atomic
from orion_unet.text import for_figure

PER_PAGE, COLUMNS = 48, 12
# Inches: side of a picture, gap, the two lines of text above each core, and the title.
SIDE, GAP, TEXT, TITLE = 1.35, 0.07, 0.34, 0.38
DPI = 110
LETTERS = 19


def write_contact_sheets(inspection: Inspection, folder: Path, progress: Progress = no_progress) -> list[Path]:
    """Draw contact_sheet_01.png and so on into an existing folder; returns their paths. Raises RunError.

    The marker is shown from 0 to its 99.9 % quantile, the same range for all cores, so that cores can be compared.
    Names are red where the registration has a warning, or there is less than 5 % tissue.
    """
    total = len(inspection.cores)
    pages = math.ceil(total / PER_PAGE)
    step = progress(pages, "drawing contact sheets")
    paths = []
    for page in range(pages):
        cores = range(page * PER_PAGE, min(total, (page + 1) * PER_PAGE))
        title = f", page {page + 1} of {pages}" if pages > 1 else ""
        drawn = io.BytesIO()
        _draw(inspection, cores, title).savefig(drawn, format="png", dpi=DPI)
        paths.append(folder / f"contact_sheet_{page + 1:02d}.png")
        try:
            write_atomic(paths[-1], drawn.getvalue(), durable=False)
        except OSError as error:
            raise RunError(f"{paths[-1]}: cannot be written ({error.strerror or error})") from error
        step()
    return paths


def _draw(inspection: Inspection, cores: range, page: str) -> Figure:
    folder = inspection.table.folder
    row = next(row for row in inspection.channels if row.name == inspection.marker)
    # A marker whose 99.9 % quantile is its median is shown up to its maximum; one without signal is black.
    high = row.quantiles[-1] if row.quantiles[-1] > row.quantiles[1] else max(row.high, 1e-6)
    # The page is about 1.5 times as wide as high; the columns are as few as these rows allow, to fill the last row.
    rows = math.ceil(len(cores) / min(COLUMNS, math.ceil(math.sqrt(3.3 * len(cores)))))
    columns = math.ceil(len(cores) / rows)
    block = TEXT + 2 * SIDE + 2 * GAP
    width = max(GAP + columns * (SIDE + GAP), 5.0)
    height = TITLE + rows * block + GAP
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    title = (
        f"{for_figure(folder.resolve().name, 60)}: H&E above {for_figure(inspection.marker, 30)}, 0–{high:.3g}{page}"
    )
    if any(remark(inspection.cores[core]) for core in cores):
        title += " (red: see the warnings)"
    figure.text(GAP / width, 1 - 0.09 / height, title, fontsize=11, va="top")
    channel = inspection.table.channel_names.index(inspection.marker)
    lacking = inspection.table.lacking(channel)
    for place, core in enumerate(cores):
        down, right = divmod(place, columns)
        left, top = GAP + right * (SIDE + GAP), TITLE + down * block
        view = inspection.cores[core]
        figure.text(
            left / width,
            1 - (top + TEXT - 0.04) / height,
            f"{for_figure(view.name, LETTERS)}\n{for_figure(view.group, LETTERS) if view.group != view.name else ''}",
            fontsize=7,
            va="bottom",
            linespacing=1.15,
            color="#b00020" if remark(view) else "black",
        )
        marker = marker_thumbnail(inspection.table, inspection.scales, core, channel, THUMBNAIL)
        pictures: tuple[tuple[np.ndarray, dict[str, Any]], ...] = (
            (he_thumbnail(inspection.table, inspection.scales, core, THUMBNAIL), {}),
            (marker, {"cmap": "inferno", "vmin": 0, "vmax": high}),
        )
        for index, (picture, shown) in enumerate(pictures):
            under = top + TEXT + index * (SIDE + GAP / 2)
            axes = figure.add_axes((left / width, 1 - (under + SIDE) / height, SIDE / width, SIDE / height))
            _show(axes, picture, shown)
            if index == 1 and view.name in lacking:
                axes.text(0.5, 0.5, "not measured", color="white", fontsize=7, ha="center", transform=axes.transAxes)
    return figure


def _show(axes: Any, picture: np.ndarray, shown: dict[str, Any]) -> None:
    axes.imshow(picture, **shown)
    axes.set_anchor("N")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_linewidth(0.4)
