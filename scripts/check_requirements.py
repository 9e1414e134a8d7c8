"""Exit 0 when this interpreter holds what pyproject.toml asks for, with the extras named (test,inference).

Imports none of it.
"""

import importlib.metadata
import re
import sys
import tomllib  # from Python 3.11 on, which is the least that will do


def numbers(version: str) -> tuple[int, ...]:
    """Leading numbers of a version: 2.13.0+cpu gives (2, 13, 0)."""
    return tuple(int(part) for part in re.split(r"[^\d.]", version)[0].strip(".").split(".") if part)


def missing(extras: list[str]) -> list[str]:
    """Requirements that are absent or too old."""
    with open("pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    wanted = list(project["dependencies"])
    for extra in ",".join(extras).split(",") if extras else ():
        wanted += project["optional-dependencies"][extra]
    found = []
    for requirement in wanted:
        name, _, least = requirement.partition(">=")
        try:
            if numbers(importlib.metadata.version(name)) < numbers(least):
                found.append(requirement)
        except importlib.metadata.PackageNotFoundError:
            found.append(requirement)
    return found


if __name__ == "__main__":
    lacking = missing(sys.argv[1:])
    if lacking:
        sys.exit("missing: " + ", ".join(lacking))
