"""Tables and figures of the stability benchmark, from the results of its trainings."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median, median_low
from typing import Any

import numpy as np
from stability_figures import REGRESSION, draw_comparison, draw_curves, draw_markers, kind
from stability_recipes import BARE_RATES, PROMISE, Recipe

from orion_unet.findings import WARNING
from orion_unet.monitor.diagnostics import Thresholds, diagnose

# Epochs at the end of a run over which movement and noise are measured.
LAST = 10
# The recipes that a group changes: listed above the group, with the same seeds.
BASES = {
    "best epoch": ("stable",), "ablation": ("former",), "improvement": ("published",), "variation": ("stable",),
    "handling": ("stable",), "advice": ("former", "published", "stable"),
    "statistics": ("stable", "former", "published", *(f"{name}, measured statistics" for name in BARE_RATES)),
}  # fmt: skip
PROMISED = "All epochs of every training: the worst seed"
LEVEL = "Level of the markers, with and without recalibration (stable)"
COLUMNS = (
    "recipe", "squared error", "Pearson", "Pearson, 8 × 8 boxes", "movement of V", "noise of V", "largest rise of V",
    "largest fall of r2", "lowest r2", "improvement of L", "gap V − L", "best V", "epochs to the level", "warned",
)  # fmt: skip
# The promise: V is never above so many times its lowest so far, and r2 never below so much after the first epoch.
LARGEST_RISE, LOWEST_R2 = 1.3, -1.0
BASELINES = ("training mean", REGRESSION)
# Exit code of a training that diverged.
DIVERGED = 3
GROUPS = {
    "main": "Former and published",
    "stable": "Stable",
    "bare": "A plain training at a constant rate",
    "best epoch": "The best epoch: of the lowest V, or of the highest Pearson",
    "statistics": "How batch norm's statistics come about",
    "ablation": "From former towards published, one change at a time",
    "improvement": "Single changes of published",
    "variation": "Single changes of stable",
    "peer": "A peer: MONAI's BasicUNet with squared error",
    "pix2pix": "A peer: pix2pix's U-Net with absolute error",
    "peer network": "Peers' networks with stable's recipe",
    "handling": "Stable with HEXIF's handling of the data",
    "advice": "Advice for runs that are unstable, slow or overfitting",
}


def measures(result: dict[str, Any], level: float) -> dict[str, float]:
    """The measures of one training; NaN where undefined. ``level`` is the error whose first epoch is counted."""
    train, val, error = (_column(result["epochs"], name) for name in ("train", "val", "val_mse"))
    found = dict.fromkeys(MEASURES, math.nan) | {"diverged": float(result.get("exit_code") == DIVERGED)}
    if not len(val):
        return found
    last = val[-LAST:]
    time = np.arange(len(last))
    if len(last) > 2 and np.isfinite(last).all():
        found["noise"] = float((last - np.polyval(np.polyfit(time, last, 1), time)).std(ddof=2))
    reached = np.flatnonzero(error <= level)
    # The errors of log-transformed targets are in another unit.
    comparable = math.isfinite(level) and result.get("job", {}).get("options", {}).get("target_transform") != "log1p"
    scores = result.get("scores", {})
    return found | {
        "movement": float(last.max() - last.min()) if np.isfinite(last).all() else math.inf,
        "improvement": _difference(train[0], train[-1]),
        "relative improvement": _difference(train[0], train[-1]) / float(train[0]),
        "gap": _difference(val[-1], train[-1]),
        "relative gap": _difference(val[-1], train[-1]) / float(val[-1]),
        "best loss": float(val.min()),
        "largest rise": largest_rise(val),
        "lowest r2": lowest(_column(result["epochs"], "val_r2")),
        "largest fall": largest_fall(_column(result["epochs"], "val_r2")),
        "epochs to level": (float(reached[0] + 1) if len(reached) else math.inf) if comparable else math.nan,
        "mse": mean(scores.get("mse", [])),
        "pearson": mean(scores.get("pearson", [])),
        "pearson boxes": mean(scores.get("pearson_boxes", [])),
        "warnings": float(len(warned(result))) if "val_r2" in result["epochs"][0] else math.nan,
    }


def largest_rise(val: np.ndarray) -> float:
    """Largest V of an epoch over the lowest V of the epochs before it, over the whole run: 1 if V only falls."""
    if len(val) < 2:
        return math.nan
    return max(1.0, float((val[1:] / np.minimum.accumulate(val)[:-1]).max()))


def lowest(r2: np.ndarray) -> float:
    """The lowest r2 of any epoch after the first; of the first where there is no other."""
    known = r2[1:] if len(r2) > 1 else r2
    return float(known.min()) if len(known) and np.isfinite(known).all() else math.nan


def largest_fall(r2: np.ndarray) -> float:
    """Largest fall of r2 below the best of the epochs before it: the rise of the squared error in units of the means'
    error. 0 if r2 only rises; NaN where an epoch has none."""
    return float(np.maximum(0, np.maximum.accumulate(r2)[:-1] - r2[1:]).max()) if len(r2) > 1 else math.nan


def worst(rows: list[dict[str, float]]) -> dict[str, float]:
    """The worst of each measure of the promise; NaN where one is undefined."""
    largest = {name: float(np.max([row[name] for row in rows])) for name in ("largest rise", "largest fall")}
    return largest | {"lowest r2": float(np.min([row["lowest r2"] for row in rows]))}


def over_slides(measured: list[dict[str, float]]) -> dict[str, float]:
    """Mean over the held-out slides, for one seed; counts of the trainings that were warned of or diverged."""
    found = {name: float(np.mean([one[name] for one in measured])) for name in MEASURES}
    # A promise about every epoch is as good as the worst slide.
    found |= worst(measured)
    counted = {name: float(sum(one[name] > 0 for one in measured)) for name in ("warnings", "diverged")}
    unknown = any(math.isnan(one["warnings"]) for one in measured)
    return found | counted | {"trainings": len(measured)} | ({"warnings": math.nan} if unknown else {})


MEASURES = (
    "movement", "noise", "improvement", "relative improvement", "gap", "relative gap", "best loss", "largest rise",
    "lowest r2", "largest fall", "epochs to level", "mse", "pearson", "pearson boxes", "warnings", "diverged",
)  # fmt: skip


def warned(result: dict[str, Any]) -> list[str]:
    """Codes of the monitor's warnings at the end of this training."""
    columns = [_column(result["epochs"], name) for name in ("epoch", "train", "val", "val_r2", "lr")]
    found = diagnose(*columns[:3], Thresholds(), result.get("job", {}).get("options"), *columns[3:])
    return [finding.code for finding in found if finding.severity == WARNING]


