"""The monitor's command line: options in, one call out. Imports neither torch nor, for --help, matplotlib."""

from __future__ import annotations

from orion_unet.cli.arguments import Parser, add_options
from orion_unet.config import MonitorOptions
from orion_unet.errors import InputError
from orion_unet.options import checked


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


def main(argv: list[str]) -> int:
    """Run the monitor; returns the exit code. Raises InputError."""
    given = vars(monitor_parser().parse_args(argv))
    from orion_unet.monitor import watch as command
    from orion_unet.monitor.diagnostics import Thresholds

    options, thresholds = checked(MonitorOptions, given), checked(Thresholds, given)
    if options.watch and (options.compare or options.show):
        other = "--compare" if options.compare else "--show"
        raise InputError(f"--watch and {other} do not go together: choose one")
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
        show=options.show,
        fail_on=options.fail_on,
        thresholds=thresholds,
    )
    if options.compare:
        return command.compare(request, list(options.compare))
    return command.watch(request) if options.watch else command.report_once(request)
