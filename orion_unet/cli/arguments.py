"""Turns the declared options into an argparse parser, and failures into exit codes."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import Field, fields
from typing import Any, NoReturn

from orion_unet.config import GROUPS, TrainConfig, load_options
from orion_unet.errors import InputError, RunError
from orion_unet.text import clean_lines

EXIT_OK, EXIT_FAILURE, EXIT_USAGE, EXIT_DIVERGED = 0, 1, 2, 3


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one sentence and exit code 2, without the page of usage before it."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(**kwargs)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


class _OnOff(argparse.Action):
    """``--name`` sets True, ``--no_name`` sets False (argparse's own form would be spelled --no-name)."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(nargs=0, **kwargs)

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, not (option or "").startswith("--no_"))


def _number_or_auto(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        return None if text == "auto" else convert(text)

    parse.__name__ = f"{convert.__name__} or auto"
    return parse


def _help_text(f: Field[Any]) -> str:
    unit = f.metadata["unit"]
    default = f.default
    if isinstance(default, bool):
        shown = "on" if default else "off"
    elif default is None:
        shown = "auto" if "auto" in (f.metadata["metavar"] or "") and f.name != "resume" else "none"
    else:
        shown = str(default)
    suffix = f"; default: {shown}" if "default:" not in f.metadata["text"] else ""
    return f"{f.metadata['text']}{f' [{unit}]' if unit else ''}{suffix}".replace("%", "%%")


def add_options(parser: argparse.ArgumentParser, group: type) -> None:
    """Add one dataclass of declared options to the parser as a titled group."""
    title, _, description = (group.__doc__ or "").partition(":")
    section = parser.add_argument_group(title.strip(), description.strip() or None)
    for f in fields(group):
        kinds = str(f.type).replace(" ", "").split("|")
        shown = _help_text(f)
        if kinds == ["bool"]:
            section.add_argument(
                f"--{f.name}",
                f"--no_{f.name}",
                dest=f.name,
                action=_OnOff,
                default=argparse.SUPPRESS,
                help=shown,
            )
            continue
        convert: Callable[[str], Any] = {"int": int, "float": float, "str": str}[kinds[0]]
        if f.metadata["metavar"] == "N|auto":
            convert = _number_or_auto(convert)
        metavar = f.metadata["metavar"] or ("N" if kinds[0] == "int" else "X" if kinds[0] == "float" else None)
        choices = f.metadata["choices"] or None
        section.add_argument(
            f"--{f.name}",
            type=convert,
            choices=choices,
            metavar=None if choices else metavar,
            default=argparse.SUPPRESS,
            help=shown,
        )


def train_parser(prog: str | None = None) -> Parser:
    """The trainer's parser, every option of config.py in its group."""
    parser = Parser(
        prog=prog,
        description="Train a spatial U-Net that predicts multiplexed immunofluorescence (ORION) from H&E.",
        epilog="Every on/off option has a --no_ form. An option given twice counts as given last.",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="start from an earlier run's config.json; options given beside it win",
    )
    for group in GROUPS.values():
        add_options(parser, group)
    return parser


def parse_train_config(argv: list[str], prog: str | None = None) -> TrainConfig:
    """Resolve a command line into a checked TrainConfig; raises InputError, or exits 0 on --help."""
    given = vars(train_parser(prog).parse_args(argv))
    source = given.pop("config", None)
    inherited = load_options(source) if source else {}
    return TrainConfig.from_options({**inherited, **given})


def run_command(command: Callable[[list[str]], int], argv: list[str] | None = None) -> int:
    """Run a command and close on its failure: InputError is one message and 2, RunError one message and 1.

    Anything else is a traceback and 1.

    Under a launcher only the first rank of each machine speaks of bad input: its ranks meet the same one.
    """
    try:
        return command(sys.argv[1:] if argv is None else argv)
    except InputError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {clean_lines(str(error))}", file=sys.stderr, flush=True)
        return EXIT_USAGE
    except RunError as error:
        if not error.told:
            print(f"error: {clean_lines(str(error))}", file=sys.stderr, flush=True)
        return EXIT_FAILURE
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of a pipe (head, less) has left; nothing is wrong, and nobody is there to be told.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except Exception:
        traceback.print_exc()
        return EXIT_FAILURE


def end_process(code: int) -> NoReturn:
    """End this process with an exit code; a rank ends without the interpreter's last rites.

    A thread of gloo may still hold a tensor of the last exchange. Where it lets go of it while the interpreter is
    being torn down, the process is aborted, and a finished run looks failed (seen with torch 2.13 in one pair of
    ranks in ten, although the process group had been destroyed).
    """
    if "RANK" in os.environ:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(code)
    sys.exit(code)
