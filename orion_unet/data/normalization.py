"""Quantile normalisation of the targets, fitted on the training cores, and its inverse."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import numpy as np
import torch

from orion_unet.data.camera_noise import NoiseEvidence, look_for_noise
from orion_unet.data.measured import fingerprint, reading_threads, recall, remember
from orion_unet.data.pairs import PairTable
from orion_unet.data.randomness import NORMALIZATION, counter_rng
from orion_unet.data.scale import Progress, Scales, no_progress
from orion_unet.errors import InputError
from orion_unet.run_log import SCHEMA

LOWER_QUANTILE, UPPER_QUANTILE = 0.010, 0.999
# Pixels sampled from all training cores together, and from one core when each is normalised separately. The limit on
# values (float32, four bytes each) bounds the memory when there are many channels.
SAMPLED_PIXELS, SAMPLED_PIXELS_PER_CORE, SAMPLED_VALUES = 2_000_000, 250_000, 48_000_000
# Independent of --seed: the same cores always give the same numbers.
SAMPLE_SEED = 0
# Curvature of the log1p transform: n -> log(1 + k n) / log(1 + k) on the normalised intensity n in [0, 1].
LOG_CURVATURE = 100.0


@dataclass
class Normalization:
    """How stored intensities become targets in [0, 1], and back.

    ``lower`` and ``upper`` (C,) are the intensities (stored / ``white``) that become 0 and 1; an empty channel has
    ``lower == upper`` and becomes 0 everywhere. ``target_mean`` (C,) is the mean of the training targets, in [0, 1].
    ``method`` is dataset, core or none. With ``core``, ``per_core[name]`` are the bounds (2, C) of each core; ``lower``
    and ``upper`` are those of the data set, for cores that were never measured. ``transform`` is linear or log1p.
    ``evidence`` says for each channel whether it shows nothing but the noise of the camera, and why (see
    ``camera_noise``); it is empty where that was not looked for.
    """

    names: tuple[str, ...]
    lower: np.ndarray
    upper: np.ndarray
    target_mean: np.ndarray
    white: float
    method: str = "dataset"
    transform: str = "linear"
    per_core: dict[str, np.ndarray] = field(default_factory=dict)
    sampled_pixels: int = 0
    sampled_cores: int = 0
    evidence: list[dict[str, Any]] = field(default_factory=list)

    @property
    def empty(self) -> list[str]:
        """Channels without signal in the training cores: constant, or nothing but noise."""
        return [name for name, low, high in zip(self.names, self.lower, self.upper, strict=True) if not high > low]

    @property
    def noise(self) -> list[str]:
        """The empty channels that are not constant: they show the noise of the camera."""
        found = [name for name, seen in zip(self.names, self.evidence, strict=False) if seen["noise"]]
        return [name for name in self.empty if name in found]

    def bounds(self, core: str | None = None) -> np.ndarray:
        """Lower and upper intensity (2, C) of a core."""
        return self.per_core.get(core or "", np.stack([self.lower, self.upper]))

    def inverse(self, target: torch.Tensor, core: str | None = None) -> torch.Tensor:
        """Targets (..., C, H, W) in [0, 1] back to stored values: the inverse of normalisation, except for clipping."""
        low, high = torch.from_numpy(self.bounds(core)).to(target)
        if self.transform == "log1p":
            target = torch.expm1(target * float(np.log1p(LOG_CURVATURE))) / LOG_CURVATURE
        return (low[:, None, None] + target * (high - low)[:, None, None]) * self.white

    def document(self) -> dict[str, Any]:
        """Content of normalization.json, plain Python values."""
        seen: list[dict[str, Any] | None] = [*self.evidence] or [None] * len(self.names)
        channels = [
            {
                "name": name,
                "lower": float(low),
                "upper": float(high),
                "empty": not high > low,
                "target_mean": float(mean),
                "evidence": evidence,
            }
            for name, low, high, mean, evidence in zip(
                self.names, self.lower, self.upper, self.target_mean, seen, strict=True
            )
        ]
        return {
            "schema": SCHEMA,
            "method": self.method,
            "transform": self.transform,
            "log_curvature": LOG_CURVATURE,
            "white": self.white,
            "unit": "stored value / white",
            "lower_quantile": LOWER_QUANTILE,
            "upper_quantile": UPPER_QUANTILE,
            "sampled_pixels": self.sampled_pixels,
            "sampled_cores": self.sampled_cores,
            "channels": channels,
            "cores": {name: bounds.tolist() for name, bounds in self.per_core.items()},
        }

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> Normalization:
        """Inverse of ``document``; raises InputError if the document is damaged."""
        try:
            channels = document["channels"]
            evidence = [channel.get("evidence") for channel in channels]
            return cls(
                names=tuple(str(channel["name"]) for channel in channels),
                lower=np.array([channel["lower"] for channel in channels], np.float64),
                upper=np.array([channel["upper"] for channel in channels], np.float64),
                target_mean=np.array([channel["target_mean"] for channel in channels], np.float64),
                white=float(document["white"]),
                method=str(document["method"]),
                transform=str(document["transform"]),
                per_core={str(name): np.array(bounds, np.float64) for name, bounds in document["cores"].items()},
                sampled_pixels=int(document["sampled_pixels"]),
                sampled_cores=int(document["sampled_cores"]),
                evidence=[dict(seen, noise=bool(seen["noise"])) for seen in evidence] if all(evidence) else [],
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"the normalisation is damaged or from another version ({error!r})") from None


def known_normalization(
    table: PairTable,
    scales: Scales,
    train: np.ndarray,
    method: str,
    transform: str,
    progress: Progress = no_progress,
    keep: Sequence[str] = (),
) -> Normalization:
    """The result of ``fit_normalization``, from the cache if the same files were measured before."""
    cores = range(len(table)) if method == "core" else train.tolist()
    asked = {
        "constants": [LOWER_QUANTILE, UPPER_QUANTILE, SAMPLED_PIXELS, SAMPLED_PIXELS_PER_CORE, SAMPLED_VALUES],
        "train": train.tolist(),
        "names": list(table.kept_names),
        "kept": list(table.kept_channels),
        "layout": table.orion["layout"].tolist(),
        "level": table.level,
        "panels": table.every_place,
        "white": scales.orion,
        "asked": [method, transform, LOG_CURVATURE, sorted(keep)],
    }
    name = fingerprint((table.path(core, "orion") for core in cores), "normalization", asked)
    document = recall(name)
    if document is not None:
        with suppress(InputError):
            return Normalization.from_document(document)
    fitted = fit_normalization(table, scales, train, method, transform, progress, keep)
    remember(name, fitted.document())
    return fitted


def fit_normalization(
    table: PairTable,
    scales: Scales,
    train: np.ndarray,
    method: str,
    transform: str,
    progress: Progress = no_progress,
    keep: Sequence[str] = (),
) -> Normalization:
    """Quantiles of the training cores, from rows of pixels drawn with a fixed seed.

    Rows, because a memory map reads a row in one piece in either axis order. The sample bounds the memory whatever the
    size of the data set. With method ``core``, every core is also measured separately, held-out cores included: that
    uses only the pixels of the core itself. Channels in which no training core shows more than the noise of the camera
    become empty, except those named in ``keep``; with method ``none``, whose bounds are fixed, none does. Cores
    in which a channel was not measured take no part in its numbers; with method ``core``, they get those of the data
    set.
    """
    names = table.kept_names
    kept = np.array(table.kept_channels)
    white = max(scales.orion[np.dtype(text).name] for text in set(table.orion["dtype"].tolist()))
    budget = min(SAMPLED_PIXELS, SAMPLED_VALUES // len(names))
    channels = range(len(names))
    counts = [_sample_size(table, core, budget // len(train)) for core in train.tolist()]
    ends = np.cumsum(counts).tolist()
    sample = np.empty((len(names), ends[-1]), np.float32)
    alone = range(len(table)) if method == "core" else ()
    step = progress(len(train) + len(alone), "measuring normalisation")

    def read(job: int) -> NoiseEvidence:
        rows = _rows(table, scales, int(train[job]), counts[job], kept)
        sample[:, ends[job] - counts[job] : ends[job]] = _thinned(rows, counts[job])
        present = table.measured_in(int(train[job]))
        evidence = look_for_noise(rows) if present.all() else look_for_noise(rows[present]).placed(present)
        step()
        return evidence

    def pooled(channel: int) -> np.ndarray:
        if table.measured is None:
            return sample[channel]
        parts = zip(table.measured[train, channel], ends, counts, strict=True)
        return np.concatenate(
            [sample[channel, :0], *(sample[channel, e - n : e] for present, e, n in parts if present)]
        )

    def measure(core: int) -> np.ndarray:
        pixels = _sample_size(table, core, SAMPLED_PIXELS_PER_CORE)
        own = _thinned(_rows(table, scales, core, pixels, kept), pixels)
        bounds = np.stack([_bounds(channel) for channel in own], axis=1)
        step()
        return bounds

    with ThreadPoolExecutor(max_workers=reading_threads(table.folder)) as pool:
        evidence = reduce(NoiseEvidence.joined, pool.map(read, range(len(train))))
        noise = evidence.noise & ~np.isin(names, list(keep)) & (method != "none")
        if method == "none":
            lower, upper = np.zeros(len(names)), np.ones(len(names))
        else:
            lower, upper = np.array(list(pool.map(lambda channel: _bounds(pooled(channel)), channels))).T
            for channel in np.flatnonzero(noise).tolist():
                lower[channel] = upper[channel] = np.median(pooled(channel))
        means = pool.map(lambda c: _target_mean(pooled(c), float(lower[c]), float(upper[c]), transform), channels)
        mean = np.array(list(means))
        found = list(pool.map(measure, alone))
    per_core = {str(table.names[core]): bounds for core, bounds in zip(alone, found, strict=True)}
    for core, bounds in zip(alone, found, strict=True):
        others = ~table.measured_in(core)
        bounds[:, others] = lower[others], upper[others]
        bounds[:, noise] = lower[noise]
    records = [evidence.record(channel) for channel in channels]
    return Normalization(names, lower, upper, mean, white, method, transform, per_core, ends[-1], len(train), records)


def _sample_size(table: PairTable, core: int, pixels: int) -> int:
    row = table.orion[core]
    return min(max(1, pixels), int(row["height"]) * int(row["width"]))


def _rows(table: PairTable, scales: Scales, core: int, pixels: int, kept: np.ndarray) -> np.ndarray:
    """Intensities (C, R, W) float32 of as many rows of a core as have so many pixels, one drawn from each stratum."""
    height, width, _ = table.shape(core, "orion")
    count = -(-pixels // width)
    edges = np.linspace(0, height, count + 1)
    drawn = counter_rng(SAMPLE_SEED, NORMALIZATION, core).random(count)
    rows = np.minimum((edges[:-1] + drawn * np.diff(edges)).astype(int), height - 1)
    stored = table.marker_rows(core, rows, kept.tolist())
    # In memory order of channels, whatever that of the file.
    values = np.ascontiguousarray(stored, dtype=np.float32)
    values /= np.float32(scales.white("orion", stored.dtype))
    return values


def _thinned(rows: np.ndarray, pixels: int) -> np.ndarray:
    """Pixels (C, pixels) of rows (C, R, W), evenly spaced along them."""
    values = rows.reshape(rows.shape[0], -1)
    return values[:, np.arange(pixels) * values.shape[1] // pixels]


def _target_mean(values: np.ndarray, low: float, high: float, transform: str) -> float:
    if not high > low or not values.size:
        return 0.0
    target = np.clip((values - np.float32(low)) / np.float32(high - low), 0, 1)
    if transform == "log1p":
        target = np.log1p(target * LOG_CURVATURE) / np.log1p(LOG_CURVATURE)
    return float(target.mean(dtype=np.float64))


def _bounds(values: np.ndarray) -> tuple[float, float]:
    """Lower and upper quantile.

    If both are equal, the upper one is taken over the pixels above them only, so that a rare marker on a constant
    background does not count as empty. Both are 0 where there are no values.
    """
    if not values.size:
        return 0.0, 0.0
    low, high = np.quantile(values, [LOWER_QUANTILE, UPPER_QUANTILE])
    if not high > low:
        positive = values[values > low]
        high = np.quantile(positive, UPPER_QUANTILE) if positive.size else low
    return float(low), float(high)
