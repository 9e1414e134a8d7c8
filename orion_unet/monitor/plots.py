"""The figure of a run: losses, stability, gap, learning rate, loss terms and Pearson per marker. Agg, no display.

matplotlib is imported by the functions that draw, since a monitor that prints JSON has no use for it. Figures are
made without pyplot: half its import time, and no global state in a loop that draws for days.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from orion_unet.monitor.diagnostics import loss_scale, noise_and_limit
from orion_unet.monitor.heatmap import draw_markers, whole_epochs
from orion_unet.monitor.report import Report
from orion_unet.monitor.run_reader import LARGEST, TERMS
from orion_unet.text import for_figure, short_number

# Okabe and Ito (2008), told apart by people with any kind of colour vision; with line styles besides.
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, BLACK, GREY = "#CC79A7", "#56B4E9", "#000000", "#777777"
SERIES = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)
STYLES = ("-", "--", "-.", ":")
TERM_LOOKS = dict(
    zip(TERMS, ((BLUE, "-"), (ORANGE, "--"), (GREEN, "-."), (PURPLE, ":"), (BLACK, "--"), (SKY, "-")), strict=True)
)

SIZE_INCHES = (15.0, 9.0)
DPI = 100
MAX_POINTS = 1200
MAX_MARKS = 12


def run_figure(report: Report) -> Any:
    """Draw a run; returns a matplotlib Figure with an Agg canvas."""
    figure = _figure()
    grid = figure.add_gridspec(
        3, 3, width_ratios=(1, 1, 0.95), left=0.065, right=0.98, top=0.868, bottom=0.065, wspace=0.24, hspace=0.45
    )
    title = f"{for_figure(Path(report.run).name or report.run, 60)}   {report.life.state}, {_progress(report)}"
    figure.text(0.02, 0.955, title, fontsize=16)
    if report.warnings:
        codes = ", ".join(finding.code for finding in report.warnings)
        figure.text(0.02, 0.93, f"warnings: {codes}", fontsize=11, color=VERMILION)
    if not len(report.epochs):
        figure.text(0.5, 0.5, "no epoch has finished yet", ha="center", fontsize=16, color=GREY)
        return figure
    _draw_loss(figure.add_subplot(grid[0, :2]), report)
    _draw_noise(figure.add_subplot(grid[1, 0]), report)
    _draw_gap(figure.add_subplot(grid[1, 1]), report)
    _draw_rate(figure.add_subplot(grid[2, 0]), report)
    _draw_terms(figure.add_subplot(grid[2, 1]), report)
    draw_markers(figure, figure.add_subplot(grid[:, 2]), report)
    return figure


def comparison_figure(reports: Sequence[Report], names: Sequence[str]) -> Any:
    """Draw several runs over each other: validation and training loss, Pearson and learning rate."""
    figure = _figure()
    grid = figure.add_gridspec(2, 2, left=0.055, right=0.985, top=0.88, bottom=0.07, wspace=0.19, hspace=0.32)
    figure.text(0.02, 0.955, f"{len(reports)} runs compared", fontsize=16)
    panels = (
        ("Validation loss", "val_loss", "loss"),
        ("Training loss", "train_loss", "loss"),
        ("Validation Pearson, mean over markers", "pearson", "Pearson r"),
        ("Learning rate", "lr", "learning rate"),
    )
    for index, (title, column, label) in enumerate(panels):
        axes = figure.add_subplot(grid[index // 2, index % 2])
        for run, report in enumerate(reports):
            look = {"color": SERIES[run % len(SERIES)], "linestyle": STYLES[run // len(SERIES) % len(STYLES)]}
            values = _finite(report.reader.column(column))
            _curve(axes, report.epochs, values, names[run], **look)
            if column == "val_loss" and report.best is not None:
                axes.plot(report.epochs[report.best], values[report.best], "o", color=look["color"], markersize=8)
        longest = max(reports, key=lambda report: report.epochs[-1] if len(report.epochs) else 0)
        values = np.concatenate([report.reader.column(column) for report in reports])
        _finish(axes, longest, title, label, values, log=True if column == "lr" else None, legend=index == 0)
        axes.set_xlabel("epoch")
    return figure


def png(figure: Any) -> bytes:
    """The figure as PNG."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # A marker may be named in a script that the font lacks; the box drawn instead says so well enough.
        warnings.simplefilter("ignore")
        figure.savefig(buffer, format="png", dpi=DPI, pil_kwargs={"compress_level": 3})
    return buffer.getvalue()


