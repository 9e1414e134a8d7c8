"""The figure of a run: losses, stability, gap, learning rate, loss terms and Pearson per marker. Needs no display.

Only the functions that draw import matplotlib, so that a report is printed before it is loaded. They do not use
pyplot, which doubles the import time and keeps global state, in a loop that may draw for days.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from orion_unet.monitor.diagnostics import loss_scale, noise_and_limit
from orion_unet.monitor.horizontal import EPOCHS, Horizontal, horizontals
from orion_unet.monitor.report import Report, finite_or_nan
from orion_unet.monitor.run_reader import LARGEST, TERMS
from orion_unet.text import for_figure, short_number

# The palette of Okabe and Ito (2008), which colour-blind readers can tell apart; line styles differ as well.
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
MAX_MARKERS = 40


def run_figure(report: Report, x: str = "epoch") -> Any:
    """Draw a run over epochs, steps, patches or hours; returns a matplotlib Figure with an Agg canvas.

    The markers are always drawn by epoch.
    """
    (axis,) = horizontals([report], x)
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
        if len(report.curves):
            _draw_steps(figure, report, axis)
        else:
            figure.text(0.5, 0.5, "no epoch has finished yet", ha="center", fontsize=16, color=GREY)
        return figure
    _draw_loss(figure.add_subplot(grid[0, :2]), report, axis)
    _draw_noise(figure.add_subplot(grid[1, 0]), report, axis)
    _draw_gap(figure.add_subplot(grid[1, 1]), report, axis)
    if len(report.curves):
        bottom = grid[2, :2].subgridspec(1, 3, wspace=0.36, width_ratios=(0.9, 0.9, 2.0))
        _draw_rate(figure.add_subplot(bottom[0]), report, axis)
        _draw_gradient(figure.add_subplot(bottom[1]), report, axis)
        _draw_terms(figure.add_subplot(bottom[2]), report, axis)
    else:
        _draw_rate(figure.add_subplot(grid[2, 0]), report, axis)
        _draw_terms(figure.add_subplot(grid[2, 1]), report, axis)
    _draw_markers(figure, figure.add_subplot(grid[:, 2]), report)
    return figure


def comparison_figure(reports: Sequence[Report], names: Sequence[str], x: str = "epoch") -> Any:
    """Draw several runs over each other, by epochs, steps, patches or hours: losses, Pearson and learning rate."""
    axes_of_runs = horizontals(reports, x)
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
            values = finite_or_nan(report.reader.column(column))
            # A cosine ends at zero, for which a logarithmic scale has no place.
            values = np.where(values > 0, values, np.nan) if column == "lr" else values
            at = axes_of_runs[run].of(report.epochs)
            _curve(axes, at, values, names[run], **look)
            if column == "val_loss" and report.best is not None:
                axes.plot(at[report.best], values[report.best], "o", color=look["color"], markersize=8)
        values = np.concatenate([report.reader.column(column) for report in reports])
        _finish(axes, title, label, values, log=True if column == "lr" else None, legend=index == 0)
        _span(axes, reports, axes_of_runs)
        axes.set_xlabel(axes_of_runs[0].label)
    return figure


def rendered(figure: Any, form: str = "png") -> bytes:
    """The figure as ``png``, ``svg`` or ``pdf``; the same figure gives the same bytes."""
    from matplotlib import rc_context

    more: dict[str, dict[str, Any]] = {
        "png": {"dpi": DPI, "pil_kwargs": {"compress_level": 3}},
        "svg": {"metadata": {"Date": None}},
        "pdf": {"metadata": {"CreationDate": None}},
    }
    buffer = io.BytesIO()
    # Journals want the letters of a PDF as TrueType outlines.
    with warnings.catch_warnings(), rc_context({"svg.hashsalt": "orion-unet", "pdf.fonttype": 42}):
        # The font may lack a script that markers are named in: the box it draws instead needs no warning.
        warnings.simplefilter("ignore")
        figure.savefig(buffer, format=form, **more[form])
    return buffer.getvalue()


def png(figure: Any) -> bytes:
    """The figure as PNG."""
    return rendered(figure)


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
    text = f"{len(report.epochs)}{planned} epochs, best {report.best_name} {short_number(report.best_value)}"
    return f"{text} in epoch {report.epochs[best]}"


def _draw_loss(axes: Any, report: Report, axis: Horizontal) -> None:
    epochs, reader = report.epochs, report.reader
    at = axis.of(epochs)
    _step_loss(axes, report, axis)
    train, val = finite_or_nan(report.train), finite_or_nan(report.val)
    _curve(axes, at, train, "training", color=BLUE, linestyle="--")
    _curve(axes, at, val, "validation", color=VERMILION)
    if report.best is not None:
        best, name = report.best, f"best, epoch {epochs[report.best]}"
        axes.plot(at[best], val[best], "*", color=BLACK, markersize=14, label=name, linestyle="")
    broken = at[np.isinf(report.train) | np.isinf(report.val)]
    if len(broken):
        low, _ = axes.get_ylim()
        axes.plot(broken, np.full(len(broken), low), "x", color=BLACK, label="not finite", linestyle="")
    attempt, rate = reader.column("attempt"), reader.column("lr")
    _marks(axes, at[1:][np.diff(attempt) > 0], "restart", color=GREY, linestyle="-.")
    # Other schedules lower the rate in every epoch, or never.
    if report.options.get("scheduler", "plateau") == "plateau":
        drop = np.flatnonzero(rate[1:] < 0.7 * rate[:-1]) + 1
        _marks(axes, at[drop], "learning rate lowered", color=GREEN, linestyle=":")
    _finish(axes, "Training and validation loss", "loss", np.concatenate([train, val]))
    _span(axes, [report], [axis])
    if len(report.curves):
        # The steps begin before the first epoch has ended, and go on after the last one.
        left, right = axes.get_xlim()
        begin, end = axis.of(np.array([np.floor(report.curves.at[0]), report.curves.at[-1]]))
        axes.set_xlim(min(left, float(begin)), max(right, float(end)))


def _draw_steps(figure: Any, report: Report, axis: Horizontal) -> None:
    """A run in its first epoch: loss, rate and gradient of its steps."""
    grid = figure.add_gridspec(2, 2, left=0.065, right=0.98, top=0.868, bottom=0.075, wspace=0.18, hspace=0.34)
    axes = figure.add_subplot(grid[0, :])
    _step_loss(axes, report, axis, alone=True)
    _finish_steps(axes, report, axis, "Training loss of the steps", "loss", report.curves.loss)
    _draw_rate(figure.add_subplot(grid[1, 0]), report, axis)
    _draw_gradient(figure.add_subplot(grid[1, 1]), report, axis)


def _step_loss(axes: Any, report: Report, axis: Horizontal, alone: bool = False) -> None:
    """The loss of the steps; under the curves of the epochs only smoothed, and without what is higher than they are."""
    curves = report.curves
    if not len(curves):
        return
    at, loss, smooth = axis.of(curves.at), finite_or_nan(curves.loss), curves.smooth
    if alone:
        _curve(axes, at, loss, "mean since the line before", color=SKY, linewidth=1.0)
        _curve(axes, at, smooth, "smoothed", color=BLUE, marker="")
        broken = at[np.isinf(curves.loss)]
        if len(broken):
            low, _ = axes.get_ylim()
            axes.plot(broken, np.full(len(broken), low), "x", color=BLACK, label="not finite", linestyle="")
        return
    # The first steps of a run are far above its first epoch, and would flatten all that follows.
    highest = np.concatenate([report.train, report.val])
    highest = highest[np.isfinite(highest)]
    if len(highest):
        smooth = np.where(smooth <= 1.05 * highest.max(), smooth, np.nan)
    _curve(axes, at, smooth, "training, steps", color=SKY, linewidth=1.0, marker="")


def _draw_gradient(axes: Any, report: Report, axis: Horizontal) -> None:
    curves = report.curves
    _curve(axes, axis.of(curves.at), curves.grad, "", color=PURPLE, linewidth=1.2)
    clip = report.options.get("grad_clip")
    measured = curves.grad[np.isfinite(curves.grad)]
    clipped = isinstance(clip, int | float) and not isinstance(clip, bool) and 0 < clip < LARGEST and len(measured) > 0
    if clipped and measured.min() / 3 < clip < 3 * measured.max():
        axes.axhline(clip, color=BLACK, linewidth=1.2, linestyle=":", label=f"clipped above {clip:.3g}")
    if not len(measured):
        _remark(axes, "not in the log")
    legend = bool(axes.get_legend_handles_labels()[0])
    _finish_steps(axes, report, axis, "Largest gradient norm", "norm", curves.grad, legend=legend)


def _draw_noise(axes: Any, report: Report, axis: Horizontal) -> None:
    count = len(report.val)
    ends = np.unique(np.linspace(1, count, min(count, MAX_POINTS // 4)).astype(int))
    judged = [noise_and_limit(report.train[:end], report.val[:end], report.thresholds) for end in ends]
    noise, limit = np.where(np.abs(judged) < LARGEST / 10, judged, np.nan).T
    epochs = axis.of(report.epochs[ends - 1])
    _curve(axes, epochs, noise, "noise around the trend", color=VERMILION)
    _curve(axes, epochs, limit, "warning above", color=BLACK, linestyle=":", marker="")
    if not np.isfinite(noise).any():
        _remark(axes, "measured from epoch 8 on")
    _finish(axes, "Stability: noise of the validation loss", "sd of the loss", noise, log=False)
    _span(axes, [report], [axis])
    _, top = axes.get_ylim()
    axes.set_ylim(0, top if np.isfinite(noise).any() else 1)


def _draw_gap(axes: Any, report: Report, axis: Horizontal) -> None:
    gap = finite_or_nan(report.val) - finite_or_nan(report.train)
    _curve(axes, axis.of(report.epochs), gap, "validation - training", color=PURPLE)
    axes.axhline(0, color=GREY, linewidth=0.8)
    limit = report.thresholds.max_gap * loss_scale(report.train)
    finite = np.abs(gap[np.isfinite(gap)])
    # A limit far above the data would flatten the curve.
    if len(finite) and finite.max() > limit / 4:
        axes.axhline(limit, color=BLACK, linewidth=1.2, linestyle=":", label=f"warning above {limit:.3g}")
    else:
        axes.plot([], [], color=BLACK, linestyle=":", label=f"warning above {limit:.3g}, off the scale")
    _finish(axes, "Gap: validation minus training loss", "loss", gap, log=False)
    _span(axes, [report], [axis])


def _draw_rate(axes: Any, report: Report, axis: Horizontal) -> None:
    curves = report.curves
    rate, at = (curves.rate, curves.at) if len(curves) else (report.reader.column("lr"), report.epochs)
    positive = np.where(rate > 0, rate, np.nan)
    _curve(
        axes, axis.of(at), positive, "", color=GREEN, drawstyle="steps-post", **({"marker": ""} if len(curves) else {})
    )
    if len(curves):
        _finish_steps(axes, report, axis, "Learning rate", "learning rate", positive, log=True, legend=False)
        return
    _finish(axes, "Learning rate", "learning rate", positive, log=True, legend=False)
    _span(axes, [report], [axis])
    axes.set_xlabel(axis.label)


def _draw_terms(axes: Any, report: Report, axis: Horizontal) -> None:
    everything = []
    for term, (color, style) in TERM_LOOKS.items():
        values = report.reader.column(f"val_{term}")
        if np.isfinite(values).any() and (values[np.isfinite(values)] != 0).any():
            _curve(axes, axis.of(report.epochs), values, term, color=color, linestyle=style)
            everything.append(values)
    if not everything:
        _remark(axes, "no terms in the log")
    _finish(axes, "Validation loss terms, unweighted", "loss term", np.concatenate(everything or [np.zeros(1)]))
    _span(axes, [report], [axis])
    axes.set_xlabel(axis.label)


def _draw_markers(figure: Any, axes: Any, report: Report) -> None:
    """A heat map of validation Pearson: one row per marker, best at the top, one column per epoch.

    The labels take room at the left of the axes, the colour bar under them.
    """
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
    # The scale starts at 0, or at the next lower multiple of 0.2 where a marker is below 0.
    lowest = min(0.0, float(np.floor(5 * np.nanmin(shown)) / 5)) if np.isfinite(shown).any() else 0.0
    axes.set_facecolor("#dddddd")
    # A column is as wide as the epochs it represents: several, where a long log was thinned.
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
    _whole_epochs(axes)
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


def _curve(axes: Any, epochs: np.ndarray, values: np.ndarray, label: str, **look: Any) -> None:
    """A line over the epochs: of a long run the extremes of each stretch, of a short one the points as well."""
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
    """Vertical lines at some epochs, at most the last MAX_MARKS of them."""
    for index, epoch in enumerate(epochs[-MAX_MARKS:]):
        axes.axvline(epoch, linewidth=1.2, label=label if index == 0 else None, **look)


def _remark(axes: Any, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=GREY, fontsize=11)


def _finish(
    axes: Any,
    title: str,
    label: str,
    values: np.ndarray,
    log: bool | None = None,
    legend: bool = True,
) -> None:
    """Title, units, scale, grid, and the legend above the panel, where it covers no data."""
    axes.set_title(title, fontsize=11, loc="left", pad=20 if legend else 6)
    axes.set_ylabel(label)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    positive = values[np.isfinite(values) & (values > 0)]
    finite = values[np.isfinite(values)]
    if log is None:
        log = len(positive) == len(finite) > 0 and bool(positive.max() > 20 * positive.min())
    # Tick labels take most of the drawing time: keep them few.
    axes.locator_params(axis="y", nbins=5)
    if log and len(positive):
        axes.set_yscale("log")
        _plain_log_ticks(axes, positive)
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


def _finish_steps(
    axes: Any, report: Report, axis: Horizontal, title: str, label: str, values: np.ndarray, **more: Any
) -> None:
    """Like ``_finish``, with the span of the steps as horizontal axis."""
    _finish(axes, title, label, values, **more)
    at = report.curves.at
    first = float(np.floor(at[0])) if len(at) > 1 else 0.0
    begin, end = axis.of(np.array([first, at[-1]])).tolist()
    if axis is EPOCHS and end - begin >= 2:
        _whole_epochs(axes)
    axes.set_xlim(begin, end + 0.02 * (end - begin))
    axes.set_xlabel(axis.label)


def _plain_log_ticks(axes: Any, values: np.ndarray) -> None:
    """Few ticks, as plain numbers: matplotlib's powers of ten go through its formula parser, a third of the time."""
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


def _span(axes: Any, reports: Sequence[Report], axes_of_runs: Sequence[Horizontal]) -> None:
    """The same span in every panel, from the first epoch to the last of the longest run; ticks at whole epochs."""
    ends = []
    for report, axis in zip(reports, axes_of_runs, strict=True):
        if len(report.epochs):
            first, last = float(report.epochs[0]), float(report.epochs[-1])
            room = 0.5 + 0.01 * (last - first)
            ends.append(axis.of(np.array([first - room, last + room])))
    if ends:
        axes.set_xlim(float(np.min(ends)), float(np.max(ends)))
    if axes_of_runs[0] is EPOCHS:
        _whole_epochs(axes)


def _whole_epochs(axes: Any) -> None:
    """Ticks at whole epochs."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, steps=[1, 2, 5, 10], min_n_ticks=1))


def _two(value: float) -> str:
    return f"{value:.2f}" if np.isfinite(value) else "-"
