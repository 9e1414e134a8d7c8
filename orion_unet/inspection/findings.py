"""What is wrong with a data set: the rules, the sentences, and what to do about each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from orion_unet.findings import WARNING, Finding
from orion_unet.inspection.channels import ChannelRow
from orion_unet.inspection.cores import CoreView
from orion_unet.inspection.duplicates import Twins
from orion_unet.registration.shift import LEAST_SIDE, LONGEST_SHIFT
from orion_unet.text import named

# Warn above this share of saturated pixels, and below this share of tissue and this brightness of the H&E.
MUCH_SATURATION, LITTLE_TISSUE, DARK = 0.01, 0.05, 0.4
# A marker is shifted if the best shift is longer than this [pixels], raises the correlation by this much, and has at
# least this peak.
SHIFT, GAIN, CLEAR_PEAK = 3.0, 0.05, 6.0
# The best of all shifts of two unrelated images reaches a peak of about 4.5.
CHANCE_PEAK = 5.0


def find_all(
    channels: Sequence[ChannelRow],
    cores: Sequence[CoreView],
    twins: Sequence[Twins],
    nuclear: str | None,
    register_command: str = "",
) -> list[Finding]:
    """Every warning, the worst first; ``register_command`` is the advice for pairs that are off register."""
    return [
        *_twins(twins),
        *(_registration(cores, nuclear, register_command) if nuclear else ()),
        *_channels(channels),
        *_constant(channels, cores),
        *_stain(cores),
    ]


def _warning(code: str, message: str, *advice: str) -> Finding:
    return Finding(code, WARNING, message, advice=advice)


def _twins(twins: Sequence[Twins]) -> Iterator[Finding]:
    across = [pair for pair in twins if pair.across_groups]
    within = [pair for pair in twins if not pair.across_groups]
    if across:
        yield _warning(
            "same_tissue_across_groups",
            f"Different groups contain the same H&E: {_pairs(across)}. The split may train on one and validate on the "
            "other, and the validation would look too good.",
            "Look at them on the contact sheet; remove one of each pair, or put both into one group in groups.csv.",
        )
    if within:
        yield _warning(
            "same_tissue",
            f"A group contains the same H&E twice: {_pairs(within)}. It counts double.",
            "Look at them on the contact sheet, and remove one of each pair.",
        )


def _pairs(twins: Sequence[Twins]) -> str:
    return named(
        f"{pair.first.name} and {pair.second.name} "
        f"({'identical' if pair.likeness == 1 else f'alike, r {pair.likeness:.2f}'})"
        for pair in twins
    )


def shifted(core: CoreView) -> bool:
    """Whether a core's nuclear marker is clearly displaced against its H&E."""
    found = core.registration
    return (
        found is not None
        and found.shift is not None
        and found.peak >= CLEAR_PEAK
        and found.shift[0] ** 2 + found.shift[1] ** 2 > SHIFT**2
        and found.best_correlation - found.correlation >= GAIN
    )


def mismatched(core: CoreView) -> bool:
    """Whether a core has tissue, but no shift aligns its nuclear marker with its H&E."""
    found = core.registration
    return (
        found is not None and found.shift is not None and core.tissue >= LITTLE_TISSUE and not found.peak >= CHANCE_PEAK
    )


def remark(core: CoreView) -> str:
    """A few words on a core for a list; empty where nothing is wrong."""
    if core.tissue < LITTLE_TISSUE:
        return "hardly any tissue"
    return "shifted" if shifted(core) else "no match" if mismatched(core) else ""


def too_small(cores: Sequence[CoreView]) -> str:
    """A note that names the cores too small to judge their registration; empty where there are none."""
    small = [core.name for core in cores if core.registration is not None and core.registration.shift is None]
    if not small:
        return ""
    return (
        f"{len(small)} of {len(cores)} cores are less than {LEAST_SIDE} pixels high or wide, too small to check the "
        f"registration of: {named(small)}"
    )


