"""Images of markers to one row a cell, into files."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from orion_unet.command_options import QuantifyOptions
from orion_unet.data.dataset import stated_pixel_size
from orion_unet.data.pairs import pair_file
from orion_unet.errors import InputError, RunError
from orion_unet.extras import needed
from orion_unet.inference.outputs import prepare_folder
from orion_unet.inference.progress import Progress
from orion_unet.inference.stain_table import stain_warning
from orion_unet.inference.trust import MarkerTrust
from orion_unet.quantification import marker_table
from orion_unet.quantification.cell_labels import CellLabels, bands
from orion_unet.quantification.cells import INSTEAD, ImageCells
from orion_unet.quantification.comparison import COLUMNS, Comparison, compare
from orion_unet.quantification.comparison_figure import draw_comparison
from orion_unet.quantification.files import CSV, H5AD, JSON, MARKERS_CSV, write_csv, write_geojson, write_h5ad
from orion_unet.quantification.measure import Step, ToUnit, measure_geometry, measure_means
from orion_unet.quantification.nuclei import Scaled, find_nuclei, own_range, tile_steps
from orion_unet.quantification.overview import draw_positives
from orion_unet.quantification.positives import Positives, find_positives
from orion_unet.quantification.report import document, report
from orion_unet.quantification.sources import (
    Source,
    check_sources,
    find_sources,
    find_trust,
    image_groups,
    measured_channels,
)
from orion_unet.run_log import fsync_folder, read_document, write_json
from orion_unet.segmentation import nuclear_marker
from orion_unet.slides.markers import MarkerImage
from orion_unet.slides.open import open_labels, open_markers
from orion_unet.text import csv_bytes

COMPARISON_CSV, COMPARISON_PNG = "comparison.csv", "comparison.png"


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
    groups = image_groups(sources, options.measured)
    positives = find_positives(
        names, options.evaluation, options.positive, options.measured_positive, options.measured is not None
    )
    nuclear = _check_nuclear(options, sources, names)
    h5ad = options.h5ad if options.h5ad is not None else find_spec("anndata") is not None
    if h5ad:
        needed("anndata", extra="cells")
    if options.measured is not None:
        needed("sklearn", "scikit-learn")
    job = _Job(options, names, find_trust(sources), positives, nuclear, progress)
    tables = [CSV, MARKERS_CSV, COMPARISON_CSV, COMPARISON_PNG, H5AD, JSON]
    possible = [*(name for source in sources for name in job.possible_files(source)), *tables]
    if options.predictions is not None and options.output_dir.resolve() == options.predictions.resolve():
        raise InputError(f"--output_dir {options.output_dir}: is the folder of the predictions; name another")
    earlier = _files_of(options.output_dir)
    _refuse_existing(options, [*possible, *earlier])
    new_folder = not options.output_dir.exists()
    prepare_folder(options.output_dir)
    try:
        with tempfile.TemporaryDirectory(prefix=".quantify-", dir=options.output_dir) as scratch:
            images = [job.run(source, Path(scratch)) for source in sources]
            _require_cells(options, images)
            comparison = compare(names, positives, images, groups)
            written = job.write_tables(images, comparison, Path(scratch), h5ad)
            for name in written:
                os.replace(Path(scratch) / name, options.output_dir / name)
        # What an earlier call left and this one did not replace belongs to other cells.
        for name in {*possible, *earlier} - set(written):
            (options.output_dir / name).unlink(missing_ok=True)
        fsync_folder(options.output_dir)
    except OSError as error:
        raise RunError(f"{options.output_dir}: cannot be written ({error.strerror or error})") from error
    finally:
        progress.end()
        if new_folder and not any(options.output_dir.iterdir()):
            options.output_dir.rmdir()
    report(names, job.trust, positives, images, comparison, progress.say)
    if not h5ad and options.h5ad is None:
        progress.say('note: no cells.h5ad, because anndata is not installed: pip install "orion-unet[cells]"')
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


def _files_of(output_dir: Path) -> list[str]:
    """The files that an earlier call left in the folder, by its quantify.json."""
    try:
        document, _ = read_document(output_dir / JSON)
    except OSError:
        return []
    files = (document or {}).get("files")
    names = files if isinstance(files, list) else []
    return [name for name in names if isinstance(name, str) and Path(name).name == name]


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
    trust: dict[str, MarkerTrust] | None
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
            pixel_size = self.options.pixel_size_um or self._stated_size(source) or image.pixel_size_um
            cells = ImageCells(
                source.name, source.image, origin, labels.shape, pixel_size, labels.numbers, geometry, means, truth,
                tuple(index for index, _ in common), source.stain,
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

    @staticmethod
    def _stated_size(source: Source) -> float | None:
        """That of the dataset.json beside the image, if it is a measured one of its pairs."""
        return stated_pixel_size(source.image.parent) if pair_file(source.image.name) == "orion" else None

    def _unit(self, image: MarkerImage, names: Sequence[str], normalized: bool) -> ToUnit | None:
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
        if scale is None or not (normalized or names[channel] in scale.bounds):
            return own_range(image, channel), "in the range of its own quantiles"
        to_unit: ToUnit = scale.to_unit(names, image.dtype, normalized)
        return lambda values: to_unit(values.astype(np.float32), channel).astype(np.float32), "in the range of training"

    def _say_about(self, cells: ImageCells, image: MarkerImage) -> None:
        self.progress.say(f"{cells.name}: {len(cells.numbers):,} cells, {cells.source}")
        if cells.stain and (warning := stain_warning(cells.name, cells.stain)):
            self.progress.say(warning)
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
        unit: ToUnit | None,
        step: Step,
    ) -> None:
        outlines, overview = self.possible_files(source)
        if self.options.geojson:
            with open(scratch / outlines, "w", encoding="utf-8", errors="backslashreplace") as file:
                write_geojson(file, labels, cells, self.names, self.positives, step)
        if self.options.overview:
            drawn = draw_positives(image, cells, self.names, self.positives, unit, self.trust)
            (scratch / overview).write_bytes(drawn)

    def write_tables(
        self, images: Sequence[ImageCells], comparison: Comparison | None, scratch: Path, h5ad: bool
    ) -> list[str]:
        """Write the tables of all images into the scratch folder; returns all files there that are results."""
        with open(scratch / CSV, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            write_csv(file, images, self.names, self.positives)
        rows = marker_table.marker_rows(self.names, self.trust, self.positives, images)
        (scratch / MARKERS_CSV).write_bytes(csv_bytes(marker_table.COLUMNS, rows))
        if h5ad:
            write_h5ad(scratch / H5AD, images, self.names, self.trust, self.positives)
        compared = []
        if comparison is not None:
            compared.append(COMPARISON_CSV)
            (scratch / COMPARISON_CSV).write_bytes(csv_bytes(COLUMNS, comparison.table()))
            if self.options.overview and comparison.rows:
                compared.append(COMPARISON_PNG)
                (scratch / COMPARISON_PNG).write_bytes(draw_comparison(comparison, self.trust))
        own = sorted(path.name for path in scratch.iterdir() if path.name.endswith(("cells.geojson", "overview.png")))
        files = [*own, CSV, MARKERS_CSV, *compared, *([H5AD] if h5ad else []), JSON]
        content = document(self.options, self.names, self.trust, self.positives, images, comparison)
        write_json(scratch / JSON, {**content, "files": files})
        return files
