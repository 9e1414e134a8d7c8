"""Images of markers to one row a cell, into files."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from orion_unet import __version__
from orion_unet.config import QuantifyOptions
from orion_unet.errors import InputError, RunError
from orion_unet.extras import needed
from orion_unet.inference.outputs import prepare_folder
from orion_unet.inference.progress import Progress
from orion_unet.quantification.cell_labels import CellLabels, bands
from orion_unet.quantification.cells import INSTEAD, ImageCells
from orion_unet.quantification.files import CSV, H5AD, JSON, measured_columns, write_csv, write_geojson, write_h5ad
from orion_unet.quantification.measure import CellMeans, Step, measure_geometry, measure_means
from orion_unet.quantification.nuclei import Scaled, find_nuclei, own_range, tile_steps
from orion_unet.quantification.overview import draw_positives
from orion_unet.quantification.positives import Positives, agreement, find_positives
from orion_unet.quantification.sources import (
    Source,
    check_sources,
    find_sources,
    measured_channels,
)
from orion_unet.run_log import fsync_folder, utc_now, write_json
from orion_unet.segmentation import nuclear_marker
from orion_unet.slides.markers import MarkerImage
from orion_unet.slides.open import open_labels, open_markers
from orion_unet.text import clean, short_number

SCHEMA = 1


def quantify_files(options: QuantifyOptions, progress: Progress) -> Path:
    """Measure the cells of every image and write the tables; returns the folder they are in.

    All files appear under their names when the last of them is complete, quantify.json last. Raises InputError for
    images, labels and options that cannot be used, before anything is written, and where no image has a cell; RunError
    where the result cannot be written.
    """
    _check_options(options)
    sources = find_sources(options)
    needed("scipy")
    needed("skimage", "scikit-image")
    names = check_sources(sources, options.channel_names)
    positives = find_positives(names, options.evaluation, options.positive, options.measured_positive)
    nuclear = _check_nuclear(options, sources, names)
    h5ad = options.h5ad if options.h5ad is not None else find_spec("anndata") is not None
    if h5ad:
        needed("anndata", extra="cells")
    if options.measured is not None:
        needed("sklearn", "scikit-learn")
    job = _Job(options, names, positives, nuclear, progress)
    possible = [*(name for source in sources for name in job.possible_files(source)), CSV, H5AD, JSON]
    _refuse_existing(options, possible)
    new_folder = not options.output_dir.exists()
    prepare_folder(options.output_dir)
    try:
        with tempfile.TemporaryDirectory(prefix=".quantify-", dir=options.output_dir) as scratch:
            images = [job.run(source, Path(scratch)) for source in sources]
            _require_cells(options, images)
            written = job.write_tables(images, Path(scratch), h5ad)
            for name in written:
                os.replace(Path(scratch) / name, options.output_dir / name)
        # What an earlier call left and this one did not replace belongs to other cells.
        for name in set(possible) - set(written):
            (options.output_dir / name).unlink(missing_ok=True)
        fsync_folder(options.output_dir)
    except OSError as error:
        raise RunError(f"{options.output_dir}: cannot be written ({error.strerror or error})") from error
    finally:
        progress.end()
        if new_folder and not any(options.output_dir.iterdir()):
            options.output_dir.rmdir()
    job.report(images, h5ad)
    return options.output_dir


def _check_options(options: QuantifyOptions) -> None:
    if options.normalized and options.evaluation is None:
        raise InputError("--normalized: says how the cut-offs of --evaluation apply; give that, too")
    if options.measured is None and options.measured_positive is not None:
        raise InputError("--measured_positive: is for --measured FILE; give that, too")
    if options.nuclei_in == "measured" and (options.measured is None or options.labels is not None):
        reason = "there are --labels" if options.measured is not None else "there is no --measured"
        raise InputError(f"--nuclei_in measured: cannot be used, {reason}")
    if options.labels is not None and options.nuclear_marker is not None:
        raise InputError(f"--nuclear_marker {options.nuclear_marker}: is not used with --labels; leave one of them out")


def _check_nuclear(options: QuantifyOptions, sources: Sequence[Source], names: Sequence[str]) -> str | None:
    """The nuclear marker where nuclei are to be found; raises InputError where there is none."""
    if options.labels is not None:
        return None
    found = names[nuclear_marker(names, options.nuclear_marker, INSTEAD)]
    if options.nuclei_in == "measured":
        for source in sources:
            assert source.measured is not None, "_check_options has looked"
            with open_markers(source.measured) as measured:
                if found not in [names[index] for index, _ in measured_channels(measured, names)]:
                    raise InputError(f"--nuclei_in measured: {source.measured} has no {found}")
    return found


def _refuse_existing(options: QuantifyOptions, files: Sequence[str]) -> None:
    found = [name for name in files if (options.output_dir / name).exists()]
    if found and not options.overwrite:
        raise InputError(
            f"{options.output_dir}: already holds {found[0]}; add --overwrite, or give another --output_dir"
        )


def _require_cells(options: QuantifyOptions, images: Sequence[ImageCells]) -> None:
    if any(len(cells.numbers) for cells in images):
        return
    where = options.image or options.predictions
    if options.labels is not None:
        raise InputError(f"--labels {options.labels}: holds no cell, all labels are 0")
    raise InputError(f"{where}: shows no nuclei in its nuclear marker; give the cells with --labels")


@dataclass(frozen=True)
class _Job:
    """What is the same for every image."""

    options: QuantifyOptions
    names: tuple[str, ...]
    positives: Positives
    nuclear: str | None
    progress: Progress

    def possible_files(self, source: Source) -> tuple[str, str]:
        """The outlines and the overview of one image, written or not; named after it where there may be several."""
        start = f"{source.name}_" if self.options.predictions is not None else ""
        return f"{start}cells.geojson", f"{start}overview.png"

    def run(self, source: Source, scratch: Path) -> ImageCells:
        """Measure an image, and write its own files into the scratch folder."""
        with ExitStack() as stack:
            image = stack.enter_context(open_markers(source.image))
            measured = stack.enter_context(open_markers(source.measured)) if source.measured else None
            common = measured_channels(measured, self.names) if measured else []
            step = self._start(source, image, measured)
            plane, origin = self._labels(source, image, measured, common, scratch, step)
            labels = CellLabels(stack.enter_context(plane), origin)
            step()
            geometry = measure_geometry(labels, step)
            unit = self._unit(image, self.names, self.options.normalized)
            means = measure_means(labels, image, range(len(self.names)), self.options.rings, unit, step)
            truth = None
            if measured is not None:
                own_names = {channel: self.names[index] for index, channel in common}
                in_order = [own_names.get(channel, "") for channel in range(measured.shape[0])]
                truth = measure_means(
                    labels, measured, [channel for _, channel in common], 0, self._unit(measured, in_order, False), step
                )
            pixel_size = self.options.pixel_size_um or image.pixel_size_um
            cells = ImageCells(
                source.name, source.image, origin, labels.shape, pixel_size, labels.numbers, geometry, means, truth,
                tuple(index for index, _ in common),
            )  # fmt: skip
            self._say_about(cells, image)
            if len(cells.numbers):
                self._write_own(source, scratch, image, labels, cells, unit, step)
        # A label image as large as the image itself.
        self._nuclei_file(source, scratch).unlink(missing_ok=True)
        self.progress.end()
        return cells

    @staticmethod
    def _nuclei_file(source: Source, scratch: Path) -> Path:
        return scratch / f"{source.name}.nuclei.npy"

    def _unit(self, image: MarkerImage, names: Sequence[str], normalized: bool) -> Any:
        scale = self.positives.range
        return None if scale is None else scale.to_unit(names, image.dtype, normalized)

    def _start(self, source: Source, image: MarkerImage, measured: MarkerImage | None) -> Step:
        shape = (image.shape[1], image.shape[2])
        passes = 2 + (measured is not None) + self.options.geojson
        total = passes * len(list(bands(shape))) + 1 + (0 if source.labels else tile_steps(shape))
        self.progress.start(source.name, total, 0, "step")
        return lambda: self.progress.advance(1)

    def _labels(
        self,
        source: Source,
        image: MarkerImage,
        measured: MarkerImage | None,
        common: Sequence[tuple[int, int]],
        scratch: Path,
        step: Step,
    ) -> tuple[MarkerImage, str]:
        """The label image, and in words where it comes from."""
        if source.labels is not None:
            return open_labels(source.labels), f"labels of {source.labels.name}"
        assert self.nuclear is not None, "without labels there is a nuclear marker"
        index = self.names.index(self.nuclear)
        where, channel, words = image, index, f"nuclei found in {self.nuclear}"
        normalized, in_order = self.options.normalized, list(self.names)
        if self.options.nuclei_in == "measured":
            assert measured is not None, "_check_options has looked"
            where, channel, words = measured, dict(common)[index], f"nuclei found in the measured {self.nuclear}"
            normalized, in_order = False, [""] * measured.shape[0]
            in_order[channel] = self.nuclear
        scaled, how = self._scaled(where, channel, in_order, normalized)
        found, _ = find_nuclei(where, channel, scaled, self._nuclei_file(source, scratch), step)
        return found, f"{words} ({how})"

    def _scaled(self, image: MarkerImage, channel: int, names: Sequence[str], normalized: bool) -> tuple[Scaled, str]:
        """What brings the nuclear marker into [0, 1], and in words how."""
        scale = self.positives.range
        if scale is None or names[channel] not in scale.bounds:
            return own_range(image, channel), "in the range of its own quantiles"
        to_unit: Callable[[np.ndarray, int], np.ndarray] = scale.to_unit(names, image.dtype, normalized)
        return lambda values: to_unit(values.astype(np.float32), channel).astype(np.float32), "in the range of training"

    def _say_about(self, cells: ImageCells, image: MarkerImage) -> None:
        self.progress.say(f"{cells.name}: {len(cells.numbers):,} cells, {cells.source}")
        if cells.pixel_size_um is None:
            doubt = f" ({image.pixel_size_doubt})" if image.pixel_size_doubt else ""
            self.progress.say(
                f"note: {cells.name}: its pixel size is unknown{doubt}, so micrometres stay empty; give --pixel_size_um"
            )

    def _write_own(
        self,
        source: Source,
        scratch: Path,
        image: MarkerImage,
        labels: CellLabels,
        cells: ImageCells,
        unit: Any,
        step: Step,
    ) -> None:
        outlines, overview = self.possible_files(source)
        if self.options.geojson:
            with open(scratch / outlines, "w", encoding="utf-8", errors="backslashreplace") as file:
                write_geojson(file, labels, cells, self.names, self.positives, step)
        if self.options.overview:
            (scratch / overview).write_bytes(draw_positives(image, cells, self.names, self.positives, unit))

    def write_tables(self, images: Sequence[ImageCells], scratch: Path, h5ad: bool) -> list[str]:
        """Write the tables of all images into the scratch folder; returns all files there that are results."""
        with open(scratch / CSV, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            write_csv(file, images, self.names, self.positives)
        if h5ad:
            write_h5ad(scratch / H5AD, images, self.names, self.positives)
        write_json(scratch / JSON, self._document(images))
        own = sorted(path.name for path in scratch.iterdir() if path.name.endswith(("cells.geojson", "overview.png")))
        return [*own, CSV, *([H5AD] if h5ad else []), JSON]

    def _document(self, images: Sequence[ImageCells]) -> dict[str, Any]:
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
                }
                for cells in images
            ],
            "markers": list(self.names),
            "rings_px": self.options.rings,
            "measured": None if self.options.measured is None else str(self.options.measured),
            "cutoffs": {
                name: {
                    "predicted": cutoff.predicted,
                    "measured": cutoff.measured,
                    "unit": cutoff.unit,
                    "origin": cutoff.origin,
                    "positive": self._count(name, images),
                }
                for name, cutoff in self.positives.cutoffs.items()
            },
            "agreement": self.agreement(images),
        }

    def _count(self, name: str, images: Sequence[ImageCells]) -> int | None:
        if not np.isfinite(self.positives.value(name, "predicted")):
            return None
        return sum(int(self.positives.called(self.names, cells.means)[name].sum()) for cells in images)

    def agreement(self, images: Sequence[ImageCells]) -> dict[str, dict[str, float]] | None:
        """Scores of the cells of all images together; None without measured markers."""
        columns = measured_columns(images)
        if not columns:
            return None
        predicted = _joined([cells.means for cells in images])
        measured = []
        for cells in images:
            assert cells.measured is not None, "--measured is for all images"
            places = [cells.measured_columns.index(column) if column in cells.measured_columns else -1
                      for column in columns]  # fmt: skip
            measured.append(CellMeans(_chosen(cells.measured.mean, places), None, _chosen(cells.measured.unit, places)))
        return agreement(self.names, predicted, _joined(measured), columns, self.positives)

    def report(self, images: Sequence[ImageCells], h5ad: bool) -> None:
        """Say what was found."""
        say = self.progress.say
        counts = {name: self._count(name, images) for name in self.names}
        scores = self.agreement(images) or {}
        if scores or any(count is not None for count in counts.values()):
            show_markers(self.names, self.positives, counts, scores)
        origins = sorted({cutoff.origin for cutoff in self.positives.cutoffs.values()})
        if origins:
            say(f"Cut-offs from {'; '.join(origins)}.")
        else:
            say("No cell is called positive: there are no cut-offs (--evaluation DIR or --positive NAME=X,...).")
        if not h5ad and self.options.h5ad is None:
            say('note: no cells.h5ad, because anndata is not installed: pip install "orion-unet[cells]"')


def show_markers(
    names: Sequence[str],
    positives: Positives,
    counts: dict[str, int | None],
    scores: dict[str, dict[str, float]],
) -> None:
    """Print a row for each marker that has a cut-off or measured values."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 1))
    table.add_column("marker", no_wrap=True, max_width=18, overflow="ellipsis")
    words = {"pearson": "Pearson", "auc": "AUC", "average_precision": "AP", "f1": "F1"} if scores else {}
    for title in ("cut-off", "positive", *words.values()):
        table.add_column(title, justify="right", no_wrap=True)
    for name in names:
        if counts[name] is None and name not in scores:
            continue
        row = [short_number(positives.value(name, "predicted")), "-" if counts[name] is None else f"{counts[name]:,}"]
        row += [short_number(scores[name][score], 3) if name in scores else "-" for score in words]
        # Text, so that a name like CD3[e] is not taken for markup.
        table.add_row(Text(clean(name)), *row)
    Console().print(table)


def _joined(parts: Sequence[CellMeans]) -> CellMeans:
    units = [part.unit for part in parts if part.unit is not None]
    return CellMeans(np.concatenate([part.mean for part in parts]), None, np.concatenate(units) if units else None)


def _chosen(values: Any, places: Sequence[int]) -> Any:
    """Columns of an array (n, C) by their places, NaN for -1; None stays None."""
    if values is None:
        return None
    return np.concatenate([values, np.full((len(values), 1), np.nan)], axis=1)[:, list(places)]
