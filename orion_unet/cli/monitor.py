"""The monitor's command line: options in, one call out. Imports neither torch nor, for --help, matplotlib."""

from __future__ import annotations

import shlex

from orion_unet.cli.arguments import Parser, add_options
from orion_unet.command_options import MonitorOptions
from orion_unet.errors import InputError
from orion_unet.options import checked

# Options about what is drawn of one run.
DRAWN = ("html", "figure", "format", "x")
# Options that ask for something else than a page.
NOT_SERVED = ("watch", "until_finished", "runs", "compare", "json", "html", "show", "notify")


def monitor_parser(prog: str | None = None) -> Parser:
    """The monitor's parser."""
    from orion_unet.monitor.diagnostics import Thresholds

    parser = Parser(
        prog=prog,
        description="Watch a training run: what is happening, what is going wrong, and what to try.",
        epilog="Exit codes: 0 reported (or left with Ctrl-C); 2 no run or bad option; 4 --fail_on found something.",
    )
    add_options(parser, MonitorOptions)
    add_options(parser, Thresholds)
    return parser


def main(argv: list[str], prog: str | None = None) -> int:
    """Run the monitor; returns the exit code. Raises InputError."""
    given = vars(monitor_parser(prog).parse_args(argv))
    from orion_unet.monitor import watch as command
    from orion_unet.monitor.diagnostics import Thresholds

    options, thresholds = checked(MonitorOptions, given), checked(Thresholds, given)
    stays = options.watch or options.until_finished
    _check_together(options, "--watch" if options.watch else "--until_finished", stays)
    for name in ("html", "figure"):
        path = getattr(options, name)
        if path and not path.absolute().parent.is_dir():
            raise InputError(f"--{name} {path}: its folder does not exist")
    request = command.Request(
        run_dir=options.output_dir,
        interval_s=options.interval,
        as_json=options.json,
        html=options.html,
        figure=options.figure,
        form=_form(options),
        x=options.x,
        show=options.show,
        fail_on=options.fail_on,
        thresholds=thresholds,
        until_finished=options.until_finished,
        notify=_words(options.notify),
        serve=options.serve,
    )
    if options.serve is not None:
        from orion_unet.monitor.serve import serve

        return serve(request, options.serve)
    if options.runs is not None:
        from orion_unet.monitor.watch_all import report_all, watch_all

        return (watch_all if stays else report_all)(options.runs, request)
    if options.compare:
        return command.compare(request, list(options.compare))
    return command.watch(request) if stays else command.report_once(request)


def _form(options: MonitorOptions) -> str:
    """``png``, ``svg`` or ``pdf``; raises InputError where --format and the ending of --figure differ."""
    ending = options.figure.suffix[1:].lower() if options.figure else ""
    if options.format and ending in ("png", "svg", "pdf") and ending != options.format:
        raise InputError(f"--figure {options.figure} --format {options.format}: the ending differs; give one of them")
    return options.format or (ending if ending in ("svg", "pdf") else "png")


def _check_together(options: MonitorOptions, staying: str, stays: bool) -> None:
    """Raises InputError for options that exclude, or need, one another."""
    excluded = [(stays, staying, name) for name in ("compare", "show")]
    excluded += [(options.serve is not None, "--serve", name) for name in NOT_SERVED]
    excluded += [(options.runs is not None, "--runs", name) for name in ("compare", "show", *DRAWN)]
    for given, one, other in excluded:
        if given and getattr(options, other) != getattr(MonitorOptions, other):
            raise InputError(f"{one} and --{other} do not go together: choose one")
    if options.notify is not None and not stays:
        raise InputError("--notify needs --watch or --until_finished: a single report is over before anything is new")


def _words(notify: str | None) -> tuple[str, ...]:
    """The words of the command to run; raises InputError if there is none."""
    try:
        words = tuple(shlex.split(notify or ""))
    except ValueError as error:
        raise InputError(f"--notify {notify}: cannot be split into words ({error}); check its quotes") from None
    if notify is not None and not words:
        raise InputError("--notify: is empty; give a command")
    return words
