"""The running statistics of the norms: kept clean of skipped steps, and the same on every rank."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from orion_unet.distributed import all_reduce_sum, world_size


class RunningStatistics:
    """All floating buffers of a model, laid into one tensor so that a step can keep and restore them at once.

    A forward pass updates them before anyone knows whether its loss is finite. The model's buffers become views
    of the one tensor; nothing else about the model changes. A model without such buffers is left alone.
    """

    def __init__(self, model: nn.Module) -> None:
        places = [
            (module, name, buffer)
            for module in model.modules()
            for name, buffer in module.named_buffers(recurse=False)
            if buffer.is_floating_point()
        ]
        self.flat = torch.cat([buffer.reshape(-1) for _, _, buffer in places]) if places else torch.empty(0)
        self._kept = self.flat.clone()
        start = 0
        for module, name, buffer in places:
            module._buffers[name] = self.flat[start : start + buffer.numel()].view_as(buffer)
            start += buffer.numel()

    def keep(self) -> None:
        """Remember the present values."""
        self._kept.copy_(self.flat)

    def restore_where(self, bad: Tensor) -> None:
        """Go back to the remembered values where the scalar bool tensor is True, without waiting for the device."""
        if self.flat.numel():
            self.flat.copy_(torch.where(bad, self._kept, self.flat))

    def average_over_ranks(self) -> None:
        """Replace each rank's values by the mean over ranks, so that all validate one and the same model."""
        if world_size() > 1 and self.flat.numel():
            all_reduce_sum(self.flat).div_(world_size())
