"""What ``--runs`` does: every run below a folder, reported once or followed."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from orion_unet.errors import InputError
from orion_unet.monitor.all_runs import AllRuns, Row, changed, document
from orion_unet.monitor.live import Followed, follow, tolerate_encoding
from orion_unet.monitor.notify import News
from orion_unet.monitor.report import ENDED, to_json
from orion_unet.monitor.watch import Request, exit_code
from orion_unet.text import clean

if TYPE_CHECKING:
    from rich.console import Console, RenderableType


def report_all(folder: Path, request: Request) -> int:
    """Print one line for every run; returns the exit code. Raises InputError."""
    rows = AllRuns(folder, request.thresholds).poll()
    _print(folder, rows, request)
    return _exit_code(rows, request)


def watch_all(folder: Path, request: Request) -> int:
    """Follow every run until Ctrl-C, or until all of them are over if that was asked for; returns the exit code."""
    followed = _FollowedRuns(folder, request)
    if follow(followed, request.interval_s, request.as_json, request.notify):
        _print(folder, followed.rows, request)
    return _exit_code(followed.rows, request)


class _FollowedRuns(Followed):
    """Every run below a folder."""

    def __init__(self, folder: Path, request: Request) -> None:
        self.folder = folder
        self.request = request
        self.runs = AllRuns(folder, request.thresholds, request.interval_s)
        self.rows: list[Row] = []
        self.problem = ""
        self._events: dict[Path, News] = {}
        self._printed: dict[str, str] | None = None

    def poll(self) -> bool:
        try:
            self.rows, self.problem = self.runs.poll(), ""
        except InputError as error:
            # A file server that does not answer for a moment ends no monitor that has seen the runs.
            if not self.rows:
                raise
            self.problem = clean(str(error), 200)
        if self.notify is not None:
            for row in self.rows:
                events = self._events.setdefault(row.path, News())
                self.notify.tell(events.update(row.state, row.state in ENDED, row.findings), row.document())
        over = bool(self.rows) and all(row.report is None or self.request.is_over(row.state) for row in self.rows)
        return not (self.request.until_finished and over)

    def news(self) -> Iterable[str]:
        """A plain line for each run that has changed, or all runs as a line of JSON."""
        before = self._printed or {}
        lines = changed(before, self.rows)
        gone = before.keys() - {row.name for row in self.rows}
        if not self.request.as_json:
            yield from lines.values()
        elif lines or gone or self._printed is None:
            yield to_json(document(self.folder, self.rows))
        self._printed = {name: line for name, line in before.items() if name not in gone} | lines

    def view(self, console: Console, height: int) -> RenderableType:
        from orion_unet.monitor.terminal import runs_view

        problems = [self.problem, self.notify.problem if self.notify else ""]
        every = f"every {self.request.interval_s:g} s"
        footer = " | ".join([*filter(None, problems), _counted(self.rows), every, "Ctrl-C to leave"])
        return runs_view(self.rows, console.width, height, footer)


def _print(folder: Path, rows: list[Row], request: Request) -> None:
    if request.as_json:
        print(to_json(document(folder, rows), 2), flush=True)
        return
    from orion_unet.monitor.terminal import make_console, runs_view

    tolerate_encoding()
    if rows:
        console = make_console(sys.stdout)
        console.print(runs_view(rows, console.width, footer=_counted(rows)))
    else:
        print(f"no runs below {clean(str(folder), 300)}")
    sys.stdout.flush()


def _counted(rows: list[Row]) -> str:
    warned = sum(bool(row.report and row.report.warnings) for row in rows)
    going = sum(not row.ended for row in rows)
    return f"{len(rows)} run{'' if len(rows) == 1 else 's'}, {going} not over, {warned} with warnings"


def _exit_code(rows: list[Row], request: Request) -> int:
    return max((exit_code(row.report, request.fail_on) for row in rows if row.report), default=0)