def _registration(cores: Sequence[CoreView], nuclear: str, command: str) -> Iterator[Finding]:
    moved = [
        f"{core.name} by {found.shift[0]:+d}, {found.shift[1]:+d} (r {found.correlation:.2f}, then "
        f"{found.best_correlation:.2f})"
        for core in cores
        if (found := core.registration) is not None and found.shift is not None and shifted(core)
    ]
    if moved:
        yield _warning(
            "shifted",
            f"In {len(moved)} of {len(cores)} cores {nuclear} is displaced against the haematoxylin. Moving it down "
            f"and right by these pixels would align it: {named(moved)}.",
            "A network cannot learn a shift that differs from core to core, and one that is the same everywhere blurs "
            "its predictions. Register the pairs:",
            command,
        )
    wrong = [core.name for core in cores if mismatched(core)]
    if wrong:
        yield _warning(
            "mismatched",
            f"In {len(wrong)} of {len(cores)} cores no shift up to {LONGEST_SHIFT} pixels aligns {nuclear} with the "
            f"haematoxylin: {named(wrong)}.",
            "Check that H&E and ORION show the same tissue in the same orientation, and that "
            f"{nuclear} is the nuclear stain (--nuclear_marker).",
        )


def _channels(channels: Sequence[ChannelRow]) -> Iterator[Finding]:
    for state, what in (
        ("empty", "Only zeros"),
        ("constant", "A single value"),
        ("noise", "Nothing but noise"),
    ):
        names = [row.name for row in channels if row.state == state]
        if names:
            yield _warning(
                f"{state}_channel",
                f"{what} in {len(names)} of {len(channels)} channels: {named(names)}.",
                "Training counts them as empty"
                + (", unless --keep_channels names them" if state == "noise" else "")
                + f'. Leave out channels that are not markers: --exclude_channels "{",".join(names)}".',
            )
    bright = [row for row in channels if row.saturated > MUCH_SATURATION]
    if bright:
        yield _warning(
            "saturated",
            "More than 1 % of the pixels are saturated in "
            + named(f"{r.name} ({r.saturated:.1%})" for r in bright)
            + ".",
            "Export these channels with a wider range: brighter pixels all have the same value.",
        )


def _constant(channels: Sequence[ChannelRow], cores: Sequence[CoreView]) -> Iterator[Finding]:
    known = {row.name for row in channels if row.state in ("empty", "constant")}
    missing = [
        f"{core.name} ({', '.join(names)})" for core in cores if (names := [n for n in core.constant if n not in known])
    ]
    if missing:
        yield _warning(
            "missing_in_core",
            f"Channels with signal in other cores have a single value in {named(missing)}.",
            "If the marker was not measured there, list the panels in panels.csv, or leave the core out: it would "
            "teach the network that the marker is absent.",
        )


def in_one_group(groups: Mapping[str, set[str]]) -> Iterator[Finding]:
    """A warning about markers that only one group has, from the groups in which each was measured."""
    alone = [f"{marker} ({next(iter(found))})" for marker, found in groups.items() if len(found) == 1]
    if alone:
        yield _warning(
            "marker_in_one_group",
            f"Markers were measured in a single group: {named(alone)}. Held out, it leaves nothing to train them on; "
            "trained on, nothing shows how well they are predicted.",
            "Add groups that have them, or leave these markers out with --exclude_channels.",
        )


def _stain(cores: Sequence[CoreView]) -> Iterator[Finding]:
    bare = [f"{core.name} ({core.tissue:.0%})" for core in cores if core.tissue < LITTLE_TISSUE]
    if bare:
        yield _warning("little_tissue", f"There is hardly any tissue in {named(bare)}.", "Leave these cores out.")
    dark = [core.name for core in cores if core.he_level < DARK]
    if dark:
        yield _warning(
            "dark_he",
            f"The brightest parts of the H&E stay below {DARK:.0%} of full scale in {named(dark)}.",
            "Glass should be nearly white: check that the file is the H&E, and that 8-bit values are stored as uint8.",
        )
