"""evaluate: score a trained model against measured markers."""

from __future__ import annotations

from orion_unet.cli.arguments import EXIT_OK, Parser, add_options, add_reading_options
from orion_unet.cli.progress import progress, say
from orion_unet.command_options import READING, DeviceOptions, EvaluateOptions
from orion_unet.options import checked


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
    add_options(parser, EvaluateOptions)
    add_options(parser, DeviceOptions)
    add_reading_options(parser, trained=True)
    return parser


def main(argv: list[str]) -> int:
    """Run evaluate. Returns the exit code; raises InputError and RunError."""
    given = vars(parser().parse_args(argv))
    options, where = checked(EvaluateOptions, given), checked(DeviceOptions, given)
    # Only now: --help should not wait for torch.
    from orion_unet.evaluation.evaluate import evaluate
    from orion_unet.evaluation.scored_folder import FolderOptions

    reading = FolderOptions(**{name: given[name] for name in READING if name in given})
    output = evaluate(options, where, reading, say, progress)
    print(f"Written to {output}")
    return EXIT_OK
