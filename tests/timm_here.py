"""timm for the tests that need it, which are skipped where it is missing; and an encoder for those that do not."""

from types import SimpleNamespace

import pytest
from torch import nn


def timm_or_skip():
    """The package; skips the test where it is not installed or its torchvision belongs to another torch."""
    try:
        import timm
    except Exception as error:
        pytest.skip(f"timm cannot be imported: {error}")
    return timm


class TinyEncoder(nn.Module):
    """Two convolutions at strides 2 and 4, and one whose map is never used; as timm's models look from outside."""

    def __init__(self):
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 5, 3, stride=2, padding=1), nn.BatchNorm2d(5))
        self.stages_2 = nn.Conv2d(5, 7, 3, stride=2, padding=1)
        self.spare = nn.Conv2d(7, 2, 1)
        self.feature_info = SimpleNamespace(reduction=lambda: [2, 4], channels=lambda: [5, 7])

    def forward(self, x):
        first = self.one(x)
        return [first, self.stages_2(first)]


class PatchEncoder(nn.Module):
    """Patches that do not overlap, each a pixel of the first map, then maps of half the size: strides of any number."""

    def __init__(self, stride=14, maps=1):
        super().__init__()
        self.patches = nn.Conv2d(3, 5, stride, stride=stride)
        self.halves = nn.ModuleList(nn.Conv2d(5, 5, 2, stride=2) for _ in range(maps - 1))
        self.feature_info = SimpleNamespace(
            reduction=lambda: [stride << step for step in range(maps)], channels=lambda: [5] * maps
        )

    def forward(self, x):
        found = [self.patches(x)]
        for half in self.halves:
            found.append(half(found[-1]))
        return found
