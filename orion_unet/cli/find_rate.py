"""find-rate: a learning-rate range test on the user's own data."""

from __future__ import annotations

import os

from orion_unet.cli.arguments import EXIT_FAILURE, EXIT_OK, Parser, add_options, resolve_training, train_parser
from orion_unet.command_options import FindRateOptions
from orion_unet.errors import InputError
from orion_unet.options import checked
from orion_unet.recipes import DEFAULT, RECIPES, Recipe


def parser(recipe: Recipe = RECIPES[DEFAULT]) -> Parser:
    """The command line of find-rate: that of training, with the rates to try."""
    parser = train_parser("orion_unet find-rate", recipe)
    parser.description = (
        "Find a learning rate for your own data: train a fresh model for some steps while the rate grows, and look for "
        "the rate at which the loss falls most steeply. Give --output_dir and the options of the training to come."
    )
    parser.epilog = (
        "Data, model, loss, optimiser and batches are those of a training with these options. --learning_rate, "
        "schedule, validation, averaging, checkpoints and logs have no effect; --epochs only sets what --learning_rate "
        "auto would be. Writes find_rate.json and find_rate.png. Exit codes: 0 a rate is suggested; 1 none can be, for "
        "the reason given; 2 bad options or data, nothing written."
    )
    add_options(parser, FindRateOptions)
    return parser


def main(argv: list[str]) -> int:
    """Run find-rate. Returns the exit code; raises InputError and RunError."""
    config, own = resolve_training(argv, parser)
    options = checked(FindRateOptions, own)
    if not any(word.partition("=")[0] == "--output_dir" for word in argv):
        raise InputError("--output_dir is missing: give a folder for find_rate.json and find_rate.png")
    # Threads that spin while they wait take cores from the loader and from other programs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Only now: --help should not wait for torch.
    from orion_unet.training.find_rate import find_rate

    return EXIT_FAILURE if find_rate(config, options).rate is None else EXIT_OK
