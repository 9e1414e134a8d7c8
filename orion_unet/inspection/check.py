"""Inspects a folder in bounded memory: the checks of training first, then the measurements."""

from __future__ import annotations

import shlex
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

from orion_unet.config import DataOptions
from orion_unet.data.alignment import register_command
from orion_unet.data.camera_noise import NoiseEvidence, look_for_noise
from orion_unet.data.channels import nuclear_channel
from orion_unet.data.pairs import PairTable, find_pairs
from orion_unet.data.scale import Progress, Scales, measure_scales, no_progress
from orion_unet.data.split import Split, make_split
from orion_unet.distributed import usable_cores
from orion_unet.errors import InputError
from orion_unet.findings import Finding
from orion_unet.inspection.channels import QUANTILES, ChannelRow, describe_channel, most_varied
from orion_unet.inspection.cores import CoreView, sample_rows, thinned, view_core
from orion_unet.inspection.duplicates import Twins, find_twins
from orion_unet.inspection.findings import find_all, in_one_group, too_small
from orion_unet.run_log import SCHEMA, strict
from orion_unet.text import named

# How many pixels to sample over all cores, and at least of each; how many values, which bounds the memory.
SAMPLED_PIXELS, LEAST_PER_CORE, SAMPLED_VALUES = 2_000_000, 256, 48_000_000
# A core of 2,048 x 2,048 pixels takes about 150 MB while it is measured.
MOST_AT_ONCE = 8
# What decides whether a channel is noise (see data/camera_noise.py).
EVIDENCE = ("sd", "correlation", "bright_pieces", "bright_pairs", "expected_pairs")


@dataclass(frozen=True)
class Inspection:
    """Everything that was found in a folder.

    ``formats`` counts the files of each (modality, dtype, axis order). ``marker`` is the channel on the contact sheet:
    the ``nuclear`` one, or the most varied where no nuclear stain is known. ``notes`` are worth knowing, ``findings``
    worth fixing.
    """

    table: PairTable
    scales: Scales
    split: Split
    formats: dict[tuple[str, str, str], int]
    channels: list[ChannelRow]
    cores: list[CoreView]
    twins: list[Twins]
    nuclear: str | None
    marker: str
    sampled_pixels: int
    notes: list[str]
    findings: list[Finding]

    def document(self) -> dict[str, Any]:
        """Everything as plain values for strict JSON; None where undefined."""
        document: dict[str, Any] = strict(
            {
                "schema": SCHEMA,
                "pairs_dir": str(self.table.folder),
                "cores": len(self.table),
                "formats": [
                    {"modality": modality, "dtype": dtype, "layout": layout, "files": count}
                    for (modality, dtype, layout), count in self.formats.items()
                ],
                "groups": dict(Counter(self.split.groups)),
                "panels": None if self.table.panels is None else self.table.panels.document(),
                "nuclear_marker": self.nuclear,
                "unit": "stored value / full scale",
                "sampled_pixels": self.sampled_pixels,
                "channels": [channel_record(row) for row in self.channels],
                "per_core": [core_record(core) for core in self.cores],
                "same_tissue": [
                    {
                        "cores": [pair.first.name, pair.second.name],
                        "likeness": pair.likeness,
                        "across": pair.across_groups,
                    }
                    for pair in self.twins
                ],
                "notes": self.notes,
                "warnings": [
                    {"code": found.code, "message": found.message, "advice": " ".join(found.advice)}
                    for found in self.findings
                ],
            }
        )
        return document


def channel_record(row: ChannelRow) -> dict[str, Any]:
    """A channel as a row of the CSV."""
    quantiles = {f"q{100 * share:g}": value for share, value in zip(QUANTILES, row.quantiles, strict=True)}
    return {
        "channel": row.name,
        "min": row.low,
        "max": row.high,
        **quantiles,
        "mean": row.mean,
        "positive_threshold": row.threshold,
        "fraction_positive": row.positive,
        "fraction_saturated": row.saturated,
        "state": row.state,
        **{name: row.evidence.get(name) for name in EVIDENCE},
    }


def core_record(core: CoreView) -> dict[str, Any]:
    """A core as a row of the CSV; None where not measured."""
    found = core.registration
    return {
        "core": core.name,
        "group": core.group,
        "panel": core.panel or None,
        "height": core.height,
        "width": core.width,
        "tissue_fraction": core.tissue,
        "he_level": core.he_level,
        "nuclear_correlation": found and found.correlation,
        "best_correlation": found and found.best_correlation,
        "shift_down": found and found.shift and found.shift[0],
        "shift_right": found and found.shift and found.shift[1],
        "shift_peak": found and found.peak,
        "constant_channels": " ".join(core.constant),
        "he_digest": core.digest,
    }


