"""Parts of a network that training leaves as they are: weights, and the statistics of their norms."""

from __future__ import annotations

from torch import nn


def freeze(part: nn.Module, but: nn.Module | None = None) -> None:
    """Take a part of a network out of training, without its submodule ``but``. It works as in evaluation from now on.

    A network with frozen parts must call ``hold_frozen`` in its ``train``.
    """
    kept = set() if but is None else set(but.modules())
    for module in part.modules():
        if module not in kept:
            module.frozen = True  # type: ignore[assignment]
            module.training = False
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)


def is_frozen(module: nn.Module) -> bool:
    """Whether ``freeze`` has taken this module out of training."""
    return bool(getattr(module, "frozen", False))


def hold_frozen(model: nn.Module) -> None:
    """Return the frozen modules of a model to evaluation mode."""
    for module in model.modules():
        if is_frozen(module):
            module.training = False
