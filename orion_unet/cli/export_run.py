"""export-run: a run's logs as CSV tables, TensorBoard events or a file store of MLflow. Imports no torch."""

from __future__ import annotations

from orion_unet.cli.arguments import EXIT_OK, Parser, add_options
from orion_unet.command_options import ExportOptions
from orion_unet.options import checked


def parser() -> Parser:
    """The command line of export-run."""
    parser = Parser(
        prog="orion_unet export-run",
        description="Turn the logs of a run (metrics.jsonl, steps.jsonl) into files for other programs.",
        epilog="What a later attempt has replaced is left out.",
    )
    add_options(parser, ExportOptions)
    return parser


def main(argv: list[str]) -> int:
    """Run export-run. Returns the exit code; raises InputError."""
    options = checked(ExportOptions, vars(parser().parse_args(argv)))
    # Only now: --help should not wait for numpy.
    from orion_unet.monitor.export import export
    from orion_unet.text import clean

    for path in export(options.run, options.to, options.output_dir):
        print(f"written: {clean(str(path), None)}")
    return EXIT_OK
