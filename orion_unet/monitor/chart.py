"""Curves as inline SVG for a page, each with a button that switches it on and off and shows its value."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from orion_unet.text import short_number

WIDTH, HEIGHT = 560, 230
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 10, 40
MAX_POINTS = 600
# From so many curves on, buttons switch all of them.
MANY = 6


@dataclass(frozen=True)
class Curve:
    """A named curve, nan where it has no value; ``dashes`` as in SVG's stroke-dasharray; ``on``: shown at first."""

    name: str
    values: np.ndarray
    colour: str
    dashes: str = ""
    on: bool = True


def chart(title: str, label: str, at: np.ndarray, places: Sequence[str], curves: Sequence[Curve]) -> str:
    """A figure element: the curves over ``at`` (N,), never falling; ``places`` (N,) name the points for the pointer.

    Empty where no curve has a value. Names and texts may come from anyone: they are escaped here.
    """
    shown = [curve for curve in curves if np.isfinite(curve.values).any()]
    if not shown:
        return ""
    kept = thinned([curve.values for curve in shown])
    at = at[kept]
    values = np.stack([np.where(np.isfinite(curve.values[kept]), curve.values[kept], np.nan) for curve in shown])
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    log = low > 0 and high > 20 * low
    if high <= low:
        room = abs(low) / 10 or 1.0
        low, high = low - room, high + room
    first, last = float(at[0]), float(at[-1])
    if last <= first:
        first, last = first - 0.5, last + 0.5
    x = LEFT + (at - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def height(value: np.ndarray) -> np.ndarray:
        scaled = np.log(value / low) / np.log(high / low) if log else (value - low) / (high - low)
        return HEIGHT - BOTTOM - scaled * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in _ticks(low, high, log, 6):
        y = float(height(np.array(tick)))
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(short_number(tick, 3))}</text>')
    for index, tick in enumerate(_ticks(first, last, False, 8)):
        left = LEFT + (tick - first) / (last - first) * (WIDTH - LEFT - RIGHT)
        # A narrow screen has room for every other one.
        fine = ' class="fine"' if index % 2 else ""
        text = escape(short_number(tick, 6))
        parts.append(f'<text x="{left:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle"{fine}>{text}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 5}" text-anchor="middle">{escape(label)}</text>')
    for index, (curve, row) in enumerate(zip(shown, values, strict=True)):
        off = "" if curve.on else " off"
        parts.append(f'<path class="curve{off}" {_look(curve)} data-curve="{index}" d="{_path(x, height(row))}"/>')
    parts.append(f'<path class="pointer" d="M0 {TOP}V{HEIGHT - BOTTOM}"/>')
    texts = [[short_number(value) for value in row] for row in values.tolist()]
    points = {
        "at": [round(place, 1) for place in x.tolist()],
        "places": [places[index] for index in kept.tolist()],
        "values": texts,
    }
    data = escape(json.dumps(points, separators=(",", ":")), quote=True)
    keys = [_key(index, curve, text[-1]) for index, (curve, text) in enumerate(zip(shown, texts, strict=True))]
    if len(shown) >= MANY:
        keys += [
            f'<button type="button" class="all" data-all="{word}" hidden>{word}</button>' for word in ("all", "none")
        ]
    return (
        f'<figure class="chart{" many" if len(shown) >= MANY else ""}"><figcaption><b>{escape(title)}</b> '
        f'<output class="where">{escape(places[int(kept[-1])])}</output></figcaption>'
        f'<div class="keys">{"".join(keys)}</div>'
        f'<svg class="curves" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}" '
        f'data-points="{data}">{"".join(parts)}</svg></figure>'
    )


def _key(index: int, curve: Curve, value: str) -> str:
    """The button of a curve; it does nothing without scripts."""
    return (
        f'<button type="button" data-curve="{index}" data-name="{escape(curve.name)}" '
        f'aria-pressed="{"true" if curve.on else "false"}" disabled>'
        f'<svg class="key" viewBox="0 0 24 8"><path class="curve" {_look(curve)} d="M0 4H24"/></svg> '
        f"{escape(curve.name)} <output>{escape(value)}</output></button>"
    )


def _look(curve: Curve) -> str:
    return f'stroke="{escape(curve.colour)}" stroke-dasharray="{escape(curve.dashes)}"'


def thinned(curves: Sequence[np.ndarray]) -> np.ndarray:
    """Indices of at most MAX_POINTS points of curves (N,) of one length, the last one included: of each stretch of a
    long curve, where the curves are lowest and highest."""
    count = len(curves[0])
    if count <= MAX_POINTS:
        return np.arange(count)
    kept = {count - 1}
    for stretch in np.array_split(np.arange(count), (MAX_POINTS - 1) // (2 * len(curves))):
        for values in curves:
            finite = np.isfinite(values[stretch])
            kept.add(int(stretch[np.where(finite, values[stretch], np.inf).argmin()]))
            kept.add(int(stretch[np.where(finite, values[stretch], -np.inf).argmax()]))
    return np.array(sorted(kept))


def _path(x: np.ndarray, y: np.ndarray) -> str:
    """A line that is interrupted where a value is missing; a lone point is a dot, because its caps are round."""
    parts, pen = [], "M"
    for left, down in zip(x.tolist(), y.tolist(), strict=True):
        if not np.isfinite(down):
            pen = "M"
            continue
        parts.append(f"{pen}{left:.1f} {down:.1f}" + ("h0" if pen == "M" else ""))
        pen = "L"
    return "".join(parts)


def _ticks(low: float, high: float, log: bool, most: int) -> list[float]:
    """Round numbers from ``low`` to ``high``, about ``most`` of them."""
    if log:
        powers = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
        ticks = powers if high > 1000 * low else np.outer(powers, (1, 2, 5)).ravel()
        ticks = ticks[:: max(1, len(ticks) // 8)]
    else:
        step = 10.0 ** np.floor(np.log10((high - low) / most))
        step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= most)
        ticks = step * np.arange(np.ceil(low / step), np.floor(high / step) + 1)
    # Minus zero is zero.
    return [float(tick) or 0.0 for tick in ticks if low <= tick <= high]
