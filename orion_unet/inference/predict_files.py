"""Predicts the markers of H&E image files of any size, into files."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from orion_unet import __version__
from orion_unet.command_options import PredictOptions
from orion_unet.data.stain import OUTSIDE, StainJudgement, measure_stain
from orion_unet.errors import InputError, RunError
from orion_unet.inference.ensemble import members_of, shared_scorecard
from orion_unet.inference.model import TrainedModel
from orion_unet.inference.ome_tiff import require_writer, write_ome_tiff
from orion_unet.inference.outputs import (
    Job,
    Record,
    find_inputs,
    names_file,
    plan_jobs,
    prepare_folder,
    refuse_existing,
    write_npy,
    write_table,
)
from orion_unet.inference.overview import box_size, thumbnail, write_overview
from orion_unet.inference.progress import Progress
from orion_unet.inference.resampled import ResampledImage, on_model_grid
from orion_unet.inference.stain_table import add_stain, drop_stain, read_stain, stain_warning
from orion_unet.inference.tiling import TiledPrediction, choose_tiling
from orion_unet.inference.trust import UNKNOWN, MarkerTrust, file_digest, run_folder_of, summary, verdict_mark
from orion_unet.inference.units import LEVELS, Unit
from orion_unet.inference.verdict_table import VERDICTS_FILE, verdicts_file
from orion_unet.inference.working_file import WorkingFile
from orion_unet.slides.images import HeImage
from orion_unet.slides.open import open_he, require_readers
from orion_unet.text import clean_lines, duration

# Values converted to their unit and written at a time: few enough for a processor's cache, or enough for a GPU.
CHUNK_VALUES = {"cpu": 1 << 18, "cuda": 1 << 24}
# Name of the annotation of an OME-TIFF beside those of the markers.
STAIN_KEY = "H&E stain"


def predict_files(model: TrainedModel, inputs: Sequence[str | Path], output_dir: Path, options: PredictOptions) -> int:
    """Predict every image of ``inputs`` (files and folders) into ``output_dir``; returns how many failed.

    Writes NAME.npy or NAME.ome.tiff, and NAME_overview.png; for .npy also channel_names.txt, for an ensemble with
    ``spread`` also NAME_spread; marker_verdicts.csv where the model has a scorecard, and image_stain.csv where it knows
    the stain of its training. Each output gets its name only when it is complete. After an interruption, a call with
    the same options continues at the tile row where the last one stopped. An image that cannot be read is reported and
    skipped. Raises InputError for options that cannot be used and outputs that exist, RunError if the disk or memory
    fails.
    """
    choose_tiling(model, (1, 1), options.tile, options.overlap)
    markers = len(model.names) // 2 if options.spread else len(model.names)
    kept = chosen_markers(options.markers, model.names[:markers])
    names = [model.names[index] for index in kept]
    if options.spread:
        kept = [*kept, *(markers + index for index in kept)]
    decisive = _decisive(model, options)
    jobs = plan_jobs(
        find_inputs(inputs),
        output_dir,
        options.format,
        options.overview,
        decisive,
        options.pixel_size_um,
        options.spread,
    )
    require_readers(job.source for job in jobs)
    if options.format == "ome-tiff":
        require_writer()
    prepare_folder(output_dir)
    # Another table of that name is found before hours of work.
    read_stain(output_dir)
    record, progress = Record(output_dir), Progress()
    waiting = [job for job in jobs if not record.has(job)]
    trust, without = shared_scorecard(model)
    progress.say(without if trust is None else summary(trust, names))
    if model.stain is None:
        progress.say("note: the checkpoint does not keep the stain of its training")
    tables = [names_file(output_dir, names)] if options.format == "npy" else []
    # What an earlier model's scorecard says does not hold for this one.
    own = model.names[:markers]
    tables.append((output_dir / VERDICTS_FILE, "") if trust is None else verdicts_file(output_dir, own, trust))
    if not options.overwrite:
        refuse_existing(waiting, tables)
    if len(waiting) < len(jobs):
        progress.say(f"{len(jobs) - len(waiting)} of {len(jobs)} images were finished before")
    for table in tables:
        write_table(*table)
    failed, warned = 0, False
    for job in waiting:
        try:
            with open_he(job.source) as opened:
                opened.pixel_size_um = job.stated_pixel_size_um or opened.pixel_size_um
                image = _fitted(model, opened, job, options, progress)
                if opened.pixel_size_um and not model.pixel_size_um and not warned:
                    warned = True
                    progress.say(
                        "note: the model does not know the pixel size that it was trained at, so images are predicted "
                        "as they are"
                    )
                stain = _stain(model, image, job, progress)
                _predict_image(model, image, job, kept, options, Trust(trust, stain), progress)
        except InputError as error:
            if len(jobs) == 1:
                raise
            failed += 1
            progress.end()
            print(f"error: {clean_lines(str(error))}", file=sys.stderr, flush=True)
            continue
        finally:
            progress.end()
        if len(jobs) > 1:
            record.add(job)
    if not failed:
        record.close()
    return failed


def chosen_markers(given: str | None, names: Sequence[str]) -> list[int]:
    """Indices of the markers in ``--markers NAME,NAME``, in that order; all for None. Raises InputError."""
    if given is None:
        return list(range(len(names)))
    wanted = [name.strip() for name in given.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in names]
    if unknown or not wanted or len(set(wanted)) < len(wanted):
        what = f"no marker {', '.join(unknown)}" if unknown else "name each marker once, and at least one"
        raise InputError(f"--markers {given}: {what}; the model predicts {', '.join(names)}")
    return [names.index(name) for name in wanted]


def _decisive(model: TrainedModel, options: PredictOptions) -> dict[str, Any]:
    """What decides the values of an output besides the input: a call only continues one that had the same."""
    digests = [file_digest(member.path) for member in members_of(model)]
    return {
        "version": __version__,
        "checkpoint": digests[0] if len(digests) == 1 else digests,
        **({"spread": True} if options.spread else {}),
        "precision": str(model.precision),
        "format": options.format,
        "dtype": options.dtype,
        "normalized": options.normalized,
        "markers": options.markers,
        "tissue_only": options.tissue_only,
        "tta": options.tta,
        "tile": options.tile,
        "overlap": options.overlap,
        # Without a pixel size of the training, that of the input changes no value.
        "pixel_size_um": options.pixel_size_um if model.pixel_size_um else None,
    }


def _fitted(model: TrainedModel, image: HeImage, job: Job, options: PredictOptions, progress: Progress) -> HeImage:
    """The image on the pixel grid of the training, where both sizes are known; says what was done, or is missing."""
    own = options.pixel_size_um or image.pixel_size_um
    assumed = f", and taken to be the {model.pixel_size_um:g} µm of the training" if model.pixel_size_um else ""
    if own is None and image.pixel_size_doubt:
        progress.say(
            f"warning: {job.name}: the pixel size of the file is not used ({image.pixel_size_doubt}){assumed}; give "
            "--pixel_size_um"
        )
    elif own is None and (assumed or options.format == "ome-tiff"):
        progress.say(f"warning: {job.name}: its pixel size is unknown{assumed}; give --pixel_size_um")
    fitted = on_model_grid(image, own, model.pixel_size_um)
    if fitted is not image:
        progress.say(
            f"{job.name}: resampled from {own:g} to the {model.pixel_size_um:g} µm of the training, "
            f"{fitted.shape[1]:,} x {fitted.shape[0]:,} pixels; the prediction has these pixels"
        )
    return fitted


@dataclass(frozen=True)
class Trust:
    """How far a prediction can be believed: verdicts by marker and the image's stain, None where unknown."""

    markers: dict[str, MarkerTrust] | None
    stain: StainJudgement | None


