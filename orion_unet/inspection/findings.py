"""What is wrong with a data set, in plain sentences, each with what to do about it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from orion_unet.inspection.channels import ChannelRow
from orion_unet.inspection.cores import CoreView
from orion_unet.inspection.duplicates import Twins

# Shares and levels beyond which something is told.
MUCH_SATURATION, LITTLE_TISSUE, DARK = 0.01, 0.05, 0.4
# Pixels. A shift is told where it is longer, raises the correlation by so much, and stands out from chance.
SHIFT, GAIN, CLEAR_PEAK = 3.0, 0.05, 6.0
# Wrongly paired images reach about 4.5 among all the shifts that are tried.
CHANCE_PEAK = 5.0
NAMED = 8


class Finding(NamedTuple):
    """A warning: a code for programs, the sentence, and the advice."""

    code: str
    message: str
    advice: str


def find_all(
    channels: Sequence[ChannelRow], cores: Sequence[CoreView], twins: Sequence[Twins], nuclear: str | None
) -> list[Finding]:
    """Every warning, the gravest first."""
    return [
        *_twins(twins),
        *(_registration(cores, nuclear) if nuclear else ()),
        *_channels(channels),
        *_constant(channels, cores),
        *_stain(cores),
    ]


def _twins(twins: Sequence[Twins]) -> Iterator[Finding]:
    across = [pair for pair in twins if pair.across_groups]
    within = [pair for pair in twins if not pair.across_groups]
    if across:
        yield Finding(
            "same_tissue_across_groups",
            f"The same H&E stands in different groups: {_pairs(across)}. The split may train on one and validate on "
            "the other, and the validation would be too good.",
            "Look at them on the contact sheet; remove one of each pair, or give both one group in groups.csv.",
        )
    if within:
        yield Finding(
            "same_tissue",
            f"The same H&E stands twice in a group: {_pairs(within)}. It counts double.",
            "Look at them on the contact sheet, and remove one of each pair.",
        )


def _pairs(twins: Sequence[Twins]) -> str:
    def told(pair: Twins) -> str:
        how = "identical" if pair.likeness == 1 else f"alike, r {pair.likeness:.2f}"
        return f"{pair.first.name} and {pair.second.name} ({how})"

    return named(told(pair) for pair in twins)


def shifted(core: CoreView) -> bool:
    """Whether a core's marker lies beside its H&E, beyond chance."""
    found = core.registration
    return (
        found is not None
        and found.peak >= CLEAR_PEAK
        and found.shift[0] ** 2 + found.shift[1] ** 2 > SHIFT**2
        and found.best_correlation - found.correlation >= GAIN
    )


def mismatched(core: CoreView) -> bool:
    """Whether no shift lines a core's marker up with its H&E, although there is tissue."""
    found = core.registration
    return found is not None and core.tissue >= LITTLE_TISSUE and not found.peak >= CHANCE_PEAK


def remark(core: CoreView) -> str:
    """What a list of cores says beside this one; an empty text where it is as it should be."""
    if core.tissue < LITTLE_TISSUE:
        return "hardly any tissue"
    return "shifted" if shifted(core) else "no match" if mismatched(core) else ""


def _registration(cores: Sequence[CoreView], nuclear: str) -> Iterator[Finding]:
    moved = [core for core in cores if shifted(core)]
    if moved:
        told = named(
            f"{core.name} by {found.shift[0]:+d}, {found.shift[1]:+d} (r {found.correlation:.2f}, then "
            f"{found.best_correlation:.2f})"
            for core in moved
            if (found := core.registration) is not None
        )
        yield Finding(
            "shifted",
            f"In {len(moved)} of {len(cores)} cores {nuclear} lies beside the haematoxylin. Moved down and right by "
            f"so many pixels it would fit: {told}.",
            "Register the ORION images to the H&E again; a network cannot learn an offset that differs from core to "
            "core, and one that is the same everywhere costs it sharpness.",
        )
    wrong = [core.name for core in cores if mismatched(core)]
    if wrong:
        yield Finding(
            "mismatched",
            f"In {len(wrong)} of {len(cores)} cores no shift up to 64 pixels lines {nuclear} up with the "
            f"haematoxylin: {named(wrong)}.",
            "Check that H&E and ORION are of the same tissue, in the same orientation, and that "
            f"{nuclear} is the nuclear stain (--nuclear_marker).",
        )


def _channels(channels: Sequence[ChannelRow]) -> Iterator[Finding]:
    for state, what in (
        ("empty", "Nothing but zeros"),
        ("constant", "A single value"),
        ("noise", "Nothing above the background"),
    ):
        names = [row.name for row in channels if row.state == state]
        if names:
            yield Finding(
                f"{state}_channel",
                f"{what} in {len(names)} of {len(channels)} channels: {named(names)}.",
                f'Leave out what is not a marker: --exclude_channels "{",".join(names)}".',
            )
    bright = [row for row in channels if row.saturated > MUCH_SATURATION]
    if bright:
        yield Finding(
            "saturated",
            "More than 1 % of the pixels are saturated in "
            + named(f"{r.name} ({r.saturated:.1%})" for r in bright)
            + ".",
            "Export them again with a longer range; above it all intensities are one.",
        )


def _constant(channels: Sequence[ChannelRow], cores: Sequence[CoreView]) -> Iterator[Finding]:
    known = {row.name for row in channels if row.state in ("empty", "constant")}
    missing = [
        f"{core.name} ({', '.join(names)})" for core in cores if (names := [n for n in core.constant if n not in known])
    ]
    if missing:
        yield Finding(
            "missing_in_core",
            f"Channels that hold a signal elsewhere have a single value in {named(missing)}.",
            "If the marker was not measured there, leave the core out: it would teach that there is none.",
        )


def _stain(cores: Sequence[CoreView]) -> Iterator[Finding]:
    bare = [f"{core.name} ({core.tissue:.0%})" for core in cores if core.tissue < LITTLE_TISSUE]
    if bare:
        yield Finding("little_tissue", f"There is hardly any tissue in {named(bare)}.", "Leave these cores out.")
    dark = [core.name for core in cores if core.he_level < DARK]
    if dark:
        yield Finding(
            "dark_he",
            f"The brightest parts of the H&E stay below {DARK:.0%} of its full scale in {named(dark)}.",
            "Glass should be near white: check that the file is the H&E, and that 8-bit values are stored as uint8.",
        )


def named(items: Iterable[str]) -> str:
    """A list in a sentence, cut where it would be longer than anybody reads."""
    items = list(items)
    rest = len(items) - NAMED
    return ", ".join(items[:NAMED]) + (f", and {rest} more" if rest > 0 else "")
