"""check-data: look at a folder of pairs before training on it."""

from __future__ import annotations

import json
import sys
from argparse import SUPPRESS
from dataclasses import field, fields, make_dataclass
from pathlib import Path

from orion_unet.cli.arguments import EXIT_OK, Parser, add_options
from orion_unet.config import DataOptions, TrainConfig

# The options of training that decide how the folder is read.
READING = ("channel_names", "exclude_channels", "groups_csv", "he_layout", "orion_layout", "patch_size")


def parser() -> Parser:
    """The command line of check-data."""
    parser = Parser(
        prog="orion_unet check-data",
        description="Check a folder of pairs as training would, and look at every channel and core.",
        epilog="Exit codes: 0 looked at, whatever was found; 2 training would refuse the folder, with its message.",
    )
    parser.add_argument("folder", metavar="DIR", help="folder of NAME_HE.npy / NAME_ORION.npy pairs")
    parser.add_argument(
        "--output_dir",
        metavar="OUT",
        default=SUPPRESS,
        help="also write channels.csv, cores.csv, check_data.json and contact sheets of all cores; default: none",
    )
    parser.add_argument(
        "--nuclear_marker",
        metavar="NAME",
        default=SUPPRESS,
        help="channel of the nuclear stain; default: the first named like one (Hoechst, DAPI, DRAQ5, ...)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of tables")
    add_options(parser, _reading())
    return parser


def _reading() -> type:
    declared = {f.name: f for f in fields(DataOptions)}
    group = make_dataclass(
        "ReadingOptions",
        [
            (name, declared[name].type, field(default=declared[name].default, metadata=declared[name].metadata))
            for name in READING
        ],
        frozen=True,
    )
    group.__doc__ = "reading: as in training"
    return group


def main(argv: list[str]) -> int:
    """Run check-data. Returns the exit code; raises InputError and RunError."""
    given = vars(parser().parse_args(argv))
    reading = {name: given[name] for name in READING if name in given}
    options = TrainConfig.from_options({"pairs_dir": given["folder"], **reading})
    # Only now: --help should not wait for torch.
    from orion_unet.inspection.check import inspect_folder
    from orion_unet.inspection.results import prepare_folder, write_results
    from orion_unet.inspection.terminal import show
    from orion_unet.training.console import Console

    output = Path(given["output_dir"]) if "output_dir" in given else None
    if output is not None:
        prepare_folder(output)
    progress = Console().progress
    inspection = inspect_folder(options.data, options.optimisation.seed, given.get("nuclear_marker"), progress)
    written = write_results(inspection, output, progress) if output is not None else []
    if given["json"]:
        print(json.dumps(inspection.document(), indent=2, allow_nan=False))
        return EXIT_OK
    show(inspection, sys.stdout)
    if written:
        sheets = [path.name for path in written if path.suffix == ".png"]
        print(f"Written to {output}:")
        print(", ".join(path.name for path in written if path.suffix != ".png"))
        print(sheets[0] if len(sheets) == 1 else f"{sheets[0]} to {sheets[-1]}")
    return EXIT_OK
