"""Slides to pairs: every slide planned, every region prepared, over processes, and the tables of the folder."""

from __future__ import annotations

import shutil
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from orion_unet.command_options import PrepareOptions
from orion_unet.data.channels import NAMES_FILE, read_names
from orion_unet.data.dataset import DATASET_FILE, dataset_document
from orion_unet.data.file_states import path_state
from orion_unet.data.slide_files import SLIDE_FILES, write_slide_files
from orion_unet.data.split import GROUPS_FILE
from orion_unet.errors import InputError, RunError
from orion_unet.inference.progress import Progress
from orion_unet.preparation.one_pair import KEPT
from orion_unet.preparation.one_region import PreparedRegion, prepare_region, unread
from orion_unet.preparation.regions import Region
from orion_unet.preparation.slide_overview import OverviewOf, overview_name, write_overview
from orion_unet.preparation.slide_plan import SlidePlan, plan_slide
from orion_unet.preparation.slide_table import Slide, read_slide_table
from orion_unet.preparation.state import FOLDER, State, origin
from orion_unet.preparation.workers import over_workers
from orion_unet.preparation.writing import SUFFIXES, pair_paths
from orion_unet.run_log import write_atomic, write_json
from orion_unet.slides.images import HeImage
from orion_unet.slides.markers import MarkerImage
from orion_unet.slides.open import open_he, open_markers
from orion_unet.text import csv_bytes, named

REGIONS, REJECTED = "regions.csv", "rejected.csv"


@dataclass(frozen=True)
class PreparedFolder:
    """Outcome of ``prepare_slides``: the plans, the rows of all regions, how many were found done, what failed, and
    the size in bytes of all pairs if every region is kept."""

    plans: list[SlidePlan]
    rows: list[PreparedRegion]
    found: int
    failures: list[str]
    nbytes: int

    @property
    def kept(self) -> list[PreparedRegion]:
        """Rows of the regions that became pairs."""
        return [row for row in self.rows if row.state == KEPT]


def prepare_slides(options: PrepareOptions, progress: Progress | None = None) -> PreparedFolder:
    """Turn the slides of a CSV into a folder of pairs; with ``dry_run`` only find out what would be made.

    Raises InputError that lists every slide that cannot be used (with ``skip_bad`` only if none can), and RunError
    where the disk is full or fails. What is finished is kept, and the same call goes on from there.
    """
    progress = progress or Progress()
    slides = read_slide_table(options.slides)
    if options.dask_scheduler is not None:
        # Workers elsewhere have another working directory.
        options = replace(options, output_dir=options.output_dir.absolute())
        slides = [slide.absolute(options.markers) for slide in slides]
    output = Path(options.output_dir)
    state = State(output)
    _check_slides(slides, state, options)
    plans, failures, new = _plans(slides, options, state, progress)
    if failures and not (options.skip_bad and plans):
        advice = "Correct them, or go on without them with --skip_bad." if plans else ""
        raise InputError.listing(f"{options.slides}: these slides cannot be used:", failures, advice)
    done = {} if options.overwrite else state.done(options.format)
    wanted = [(plan, region) for plan in plans for region in plan.regions]
    missing = [(plan, region) for plan, region in wanted if region.core not in done]
    nbytes = sum(plan.nbytes(region, options.format) for plan, region in wanted)
    _check_folder(output, {region.core for _, region in wanted} | state.known_cores(), options)
    freed = sum(path_state(path)[0] for path in _pairs(output, state)) if options.overwrite else 0
    _check_space(output, sum(plan.nbytes(region, options.format) for plan, region in missing) - freed)
    if options.dry_run:
        return PreparedFolder(plans, [], len(wanted) - len(missing), failures, nbytes)
    try:
        if options.overwrite:
            _clear(output, state)
        output.mkdir(parents=True, exist_ok=True)
        for plan in plans:
            if plan.slide.name in new:
                state.keep_plan(plan, origin(plan.slide, options))
        if options.format == "none":
            write_slide_files(output, [(plan.slide.name, plan.slide.he, plan.slide.orion) for plan in plans])
        progress.start("preparing regions", len(wanted), len(wanted) - len(missing), "region")
        damaged: dict[str, str] = {}
        for plan, region, outcome in _prepare(missing, options):
            if isinstance(outcome, str):
                damaged.setdefault(plan.slide.name, outcome)
                # In the tables, but not among what is done: the next call tries it again.
                done[region.core] = unread(plan, region, outcome)
            else:
                done[outcome.core] = outcome
                state.note(outcome)
            progress.advance(1)
        progress.end()
        rows = [done[region.core] for _, region in wanted]
        # With --skip_bad, the pairs of a slide that cannot be used any more stay.
        failed = {slide.name for slide in slides} - {plan.slide.name for plan in plans}
        kept = [row for row in done.values() if row.slide in failed]
        _write_tables(output, plans, [*rows, *kept], {slide.name: slide.group for slide in slides})
        changed = {plan.slide.name for plan, _ in missing}
        for plan in plans:
            of_slide = OverviewOf(plan, [row for row in rows if row.slide == plan.slide.name], options)
            if plan.slide.name in changed or not of_slide.path.exists():
                try:
                    write_overview(of_slide)
                except InputError as error:
                    # A tile that no region needed.
                    damaged.setdefault(plan.slide.name, f"has no overview: {error}")
    except OSError as error:
        raise RunError(
            f"--output_dir {output}: cannot be written ({error.strerror or error}); what is prepared is kept, and the "
            "same command goes on from there"
        ) from error
    failures += [f"slide {name}: {reason}" for name, reason in damaged.items()]
    return PreparedFolder(plans, rows, len(wanted) - len(missing), failures, nbytes)


