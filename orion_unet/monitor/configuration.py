"""Findings on a run's options: what made runs unstable before, told before it does so again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orion_unet.monitor.diagnostics import NOTICE, Finding

# In config.json beside the options: the rate that the trainer would have chosen for the number of steps, and that.
AUTOMATIC_RATE, STEPS = "automatic_learning_rate", "optimiser_steps"
# So many times that rate is worth a word: higher was not tried. Less than that part of it is, where rate times steps is
# under LITTLE_TRAVEL: too little to learn in. As the trainer says at its start.
MUCH_HIGHER, MUCH_LOWER, LITTLE_TRAVEL = 4, 1 / 8, 1.0

# Option, whether its value is a concern, where the concern begins, what to say, and what to paste instead.
_RULES = (
    ("focal_weight", lambda x: x > 0, 0.0, "focal weight {:g} chases the largest errors", "--focal_weight 0"),
    ("variance_weight", lambda x: x > 0.3, 0.3, "variance weight {:g} is high", "--variance_weight 0.1"),
    ("val_split", lambda x: x < 0.2, 0.2, "validation split {:g} leaves few cores to judge by", "--val_split 0.2"),
    (
        "early_stopping_patience",
        lambda x: x <= 0,
        1.0,
        "early stopping is off",
        "--early_stopping_patience 10",
    ),
    ("epochs", lambda x: x < 20, 20.0, "{:g} epochs are few", "--epochs 30"),
)


def judge_config(config: Mapping[str, Any], calm: bool = True) -> list[Finding]:
    """Notices on the options in a run's config.json document (its ``options``, ``global_batch`` and steps).

    A run that is not ``calm`` is not told that its learning rate is low.
    """
    options = config.get("options")
    values = options if isinstance(options, Mapping) else {}
    known = (option_number(config, AUTOMATIC_RATE), option_number(config, STEPS))
    found = _judge_rate(option_number(values, "learning_rate"), *known, calm)
    for name, concern, threshold, message, instead in _RULES:
        value = option_number(values, name)
        if value is not None and concern(value):
            found.append(Finding(name, NOTICE, message.format(value), value, threshold, (instead,)))
    batch = option_number(config, "global_batch")
    if batch is not None and batch < 8:
        message = f"a global batch of {batch:g} gives noisy gradients"
        found.insert(1, Finding("global_batch", NOTICE, message, batch, 8.0, ("--batch_size 12",)))
    if values.get("variance_form") == "exponential" and option_number(values, "variance_weight") != 0:
        message = "the exponential variance term is unstable"
        found.append(Finding("variance_form", NOTICE, message, advice=("--variance_form target",)))
    return found


def _judge_rate(rate: float | None, suited: float | None, steps: float | None, calm: bool) -> list[Finding]:
    """Against the rate that suits the number of steps; where that is not known, against the usual limit."""
    if rate is None:
        return []
    if not suited or suited < 0 or steps is None:
        concern = rate >= 5e-4
        message, threshold, instead = f"learning rate {rate:g} is high", 5e-4, "--learning_rate 1e-4"
    else:
        low = calm and rate < suited * MUCH_LOWER and rate * steps < LITTLE_TRAVEL
        concern = low or rate > suited * MUCH_HIGHER
        word, factor = ("low", MUCH_LOWER) if low else ("high", MUCH_HIGHER)
        message = f"learning rate {rate:g} is {word} for the length of the run"
        threshold, instead = suited * factor, "--learning_rate auto"
    return [Finding("learning_rate", NOTICE, message, rate, threshold, (instead,))] if concern else []


def option_number(values: Mapping[str, Any], name: str) -> float | None:
    """A value as a finite number; None where it is absent, something else or absurd."""
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1e30 < value < 1e30:
        return None
    return float(value)
