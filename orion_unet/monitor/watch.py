"""What the monitor command does: report once, watch until the end, or compare; and the files it writes."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orion_unet.errors import InputError
from orion_unet.monitor.diagnostics import Thresholds
from orion_unet.monitor.live import Followed, follow, tolerate_encoding
from orion_unet.monitor.liveness import MONITOR_FILE
from orion_unet.monitor.notify import News
from orion_unet.monitor.panels import Panel, Panels
from orion_unet.monitor.report import ENDED, Report, Run, to_json
from orion_unet.run_log import write_atomic
from orion_unet.text import clean

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

FIGURE_NAME, COMPARISON_NAME = "training_progress", "comparison"
EXIT_OK, EXIT_WARNINGS = 0, 4
# States that a scheduler may start the run again from.
CONTINUED = ("interrupted", "crashed")
REDRAW_PAUSE = 20
"""After drawing a figure, wait at least this many times as long as it took: others use the login node, too."""


@dataclass(frozen=True)
class Request:
    """The options of the monitor command."""

    run_dir: Path
    interval_s: float = 10.0
    as_json: bool = False
    html: Path | None = None
    figure: Path | None = None
    form: str = "png"
    x: str = "epoch"
    show: bool = False
    fail_on: str | None = None
    thresholds: Thresholds = field(default_factory=Thresholds)
    until_finished: bool = False
    notify: tuple[str, ...] = ()
    serve: int | None = None

    def is_over(self, state: str) -> bool:
        """Whether there is nothing to wait for after this state of a run."""
        return state in ENDED and not (self.until_finished and state in CONTINUED)

    @property
    def figure_path(self) -> Path:
        """The path of the figure."""
        return self.figure or self.run_dir / f"{FIGURE_NAME}.{self.form}"


class Outputs:
    """The files the monitor writes: monitor.json, the figure and, when asked for, the page."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.png = b""
        self._problems: dict[Path, str] = {}
        self._drawn = ""
        self._page = ""
        self._panels = Panels(request.run_dir)
        self._not_before = 0.0

    @property
    def problem(self) -> str:
        """Why a file could not be written at the last try; empty if all could."""
        return next(iter(self._problems.values()), "")

    def write(self, report: Report, refresh_s: float | None = None) -> None:
        """Write what has changed. If a file cannot be written, the report gets a note, and the next call tries again;
        that is no failure."""
        self.write_pictures(report, refresh_s)
        self.write_document(report)

    def write_document(self, report: Report) -> None:
        """Replace monitor.json."""
        noted = self.problem
        report.notes += [noted] if noted else []
        self._write(self.request.run_dir / MONITOR_FILE, (to_json(report.document(), 2) + "\n").encode())
        report.notes += [self.problem] if self.problem and not noted else []

    def write_pictures(self, report: Report, refresh_s: float | None = None) -> None:
        """Redraw the figure, if there is news and the last one is old enough, and write the page around it.

        ``refresh_s`` is the time until the next call, None if there is none: then a page that cannot be written raises
        InputError.
        """
        self._draw(report, forced=report.life.state in ENDED)
        if self.request.html is not None:
            from orion_unet.monitor.page import page

            alive = refresh_s if report.life.state not in ENDED else None
            text = page(report, self.png, alive, self.panels(report), self.request.x)
            # With its panels a page has megabytes, too much for a file server at every poll.
            if text == self._page and _exists(self.request.html):
                return
            if refresh_s is None:
                write_page(self.request.html, text)
                self._page = text
            elif self._write(self.request.html, text.encode("utf-8", "backslashreplace")):
                self._page = text

    def panels(self, report: Report) -> list[Panel]:
        """The sanity panels for a page."""
        best = int(report.epochs[report.best]) if report.best is not None else None
        return self._panels.poll(report.current_epoch, best)

    def _draw(self, report: Report, forced: bool) -> None:
        # Compared as text, because nan does not equal nan.
        state = f"{report.life.state} {len(report.epochs)} {report.train[-3:]} {report.val[-3:]} {report.newest_step}"
        now = time.monotonic()
        if state == self._drawn or (now < self._not_before and not forced):
            return
        from orion_unet.monitor.plots import run_figure

        drawn, self.png = figure_files(run_figure(report, self.request.x), self.request)
        self._not_before = time.monotonic() + REDRAW_PAUSE * (time.monotonic() - now)
        if self._write(self.request.figure_path, drawn):
            self._drawn = state

    def _write(self, path: Path, content: bytes) -> bool:
        """Replace a file; returns whether it could be written."""
        try:
            write_atomic(path, content, durable=False)
        except OSError as error:
            self._problems[path] = f"cannot write {path}: {error.strerror or error}"
            return False
        self._problems.pop(path, None)
        return True


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False


def figure_files(figure: Any, request: Request) -> tuple[bytes, bytes]:
    """The figure in the wanted form, and as the PNG that a page or a window needs (else empty)."""
    from orion_unet.monitor.plots import rendered

    drawn = rendered(figure, request.form)
    if request.form == "png":
        return drawn, drawn
    return drawn, rendered(figure) if request.html or request.show or request.serve is not None else b""


