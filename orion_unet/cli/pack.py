"""pack: rewrite a folder of pairs once, so that patches are read fast from a disk."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from orion_unet.cli.arguments import EXIT_OK, Parser
from orion_unet.config import TrainConfig

LAYOUTS = ("auto", "hwc", "chw")


def parser() -> Parser:
    """The command line of pack."""
    parser = Parser(
        prog="orion_unet pack",
        description="Rewrite a folder of pairs as (H, W, C) arrays, value for value the same. Worth it for sets of "
        "(C, H, W) files that are larger than memory: there a patch costs a fraction of the reading.",
        epilog="The source is only read. An interrupted pack is continued by the same command.",
    )
    parser.add_argument("folder", metavar="DIR", help="folder of NAME_HE.npy / NAME_ORION.npy pairs")
    parser.add_argument(
        "--output_dir", type=Path, required=True, metavar="OUT", help="folder to fill; made if it does not exist"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace files of the same names in OUT, and nothing else there"
    )
    for image in ("he", "orion"):
        name = "H&E" if image == "he" else "ORION"
        parser.add_argument(
            f"--{image}_layout",
            choices=LAYOUTS,
            default="auto",
            help=f"axis order of the {name} files in DIR; default: auto",
        )
    parser.add_argument(
        "--patch_size", type=int, default=256, metavar="N", help="that of the training to come; default: 256"
    )
    return parser


def main(argv: list[str]) -> int:
    """Run pack. Returns the exit code; raises InputError and RunError."""
    given = parser().parse_args(argv)
    layouts = {"he_layout": given.he_layout, "orion_layout": given.orion_layout}
    options = TrainConfig.from_options({"pairs_dir": given.folder, "patch_size": given.patch_size, **layouts}).data
    # Only now: --help should not wait for numpy.
    from orion_unet.data.packing import pack
    from orion_unet.data.page_cache import fits_page_cache

    try:
        done = pack(options, given.output_dir, given.overwrite)
    except KeyboardInterrupt:
        print("interrupted; what is packed is kept, and the same command goes on", file=sys.stderr, flush=True)
        raise
    for warning in done.warnings:
        print(f"note: {warning}")
    found = f", {done.found} of them packed before" if done.found else ""
    print(f"{done.cores} cores in {given.output_dir} ({done.written + done.found} files, {_size(done.nbytes)}{found}).")
    if fits_page_cache(done.nbytes):
        print("note: this set fits in memory, where the layout matters little after the first epoch")
    # What was said of the source holds no longer; what could not be told by itself must still be said.
    still = [f"--{name} hwc" for name, layout in layouts.items() if layout != "auto"]
    words = ["--pairs_dir", shlex.quote(str(given.output_dir)), *still]
    print(f"To train on it: python train_spatial_orion_unet.py {' '.join(words)}")
    return EXIT_OK


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"
