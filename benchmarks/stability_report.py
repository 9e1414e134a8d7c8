"""Tables and figures of the stability benchmark, from the results of its trainings."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from stability_figures import REGRESSION, draw_comparison, draw_curves, draw_markers, kind
from stability_recipes import Recipe

from orion_unet.monitor.diagnostics import WARNING, Thresholds, diagnose

# The window of the former complaint: the last epochs of a run.
LAST = 10
BASELINES = ("training mean", REGRESSION)
# The exit code of a training that diverged.
DIVERGED = 3
GROUPS = {
    "main": "The two recipes",
    "best": "The best recipe",
    "ablation": "From former towards stable, one change at a time",
    "improvement": "Single changes of stable",
    "variation": "Single changes of best",
    "peer": "A peer",
    "handling": "The best recipe with HEXIF's handling of the data",
    "advice": "What the monitor advises",
    "length": "Other lengths and a wider network",
}


def measures(result: dict[str, Any], level: float) -> dict[str, float]:
    """What one training is judged by; NaN where undefined. ``level`` is the error that is to be reached."""
    column = {name: np.array([np.nan if row[name] is None else row[name] for row in result["epochs"]], float)
              for name in ("train", "val", "val_mse")}  # fmt: skip
    train, val, error = column["train"], column["val"], column["val_mse"]
    found = dict.fromkeys(MEASURES, math.nan)
    if not len(val):
        return found
    last = val[-LAST:]
    time = np.arange(len(last))
    if len(last) > 2 and np.isfinite(last).all():
        found["noise"] = float((last - np.polyval(np.polyfit(time, last, 1), time)).std(ddof=2))
    reached = np.flatnonzero(error <= level)
    scores = result.get("scores", {})
    return found | {
        "movement": float(np.ptp(last)),
        "improvement": float(train[0] - train[-1]),
        "relative improvement": float(1 - train[-1] / train[0]),
        "gap": float(val[-1] - train[-1]),
        "relative gap": float((val[-1] - train[-1]) / val[-1]),
        "best loss": float(np.fmin.reduce(val)),
        "epochs to level": float(reached[0] + 1) if len(reached) else math.inf,
        "mse": mean(scores.get("mse", [])),
        "pearson": mean(scores.get("pearson", [])),
        "pearson boxes": mean(scores.get("pearson_boxes", [])),
        "warnings": float(len(warned(result))),
        "diverged": float(result.get("exit_code") == DIVERGED),
    }


MEASURES = (
    "movement", "noise", "improvement", "relative improvement", "gap", "relative gap", "best loss", "epochs to level",
    "mse", "pearson", "pearson boxes", "warnings", "diverged",
)  # fmt: skip


def warned(result: dict[str, Any]) -> list[str]:
    """What the monitor would warn of at the end of this training."""
    rows = result["epochs"]
    epochs, train, val, r2 = (np.array([np.nan if row.get(name) is None else row[name] for row in rows], float)
                              for name in ("epoch", "train", "val", "val_r2"))  # fmt: skip
    found = diagnose(epochs, train, val, Thresholds(), r2=r2)
    return [finding.code for finding in found if finding.severity == WARNING]


def mean(values: Sequence[float | None]) -> float:
    """Mean of what is defined."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan


def write_report(
    results: list[dict[str, Any]], recipes: list[Recipe], sets: list[str], failed: list[str], figures: Path
) -> str:
    """Draw the figures and return the tables as Markdown. Slides held out in turn are one kind of set."""
    kinds = list(dict.fromkeys(kind(name) for name in sets))
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    levels = {}
    for name in sets:
        given = [result["baselines"] for result in results if result["set"] == name and result.get("baselines")]
        levels[name] = mean(given[0][REGRESSION]["mse"]) if given else math.nan
    for result in results:
        found.setdefault((kind(result["set"]), result["recipe"]), []).append(measures(result, levels[result["set"]]))
    seeds = len({result["job"]["options"]["seed"] for result in results})
    lines = [
        "# Stability and quality of recipes",
        "",
        f"{len(results)} trainings, {seeds} seeds; {os.cpu_count()} cores ({platform.machine()}), one thread each; "
        "medians, and in brackets the smallest and the largest.",
        "",
        "Squared error and Pearson: the best model on the held-out cores, mean over markers. L and V: training and "
        "validation loss, each recipe's own; movement and noise (standard deviation about a line) over the last "
        f"{LAST} epochs; in brackets behind improvement and gap the share of the first L and of V. The level is the "
        "squared error of the regression from colours. Warned: trainings that the monitor warned of at their end.",
        "",
    ]
    for each in kinds:
        of_kind = [name for name in sets if kind(name) == each]
        lines += [f"## {each}", ""]
        lines += (
            [f"Held out in turn: {', '.join(n.split(', ')[1].split()[0] for n in of_kind)}.", ""]
            if len(of_kind) > 1
            else []
        )
        lines += table(each, recipes, found, baselines(results, of_kind))
    if failed:
        lines += ["## Failed", "", *(f"- {line}" for line in failed), ""]
    figures.mkdir(parents=True, exist_ok=True)
    names = [recipe.name for recipe in recipes]
    draw_curves(results, sets, figures / "stability_curves.png")
    draw_comparison(found, kinds, [r.name for r in recipes if r.group in ("main", "ablation")],
                    figures / "stability_ablation.png")  # fmt: skip
    draw_markers(results, kinds, names, figures / "stability_markers.png")
    return "\n".join(lines)


