"""Can the warnings that come with a prediction be believed: foreign stains, verdicts, intervals per pixel?

    python benchmarks/trust.py                                # half an hour
    python benchmarks/trust.py --quick                        # seconds; its numbers mean nothing, it tests that it runs
    python benchmarks/trust.py --pairs_dir DIR [--run RUN]    # the same questions on other pairs, without training

Generated tissue, two cores a patient; some patients train, the others are held out. Three models of other seeds are
trained on the same cores.

- stain: H&Es are blurred, darkened, and stained weaker, stronger or in other colours. For each kind of shift, the
  strength is found at which the mean correlation of the markers has lost a tenth. At that strength: area under the ROC
  of the distance, shifted against unshifted held-out cores, and the share that is warned of. Beside it, how often cores
  of further patients are warned of, and what fewer training patients change.
- verdicts: how many markers get the same verdict from every seed.
- coverage: split conformal intervals of 90 %, calibrated on half of the held-out patients, on the others.

With ``--pairs_dir``: how often the stain of pairs is called foreign to their own groups, or of a group to all others;
with ``--run`` also what shifts cost that model, and the coverage on its held-out groups. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from sklearn.metrics import roc_auc_score

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from orion_unet.cli.arguments import Parser, run_command
from orion_unet.config import DataOptions, TrainConfig
from orion_unet.data.pairs import find_pairs
from orion_unet.data.scale import he_image, measure_scales
from orion_unet.data.split import core_groups
from orion_unet.data.stain import OUTSIDE, StainProfile, measure_stain
from orion_unet.demo.make import CORES_PER_PATIENT, draw_core, make_demo
from orion_unet.evaluation.baselines import find_baselines
from orion_unet.evaluation.gathering import GatheredCores
from orion_unet.evaluation.scorecard import trust_of
from orion_unet.evaluation.scored_folder import FolderOptions, ScoredFolder, open_folder
from orion_unet.evaluation.scores import POSITIVE_THRESHOLD, sampled_share
from orion_unet.inference.model import load_trained
from orion_unet.inference.predict import predict
from orion_unet.intervals import leave_one_out, why_no_interval
from orion_unet.metrics import MarkerSums
from orion_unet.recipes import find_recipe
from orion_unet.registration.stains import STAINS, optical_density
from orion_unet.slides.images import ArrayImage
from orion_unet.training.loop import train

Sizes = dict[str, Any]
# Partitions of the held-out groups into calibration and test.
PARTITIONS = 40
USUAL: Sizes = {
    "train": 24, "held": 16, "fresh": 40, "side": 192, "seeds": 3, "scored": 8, "groups": (4, 6, 8, 12, 24),
    "draws": 20, "shifts": 10, "partitions": PARTITIONS,
}  # fmt: skip
QUICK: Sizes = {
    "train": 4, "held": 2, "fresh": 2, "side": 64, "seeds": 2, "scored": 1, "groups": (4,), "draws": 1, "shifts": 1,
    "partitions": 1,
}  # fmt: skip
SMALL: dict[str, Any] = {
    **find_recipe("stable").values, "patch_size": 96, "patches_per_image": 4, "patches_per_image_val": 1,
    "batch_size": 8, "base_features": 8, "depth": 3, "epochs": 8, "num_workers": 0, "gpus": 0, "sanity_check_freq": 0,
}  # fmt: skip
TINY: dict[str, Any] = {
    **SMALL, "patch_size": 32, "base_features": 4, "depth": 2, "epochs": 1, "patches_per_image": 2, "batch_size": 4,
    "warmup_epochs": 0.0,
}  # fmt: skip

VECTORS = np.array(STAINS) / np.linalg.norm(STAINS, axis=1, keepdims=True)
# A tenth of the correlation.
COST = 0.9
# Coverage that is aimed at; cores that are predicted of each group at most, and pixels sampled of each; bins of the
# prediction with intervals of their own.
LEVEL, CORES, PIXELS, BINS = 0.9, 8, 4000, 20


def turned(degrees: float) -> Callable[[np.ndarray], np.ndarray]:
    """The colours of all stains turned around grey."""
    axis = np.ones(3) / np.sqrt(3)
    cross = np.cross(np.eye(3), -axis)
    angle = np.deg2rad(degrees)
    rotation = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    mix = np.linalg.inv(VECTORS) @ np.clip(VECTORS @ rotation.T, 0, None)
    return lambda he: np.exp(-np.clip(optical_density(he) @ mix, 0, None))


def stained(haematoxylin: float, eosin: float) -> Callable[[np.ndarray], np.ndarray]:
    """The densities of haematoxylin and eosin multiplied."""
    mix = np.linalg.inv(VECTORS) @ np.diag([haematoxylin, eosin, 1.0]) @ VECTORS
    return lambda he: np.exp(-np.clip(optical_density(he) @ mix, 0, None))


# By kind: the shift of an H&E (H, W, 3) in [0, 1] at a strength, and strengths to try, the first of which is none.
SHIFTS: dict[str, tuple[Callable[[float], Callable[[np.ndarray], np.ndarray]], tuple[float, ...]]] = {
    "colours turned to red [degrees]": (turned, (0, 4, 8, 12, 16)),
    "colours turned to blue [degrees]": (lambda s: turned(-s), (0, 4, 8, 12, 16)),
    "haematoxylin weaker [factor]": (lambda s: stained(s, 1), (1, 0.7, 0.5, 0.35, 0.25)),
    "haematoxylin stronger [factor]": (lambda s: stained(s, 1), (1, 1.5, 2, 2.7, 3.5)),
    "eosin weaker [factor]": (lambda s: stained(1, s), (1, 0.6, 0.4, 0.2, 0.1)),
    "eosin stronger [factor]": (lambda s: stained(1, s), (1, 1.5, 2, 2.5, 3)),
    "both weaker [factor]": (lambda s: stained(s, s), (1, 0.7, 0.5, 0.35, 0.25)),
    "darker [factor]": (lambda s: lambda he: he * s, (1, 0.9, 0.8, 0.7, 0.6)),
    "gamma [exponent]": (lambda s: lambda he: he**s, (1, 1.4, 1.8, 2.2, 2.6)),
    "blur [sigma, pixels]": (lambda s: lambda he: gaussian_filter(he, (s, s, 0)), (0, 0.4, 0.6, 0.8, 1)),
}


def shifted(he: np.ndarray, kind: str, strength: float) -> np.ndarray:
    """An H&E (H, W, 3) uint8 with a shift."""
    found = SHIFTS[kind][0](strength)(he.astype(np.float32) / 255)
    return np.rint(np.clip(found, 0, 1) * 255).astype(np.uint8)


def stain_of(he: np.ndarray) -> np.ndarray | None:
    """The features of an H&E in memory."""
    return measure_stain(ArrayImage(Path("he"), lambda: he))


def main(argv: list[str]) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny, to test the benchmark itself")
    parser.add_argument("--pairs_dir", type=Path, help="pairs with groups.csv, instead of generated ones")
    parser.add_argument(
        "--foreign", type=Path, help="with --pairs_dir: pairs of another stain, which should be warned of"
    )
    parser.add_argument("--run", type=Path, help="with --pairs_dir: a run trained on them, for the coverage")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if options.pairs_dir is not None:
        run = None
        if options.run is not None:
            run = open_folder(load_trained(options.run, "cpu"), options.pairs_dir, FolderOptions())
        report_pairs(options.pairs_dir, options.foreign, run)
        if run is not None:
            report_coverage([run])
        return 0
    sizes, training = (QUICK, TINY) if options.quick else (USUAL, SMALL)
    with tempfile.TemporaryDirectory(prefix="trust_") as scratch:
        folders = fit(Path(scratch), sizes, training)
        print(
            f"{os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}, one thread\n"
            f"{sizes['train']} training and {sizes['held']} held-out patients with {CORES_PER_PATIENT} cores of "
            f"{sizes['side']} pixels each, {training['epochs']} epochs, {sizes['seeds']} seeds"
        )
        report_stain(folders, sizes)
        report_verdicts(folders)
        report_coverage(folders, sizes["partitions"])
    return 0


def fit(scratch: Path, sizes: Sizes, training: dict[str, Any]) -> list[ScoredFolder]:
    """The pairs as the models of several seeds see them, all trained on the same patients."""
    pairs = scratch / "pairs"
    names = make_demo(pairs, CORES_PER_PATIENT * (sizes["train"] + sizes["held"]), sizes["side"])
    rows = [{"core": name, "group": f"patient_{at // CORES_PER_PATIENT:02d}"} for at, name in enumerate(names)]
    first = CORES_PER_PATIENT * sizes["train"]
    split = scratch / "split.json"
    split.write_text(json.dumps({"schema": 1, "train": rows[:first], "val": rows[first:]}))
    folders = []
    for seed in range(sizes["seeds"]):
        run = scratch / f"run_{seed}"
        given = {"pairs_dir": str(pairs), "output_dir": str(run), "split_file": str(split), "seed": seed}
        if train(TrainConfig.from_options({**training, **given})) != 0:
            raise RuntimeError(f"seed {seed} has not finished")
        folders.append(open_folder(load_trained(run, "cpu"), pairs, FolderOptions()))
    return folders


@dataclass(frozen=True)
class Judged:
    """A model, and the measured markers (C, H, W) of some cores."""

    folder: ScoredFolder
    measured: list[torch.Tensor]

    def correlation(self, images: Sequence[np.ndarray]) -> float:
        """Mean over the markers of Pearson's r over the pixels of all cores, predicted from these H&Es."""
        sums = MarkerSums(len(self.folder.names), self.folder.model.device)
        for he, measured in zip(images, self.measured, strict=True):
            predicted = torch.from_numpy(predict(he, self.folder.model, normalized=True))
            sums.update(predicted[None], measured[None])
        _, markers = sums.compute(self.folder.names)
        return float(np.nanmean(np.array([markers[name]["pearson"] for name in self.folder.names], np.float64)))


