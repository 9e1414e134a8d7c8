"""How strong should the stain and colour jitter in training be, for stains that training has not seen?

    python benchmarks/stain_shift.py --pairs DIR     # pairs with a groups.csv: places, patients or slides
    python benchmarks/stain_shift.py --quick         # seconds, on a few generated cores; its numbers mean nothing

For every seed a few groups are drawn, and the stable recipe trains on them with each --stain_augmentation, and once
with mixing as well: the mean and the standard deviation of a patch's haematoxylin and eosin move towards those of
another training core, by a random weight. Within a seed, all ways have the same cores, patches and batches.

The weights after the last step are scored on cores of all other groups, evenly spread: Pearson's r by marker over the
pixels of their centres, as they are and with generated stains. Nothing is chosen on them. The jitter separates stains
with the fixed vectors of Ruifrok and Johnston. The generated stains do not: each core's own vectors are estimated from
its pixels (Macenko et al., ISBI 2009), and then

- turned: both vectors by some degrees, each in optical density space towards a random colour;
- amounts: haematoxylin and eosin multiplied or divided by a factor, each at random;
- gains: red, green and blue multiplied or divided by a factor, each at random: exposure and white balance;
- all three at once.

The directions are drawn by seed and core, the same for every way and size.

The rule, set before the measurement. The default is the strength with the highest mean r over all shifts, among those
whose r without a shift is at most 0.01 below that of strength 1. It stays 1 unless the other strength gains at least
0.01 on average over the shifts, and something in every seed. Mixing becomes an option if it gains as much over that
default.

Finished trainings are kept in --output_dir/trials_full.json; the same command continues. --report trains nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from encoders import spread
from held_out import run_trials, sides, train_once, trials_parser

from orion_unet import load_model, predict
from orion_unet.cli.arguments import run_command
from orion_unet.correlation import moments, pearson
from orion_unet.data.loaders import BatchRequest, TrainingSamples
from orion_unet.data.patches import PatchPlace
from orion_unet.data.randomness import counter_rng
from orion_unet.data.scale import he_image
from orion_unet.data.stain import measure_stain
from orion_unet.data.transforms import STAIN_SCALE, STAIN_SHIFT
from orion_unet.errors import InputError
from orion_unet.registration.stains import optical_density

# Strength of the jitter of each way to train.
WAYS = {"none": 0.0, "1": 1.0, "2": 2.0, "3": 3.0, "1 and mixing": 1.0}
USUAL, MIXING = "1", "1 and mixing"
# By name: degrees that the stain vectors are turned by, factor of the amounts, factor of the gains.
AS_IT_IS = "as it is"
SHIFTS = {AS_IT_IS: (0.0, 1.0, 1.0)}
SHIFTS |= {f"turned, {degrees:g}°": (degrees, 1.0, 1.0) for degrees in (4.0, 8.0, 16.0)}
SHIFTS |= {f"amounts, {factor}": (0.0, factor, 1.0) for factor in (1.25, 1.5, 2.0)}
SHIFTS |= {f"gains, {factor}": (0.0, 1.0, factor) for factor in (1.05, 1.1, 1.2)}
SHIFTS |= {"all, small": (4.0, 1.25, 1.05), "all, middle": (8.0, 1.5, 1.1), "all, large": (16.0, 2.0, 1.2)}
# Of Macenko et al.: least optical density of tissue, here of base e and the mean over colours; percentile of angles.
LEAST_DENSITY, PERCENTILE = 0.15 * np.log(10), 1.0
# What a change may cost without a shift, and must gain over the shifts.
LOSS, GAIN = 0.01, 0.01
# Purpose of the random numbers of mixing; the trainer uses lower ones.
MIXED = 1000
# Epochs, base features, side and number of patches a core, batch; cores that are scored, and the side of their centres.
SIZES = {"full": (6, 8, 128, 8, 12, 35, 256), "quick": (1, 4, 32, 1, 2, 2, 64)}


def stain_vectors(optical: np.ndarray) -> np.ndarray:
    """Unit vectors (2, 3) of haematoxylin and eosin in optical densities (N, 3), as Macenko et al. find them."""
    tissue = optical[optical.mean(axis=1) > LEAST_DENSITY]
    if len(tissue) < 100:
        tissue = optical
    plane = np.linalg.eigh(np.cov(tissue.T))[1][:, :0:-1]
    plane *= np.where(plane.sum(axis=0) < 0, -1, 1)
    angles = np.arctan2(*(tissue @ plane).T[::-1])
    ends = np.percentile(angles, (PERCENTILE, 100 - PERCENTILE))
    vectors = unit(np.clip(np.stack([np.cos(ends), np.sin(ends)], axis=1) @ plane.T, 0, None))
    # Haematoxylin absorbs more red.
    return vectors[np.argsort(-vectors[:, 0])]


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors (..., 3) with length 1."""
    found: np.ndarray = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    return found


