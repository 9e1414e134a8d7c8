"""A finding: one thing worth saying about a run or a data set."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from itertools import groupby
from typing import Any

NOTICE, WARNING = "notice", "warning"


@dataclass(frozen=True)
class Lines:
    """Lines of a run's log ``log`` (a file name), from one place to another, both included.

    A place is an epoch, or an epoch and a step.
    """

    log: str
    first: tuple[int, ...]
    last: tuple[int, ...]

    def document(self) -> dict[str, Any]:
        """The same as plain values."""
        return {"log": self.log, "first": list(self.first), "last": list(self.last)}


@dataclass(frozen=True)
class Finding:
    """One thing worth saying.

    ``code`` is its name for programs, ``severity`` NOTICE or WARNING, ``message`` a sentence with the evidence.
    ``value`` and ``threshold`` are the numbers that were compared, where there are two. ``advice`` says what to do:
    options to paste, or sentences. ``lines`` are those of the run's log that the finding rests on.
    """

    code: str
    severity: str
    message: str
    value: float | None = None
    threshold: float | None = None
    advice: tuple[str, ...] = ()
    lines: Lines | None = None

    def document(self) -> dict[str, Any]:
        """The finding as plain values, as ``--json`` prints it; ``lines`` only where there are any."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "lines"}
        lines = {} if self.lines is None else {"lines": self.lines.document()}
        return values | {"advice": list(self.advice)} | lines


def options_and_sentences(advice: Iterable[str]) -> list[tuple[bool, list[str]]]:
    """Advice in its order, cut where options to paste (True) and sentences (False) take turns."""
    return [(pasted, list(items)) for pasted, items in groupby(advice, lambda item: item.startswith("--"))]