def strength_of_cost(models: Sequence[Judged], he: Sequence[np.ndarray], kind: str) -> tuple[float, float]:
    """The strength at which a tenth of the correlation is lost, in the mean over models, and the share left there.

    The strongest one tried, where none loses so much.
    """
    strengths = SHIFTS[kind][1]
    usual = np.mean([model.correlation(he) for model in models])
    before, left = strengths[0], 1.0
    for strength in strengths[1:]:
        images = [shifted(image, kind, strength) for image in he]
        share = float(np.mean([model.correlation(images) for model in models]) / usual)
        if share <= COST:
            return float(np.interp(COST, [share, left], [strength, before])), COST
        before, left = strength, share
    return before, left


def report_stain(folders: Sequence[ScoredFolder], sizes: Sizes) -> None:
    folder = folders[0]
    profile = folder.model.stain
    assert profile is not None
    held = folder.known.val.tolist()
    images = [np.asarray(folder.table.open(core, "he")) for core in held]
    fresh = [draw_core(10_000 + at, sizes["side"], patient=20_000 + at)[0] for at in range(sizes["fresh"])]
    usual, others = (_features(part) for part in (images, fresh))
    scored = held[:: max(1, len(held) // sizes["scored"])]
    models = [Judged(folder, [folder.region(core).measured for core in scored]) for folder in folders]
    some = [images[held.index(core)] for core in scored]
    costs = {kind: strength_of_cost(models, some, kind) for kind in list(SHIFTS)[-sizes["shifts"] :]}
    moved = {kind: _features([shifted(he, kind, cost[0]) for he in images]) for kind, cost in costs.items()}
    base = _distances(profile, usual)
    alarms = [_share(values, profile) for values in (base, _distances(profile, others))]
    print(f"\n## Foreign stains\n\nLimit {profile.limit:.2f}. Warned of without a shift: {alarms[0]} held-out cores,")
    print(f"{alarms[1]} cores of further patients.\n")
    print("| shift | strength | correlation left | AUROC | warned of |\n| --- | --- | --- | --- | --- |")
    for kind, (strength, left) in costs.items():
        found = _distances(profile, moved[kind])
        print(f"| {kind} | {strength:.2f} | {left:.2f} | {_auroc(base, found):.3f} | {_share(found, profile)} |")
    print("\n| training patients | limit | warned of, no shift | mean AUROC | lowest | warned of, shifts |")
    print(f"|{' --- |' * 6}")
    rng = np.random.default_rng(0)
    for count in sizes["groups"]:
        rows = []
        for _ in range(1 if count == sizes["train"] else sizes["draws"]):
            part = _subset(profile, count, rng)
            near = np.concatenate([_distances(part, usual), _distances(part, others)])
            far = [_distances(part, values) for values in moved.values()]
            aurocs = [_auroc(near, found) for found in far]
            rows.append([part.limit, (near > part.limit).mean(), *aurocs, (np.concatenate(far) > part.limit).mean()])
        mean = np.mean(rows, axis=0)
        limit = np.median([row[0] for row in rows])
        print(f"| {count} | {limit:.1f} | {100 * mean[1]:.1f} % | {mean[2:-1].mean():.3f} "
              f"| {mean[2:-1].min():.3f} | {100 * mean[-1]:.0f} % |")  # fmt: skip
    large = np.tile(images[0], (2048 // sizes["side"] + 1,) * 2 + (1,))[:2048, :2048]
    look, work = _seconds(lambda: stain_of(large)), _seconds(lambda: predict(large[:512, :512], folder.model))
    print(f"\nThe look at 2048 x 2048 pixels takes {look:.2f} s, their prediction about {16 * work:.0f} s.")


def _features(images: Sequence[np.ndarray]) -> np.ndarray:
    found = [stain_of(he) for he in images]
    return np.array([values for values in found if values is not None])


def _distances(profile: StainProfile, values: np.ndarray) -> np.ndarray:
    return np.array([profile.judge(row).distance for row in values])


def _share(distances: np.ndarray, profile: StainProfile) -> str:
    return f"{(distances > profile.limit).sum()} of {len(distances)}"


def _auroc(usual: np.ndarray, moved: np.ndarray) -> float:
    truth = np.repeat([0, 1], [len(usual), len(moved)])
    scores = np.concatenate([usual, moved])
    return float(roc_auc_score(truth, scores)) if np.isfinite(scores).all() else float("nan")


def _subset(profile: StainProfile, count: int, rng: np.random.Generator) -> StainProfile:
    kept = set(rng.permutation(sorted(set(profile.groups)))[:count].tolist())
    rows = [at for at, group in enumerate(profile.groups) if group in kept]
    return StainProfile(profile.values[rows], tuple(profile.groups[at] for at in rows))


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def report_verdicts(folders: Sequence[ScoredFolder]) -> None:
    found = []
    for folder in folders:
        cores = folder.known.val.tolist()
        groups = [folder.known.groups[core] for core in cores]
        share = sampled_share(sum(h * w for h, w in map(folder.size, cores)), len(folder.names))
        gathered = GatheredCores(np.full(len(folder.names), POSITIVE_THRESHOLD), share)
        baselines = find_baselines(folder)
        for core in cores:
            gathered.add(core, folder.region(core), baselines)
        left_out = None if why_no_interval(groups, folder.grouped) else leave_one_out(groups)
        found.append(trust_of(gathered.card(folder.names, left_out)))
    names = folders[0].names
    same = [name for name in names if len({trust[name].verdict for trust in found}) == 1]
    print(f"\n## Verdicts\n\nThe same from every seed for {len(same)} of {len(names)} markers.\n")
    print(f"| marker | {' | '.join(f'seed {seed}' for seed in range(len(found)))} |\n|{' --- |' * (len(found) + 1)}")
    for name in names:
        print(f"| {name} | {' | '.join(f'{trust[name].verdict} ({trust[name].low:.2f})' for trust in found)} |")


def report_coverage(folders: Sequence[ScoredFolder], partitions: int = PARTITIONS) -> None:
    """Coverage of intervals per pixel over random partitions of the held-out groups, and over models."""
    methods = {"one width": 1, f"by {BINS} bins of the prediction": BINS}
    rows: dict[str, list[np.ndarray]] = {name: [] for name in methods}
    bright: dict[str, list[np.ndarray]] = {name: [] for name in methods}
    single: dict[str, list[np.ndarray]] = {name: [] for name in methods}
    for folder in folders:
        predicted, measured, unit = _sample(folder)
        rng = np.random.default_rng(0)
        units = np.unique(unit)
        for _ in range(partitions):
            calibration = np.isin(unit, rng.permutation(units)[: len(units) // 2])
            for name, bins in methods.items():
                covered = np.stack(
                    [_covered(p, t, calibration, bins) for p, t in zip(predicted, measured, strict=True)]
                ).astype(float)
                test = ~calibration
                rows[name].append(covered[:, test].mean(axis=1))
                high = measured[:, test] > 0.5
                counts = high.sum(axis=1)
                shares = np.divide(
                    (covered[:, test] * high).sum(axis=1), counts, out=np.full(len(counts), np.nan), where=counts > 0
                )
                bright[name].append(shares)
                tested = sorted(set(unit[test].tolist()))
                single[name] += [covered[:, unit == one].mean(axis=1) for one in tested]
    count = len({group for _, group in _scored(folders[0])})
    print(f"\n## Coverage of intervals of 90 %\n\n{count} held-out groups, half of them for calibration, "
          f"{partitions} partitions, {len(folders)} models. Empty markers are left out.\n")  # fmt: skip
    print("| intervals | mean | lowest and highest marker | marker and partition within 90 ± 3 | single groups, 5 to "
          "95 % | pixels above half of the range |")  # fmt: skip
    print(f"|{' --- |' * 6}")
    for name in methods:
        found = 100 * np.array(rows[name])
        markers = found.mean(axis=0)
        within = (np.abs(found - 90) <= 3).mean()
        spread = np.percentile(100 * np.array(single[name]), [5, 95])
        print(f"| {name} | {found.mean():.1f} | {markers.min():.1f}, {markers.max():.1f} | {100 * within:.0f} % "
              f"| {spread[0]:.0f}, {spread[1]:.0f} | {100 * np.nanmean(np.array(bright[name])):.0f} |")  # fmt: skip


def _scored(folder: ScoredFolder) -> list[tuple[int, str]]:
    """Held-out cores and their groups, of each group up to CORES."""
    found: dict[str, list[int]] = {}
    for core in folder.known.val.tolist():
        found.setdefault(folder.known.groups[core], []).append(core)
    return [(core, group) for group, cores in found.items() for core in cores[:CORES]]


def _sample(folder: ScoredFolder) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predicted and measured values (C, n) of pixels of the held-out cores, and the group (n,) of each pixel."""
    rng = np.random.default_rng(0)
    parts: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    unit: list[str] = []
    for core, group in _scored(folder):
        region = folder.region(core)
        pixels = rng.permutation(region.measured[0].numel())[:PIXELS]
        for part, image in zip(parts, (region.predicted, region.measured), strict=True):
            part.append(image.flatten(1)[:, pixels].cpu().numpy())
        unit += [group] * len(pixels)
    predicted, measured = (np.concatenate(part, axis=1) for part in parts)
    shown = np.ptp(measured, axis=1) > 0
    return predicted[shown], measured[shown], np.array(unit)


def _covered(predicted: np.ndarray, measured: np.ndarray, calibration: np.ndarray, bins: int) -> np.ndarray:
    """Whether the interval of each pixel (n,) covers what was measured, from the errors of the calibration pixels.

    With one bin, the interval is as wide to both sides (Papadopoulos et al., 2002). With more, each bin of the
    prediction has the lower and upper quantile of its own errors, as in Mondrian conformal prediction (Vovk et al.,
    2005).
    """
    error = measured - predicted
    if bins == 1:
        width = np.quantile(np.abs(error[calibration]), LEVEL)
        return np.asarray(np.abs(error) <= width)
    edges = np.quantile(predicted[calibration], np.arange(1, bins) / bins)
    place = np.searchsorted(edges, predicted)
    low, high = np.zeros(bins), np.zeros(bins)
    for one in range(bins):
        own = error[calibration & (place == one)]
        if len(own):
            low[one], high[one] = np.quantile(own, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    # Nothing is below 0 or above 1, so the ends of the interval may be moved there.
    lower, upper = (np.clip(predicted + end[place], 0, 1) for end in (low, high))
    return np.asarray((lower <= measured) & (measured <= upper))


def report_pairs(folder: Path, foreign: Path | None, run: ScoredFolder | None) -> None:
    """How often pairs of a folder are called foreign to others of it, and those of another folder to it; with ``run``
    also which correlation is left to it, on one core of each of its held-out groups."""
    table = find_pairs(DataOptions(pairs_dir=str(folder), patch_size=16))
    images = list(_images(folder))
    found = [stain_of(he) for he in images]
    kept = np.array([at for at, values in enumerate(found) if values is not None])
    values, groups = np.array([found[at] for at in kept]), np.array(core_groups(table, None))[kept]
    print(f"## Foreign stains: {len(table)} pairs of {len(set(groups))} groups, {len(kept)} with enough tissue\n")
    print("| held out | judged | warned of | median limit |\n| --- | --- | --- | --- |")
    for name, parts in (
        ("a fifth of the pairs of every group", list(_fifths(groups))),
        ("a whole group", list(_groups(groups))),
    ):
        judged = alarms = 0
        limits = []
        for held in parts:
            profile = StainProfile(values[~held], tuple(groups[~held]))
            limits.append(profile.limit)
            states = [profile.judge(row).state for row in values[held]]
            judged, alarms = judged + len(states), alarms + states.count(OUTSIDE)
        print(f"| {name} | {judged} | {alarms} ({100 * alarms / judged:.1f} %) | {np.median(limits):.1f} |")
    full = StainProfile(values, tuple(groups))
    cores = {} if run is None else {group: core for core, group in _scored(run)}
    model = None if run is None else Judged(run, [run.region(core).measured for core in cores.values()])
    some = [images[core] for core in cores.values()]
    usual = np.nan if model is None else model.correlation(some)
    print("\n| shift | correlation left | AUROC | warned of |\n| --- | --- | --- | --- |")
    near = np.array([full.judge(row).distance for row in values])
    for kind, (_, strengths) in SHIFTS.items():
        far = _distances(full, _features([shifted(images[at], kind, strengths[2]) for at in kept[::5]]))
        left = np.nan
        if model is not None:
            left = model.correlation([shifted(he, kind, strengths[2]) for he in some]) / usual
        print(f"| {kind}, {strengths[2]} | {left:.2f} | {_auroc(near, far):.3f} | {_share(far, full)} |")

    if foreign is not None:
        far = _distances(full, _features(list(_images(foreign))))
        print(f"| pairs of {foreign.name} | | {_auroc(near, far):.3f} | {_share(far, full)} |")


def _images(folder: Path) -> Iterator[np.ndarray]:
    """The H&Es (H, W, 3) uint8 of a folder of pairs."""
    table = find_pairs(DataOptions(pairs_dir=str(folder), patch_size=16))
    scales = measure_scales(table, False)
    for core in range(len(table)):
        image = he_image(table, scales, core)
        yield np.rint(255 * image.read(0, 0, *image.shape)).astype(np.uint8)


def _fifths(groups: np.ndarray) -> Iterator[np.ndarray]:
    order = np.random.default_rng(0).permutation(len(groups))
    for part in range(5):
        yield order % 5 == part


def _groups(groups: np.ndarray) -> Iterator[np.ndarray]:
    for group in sorted(set(groups.tolist())):
        yield groups == group


if __name__ == "__main__":
    sys.exit(run_command(main))