def _plans(
    slides: list[Slide], options: PrepareOptions, state: State, progress: Progress
) -> tuple[list[SlidePlan], list[str], set[str]]:
    """Plans of all slides that can be used, what is wrong with the others, and the names of those planned now."""
    found: dict[str, SlidePlan | str] = {}
    new = []
    for slide in slides:
        try:
            source = origin(slide, options)
            known = None if options.overwrite else state.plan(slide, source)
        except InputError as error:
            found[slide.name] = str(error)
            continue
        if known is not None:
            found[slide.name] = known
        else:
            new.append(slide)
    progress.start("looking at slides", len(slides), len(slides) - len(new), "slide")
    tasks = [(slide, options) for slide in new]
    for task, outcome in over_workers(_try_plan, tasks, options.jobs, options.dask_scheduler):
        found[task[0].name] = outcome
        progress.advance(1)
    progress.end()
    plans = [plan for slide in slides if isinstance(plan := found[slide.name], SlidePlan)]
    failures = [f"slide {name}: {text}" for name in found if isinstance(text := found[name], str)]
    if plans:
        plans, unlike = _alike(plans, () if options.overwrite else _order(Path(options.output_dir), state))
        failures += unlike
    return plans, failures, {slide.name for slide in new}


def _order(output: Path, state: State) -> tuple[str, ...]:
    """The channels of the pairs that are already in the folder, in order; none where there are no pairs of ours."""
    if not state.known_cores() or not (output / NAMES_FILE).is_file():
        return ()
    return read_names(output / NAMES_FILE)


def _alike(plans: list[SlidePlan], order: tuple[str, ...]) -> tuple[list[SlidePlan], list[str]]:
    """The plans with their channels in the order of the pairs that are there, else of the first slide; those of another
    panel or pixel size than the first slide are refused."""
    first, kept, failures = plans[0], [], []
    names = order if set(order) == set(first.names) else first.names
    for plan in plans:
        name = f"slide {plan.slide.name}"
        if set(plan.names) != set(first.names):
            only = sorted(set(plan.names) ^ set(first.names))
            failures.append(f"{name}: has another panel than slide {first.slide.name}; not in both: {', '.join(only)}")
        elif plan.dtype != first.dtype:
            failures.append(f"{name}: has {plan.dtype} pixels, slide {first.slide.name} has {first.dtype}")
        elif not np.isclose(plan.pixel_size_um, first.pixel_size_um, rtol=0.01):
            failures.append(
                f"{name}: has {plan.pixel_size_um:g} µm a pixel, slide {first.slide.name} has {first.pixel_size_um:g}; "
                "choose one size for all with --pixel_size_um"
            )
        else:
            channels = tuple(plan.channels[plan.names.index(marker)] for marker in names)
            kept.append(replace(plan, channels=channels, names=names))
    return kept, failures


def _try_plan(slide: Slide, options: PrepareOptions) -> SlidePlan | str:
    try:
        return plan_slide(slide, options)
    except InputError as error:
        return str(error)


def _prepare(
    missing: list[tuple[SlidePlan, Region]], options: PrepareOptions
) -> Iterator[tuple[SlidePlan, Region, PreparedRegion | str]]:
    # The workers of a cluster outlive a call, and a slide of the same name may be another file in the next.
    call = uuid.uuid4().hex
    tasks = [(plan, region, options, call) for plan, region in missing]
    try:
        for task, outcome in over_workers(_try_region, tasks, options.jobs, options.dask_scheduler):
            yield task[0], task[1], outcome
    finally:
        _close_images()


