"""pack: rewrite a folder of pairs once, so that patches are read fast from a disk."""

from __future__ import annotations

import shlex
import sys

from orion_unet.cli.arguments import EXIT_OK, Parser, add_options
from orion_unet.command_options import PackOptions
from orion_unet.config import DataOptions, TrainConfig
from orion_unet.options import checked

READ = ("he_layout", "orion_layout", "level", "patch_size")


def parser() -> Parser:
    """The command line of pack."""
    parser = Parser(
        prog="orion_unet pack",
        description="Rewrite a folder of pairs, value for value the same: as (H, W, C) arrays, worth it for sets of "
        "(C, H, W) files that are larger than memory, where a patch costs a fraction of the reading; or as compressed "
        "OME-Zarr, for disks that are too small for arrays. docs/formats.md helps to choose.",
        epilog="The source is only read. An interrupted pack is continued by the same command.",
    )
    add_options(parser, PackOptions)
    add_options(parser, DataOptions, names=READ, title="reading: as in the training to come")
    return parser


def main(argv: list[str]) -> int:
    """Run pack. Returns the exit code; raises InputError and RunError."""
    values = vars(parser().parse_args(argv))
    given = checked(PackOptions, values)
    reading = {name: values[name] for name in READ if name in values}
    options = TrainConfig.from_options({"pairs_dir": given.folder, **reading}).data
    layouts = {"he_layout": options.he_layout, "orion_layout": options.orion_layout}
    # Only now: --help should not wait for numpy.
    from orion_unet.data.packing import pack
    from orion_unet.data.page_cache import fits_page_cache

    try:
        done = pack(options, given.output_dir, given.overwrite, given.format)
    except KeyboardInterrupt:
        print("interrupted; what is packed is kept, and the same command goes on", file=sys.stderr, flush=True)
        raise
    for warning in done.warnings:
        print(f"note: {warning}")
    found = f", {done.found} of them packed before" if done.found else ""
    print(f"{done.cores} cores in {given.output_dir} ({done.written + done.found} files, {_size(done.nbytes)}{found}).")
    if given.format == "npy" and fits_page_cache(done.nbytes):
        print("note: this set fits in memory, where the layout matters little after the first epoch")
    # The packed files have another layout than the source. A layout that had to be given is still ambiguous.
    still = [f"--{name} hwc" for name, layout in layouts.items() if layout != "auto" and given.format == "npy"]
    words = ["--pairs_dir", shlex.quote(str(given.output_dir)), *still]
    print(f"To train on it: python train_spatial_orion_unet.py {' '.join(words)}")
    return EXIT_OK


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"
