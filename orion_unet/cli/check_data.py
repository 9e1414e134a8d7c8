"""check-data: look at a folder of pairs before training on it."""

from __future__ import annotations

import json
import sys

from orion_unet.cli.arguments import EXIT_OK, Parser, add_options, add_reading_options
from orion_unet.command_options import READING, CheckDataOptions
from orion_unet.config import TrainConfig
from orion_unet.options import checked


def parser() -> Parser:
    """The command line of check-data."""
    parser = Parser(
        prog="orion_unet check-data",
        description="Check a folder of pairs as training would, and look at every channel and core.",
        epilog="Exit codes: 0 looked at, whatever was found; 2 training would refuse the folder, with its message.",
    )
    add_options(parser, CheckDataOptions)
    add_reading_options(parser, "patch_size")
    return parser


def main(argv: list[str]) -> int:
    """Run check-data. Returns the exit code; raises InputError and RunError."""
    values = vars(parser().parse_args(argv))
    given = checked(CheckDataOptions, values)
    reading = {name: values[name] for name in (*READING, "patch_size") if name in values}
    options = TrainConfig.from_options({"pairs_dir": given.folder, **reading})
    # Only now: --help should not wait for torch.
    from orion_unet.inspection.check import inspect_folder
    from orion_unet.inspection.results import prepare_folder, write_results
    from orion_unet.inspection.terminal import show
    from orion_unet.training.console import Console

    output = given.output_dir
    if output is not None:
        prepare_folder(output)
    progress = Console().progress
    inspection = inspect_folder(options.data, options.optimisation.seed, given.nuclear_marker, progress)
    written = write_results(inspection, output, progress) if output is not None else []
    if given.json:
        print(json.dumps(inspection.document(), indent=2, allow_nan=False))
        return EXIT_OK
    show(inspection, sys.stdout)
    if written:
        sheets = [path.name for path in written if path.suffix == ".png"]
        print(f"Written to {output}:")
        print(", ".join(path.name for path in written if path.suffix != ".png"))
        print(sheets[0] if len(sheets) == 1 else f"{sheets[0]} to {sheets[-1]}")
    return EXIT_OK
