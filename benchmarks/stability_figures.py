"""Figures of the stability benchmark."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

GREY = "#7f8c8d"
REGRESSION = "regression from colours"
COLOURS = {
    "former": "#c0392b", "published": "#2471a3", "stable": "#1e8449", "BasicUNet, MSE, Adam": "#d68910",
    "pix2pix's U-Net, L1, Adam": "#a04000", "stable, all three": "#8e44ad", REGRESSION: GREY,
}  # fmt: skip
LABELS = {"stable, all three": "stable, HEXIF's data handling"}
# Colour and label of the curves of each recipe, by row of the figure.
CURVES = (
    {name: (COLOURS[name], name) for name in ("former", "published", "stable")},
    {
        "constant rate 1e-2, running averages": ("#d68910", "constant 1e-2, running averages"),
        "constant rate 1e-2, measured statistics": ("#2471a3", "constant 1e-2, measured"),
        "stable, running averages": ("#8e44ad", "stable, running averages"),
        "stable": (COLOURS["stable"], "stable, measured"),
    },
)


def kind(name: str) -> str:
    """The kind of a set: that of "real, Lung1 held out" is "real"."""
    return name.split(",")[0]


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _tidy(axes: Any) -> None:
    axes.grid(alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _logarithmic(axis: Any) -> None:
    """Make the axis logarithmic, with a few plain tick labels."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    low, high = axis.get_view_interval()
    wide = high > 20 * low
    axis.set_major_locator(LogLocator(subs=(1.0, 3.0) if wide else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def draw_curves(results: list[dict[str, Any]], kinds: list[str], path: Path) -> None:
    """Validation squared error over that of the training means, by epoch, one line per training; a column per kind of
    set. Above: recipes; below: the same trainings of ``stable`` and of a plain trainer, by batch norm's statistics.
    """
    figure = _figure(2.0 + 2.5 * len(kinds), 6.6)
    grid = figure.subplots(len(CURVES), len(kinds), squeeze=False, sharey="row")
    for row, shown in zip(grid, CURVES, strict=True):
        for axes, each in zip(row, kinds, strict=True):
            for name, (colour, label) in shown.items():
                runs = [r for r in results if kind(r["set"]) == each and r["recipe"] == name]
                for result in runs:
                    r2 = np.array([np.nan if one["val_r2"] is None else one["val_r2"] for one in result["epochs"]])
                    axes.plot(np.arange(len(r2)) + 1, 1 - r2, color=colour, alpha=0.6, linewidth=1.1)
                axes.plot([], [], color=colour, label=label)
            axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
            _logarithmic(axes.yaxis)
            axes.set_title(each, fontsize=10)
            axes.set_xlabel("epoch")
            _tidy(axes)
        row[0].set_ylabel("squared error / error of the means")
        row[-1].legend(frameon=False, fontsize=8)
    figure.savefig(path)


def draw_comparison(
    found: dict[tuple[str, str], list[dict[str, float]]], kinds: list[str], names: list[str], path: Path
) -> None:
    """Median and range of movement, squared error and correlation, one row per recipe."""
    # The base alone is no comparison.
    kinds = [each for each in kinds if sum((each, name) in found for name in names) > 2]
    if not kinds:
        return
    names = [name for name in names if any((each, name) in found for each in kinds)]
    figure = _figure(12, 0.9 + 0.34 * len(names) * len(kinds) + 0.5 * len(kinds))
    grid = figure.subplots(len(kinds), 3, squeeze=False, sharey="row")
    quantities = (
        ("movement", "movement of V, last 10 epochs"),
        ("mse", "squared error"),
        ("pearson", "Pearson r"),
    )
    for row, each in zip(grid, kinds, strict=True):
        for axes, (column, title) in zip(row, quantities, strict=True):
            for place, name in enumerate(names):
                values = [r[column] for r in found.get((each, name), []) if math.isfinite(r[column])]
                if values:
                    colour = COLOURS.get(name, GREY)
                    axes.plot([min(values), max(values)], [place, place], color=colour, linewidth=2, alpha=0.5)
                    axes.plot(median(values), place, "o", color=colour)
            axes.set_title(f"{each}: {title}", fontsize=9)
            axes.set_yticks(range(len(names)), names, fontsize=9)
            if column == "mse":
                _logarithmic(axes.xaxis)
            _tidy(axes)
        row[0].invert_yaxis()
    figure.savefig(path)


def draw_markers(results: list[dict[str, Any]], kinds: list[str], names: list[str], path: Path) -> None:
    """Correlation per marker: stable, published, the peers and the regression. Only sets on which a peer was trained,
    if there is one."""
    peers = ("BasicUNet, MSE, Adam", "pix2pix's U-Net, L1, Adam")
    shown = [name for name in ("stable", "published", *peers, "stable, all three") if name in names]
    kinds = [each for each in kinds if any(kind(r["set"]) == each and r["recipe"] in peers for r in results)] or kinds
    figure = _figure(12, 3.4 * len(kinds))
    grid = figure.subplots(len(kinds), 1, squeeze=False)
    for axes, each in zip(grid[:, 0], kinds, strict=True):
        bars: dict[str, list[dict[str, Any]]] = {}
        for result in results:
            if kind(result["set"]) == each:
                if result["recipe"] in shown and "scores" in result:
                    bars.setdefault(result["recipe"], []).append(result["scores"])
                for name in (REGRESSION,):
                    if result.get("baselines"):
                        bars.setdefault(name, []).append(result["baselines"][name])
        if not bars:
            continue
        order = [name for name in (*shown, REGRESSION) if name in bars]
        markers = next(iter(bars.values()))[0]["names"]
        for place, name in enumerate(order):
            columns = [[score["pearson"][index] for score in bars[name]] for index in range(len(markers))]
            values = [[v for v in column if v is not None] for column in columns]
            heights = [median(v) if v else 0 for v in values]
            low = [h - min(v) if v else 0 for h, v in zip(heights, values, strict=True)]
            high = [max(v) - h if v else 0 for h, v in zip(heights, values, strict=True)]
            width = 0.8 / len(order)
            at = np.arange(len(markers)) + (place - (len(order) - 1) / 2) * width
            axes.bar(at, heights, width, color=COLOURS[name], yerr=[low, high], error_kw={"linewidth": 0.7},
                     label=LABELS.get(name, name))  # fmt: skip
        axes.set_xticks(range(len(markers)), markers, rotation=45, ha="right", fontsize=9)
        axes.set_ylabel("Pearson r")
        axes.set_title(each, fontsize=10)
        axes.axhline(0, color="black", linewidth=0.6)
        _tidy(axes)
    figure.legend(
        *grid[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False, fontsize=9
    )
    figure.savefig(path)
