"""What a model has to beat, fitted on its training cores: each marker's mean, and a linear regression from colours."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from orion_unet.config import DataOptions
from orion_unet.data.measured import fingerprint, recall, remember
from orion_unet.data.normalization import Normalization
from orion_unet.data.pairs import PairTable
from orion_unet.data.patches import PatchPlace, PatchReader, grid_starts
from orion_unet.data.randomness import REGRESSION, counter_rng
from orion_unet.data.scale import Progress, Scales, no_progress
from orion_unet.data.transforms import BatchTransform
from orion_unet.errors import InputError

# Pixels of all training cores together, in square patches. Patches are those of the training, or smaller where cores
# are many, but not so small that hot pixels could not be recognised in them.
FITTED_PIXELS, SMALLEST_SIDE = 500_000, 32
# Optical density is -ln(intensity), of intensities no darker than one level of 255.
DARKEST = 1 / 255
FEATURES = ("1", "R", "G", "B", "OD of R", "OD of G", "OD of B")


def colour_features(he: Tensor) -> Tensor:
    """Features (7, ...) of H&E (3, ...) in [0, 1]: one, the three colours, and their optical densities."""
    density = -torch.log(he.clamp(min=DARKEST))
    return torch.cat([torch.ones_like(he[:1]), he, density])


@dataclass(frozen=True)
class ColourRegression:
    """Both baselines of C markers: ``mean`` (C,) in [0, 1] and ``coefficients`` (7, C) of ``colour_features``.

    ``pixels`` and ``cores`` say how many of the training cores they were fitted to; where panels differ, each marker to
    those among them in which it was measured.
    """

    names: tuple[str, ...]
    mean: np.ndarray
    coefficients: np.ndarray
    pixels: int
    cores: int

    def predict(self, he: Tensor) -> Tensor:
        """Markers (C, H, W) in [0, 1] from H&E (3, H, W) in [0, 1]."""
        coefficients = torch.from_numpy(self.coefficients).to(he)
        markers = he.new_empty(coefficients.shape[1], *he.shape[1:])
        # Row by row: the features of a whole core would take more memory than its H&E.
        for row, colours in enumerate(he.unbind(1)):
            markers[:, row] = coefficients.T @ colour_features(colours)
        return markers.clamp_(0, 1)

    def of(self, channels: Sequence[int]) -> Self:
        """The same for the markers at these places, in this order."""
        index = list(channels)
        names = tuple(self.names[channel] for channel in index)
        return replace(self, names=names, mean=self.mean[index], coefficients=self.coefficients[:, index])

    def document(self) -> dict[str, Any]:
        """Plain Python values for a checkpoint."""
        return {
            "names": list(self.names),
            "features": list(FEATURES),
            "mean": self.mean.tolist(),
            "coefficients": self.coefficients.tolist(),
            "pixels": self.pixels,
            "cores": self.cores,
        }

    @classmethod
    def from_document(cls, document: Any) -> Self:
        """Inverse of ``document``; raises InputError where the document is damaged or has other features."""
        try:
            names = tuple(str(name) for name in document["names"])
            mean = np.array(document["mean"], np.float64)
            coefficients = np.array(document["coefficients"], np.float64)
            found = cls(names, mean, coefficients, int(document["pixels"]), int(document["cores"]))
            features = tuple(document["features"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"the regression from colours is damaged or of another version ({error!r})") from None
        sound = np.isfinite(mean).all() and np.isfinite(coefficients).all()
        shapes = mean.shape, coefficients.shape
        if features != FEATURES or shapes != ((len(names),), (len(FEATURES), len(names))) or not sound:
            raise InputError("the regression from colours is damaged or of another version")
        return found


def known_colour_regression(
    table: PairTable,
    scales: Scales,
    normalization: Normalization,
    train: np.ndarray,
    options: DataOptions,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """The document of the regression fitted to the training cores as training sees them, on the CPU; from the cache if
    the same files were measured before."""
    about = [
        normalization.document(),
        train.tolist(),
        [options.noise_removal, options.patch_size, table.he["layout"].tolist(), table.orion["layout"].tolist()],
        table.level,
        [scales.he, scales.orion, list(table.kept_channels), table.every_place],
    ]
    files = [table.path(core, modality) for core in train.tolist() for modality in ("he", "orion")]
    name = fingerprint(files, "colour regression", about)
    document = recall(name)
    with suppress(InputError):
        return ColourRegression.from_document(document).document()
    reader = PatchReader(table, scales, options.patch_size)
    transform = BatchTransform(table, reader.formats, normalization, options.noise_removal, torch.device("cpu"))
    fitted = fit_colour_regression(table, scales, transform, train, options.patch_size, progress=progress)
    remember(name, fitted.document())
    return fitted.document()


def held_out_correlations(
    regression: ColourRegression,
    table: PairTable,
    scales: Scales,
    normalization: Normalization,
    places: np.ndarray,
    options: DataOptions,
) -> dict[str, float | None]:
    """Pearson of the regression for every marker, over about FITTED_PIXELS pixels of the validation patches ``places``
    (N, 3); None where the marker or the prediction is constant. From the cache if the same files were measured before.
    """
    most = max(1, FITTED_PIXELS // options.patch_size**2)
    kept = places[np.unique(np.linspace(0, len(places) - 1, min(most, len(places))).round().astype(int))]
    files = [table.path(core, modality) for core in np.unique(kept[:, 0]).tolist() for modality in ("he", "orion")]
    about = [
        regression.document(),
        normalization.document(),
        kept.tolist(),
        table.level,
        [options.noise_removal, options.patch_size, scales.he, scales.orion, list(table.kept_channels)],
        table.every_place,
    ]
    name = fingerprint(files, "colour regression held out", about)
    known = (recall(name) or {}).get("pearson")
    if isinstance(known, dict) and list(known) == list(table.kept_names):
        return known
    reader = PatchReader(table, scales, options.patch_size)
    transform = BatchTransform(table, reader.formats, normalization, options.noise_removal, torch.device("cpu"))
    # Pixels, and sums of prediction, target, their squares and their product: (6, C).
    sums = torch.zeros(6, len(table.kept_names), dtype=torch.float64)
    for core, y, x in kept.tolist():
        batch = transform(reader.read([PatchPlace(core, y, x)]), augment=False)
        made, measured = (each.flatten(1).double() for each in (regression.predict(batch.he[0]), batch.target[0]))
        parts = (torch.ones_like(made), made, measured, made**2, measured**2, made * measured)
        found = torch.stack([part.sum(1) for part in parts])
        sums += found if batch.measured is None else found * batch.measured
    count, made, measured, made2, measured2, both = sums.numpy()
    spread = np.sqrt(np.maximum(made2 * count - made**2, 0) * np.maximum(measured2 * count - measured**2, 0))
    with np.errstate(divide="ignore", invalid="ignore"):
        pearson = (both * count - made * measured) / spread
    # Of a constant, rounding leaves a spread of nearly nothing.
    defined = (spread > 1e-9 * count**2) & np.isfinite(pearson)
    correlations = {
        marker: float(np.clip(value, -1, 1)) if sure else None
        for marker, value, sure in zip(table.kept_names, pearson, defined, strict=True)
    }
    remember(name, {"pearson": correlations})
    return correlations


def fit_colour_regression(
    table: PairTable,
    scales: Scales,
    transform: BatchTransform,
    train: np.ndarray,
    patch_size: int,
    seed: int = 0,
    progress: Progress = no_progress,
) -> ColourRegression:
    """Fit both baselines to about FITTED_PIXELS pixels, as many of each of the training cores; each marker to the cores
    in which it was measured.

    ``train`` are indices into ``table``, ``transform`` makes targets as training makes them, ``seed`` chooses the
    patches. Time and memory do not grow with the size of the cores, nor with their number beyond a few thousand.
    """
    most = FITTED_PIXELS // SMALLEST_SIDE**2
    together = _measured_together(table, train)
    cores = np.unique(np.concatenate([_spread(train[present], most) for _, present in together])).tolist()
    largest = min(patch_size, max(SMALLEST_SIDE, math.isqrt(FITTED_PIXELS // len(cores))))
    equations = [NormalEquations(len(channels)) for channels, _ in together]
    pixels = 0
    readers: dict[int, PatchReader] = {}
    step = progress(len(cores), "fitting the baselines")
    for core in cores:
        side = min(largest, int(table.he[core]["height"]), int(table.he[core]["width"]))
        if side not in readers:
            readers[side] = PatchReader(table, scales, side)
        for place in _places(table, core, side, FITTED_PIXELS / len(cores), seed):
            batch = transform(readers[side].read([place]), augment=False)
            pixels += batch.target[0, 0].numel()
            for own, (channels, present) in zip(equations, together, strict=True):
                if core in train[present]:
                    own.add(batch.he[0], batch.target[0] if len(together) == 1 else batch.target[0, channels])
        step()
    mean, coefficients = np.zeros(len(table.kept_names)), np.zeros((len(FEATURES), len(table.kept_names)))
    for own, (channels, _) in zip(equations, together, strict=True):
        if own.pixels:
            mean[channels], coefficients[:, channels] = own.mean(), own.solve()
    return ColourRegression(table.kept_names, mean, coefficients, pixels, len(cores))


def _measured_together(table: PairTable, train: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """The kept channels in groups that were measured in the same training cores: indices (c,), and which cores (N,)
    bool."""
    if table.measured is None:
        return [(np.arange(len(table.kept_names)), np.ones(len(train), bool))]
    patterns, group = np.unique(table.measured[train], axis=1, return_inverse=True)
    return [(np.flatnonzero(group.ravel() == index), present) for index, present in enumerate(patterns.T)]


def _spread(cores: np.ndarray, most: int) -> np.ndarray:
    """At most so many of the cores, evenly spread."""
    return cores[np.linspace(0, len(cores) - 1, min(most, len(cores))).round().astype(int)]


def _places(table: PairTable, core: int, side: int, pixels: float, seed: int) -> Iterator[PatchPlace]:
    """Patches of the core's grid in random order, about so many pixels, one patch at least."""
    ys, xs = (grid_starts(int(table.he[core][axis]), side, side) for axis in ("height", "width"))
    order = counter_rng(seed, REGRESSION, core).permutation(len(ys) * len(xs))
    for index in order[: max(1, round(pixels / side**2))].tolist():
        yield PatchPlace(core, ys[index // len(xs)], xs[index % len(xs)])


class NormalEquations:
    """Least squares of C markers on the colour of a pixel, from sums: any number of pixels in the same memory."""

    def __init__(self, markers: int) -> None:
        self.gram = np.zeros((len(FEATURES), len(FEATURES)))
        self.moment = np.zeros((len(FEATURES), markers))

    def add(self, he: Tensor, measured: Tensor) -> None:
        """Add the pixels of H&E (3, H, W) and markers (C, H, W)."""
        features = colour_features(he.flatten(1)).double()
        self.gram += (features @ features.T).cpu().numpy()
        self.moment += (features @ measured.flatten(1).double().T).cpu().numpy()

    @property
    def pixels(self) -> int:
        """How many were added."""
        return int(self.gram[0, 0])

    def mean(self) -> np.ndarray:
        """Mean (C,) of the markers."""
        return self.moment[0] / self.gram[0, 0]

    def solve(self) -> np.ndarray:
        """Coefficients (7, C); the smallest where colours are collinear, as in a grey image."""
        # Equilibrated, so that "collinear" does not depend on the unit of a feature.
        scale = np.sqrt(np.diag(self.gram))
        scale[scale == 0] = 1.0
        solution = np.linalg.lstsq(self.gram / np.outer(scale, scale), self.moment / scale[:, None], rcond=1e-12)[0]
        return solution / scale[:, None]