def _figure() -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_INCHES, dpi=DPI)
    FigureCanvasAgg(figure)
    return figure


def _progress(report: Report) -> str:
    planned = f" of {report.planned}" if report.planned else ""
    best = report.best
    if best is None:
        return f"{len(report.epochs)}{planned} epochs"
    text = f"{len(report.epochs)}{planned} epochs, best validation loss {short_number(report.val[best])}"
    return f"{text} in epoch {report.epochs[best]}"


def _draw_loss(axes: Any, report: Report) -> None:
    epochs, reader = report.epochs, report.reader
    train, val = _finite(report.train), _finite(report.val)
    _curve(axes, epochs, train, "training", color=BLUE, linestyle="--")
    _curve(axes, epochs, val, "validation", color=VERMILION)
    if report.best is not None:
        at = report.best
        axes.plot(epochs[at], val[at], "*", color=BLACK, markersize=14, label=f"best, epoch {epochs[at]}", linestyle="")
    broken = epochs[np.isinf(report.train) | np.isinf(report.val)]
    if len(broken):
        low, _ = axes.get_ylim()
        axes.plot(broken, np.full(len(broken), low), "x", color=BLACK, label="not finite", linestyle="")
    attempt, rate = reader.column("attempt"), reader.column("lr")
    _marks(axes, epochs[1:][np.diff(attempt) > 0], "restart", color=GREY, linestyle="-.")
    drop = np.flatnonzero(rate[1:] < 0.7 * rate[:-1]) + 1
    _marks(axes, epochs[drop], "learning rate lowered", color=GREEN, linestyle=":")
    _finish(axes, report, "Training and validation loss", "loss", np.concatenate([train, val]))


