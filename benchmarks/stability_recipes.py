"""The sets and the named recipes that the stability benchmark trains.

``former`` is the unstable recipe that the toolkit's users had, ``published`` the recipe that the toolkit started from,
and ``stable`` its default: ``published`` with the changes that won (``orion_unet/recipes.py``). Every recipe here is a
set of changes to ``published``: of options, and of code where no option exists (``stability_job.CHANGES``).
"""

from __future__ import annotations

import math
import re
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from orion_unet.demo.make import make_demo
from orion_unet.recipes import RECIPES
from orion_unet.run_log import write_json

PUBLISHED: dict[str, Any] = RECIPES["published"].values
# Changes of published that make the stable recipe.
STABLE: dict[str, Any] = {name: found.value for name, found in RECIPES["stable"].own.items()}
# The former recipe, by the change of published that each value undoes.
FORMER_CHANGES: dict[str, dict[str, Any]] = {
    "learning rate 1e-4": {"learning_rate": 5e-4},
    "batch of 12": {"batch_size": 8},
    "a fifth held out": {"val_split": 0.15},
    "30 epochs": {"epochs": 20},
    "no focal term": {"focal_weight": 0.1},
    "gentle variance term": {"variance_weight": 0.5, "variance_form": "exponential"},
    "plateau 0.5 / 5": {"lr_factor": 0.7, "lr_patience": 3},
    "initialisation": {"output_start": "half", "changes": ("default initialisation",)},
}
HEXIF = ("geometry of the H&E alone", "normalisation of each patch", "loss in the centre")
# Small enough for hundreds of trainings on two cores.
SMALL: dict[str, Any] = {
    "base_features": 8, "depth": 3, "patch_size": 64, "num_workers": 0, "gpus": 0, "sanity_check_freq": 0,
    "overwrite": True,
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """A named recipe: options that replace those of PUBLISHED, and changes of code."""

    name: str
    group: str
    options: dict[str, Any] = field(default_factory=dict)
    changes: tuple[str, ...] = ()

    @property
    def seeds(self) -> float:
        """Largest number of seeds it is trained with."""
        return {
            "peer": 3, "pix2pix": 3, "peer network": 3, "statistics": 2, "ablation": 2, "improvement": 2,
            "variation": 2, "handling": 2, "advice": 1,
        }.get(self.group, math.inf)  # fmt: skip


def _recipe(name: str, group: str, *changes: dict[str, Any], **options: Any) -> Recipe:
    merged = {key: value for change in (*changes, options) for key, value in change.items()}
    return Recipe(name, group, merged, tuple(merged.pop("changes", ())))


def recipes() -> list[Recipe]:
    """Every recipe, in the order of the tables."""
    former = list(FORMER_CHANGES.values())
    found = [_recipe("former", "main", *former), _recipe("published", "main")]
    for name, change in FORMER_CHANGES.items():
        found.append(_recipe(f"former, {name}", "ablation", *(other for other in former if other is not change)))
    found += [_recipe(f"published, {name}", "improvement", options) for name, options in IMPROVEMENTS.items()]
    found.append(_recipe("stable", "stable", STABLE))
    found += [
        _recipe(f"{name}, measured statistics", "bare", BARE, rate, MEASURED) for name, rate in BARE_RATES.items()
    ]
    found.append(_recipe("stable, best by Pearson", "best epoch", STABLE, best_by="pearson"))
    found.append(_recipe("stable, running averages", "statistics", STABLE, AVERAGED))
    found.append(_recipe("former, measured statistics", "statistics", *former, MEASURED))
    found.append(_recipe("published, measured statistics", "statistics", MEASURED))
    for name, rate in BARE_RATES.items():
        found.append(_recipe(f"{name}, running averages", "statistics", BARE, rate, AVERAGED))
    found += [_recipe(f"stable, {name}", "variation", STABLE, options) for name, options in VARIATIONS.items()]
    found.append(_recipe("BasicUNet, MSE, Adam", "peer", PEER))
    found.append(_recipe("pix2pix's U-Net, L1, Adam", "pix2pix", PIX2PIX))
    found += [_recipe(f"{name}, recipe of stable", "peer network", STABLE, changes=(name,)) for name in NETWORKS]
    found += [_recipe(f"stable, {change}", "handling", STABLE, changes=(change,)) for change in HEXIF]
    found.append(_recipe("stable, all three", "handling", STABLE, changes=HEXIF))
    for base, changes in ADVICE.items():
        before = {"former": former, "published": [], "stable": [STABLE]}[base]
        found += [_recipe(f"{base}, {name}", "advice", *before, options) for name, options in changes.items()]
    return found


AVERAGED: dict[str, Any] = {"statistics_batches": 0}
MEASURED: dict[str, Any] = {"statistics_batches": 16}
# A plain training in small batches: no warm-up, no schedule, no averaged weights.
BARE: dict[str, Any] = {"scheduler": "constant", "batch_size": 4, "early_stopping_patience": 0}
BARE_RATES = {f"constant rate {rate}": {"learning_rate": float(rate)} for rate in ("1e-3", "3e-3", "1e-2")}
# Single changes of published. A learning rate of None is --learning_rate auto.
IMPROVEMENTS: dict[str, dict[str, Any]] = {
    "learning rate 1e-3": {"learning_rate": 1e-3},
    "learning rate auto": {"learning_rate": None},
    "EMA 0.95": {"ema_decay": 0.95},
    "correlation 0.1": {"correlation_weight": 0.1},
    "starts at a half": {"output_start": "half"},
}
# Single changes of stable: each part left out in turn, and what else was tried.
VARIATIONS: dict[str, dict[str, Any]] = {
    "without EMA": {"ema_decay": 0.0},
    "without correlation": {"correlation_weight": 0.0},
    "without warm-up": {"warmup_epochs": 0.0},
    "stain jitter": {"stain_augmentation": 1.0},
    "plateau": {"scheduler": "plateau"},
    "no L1": {"l1_weight": 0.0},
    "starts at a half": {"output_start": "half"},
    "without boundary guidance": {"use_boundary_guidance": False},
    "log1p targets": {"target_transform": "log1p"},
    "dropout 0.2": {"dropout": 0.2},
    "crops with scarce markers": {"changes": ("crops with scarce markers",)},
    "pyramid of errors": {"changes": ("pyramid of errors",)},
    "residual blocks": {"changes": ("residual blocks",)},
}
# The monitor's advice for runs that are unstable, slow or overfitting.
ADVICE: dict[str, dict[str, dict[str, Any]]] = {
    "former": {
        "learning rate 5e-5": {"learning_rate": 5e-5},
        "learning rate 2e-5": {"learning_rate": 2e-5},
        "batch of 16": {"batch_size": 16},
        "no variance term": {"variance_weight": 0.0},
        "squared error alone": {
            "mse_weight": 1.0, "l1_weight": 0.0, "boundary_weight": 0.0, "focal_weight": 0.0, "variance_weight": 0.0,
        },
    },
    "published": {
        "learning rate 2e-4": {"learning_rate": 2e-4},
        "learning rate 3e-4": {"learning_rate": 3e-4},
        "weight decay 5e-5": {"weight_decay": 5e-5},
    },
    "stable": {
        "a quarter held out": {"val_split": 0.25},
        "weight decay 1e-3": {"weight_decay": 1e-3},
        "base 6": {"base_features": 6},
    },
}  # fmt: skip
PEER: dict[str, Any] = {
    "learning_rate": 1e-3, "weight_decay": 0.0, "scheduler": "constant", "early_stopping_patience": 0,
    "mse_weight": 1.0, "l1_weight": 0.0, "boundary_weight": 0.0, "variance_weight": 0.0, "noise_removal": False,
    "use_boundary_guidance": False, "stain_augmentation": 0.0, "output_start": "half", "changes": ("BasicUNet",),
}  # fmt: skip
# Isola et al., CVPR 2017, without the adversarial term: their rate and batch, the absolute error alone.
PIX2PIX: dict[str, Any] = {
    **PEER, "learning_rate": 2e-4, "batch_size": 1, "mse_weight": 0.0, "l1_weight": 1.0, "changes": ("pix2pix",),
}  # fmt: skip
# Peers' networks trained with our recipe, to separate the effect of the network from that of the recipe.
NETWORKS = ("BasicUNet", "DynUNet")


# Groups of recipes about which the stability promise is made, and those that further real pairs train; demo and the
# first real pairs train every group.
PROMISE = ("main", "stable", "bare")
FURTHER = (*PROMISE, "best epoch", "statistics", "peer", "pix2pix", "peer network")
# With at least this many groups, real pairs are split by drawing groups; with fewer, each is held out in turn.
DRAWN_FROM = 6
# Where groups are drawn, how many cores of each group score: scoring whole cores takes long.
SCORED_OF_GROUP = 3


@dataclass(frozen=True)
class Parts:
    """Names of the cores that train, that choose the best epoch, and that score. Those in ``wider`` train, too, or
    choose if a recipe's val_split is larger than that of ``published``."""

    train: tuple[str, ...]
    chosen: tuple[str, ...]
    scored: tuple[str, ...]
    wider: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrainingSet:
    """Pairs, options that suit them, and their parts, which may differ from seed to seed.

    A core that scores neither trains nor chooses a best epoch. Nor does any core of its group, but where a set has one
    group to hold out: half of its cores choose then, and half score.
    """

    name: str
    pairs_dir: Path
    options: dict[str, Any]
    parts: Callable[[int], Parts]
    groups: tuple[str, ...] | None = None

    def split_file(self, folder: Path, seed: int, val_split: float) -> Path:
        """Write the split of a recipe with this val_split; returns the file."""
        parts = self.parts(seed)
        chosen, trained = parts.chosen, (*parts.train, *parts.wider)
        if parts.wider and val_split > PUBLISHED["val_split"]:
            chosen, trained = (*chosen, *parts.wider), parts.train
        sides = {"train": sorted(trained), "val": sorted(chosen)}
        content = {"schema": 1, **{side: [{"core": n, "group": n} for n in names] for side, names in sides.items()}}
        # A checksum keeps the name short; sets with the same parts share a file.
        path = folder / f"split_{zlib.crc32(repr(content).encode()):08x}.json"
        write_json(path, content)
        return path


def demo_sets(folder: Path, cores: int = 40, per_image: int = 6, few: int = 3) -> list[TrainingSet]:
    """Generated tissue, two cores per patient: a fifth of the cores score, 15 % choose (25 % if the recipe asks for
    it); and the same with few patches per core."""
    pairs = folder / "demo"
    names = make_demo(pairs, cores=cores, size=256, seed=0)
    scored, chosen, wider = (2 * round(cores * share / 2) for share in (0.2, 0.35, 0.45))
    parts = Parts(tuple(names[wider:]), tuple(names[scored:chosen]), tuple(names[:scored]), tuple(names[chosen:wider]))
    options = {**SMALL, "patches_per_image_val": 4}
    return [
        TrainingSet("demo", pairs, {**options, "patches_per_image": per_image}, partial(_same, parts)),
        TrainingSet("demo few patches", pairs, {**options, "patches_per_image": few}, partial(_same, parts), PROMISE),
    ]


def real_sets(source: Path, folder: Path, name: str, main: bool, steps: int = 10) -> list[TrainingSet]:
    """Real pairs of several slides or places, called ``name``. Links, never copies.

    With many groups, four in eleven score, two choose and five train, drawn by the seed. With few, there is one set per
    group: the other groups train, half of its cores choose, and half score. An epoch has about ``steps`` steps.
    """
    rows = [line.split(",") for line in (source / "groups.csv").read_text(encoding="utf-8").split()[1:]]
    slides = sorted({slide for _, slide in rows})
    pairs = folder / slug(name)
    pairs.mkdir(parents=True, exist_ok=True)
    for core, _ in rows:
        for kind in ("HE", "ORION"):
            link = pairs / f"{core}_{kind}.npy"
            if not link.exists():
                link.symlink_to((source / link.name).resolve())
    shutil.copyfile(source / "channel_names.txt", pairs / "channel_names.txt")
    of_slide = {slide: sorted(core for core, its in rows if its == slide) for slide in slides}

    def drawn(seed: int) -> Parts:
        order = [slides[place] for place in np.random.default_rng(seed).permutation(len(slides))]
        scored, chosen = round(len(slides) * 4 / 11), round(len(slides) * 6 / 11)
        cores = [[core for slide in some for core in of_slide[slide]]
                 for some in (order[chosen:], order[scored:chosen])]  # fmt: skip
        few = [core for slide in order[:scored] for core in spread_out(of_slide[slide], SCORED_OF_GROUP)]
        return Parts(tuple(cores[0]), tuple(cores[1]), tuple(few))

    def held_out(slide: str) -> Parts:
        train = tuple(core for core, its in rows if its != slide)
        return Parts(train, tuple(of_slide[slide][::2]), tuple(of_slide[slide][1::2]))

    def options(parts: Parts) -> dict[str, Any]:
        patches = max(1, round(steps * PUBLISHED["batch_size"] / len(parts.train)))
        return {**SMALL, "patches_per_image": patches, "patches_per_image_val": 2 if len(parts.chosen) > 8 else 0}

    groups = None if main else FURTHER
    if len(slides) >= DRAWN_FROM:
        return [TrainingSet(name, pairs, options(drawn(0)), drawn, groups)]
    return [
        TrainingSet(
            f"{name}, {slide} held out", pairs, options(held_out(slide)), partial(_same, held_out(slide)), groups
        )
        for slide in slides
    ]


def slug(name: str) -> str:
    """A name as that of a folder."""
    return re.sub(r"[^\w.-]+", "_", name)


def _same(parts: Parts, seed: int) -> Parts:
    """Parts that are the same whatever the seed."""
    return parts


def spread_out(names: list[str], count: int) -> list[str]:
    """At most ``count`` of the names, evenly spread."""
    return [names[place] for place in np.unique(np.linspace(0, len(names) - 1, count).round().astype(int))]
