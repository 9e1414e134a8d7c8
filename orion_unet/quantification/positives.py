"""Which cells are positive for which marker: cut-offs from an evaluation or the command line."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from orion_unet.data.normalization import LOG_CURVATURE
from orion_unet.errors import InputError
from orion_unet.quantification.measure import CellMeans, ToUnit
from orion_unet.run_log import read_document
from orion_unet.slides.intensity import WHITE
from orion_unet.text import named

SCORES_FILE = "scores.json"
STORED, UNIT = "as stored", "[0, 1]"


@dataclass(frozen=True)
class Cutoff:
    """A cell is positive whose mean lies above it: ``predicted`` for the image, ``measured`` for measured markers.

    NaN where there is none. ``unit`` is that of both: means as stored, or in the [0, 1] of the training.
    """

    predicted: float
    measured: float
    unit: str
    origin: str


@dataclass(frozen=True)
class TrainingRange:
    """How stored values become the [0, 1] of the training: intensities (stored / white) by marker, and the curve."""

    white: float
    bounds: Mapping[str, tuple[float, float]]
    transform: str

    def to_unit(self, names: Sequence[str], dtype: np.dtype, normalized: bool) -> ToUnit:
        """What brings values of a channel of an image into [0, 1]; ``normalized`` images only lack the scale of
        integers. Markers that the model does not know become NaN."""
        white = WHITE.get(dtype.name, 1.0 if normalized else self.white)
        curve = float(np.log1p(LOG_CURVATURE))

        def to_unit(values: np.ndarray, channel: int) -> np.ndarray:
            if normalized:
                return np.clip(values / white, 0, 1)
            if names[channel] not in self.bounds:
                return np.full(values.shape, np.nan)
            low, high = self.bounds[names[channel]]
            if not high > low:
                return np.zeros(values.shape)
            target = np.clip((values / white - low) / (high - low), 0, 1)
            return np.log1p(LOG_CURVATURE * target) / curve if self.transform == "log1p" else target

        return to_unit


@dataclass(frozen=True)
class Positives:
    """The cut-offs by marker, and the range of the training, None where no evaluation was given."""

    cutoffs: dict[str, Cutoff] = field(default_factory=dict)
    range: TrainingRange | None = None

    def called(self, names: Sequence[str], means: CellMeans, side: str = "predicted") -> dict[str, np.ndarray]:
        """Whether each cell (n,) is positive, by marker; ``side`` is predicted or measured."""
        found = {}
        for index, name in enumerate(names):
            value = self.value(name, side)
            if math.isfinite(value):
                found[name] = self.compared(name, means, index) > value
        return found

    def value(self, name: str, side: str) -> float:
        """The cut-off of a marker, NaN where there is none."""
        cutoff = self.cutoffs.get(name)
        return math.nan if cutoff is None else float(getattr(cutoff, side))

    def compared(self, name: str, means: CellMeans, index: int) -> np.ndarray:
        """The means (n,) that the cut-off of a marker is compared with."""
        if name in self.cutoffs and self.cutoffs[name].unit == UNIT and means.unit is not None:
            return means.unit[:, index]
        return means.mean[:, index]


def find_positives(
    names: Sequence[str],
    evaluation: Path | None,
    positive: str | None,
    measured_positive: str | None,
    compared: bool = False,
) -> Positives:
    """The cut-offs of an evaluation's cells, and those of the command line, which win. ``compared`` says whether there
    are measured images. Raises InputError."""
    cutoffs: dict[str, Cutoff] = {}
    found = None
    if evaluation is not None:
        found, cutoffs = _read_evaluation(evaluation, names, compared)
    given = _given("--positive", positive, names)
    measured = _given("--measured_positive", measured_positive, names)
    alone = [name for name in measured if name not in given and name in cutoffs]
    if alone:
        raise InputError(
            f"--measured_positive {named(alone)}: give --positive for it, too: the predicted cut-off of the evaluation "
            "is in another unit"
        )
    for name in names:
        if name in given or name in measured:
            value = given.get(name, math.nan)
            options = [word for word, of in (("--positive", given), ("--measured_positive", measured)) if name in of]
            cutoffs[name] = Cutoff(value, measured.get(name, value), STORED, " and ".join(options))
    return Positives(cutoffs, found)


def _given(option: str, text: str | None, names: Sequence[str]) -> dict[str, float]:
    """Values by marker of ``NAME=X,...``; raises InputError."""
    found: dict[str, float] = {}
    problems = []
    for item in (part.strip() for part in (text or "").split(",") if part.strip()):
        name, separator, number = item.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not separator or not math.isfinite(value):
            problems.append(f"{item!r}: write MARKER=VALUE, in the unit of the image")
        elif name.strip() not in names:
            problems.append(f"no marker {name.strip()}; there are {', '.join(names)}")
        else:
            found[name.strip()] = value
    if len(problems) == 1:
        raise InputError(f"{option}: {problems[0]}")
    if problems:
        raise InputError.listing(f"{option} cannot be used:", problems)
    return found


def _read_evaluation(given: Path, names: Sequence[str], measured: bool) -> tuple[TrainingRange, dict[str, Cutoff]]:
    path = given / SCORES_FILE if given.is_dir() else given
    try:
        document, _ = read_document(path, 1 << 26)
    except OSError as error:
        raise InputError(f"--evaluation {path}: cannot be read ({error.strerror or error})") from None
    if document is None or "markers" not in document or "target" not in document:
        raise InputError(f"--evaluation {path}: is not the scores.json of an evaluation")
    if not document.get("cells"):
        raise InputError(f"--evaluation {path}: has no scores of cells; run evaluate again with --cells")
    if "white" not in document["target"]:
        raise InputError(
            f"--evaluation {path}: is of an older version without the range of markers; run evaluate again"
        )
    if measured and document["target"].get("normalization") == "core":
        raise InputError(
            f"--evaluation {path}: its model normalised every core by itself (--target_normalization core), so its "
            "measured thresholds fit no --measured image; leave one of the two out: evaluate --cells has these scores"
        )
    try:
        bounds = {
            str(name): (float(scores["range"][0]), float(scores["range"][1]))
            for name, scores in document["markers"].items()
        }
        scale = TrainingRange(float(document["target"]["white"]), bounds, str(document["target"]["transform"]))
        origin = f"{path}: {document['cells']['cutoffs']}; {document['cells']['thresholds']}"
        cutoffs = {
            name: Cutoff(_number(scores["predicted_cutoff"]), _number(scores["measured_threshold"]), UNIT, origin)
            for name, scores in document["cells"]["markers"].items()
            if name in names
        }
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise InputError(f"--evaluation {path}: is damaged ({error!r})") from None
    if not cutoffs:
        raise InputError(
            f"--evaluation {path}: scores none of the image's markers; it has {', '.join(bounds)}, the image "
            f"{', '.join(names)}"
        )
    # A marker that is the same in all cells has neither.
    return scale, {name: cutoff for name, cutoff in cutoffs.items() if math.isfinite(cutoff.measured)}


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
