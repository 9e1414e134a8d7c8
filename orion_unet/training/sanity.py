"""Panels of H&E, measured and predicted markers for the same few validation patches in every epoch."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn

from orion_unet.data.patches import PatchPlace, PatchReader
from orion_unet.data.transforms import BatchTransform
from orion_unet.run_log import SANITY_DIR, write_atomic

PATCHES, MARKERS = 3, 5
# A marker is shown from 0 to this quantile of its measured values, the same in every epoch.
DISPLAY_QUANTILE, SMALLEST_RANGE = 0.998, 0.05
INCHES = 1.7


class SanityPanel:
    """Draws ``sanity/epoch_0002.png``: one block of rows per patch, H&E, then measured above predicted per marker.

    Patches and display ranges are chosen once, from measured values only, so that panels of different epochs can
    be compared by eye.
    """

    def __init__(
        self, reader: PatchReader, transform: BatchTransform, places: torch.Tensor, names: tuple[str, ...]
    ) -> None:
        self.names = names
        rows = places[torch.linspace(0, len(places) - 1, 4 * PATCHES).round().long().unique()].tolist()
        rows.sort(key=lambda row: -reader.tissue_fraction(*row))
        self.labels = [f"{reader.table.names[core]}\n({y}, {x})" for core, y, x in rows[:PATCHES]]
        batch = transform(reader.read([PatchPlace(*row) for row in rows[:PATCHES]]), augment=False)
        self.he, self.target = batch.he, batch.target
        spread = self.target.std(dim=(0, 2, 3))
        strongest = spread.argsort(descending=True)[:MARKERS]
        self.markers = sorted(strongest[spread[strongest] > 0].tolist()) or [0]
        self.ranges = [
            max(SMALLEST_RANGE, float(torch.quantile(self.target[:, marker].float().cpu(), DISPLAY_QUANTILE)))
            for marker in self.markers
        ]

    @torch.inference_mode()
    def draw(self, model: nn.Module, run_dir: Path, epoch: int) -> Path:
        """Predict, draw and save the panel of an epoch; returns its path. The model is left in evaluation mode."""
        model.eval()
        prediction = model(self.he)[:, self.markers].float().cpu()
        target = self.target[:, self.markers].float().cpu()
        he = self.he.permute(0, 2, 3, 1).clamp(0, 1).cpu().numpy()
        columns, rows = 1 + len(self.markers), 2 * len(he)
        figure = Figure(figsize=(INCHES * columns + 0.5, INCHES * rows + 0.55))
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(
            rows, columns, left=0.05, right=0.99, bottom=0.01, top=1 - 0.62 / (INCHES * rows + 0.55),
            hspace=0.04, wspace=0.04,
        )  # fmt: skip
        figure.suptitle(f"Epoch {epoch}: measured above predicted", fontsize=10, y=1 - 0.05 / INCHES / rows, va="top")
        for patch, label in enumerate(self.labels):
            axes = figure.add_subplot(grid[2 * patch : 2 * patch + 2, 0])
            axes.imshow(he[patch])
            axes.set_ylabel(label, fontsize=7)
            axes.set_title("H&E" if patch == 0 else "", fontsize=9)
            axes.set_xticks([])
            axes.set_yticks([])
            for column, (marker, high) in enumerate(zip(self.markers, self.ranges, strict=True)):
                for row, (name, images) in enumerate((("measured", target), ("predicted", prediction))):
                    axes = figure.add_subplot(grid[2 * patch + row, 1 + column])
                    axes.imshow(images[patch, column], cmap="inferno", vmin=0, vmax=high, interpolation="nearest")
                    axes.set_xticks([])
                    axes.set_yticks([])
                    if column == 0:
                        axes.set_ylabel(name, fontsize=7)
                    if patch == 0 and row == 0:
                        axes.set_title(_plain(f"{self.names[marker]}  0–{high:.2f}"), fontsize=8)
        path = run_dir / SANITY_DIR / f"epoch_{epoch:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png", dpi=110)
        write_atomic(path, drawn.getvalue(), durable=False)
        return path


def _plain(text: str) -> str:
    """Marker names are text, not formulas."""
    return text.replace("$", r"\$")
