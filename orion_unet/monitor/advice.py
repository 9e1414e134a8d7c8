"""The recipe's advice for each warning, as options to paste; what the run already does is not advised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

STALLED = ("look at the end of train.log", "then: the same command with --resume auto")
CRASHED = ("look at the end of train.log", "then: the same command with --resume auto")


def diverged(options: Mapping[str, Any]) -> tuple[str, ...]:
    """A much smaller step, bounded gradients, no term that can run away."""
    return (*_lower(options, ("2e-5",), 0.0), "--grad_clip 1", "--variance_weight 0", "--focal_weight 0")


def unstable(options: Mapping[str, Any]) -> tuple[str, ...]:
    """A smaller step, averaged weights and a falling rate, a larger batch, a plainer loss."""
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
    """A larger step, unless the run is unstable: then that comes first. Less weight decay, more diverse patches."""
    rate, decay = _value(options, "learning_rate", 1e-4), _value(options, "weight_decay", 2e-4)
    higher = _automatic(options) or [f"--learning_rate {each}" for each in ("2e-4", "3e-4") if float(each) > rate][:1]
    found = higher if calm else []
    if decay > 0:
        found.append(f"--weight_decay {decay / 4:.1g}")
    found.append("check that the patches are diverse (sanity panels)")
    return tuple(found if calm else ["calm the validation loss first", *found])


def worse_than_mean(options: Mapping[str, Any], calm: bool) -> tuple[str, ...]:
    """A start at the means, a loss that allows dark markers, a step that gets there in time; then the data."""
    found = ["--output_start mean"] if options.get("output_start") == "half" else []
    if options.get("variance_form") == "exponential" and _value(options, "variance_weight", 0.1) > 0:
        found.append("--variance_form target")
    found += _automatic(options) if calm else []
    found.append("check that all slides were stained and scanned alike (check-data)")
    return tuple(found)


def overfitting(options: Mapping[str, Any]) -> tuple[str, ...]:
    """More cores to validate on, more weight decay, a smaller network."""
    decay = _value(options, "weight_decay", 2e-4)
    found = ["--val_split 0.25"] if _value(options, "val_split", 0.2) < 0.25 else []
    found.append(f"--weight_decay {decay * 5 if decay > 0 else 1e-3:.1g}")
    if _value(options, "base_features", 32) > 24:
        found.append("--base_features 24")
    return tuple(found)


_OTHER_TERMS = {"l1": 0.3, "boundary": 0.1, "focal": 0.0, "variance": 0.1, "correlation": 0.0}


def _automatic(options: Mapping[str, Any]) -> list[str]:
    """The rate that suits the number of steps, where it is known and clearly higher than the run's."""
    return ["--learning_rate auto"] if _automatic_rate(options) > 1.5 * _value(options, "learning_rate", 1e-4) else []


def _lower(options: Mapping[str, Any], usual: tuple[str, ...], least: float) -> list[str]:
    """A quarter of the rate, unless under this part of what suits the length; where that is unknown, the usual."""
    rate, suited = _value(options, "learning_rate", 1e-4), _automatic_rate(options)
    if suited:
        return [f"--learning_rate {rate / 4:.3g}"] if rate / 4 >= suited * least else []
    return [f"--learning_rate {lower}" for lower in usual if float(lower) < rate][:1]


def _automatic_rate(options: Mapping[str, Any]) -> float:
    """The rate that suits the number of steps; 0 where it is not known."""
    return max(0.0, _value(options, "automatic_learning_rate", 0.0))


def _value(options: Mapping[str, Any], name: str, default: float) -> float:
    value = options.get(name)
    usable = isinstance(value, int | float) and not isinstance(value, bool) and -1e30 < value < 1e30
    return float(value) if usable and value is not None else default
