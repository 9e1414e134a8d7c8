"""Packages that only some commands need: imported when they are needed, named when they are missing."""

from __future__ import annotations

import importlib
from types import ModuleType

from orion_unet.errors import InputError


def needed(module: str, package: str = "", extra: str = "inference") -> ModuleType:
    """Import a module of an optional package; raises InputError that says how to install it.

    ``package`` is its name on PyPI where that differs, ``extra`` the extra of this project that brings it.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError):
        # OSError: the package is there, the shared library it wraps is not.
        package = package or module.partition(".")[0]
        raise InputError(f'the package {package} is needed for this: pip install "orion-unet[{extra}]"') from None
