"""The exceptions that end a command with a plain message instead of a traceback."""

from collections.abc import Iterable


class InputError(Exception):
    """Bad option or bad input: its text is all a person is shown (exit code 2)."""

    @classmethod
    def listing(cls, headline: str, problems: Iterable[str], advice: str = "", limit: int = 200) -> "InputError":
        """One message for all the problems of a folder or a command line, one a line, at most ``limit`` shown."""
        problems = list(problems)
        shown = [f"  - {problem}" for problem in problems[:limit]]
        if len(problems) > limit:
            shown.append(f"  - and {len(problems) - limit} more")
        return cls("\n".join([headline, *shown, *([advice] if advice else [])]))


class RunError(Exception):
    """The surroundings failed a run that was right (disk, memory, another rank): its text says what to do (exit 1).

    ``told`` is True where another rank tells of it.
    """

    told = False
