"""An exponential moving average of the weights, which validates more evenly than the weights of one step."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


class ModelEma:
    """Averaged copy of a model's parameters and floating-point buffers; other buffers are copied.

    ``model`` is the averaged copy, in evaluation mode and without gradients. After n updates the decay is
    min(decay, (1 + n) / (10 + n)): the first averages forget the initial weights fast instead of carrying
    them for 1 / (1 − decay) steps. The model given here is the bare one, without any wrapper.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        device = next(model.parameters()).device
        self._updates = torch.zeros((), device=device)

    @torch.no_grad()
    def update(self, model: nn.Module, skip: Tensor | None = None) -> None:
        """Move the averages towards the model's present weights. Does not wait for the device.

        ``skip`` is a scalar tensor on the device: 1 leaves the averages as they are (a step that was not taken),
        0 or None moves them.
        """
        averages: list[Tensor] = [*self.model.parameters()]
        current: list[Tensor] = [*model.parameters()]
        parameters = len(current)
        for average, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            if buffer.is_floating_point():
                averages.append(average)
                current.append(buffer)
            else:
                average.copy_(buffer)
        taken = torch.ones_like(self._updates) if skip is None else 1 - skip.to(self._updates)
        decay = ((1 + self._updates) / (10 + self._updates)).clamp(max=self.decay)
        steps = [*torch._foreach_sub(current, averages)]
        if skip is not None:
            # The forward pass of a skipped step may have left NaN in the running statistics of the norms (never
            # in the parameters), and 0 · NaN would carry it over.
            steps[parameters:] = [step.masked_fill(skip.bool(), 0.0) for step in steps[parameters:]]
        torch._foreach_mul_(steps, (1 - decay) * taken)
        torch._foreach_add_(averages, steps)
        self._updates += taken

    def state_dict(self) -> dict[str, Any]:
        """The averages (tensors) and the number of updates, from which ``load_state_dict`` continues."""
        return {"updates": int(self._updates), "model": self.model.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the state of an earlier average; the decay stays this one's own."""
        self._updates.fill_(state["updates"])
        self.model.load_state_dict(state["model"])
