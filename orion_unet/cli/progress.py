"""What a command says while it scores: wrapped lines, and a bar for something slow."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Callable


def say(text: str) -> None:
    """Print a sentence within the width of the terminal; further lines are indented."""
    indent = " " * (len(text) - len(text.lstrip()) + 2)
    columns = shutil.get_terminal_size().columns
    print(textwrap.fill(text, columns, subsequent_indent=indent, break_on_hyphens=False), flush=True)


def progress(total: int, text: str) -> Callable[[], None]:
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