def baselines(results: list[dict[str, Any]], sets: list[str]) -> dict[str, dict[str, float]]:
    """Mean scores of the two baselines over the sets."""
    found: dict[str, dict[str, float]] = {}
    for name in BASELINES:
        scores = []
        for each in sets:
            given = [
                result["baselines"][name] for result in results if result["set"] == each and result.get("baselines")
            ]
            scores += given[:1]
        if scores:
            found[name] = {
                key: mean([mean(score[key]) for score in scores]) for key in ("mse", "pearson", "pearson_boxes")
            }
    return found


def table(
    each: str,
    recipes: list[Recipe],
    found: dict[tuple[str, str], list[dict[str, float]]],
    beside: dict[str, dict[str, float]],
) -> list[str]:
    """A table for every group of recipes: how good the best model is, and how the losses moved."""
    lines = []
    for group, title in GROUPS.items():
        rows = [(recipe.name, found[each, recipe.name]) for recipe in recipes
                if recipe.group == group and (each, recipe.name) in found]  # fmt: skip
        if not rows:
            continue
        seeds = max(len(measured) for _, measured in rows)
        lines += [
            f"### {title} ({each}, {seeds} trainings each)", "",
            "| recipe | squared error | Pearson | Pearson, 8 × 8 boxes | movement of V | noise of V | "
            "improvement of L | gap V − L | best V | epochs to the level | warned |",
            "| --- |" + " --- |" * 10,
        ]  # fmt: skip
        if group == "main":
            for name, scores in beside.items():
                lines.append(
                    f"| *{name}* | {scores['mse']:.5f} | {text(scores['pearson'])} | {text(scores['pearson_boxes'])} |"
                    + " |" * 7
                )
        lines += [_row(name, measured) for name, measured in rows] + [""]
    return lines


def _row(name: str, rows: list[dict[str, float]]) -> str:
    diverged = sum(row["diverged"] for row in rows)
    cells = (
        name + (f" ({diverged:.0f}/{len(rows)} diverged)" if diverged else ""),
        spread(rows, "mse", 5),
        spread(rows, "pearson"),
        spread(rows, "pearson boxes", ranged=False),
        spread(rows, "movement", 4),
        spread(rows, "noise", 4, ranged=False),
        f"{spread(rows, 'improvement', ranged=False)} ({middle(rows, 'relative improvement'):.0%})",
        f"{spread(rows, 'gap', ranged=False)} ({middle(rows, 'relative gap'):.0%})",
        spread(rows, "best loss", 4, ranged=False),
        epochs(rows),
        f"{sum(row['warnings'] > 0 for row in rows)}/{len(rows)}",
    )
    return f"| {' | '.join(cells)} |"


def middle(rows: list[dict[str, float]], name: str) -> float:
    """Median of what is defined."""
    known = [row[name] for row in rows if not math.isnan(row[name])]
    return median(known) if known else math.nan


def spread(rows: list[dict[str, float]], name: str, digits: int = 3, ranged: bool = True) -> str:
    """Median, and the smallest and largest."""
    known = [row[name] for row in rows if math.isfinite(row[name])]
    if not known:
        return ""
    found = f"{median(known):.{digits}f}"
    return f"{found} ({min(known):.{digits}f} to {max(known):.{digits}f})" if ranged else found


def epochs(rows: list[dict[str, float]]) -> str:
    """Median number of epochs, where at least half have reached the level."""
    value = median(row["epochs to level"] for row in rows)
    return "never" if math.isinf(value) else "" if math.isnan(value) else f"{value:.0f}"


def text(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3f}"
