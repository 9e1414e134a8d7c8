"""Panels of H&E, measured and predicted markers for the same few validation patches in every epoch."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from orion_unet.data.patches import PatchPlace, PatchReader
from orion_unet.data.transforms import BatchTransform
from orion_unet.run_log import SANITY_DIR, write_atomic
from orion_unet.text import for_figure

PATCHES, MARKERS = 3, 5
# A marker is shown from 0 to this quantile of its measured values, the same in every epoch.
DISPLAY_QUANTILE, SMALLEST_RANGE = 0.998, 0.05
# Side of an image, and height of the titles.
INCHES, TITLES = 1.7, 0.5


class SanityPanel:
    """Draws ``sanity/epoch_0002.png``: one block of rows per patch, H&E, then measured above predicted per marker.

    Patches and display ranges are chosen once, from measured values only, so that a person can compare the panels of
    different epochs.
    """

    def __init__(
        self, reader: PatchReader, transform: BatchTransform, places: torch.Tensor, names: tuple[str, ...]
    ) -> None:
        self.names = names
        rows = places[torch.linspace(0, len(places) - 1, 4 * PATCHES).round().long().unique()].tolist()
        rows.sort(key=lambda row: -reader.tissue_fraction(*row))
        self.labels = [f"{for_figure(reader.table.names[core])}\n({y}, {x})" for core, y, x in rows[:PATCHES]]
        batch = transform(reader.read([PatchPlace(*row) for row in rows[:PATCHES]]), augment=False)
        self.he, self.target = batch.he, batch.target
        self.measured = torch.ones(self.target.shape[:2]).bool() if batch.measured is None else batch.measured.cpu()
        self.markers = _various_markers(self.target.transpose(0, 1).flatten(1).cpu())
        self.ranges = [display_range(self.target[:, marker]) for marker in self.markers]

    @torch.inference_mode()
    def draw(self, model: nn.Module, run_dir: Path, epoch: int) -> Path:
        """Predict, draw and save the panel of an epoch; returns its path. The model is left in evaluation mode."""
        # Imported when the first panel is due, so that no run waits for it at its start.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        model.eval()
        prediction = model(self.he)[:, self.markers].float().cpu().numpy()
        target = self.target[:, self.markers].float().cpu().numpy()
        he = self.he.permute(0, 2, 3, 1).clamp(0, 1).cpu().numpy()
        columns, rows = len(self.markers), 2 * len(he)
        width, height = INCHES * (1 + columns) + 0.75, INCHES * rows + TITLES
        figure = Figure(figsize=(width, height))
        FigureCanvasAgg(figure)
        figure.text(0.01, 1 - 0.08 / height, f"Epoch {epoch}, measured above predicted", fontsize=10, va="top")
        top, bottom = 1 - TITLES / height, 0.05 / height
        # The H&E has a grid of its own, so that the row labels of the markers fit between.
        stain = figure.add_gridspec(
            len(he), 1, left=0.38 / width, right=(0.38 + INCHES) / width, bottom=bottom, top=top, hspace=0.04
        )
        grid = figure.add_gridspec(
            rows, columns, left=1 - (INCHES * columns + 0.05) / width, right=1 - 0.05 / width,
            bottom=bottom, top=top, hspace=0.04, wspace=0.04,
        )  # fmt: skip
        for patch, label in enumerate(self.labels):
            axes = figure.add_subplot(stain[patch])
            _show(axes, he[patch], "H&E" if patch == 0 else "", label)
            for column, (marker, high) in enumerate(zip(self.markers, self.ranges, strict=True)):
                for row, (name, images) in enumerate((("measured", target), ("predicted", prediction))):
                    axes = figure.add_subplot(grid[2 * patch + row, column])
                    title = for_figure(f"{self.names[marker]}  0–{high:.2f}") if patch == row == 0 else ""
                    _show(
                        axes, images[patch, column], title, name if column == 0 else "",
                        cmap="inferno", vmin=0, vmax=high,
                    )  # fmt: skip
                    if images is target and not self.measured[patch, marker]:
                        axes.text(
                            0.5, 0.5, "not measured", color="white", fontsize=7, ha="center", transform=axes.transAxes
                        )
        path = run_dir / SANITY_DIR / f"epoch_{epoch:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png", dpi=110)
        write_atomic(path, drawn.getvalue(), durable=False)
        return path


def display_range(values: torch.Tensor) -> float:
    """The value that is shown at full brightness, for measured values in [0, 1] of any shape."""
    # NumPy's quantile: torch's refuses more than 2**24 values, which three large patches have.
    return max(SMALLEST_RANGE, float(np.quantile(values.float().cpu().numpy(), DISPLAY_QUANTILE)))


def _various_markers(values: torch.Tensor) -> list[int]:
    """Indices of up to MARKERS rows of (C, N), each chosen for its spread and for being unlike those before it."""
    spread = values.std(dim=1)
    likeness = torch.corrcoef(values).abs().nan_to_num(0.0).reshape(len(values), len(values))
    chosen: list[int] = []
    while len(chosen) < min(MARKERS, len(values)):
        news = spread * (1 - likeness[:, chosen].amax(dim=1)) if chosen else spread
        news[chosen] = 0
        if chosen and news.max() <= 0:
            break
        chosen.append(int(news.argmax()))
    return sorted(chosen)


def _show(axes: Any, image: Any, title: str, label: str, **shown: Any) -> None:
    axes.imshow(image, interpolation="nearest", **shown)
    axes.set_title(title, fontsize=8)
    axes.set_ylabel(label, fontsize=7)
    axes.set_xticks([])
    axes.set_yticks([])
