"""The curves of the page: losses, Pearson, every marker, and the steps within the epochs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from orion_unet.monitor.chart import Curve, chart
from orion_unet.monitor.horizontal import EPOCHS, Horizontal, horizontals
from orion_unet.monitor.report import Report
from orion_unet.monitor.steps_reader import EPOCH, STEP
from orion_unet.text import clean, short_number

# The palette of Okabe and Ito (2008) without yellow and black, which one of a light and a dark page would swallow;
# with the dashes, 24 curves differ.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("", "6 4", "1.5 4", "10 4 1.5 4")
BLUE, VERMILION, GREEN, PURPLE, _, SKY = COLOURS
# Of more markers than MAX_MARKERS, the best and the worst; at first, so many of both ends are shown.
MAX_MARKERS, SHOWN_AT_FIRST = 40, 3


def curves(report: Report, x: str) -> list[str]:
    """The charts under their heading, over epochs, steps, patches or hours; nothing where there is nothing to draw."""
    (axis,) = horizontals([report], x)
    charts = [*_of_epochs(report, axis), *_of_steps(report, axis)]
    charts = [text for text in charts if text]
    return ['<h2>Curves</h2><div class="charts">', *charts, "</div>"] if charts else []


def _of_epochs(report: Report, axis: Horizontal) -> list[str]:
    if not len(report.epochs):
        return []
    at, places = axis.of(report.epochs), _places(report.epochs, axis)
    losses = (Curve("training", report.train, BLUE, "6 4"), Curve("validation", report.val, VERMILION))
    pearson = (Curve("mean over markers", report.reader.column("pearson"), GREEN),)
    epochs, values = report.reader.channels.pearson()
    order = _order(values)
    markers = [
        Curve(
            clean(report.reader.channels.names[marker], 30),
            values[marker].astype(float),
            COLOURS[place % len(COLOURS)],
            DASHES[place // len(COLOURS) % len(DASHES)],
            min(place, len(order) - 1 - place) < SHOWN_AT_FIRST,
        )
        for place, marker in enumerate(order)
    ]
    return [
        chart("Loss", axis.label, at, places, losses),
        chart("Validation Pearson", axis.label, at, places, pearson),
        chart("Validation Pearson of markers", axis.label, axis.of(epochs), _places(epochs, axis), markers),
    ]


def _order(values: np.ndarray) -> list[int]:
    """Markers (C, E) that have a value, the newest best first; of too many the ones in the middle are left out."""
    if not values.size:
        return []
    newest = np.where(np.isfinite(values[:, -1]), values[:, -1], -2)
    order = [int(at) for at in np.argsort(-newest, kind="stable") if np.isfinite(values[at]).any()]
    half = MAX_MARKERS // 2
    return order if len(order) <= MAX_MARKERS else [*order[:half], *order[-half:]]


def _of_steps(report: Report, axis: Horizontal) -> list[str]:
    steps = report.curves
    if not len(steps):
        return []
    at = axis.of(steps.at)
    places = [f"epoch {epoch:.0f} step {step:.0f}" for epoch, step in report.steps.history()[:, [EPOCH, STEP]]]
    if axis is not EPOCHS:
        places = [f"{place}, {axis.label} {short_number(where, 6)}" for place, where in zip(places, at, strict=True)]
    loss = (
        Curve("mean since the line before", steps.loss, SKY),
        Curve("smoothed", steps.smooth, BLUE),
    )
    return [
        chart("Loss of the steps", axis.label, at, places, loss),
        chart("Learning rate", axis.label, at, places, (Curve("rate", steps.rate, GREEN),)),
        chart("Largest gradient norm", axis.label, at, places, (Curve("norm", steps.grad, PURPLE),)),
    ]


def _places(epochs: np.ndarray, axis: Horizontal) -> Sequence[str]:
    places = [f"epoch {epoch}" for epoch in epochs.tolist()]
    if axis is EPOCHS:
        return places
    return [
        f"{place}, {axis.label} {short_number(where, 6)}"
        for place, where in zip(places, axis.of(epochs).tolist(), strict=True)
    ]
