"""Every run below a folder: found, read again and again, one row each."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orion_unet.errors import InputError
from orion_unet.findings import Finding
from orion_unet.monitor.diagnostics import Thresholds
from orion_unet.monitor.gpus import Gpus
from orion_unet.monitor.liveness import filesystem_now
from orion_unet.monitor.report import ENDED, Report, Run, plain
from orion_unet.run_log import METRICS_FILE, SCHEMA, STATUS_FILE
from orion_unet.text import clean, duration, short_number

HEADINGS = ("run", "state", "epoch", "best", "warnings", "age")
UNREADABLE = "unreadable"
# Looking for new runs takes at most this share of the time.
SEARCH_SHARE = 0.05


@dataclass(frozen=True)
class Row:
    """One run: its name below the folder, its report (None where it cannot be read, for ``reason``), and how long ago
    its trainer last wrote [s]."""

    name: str
    path: Path
    report: Report | None
    reason: str
    age_s: float | None
    findings: list[Finding] = field(default_factory=list)

    @property
    def state(self) -> str:
        """State of the run."""
        return self.report.life.state if self.report else UNREADABLE

    @property
    def ended(self) -> bool:
        """Whether the run is over, or cannot be read."""
        return self.state in ENDED or self.report is None

    def cells(self) -> list[str]:
        """The row under ``HEADINGS``."""
        report = self.report
        age = duration(None if self.age_s is None else round(self.age_s))
        if report is None:
            # The row is that of the folder: of a path in the reason, the name of the file is enough.
            reason = self.reason.replace(f"{self.path}{os.sep}", "")
            return [self.name, UNREADABLE, "-", "-", clean(reason, 100), age]
        planned = f"/{report.planned}" if report.planned else ""
        best = "-" if report.best is None else short_number(report.best_value)
        if report.best is not None and report.best_by == "pearson":
            best = f"r {best}"
        codes = ", ".join(finding.code for finding in report.warnings) or "none"
        return [self.name, self.state, f"{report.current_epoch}{planned}", best, codes, age]

    def document(self) -> dict[str, Any]:
        """The row as plain values for strict JSON."""
        report = self.report
        best = report.best if report else None
        return {
            "name": self.name,
            "run": str(self.path),
            "state": self.state,
            "reason": report.life.reason if report else self.reason,
            "epoch": report.current_epoch if report else None,
            "epochs_planned": report.planned if report else None,
            "best_epoch": int(report.epochs[best]) if report and best is not None else None,
            "best_val_loss": float(report.val[best]) if report and best is not None else None,
            "warnings": [finding.document() for finding in report.findings] if report else [],
            "age_s": plain(self.age_s),
        }


class AllRuns:
    """The runs below a folder. ``poll`` also finds those that were started, and forgets those that were removed."""

    def __init__(self, folder: Path, thresholds: Thresholds, interval_s: float = 0.0) -> None:
        self.folder = folder
        self.thresholds = thresholds
        self.interval_s = interval_s
        self._gpus = Gpus(interval_s)
        self._runs: dict[Path, Run] = {}
        self._search_at = 0.0

    def poll(self) -> list[Row]:
        """A row for every run, those that go on first. Raises InputError if the folder is none or cannot be read."""
        if not self.folder.is_dir():
            what = "is not a folder" if self.folder.exists() else "does not exist"
            raise InputError(f"--runs {self.folder} {what}: give a folder with runs in it")
        if time.monotonic() >= self._search_at:
            begun = time.monotonic()
            found = find_runs(self.folder)
            self._runs = {path: self._runs.get(path) or self._run(path) for path in found}
            self._search_at = time.monotonic() + (time.monotonic() - begun) / SEARCH_SHARE
        rows = [self._row(path, run) for path, run in self._runs.items()]
        return sorted(rows, key=lambda row: (row.ended, row.name))

    def _run(self, path: Path) -> Run:
        return Run(path, self.thresholds, self.interval_s, self._gpus)

    def _row(self, path: Path, run: Run) -> Row:
        name = clean(str(path.relative_to(self.folder)) if path != self.folder else path.resolve().name, 100)
        report, reason = None, ""
        try:
            report = run.poll()
        except InputError as error:
            reason = str(error)
        return Row(name, path, report, reason, _age_s(path), report.findings if report else [])


def find_runs(folder: Path) -> list[Path]:
    """Folders at or below ``folder`` that contain a run, in order of name. It looks neither into runs, nor into hidden
    folders, nor through links. Raises InputError where the folder cannot be read."""
    found = []

    def refuse(error: OSError) -> None:
        # A folder below that is not ours to read holds no run that we could show.
        if error.filename == str(folder):
            raise InputError(f"--runs {folder} cannot be read ({error.strerror})")

    for path, folders, files in os.walk(folder, onerror=refuse):
        if STATUS_FILE in files or METRICS_FILE in files:
            found.append(Path(path))
            folders.clear()
        folders[:] = sorted(name for name in folders if not name.startswith("."))
    return sorted(found)


def document(folder: Path, rows: list[Row]) -> dict[str, Any]:
    """All rows as plain values for strict JSON."""
    return {"schema": SCHEMA, "runs_dir": str(folder), "runs": [row.document() for row in rows]}


def _age_s(path: Path) -> float | None:
    """How long ago the trainer last wrote, by the clock of the file system."""
    written = []
    for name in (STATUS_FILE, METRICS_FILE):
        with suppress(OSError):
            written.append((path / name).stat().st_mtime)
    if not written:
        return None
    now = filesystem_now(path)
    return max((time.time() if now is None else now) - max(written), 0.0)


def changed(before: Mapping[str, str], rows: list[Row]) -> dict[str, str]:
    """A plain line for every run whose line is not the one in ``before``; ages do not count as a change."""
    lines = {row.name: f"{row.name}: {', '.join(row.cells()[1:5])}" for row in rows}
    return {name: line for name, line in lines.items() if before.get(name) != line}