def _column(rows: list[dict[str, Any]], name: str) -> np.ndarray:
    """A column over the epochs (E,): inf for a loss that was not finite, NaN for any other missing value."""
    null = math.inf if name in ("train", "val") else math.nan
    return np.array([null if row.get(name) is None else row[name] for row in rows], float)


def _difference(left: float, right: float) -> float:
    """left − right; NaN unless both are finite."""
    return float(left - right) if math.isfinite(left) and math.isfinite(right) else math.nan


def mean(values: Sequence[float | None]) -> float:
    """Mean of the values that are defined."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan


def write_report(
    results: list[dict[str, Any]], recipes: list[Recipe], sets: list[str], failed: list[str], figures: Path
) -> str:
    """Draw the figures and return the tables as Markdown, averaged over the sets of a kind (the held-out slides)."""
    kinds = list(dict.fromkeys(kind(name) for name in sets))
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    levels = {(result["set"], seed_of(result)): mean(result["level"]) for result in results if "level" in result}
    of_seed: dict[tuple[str, str, int], list[dict[str, float]]] = {}
    for result in results:
        key = (kind(result["set"]), result["recipe"], seed_of(result))
        level = levels.get((result["set"], seed_of(result)), math.nan)
        of_seed.setdefault(key, []).append(measures(result, level))
    for (each, name, _), measured in of_seed.items():
        if len(measured) == sum(kind(one) == each for one in sets):
            found.setdefault((each, name), []).append(over_slides(measured))
    hours = sum(result["train_s"] for result in results) / 3600
    real = [each for each in kinds if not each.startswith("demo")]
    named = f" --real_pairs DIR{' ...' * (len(real) > 1)} --real_names {' '.join(map(repr, real))}" if real else ""
    lines = [
        "# Stability and quality of recipes",
        "",
        f"`python benchmarks/stability.py{named}`: {len(results)} trainings, {hours:.1f} core hours; "
        f"{os.cpu_count()} CPU cores ({platform.machine()}), torch {version('torch')}. Values are medians over the "
        "seeds, with the smallest and the largest in brackets.",
        "",
        "- Squared error and Pearson: of the best model, chosen on other cores than those that score it, mean over "
        "markers. `stable`, and every recipe that changes it, is scored with its recalibration; the others have none.",
        "- L and V: training and validation loss. Each recipe has its own loss, so losses of different recipes cannot "
        "be compared.",
        f"- Movement (largest minus smallest) and noise (standard deviation about a line): of V, over the last {LAST} "
        "epochs.",
        "- Largest rise: V of an epoch over the lowest V before it, the largest of the whole run and of all slides; "
        "lowest r2: of any epoch but the first, the lowest of all slides; largest fall of r2: below its best so far, "
        "that is, the rise of the squared error in units of the training means' error.",
        "- Improvement: fall of L from the first to the last epoch, in brackets as a share of the first L. Gap: V − L "
        "in the last epoch, in brackets as a share of V.",
        "- Epochs to the level: until the validation squared error is below that of the regression from colours.",
        "- Warned: number of trainings for which the monitor gives a warning at their end.",
        "",
        *promise_table(kinds, recipes, found),
    ]
    for each in kinds:
        of_kind = [name for name in sets if kind(name) == each]
        lines += [f"## {each}", ""]
        lines += (
            [
                f"Each slide was held out in turn ({', '.join(n.split(', ')[1].split()[0] for n in of_kind)}): half "
                "of its cores chose the best epoch, the others scored. The values of a seed are means over the slides.",
                "",
            ]
            if len(of_kind) > 1
            else []
        )
        lines += table(each, recipes, found, baselines(results, of_kind))
        lines += level_table([result for result in results if kind(result["set"]) == each])
    if failed:
        lines += ["## Failed", "", *(f"- {line}" for line in failed), ""]
    figures.mkdir(parents=True, exist_ok=True)
    names = [recipe.name for recipe in recipes]
    draw_curves(results, kinds, figures / "stability_curves.png")
    draw_comparison(found, kinds, [r.name for r in recipes if r.group in ("main", "ablation")],
                    figures / "stability_ablation.png")  # fmt: skip
    draw_markers(results, kinds, names, figures / "stability_markers.png")
    return "\n".join(lines)


def promise_table(
    kinds: list[str], recipes: list[Recipe], found: dict[tuple[str, str], list[dict[str, float]]]
) -> list[str]:
    """The worst training of every kind of set: rises of V, falls and lowest values of r2, over all epochs.

    Promised are an r2 above LOWEST_R2 after the first epoch, for ``stable`` and for plain trainings, and for ``stable``
    a V of at most LARGEST_RISE times its best so far.
    """
    lines = [
        f"## {PROMISED}", "",
        "| set | recipe | trainings | largest rise of V | largest fall of r2 | lowest r2 after epoch 1 | kept |",
        "| --- |" + " --- |" * 6,
    ]  # fmt: skip
    for each, recipe in ((each, recipe) for each in kinds for recipe in recipes if recipe.group in PROMISE):
        rows = found.get((each, recipe.name))
        if not rows:
            continue
        rise, fall, least = worst(rows).values()
        met = least > LOWEST_R2 and (rise <= LARGEST_RISE or recipe.group != "stable")
        kept = "" if recipe.group == "main" else "yes" if met else "no"
        count = f"{sum(row['trainings'] for row in rows):.0f}"
        lines.append(f"| {each} | {recipe.name} | {count} | {rise:.2f} | {fall:.2f} | {least:.2f} | {kept} |")
    return [*lines, ""]


def level_table(results: list[dict[str, Any]]) -> list[str]:
    """What the recalibration changes, for ``stable``; empty where nothing was scored both with and without it."""
    both = [
        result for result in results if {"raw_scores", "baselines"} <= result.keys() and result["recipe"] == "stable"
    ]
    if not both:
        return []
    lines = [f"### {LEVEL}", ""]
    lines += ["| predictions | squared error | Pearson | markers worse than their training mean |"]
    lines += ["| --- " * 4 + "|"]
    for name, key in (("recalibrated", "scores"), ("as the network gives them", "raw_scores")):
        error, r = (
            over_seeds(both, lambda result, key=key, column=column: mean(result[key][column]))
            for column in ("mse", "pearson")
        )
        worse = [below_mean(result[key], result["baselines"]["training mean"]) for result in both]
        counts = sorted(len(markers) for markers in worse)
        named = sorted({marker for markers in worse for marker in markers})
        lines.append(
            f"| {name} | {error:.5f} | {r:.3f} | {median(counts):g} of {len(both[0][key]['names'])} "
            f"({counts[0]} to {counts[-1]}){': ' * bool(named)}{', '.join(named)} |"
        )
    return [*lines, ""]


def below_mean(scores: dict[str, Any], means: dict[str, Any]) -> list[str]:
    """Markers with a larger squared error than their training mean has; a marker that is constant is left out."""
    triples = zip(scores["names"], scores["mse"], means["mse"], strict=True)
    return [name for name, error, least in triples if None not in (error, least) and least > 0 and error > least]


def baselines(results: list[dict[str, Any]], sets: list[str]) -> dict[str, dict[str, float]]:
    """Scores of the two baselines: means over the sets, of which medians over the seeds."""
    found: dict[str, dict[str, float]] = {}
    both = [result for result in results if result["set"] in sets and "baselines" in result]
    for name in BASELINES if both else ():
        found[name] = {
            key: over_seeds(both, lambda result, name=name, key=key: mean(result["baselines"][name][key]))
            for key in ("mse", "pearson", "pearson_boxes")
        }
    return found


def over_seeds(results: list[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> float:
    """Median over the seeds of the means over a seed's slides."""
    seeds = sorted({seed_of(result) for result in results})
    return median(mean([value(result) for result in results if seed_of(result) == seed]) for seed in seeds)