def report_once(request: Request) -> int:
    """Print one report; returns the exit code."""
    report = Run(request.run_dir, request.thresholds).poll()
    outputs = Outputs(request)
    outputs.write_document(report)
    if request.as_json:
        print(to_json(report.document(), 2), flush=True)
    else:
        print_report(report)
    # The user can read the report while the figure is drawn, which takes most of the time.
    outputs.write_pictures(report)
    if not outputs.problem and not request.as_json:
        print(f"figure: {clean(str(request.figure_path), 300)}")
    elif outputs.problem:
        print(outputs.problem, file=sys.stderr)
    if request.show:
        show(outputs.png)
    return exit_code(report, request.fail_on)


def watch(request: Request) -> int:
    """Follow the run until it ends or Ctrl-C is pressed, which is no failure; returns the exit code.

    With ``until_finished`` a run that was interrupted or has crashed is followed to its next attempt.
    """
    followed = _FollowedRun(request)
    follow(followed, request.interval_s, request.as_json, request.notify)
    if followed.report is None:
        return EXIT_OK
    if not request.as_json:
        print_report(followed.report, "" if followed.outputs.problem else f"figure: {request.figure_path}")
    return exit_code(followed.report, request.fail_on)


class _FollowedRun(Followed):
    """One run; before there is one to report, ``waiting_for`` says what is missing."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.run = Run(request.run_dir, request.thresholds, request.interval_s)
        self.outputs = Outputs(request)
        self.report: Report | None = None
        self.waiting_for = ""
        self._events = News()
        self._printed = ""

    def poll(self) -> bool:
        try:
            report = self.run.poll()
        except InputError as error:
            self.waiting_for = clean(str(error), 300)
            return True
        self.waiting_for = ""
        if self.notify is not None:
            events = self._events.update(report.life.state, report.life.state in ENDED, report.findings)
            self.notify.tell(events, report.document())
            report.notes += [self.notify.problem] if self.notify.problem else []
        self.outputs.write(report, self.request.interval_s)
        self.report = report
        return not self.request.is_over(report.life.state)

    def news(self) -> Iterable[str]:
        from orion_unet.monitor.terminal import one_line

        if self.waiting_for or self.report is None:
            line = f"waiting for {clean(str(self.request.run_dir))}: {self.waiting_for}"
            document = {"run": str(self.request.run_dir), "state": "waiting", "reason": self.waiting_for}
        else:
            line = one_line(self.report)
            document = self.report.document()
        if line != self._printed:
            self._printed = line
            yield to_json(document) if self.request.as_json else line

    def view(self, console: Console, height: int) -> RenderableType:
        from rich.text import Text

        from orion_unet.monitor.terminal import view

        if self.waiting_for or self.report is None:
            return Text(f"waiting for {clean(str(self.request.run_dir))}\n{self.waiting_for}\n\nCtrl-C to leave")
        footer = f"every {self.request.interval_s:g} s | Ctrl-C to leave"
        return view(self.report, console, height, footer)


def compare(request: Request, others: list[Path]) -> int:
    """Print several runs side by side and draw them in one figure; returns the exit code."""
    from orion_unet.monitor.compare import comparison, comparison_document, run_names
    from orion_unet.monitor.plots import comparison_figure

    reports = [Run(path, request.thresholds).poll() for path in (request.run_dir, *others)]
    drawn, png = figure_files(comparison_figure(reports, run_names(reports), request.x), request)
    columns, rows = comparison(reports)
    path = request.figure or request.run_dir / f"{COMPARISON_NAME}.{request.form}"
    try:
        write_atomic(path, drawn, durable=False)
        figure = f"figure: {path}"
    except OSError as error:
        figure = f"cannot write {path}: {error.strerror or error}"
    if request.html is not None:
        from orion_unet.monitor.page import comparison_page

        write_page(request.html, comparison_page(columns, rows, png))
    if request.as_json:
        print(to_json(comparison_document(reports), indent=2))
    else:
        from orion_unet.monitor.terminal import comparison_table, make_console

        tolerate_encoding()
        console = make_console(sys.stdout)
        console.print(comparison_table(columns, rows))
        console.print("* lowest validation loss", figure, sep="\n")
    if request.show:
        show(png)
    return max(exit_code(report, request.fail_on) for report in reports)


def exit_code(report: Report, fail_on: str | None) -> int:
    """4 if the report contains what ``fail_on`` names, else 0."""
    fatal = report.warnings if fail_on == "warning" else [*report.findings, *report.config_findings]
    return EXIT_WARNINGS if fail_on and fatal else EXIT_OK


def print_report(report: Report, footer: str = "") -> None:
    """Print the whole report, however long."""
    from orion_unet.monitor.terminal import make_console, view

    tolerate_encoding()
    console = make_console(sys.stdout)
    console.print(view(report, console, footer=clean(footer, 300)))
    sys.stdout.flush()


def write_page(path: Path, text: str) -> None:
    """Replace the page; raises InputError if that fails."""
    try:
        write_atomic(path, text.encode("utf-8", "backslashreplace"), durable=False)
    except OSError as error:
        raise InputError(f"--html {path}: cannot be written ({error.strerror or error})") from None


def show(png_bytes: bytes) -> None:
    """Open a window with the figure and wait until it is closed; without a display, print a message."""
    import io

    from matplotlib import pyplot

    if pyplot.get_backend().lower() == "agg":
        print("--show: no display here, or no window toolkit for matplotlib", file=sys.stderr)
        return
    image = pyplot.imread(io.BytesIO(png_bytes))
    figure = pyplot.figure(figsize=(image.shape[1] / 100, image.shape[0] / 100))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.imshow(image)
    pyplot.show()
