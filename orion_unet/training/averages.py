"""Running statistics of the norms, kept clean of skipped steps, and exponential averages of the weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from orion_unet.distributed import all_reduce_sum, world_size
from orion_unet.models.freezing import is_frozen


class RunningStatistics:
    """The floating-point buffers of a model that training changes in one tensor, to remember and restore at once.

    A forward pass updates them before anyone knows whether its loss is finite. The model's buffers become views
    of the one tensor; nothing else about the model changes. A model without such buffers is left alone.
    """

    def __init__(self, model: nn.Module) -> None:
        buffers = [
            (module, name, buffer)
            for module in model.modules()
            for name, buffer in module.named_buffers(recurse=False)
            if buffer.is_floating_point() and not is_frozen(module)
        ]
        self.flat = torch.cat([buffer.reshape(-1) for _, _, buffer in buffers]) if buffers else torch.empty(0)
        self._kept = self.flat.clone()
        start = 0
        for module, name, buffer in buffers:
            module._buffers[name] = self.flat[start : start + buffer.numel()].view_as(buffer)
            start += buffer.numel()

    def keep(self) -> None:
        """Remember the present values."""
        self._kept.copy_(self.flat)

    def restore_where(self, bad: Tensor) -> None:
        """Return to the remembered values where the scalar bool tensor is True, without waiting for the device."""
        if self.flat.numel():
            self.flat.copy_(torch.where(bad, self._kept, self.flat))

    def average_over_ranks(self) -> None:
        """Replace each rank's values by the mean over ranks, so that all ranks validate the same model."""
        if world_size() > 1 and self.flat.numel():
            all_reduce_sum(self.flat).div_(world_size())


class ModelEma:
    """An exponential moving average of a model's weights, which validates more evenly than the weights of one step.

    ``model`` is the averaged copy, in evaluation mode and without gradients. Parameters and floating-point buffers
    that train are averaged, other buffers copied. After n updates the decay is min(decay, (1 + n) / (10 + n)): the
    first averages forget the initial weights fast instead of carrying them for 1 / (1 − decay) steps. ``statistics``
    are those of the model given here, which is the bare one, without any wrapper.
    """

    def __init__(self, model: nn.Module, statistics: RunningStatistics, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.statistics = RunningStatistics(self.model)
        self._current, self._current_statistics = model, statistics
        self._updates = torch.zeros((), device=next(model.parameters()).device)

    @torch.no_grad()
    def update(self, skip: Tensor | None = None) -> None:
        """Move the averages towards the model's present weights. Does not wait for the device.

        ``skip`` is a scalar tensor on the device: 1 leaves the averages as they are (a step that was not taken),
        0 or None moves them.
        """
        taken = torch.ones_like(self._updates) if skip is None else 1 - skip.to(self._updates)
        decay = ((1 + self._updates) / (10 + self._updates)).clamp(max=self.decay)
        share = (1 - decay) * taken
        averages: list[Tensor] = []
        current: list[Tensor] = []
        for mine, theirs in zip(self.model.parameters(), self._current.parameters(), strict=True):
            if theirs.requires_grad:
                averages.append(mine)
                current.append(theirs)
        moves = [*torch._foreach_sub(current, averages)]
        torch._foreach_mul_(moves, share)
        torch._foreach_add_(averages, moves)
        if self.statistics.flat.numel():
            move = self._current_statistics.flat - self.statistics.flat
            if skip is not None:
                # A skipped step may have left NaN in the running statistics (never in the weights), and 0 · NaN is NaN.
                move.masked_fill_(skip.bool(), 0.0)
            self.statistics.flat.add_(move.mul_(share))
        counts = [
            (count, latest)
            for count, latest in zip(self.model.buffers(), self._current.buffers(), strict=True)
            if not count.is_floating_point()
        ]
        if counts:
            torch._foreach_copy_([count for count, _ in counts], [latest for _, latest in counts])
        self._updates += taken

    def state_dict(self) -> dict[str, Any]:
        """The averages (tensors) and the number of updates, from which ``load_state_dict`` continues."""
        return {"updates": int(self._updates), "model": self.model.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the state of an earlier average; the decay stays this one's own."""
        self._updates.fill_(state["updates"])
        self.model.load_state_dict(state["model"])