def seed_of(result: dict[str, Any]) -> int:
    return int(result["job"]["options"]["seed"])


def table(
    each: str,
    recipes: list[Recipe],
    found: dict[tuple[str, str], list[dict[str, float]]],
    beside: dict[str, dict[str, float]],
) -> list[str]:
    """One table per group of recipes, with the measures of ``measures``."""
    lines = []
    for group, title in GROUPS.items():
        rows = [(recipe.name, found[each, recipe.name]) for recipe in recipes
                if recipe.group == group and (each, recipe.name) in found]  # fmt: skip
        if not rows:
            continue
        seeds = max(len(measured) for _, measured in rows)
        count = f"{seeds} seed{'s' if seeds > 1 else ''}"
        bases = [(f"{base}, {count}", found[each, base][:seeds]) for base in BASES.get(group, ())
                 if (each, base) in found]  # fmt: skip
        rows = [*bases, *((name if len(measured) == seeds else f"{name} ({len(measured)} of {seeds})", measured)
                          for name, measured in rows)]  # fmt: skip
        lines += [
            f"### {title} ({each}, {count} each)", "",
            f"| {' | '.join(COLUMNS)} |", "| --- " * len(COLUMNS) + "|",
        ]  # fmt: skip
        if group == "main":
            for name, scores in beside.items():
                lines.append(
                    f"| *{name}* | {scores['mse']:.5f} | {text(scores['pearson'])} | {text(scores['pearson_boxes'])} |"
                    + " |" * (len(COLUMNS) - 4)
                )
        lines += [_row(name, measured) for name, measured in rows] + [""]
    return lines


