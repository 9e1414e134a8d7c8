"""The figures of an evaluation: markers with intervals, predicted against measured, and some patches."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from orion_unet.evaluation.patches import ScoredPatch
from orion_unet.evaluation.scorecard import BASELINE_NAMES, MEAN, MODEL, REGRESSION, Scorecard
from orion_unet.inference.trust import NOT_SUPPORTED, WEAK
from orion_unet.text import for_figure

BAR_METRICS = {"pearson": "Pearson r", "psnr_db": "PSNR [dB]", "auc": "area under the ROC"}
# What the axis of a bar chart spans at least, and the value that tells nothing.
CHANCE = {"pearson": 0.0, "auc": 0.5}
COLOUR, MARKS = "#4c78a8", {MEAN: ("|", "#e45756"), REGRESSION: ("d", "#f2a03d")}
LEGEND = ("model", "95 % interval", *BASELINE_NAMES.values())
SCATTER_BINS, SCATTER_COLUMNS = 64, 6
# A marker is shown from 0 to this quantile of what was measured in the patches, but never less than this.
DISPLAY_QUANTILE, SMALLEST_RANGE = 0.998, 0.05
SHOWN_MARKERS, INCHES = 6, 1.5
# Longest name of a marker, in characters: beside the bars, and over a small image.
LONG_NAME, SHORT_NAME = 22, 14


def _figure(width: float, height: float, layout: str | None = "constrained") -> Figure:
    figure = Figure(figsize=(width, height), layout=layout)  # type: ignore[arg-type]
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Figure) -> bytes:
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=110)
    return drawn.getvalue()


def draw_markers(card: Scorecard, marks: Sequence[str]) -> bytes:
    """Bars of every marker, best first, with intervals and what the baselines reach; a PNG.

    ``marks`` are the verdicts on the markers; one that is weak or not supported is named beside the marker.
    """
    order = np.argsort(np.nan_to_num(card.values[MODEL]["pearson"], nan=-2))[::-1].tolist()
    rows = np.arange(len(order))
    figure = _figure(11, 1.5 + 0.24 * max(3, len(order)))
    axes = figure.subplots(1, len(BAR_METRICS), sharey=True)
    for ax, (metric, title) in zip(axes, BAR_METRICS.items(), strict=True):
        values, low, high = np.array([card.score(MODEL, metric, marker) for marker in order]).T
        start = CHANCE.get(metric, 0.0)
        ax.barh(rows, values - start, left=start, height=0.68, color=COLOUR, label="model")
        known = np.isfinite(low) & np.isfinite(high)
        ends = np.abs(np.stack([values - low, high - values]))[:, known]
        ax.errorbar(
            values[known], rows[known], xerr=ends, fmt="none", ecolor="black", elinewidth=1, capsize=2,
            label="95 % interval" if known.any() else None,
        )  # fmt: skip
        for baseline, (mark, colour) in MARKS.items():
            if baseline not in card.values or (baseline == MEAN and metric == "auc"):
                continue
            reached = card.values[baseline][metric][order]
            if np.isfinite(reached).any():
                ax.scatter(
                    reached, rows, marker=mark, s=40 if mark == "d" else 130, color=colour,
                    edgecolor="black" if mark == "d" else None, linewidth=0.6 if mark == "d" else 2.2,
                    zorder=3 if mark == "d" else 4, label=BASELINE_NAMES[baseline],
                )  # fmt: skip
        for row in rows[~np.isfinite(values)]:
            ax.text(start, row, " undefined", va="center", fontsize=7, color="grey")
        ax.axvline(start, color="black", linewidth=0.8)
        if metric == "psnr_db" and np.isfinite(values).any():
            baselines = [card.values[name]["psnr_db"][order] for name in MARKS if name in card.values]
            shown = np.stack([values, low, high, *baselines])
            # The PSNR of an empty marker is absurdly high; keep it from squeezing the other bars.
            real = np.isfinite(card.values[MODEL]["pearson"][order])
            highest = float(np.nanmax(shown[:, real | ~real.any()], initial=1.0))
            ax.set_xlim(max(0.0, 5 * np.floor((np.nanmin(shown) - 2) / 5)), 1.03 * highest)
            for row in rows[values > 1.03 * highest]:
                ax.text(highest, row, f"{values[row]:.0f}", va="center", ha="right", fontsize=7, color="white")
        ax.set_xlabel(title)
        ax.grid(axis="x", alpha=0.3)
        ax.set_axisbelow(True)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    named = [for_figure(card.names[marker], LONG_NAME) for marker in order]
    doubts = [f"\n({marks[marker]})" if marks[marker] in (WEAK, NOT_SUPPORTED) else "" for marker in order]
    axes[0].set_yticks(rows, [name + doubt for name, doubt in zip(named, doubts, strict=True)], fontsize=7)
    axes[0].set_ylim(len(order) - 0.4, -0.6)
    shown_labels = {text: mark for ax in axes for mark, text in zip(*ax.get_legend_handles_labels(), strict=True)}
    shown_labels = dict(sorted(shown_labels.items(), key=lambda item: LEGEND.index(item[0])))
    figure.legend(
        shown_labels.values(), shown_labels.keys(), loc="outside upper center", ncols=4, fontsize=8, frameon=False
    )
    return _png(figure)


def draw_scatter(card: Scorecard, measured: np.ndarray, predicted: np.ndarray) -> bytes:
    """Two-dimensional histograms of predicted against measured pixels (C, n) in [0, 1], one per marker; a PNG.

    Pixels are NaN where their marker was not measured.
    """
    count = len(card.names)
    columns = min(count, SCATTER_COLUMNS)
    lines = -(-count // columns)
    figure = _figure(1.75 * columns + 1.2, 1.95 * lines + 0.5)
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).ravel()
    edges = np.linspace(0, 1, SCATTER_BINS + 1)
    counts = [
        np.histogram2d(t[~np.isnan(t)], p[~np.isnan(t)], bins=[edges, edges])[0]
        for t, p in zip(measured, predicted, strict=True)
    ]
    norm = LogNorm(1, max(2.0, max(float(found.max()) for found in counts)))
    for ax, name, found, r in zip(grid, card.names, counts, card.values[MODEL]["pearson"], strict=False):
        image = ax.pcolormesh(
            edges, edges, np.where(found > 0, found, np.nan).T, norm=norm, cmap="viridis", rasterized=True
        )
        ax.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
        ax.set_aspect("equal")
        shown = f"r {r:.2f}" if np.isfinite(r) else "r undefined"
        ax.set_title(f"{for_figure(name, SHORT_NAME)}  {shown}", fontsize=8)
        ax.tick_params(labelsize=7)
    for ax in grid[max(0, count - columns) : count]:
        ax.tick_params(labelbottom=True)
    for ax in grid[count:]:
        ax.axis("off")
    figure.supxlabel("measured (normalised)", fontsize=9)
    figure.supylabel("predicted (normalised)", fontsize=9)
    bar = figure.colorbar(image, ax=grid.tolist(), fraction=0.04, pad=0.01, aspect=max(12, 14 * lines))
    bar.ax.tick_params(labelsize=7)
    bar.set_label("sampled pixels", fontsize=8)
    return _png(figure)


def draw_patches(patches: Sequence[tuple[str, ScoredPatch]], names: Sequence[str]) -> bytes:
    """H&E, then measured above predicted markers, of each patch under its word; a PNG.

    Those markers that vary most are shown.
    """
    rows = [
        (f"{word}, r {patch.score:.2f}\n{for_figure(patch.core, LONG_NAME)}\n({patch.y}, {patch.x})", patch.region)
        for word, patch in patches
    ]
    spread = np.mean([region.measured.flatten(1).std(dim=1).numpy() for _, region in rows], axis=0)
    shown = sorted(np.argsort(spread)[::-1][:SHOWN_MARKERS].tolist())
    highs = []
    for marker in shown:
        values = np.concatenate([region.measured[marker].flatten().numpy() for _, region in rows])
        highs.append(max(SMALLEST_RANGE, float(np.quantile(values, DISPLAY_QUANTILE))))
    # The titles stand above the first row, the label of a patch beside its H&E.
    top, label, gap, between = 0.35, 0.55, 0.3, 0.12
    width = label + INCHES * (1 + len(shown)) + gap + 0.05
    height = top + (2 * INCHES + between) * len(rows)
    figure = _figure(width, height, None)

    def place(column: int, line: float) -> tuple[float, float, float, float]:
        left = label + column * INCHES + (gap if column else 0)
        bottom = top + (line + 1) * INCHES + line // 2 * between
        return left / width, 1 - bottom / height, 0.97 * INCHES / width, 0.97 * INCHES / height

    for row, (title, region) in enumerate(rows):
        stain = region.he.permute(1, 2, 0).clamp(0, 1).numpy()
        _image(figure.add_axes(place(0, 2 * row + 0.5)), stain, "H&E" if row == 0 else "", title)
        for column, (marker, high) in enumerate(zip(shown, highs, strict=True), start=1):
            for below, (word, images) in enumerate((("measured", region.measured), ("predicted", region.predicted))):
                heading = f"{for_figure(names[marker], SHORT_NAME)}  0–{high:.2f}" if row == below == 0 else ""
                axes = figure.add_axes(place(column, 2 * row + below))
                beside = word if column == 1 else ""
                _image(axes, images[marker].numpy(), heading, beside, cmap="inferno", vmin=0, vmax=high)
                if below == 0 and not region.present[marker]:
                    axes.text(
                        0.5, 0.5, "not measured", color="white", fontsize=7, ha="center", transform=axes.transAxes
                    )
    return _png(figure)


def _image(axes: Any, image: np.ndarray, title: str, label: str, **shown: Any) -> None:
    axes.imshow(image, interpolation="nearest", **shown)
    axes.set_title(title, fontsize=8, pad=3)
    axes.set_ylabel(label, fontsize=7)
    axes.set_xticks([])
    axes.set_yticks([])
