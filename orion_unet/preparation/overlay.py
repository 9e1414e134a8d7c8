"""A sheet of pictures: haematoxylin and nuclear marker of cores, before and after they were registered."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from orion_unet.errors import RunError
from orion_unet.preparation.one_pair import KEPT, Registered
from orion_unet.preparation.register_pairs import RegisteredFolder
from orion_unet.registration.stains import haematoxylin
from orion_unet.run_log import write_atomic
from orion_unet.text import for_figure

SHEET = "registration.png"
# Cores on the sheet, side of their pictures [pixels of the image], and sizes in inches.
SHOWN, PICTURE = 24, 224
SIDE, GAP, TEXT, TITLE, DPI = 1.7, 0.06, 0.42, 0.62, 110
COLUMNS = 4
LETTERS = 30


def write_overlay_sheet(folder: RegisteredFolder, output: Path) -> Path:
    """Draw registration.png into an existing folder; returns its path. Raises RunError.

    Shows rejected cores first, then those that were moved farthest: the middle of each before and after, haematoxylin
    in magenta and the nuclear marker in green, so that what fits is white.
    """
    chosen = sorted(folder.rows, key=lambda row: (row.state == KEPT, -_distance(row)))[:SHOWN]
    columns = min(COLUMNS, len(chosen))
    rows = math.ceil(len(chosen) / columns)
    block_width, block_height = 2 * SIDE + 3 * GAP, SIDE + TEXT + GAP
    width, height = max(columns * block_width + GAP, 6.0), TITLE + rows * block_height + GAP
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    names = folder.table.names.tolist()
    marker = for_figure(folder.table.channel_names[folder.nuclear], 30)
    figure.text(
        2 * GAP / width, 1 - 0.1 / height,
        f"{for_figure(folder.table.folder.resolve().name, 50)}: haematoxylin (magenta) and {marker} (green), before "
        "and after",
        fontsize=12, va="top",
    )  # fmt: skip
    subtitle = f"{len(folder.kept)} of {len(folder.rows)} cores kept"
    if len(chosen) < len(folder.rows):
        subtitle += f"; shown: rejected ones, then those moved farthest ({len(chosen)} cores)"
    figure.text(2 * GAP / width, 1 - 0.35 / height, subtitle, fontsize=9, va="top", color="0.3")
    for place, row in enumerate(chosen):
        down, right = divmod(place, columns)
        left, top = GAP + right * block_width, TITLE + down * block_height
        kept = row.state == KEPT
        figure.text(
            left / width, 1 - (top + TEXT - 0.05) / height, f"{for_figure(row.core, LETTERS)}\n{_words(row)}",
            fontsize=7.5, va="bottom", linespacing=1.2, color="black" if kept else "#b00020",
        )  # fmt: skip
        for index, picture in enumerate(_pictures(folder, names.index(row.core), row, output)):
            at = left + index * (SIDE + GAP)
            axes = figure.add_axes((at / width, 1 - (top + TEXT + SIDE) / height, SIDE / width, SIDE / height))
            if picture is not None:
                axes.imshow(picture, interpolation="nearest")
            axes.set_axis_off()
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI)
    path = output / SHEET
    try:
        write_atomic(path, drawn.getvalue(), durable=False)
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror or error})") from error
    return path


def _distance(row: Registered) -> float:
    return math.hypot(row.shift_down or 0.0, row.shift_right or 0.0)


def _words(row: Registered) -> str:
    if row.state != KEPT:
        return for_figure(row.reason, 52)
    return (
        f"{row.shift_down:+.1f} down, {row.shift_right:+.1f} right; r {row.correlation_before:.2f} to "
        f"{row.correlation:.2f}"
    )


def _pictures(folder: RegisteredFolder, core: int, row: Registered, output: Path) -> list[np.ndarray | None]:
    """The middle of the core before and, where it was kept, after: (h, w, 3) in [0, 1]."""
    table = folder.table
    he, orion = table.image(core, "he"), table.image(core, "orion")
    white = np.float32(folder.scales.white("he", he.dtype))
    y, x = (start + max(0, (side - PICTURE) // 2)
            for start, side in ((row.top, row.height), (row.left, row.width)))  # fmt: skip
    rows, columns = slice(y, y + min(PICTURE, row.height)), slice(x, x + min(PICTURE, row.width))
    place = table.places(core)[folder.nuclear]
    marker = orion[rows, columns, place : place + 1][..., 0].astype(np.float32)
    found: list[np.ndarray | None] = [_overlaid(haematoxylin(he[rows, columns] / white), marker), None]
    if row.state == KEPT:
        moved = np.load(output / table.npy_name(core, "he"), mmap_mode="r", allow_pickle=False)
        if table.he[core]["layout"] == "chw":
            moved = moved.transpose(1, 2, 0)
        part = moved[y - row.top :, x - row.left :][: marker.shape[0], : marker.shape[1]]
        found[1] = _overlaid(haematoxylin(part / white), marker)
    return found


def _overlaid(density: np.ndarray, marker: np.ndarray) -> np.ndarray:
    stain, shown = (np.clip(image / max(float(np.quantile(image, 0.995)), 1e-6), 0, 1) for image in (density, marker))
    return np.stack([stain, shown, stain], axis=-1)