def _row(name: str, rows: list[dict[str, float]]) -> str:
    diverged, trainings = (sum(row[column] for row in rows) for column in ("diverged", "trainings"))
    cells = (
        name + (f" ({diverged:.0f}/{trainings:.0f} diverged)" if diverged else ""),
        spread(rows, "mse", 5),
        spread(rows, "pearson"),
        spread(rows, "pearson boxes", ranged=False),
        spread(rows, "movement", 4),
        spread(rows, "noise", 4, ranged=False),
        spread(rows, "largest rise", 2),
        spread(rows, "largest fall", 2),
        spread(rows, "lowest r2", 2),
        f"{spread(rows, 'improvement', ranged=False)} ({share(rows, 'relative improvement')})",
        f"{spread(rows, 'gap', ranged=False)} ({share(rows, 'relative gap')})",
        spread(rows, "best loss", 4, ranged=False),
        epochs(rows),
        "" if any(math.isnan(row["warnings"]) for row in rows)
        else f"{sum(row['warnings'] for row in rows):.0f}/{trainings:.0f}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def share(rows: list[dict[str, float]], name: str) -> str:
    """Median of the defined values, in per cent."""
    known = [row[name] for row in rows if not math.isnan(row[name])]
    return f"{median(known):.0%}" if known else "undefined"


def spread(rows: list[dict[str, float]], name: str, digits: int = 3, ranged: bool = True) -> str:
    """Median, with the smallest and the largest in brackets, and the number of values when some are missing."""
    known = [row[name] for row in rows if math.isfinite(row[name])]
    if not known:
        return ""
    found = f"{median(known):.{digits}f}"
    if ranged and len(known) > 1:
        found += f" ({min(known):.{digits}f} to {max(known):.{digits}f})"
    return found if len(known) == len(rows) else f"{found} of {len(known)}"


def epochs(rows: list[dict[str, float]]) -> str:
    """Median number of epochs; "never" when fewer than half reach the level."""
    value = median_low(row["epochs to level"] for row in rows)
    return "never" if math.isinf(value) else "" if math.isnan(value) else f"{value:.0f}"


def text(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3f}"
