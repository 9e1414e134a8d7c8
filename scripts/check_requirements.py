"""Exit 0 when this interpreter has what pyproject.toml asks for, with the extras named (test,inference).

Otherwise exit 1 and name what is missing. Imports none of it.
"""

import argparse
import hashlib
import importlib.metadata
import json
import re
import sys
import tomllib  # from Python 3.11 on, the oldest that is supported
from pathlib import Path
from typing import Any


def numbers(version: str) -> tuple[int, ...]:
    """Leading numbers of a version: 2.13.0+cpu gives (2, 13, 0)."""
    return tuple(int(part) for part in re.split(r"[^\d.]", version)[0].strip(".").split(".") if part)


def missing(project: dict[str, Any], extras: str) -> list[str]:
    """Requirements of the project and of its comma-separated extras that are absent or too old."""
    wanted = list(project["dependencies"])
    for extra in filter(None, extras.split(",")):
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


def fingerprint(project: dict[str, Any], constraints: str) -> str:
    """Digest of all requirements and pinned versions, of nothing else in the two files."""
    pins = sorted(line.strip() for line in constraints.splitlines() if line.strip() and not line.startswith("#"))
    parts = [project[key] for key in ("requires-python", "dependencies", "optional-dependencies")]
    return hashlib.sha256(json.dumps([*parts, pins], sort_keys=True).encode()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("extras", nargs="?", default="", help="extras of pyproject.toml, separated by commas")
    parser.add_argument("--stamp", type=Path, help="file with the fingerprint that the environment was filled from")
    parser.add_argument("--fingerprint", action="store_true", help="print the present fingerprint and check nothing")
    options = parser.parse_args()
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    present = fingerprint(project, Path("constraints.txt").read_text(encoding="utf-8"))
    if options.fingerprint:
        print(present)
    elif lacking := missing(project, options.extras):
        sys.exit("missing: " + ", ".join(lacking))
    elif options.stamp and options.stamp.exists() and options.stamp.read_text(encoding="utf-8").strip() != present:
        sys.exit("the requirements have changed")


if __name__ == "__main__":
    main()
