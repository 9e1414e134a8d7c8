"""make-demo: generate a small paired data set to try the toolkit on."""

from __future__ import annotations

import shlex

from orion_unet.cli.arguments import EXIT_OK, Parser, add_options
from orion_unet.command_options import DemoOptions
from orion_unet.options import checked


def parser() -> Parser:
    """The command line of make-demo."""
    parser = Parser(
        prog="orion_unet make-demo",
        description="Draw paired H&E and ORION cores of generated tissue, with 20 named markers, to try training on.",
        epilog="The same numbers give the same data. A folder that already holds them is left as it is.",
    )
    add_options(parser, DemoOptions)
    return parser


def main(argv: list[str]) -> int:
    """Run make-demo. Returns the exit code; raises InputError for numbers or a folder that cannot be used."""
    options = checked(DemoOptions, vars(parser().parse_args(argv)))
    # Only now: --help should not wait for numpy.
    from orion_unet.demo.make import MARKERS, holds_demo, make_demo

    folder = options.folder
    recipe = (options.cores, options.size, options.seed)
    found = holds_demo(folder, *recipe) and not options.overwrite
    names = make_demo(folder, *recipe, overwrite=options.overwrite)
    print(
        f"{'Found' if found else 'Made'} {len(names)} cores of {options.size} x {options.size} pixels with "
        f"{len(MARKERS)} markers in {folder}. To train on them: python train_spatial_orion_unet.py "
        f"--pairs_dir {shlex.quote(str(folder))} --patch_size {min(128, options.size)}"
    )
    return EXIT_OK
