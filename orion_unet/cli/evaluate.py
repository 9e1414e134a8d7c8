"""evaluate: score a trained model against measured markers."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from orion_unet.cli.arguments import EXIT_OK, Parser
from orion_unet.config import DataOptions

READING = ("channel_names", "exclude_channels", "he_layout", "orion_layout", "groups_csv")


def parser() -> Parser:
    """The command line of evaluate."""
    parser = Parser(
        prog="orion_unet evaluate",
        description="Score a trained model, marker by marker, on cores it was not trained on, beside two baselines: "
        "the training mean, and a linear regression from the colour of each pixel.",
        epilog="Scores are those of targets in [0, 1], normalised (and cleaned) as in training. What is undefined "
        "stays empty. Intervals need at least 8 cores, or 8 groups where cores come in groups. They are nominally 95 % "
        "intervals; in simulations they cover the truth in 88 to 96 % of the cases.",
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="RUN|FILE", help="a run folder (its best.pt), or a .pt file")
    add("--pairs_dir", type=Path, required=True, metavar="DIR", help="folder of NAME_HE.npy / NAME_ORION.npy pairs")
    add(
        "--split",
        choices=("val", "train", "all"),
        default="val",
        help="cores to score: held out (those new to the model included), trained on, or all; cores of the training "
        "are recognised by their H&E, whatever their names; default: val",
    )
    add(
        "--output_dir",
        type=Path,
        metavar="DIR",
        help="where scores and figures go; default: the folder evaluation in the run",
    )
    add(
        "--positive_threshold",
        metavar="X|NAME=X,...",
        help="a pixel or cell is positive above it, in the normalised range; default: 0.5 for pixels, for cells Otsu's "
        "threshold of the training cells",
    )
    add(
        "--cells",
        nargs="?",
        const="",
        metavar="DIR",
        help="also score cells: nuclei found in the measured nuclear marker, or with DIR those of its label files "
        "NAME_LABELS.npy or NAME_LABELS.tif, integers (H, W)",
    )
    add("--nuclear_marker", metavar="NAME", help="marker that shows nuclei; default: told from the names")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N; default: auto")
    add("--use_amp", action="store_true", help="mixed precision on a GPU")
    add("--overwrite", action="store_true", help="replace an earlier evaluation in the output folder")
    section = parser.add_argument_group("how the folder is read (default: as in training)")
    for field in fields(DataOptions):
        if field.name in READING:
            choices = field.metadata["choices"] or None
            section.add_argument(
                f"--{field.name}",
                choices=choices,
                metavar=None if choices else field.metadata["metavar"],
                help=field.metadata["text"].replace("%", "%%"),
            )
    return parser


def main(argv: list[str]) -> int:
    """Run evaluate. Returns the exit code; raises InputError and RunError."""
    given = parser().parse_args(argv)
    # Only now: --help should not wait for torch.
    from orion_unet.evaluation.evaluate import evaluate
    from orion_unet.evaluation.results import EvaluateOptions
    from orion_unet.evaluation.scored_folder import FolderOptions

    values = vars(given)
    folder = FolderOptions(**{name: values.pop(name) for name in READING})
    output = evaluate(EvaluateOptions(**values, folder=folder), _say, _progress)
    print(f"Written to {output}")
    return EXIT_OK


def _say(text: str) -> None:
    indent = " " * (len(text) - len(text.lstrip()) + 2)
    columns = shutil.get_terminal_size().columns
    print(textwrap.fill(text, columns, subsequent_indent=indent, break_on_hyphens=False), flush=True)


def _progress(total: int, text: str) -> Callable[[], None]:
    """A bar on a terminal, for something slow; returns what to call after each of ``total`` parts."""
    if total == 0 or not sys.stderr.isatty():
        return lambda: None
    from tqdm import tqdm

    bar = tqdm(total=total, desc=text, leave=False, dynamic_ncols=True)

    def step() -> None:
        bar.update()
        if bar.n >= total:
            bar.close()

    return step