def _draw_noise(axes: Any, report: Report) -> None:
    count = len(report.val)
    ends = np.unique(np.linspace(1, count, min(count, MAX_POINTS // 4)).astype(int))
    told = [noise_and_limit(report.train[:end], report.val[:end], report.thresholds) for end in ends]
    noise, limit = np.where(np.abs(told) < LARGEST / 10, told, np.nan).T
    epochs = report.epochs[ends - 1]
    _curve(axes, epochs, noise, "noise about the trend", color=VERMILION)
    _curve(axes, epochs, limit, "warning above", color=BLACK, linestyle=":", marker="")
    if not np.isfinite(noise).any():
        _remark(axes, "told from epoch 8 on")
    _finish(axes, report, "Stability: noise of the validation loss", "sd of the loss", noise, log=False)
    _, top = axes.get_ylim()
    axes.set_ylim(0, top if np.isfinite(noise).any() else 1)


def _draw_gap(axes: Any, report: Report) -> None:
    gap = _finite(report.val) - _finite(report.train)
    _curve(axes, report.epochs, gap, "validation - training", color=PURPLE)
    axes.axhline(0, color=GREY, linewidth=0.8)
    limit = report.thresholds.max_gap * loss_scale(report.train)
    finite = np.abs(gap[np.isfinite(gap)])
    # A line far above the data would flatten them.
    if len(finite) and finite.max() > limit / 4:
        axes.axhline(limit, color=BLACK, linewidth=1.2, linestyle=":", label=f"warning above {limit:.3g}")
    else:
        axes.plot([], [], color=BLACK, linestyle=":", label=f"warning above {limit:.3g}, off the scale")
    _finish(axes, report, "Gap: validation minus training loss", "loss", gap, log=False)


def _draw_rate(axes: Any, report: Report) -> None:
    rate = report.reader.column("lr")
    positive = np.where(rate > 0, rate, np.nan)
    _curve(axes, report.epochs, positive, "", color=GREEN, drawstyle="steps-post")
    _finish(axes, report, "Learning rate", "learning rate", positive, log=True, legend=False)
    axes.set_xlabel("epoch")


def _draw_terms(axes: Any, report: Report) -> None:
    everything = []
    for term, (color, style) in TERM_LOOKS.items():
        values = report.reader.column(f"val_{term}")
        if np.isfinite(values).any() and (values[np.isfinite(values)] != 0).any():
            _curve(axes, report.epochs, values, term, color=color, linestyle=style)
            everything.append(values)
    if not everything:
        _remark(axes, "no terms in the log")
    _finish(axes, report, "Validation loss terms, unweighted", "loss term", np.concatenate(everything or [np.zeros(1)]))
    axes.set_xlabel("epoch")


def _curve(axes: Any, epochs: np.ndarray, values: np.ndarray, label: str, **look: Any) -> None:
    """A line over the epochs; a long one by the extremes of each stretch, a lone point as a dot."""
    count = len(values)
    if count > MAX_POINTS:
        edges = np.linspace(0, count, MAX_POINTS // 2 + 1).astype(int)[:-1]
        high = np.maximum.reduceat(np.where(np.isfinite(values), values, -np.inf), edges)
        low = np.minimum.reduceat(np.where(np.isfinite(values), values, np.inf), edges)
        values = np.stack([high, low], axis=1).ravel()
        epochs = np.repeat(epochs[edges], 2)
        values = np.where(np.isfinite(values), values, np.nan)
    alone = np.isfinite(values).sum() <= 40
    (line,) = axes.plot(
        epochs, values, **{"linewidth": 1.6, "marker": "o" if alone else "", "markersize": 4 if count > 1 else 8} | look
    )
    label = for_figure(label, 50)
    # matplotlib leaves labels that begin with an underscore out of the legend.
    line.set_label(f" {label}" if label.startswith("_") else label)


def _marks(axes: Any, epochs: np.ndarray, label: str, **look: Any) -> None:
    """Vertical lines at some epochs; of very many, the last."""
    for index, epoch in enumerate(epochs[-MAX_MARKS:]):
        axes.axvline(epoch, linewidth=1.2, label=label if index == 0 else None, **look)


def _remark(axes: Any, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=GREY, fontsize=11)


def _finish(
    axes: Any,
    report: Report,
    title: str,
    label: str,
    values: np.ndarray,
    log: bool | None = None,
    legend: bool = True,
) -> None:
    """Title, units, scale and grid; the legend above the data, where it covers none."""
    axes.set_title(title, fontsize=11, loc="left", pad=20 if legend else 6)
    axes.set_ylabel(label)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    positive = values[np.isfinite(values) & (values > 0)]
    finite = values[np.isfinite(values)]
    if log is None:
        log = len(positive) == len(finite) > 0 and bool(positive.max() > 20 * positive.min())
    # Tick labels are most of what drawing costs: few of them.
    axes.locator_params(axis="y", nbins=5)
    if log and len(positive):
        axes.set_yscale("log")
        _plain_log_ticks(axes, positive)
    _epoch_axis(axes, report)
    handles, _ = axes.get_legend_handles_labels()
    if legend and handles:
        crowded = len(handles) > 5
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(0, 0.985),
            ncols=6,
            fontsize=8 if crowded else 9,
            frameon=False,
            borderaxespad=0,
            handlelength=1.4 if crowded else 1.8,
            handletextpad=0.4 if crowded else 0.8,
            columnspacing=0.8 if crowded else 1.2,
        )


def _plain_log_ticks(axes: Any, values: np.ndarray) -> None:
    """Few ticks written as plain numbers: matplotlib's powers go through its formula parser, a third of the time."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = float(values.min()), float(values.max())
    if high / low < 1.2:
        low, high = low / 2, high * 2
        axes.set_ylim(low, high)
    powers = np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    powers = powers[:: max(1, len(powers) // 6)]
    ticks = 10.0**powers
    if len(powers) <= 4:
        ticks = np.sort(np.concatenate([ticks, 2 * ticks, 5 * ticks]))
    distinct = np.unique(values)
    axes.yaxis.set_major_locator(FixedLocator((distinct if len(distinct) <= 4 else ticks).tolist()))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _epoch_axis(axes: Any, report: Report) -> None:
    """The same span of epochs in every panel, ticks at whole epochs."""
    if len(report.epochs):
        first, last = int(report.epochs[0]), int(report.epochs[-1])
        room = 0.5 + 0.01 * (last - first)
        axes.set_xlim(first - room, last + room)
    whole_epochs(axes)


def _finite(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values), values, np.nan)
