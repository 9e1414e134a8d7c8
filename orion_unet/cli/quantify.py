"""quantify: images of markers to one row a cell."""

from __future__ import annotations

import logging

from orion_unet.cli.arguments import EXIT_OK, Parser, add_options
from orion_unet.command_options import QuantifyOptions
from orion_unet.options import checked


def parser() -> Parser:
    """The command line of quantify."""
    parser = Parser(
        prog="orion_unet quantify",
        description="Measure the markers of every cell of predicted or measured images: a table, outlines for QuPath, "
        "and an AnnData for squidpy.",
        epilog="Every on/off option has a --no_ form. Values are in the unit of the image; pixels count from 0.",
    )
    add_options(parser, QuantifyOptions)
    return parser


def main(argv: list[str]) -> int:
    """Run quantify. Returns the exit code; raises InputError and RunError."""
    options = checked(QuantifyOptions, vars(parser().parse_args(argv)))
    # Only now: --help should not wait for numpy and scikit-image.
    from orion_unet.inference.progress import Progress
    from orion_unet.quantification.quantify import quantify_files

    # What it has to say about a damaged file is said in our own words.
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    print(f"Written to {quantify_files(options, Progress())}")
    return EXIT_OK
