"""make-demo: generate a small paired data set to try the toolkit on."""

from __future__ import annotations

import shlex
from pathlib import Path

from orion_unet.cli.arguments import EXIT_OK, Parser


def parser() -> Parser:
    """The command line of make-demo."""
    parser = Parser(
        prog="orion_unet make-demo",
        description="Draw paired H&E and ORION cores of generated tissue, with 20 named markers, to try training on.",
        epilog="The same numbers give the same data. A folder that already holds them is left as it is.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder to fill; made if it does not exist")
    parser.add_argument("--cores", type=int, default=12, metavar="N", help="cores, two a patient; default: 12")
    parser.add_argument("--size", type=int, default=512, metavar="N", help="side of a core [pixels]; default: 512")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="what the tissue is drawn from; default: 0")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace demo data made earlier in this folder, never anything else"
    )
    return parser


def main(argv: list[str]) -> int:
    """Run make-demo. Returns the exit code; raises InputError for numbers or a folder that cannot be used."""
    options = parser().parse_args(argv)
    # Only now: --help should not wait for numpy.
    from orion_unet.demo.make import MARKERS, holds_demo, make_demo

    folder: Path = options.folder
    recipe = (options.cores, options.size, options.seed)
    found = holds_demo(folder, *recipe) and not options.overwrite
    names = make_demo(folder, *recipe, overwrite=options.overwrite)
    print(
        f"{'Found' if found else 'Made'} {len(names)} cores of {options.size} x {options.size} pixels with "
        f"{len(MARKERS)} markers in {folder}. To train on them: python train_spatial_orion_unet.py "
        f"--pairs_dir {shlex.quote(str(folder))} --patch_size {min(128, options.size)}"
    )
    return EXIT_OK
