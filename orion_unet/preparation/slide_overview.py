"""One picture a slide: what was taken from where, and how well the H&E lies on its markers."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from orion_unet.command_options import PrepareOptions
from orion_unet.data.slide_regions import open_region
from orion_unet.preparation.one_pair import KEPT
from orion_unet.preparation.one_region import PreparedRegion
from orion_unet.preparation.slide_plan import SlidePlan, contrast
from orion_unet.preparation.writing import pair_paths
from orion_unet.registration.stains import haematoxylin
from orion_unet.registration.transform import Affine, move
from orion_unet.run_log import write_atomic
from orion_unet.slides.open import open_he, open_markers
from orion_unet.slides.stored import open_tiles
from orion_unet.slides.thumbnails import he_thumbnail, marker_thumbnail
from orion_unet.slides.tiles import TiledArray
from orion_unet.text import for_figure

# Longest side of the thumbnails, side of the pictures of details [pixels], how many of these, and sizes in inches.
THUMBNAIL, DETAIL, SHOWN = 1100, 300, 3
WIDTH, DPI, MARGIN = 13.0, 110, 0.25
GREEN, RED = "#0a7d3c", "#c4161c"


@dataclass(frozen=True)
class OverviewOf:
    """What is drawn: a slide's plan and the rows of its regions."""

    plan: SlidePlan
    rows: list[PreparedRegion]
    options: PrepareOptions

    @property
    def path(self) -> Path:
        """SLIDE_overview.png in the folder of the pairs."""
        return Path(self.options.output_dir) / overview_name(self.plan.slide.name)


def overview_name(slide: str) -> str:
    """The name of the picture of a slide."""
    return f"{slide}_overview.png"


def write_overview(of: OverviewOf) -> Path:
    """Draw SLIDE_overview.png: the H&E and the nuclear marker with the regions, and details before and after the fine
    registration. Raises InputError if an image is damaged, and OSError."""
    plan = of.plan
    with open_he(plan.slide.he) as he, open_markers(plan.slide.orion) as orion:
        left, right = he_thumbnail(he, THUMBNAIL), marker_thumbnail(orion, [plan.nuclear], THUMBNAIL)
        details = _details(of, he)
    column = (WIDTH - 3 * MARGIN) / 2
    tall = [column * image.pixels.shape[0] / image.pixels.shape[1] for image in (left, right)]
    slides_height = min(max(tall), 7.0)
    detail_side = (WIDTH - 7 * MARGIN) / 6 if details else 0.0
    head, label = 0.75, 0.35
    height = head + label + slides_height + (label + 0.35 + detail_side if details else 0.0) + MARGIN
    figure = Figure(figsize=(WIDTH, height))
    FigureCanvasAgg(figure)
    kept = [row for row in of.rows if row.state == KEPT]
    figure.text(MARGIN / WIDTH, 1 - 0.18 / height, f"slide {for_figure(plan.slide.name)}", fontsize=15, va="top",
                weight="bold")  # fmt: skip
    figure.text(MARGIN / WIDTH, 1 - 0.5 / height, _summary(of, kept), fontsize=10, va="top", color="0.3")
    top = head + label
    marker = contrast(right.pixels[..., 0])
    nuclear = for_figure(plan.names[plan.channels.index(plan.nuclear)], 30)
    panels = ((left, left.pixels, "H&E", plan.affine), (right, marker, f"ORION, {nuclear}", None))
    for index, (thumbnail, pixels, title, affine) in enumerate(panels):
        at = MARGIN + index * (column + MARGIN)
        axes = figure.add_axes((at / WIDTH, 1 - (top + slides_height) / height, column / WIDTH, slides_height / height))
        axes.imshow(pixels, cmap="gray", vmin=0, vmax=1, aspect="equal")
        axes.set_anchor("N")
        axes.set_axis_off()
        axes.set_title(title, loc="left", fontsize=11, pad=5)
        _outline(axes, of, thumbnail.factor, affine)
    for index, (row, before, after) in enumerate(details):
        for place, (picture, word) in enumerate(((before, "before"), (after, "after"))):
            at = MARGIN + (2 * index + place) * (detail_side + MARGIN)
            low = height - MARGIN - detail_side
            axes = figure.add_axes((at / WIDTH, 1 - (low + detail_side) / height, detail_side / WIDTH,
                                    detail_side / height))  # fmt: skip
            axes.imshow(picture, interpolation="nearest")
            axes.set_axis_off()
            value = row.correlation_before if word == "before" else row.correlation
            name = for_figure(row.core.removeprefix(f"{plan.slide.name}_"), 12)
            axes.set_title(f"{name} {word}" + ("" if value is None else f", r {value:.2f}"), fontsize=9, loc="left",
                           pad=4)  # fmt: skip
    if details:
        words = f"Details: haematoxylin magenta, {nuclear} green; where they fit, nuclei are white"
        figure.text(MARGIN / WIDTH, (MARGIN + detail_side + 0.38) / height, words, fontsize=10, color="0.3")
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI)
    write_atomic(of.path, drawn.getvalue(), durable=False)
    return of.path


