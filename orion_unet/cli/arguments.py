"""Declared options become an argparse parser, failures become exit codes."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, NoReturn

from orion_unet.command_options import READING
from orion_unet.config import GROUPS, DataOptions, TrainConfig, declared_options, load_options
from orion_unet.errors import InputError, RunError
from orion_unet.recipes import DEFAULT, RECIPES, Recipe, find_recipe
from orion_unet.slides.remote import input_path
from orion_unet.text import clean_lines

EXIT_OK, EXIT_FAILURE, EXIT_USAGE = 0, 1, 2

# Options of training that choose the held-out cores, one instead of the other.
SPLITTING = ("val_split", "fold", "split_file")

# By the name a package is imported under: the extra of pyproject.toml that brings it, "" where every command needs it.
PACKAGES = {
    **dict.fromkeys(("torch", "numpy", "matplotlib", "tqdm", "rich"), ""),
    **dict.fromkeys(("tifffile", "imagecodecs", "PIL", "scipy", "skimage", "sklearn", "zarr"), "inference"),
    "tensorboard": "tensorboard",
    "anndata": "cells",
    "monai": "bench",
}


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


def _help_text(f: Field[Any], default: Any) -> str:
    unit = f.metadata["unit"]
    if isinstance(default, bool):
        shown = "on" if default else "off"
    elif default is None:
        shown = "auto" if "auto" in (f.metadata["metavar"] or "") and f.name != "resume" else "none"
    else:
        shown = f"{default:g}" if isinstance(default, float) else str(default)
    silent = "default:" in f.metadata["text"] or f.metadata["required"] or f.metadata["positional"]
    suffix = "" if silent else f"; default: {shown}"
    return f"{f.metadata['text']}{f' [{unit}]' if unit else ''}{suffix}".replace("%", "%%")


def add_options(
    parser: argparse.ArgumentParser,
    group: type,
    values: dict[str, Any] | None = None,
    names: tuple[str, ...] = (),
    title: str = "",
) -> None:
    """Add one dataclass of declared options to the parser, under its title or the sections of its options.

    The parser gives only what was given. ``values`` replace defaults in the help, ``names`` choose some of the options,
    and ``title`` replaces the dataclass's own ("heading: description").
    """
    title, _, description = (title or group.__doc__ or "").partition(":")
    sections: dict[str, Any] = {}
    for f in fields(group):
        if names and f.name not in names:
            continue
        heading = f.metadata["section"] or title.strip()
        if heading not in sections:
            about = description.strip() if heading == title.strip() else None
            sections[heading] = parser.add_argument_group(heading, about or None)
        _add_option(sections[heading], f, _help_text(f, (values or {}).get(f.name, f.default)))


def add_reading_options(parser: argparse.ArgumentParser, *more: str, trained: bool = False) -> None:
    """The options of training that decide how a folder of pairs is read, and ``more`` of DataOptions.

    ``trained``: what is not given is as the model was trained.
    """
    values = dict.fromkeys(READING, "as in training") if trained else None
    add_options(parser, DataOptions, values, (*READING, *more), "reading: how the folder is read, as in training")


def _add_option(section: Any, f: Field[Any], shown: str) -> None:
    kinds = str(f.type).replace(" ", "").split("|")
    metadata = f.metadata
    given: dict[str, Any] = {"help": shown, "default": argparse.SUPPRESS}
    if kinds[0] == "bool":
        section.add_argument(f"--{f.name}", f"--no_{f.name}", dest=f.name, action=_OnOff, **given)
        return
    several = kinds[0].startswith("tuple")
    kind = kinds[0].removeprefix("tuple[").partition(",")[0] if several else kinds[0]
    converters: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "str": str, "Path": input_path}
    convert = converters[kind]
    given["type"] = _number_or_auto(convert) if metadata["metavar"] == "N|auto" else convert
    given["metavar"] = metadata["metavar"] or {"int": "N", "float": "X", "Path": "PATH"}.get(kind)
    if metadata["choices"]:
        given |= {"choices": metadata["choices"], "metavar": None}
    if metadata["const"] is not None:
        given |= {"nargs": "?", "const": metadata["const"]}
    if several:
        given["nargs"] = "+"
    if metadata["positional"]:
        section.add_argument(f.name, **{**given, "default": None})
    else:
        section.add_argument(f"--{f.name}", required=metadata["required"], **given)


def train_parser(prog: str | None = None, recipe: Recipe = RECIPES[DEFAULT]) -> Parser:
    """The trainer's parser, every option of config.py in its group, with the values of a recipe as defaults."""
    parser = Parser(
        prog=prog,
        description="Train a spatial U-Net that predicts multiplexed immunofluorescence (ORION) from H&E.",
        epilog="Every on/off option has a --no_ form. An option given twice counts as given last. Precedence, lowest "
        "first: the option's own default, --recipe, --config, the command line. Worth a try on real H&E, most for "
        "scarce markers: --encoder timm:tf_efficientnet_lite0 --encoder_weights FILE --encoder_train frozen "
        "(docs/transfer.md).",
    )
    parser.add_argument(
        "--recipe",
        metavar="NAME",
        help=f"values of options that belong together: "
        f"{'; '.join(f'{name}, {found.about}' for name, found in RECIPES.items())}; default: {DEFAULT}",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="take all options from an earlier run's config.json; options given beside it win",
    )
    for group in GROUPS.values():
        add_options(parser, group, recipe.values)
    return parser


