"""prepare: turn slides into registered pairs to train on."""

from __future__ import annotations

import shlex
import sys
from statistics import median

from orion_unet.cli.arguments import EXIT_OK, Parser, add_options
from orion_unet.command_options import PrepareOptions
from orion_unet.errors import InputError
from orion_unet.options import checked
from orion_unet.text import clean

LISTED = 20


def parser() -> Parser:
    """The command line of prepare."""
    parser = Parser(
        prog="orion_unet prepare",
        description="Turn slides, an H&E and its ORION image each, into a folder of registered pairs to train on. The "
        "ORION image is never interpolated unless --pixel_size_um asks for another size; the H&E is moved onto it.",
        epilog="An interrupted prepare is continued by the same command, and a finished one does nothing. Exit codes: "
        "0 prepared, whatever regions were rejected; 2 a slide could not be used, or nothing could be kept.",
    )
    add_options(parser, PrepareOptions)
    return parser


def main(argv: list[str]) -> int:
    """Run prepare. Returns the exit code; raises InputError and RunError."""
    given = checked(PrepareOptions, vars(parser().parse_args(argv)))
    # Only now: --help should not wait for torch.
    from orion_unet.preparation.prepare import REGIONS, REJECTED, prepare_slides

    try:
        folder = prepare_slides(given)
    except KeyboardInterrupt:
        print("interrupted; what is prepared is kept, and the same command goes on", file=sys.stderr, flush=True)
        raise
    output = given.output_dir
    for plan in folder.plans:
        missing = f"; no core at {', '.join(plan.missing)}" if plan.missing else ""
        lies = f"; H&E {plan.orientation}" if given.register == "auto" else ""
        print(f"{clean(plan.slide.name)}: {len(plan.regions)} regions, {plan.pixel_size_um:.4g} µm{lies}{missing}")
    if given.dry_run:
        total = sum(len(plan.regions) for plan in folder.plans)
        names = folder.plans[0].names
        print(f"would make {total} pairs of {len(names)} markers in {output}, {_size(folder.nbytes)} at most.")
    else:
        before = f", {folder.found} of them before" if folder.found else ""
        print(f"{len(folder.kept)} of {len(folder.rows)} regions are pairs in {output}{before}.")
        rejected = [row for row in folder.rows if row not in folder.kept]
        for row in rejected[:LISTED]:
            print(f"rejected        {clean(row.core)}: {clean(row.reason)}")
        if len(rejected) > LISTED:
            print(f"rejected        {len(rejected) - LISTED} more, see {REJECTED}")
        if residuals := [row.residual_px for row in folder.kept if row.residual_px is not None]:
            print(f"residual        {median(residuals):.2f} pixels in the median region")
        if not folder.kept and not folder.failures:
            raise InputError(f"{given.slides}: no region could be kept; {REJECTED} in {output} has the reasons")
        print(f"Look at SLIDE_overview.png; {REGIONS} has every region.")
        print(f"To train on it: python train_spatial_orion_unet.py --pairs_dir {shlex.quote(str(output))}")
    if folder.failures:
        raise InputError.listing(f"{given.slides}: these slides failed, the others are done:", folder.failures)
    return EXIT_OK


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"