def _summary(of: OverviewOf, kept: list[PreparedRegion]) -> str:
    plan = of.plan
    words = [f"{len(kept)} of {len(of.rows)} regions kept", f"{plan.pixel_size_um:.4g} µm a pixel"]
    if of.options.register == "auto":
        words.append(
            f"H&E {plan.orientation}, rotated by {_small_turn(plan.affine):.1f}°, scale {plan.affine.scale:.3f}"
        )
    residuals = [row.residual_px for row in kept if row.residual_px is not None]
    if residuals:
        words.append(f"median residual {np.median(residuals):.2f} pixels")
    if plan.missing:
        words.append(f"no core at {', '.join(plan.missing[:6])}{' …' if len(plan.missing) > 6 else ''}")
    return "  ·  ".join(words)


def _small_turn(affine: Affine) -> float:
    """The rotation apart from quarter turns, in degrees."""
    return (affine.rotation_deg + 45) % 90 - 45


def _outline(axes: Any, of: OverviewOf, factor: float, affine: Affine | None) -> None:
    for row in of.rows:
        low = np.array([row.y, row.x])
        corners = low + np.array([[0, 0], [0, row.width], [row.height, row.width], [row.height, 0], [0, 0]])
        corners = (corners if affine is None else affine.points(corners)) / factor
        colour = GREEN if row.state == KEPT else RED
        axes.plot(corners[:, 1], corners[:, 0], color=colour, linewidth=1.6, solid_joinstyle="miter")
        if len(of.rows) <= 80:
            name = for_figure(row.core.removeprefix(f"{of.plan.slide.name}_"), 8)
            y, x = corners[:4].mean(0)
            axes.text(x, y, name, fontsize=7, ha="center", va="center", color="white",
                      bbox={"facecolor": colour, "edgecolor": "none", "pad": 1.2, "alpha": 0.8})  # fmt: skip


def _details(of: OverviewOf, he: Any) -> list[tuple[PreparedRegion, np.ndarray, np.ndarray]]:
    """The middle of a few kept regions, before and after the fine registration, (h, w, 3) in [0, 1]."""
    if of.options.register != "auto":
        return []
    plan, kept = of.plan, [row for row in of.rows if row.state == KEPT]
    chosen = [kept[round(index)] for index in np.linspace(0, len(kept) - 1, min(SHOWN, len(kept)))]
    nuclear = plan.channels.index(plan.nuclear)
    found = []
    for row in chosen:
        stored, orion = (_stored(of, row, modality) for modality in ("he", "orion"))
        side = min(DETAIL, *orion.shape[:2])
        top, left = ((length - side) // 2 for length in orion.shape[:2])
        part = np.s_[top : top + side, left : left + side]
        marker = orion[(*part, slice(nuclear, nuclear + 1))][..., 0].astype(np.float32)
        lies = Affine.scaling(plan.step).then(Affine.shift(row.y, row.x)).then(plan.affine)
        before, _ = move(he.stored, he.shape, lies, None, (top, left, side, side))
        images = [_overlaid(haematoxylin(image.astype(np.float32) / np.float32(he.white)), marker)
                  for image in (before, stored[part])]  # fmt: skip
        found.append((row, images[0], images[1]))
    return found


def _stored(of: OverviewOf, row: PreparedRegion, modality: str) -> np.ndarray | TiledArray:
    """An image (H, W, C) of a pair, read by part."""
    path = pair_paths(Path(of.options.output_dir), row.core, of.options.format)[modality]
    if of.options.format == "none":
        return open_region(path, modality).channels_last()
    if of.options.format == "ome-zarr":
        return TiledArray(open_tiles(path, modality, 0), "hwc")
    stored: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    return stored


def _overlaid(density: np.ndarray, marker: np.ndarray) -> np.ndarray:
    stain, shown = (np.clip(image / max(float(np.quantile(image, 0.995)), 1e-6), 0, 1) for image in (density, marker))
    return np.stack([stain, shown, stain], axis=-1)
