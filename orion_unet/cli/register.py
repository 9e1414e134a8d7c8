"""register: align the H&E of pairs that exist with their markers."""

from __future__ import annotations

import shlex
import sys
from statistics import median

from orion_unet.cli.arguments import EXIT_OK, Parser, add_options
from orion_unet.command_options import RegisterOptions
from orion_unet.config import DataOptions, TrainConfig
from orion_unet.errors import InputError
from orion_unet.options import checked
from orion_unet.text import clean, short_number

READ = ("channel_names", "he_layout", "orion_layout", "level")
# Rejected cores that are listed; the table has them all.
LISTED = 10


def parser() -> Parser:
    """The command line of register."""
    parser = Parser(
        prog="orion_unet register",
        description="Move the H&E of every pair onto its markers (a shift, a small turn and scaling, and a smooth "
        "field of a few pixels), and reject pairs that do not match. Markers are cropped to what overlaps, never "
        "interpolated.",
        epilog="Writes the registered pairs, registration.csv and registration.png. The source is only read. An "
        "interrupted registration is continued by the same command. Exit codes: 0 registered, whatever was rejected; "
        "2 no pair could be kept, or bad input.",
    )
    add_options(parser, RegisterOptions)
    add_options(parser, DataOptions, names=READ, title="reading: how the folder is read, as in training")
    return parser


def main(argv: list[str]) -> int:
    """Run register. Returns the exit code; raises InputError and RunError."""
    values = vars(parser().parse_args(argv))
    given = checked(RegisterOptions, values)
    reading = {name: values[name] for name in READ if name in values}
    # A pair may be smaller than a patch.
    data = TrainConfig.from_options({"pairs_dir": given.folder, "patch_size": 16, **reading}).data
    # Only now: --help should not wait for torch.
    from orion_unet.preparation.overlay import SHEET, write_overlay_sheet
    from orion_unet.preparation.register_pairs import TABLE, register_folder
    from orion_unet.training.console import Console

    try:
        folder = register_folder(data, given, Console().progress)
    except KeyboardInterrupt:
        print("interrupted; what is registered is kept, and the same command goes on", file=sys.stderr, flush=True)
        raise
    output = given.output_dir
    if folder.found < len(folder.rows) or not (output / SHEET).exists():
        write_overlay_sheet(folder, output)
    kept = folder.kept
    before = f", {folder.found} of them before" if folder.found else ""
    print(f"{len(kept)} of {len(folder.rows)} cores registered in {output}{before}.")
    rejected = [row for row in folder.rows if row not in kept]
    for row in rejected[:LISTED]:
        print(f"rejected        {clean(row.core)}: {clean(row.reason)}")
    if len(rejected) > LISTED:
        print(f"rejected        {len(rejected) - LISTED} more, see {TABLE}")
    if not kept:
        raise InputError(f"{given.folder}: no pair can be registered; {TABLE} in {output} has the reasons")
    shifts = [(row.shift_down**2 + row.shift_right**2) ** 0.5 for row in kept
              if row.shift_down is not None and row.shift_right is not None]  # fmt: skip
    residuals = [row.residual_px for row in kept if row.residual_px is not None]
    gains = [median(value for value in column if value is not None) for column in
             ([row.correlation_before for row in kept], [row.correlation for row in kept])]  # fmt: skip
    print(f"moved by        {median(shifts):.1f} pixels in the median, {max(shifts):.1f} at most")
    print(f"correlation     {short_number(gains[0], 3)} before, {short_number(gains[1], 3)} after (medians)")
    if residuals:
        print(f"residual        {median(residuals):.2f} pixels in the median core")
    print(f"Look at {SHEET}; {TABLE} has every core.")
    print(f"To train on it: python train_spatial_orion_unet.py --pairs_dir {shlex.quote(str(output))}")
    return EXIT_OK