def parse_train_config(argv: list[str], prog: str | None = None) -> TrainConfig:
    """Resolve a command line into a checked TrainConfig; raises InputError, or exits 0 on --help."""
    return resolve_training(argv, lambda recipe: train_parser(prog, recipe))[0]


def resolve_training(argv: list[str], parser: Callable[[Recipe], Parser]) -> tuple[TrainConfig, dict[str, Any]]:
    """A checked TrainConfig, and the options given that are not of training, from a command line.

    ``parser`` makes the train_parser of a recipe, with any further options. Raises InputError, or exits 0 on --help.
    """
    # The recipe first: --help shows its values.
    first = Parser(add_help=False)
    first.add_argument("--recipe")
    recipe = find_recipe(first.parse_known_args(argv)[0].recipe or DEFAULT)
    given = vars(parser(recipe).parse_args(argv))
    del given["recipe"]
    source = given.pop("config", None)
    known = declared_options()
    own = {name: given.pop(name) for name in list(given) if name not in known}
    chosen = [option for option in SPLITTING if given.get(option) is not None]
    if "fold" in chosen and len(chosen) > 1:
        raise InputError(f"{' and '.join(f'--{option}' for option in chosen)} each choose the held-out cores: give one")
    values, name = ({}, recipe.name) if source is None else load_options(source)
    if chosen:
        # A choice on the command line replaces that of the earlier run, whichever of the options it was made with.
        values = {**values, "fold": None, "split_file": None}
    return TrainConfig.from_options({**recipe.values, **values, **given}, name), own


def run_command(command: Callable[[list[str]], int], argv: list[str] | None = None) -> int:
    """Run a command; returns its exit code. InputError is one message and 2, RunError one message and 1, anything else
    a traceback and 1.

    Under a launcher only the first rank of each machine reports bad input, because all its ranks see the same.
    """
    try:
        return _call(command, sys.argv[1:] if argv is None else argv)
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
        # The reader of a pipe (head, less) has left: nothing is wrong, and nobody is listening.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except Exception:
        traceback.print_exc()
        return EXIT_FAILURE


def _call(command: Callable[[list[str]], int], argv: list[str]) -> int:
    """Run a command. Raises InputError, with the environment to activate, where one of PACKAGES is missing."""
    try:
        return command(argv)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in PACKAGES:
            raise
        raise InputError(missing_package(package, Path(__file__).resolve().parents[2])) from None


def missing_package(package: str, root: Path) -> str:
    """The sentence for a Python without one of PACKAGES; ``root`` is the folder that the toolkit is in."""
    extra = PACKAGES[package]
    lacking = f"{sys.executable} has no {package}" + (f' (extra "{extra}")' if extra else "")
    at = "" if root == Path.cwd() else f"{shlex.quote(str(root))}/"
    activate = f". {at}.venv/bin/activate"
    if any(root.glob(f".venv/lib/python3*/site-packages/{package}")):
        return f"{lacking}; activate the environment that has it: {activate}"
    if not extra and (root / "train_stable_learning.sh").exists():
        return f"{lacking}; {at or './'}train_stable_learning.sh --help makes an environment, {activate} activates it"
    wanted = f"orion-unet[{extra}]" if extra else package
    return f'{lacking}; install it: {shlex.quote(sys.executable)} -m pip install "{wanted}"'


def end_process(code: int) -> NoReturn:
    """End this process with an exit code; a rank ends without the interpreter's usual shutdown.

    A thread of gloo may still own a tensor of the last exchange. If it releases the tensor while the interpreter shuts
    down, the process aborts, and a finished run looks failed (seen with torch 2.13 in one pair of ranks in ten,
    although the process group had been destroyed).
    """
    if "RANK" in os.environ:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(code)
    sys.exit(code)
