"""What quantify found, as quantify.json and on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from orion_unet import __version__
from orion_unet.command_options import QuantifyOptions
from orion_unet.inference.trust import RULE, UNKNOWN, MarkerTrust, summary
from orion_unet.quantification.cells import ImageCells
from orion_unet.quantification.comparison import Comparison
from orion_unet.quantification.marker_table import positive_counts
from orion_unet.quantification.positives import Positives
from orion_unet.run_log import utc_now
from orion_unet.text import clean, short_number

SCHEMA = 1
SCORES = {"pearson": "Pearson", "auc": "AUC", "average_precision": "AP", "f1": "F1"}


def document(
    options: QuantifyOptions,
    names: Sequence[str],
    trust: Mapping[str, MarkerTrust] | None,
    positives: Positives,
    images: Sequence[ImageCells],
    comparison: Comparison | None,
) -> dict[str, Any]:
    """Content of quantify.json; what is undefined is null."""
    counts = positive_counts(names, positives, images)
    return {
        "schema": SCHEMA,
        "created": utc_now(),
        "version": __version__,
        "images": [
            {
                "image": cells.name,
                "file": str(cells.path),
                "height": cells.shape[0],
                "width": cells.shape[1],
                "pixel_size_um": cells.pixel_size_um,
                "cells": len(cells.numbers),
                "cells_from": cells.source,
                "stain": cells.stain.state if cells.stain else None,
                "stain_distance": cells.stain.distance if cells.stain else None,
                "stain_limit": cells.stain.limit if cells.stain else None,
            }
            for cells in images
        ],
        "markers": list(names),
        "verdicts": None if trust is None else {name: asdict(trust.get(name, UNKNOWN)) for name in names},
        "verdict_rule": None if trust is None else RULE,
        "rings_px": options.rings,
        "measured": None if options.measured is None else str(options.measured),
        "cutoffs": {
            name: {
                "predicted": cutoff.predicted,
                "measured": cutoff.measured,
                "unit": cutoff.unit,
                "origin": cutoff.origin,
                "positive": counts.get(name),
            }
            for name, cutoff in positives.cutoffs.items()
        },
        "agreement": None if comparison is None else comparison.document(),
        "intervals": None if comparison is None else comparison.interval_document(),
    }


def report(
    names: Sequence[str],
    trust: Mapping[str, MarkerTrust] | None,
    positives: Positives,
    images: Sequence[ImageCells],
    comparison: Comparison | None,
    say: Callable[[str], None],
) -> None:
    """Show verdicts, positive cells, agreement and the origin of the cut-offs on the terminal."""
    counts = positive_counts(names, positives, images)
    scores = {} if comparison is None else {name: found.scores for name, found in comparison.markers.items()}
    if scores or counts:
        _show(names, trust, positives, counts, scores)
    elif trust is not None:
        say(summary(trust, names))
    origins = sorted({cutoff.origin for cutoff in positives.cutoffs.values()})
    if origins:
        say(f"Cut-offs from {'; '.join(origins)}.")
    else:
        say("No cell is called positive: there are no cut-offs (--evaluation DIR or --positive NAME=X,...).")


def _show(
    names: Sequence[str],
    trust: Mapping[str, MarkerTrust] | None,
    positives: Positives,
    counts: dict[str, int],
    scores: dict[str, dict[str, float]],
) -> None:
    """Print a row for each marker that has a cut-off or measured values."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 1))
    table.add_column("marker", no_wrap=True, max_width=18, overflow="ellipsis")
    if trust is not None:
        table.add_column("held-out tissue", no_wrap=True)
    words = SCORES if scores else {}
    for title in ("cut-off", "positive", *words.values()):
        table.add_column(title, justify="right", no_wrap=True)
    for name in names:
        if name in counts or name in scores:
            count = f"{counts[name]:,}" if name in counts else "-"
            row = [] if trust is None else [trust.get(name, UNKNOWN).verdict]
            row += [short_number(positives.value(name, "predicted")), count]
            row += [short_number(scores[name][score], 3) if name in scores else "-" for score in words]
            # Text, so that a name like CD3[e] is not taken for markup.
            table.add_row(Text(clean(name)), *row)
    Console().print(table)
