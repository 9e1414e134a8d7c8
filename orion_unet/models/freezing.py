"""Parts of a network that training leaves as they are: weights, and the statistics of their norms."""

from __future__ import annotations

from torch import nn


def freeze(part: nn.Module) -> None:
    """Take a part of a network out of training. Its modules work as in evaluation from now on.

    A network with frozen parts must call ``hold_frozen`` in its ``train``.
    """
    part.requires_grad_(False)
    for module in part.modules():
        module.frozen = True  # type: ignore[assignment]
    part.eval()


def is_frozen(module: nn.Module) -> bool:
    """Whether ``freeze`` has taken this module out of training."""
    return bool(getattr(module, "frozen", False))


def hold_frozen(model: nn.Module) -> None:
    """Return the frozen modules of a model to evaluation mode."""
    for module in model.modules():
        if is_frozen(module):
            module.training = False
