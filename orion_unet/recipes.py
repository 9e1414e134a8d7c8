"""Named recipes: the values of options that belong together, and why each is what it is.

A recipe names only what differs from the options' own defaults. The evidence is in TRAINING_IMPROVEMENTS.md and
benchmarks/results/stability.md; that of ``fine_tune`` is in benchmarks/results/transfer.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from orion_unet.errors import InputError


@dataclass(frozen=True)
class Value:
    """The value of one option, and the reason for it."""

    value: Any
    reason: str


@dataclass(frozen=True)
class Recipe:
    """A name, a sentence about it, and the options it sets; ``base`` holds those it shares with another recipe."""

    name: str
    about: str
    own: dict[str, Value] = field(default_factory=dict)
    base: Recipe | None = None

    @property
    def reasons(self) -> dict[str, Value]:
        """Every option that the recipe sets, with its reason."""
        return {**(self.base.reasons if self.base else {}), **self.own}

    @property
    def values(self) -> dict[str, Any]:
        """Every option that the recipe sets, with its value."""
        return {name: found.value for name, found in self.reasons.items()}


NONE = Recipe("none", "every option at its own default")

PUBLISHED = Recipe(
    "published",
    "the recipe this project started from: its loss is stable, but it learns little in runs of usual length",
    {
        "epochs": Value(30, "as published"),
        "batch_size": Value(12, "as published"),
        "val_split": Value(0.20, "as published"),
        "learning_rate": Value(1e-4, "as published; too low for runs of some hundred to two thousand steps"),
        "scheduler": Value("plateau", "as published"),
        "lr_factor": Value(0.5, "as published"),
        "lr_patience": Value(5, "as published"),
        "mse_weight": Value(0.8, "as published"),
        "l1_weight": Value(0.3, "as published"),
        "boundary_weight": Value(0.1, "as published"),
        "focal_weight": Value(0.0, "the focal term brought nothing or harm"),
        "variance_weight": Value(0.1, "as published"),
        "early_stopping_patience": Value(10, "as published"),
        "use_amp": Value(True, "twice the speed on a GPU; float32 on a CPU"),
        "use_boundary_guidance": Value(True, "as published"),
        "noise_removal": Value(True, "hot pixels of the camera are no markers"),
        "stain_augmentation": Value(1.0, "as published"),
        "statistics_batches": Value(0, "as published"),
        "recalibrate": Value(False, "as published"),
    },
)

STABLE = Recipe(
    "stable",
    "the best recipe in benchmarks/results/stability.md; the default",
    {
        "learning_rate": Value(None, "auto: a rate that suits the number of steps learns most at every length tried"),
        "scheduler": Value("cosine", "ends lower than the plateau schedule, whose trigger is a noisy validation"),
        "warmup_epochs": Value(0.5, "the first steps at a high rate spoil the start at the markers' means"),
        "ema_decay": Value(0.95, "validates more evenly than the weights of one step"),
        "correlation_weight": Value(0.1, "makes the network learn scarce markers"),
        "stain_augmentation": Value(
            None, "auto: none; jitter cost correlation, on stains that were not trained on, too"
        ),
        "statistics_batches": Value(None, "auto; running averages lag behind the weights, so that validation jumps"),
        "recalibrate": Value(True, "the correlation term leaves the level of scarce markers open"),
    },
    PUBLISHED,
)

FORMER = Recipe(
    "former",
    "the unstable recipe before that; kept for comparison only",
    {
        "epochs": Value(20, "as it was"),
        "batch_size": Value(8, "as it was"),
        "val_split": Value(0.15, "as it was"),
        "learning_rate": Value(5e-4, "as it was"),
        "lr_factor": Value(0.7, "as it was"),
        "lr_patience": Value(3, "as it was"),
        "focal_weight": Value(0.1, "its weight is not on record; this is a guess"),
        "variance_weight": Value(0.5, "as it was"),
        "variance_form": Value("exponential", "as it was; the cause of most of the instability"),
        "output_start": Value("half", "as it was: the first steps go into darkening every pixel"),
    },
    PUBLISHED,
)

DEMO = Recipe(
    "demo",
    "stable on the generated demo data, small enough for minutes on a CPU",
    {
        "pairs_dir": Value("demo_pairs", "where make-demo puts its data"),
        "output_dir": Value("runs/demo", "a folder of its own"),
        "patch_size": Value(128, "small cores, short steps"),
        "patches_per_image": Value(16, "more steps from 12 cores"),
        "base_features": Value(12, "a small network"),
        "depth": Value(3, "a small network"),
        "epochs": Value(12, "minutes on a CPU"),
        "batch_size": Value(8, "more steps from 12 cores"),
        "warmup_epochs": Value(1.0, "its epochs are short"),
        "l1_weight": Value(0.0, "in so few epochs, the term keeps scarce markers dark"),
    },
    STABLE,
)

FINE_TUNE = Recipe(
    "fine_tune",
    "stable for a run that starts from an earlier model (--init_from)",
    {
        "learning_rate": Value(1e-3, "never clearly worse than random weights, and forgets less than a higher rate"),
    },
    STABLE,
)

RECIPES = {recipe.name: recipe for recipe in (STABLE, FINE_TUNE, PUBLISHED, FORMER, DEMO, NONE)}
DEFAULT = STABLE.name


def find_recipe(name: str) -> Recipe:
    """The recipe of that name; raises InputError naming those there are."""
    if name not in RECIPES:
        raise InputError(f"--recipe {name}: there are {', '.join(RECIPES)}")
    return RECIPES[name]
