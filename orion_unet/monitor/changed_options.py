"""Which options of a run differ from the recipe it used, or from the options' own defaults."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from orion_unet.config import STAIN_AUGMENTATION, UPSAMPLING, declared_options
from orion_unet.monitor.advice import AUTOMATIC_RATE, option_number
from orion_unet.recipes import RECIPES
from orion_unet.text import clean

# Options that say nothing about the experiment.
ASIDE = ("output_dir", "resume", "overwrite")
# What the data states, unless the user does; config.json has it either way.
OF_THE_DATA = "pixel_size_um"
# More rows than any run of this version can have.
MOST = 150
# What the trainer takes for an option that is left open; config.json holds the learning rate.
_OPEN = {"statistics_batches": 16, "stain_augmentation": STAIN_AUGMENTATION, "upsampling": UPSAMPLING}


def changed_options(config: Mapping[str, Any]) -> tuple[str, list[tuple[str, str, str]]]:
    """What the options of a config.json are compared with, ``recipe stable`` or ``defaults``, and a row for each that
    differs: its name, its value in the run, its value there.

    An option that the recipe leaves open does not differ where the run has what the trainer chooses by itself. An
    option that this version does not know has ``-`` in place of the other value. Text is cleaned, not yet escaped.
    """
    options, name = config.get("options"), config.get("recipe")
    known = RECIPES.get(name) if isinstance(name, str) else None
    usual = {option: field.default for option, field in declared_options().items()} | (known.values if known else {})
    title = f"recipe {known.name}" if known and known.values else "defaults"
    chosen = {**_OPEN, "learning_rate": option_number(config, AUTOMATIC_RATE)}
    rows = []
    for option, value in (options if isinstance(options, Mapping) else {}).items():
        if option in (*ASIDE, OF_THE_DATA):
            continue
        if option not in usual:
            rows.append((clean(option, 60), shown(value), "-"))
            continue
        expected = usual[option]
        if value != expected and not (expected is None and value == chosen.get(option)):
            other = "auto" if expected is None and option in chosen else shown(expected)
            rows.append((clean(option, 60), shown(value), other))
    return title, rows[:MOST]


def shown(value: Any) -> str:
    """The value of an option as a person would give it; anything else as JSON."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return clean(value if isinstance(value, str) else json.dumps(value), 120)