def inspect_folder(
    options: DataOptions, seed: int, nuclear_marker: str | None = None, progress: Progress = no_progress
) -> Inspection:
    """Check the pairs as training does, then measure every core. Raises InputError with the messages of training."""
    table = find_pairs(options)
    split, split_warnings = make_split(table, options, seed)
    names = table.kept_names
    if nuclear_marker is not None and nuclear_marker not in names:
        raise InputError(f"--nuclear_marker {nuclear_marker}: no such channel; there are {', '.join(names)}")
    scales = measure_scales(table, options.target_normalization == "none", progress)
    stained = nuclear_channel(names)
    nuclear = nuclear_marker or (None if stained is None else names[stained])
    position = table.channel_names.index(nuclear) if nuclear else None

    pixels = min(SAMPLED_PIXELS, SAMPLED_VALUES // len(names)) // len(table)
    step = progress(len(table), "measuring cores")

    def look(core: int) -> tuple[CoreView, np.ndarray, NoiseEvidence]:
        rows = sample_rows(table, scales, core, max(LEAST_PER_CORE, pixels))
        present = table.measured_in(core)
        sample = thinned(rows, max(LEAST_PER_CORE, pixels))
        evidence = look_for_noise(rows) if present.all() else look_for_noise(rows[present]).placed(present)
        view = view_core(table, scales, core, split.groups[core], position, sample)
        sample[~present] = np.nan
        step()
        return view, sample, evidence

    with ThreadPoolExecutor(max_workers=min(MOST_AT_ONCE, usable_cores())) as pool:
        seen = list(pool.map(look, range(len(table))))
    cores = [view for view, _, _ in seen]
    sample = np.concatenate([values for _, values, _ in seen], axis=1)
    evidence = reduce(NoiseEvidence.joined, (found for _, _, found in seen))
    del seen
    step_size = _smallest_step(table)
    channels = [
        describe_channel(name, values[~np.isnan(values)], step_size, evidence.record(channel))
        for channel, (name, values) in enumerate(zip(names, sample, strict=True))
    ]
    twins = find_twins(cores)
    return Inspection(
        table=table,
        scales=scales,
        split=split,
        formats=_formats(table),
        channels=channels,
        cores=cores,
        twins=twins,
        nuclear=nuclear,
        marker=nuclear or most_varied(names, sample),
        sampled_pixels=sample.shape[1],
        notes=[*table.warnings, *split_warnings, *_notes(table, split, nuclear, cores)],
        findings=[
            *find_all(channels, cores, twins, nuclear, _advice(table, nuclear)),
            *in_one_group(_groups_with(table, split)),
        ],
    )


def _advice(table: PairTable, nuclear: str | None) -> str:
    """The command that registers the pairs, on the marker that was looked at."""
    stained = nuclear_channel(table.channel_names)
    named = nuclear is None or (stained is not None and table.channel_names[stained] == nuclear)
    return register_command(table) + ("" if named else f" --register_on {shlex.quote(str(nuclear))}")


def _groups_with(table: PairTable, split: Split) -> dict[str, set[str]]:
    """By marker, the groups in which it was measured; empty where panels do not differ."""
    measured = table.measured
    if measured is None or len(set(split.groups)) < 2:
        return {}
    return {
        name: {group for group, found in zip(split.groups, measured[:, channel], strict=True) if found}
        for channel, name in enumerate(table.kept_names)
    }


def _formats(table: PairTable) -> dict[tuple[str, str, str], int]:
    return dict(
        Counter(
            (modality, np.dtype(text).name, layout)
            for modality in ("he", "orion")
            for text, layout in getattr(table, modality)[["dtype", "layout"]].tolist()
        )
    )


def _smallest_step(table: PairTable) -> float:
    """One step of the coarsest integer type among the markers' files, as an intensity; 0 for floats."""
    kinds = {np.dtype(text) for text in set(table.orion["dtype"].tolist())}
    return max((1 / np.iinfo(kind).max for kind in kinds if kind.kind == "u"), default=0.0)


def _notes(table: PairTable, split: Split, nuclear: str | None, cores: list[CoreView]) -> list[str]:
    notes = []
    if len(set(split.groups)) == len(table):
        notes.append(
            "every core is a group of its own; if several come from one patient or slide, list them in groups.csv "
            "(columns core,group), or the same tissue may be on both sides of the split"
        )
    if nuclear is None:
        notes.append(
            "no channel has the name of a nuclear stain, so the registration was not checked: name it with "
            "--nuclear_marker"
        )
    elif lacking := table.lacking(table.channel_names.index(nuclear)):
        notes.append(
            f"the registration was not checked in {len(lacking)} cores, in which {nuclear} was not measured: "
            f"{named(lacking)}"
        )
    if small := too_small(cores):
        notes.append(small)
    if table.panels is not None:
        notes += [
            f"panel {panel}, {about['cores']} core{'s' * (about['cores'] != 1)}: {', '.join(about['markers'])}"
            for panel, about in table.panels.document().items()
        ]
    for side, indices in (("training", split.train), ("validation", split.val)):
        if absent := table.never_measured(indices.tolist()):
            notes.append(f"with this split, measured in no {side} core: {', '.join(absent)}")
    return notes
