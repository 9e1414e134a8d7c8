"""Options: which of a run's own are a risk, and which to change when something goes wrong.

Advice is meant to be pasted. It never names what the run already does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orion_unet.findings import NOTICE, Finding

# Fields of config.json beside the options: the learning rate that ``--learning_rate auto`` would be, and the number
# of optimiser steps that it was derived from.
AUTOMATIC_RATE, STEPS = "automatic_learning_rate", "optimiser_steps"
# A rate is called high above MUCH_HIGHER times the automatic one (nobody has tried that), and low below MUCH_LOWER
# times it, if rate x steps is also below LITTLE_TRAVEL (then the weights cannot move far enough). The trainer warns
# at its start by the same limits.
MUCH_HIGHER, MUCH_LOWER, LITTLE_TRAVEL = 4, 1 / 8, 1.0

# Option, test for a risky value, threshold, message, and what to paste instead.
_RULES = (
    ("focal_weight", lambda x: x > 0, 0.0, "focal weight {:g} chases the largest errors", "--focal_weight 0"),
    ("variance_weight", lambda x: x > 0.3, 0.3, "variance weight {:g} is high", "--variance_weight 0.1"),
    ("val_split", lambda x: x < 0.2, 0.2, "validation split {:g} leaves few cores to judge by", "--val_split 0.2"),
    ("early_stopping_patience", lambda x: x <= 0, 1.0, "early stopping is off", "--early_stopping_patience 10"),
    ("epochs", lambda x: x < 20, 20.0, "{:g} epochs are few", "--epochs 30"),
)
_OTHER_TERMS = {"l1": 0.3, "boundary": 0.1, "focal": 0.0, "variance": 0.1, "correlation": 0.0}

CRASHED = ("look at the end of train.log", "then start the same command with --resume auto")
STUCK = (
    "look at the end of train.log and at the output of the other ranks",
    "check that the storage of --pairs_dir answers (ls)",
    "check that no rank or loader process is gone or stopped (ps: state T or D)",
    "then stop the run (Ctrl-C twice) and start the same command with --resume auto",
)


def judge_config(config: Mapping[str, Any], calm: bool = True) -> list[Finding]:
    """Notices on a run's options, from its config.json document (``options``, ``global_batch``, steps).

    ``calm`` is False for an unstable run; such a run gets no notice that its learning rate is low.
    """
    options = config.get("options")
    values = options if isinstance(options, Mapping) else {}
    known = (option_number(config, AUTOMATIC_RATE), option_number(config, STEPS))
    found = _judge_rate(option_number(values, "learning_rate"), *known, calm)
    for name, concern, threshold, message, instead in _RULES:
        value = option_number(values, name)
        if name == "val_split" and values.get("fold"):
            # The fold chooses the held-out cores, and the fraction is not used.
            continue
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
    """Judge a learning rate against the automatic one, or against a fixed limit where that is unknown."""
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


def diverged(options: Mapping[str, Any]) -> tuple[str, ...]:
    """A much lower learning rate, clipped gradients, no term that can run away."""
    found = _lower(options, ("2e-5",), 0.0)
    if not 0 < _value(options, "grad_clip", 1.0) <= 1:
        found.append("--grad_clip 1")
    for name, default in (("variance_weight", 0.1), ("focal_weight", 0.0)):
        if _value(options, name, default) > 0:
            found.append(f"--{name} 0")
    return tuple(found)


def unstable(options: Mapping[str, Any]) -> tuple[str, ...]:
    """A lower learning rate, averaged weights and a falling rate, a larger batch, a plainer loss."""
    found = _lower(options, ("5e-5", "2e-5"), 1 / 8)
    if _automatic_rate(options) and _value(options, "ema_decay", 0.0) <= 0:
        found.append("--ema_decay 0.95")
    if _automatic_rate(options) and options.get("scheduler") != "cosine":
        found.append("--scheduler cosine")
    if _value(options, "batch_size", 12) < 16:
        found.append("--batch_size 16")
    if _value(options, "variance_weight", 0.1) > 0:
        found.append("--variance_weight 0")
    if any(_value(options, f"{term}_weight", default) > 0 for term, default in _OTHER_TERMS.items()):
        found.append(
            "--mse_weight 1 --l1_weight 0 --boundary_weight 0 --focal_weight 0 --variance_weight 0 "
            "--correlation_weight 0"
        )
    return tuple(found)


def slow(options: Mapping[str, Any], calm: bool) -> tuple[str, ...]:
    """A higher learning rate (for a calm run only), less weight decay, more diverse patches."""
    rate, decay = _value(options, "learning_rate", 1e-4), _value(options, "weight_decay", 2e-4)
    higher = _automatic(options) or [f"--learning_rate {each}" for each in ("2e-4", "3e-4") if float(each) > rate][:1]
    found = higher if calm else []
    if decay > 0:
        found.append(f"--weight_decay {decay / 4:.1g}")
    found.append("check that the patches are diverse (sanity panels)")
    return tuple(found if calm else ["calm the validation loss first", *found])


def worse_than_mean(options: Mapping[str, Any], calm: bool) -> tuple[str, ...]:
    """Start at the means, use a loss that allows dark markers and a rate that is high enough; then check the data."""
    found = ["--output_start mean"] if options.get("output_start") == "half" else []
    if options.get("variance_form") == "exponential" and _value(options, "variance_weight", 0.1) > 0:
        found.append("--variance_form target")
    found += _automatic(options) if calm else []
    found.append("check that all slides were stained and scanned alike (check-data)")
    return tuple(found)


def overfitting(options: Mapping[str, Any]) -> tuple[str, ...]:
    """More cores to validate on, more weight decay, a smaller network."""
    decay = _value(options, "weight_decay", 2e-4)
    few = not options.get("fold") and _value(options, "val_split", 0.2) < 0.25
    found = ["--val_split 0.25"] if few else []
    found.append(f"--weight_decay {decay * 5 if decay > 0 else 1e-3:.1g}")
    if _value(options, "base_features", 32) > 24:
        found.append("--base_features 24")
    return tuple(found)


def rising(options: Mapping[str, Any]) -> tuple[str, ...]:
    """A lower rate, a warm-up, clipped gradients."""
    found = _lower(options, ("5e-5", "2e-5"), 1 / 8)
    if _value(options, "warmup_epochs", 0.0) < 1:
        found.append("--warmup_epochs 1")
    if not 0 < _value(options, "grad_clip", 1.0) <= 1:
        found.append("--grad_clip 1")
    return tuple(found)


def not_finite(options: Mapping[str, Any]) -> tuple[str, ...]:
    """Look at the cores that the log names; full precision, and what helps against divergence."""
    found = ["train.log names the terms and the cores of these steps: check the cores (check-data)"]
    if options.get("use_amp") is True:
        found.append("--no_use_amp")
    return (*found, *diverged(options))


def overflowing(options: Mapping[str, Any]) -> tuple[str, ...]:
    """A type with a wider range, or none."""
    return ("--amp_dtype auto", "--no_use_amp") if options.get("amp_dtype") == "float16" else ("--no_use_amp",)


def starving(config: Mapping[str, Any], options: Mapping[str, Any]) -> tuple[str, ...]:
    """More loader processes, or cores for them; packed pairs; fewer transforms on a GPU; a faster disk.

    ``config`` is the document of config.json, which says what the run has.
    """
    processes, cores = option_number(config, "loader_processes"), option_number(config, "usable_cores")
    ranks = option_number(config, "world_size") or 1
    found = []
    if processes is not None and cores is not None:
        room = int(max(cores // max(ranks, 1) - 1, 0))
        if processes < room:
            found.append(f"--num_workers {int(min(room, max(2 * processes, processes + 1)))}")
        else:
            found.append(f"a machine with more cores (ranks and loader processes use all {int(cores)} of this one)")
    layouts = config.get("target_layouts")
    if isinstance(layouts, list) and "chw" in layouts:
        found.append("pack the pairs once, so that a patch is read in fewer pieces: python -m orion_unet pack")
    # On a CPU, transforming a batch is no waiting.
    if options.get("noise_removal") is True and "CPU" not in str(config.get("device", "CPU")):
        found.append("--no_noise_removal")
    return (*found, "keep the pairs on a disk of this machine")


def memory(config: Mapping[str, Any], options: Mapping[str, Any]) -> tuple[str, ...]:
    """Half of the batch, accumulated to the same gradient; mixed precision on a GPU."""
    found = []
    batch, steps = _value(options, "batch_size", 12), _value(options, "accumulate_steps", 1)
    if batch >= 2:
        found.append(f"--batch_size {batch // 2:.0f} --accumulate_steps {2 * steps:.0f}")
    if options.get("use_amp") is False and "CPU" not in str(config.get("device", "CPU")):
        found.append("--use_amp")
    validated = _value(options, "val_batch_size", 8)
    if validated > batch:
        found.append(f"--val_batch_size {max(1, batch // 2):.0f}")
    return tuple(found)


def no_signal(options: Mapping[str, Any], silent: bool) -> tuple[str, ...]:
    """A term that makes the network learn scarce markers; whether the markers have signal at all (``silent``)."""
    found = ["--correlation_weight 0.1"] if _value(options, "correlation_weight", 0.0) <= 0 else []
    if silent:
        found.append("check that these markers have signal in the held-out cores (check-data, sanity panels)")
    return (*found, "do not use predictions of these markers unless evaluate supports them")


def option_number(values: Mapping[str, Any], name: str) -> float | None:
    """A value as a finite number; None where it is absent, not a number, or absurdly large."""
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1e30 < value < 1e30:
        return None
    return float(value)


def _automatic(options: Mapping[str, Any]) -> list[str]:
    """``--learning_rate auto``, where that is known to be clearly higher than the run's rate."""
    return ["--learning_rate auto"] if _automatic_rate(options) > 1.5 * _value(options, "learning_rate", 1e-4) else []


def _lower(options: Mapping[str, Any], usual: tuple[str, ...], least: float) -> list[str]:
    """A quarter of the run's rate, if that is at least ``least`` times the automatic one; where the automatic one is
    unknown, the first of the ``usual`` rates that is lower than the run's."""
    rate, suited = _value(options, "learning_rate", 1e-4), _automatic_rate(options)
    if suited:
        return [f"--learning_rate {rate / 4:.3g}"] if rate / 4 >= suited * least else []
    return [f"--learning_rate {lower}" for lower in usual if float(lower) < rate][:1]


def _automatic_rate(options: Mapping[str, Any]) -> float:
    """The learning rate that ``auto`` would be; 0 where it is unknown."""
    return max(0.0, _value(options, AUTOMATIC_RATE, 0.0))


def _value(options: Mapping[str, Any], name: str, default: float) -> float:
    value = option_number(options, name)
    return default if value is None else value
