"""How an option is declared, once, as a field of a dataclass: default, help, unit and range."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import field, fields
from pathlib import Path
from typing import Any, TypeVar

from orion_unet.errors import InputError
from orion_unet.slides.remote import RemotePath, is_url

T = TypeVar("T")

# What the words of the help call files and folders.
PATHS = ("DIR", "FILE", "OUT", "RUN", "PAIRS", "SLIDES.csv", "FILE|DIR", "FILE|RUN", "RUN|FILE", "auto|FILE")


def option(
    default: Any,
    text: str,
    *,
    unit: str = "",
    choices: tuple[str, ...] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    metavar: str | None = None,
    section: str = "",
    positional: bool = False,
    required: bool = False,
    const: Any = None,
    inherited: bool = True,
    fixed: bool = True,
    follows: bool = False,
    before: Any = None,
    url: bool = False,
) -> Any:
    """Declare one option: default, help text, unit and range. The parameters are those of the declaration.

    ``above`` and ``below`` are exclusive bounds. The type of the field says what is parsed: ``bool`` makes an on/off
    option, ``tuple[...]`` takes several words. ``const`` is the value of an option that is given without one.
    ``section`` is the heading in the help, where it is not the dataclass's own. An option that is not ``inherited`` is
    left out when ``--config`` loads an earlier run, because it concerns that one start and not the experiment. An
    option that is not ``fixed`` may change when a run is resumed. An option that ``follows`` may be left open, as
    None: it is decided at the start, and a resumed run keeps what it had. ``before`` is what runs did that were
    made before the option existed, where that is not its default. Only an option with ``url`` may be the URL of
    something on object storage.
    """
    metadata = {
        "text": text,
        "unit": unit,
        "choices": choices,
        "minimum": minimum,
        "maximum": maximum,
        "above": above,
        "below": below,
        "metavar": metavar,
        "section": section,
        "positional": positional,
        "required": required,
        "const": const,
        "inherited": inherited,
        "fixed": fixed,
        "follows": follows,
        "before": default if before is None else before,
        "url": url,
    }
    return field(default=default, metadata=metadata)


def checked(group: type[T], given: Mapping[str, Any]) -> T:
    """The dataclass of a command's options from the values given; raises InputError naming every one out of range."""
    values = group(**{f.name: given[f.name] for f in fields(group) if f.name in given})  # type: ignore[arg-type]
    problems = list(range_problems(values))
    if len(problems) == 1:
        raise InputError(problems[0])
    if problems:
        raise InputError.listing("these options cannot be used:", problems, "Run with --help for every option.")
    return values


def range_problems(values: Any) -> Iterator[str]:
    """A sentence for every option of a dataclass that is out of its range."""
    for f in fields(values):
        value = getattr(values, f.name)
        problem = _range_problem(value, f.metadata) if f.metadata else ""
        if problem:
            yield f"--{f.name} {value}: {problem}"


def _range_problem(value: Any, metadata: Any) -> str:
    if value is None or isinstance(value, bool):
        return ""
    if metadata["choices"] and value not in metadata["choices"]:
        return f"must be one of {', '.join(metadata['choices'])}"
    if isinstance(value, str | Path | tuple) and not metadata["url"] and metadata["metavar"] in PATHS:
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, RemotePath) or (isinstance(each, str) and is_url(each)):
                return "is a URL, and must be on this machine: only pairs and slides are read from object storage"
    if isinstance(value, str):
        empty = not value.strip() and value != metadata["const"]
        return "must not be empty" if empty or "\0" in value else ""
    if not isinstance(value, int | float):
        return ""
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number"
    low, high = metadata["minimum"], metadata["maximum"]
    above, below = metadata["above"], metadata["below"]
    if (
        (low is not None and value < low)
        or (high is not None and value > high)
        or ((above is not None and value <= above) or (below is not None and value >= below))
    ):
        bounds = [
            f"{word} {bound:g}"
            for word, bound in (("at least", low), ("above", above), ("at most", high), ("below", below))
            if bound is not None
        ]
        return "must be " + " and ".join(bounds)
    return ""