def shifted(he: np.ndarray, shift: tuple[float, float, float], seed: int, core: int) -> np.ndarray:
    """An H&E (H, W, 3) uint8 with another stain, uint8; ``shift`` as in ``SHIFTS``."""
    degrees, amount, gain = shift
    rng = np.random.default_rng((seed, core))
    colours = unit(np.abs(rng.normal(size=(2, 3))))
    up = rng.choice((-1.0, 1.0), size=5)
    optical = optical_density(he.reshape(-1, 3) / 255)
    vectors = stain_vectors(optical)
    residual = unit(np.cross(*vectors))
    towards = unit(colours - (colours * vectors).sum(axis=1, keepdims=True) * vectors)
    turned = np.cos(np.deg2rad(degrees)) * vectors + np.sin(np.deg2rad(degrees)) * towards
    amounts = optical @ np.linalg.inv(np.stack([*vectors, residual]))
    amounts[:, :2] *= amount ** up[:2]
    light = np.exp(-amounts @ np.stack([*unit(np.clip(turned, 0, None)), residual])) * gain ** up[2:]
    return np.rint(255 * light.clip(0, 1)).astype(np.uint8).reshape(he.shape)


@contextmanager
def mixing() -> Iterator[None]:
    """Give every training patch some of another core's stain, before its jitter.

    Mean and standard deviation of the densities of haematoxylin and eosin move from those of the patch's core towards
    those of a random training core, by a weight in [0, 1]. All is drawn by seed, epoch and sample.
    """
    original = TrainingSamples.places
    stains: dict[int, np.ndarray] = {}

    def changed(self: TrainingSamples, request: BatchRequest) -> list[PatchPlace]:
        if not stains:
            for core in self.cores.tolist():
                found = measure_stain(he_image(self.reader.table, self.reader.scales, core))
                if found is not None:
                    # Means and standard deviations by stain: (2, 2).
                    stains[core] = np.exp(found[:4]).reshape(2, 2)
        return [
            mixed(place, stains, counter_rng(self.seed, MIXED, request.epoch, index))
            for place, index in zip(original(self, request), request.indices.tolist(), strict=True)
        ]

    TrainingSamples.places = changed  # type: ignore[method-assign]
    try:
        yield
    finally:
        TrainingSamples.places = original  # type: ignore[method-assign]


def mixed(place: PatchPlace, stains: dict[int, np.ndarray], rng: np.random.Generator) -> PatchPlace:
    """The patch with the change of its densities, d -> scale d + offset, applied before its own jitter."""
    weight, other = rng.random(), stains[list(stains)[rng.integers(len(stains))]]
    if place.core not in stains:
        return place
    own = stains[place.core]
    (mean, sd), (own_mean, own_sd) = ((1 - weight) * own + weight * other).T, own.T
    scale = sd / own_sd
    colour = np.array(place.colour)
    factor = 1 + STAIN_SCALE * colour[:2]
    colour[:2] = (factor * scale - 1) / STAIN_SCALE
    colour[3:5] += factor * (mean - scale * own_mean) / STAIN_SHIFT
    return replace(place, colour=tuple(colour.tolist()))


