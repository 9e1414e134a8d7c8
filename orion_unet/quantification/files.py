"""The files of quantify's cells: cells.csv, cells.geojson and cells.h5ad."""

from __future__ import annotations

import csv
import io
import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from orion_unet.extras import needed
from orion_unet.inference.ome_tiff import channel_colours
from orion_unet.inference.trust import RULE, MarkerTrust
from orion_unet.quantification.cell_labels import CellLabels, bands
from orion_unet.quantification.cells import ImageCells
from orion_unet.quantification.marker_table import COLUMNS, marker_rows
from orion_unet.quantification.measure import Step
from orion_unet.quantification.outlines import OutlineTracer, Polygon
from orion_unet.quantification.positives import Positives

CSV, MARKERS_CSV, H5AD, JSON = "cells.csv", "markers.csv", "cells.h5ad", "quantify.json"
# Rows of a table that become text at a time.
ROWS_AT_ONCE = 10_000
# QuPath's own class for cells without any of the markers, and its colour.
NEGATIVE, NEGATIVE_COLOUR = "Negative", [112, 112, 225]


def marker_columns(images: Sequence[ImageCells], names: Sequence[str]) -> list[str]:
    """The columns of the means, in the order of ``marker_values``."""
    columns = [f"{name}_mean" for name in names]
    if images[0].means.ring is not None:
        columns += [f"{name}_ring_mean" for name in names]
    return columns + [f"{names[index]}_measured_mean" for index in measured_columns(images)]


def measured_columns(images: Sequence[ImageCells]) -> list[int]:
    """The markers that were measured in any of the images."""
    return sorted({column for cells in images for column in cells.measured_columns})


def marker_values(cells: ImageCells, measured: Sequence[int]) -> np.ndarray:
    """The means (n, columns) of an image; NaN for markers that this image has no measured values of."""
    parts = [cells.means.mean]
    if cells.means.ring is not None:
        parts.append(cells.means.ring)
    if measured:
        values = np.full((len(cells.numbers), len(measured)), np.nan)
        if cells.measured is not None:
            places = [measured.index(column) for column in cells.measured_columns]
            values[:, places] = cells.measured.mean
        parts.append(values)
    return np.concatenate(parts, axis=1)


