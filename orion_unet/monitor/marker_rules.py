"""Finds markers that the network tells nothing about: no correlation at all, or less than colours alone would give."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orion_unet.findings import NOTICE, Finding
from orion_unet.monitor import advice
from orion_unet.text import clean, named

# The first epochs say nothing yet.
FIRST_EPOCH = 6
# A correlation must lie so far below that of the regression.
MARGIN = 0.02


def diagnose_markers(
    epoch: int, newest: Mapping[str, Mapping[str, float]], config: Mapping[str, Any], options: Mapping[str, Any]
) -> list[Finding]:
    """Judge the markers' Pearson of the newest epoch; nan where undefined.

    ``config`` is the document of config.json: ``regression_pearson`` is what a linear regression from the colours of
    the H&E reaches on the same cores, ``empty_channels`` are markers that are trained as empty, which say nothing, and
    ``unvalidated_channels`` those that were measured in no validation core.
    """
    if epoch < FIRST_EPOCH:
        return []
    reached, empty = config.get("regression_pearson"), config.get("empty_channels")
    unvalidated = config.get("unvalidated_channels")
    reached = reached if isinstance(reached, Mapping) else {}
    lists = [names for names in (empty, unvalidated) if isinstance(names, list)]
    ignored = {name for names in lists for name in names if isinstance(name, str)}
    silent, below = [], []
    for name, metrics in newest.items():
        here, colours = metrics["pearson"], advice.option_number(reached, name)
        if name in ignored:
            continue
        if not abs(here) <= 1:
            # A run of an earlier version does not say which markers it trains as empty.
            if isinstance(empty, list):
                silent.append(clean(name, 30))
        elif colours is not None and here < colours - MARGIN:
            below.append((here - colours, f"{clean(name, 30)} {here:.2f} (colours {colours:.2f})"))
    parts = []
    if silent:
        parts.append(f"no correlation, because the prediction or the measured marker is constant: {named(silent)}")
    if below:
        worst = named(text for _, text in sorted(below))
        parts.append(f"below a linear regression from the colours of the H&E: {worst}")
    if not parts:
        return []
    count = len(silent) + len(below)
    message = f"{count} of {len(newest)} markers in epoch {epoch}: {'; '.join(parts)}"
    return [Finding("no_signal", NOTICE, message, float(count), 0.0, advice.no_signal(options, bool(silent)))]
