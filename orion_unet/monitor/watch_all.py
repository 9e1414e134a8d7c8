"""What ``--runs`` does: every run below a folder, reported once or followed."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from pathlib import Path

from orion_unet.errors import InputError
from orion_unet.monitor.all_runs import AllRuns, Row, changed, document
from orion_unet.monitor.notify import News, Notifier
from orion_unet.monitor.report import ENDED, to_json
from orion_unet.monitor.watch import Request, exit_code, notifier, on_a_screen, terminate_cleanly, tolerate_encoding
from orion_unet.text import clean


def report_all(folder: Path, request: Request) -> int:
    """Print one line for every run; returns the exit code. Raises InputError."""
    rows = AllRuns(folder, request.thresholds).poll()
    _print(folder, rows, request)
    return _exit_code(rows, request)


def watch_all(folder: Path, request: Request) -> int:
    """Follow every run until Ctrl-C, or until all of them are over if that was asked for; returns the exit code."""
    on_screen = on_a_screen(request.as_json)
    follow = _Follower(folder, request)
    with suppress(KeyboardInterrupt), notifier(request.notify, on_screen) as follow.notify, terminate_cleanly():
        follow.on_screen() if on_screen else follow.in_lines()
    if on_screen:
        _print(folder, follow.rows, request)
    return _exit_code(follow.rows, request)


class _Follower:
    def __init__(self, folder: Path, request: Request) -> None:
        self.folder = folder
        self.request = request
        self.notify: Notifier | None = None
        self.runs = AllRuns(folder, request.thresholds, request.interval_s)
        self.rows: list[Row] = []
        self.problem = ""
        self._news: dict[Path, News] = {}

    def poll(self) -> bool:
        """Look at all runs; returns whether to go on."""
        try:
            self.rows, self.problem = self.runs.poll(), ""
        except InputError as error:
            # A file server that does not answer for a moment ends no monitor that has seen the runs.
            if not self.rows:
                raise
            self.problem = clean(str(error), 200)
        if self.notify is not None:
            for row in self.rows:
                news = self._news.setdefault(row.path, News())
                self.notify.tell(news.update(row.state, row.state in ENDED, row.findings), row.document())
        over = bool(self.rows) and all(row.report is None or self.request.is_over(row.state) for row in self.rows)
        return not (self.request.until_finished and over)

    def in_lines(self) -> None:
        """For a pipe: a plain line for each run that has changed, or all runs as a line of JSON."""
        tolerate_encoding()
        printed: dict[str, str] = {}
        first = True
        while True:
            goes_on = self.poll()
            news = changed(printed, self.rows)
            gone = printed.keys() - {row.name for row in self.rows}
            if self.request.as_json and (news or gone or first):
                print(to_json(document(self.folder, self.rows)), flush=True)
            elif not self.request.as_json:
                for line in news.values():
                    print(line, flush=True)
            printed = {name: line for name, line in printed.items() if name not in gone} | news
            first = False
            if not goes_on:
                return
            time.sleep(self.request.interval_s)

    def on_screen(self) -> None:
        """A live table on the terminal's alternate screen, also redrawn when the window is resized."""
        from rich.live import Live

        from orion_unet.monitor.terminal import make_console, runs_view

        console = make_console(sys.stdout)
        with Live(console=console, screen=True, auto_refresh=False, vertical_overflow="crop") as live:
            while True:
                goes_on = self.poll()
                due = time.monotonic() + self.request.interval_s
                size = None
                while time.monotonic() < due:
                    if console.size != size:
                        size = console.size
                        problems = [self.problem, self.notify.problem if self.notify else ""]
                        every = f"every {self.request.interval_s:g} s"
                        parts = [*filter(None, problems), _counted(self.rows), every, "Ctrl-C to leave"]
                        footer = " | ".join(parts)
                        live.update(runs_view(self.rows, size.width, size.height - 1, footer), refresh=True)
                    if not goes_on:
                        return
                    time.sleep(min(0.2, self.request.interval_s))


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