def write_csv(file: TextIO, images: Sequence[ImageCells], names: Sequence[str], positives: Positives) -> None:
    """One row a cell; fractions have 9 significant digits, and what is undefined is an empty cell."""
    called = [name for name in names if np.isfinite(positives.value(name, "predicted"))]
    columns = ["image", "cell", "y", "x", "y_um", "x_um", "area_px", "area_um2"]
    columns += [*marker_columns(images, names), *(f"{name}_positive" for name in called)]
    stained = any(cells.stain for cells in images)
    columns += ["stain"] if stained else []
    file.write(_csv_line(columns) + "\n")
    measured = measured_columns(images)
    for cells in images:
        side = cells.pixel_size_um or np.nan
        y, x, area = cells.geometry.y, cells.geometry.x, cells.geometry.area
        place = np.stack([y, x, y * side, x * side, area, area * side**2], axis=1)
        values = np.concatenate([place, marker_values(cells, measured)], axis=1)
        positive = positives.called(names, cells.means)
        flags = np.stack([positive[name] for name in called], axis=1) if called else np.empty((len(y), 0), bool)
        name = _csv_line([cells.name])
        ending = f",{cells.stain.state if cells.stain else ''}" if stained else ""
        template = ",%d" + ",%.9g" * values.shape[1] + ",%d" * len(called)
        for start in range(0, len(y), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            parts = zip(cells.numbers[rows].tolist(), values[rows].tolist(), flags[rows].tolist(), strict=True)
            for number, row, flagged in parts:
                file.write(name + (template % (number, *row, *flagged)).replace("nan", "") + ending + "\n")


def _csv_line(words: Sequence[str]) -> str:
    line = io.StringIO(newline="")
    csv.writer(line, lineterminator="").writerow(words)
    return line.getvalue()


def write_geojson(
    file: TextIO, labels: CellLabels, cells: ImageCells, names: Sequence[str], positives: Positives, step: Step
) -> None:
    """The cells as a FeatureCollection (RFC 7946) of detections, as QuPath imports them; coordinates are pixels.

    Each cell has its means as measurements, and with cut-offs a class of the markers that it is positive for. Written
    while the outlines are found, so that they are never all in memory.
    """
    measured = measured_columns([cells])
    titles = ["Area px"] + (["Area µm^2"] if cells.pixel_size_um else [])
    values = [cells.geometry.area[:, None].astype(float)]
    if cells.pixel_size_um:
        values.append(values[0] * cells.pixel_size_um**2)
    for column in marker_columns([cells], names):
        name, _, kind = _split_column(column)
        titles.append(f"{name}: {kind}")
    values.append(marker_values(cells, measured))
    table = np.concatenate(values, axis=1)
    classes = _Classes(names, positives, cells)
    keys = [json.dumps(title, ensure_ascii=False) for title in titles]
    space = uuid.uuid5(uuid.NAMESPACE_URL, cells.name)
    file.write('{"type":"FeatureCollection","features":[')
    separator = "\n"
    for number, polygons in _outlines(labels, cells, step):
        row = number - 1
        label = int(cells.numbers[row])
        measurements = ",".join(
            f"{key}:{value:.6g}" for key, value in zip(keys, table[row].tolist(), strict=True) if np.isfinite(value)
        )
        file.write(
            f'{separator}{{"type":"Feature","id":"{uuid.uuid5(space, str(label))}","geometry":{_geometry(polygons)},'
            f'"properties":{{"objectType":"detection","name":"{label}",{classes.text(row)}'
            f'"measurements":{{{measurements}}}}}}}'
        )
        separator = ",\n"
    file.write("\n]}\n")


def _split_column(column: str) -> tuple[str, str, str]:
    """Name, separator and kind of a column: CD3e_ring_mean is CD3e and "ring mean"."""
    for ending in ("_ring_mean", "_measured_mean", "_mean"):
        if column.endswith(ending):
            return column.removesuffix(ending), "_", ending[1:].replace("_", " ")
    raise ValueError(column)


def _outlines(labels: CellLabels, cells: ImageCells, step: Step) -> Iterator[tuple[int, list[Polygon]]]:
    tracer = OutlineTracer(cells.geometry.last)
    above = np.zeros(labels.shape[1], np.int32)
    for top, rows in bands(labels.shape):
        band = labels.read(top, rows)
        yield from tracer.add(band, above, top, is_last=top + rows == labels.shape[0])
        above = band[-1].copy()
        step()


def _geometry(polygons: list[Polygon]) -> str:
    """A Polygon, or a MultiPolygon for a cell of several parts; every ring ends where it starts."""
    texts = []
    for polygon in polygons:
        rings = [",".join(f"[{x},{y}]" for x, y in [*ring, ring[0]]) for ring in polygon]
        texts.append("[" + ",".join(f"[{ring}]" for ring in rings) + "]")
    if len(texts) == 1:
        return f'{{"type":"Polygon","coordinates":{texts[0]}}}'
    return f'{{"type":"MultiPolygon","coordinates":[{",".join(texts)}]}}'


class _Classes:
    """The class of each cell as QuPath writes it: the names of its positive markers, joined by colons."""

    def __init__(self, names: Sequence[str], positives: Positives, cells: ImageCells) -> None:
        called = positives.called(names, cells.means)
        self._names = list(called)
        self._flags = np.stack(list(called.values()), axis=1) if called else None
        colours = dict(zip(names, channel_colours(names), strict=True))
        self._colours = [colours[name] for name in self._names]
        self._texts: dict[bytes, str] = {}

    def text(self, row: int) -> str:
        """The property of a cell with a comma after it; empty without cut-offs."""
        if self._flags is None:
            return ""
        flags = self._flags[row]
        key = flags.tobytes()
        if key not in self._texts:
            which = np.flatnonzero(flags).tolist()
            # The mean of the colours of its markers.
            colour = np.mean([self._colours[index] for index in which], axis=0).astype(int).tolist() if which else []
            name = ": ".join(self._names[index] for index in which) if which else NEGATIVE
            found = {"name": name, "color": colour or NEGATIVE_COLOUR}
            self._texts[key] = f'"classification":{json.dumps(found, ensure_ascii=False)},'
        return self._texts[key]


def write_h5ad(
    path: Path,
    images: Sequence[ImageCells],
    names: Sequence[str],
    trust: Mapping[str, MarkerTrust] | None,
    positives: Positives,
) -> None:
    """An AnnData: X (n, C) float32 means, obs of the cells, var of the markers as in markers.csv, and the centroids
    (x, y) of the cells in obsm["spatial"].

    Layers are "ring" and "measured", where there are such means. ``uns["spatial_unit"]`` is "um", or "px" where an
    image has no pixel size. Raises InputError if anndata is not installed.
    """
    anndata: Any = needed("anndata", extra="cells")
    pandas: Any = needed("pandas", extra="cells")
    in_um = all(cells.pixel_size_um for cells in images)
    sides = [cells.pixel_size_um or 1.0 if in_um else 1.0 for cells in images]
    labels = [label for cells in images for label in cells.numbers.tolist()]
    image = [cells.name for cells in images for _ in range(len(cells.numbers))]
    area = np.concatenate([cells.geometry.area for cells in images])
    obs: dict[str, Any] = {"image": pandas.Categorical(image), "cell": labels, "area_px": area}
    if in_um:
        obs["area_um2"] = np.concatenate(
            [cells.geometry.area * side**2 for cells, side in zip(images, sides, strict=True)]
        )
    if any(cells.stain for cells in images):
        stain = [cells.stain.state if cells.stain else "" for cells in images for _ in range(len(cells.numbers))]
        obs["stain"] = pandas.Categorical(stain)
    called = [positives.called(names, cells.means) for cells in images]
    for name in called[0]:
        obs[f"{name}_positive"] = np.concatenate([found[name] for found in called])
    spatial = [
        np.stack([cells.geometry.x, cells.geometry.y], axis=1) * side for cells, side in zip(images, sides, strict=True)
    ]
    layers = {}
    if images[0].means.ring is not None:
        layers["ring"] = np.concatenate([cells.means.ring for cells in images]).astype(np.float32)
    columns = measured_columns(images)
    if columns:
        full = []
        for cells in images:
            values = np.full(cells.means.mean.shape, np.nan, np.float32)
            if cells.measured is not None:
                values[:, list(cells.measured_columns)] = cells.measured.mean
            full.append(values)
        layers["measured"] = np.concatenate(full)
    rows = marker_rows(names, trust, positives, images)
    var = pandas.DataFrame([row[1:] for row in rows], index=list(names), columns=COLUMNS[1:])
    table = anndata.AnnData(
        np.concatenate([cells.means.mean for cells in images]).astype(np.float32),
        obs=pandas.DataFrame(obs, index=[f"{name}_{label}" for name, label in zip(image, labels, strict=True)]),
        var=var,
        obsm={"spatial": np.concatenate(spatial)},
        layers=layers,
        uns={"spatial_unit": "um" if in_um else "px", "verdict_rule": RULE},
    )
    table.write_h5ad(path)