def trial(sizes: tuple[int, ...], pairs: Path, seed: int, way: str, training: int, run: Path) -> dict[str, Any]:
    """Train once and score the held-out cores: sums for r by shift and marker."""
    epochs, base, patch, patches, batch, count, side = sizes
    numbers = {
        "epochs": epochs, "base_features": base, "patch_size": patch, "patches_per_image": patches, "batch_size": batch,
        "stain_augmentation": WAYS[way],
    }  # fmt: skip
    cores = sides(pairs, seed, training)
    with mixing() if way == MIXING else nullcontext():
        train_once(pairs, seed, cores, run, numbers)
    model = load_model(run / "run" / "checkpoints" / "last.pt", device="cpu")
    held_out = cores[1]
    # Sorted by name, so that every group has its share.
    scored = [held_out[at] for at in np.unique(np.linspace(0, len(held_out) - 1, count).round().astype(int))]
    sums = {shift: np.zeros((6, len(model.names))) for shift in SHIFTS}
    for core, name in enumerate(scored):
        he, measured = (np.load(pairs / f"{name}_{kind}.npy", mmap_mode="r") for kind in ("HE", "ORION"))
        measured = measured if measured.shape[0] == len(model.names) else np.moveaxis(measured, -1, 0)
        top, left = ((length - min(side, length)) // 2 for length in he.shape[:2])
        centre = np.ascontiguousarray(he[top : top + side, left : left + side])
        expected = measured[:, top : top + side, left : left + side].reshape(len(measured), -1)
        for shift, of_it in SHIFTS.items():
            found = predict(centre if shift == AS_IT_IS else shifted(centre, of_it, seed, core), model)
            sums[shift] += moments(found.reshape(len(found), -1), expected)
    return {"markers": list(model.names), "sums": {shift: each.tolist() for shift, each in sums.items()}}


def report(trials: dict[str, Any], ways: list[str]) -> str:
    """The tables over the seeds for which every way is finished."""
    seeds = sorted({int(key.split()[0]) for key in trials})
    complete = [seed for seed in seeds if all(f"{seed} {way}" in trials for way in ways)]
    if not complete:
        return "No seed is finished in every way."
    names = trials[f"{complete[0]} {USUAL}"]["markers"]
    # (seeds, shifts, markers), the H&E as it is first.
    r = {
        way: np.stack([
            [pearson(np.array(trials[f"{seed} {way}"]["sums"][shift])) for shift in SHIFTS] for seed in complete
        ])
        for way in ways
    }  # fmt: skip
    lines = ["## Pearson against shift, mean over markers and seeds", ""]
    lines += ["| H&E | " + " | ".join(ways) + " |", "| --- " * (len(ways) + 1) + "|"]
    for row, shift in enumerate(SHIFTS):
        cells = [f"{np.nanmean(r[way][:, row]):.3f}" for way in ways]
        lines.append(f"| {shift} | " + " | ".join(cells) + " |")
    plain = {way: np.nanmean(r[way][:, 0], axis=1) for way in ways}
    over = {way: np.nanmean(r[way][:, 1:], axis=(1, 2)) for way in ways}
    for title, found, rows in (("Without a shift", plain, slice(0, 1)), ("Over all shifts", over, slice(1, None))):
        lines += ["", f"## {title}", "", "| way | " + " | ".join([*names, "mean", "by seed", "against 1"]) + " |"]
        lines += ["| --- " * (len(names) + 4) + "|"]
        for way in ways:
            cells = [f"{r[way][:, rows, marker].mean():.3f}" for marker in range(len(names))]
            cells += [f"{found[way].mean():.3f}", ", ".join(f"{value:.3f}" for value in found[way])]
            cells.append("" if way == USUAL else spread(found[way] - found[USUAL]))
            lines.append(f"| {way} | " + " | ".join(cells) + " |")
    lines += ["", f"Seeds {', '.join(map(str, complete))}.", "", verdict(plain, over)]
    return "\n".join(lines)


def verdict(plain: dict[str, np.ndarray], over: dict[str, np.ndarray]) -> str:
    """What the rule says, given r by seed without a shift and over all shifts."""

    def gains(way: str, other: str) -> bool:
        gain = over[way] - over[other]
        return bool(gain.mean() >= GAIN and (gain > 0).all())

    possible = [way for way in plain if plain[way].mean() >= plain[USUAL].mean() - LOSS]
    best = max((way for way in possible if way != MIXING), key=lambda way: over[way].mean())
    default = best if gains(best, USUAL) else USUAL
    found = f"By the rule, the default is strength {WAYS[default]:g}"
    if MIXING not in plain:
        return f"{found}."
    earned = MIXING in possible and gains(MIXING, default)
    return f"{found}, and mixing {'becomes' if earned else 'does not become'} an option."


def main(argv: list[str]) -> int:
    parser = trials_parser(__doc__, "stain_shift")
    parser.add_argument("--epochs", type=int, metavar="N", help=f"as of the trainer; default: {SIZES['full'][0]}")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY",
                        help=f"of {', '.join(WAYS)}; {USUAL} must be among them; default: all")  # fmt: skip
    options = parser.parse_args(argv)
    if USUAL not in options.ways:
        raise InputError(f"--ways: {USUAL} is missing, which the others are compared with")
    epochs, *rest = SIZES["quick" if options.quick else "full"]
    sizes = (options.epochs or epochs, *rest)
    print(report(run_trials(options, options.ways, {"sizes": sizes}, partial(trial, sizes)), options.ways))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
