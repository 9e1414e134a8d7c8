"""The monitor's command line: options in, one call out. Imports neither torch nor, for --help, matplotlib."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

from orion_unet.cli.arguments import Parser
from orion_unet.config import OutputOptions
from orion_unet.errors import InputError


def monitor_parser(prog: str | None = None) -> Parser:
    """The monitor's parser."""
    from orion_unet.monitor.diagnostics import Thresholds

    parser = Parser(
        prog=prog,
        description="Watch a training run: what is happening, what is going wrong, and what to try.",
        epilog="Exit codes: 0 reported (or left with Ctrl-C); 2 no run or bad option; 4 --fail_on found something.",
    )
    default = OutputOptions.output_dir
    parser.add_argument("--output_dir", metavar="RUN", default=default, help=f"the run folder; default: {default}")
    mode = parser.add_argument_group("mode")
    mode.add_argument("--watch", action="store_true", help="stay, and follow the run until it ends or Ctrl-C")
    mode.add_argument("--interval", type=float, default=10.0, metavar="S", help="seconds between polls; default: 10")
    mode.add_argument("--compare", nargs="+", metavar="RUN", help="set further runs beside this one")
    out = parser.add_argument_group("output")
    out.add_argument(
        "--json", action="store_true", help="strict JSON on standard output; with --watch one line a change"
    )
    out.add_argument("--html", metavar="FILE", help="also write a self-contained page, refreshed by --watch")
    out.add_argument("--figure", metavar="FILE", help="the figure; default: training_progress.png in the run folder")
    out.add_argument("--show", action="store_true", help="open the figure in a window, where there is a display")
    out.add_argument(
        "--fail_on",
        choices=("warning", "notice"),
        help="exit with 4 when there is a warning (or any finding, on the configuration too); default: none",
    )
    limits = parser.add_argument_group("thresholds")
    for f in fields(Thresholds):
        text = f"{f.metadata['text']}; default: {f.default:g}".replace("%", "%%")
        limits.add_argument(f"--{f.name}", type=float, default=f.default, metavar="X", help=text)
    return parser


def main(argv: list[str]) -> int:
    """Run the monitor; returns the exit code. Raises InputError."""
    options = monitor_parser().parse_args(argv)
    from orion_unet.monitor import watch as command
    from orion_unet.monitor.diagnostics import Thresholds

    values: dict[str, Any] = {f.name: getattr(options, f.name) for f in fields(Thresholds)}
    for name, value in {**values, "interval": options.interval}.items():
        if not (math.isfinite(value) and value >= 0):
            raise InputError(f"--{name} {value:g}: must be a finite number, at least 0")
    if not 0.1 <= options.interval <= 86400:
        raise InputError(f"--interval {options.interval:g}: must be between 0.1 and 86400 seconds")
    if options.watch and (options.compare or options.show):
        other = "--compare" if options.compare else "--show"
        raise InputError(f"--watch and {other} do not go together: choose one")
    for name in ("html", "figure"):
        path = getattr(options, name)
        if path and not Path(path).absolute().parent.is_dir():
            raise InputError(f"--{name} {path}: its folder does not exist")
    request = command.Request(
        run_dir=Path(options.output_dir),
        interval_s=options.interval,
        as_json=options.json,
        html=Path(options.html) if options.html else None,
        figure=Path(options.figure) if options.figure else None,
        show=options.show,
        fail_on=options.fail_on,
        thresholds=Thresholds(**values),
    )
    if options.compare:
        return command.compare(request, [Path(path) for path in options.compare])
    return command.watch(request) if options.watch else command.report_once(request)
