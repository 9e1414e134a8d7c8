"""Exceptions that end a command with a plain message instead of a traceback."""

from collections.abc import Iterable


class InputError(Exception):
    """Bad option or bad input. The user sees its text and no traceback (exit code 2)."""

    @classmethod
    def listing(cls, headline: str, problems: Iterable[str], advice: str = "", limit: int = 200) -> "InputError":
        """One message for all problems of a folder or a command line, one per line, at most ``limit`` of them."""
        problems = list(problems)
        shown = [f"  - {problem}" for problem in problems[:limit]]
        if len(problems) > limit:
            shown.append(f"  - and {len(problems) - limit} more")
        return cls("\n".join([headline, *shown, *([advice] if advice else [])]))


class RunError(Exception):
    """Disk, memory or another rank failed, not the run itself. The text says what to do (exit code 1).

    ``told`` is True if another rank prints the message.
    """

    told = False
