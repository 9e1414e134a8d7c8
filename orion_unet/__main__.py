"""``python -m orion_unet COMMAND``: every command of the toolkit."""

from __future__ import annotations

import importlib

from orion_unet import __version__
from orion_unet.cli.arguments import EXIT_OK, end_process, run_command
from orion_unet.errors import InputError

COMMANDS = {
    "train": ("train", "train a spatial U-Net on pairs of H&E and ORION images"),
    "find-rate": ("find_rate", "find a learning rate for your own data"),
    "monitor": ("monitor", "watch a run and say what is going wrong"),
    "export-run": ("export_run", "turn a run's logs into CSV tables, TensorBoard events or an MLflow store"),
    "predict": ("predict", "predict the markers of H&E images and slides"),
    "evaluate": ("evaluate", "score a model against measured markers"),
    "quantify": ("quantify", "measure the markers of every cell of an image"),
    "crossval": ("crossval", "train once for every fold, and score each core by the model that held it out"),
    "register": ("register", "move the H&E of pairs that exist onto their markers"),
    "prepare": ("prepare", "turn slides into registered pairs to train on"),
    "check-data": ("check_data", "look at a folder of pairs before training on it"),
    "pack": ("pack", "rewrite a set larger than memory so that patches read fast"),
    "make-demo": ("make_demo", "draw a small data set to try everything on"),
}


def dispatch(argv: list[str]) -> int:
    """Run the command that the first word names."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: python -m orion_unet COMMAND [options]\n\ncommands:")
        for name, (_, text) in COMMANDS.items():
            print(f"  {name:<12}{text}")
        print("\nCOMMAND --help shows its options.")
        return EXIT_OK
    if argv[0] == "--version":
        print(__version__)
        return EXIT_OK
    if argv[0] not in COMMANDS:
        raise InputError(f"no command {argv[0]!r}; there are {', '.join(COMMANDS)}")
    module = importlib.import_module(f"orion_unet.cli.{COMMANDS[argv[0]][0]}")
    # Both are also scripts, so their parsers take the program's name from the command line: here that is __main__.py.
    named = {"prog": f"orion_unet {argv[0]}"} if argv[0] in ("train", "monitor") else {}
    return int(module.main(argv[1:], **named))


def main() -> int:
    """Entry point of the ``orion-unet`` command."""
    return run_command(dispatch)


if __name__ == "__main__":
    end_process(main())
