"""How H&Es are stained and scanned: a few numbers of the tissue of each, and which lie outside those of the training.

Densities of haematoxylin and eosin are those of colour deconvolution with fixed vectors (Ruifrok and Johnston, Anal
Quant Cytol Histol 2001). A weaker or stronger stain changes them. A stain of another colour, or another scanner,
changes how much of the optical density is blue.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from statistics import NormalDist
from typing import Any, Self

import numpy as np

from orion_unet.data.measured import fingerprint, reading_threads, recall, remember
from orion_unet.data.pairs import PairTable
from orion_unet.data.randomness import STAIN, counter_rng
from orion_unet.data.scale import Progress, Scales, he_image, no_progress
from orion_unet.data.split import Split
from orion_unet.data.tissue import tissue_pixels
from orion_unet.errors import InputError
from orion_unet.registration.stains import optical_density, separation
from orion_unet.slides.images import HeImage

# Patches that are read of an image, how many are tried to find them, and their side [pixels].
PATCHES, TRIES, SIDE = 32, 320, 64
# A patch is used from this share of tissue on, an image from so many pixels of tissue on.
TISSUE_SHARE, LEAST_PIXELS = 0.25, 2048
# Sharpness compares differences of neighbouring pixels with those of pixels this far apart. Pale and dark tissue are
# these shares of the pixels in the order of their optical density, judged by every so many-th pixel.
FAR, PALE, DARK, EVERY = 4, (0.3, 0.6), (0.9, 1.0), 4
# Training cores that are measured at most, evenly spread.
MOST_CORES = 500
# Values count up to so many spreads from the median, so that a few odd cores do not widen the training's range.
# No spread is taken to be smaller than the least one, 1 %, however alike the cores are.
MOST_SPREADS, LEAST_SPREAD = 3.0, 0.01
# Chance that an image of the training's stain lies beyond the limit, and the fewest groups a limit is drawn from.
CHANCE, LEAST_GROUPS = 0.01, 4

# All but the brightness are kept as logarithms, which are more nearly normal.
FEATURES = (
    "haematoxylin",
    "haematoxylin spread",
    "eosin",
    "eosin spread",
    "blue of pale tissue",
    "blue of dark tissue",
    "sharpness",
    "brightness",
)

WITHIN, OUTSIDE, NOT_JUDGED = "within", "outside", "not judged"


def measure_stain(image: HeImage) -> np.ndarray | None:
    """The ``FEATURES`` (8,) of up to 32 patches of an H&E, over their tissue alone; None with too little tissue.

    Mean and standard deviation of the densities of haematoxylin and eosin; the share of blue in the optical density of
    pale and of dark tissue; sharpness, the mean squared difference of neighbouring pixels over that of pixels 4 apart,
    in optical density; brightness, the mean intensity in [0, 1]. The same image gives the same numbers. Raises
    InputError where it is damaged.
    """
    sums, sampled = np.zeros(10), []
    for patch, tissue in _patches(image):
        optical = optical_density(patch)
        shown = optical[tissue]
        density = (shown @ separation()[:, :2]).astype(np.float64)
        grey = optical.mean(axis=2)
        near, far = (_differences(grey, tissue, distance) for distance in (1, FAR))
        intensity = patch[tissue].mean(axis=1, dtype=np.float64).sum()
        sums += [len(density), *density.sum(axis=0), *(density**2).sum(axis=0), intensity, *near, *far]
        sampled.append(shown[::EVERY])
    return _features(sums, np.concatenate(sampled)) if sums[0] >= LEAST_PIXELS else None


def _patches(image: HeImage) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Patches (h, w, 3) in [0, 1] and their tissue (h, w), from a grid in random order."""
    side = min(SIDE, *image.shape)
    rows, columns = (length // side for length in image.shape)
    found = 0
    rng = counter_rng(0, STAIN)
    for place in rng.permutation(rows * columns)[:TRIES].tolist():
        patch = image.read(place // columns * side, place % columns * side, side, side)
        tissue = tissue_pixels(patch, 1.0)
        if tissue.mean() >= TISSUE_SHARE:
            found += 1
            yield patch, tissue
        if found == PATCHES:
            return


def _differences(grey: np.ndarray, tissue: np.ndarray, distance: int) -> tuple[float, int]:
    """Sum of the squared differences of pixels so far apart, down and across, and how many there are."""
    total, count = 0.0, 0
    for values, shown in ((grey, tissue), (grey.T, tissue.T)):
        both = shown[distance:] & shown[:-distance]
        total += float(((values[distance:] - values[:-distance])[both] ** 2).sum(dtype=np.float64))
        count += int(both.sum())
    return total, count


def _features(sums: np.ndarray, optical: np.ndarray) -> np.ndarray:
    """The features from the sums over pixels, and the optical densities (n, 3) of some of them."""
    mean = sums[1:3] / sums[0]
    spread = np.sqrt(np.maximum(sums[3:5] / sums[0] - mean**2, 0))
    near, far = (sums[at] / max(sums[at + 1], 1) for at in (6, 8))
    total = optical.sum(axis=1)
    ordered = optical[np.argsort(total)]
    blue = []
    for shares in (PALE, DARK):
        first, last = (round(share * len(ordered)) for share in shares)
        part = ordered[first:last].mean(axis=0)
        blue.append(part[2] / max(part.sum(), 1e-3))
    found = [mean[0], spread[0], mean[1], spread[1], *blue, near / max(far, 1e-9)]
    # A density of 0 or less is as good as no stain at all.
    return np.array([*np.log(np.maximum(found, 1e-3)), sums[5] / sums[0]])


@dataclass(frozen=True)
class StainJudgement:
    """Whether an image is stained like the training: ``state`` is within, outside or not judged.

    ``distance`` and ``limit`` are those of ``StainProfile``, NaN where unknown; ``reason`` says what differs most, or
    why nothing is known. ``values`` (8,) are the features as a person reads them, without logarithms.
    """

    state: str
    distance: float
    limit: float
    reason: str
    values: np.ndarray = field(default_factory=lambda: np.full(len(FEATURES), math.nan))

    def sentence(self) -> str:
        """The state with its numbers."""
        if self.state == NOT_JUDGED:
            return f"H&E stain not judged: {self.reason}"
        numbers = f"distance {self.distance:.1f}, limit {self.limit:.1f}"
        if self.state == WITHIN:
            return f"H&E stain within that of the training ({numbers})"
        return f"H&E stain outside that of the training ({numbers}; {self.reason})"


class StainProfile:
    """The stain of N training cores: ``values`` (N, 8) of ``FEATURES``, and the group of each core.

    The distance of an image is its Mahalanobis distance divided by the root of the number of features, so that about 1
    is usual: from the median of the cores, in units of their standard deviation (values beyond 3 spreads count as 3),
    with correlations that are shrunk towards 0 the more, the fewer groups there are. The limit is the upper
    end of a one-sided 99 % prediction interval (Student's t over groups) for the logarithm of the cores' own
    distances, each from a profile without its group. Few groups give a wide interval, and fewer than 4 none.
    """

    def __init__(self, values: np.ndarray, groups: tuple[str, ...]) -> None:
        self.values = values
        self.groups = groups
        self._shape = _shape(values, len(set(groups))) if len(values) else None

    @cached_property
    def limit(self) -> float:
        """The largest distance of an image that counts as stained like the training; NaN with too few groups."""
        units = sorted(set(self.groups))
        count = len(units)
        if count < LEAST_GROUPS:
            return math.nan
        of_unit = np.array([units.index(group) for group in self.groups])
        own = np.empty(len(self.values))
        for unit in range(count):
            left_out = of_unit == unit
            own[left_out] = _distances(_shape(self.values[~left_out], count - 1), self.values[left_out])
        # An image at the very median would have a distance of 0.
        logs = np.log(np.maximum(own, 1e-3))
        reach = student_quantile(1 - CHANCE, count - 1) * logs.std(ddof=1) * math.sqrt(1 + 1 / count)
        return float(np.exp(logs.mean() + reach))

    @classmethod
    def joined(cls, profiles: Sequence[Self]) -> Self:
        """The profile of the cores of several trainings; a core of several of them counts once."""
        rows = {
            (group, *values): None
            for profile in profiles
            for group, values in zip(profile.groups, profile.values.tolist(), strict=True)
        }
        values = np.array([row[1:] for row in rows], np.float64).reshape(-1, len(FEATURES))
        return cls(values, tuple(row[0] for row in rows))

    def judge(self, values: np.ndarray | None) -> StainJudgement:
        """Compare an image's ``measure_stain`` with the training."""
        if values is None:
            return StainJudgement(NOT_JUDGED, math.nan, self.limit, "the image shows too little tissue")
        shown = _readable(values)
        if self._shape is None or not math.isfinite(self.limit):
            reason = f"{len(set(self.groups))} groups of training cores are too few for a limit ({LEAST_GROUPS})"
            return StainJudgement(NOT_JUDGED, math.nan, math.nan, reason, shown)
        distance = float(_distances(self._shape, values[None])[0])
        furthest = int(np.abs((values - self._shape[0]) / self._shape[1]).argmax())
        low, high = (float(_readable(end)[furthest]) for end in (self.values.min(axis=0), self.values.max(axis=0)))
        name = FEATURES[furthest]
        reason = f"above all its {name} of {shown[furthest]:.3g}, in the training {low:.3g} to {high:.3g}"
        return StainJudgement(OUTSIDE if distance > self.limit else WITHIN, distance, self.limit, reason, shown)

    def document(self) -> dict[str, Any]:
        """Plain Python values for a checkpoint."""
        return {"features": list(FEATURES), "values": self.values.tolist(), "groups": list(self.groups)}

    @classmethod
    def from_document(cls, document: Any) -> Self:
        """Inverse of ``document``; raises InputError where the document is damaged or has other features."""
        try:
            values = np.array(document["values"], np.float64).reshape(-1, len(FEATURES))
            groups = tuple(str(group) for group in document["groups"])
            features = list(document["features"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"the stain of the training is damaged or of another version ({error!r})") from None
        if features != list(FEATURES) or len(groups) != len(values) or not np.isfinite(values).all():
            raise InputError("the stain of the training is damaged or of another version")
        return cls(values, groups)


def student_quantile(share: float, degrees: int) -> float:
    """Quantile of Student's t distribution, within 1 % from 3 degrees of freedom on (Abramowitz and Stegun, Handbook of
    Mathematical Functions, 26.7.5): prediction does without scipy."""
    z = NormalDist().inv_cdf(share)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / degrees**order for order, term in enumerate(terms))


def _readable(values: np.ndarray) -> np.ndarray:
    return np.append(np.exp(values[:-1]), values[-1])


def _shape(values: np.ndarray, groups: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centre (8,), spread (8,) and inverse correlation (8, 8) of cores (N, 8)."""
    count, features = values.shape
    centre = np.median(values, axis=0)
    # 1.4826 times the median deviation is the standard deviation of a normal distribution.
    usual = np.maximum(1.4826 * np.median(np.abs(values - centre), axis=0), LEAST_SPREAD)
    limited = np.clip((values - centre) / usual, -MOST_SPREADS, MOST_SPREADS) * usual
    spread = np.maximum(np.sqrt((limited**2).sum(axis=0) / max(count - 1, 1)), LEAST_SPREAD)
    units = limited / spread
    deviation = np.maximum(units.std(axis=0), 1e-9)
    correlation = ((units - units.mean(axis=0)) / deviation).T @ ((units - units.mean(axis=0)) / deviation) / count
    share = 0.5 * features / (features + groups)
    shrunk = (1 - share) * correlation + share * np.eye(features)
    np.fill_diagonal(shrunk, 1.0)
    return centre, spread, np.linalg.inv(shrunk)


def _distances(shape: tuple[np.ndarray, np.ndarray, np.ndarray], values: np.ndarray) -> np.ndarray:
    """Distances (N,) of images (N, 8)."""
    centre, spread, inverse = shape
    units = (values - centre) / spread
    found: np.ndarray = np.sqrt(np.einsum("ni,ij,nj->n", units, inverse, units) / len(centre))
    return found


def known_stain(table: PairTable, scales: Scales, split: Split, progress: Progress = no_progress) -> dict[str, Any]:
    """The document of the profile of the training cores; from the cache if the same files were measured before.

    Cores with too little tissue are left out. Raises InputError where a file has gone.
    """
    train = split.train.tolist()
    cores = [train[at] for at in np.unique(np.linspace(0, len(train) - 1, min(MOST_CORES, len(train))).astype(int))]
    groups = [split.groups[core] for core in cores]
    about = [groups, table.level, scales.he, table.he["layout"].tolist()]
    name = fingerprint([table.path(core, "he") for core in cores], "stain", about)
    document = recall(name)
    with suppress(InputError):
        return StainProfile.from_document(document).document()
    step = progress(len(cores), "measuring the stain")

    def measure(core: int) -> np.ndarray | None:
        found = measure_stain(he_image(table, scales, core))
        step()
        return found

    with ThreadPoolExecutor(max_workers=reading_threads(table.folder)) as pool:
        measured = list(pool.map(measure, cores))
    rows = [(values, group) for values, group in zip(measured, groups, strict=True) if values is not None]
    values = np.array([values for values, _ in rows]).reshape(-1, len(FEATURES))
    profile = StainProfile(values, tuple(group for _, group in rows))
    remember(name, profile.document())
    return profile.document()