def _stain(model: TrainedModel, image: HeImage, job: Job, progress: Progress) -> StainJudgement | None:
    """Compare the stain with that of the training, where it is known: a warning, and a row of image_stain.csv."""
    if model.stain is None:
        # What an earlier model said of this image does not hold for this one.
        drop_stain(job.result.parent, job.name)
        return None
    found = model.stain.judge(measure_stain(image))
    if warning := stain_warning(job.name, found):
        progress.say(warning)
    add_stain(job.result.parent, job.name, found)
    return found


def _predict_image(
    model: TrainedModel,
    image: HeImage,
    job: Job,
    kept: list[int],
    options: PredictOptions,
    trust: Trust,
    progress: Progress,
) -> None:
    began = time.monotonic()
    tiles = TiledPrediction(
        model,
        image,
        choose_tiling(model, image.shape, options.tile, options.overlap),
        kept=kept,
        tissue_only=image.is_slide if options.tissue_only is None else options.tissue_only,
        augmented=options.tta,
        batch_size=options.batch_size,
    )
    unit = Unit(model.normalization, kept, options.normalized)
    quantized = options.format == "ome-tiff" and options.dtype == "uint16"
    shape = (len(kept), *image.shape)
    with WorkingFile(job.result.parent, job.name, shape, "<u2" if quantized else "<f4", job.fingerprint) as working:
        if not options.overwrite and job.result.exists():
            # Another process has written it since this one checked.
            working.remove()
            refuse_existing([job])
        first = working.finished_rows
        if first:
            progress.say(f"{job.name}: continuing at tile row {first + 1} of {len(tiles.rows)}")
        columns = len(tiles.columns)
        at_once = max(1, CHUNK_VALUES[model.device.type] // image.shape[1])
        progress.start(job.name, len(tiles.rows) * columns, first * columns)
        try:
            for done, (y, rows) in enumerate(tiles.run(first, progress.advance), first + 1):
                for channel, start in product(range(len(kept)), range(0, rows.shape[1], at_once)):
                    values = unit.stored(rows[channel, start : start + at_once], channel)
                    values = unit.quantized(values) if quantized else values
                    working.write(channel, y + start, values.cpu().numpy())
                working.finish_row(done)
        except InputError:
            # The image is damaged further down, so there is nothing to continue.
            working.remove()
            raise
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise RunError(
                f"{job.source}: too little memory for tiles of {tiles.tiling.tile} pixels: lower --batch_size or --tile"
            ) from error
        finally:
            progress.end()
        _write_outputs(model, image, job, working, unit, options, trust)
    pixels = image.shape[0] * image.shape[1]
    markers = len(kept) // 2 if job.spread else len(kept)
    progress.say(
        f"{job.result.name}: {image.shape[1]:,} x {image.shape[0]:,} pixels, {markers} markers, "
        f"{duration(time.monotonic() - began)} ({pixels / 1e6 / (time.monotonic() - began):.2f} MP/s)"
    )


def _write_outputs(
    model: TrainedModel,
    image: HeImage,
    job: Job,
    working: WorkingFile,
    unit: Unit,
    options: PredictOptions,
    trust: Trust,
) -> None:
    """Write the output under its final name, and its overview; both say which markers are not supported, and whether
    the stain is foreign."""
    markers = len(unit.names) // 2 if job.spread else len(unit.names)
    names = unit.names[:markers]
    known = {} if trust.markers is None else {name: trust.markers.get(name, UNKNOWN) for name in names}
    said = {name: found.sentence() for name, found in known.items()}
    if trust.stain is not None:
        said[STAIN_KEY] = trust.stain.sentence()
    # A resampled image has the pixel size of the training, whatever was given for the input.
    resampled = isinstance(image, ResampledImage)
    pixel_size_um = image.pixel_size_um if resampled else options.pixel_size_um or image.pixel_size_um
    # First, because the working file may become the output.
    pictures = _thumbnails(image, working, unit, markers) if job.overview else None
    meaning = "[0, 1]" if unit.normalized else f"the unit of the training data, where {unit.high:g} is white"
    members = [f"{member.path.name} of epoch {member.epoch}" for member in members_of(model)]
    if len(members) > 1:
        runs = [run_folder_of(member.path).name for member in members_of(model)]
        members = [f"{name} ({run})" for name, run in zip(members, runs, strict=True)]
    of = members[0] if len(members) == 1 else f"the mean of {', '.join(members)}"
    written = [(job.result, slice(0, markers), f"Predicted from {job.source.name} by {of}, in {meaning}", said)]
    if job.spread:
        about = f"Standard deviation over the models that predicted {job.result.name}, in {meaning}"
        written.insert(0, (job.spread, slice(markers, None), about, {}))
    for path, channels, description, notes in written:
        if options.format == "ome-tiff":
            write_ome_tiff(
                path,
                working.open()[channels],
                unit.names[channels],
                pixel_size_um=pixel_size_um,
                dtype=options.dtype,
                # The working file may already have the levels of the output.
                high=LEVELS if working.dtype.kind == "u" else unit.high,
                description=description,
                annotations=notes,
            )
        elif job.spread:
            write_npy(path, working.open()[channels])
    if options.format == "npy" and not job.spread:
        working.become(job.result)
    else:
        working.remove()
    if job.overview and pictures:
        shown = pixel_size_um * box_size(image.shape) if pixel_size_um else None
        marked = [name + verdict_mark(name, trust.markers) for name in names]
        foreign = trust.stain is not None and trust.stain.state == OUTSIDE
        title = "H&E (stain outside the training's)" if foreign else "H&E"
        write_overview(job.overview, *pictures, marked, pixel_size_um=shown, title=title)


def _thumbnails(image: HeImage, working: WorkingFile, unit: Unit, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Thumbnails of the H&E (h, w, 3) and the first ``count`` markers (count, h, w), both in [0, 1]."""
    scale = unit.high / LEVELS if working.dtype.kind == "u" else 1.0
    markers = [
        unit.displayed(thumbnail(partial(working.rows, channel), image.shape) * scale, channel)
        for channel in range(count)
    ]
    he = thumbnail(lambda rows: image.read(rows.start, 0, rows.stop - rows.start, image.shape[1]), image.shape)
    return he, np.stack(markers)