class _Open(threading.local):
    """The slide whose regions this thread prepares, by call and name: opening one reads its whole index."""

    def __init__(self) -> None:
        self.slides: dict[tuple[str, str], tuple[HeImage, MarkerImage]] = {}


_OPEN = _Open()


def _close_images() -> None:
    for images in _OPEN.slides.values():
        for image in images:
            image.close()
    _OPEN.slides.clear()


def _try_region(plan: SlidePlan, region: Region, options: PrepareOptions, call: str) -> PreparedRegion | str:
    key = (call, plan.slide.name)
    try:
        if key not in _OPEN.slides:
            _close_images()
            _OPEN.slides[key] = (open_he(plan.slide.he), open_markers(plan.slide.orion))
        return prepare_region(plan, region, options, *_OPEN.slides[key])
    except InputError as error:
        return str(error)


def _check_slides(slides: list[Slide], state: State, options: PrepareOptions) -> None:
    """Raise InputError where the folder has pairs of slides that the CSV does not list: its tables would lose them."""
    gone = sorted(state.known_slides() - {slide.name for slide in slides})
    if gone and not options.overwrite:
        raise InputError(
            f"--output_dir {options.output_dir}: has pairs of slides that {options.slides} does not list: "
            f"{named(gone)}; put their rows back, delete these pairs, or choose another folder"
        )


def _pairs(output: Path, state: State) -> list[Path]:
    """The files and folders of pairs that an earlier prepare made here."""
    found = [pair_paths(output, core, format).values() for core in state.known_cores() for format in SUFFIXES]
    return [path for paths in found for path in paths if path.exists()]


def _clear(output: Path, state: State) -> None:
    """Remove the pairs that an earlier prepare made here, their overviews, and its record; nothing else."""
    # Before the pairs, by which they are known.
    for slide in state.known_slides():
        (output / overview_name(slide)).unlink(missing_ok=True)
    for path in _pairs(output, state):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    (output / SLIDE_FILES).unlink(missing_ok=True)
    shutil.rmtree(output / FOLDER, ignore_errors=True)


def _check_folder(output: Path, ours: set[str], options: PrepareOptions) -> None:
    """Raise InputError where the folder has pairs of another origin."""
    try:
        names = {path.name for path in output.iterdir()}
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"--output_dir {output}: cannot be used ({error.strerror or error})") from None
    endings = [path.name for form in SUFFIXES for path in pair_paths(output, "", form).values()]
    mine = {f"{core}{ending}" for core in ours for ending in endings}
    others = sorted(n for n in names - mine if n.endswith(tuple(endings)) and not n.startswith("."))
    if others:
        headline = f"--output_dir {output} has pairs that were not made from {options.slides}:"
        raise InputError.listing(headline, others, "Choose another folder, or move them away.", limit=5)


def _check_space(output: Path, needed: int) -> None:
    place = output
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise RunError(
            f"--output_dir {output}: too little disk space, up to {needed / 1e9:.1f} GB are needed and "
            f"{free / 1e9:.1f} GB free; free some space, choose a folder on another disk, or fewer regions with "
            "--regions_per_slide"
        )


def _write_tables(output: Path, plans: list[SlidePlan], rows: list[PreparedRegion], groups: dict[str, str]) -> None:
    first = plans[0]
    kept = [row for row in rows if row.state == KEPT]
    write_atomic(output / NAMES_FILE, "".join(f"{name}\n" for name in first.names).encode())
    write_atomic(output / GROUPS_FILE, csv_bytes(["core", "group"], [[row.core, groups[row.slide]] for row in kept]))
    columns = list(PreparedRegion.__dataclass_fields__)
    write_atomic(output / REGIONS, csv_bytes(columns, [list(row.record().values()) for row in rows], digits=8))
    lost = [[row.core, row.slide, row.reason] for row in rows if row.state != KEPT]
    lost += [[f"{plan.slide.name}_{place}", plan.slide.name, "no core at this place of the lattice"]
             for plan in plans for place in plan.missing]  # fmt: skip
    write_atomic(output / REJECTED, csv_bytes(["core", "slide", "reason"], lost))
    source = f"prepare from {len(plans)} slides"
    document = dataset_document(first.pixel_size_um, source)
    write_json(output / DATASET_FILE, {**document, "slides": [plan.document() for plan in plans]})
