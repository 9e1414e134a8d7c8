"""Curves as inline SVG for a page, with the text that a pointer over them shows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from orion_unet.text import short_number

WIDTH, HEIGHT = 560, 230
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 10, 36
MAX_POINTS = 600


@dataclass(frozen=True)
class Curve:
    """A named curve, nan where it has no value; ``dashes`` as in SVG's stroke-dasharray."""

    name: str
    values: np.ndarray
    colour: str
    dashes: str = ""


def chart(title: str, label: str, at: np.ndarray, places: Sequence[str], curves: Sequence[Curve]) -> str:
    """A figure element: the curves over ``at`` (N,), rising; ``places`` (N,) name the points for the pointer.

    Names and texts may come from anyone: they are escaped here.
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
    first, last = (float(at[0]), float(at[-1])) if len(at) > 1 else (float(at[0]) - 0.5, float(at[0]) + 0.5)
    x = LEFT + (at - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def height(value: np.ndarray) -> np.ndarray:
        scaled = np.log(value / low) / np.log(high / low) if log else (value - low) / (high - low)
        return HEIGHT - BOTTOM - scaled * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in _ticks(low, high, log, 5):
        y = float(height(np.array(tick)))
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(short_number(tick, 3))}</text>')
    for tick in _ticks(first, last, False, 8):
        left = LEFT + (tick - first) / (last - first) * (WIDTH - LEFT - RIGHT)
        text = escape(short_number(tick, 6))
        parts.append(f'<text x="{left:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{text}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 3}" text-anchor="middle">{escape(label)}</text>')
    for curve, row in zip(shown, values, strict=True):
        look = f'stroke="{escape(curve.colour)}" stroke-dasharray="{escape(curve.dashes)}"'
        parts.append(f'<path class="curve" {look} d="{_path(x, height(row))}"/>')
    parts.append(f'<path class="pointer" d="M0 {TOP}V{HEIGHT - BOTTOM}"/>')
    texts = [
        f"{places[index]}: " + ", ".join(f"{c.name} {short_number(v)}" for c, v in zip(shown, column, strict=True))
        for index, column in zip(kept.tolist(), values.T.tolist(), strict=True)
    ]
    data = escape(json.dumps({"at": [round(place, 1) for place in x.tolist()], "texts": texts}), quote=True)
    keys = "".join(
        f'<span><svg class="key" viewBox="0 0 24 8"><path class="curve" stroke="{escape(curve.colour)}" '
        f'stroke-dasharray="{escape(curve.dashes)}" d="M0 4H24"/></svg> {escape(curve.name)}</span>'
        for curve in shown
    )
    return (
        f'<figure class="chart"><figcaption><b>{escape(title)}</b> {keys}</figcaption>'
        f'<svg class="curves" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}" '
        f'data-points="{data}">{"".join(parts)}</svg><output>{escape(texts[-1])}</output></figure>'
    )


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
    return [float(tick) for tick in ticks if low <= tick <= high]
