"""Sums over the pixels of each patch, from which metrics and loss terms follow: one set of passes for both.

The passes are in float32. Every square is that of a value minus a centre of its patch and channel, so that no digits
cancel; short stretches are added in float32, their sums in float64. Compared with float64 throughout, sums are right
to a relative 1e-6 and mean structural similarities to an absolute 1e-6, usually to 1e-8. The exception are images of
a few grey levels, such as masks of 0 and 1: they round alike wherever they are alike, and the similarity of a single
patch may be off by 3e-5.
"""

from __future__ import annotations

import functools
import math
import os
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2
# Rows, and columns, of a patch that are the centre of no whole window.
MARGIN = SSIM_WINDOW - 1
_BELL = [math.exp(-0.5 * ((index - MARGIN / 2) / SSIM_SIGMA) ** 2) for index in range(SSIM_WINDOW)]


def _taps() -> tuple[float, ...]:
    """The window along one axis, as float32 numbers whose sum is exactly 1.

    Where an image is flat, its variance is its mean square minus its squared mean; with another sum, both would not
    cancel.
    """
    taps = torch.tensor([value / math.fsum(_BELL) for value in _BELL], dtype=torch.float32).double()
    # The outermost taps are the smallest, so that they take up the smallest differences.
    for end in (0, -1):
        taps[end] = (taps[end] + (1 - taps.sum()) / (2 if end == 0 else 1)).float().double()
    return tuple(taps.tolist())


TAPS = _taps()

# Values of one map that are filtered at once, and that all other operations work on at once. On a CPU the second fit
# its caches; a GPU wants few large pieces of work.
FILTERED_VALUES = {"cpu": 2**22, "cuda": 2**23}
CACHED_VALUES = {"cpu": 2**19, "cuda": 2**23}
# Rows of a Gaussian mean that one product of matrices gives.
PRODUCT_ROWS = 8
# The centre of a patch is the mean of every eighth row.
CENTRE_ROWS = 8
# Neighbouring pixels that are added up side by side, to fill the processor's vectors: at most so many.
SUM_PIXELS = 16


class PatchSums(NamedTuple):
    """Sums over the pixels of prediction p, target t and e = p − t for each patch and channel, float64 (B, C) each.

    ``ssim`` is the patch's mean SSIM and ``ssim_patches`` 1; both are 0 where it is smaller than the window.
    ``masked`` is Σe² over a mask and ``masked_pixels`` the number of its pixels; both are 0 without a mask.
    """

    pixels: Tensor
    p: Tensor
    t: Tensor
    pp: Tensor
    tt: Tensor
    pt: Tensor
    absolute: Tensor
    squared: Tensor
    ssim: Tensor
    ssim_patches: Tensor
    absolute_3: Tensor
    absolute_5: Tensor
    absolute_7: Tensor
    masked: Tensor
    masked_pixels: Tensor

    def where(self, measured: Tensor) -> PatchSums:
        """The same with nothing summed, not even a pixel, where ``measured`` (B, C) bool is False."""
        return PatchSums(*(torch.where(measured, values, 0.0) for values in self))


@torch.no_grad()
def patch_sums(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> PatchSums:
    """The sums of every patch of a batch; never waits for the device.

    Args:
        prediction, target: (B, C, H, W) in [0, 1]; fastest with the channels last in memory.
        mask: (B, 1, H, W), bool or float in [0, 1].

    SSIM is that of Wang et al., IEEE Transactions on Image Processing 13(4), 2004: Gaussian window 11 × 11 of sigma
    1.5, K1 0.01, K2 0.03, data range 1, covariances over the weighted window, over the pixels whose window lies inside
    the patch. Raises ValueError when the shapes differ.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape")
    batch, *patch = prediction.shape
    device = prediction.device.type
    at_once = max(1, CACHED_VALUES[device] // math.prod(patch))
    parts = [slice(first, first + at_once) for first in range(0, batch, at_once)]

    # Autocast and gradients are switched off per thread, so it has to happen here.
    @torch.no_grad()
    def sums(part: slice) -> Tensor:
        with torch.autocast(device, enabled=False):
            return _Patches(prediction[part], target[part], None if mask is None else mask[part]).sums()

    threads = torch.get_num_threads() if device == "cpu" else 1
    spread = _threads(threads).map if min(threads, len(parts)) > 1 else map
    return PatchSums(*torch.cat(list(spread(sums, parts)), dim=1))


@functools.cache
def _threads(count: int) -> ThreadPoolExecutor:
    """Threads that each run torch's operations alone.

    The passes are many short operations. Dividing each of them among threads takes longer than dividing the patches,
    because sleeping threads have to be woken for every operation.
    """
    started = Barrier(count + 1)

    def start() -> None:
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(count, "patch sums")
    waiting = [pool.submit(start) for _ in range(count)]
    started.wait()
    for future in waiting:
        future.result()
    # A running thread keeps its own number, but threads that start later inherit the last one set by any thread.
    torch.set_num_threads(count)
    return pool


# A forked process has none of its parent's threads.
os.register_at_fork(after_in_child=_threads.cache_clear)


class _Patches:
    """A few patches (b, C, H, W), worked on band by band. Their maps are (b, rows, W · C)."""

    def __init__(self, prediction: Tensor, target: Tensor, mask: Tensor | None) -> None:
        self.images = prediction, target
        self.mask = mask
        self.samples, self.channels, self.height, self.width = prediction.shape
        # (b, C), and repeated for the pixels of a row (b, 1, W · C).
        self.centres = [image[:, :, ::CENTRE_ROWS].float().mean((2, 3)) for image in self.images]
        self.wide_centres = [centre.repeat(1, self.width)[:, None] for centre in self.centres]

    def sums(self) -> Tensor:
        """The fields of PatchSums, (15, b, C)."""
        device = self.centres[0].device.type
        row_values = self.samples * self.width * self.channels
        rows = min(self.height, max(2 * MARGIN, FILTERED_VALUES[device] // row_values))
        step = max(1, CACHED_VALUES[device] // row_values)
        whole_windows = min(self.height, self.width) >= SSIM_WINDOW
        maps = self.centres[0].new_empty(4, self.samples, rows, self.width * self.channels)
        moments, masked, ssim = [], [], []
        done = 0
        for first in range(0, max(1, self.height - MARGIN), max(1, rows - MARGIN)):
            last = min(first + rows, self.height)
            if first:
                maps[:, :, :MARGIN] = maps[:, :, -MARGIN:]
            for top in range(done, last, step):
                band = slice(top, min(top + step, last))
                sums, squared = self._moments(band, maps[:, :, band.start - first : band.stop - first])
                moments.append(sums)
                if self.mask is not None:
                    masked.append(self._masked(band, squared))
            done = last
            if whole_windows:
                ssim += self._ssim(maps[:, :, : last - first], step)
        return self._about_zero(*(self._finished(parts) for parts in (moments, ssim, masked)))

    def _moments(self, band: slice, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Unfinished sums (10, b, ·) of some rows, and their squared error as a map.

        Writes the four ``maps`` that SSIM filters: a and b, which are p and t about their centres, half of a² + b², ab.
        """
        p, t = (image[:, :, band].float().permute(0, 2, 3, 1).flatten(2) for image in self.images)
        a, b, squares, product = maps
        torch.sub(p, self.wide_centres[0], out=a)
        torch.sub(t, self.wide_centres[1], out=b)
        torch.mul(a, a, out=squares)
        torch.mul(b, b, out=product)
        sums = [*self._unfinished(maps)]
        squares.lerp_(product, 0.5)
        sums.append(self._unfinished(torch.mul(a, b, out=product)))
        error = p - t
        squared = error * error
        error.abs_()
        sums += [self._unfinished(error), self._unfinished(squared)]
        sums += [self._unfinished(error.mul_(squared)) for _ in range(3)]
        return torch.stack(sums), squared

    def _masked(self, band: slice, values: Tensor) -> Tensor:
        """Unfinished sum (b, C) of a map over the mask."""
        assert self.mask is not None
        mask = self.mask[:, 0, band].float().reshape(-1, 1, self.width)
        by_row = torch.bmm(mask, values.reshape(-1, self.width, self.channels))
        return by_row.view(self.samples, -1, self.channels).sum(1)

    def _ssim(self, maps: Tensor, step: int) -> list[Tensor]:
        """Unfinished sums (b, ·) of the SSIM over the windows inside the ``maps`` (4, b, rows, W · C)."""
        filtered = _window_means(maps.flatten(0, 1), self.channels).unflatten(0, (4, -1))
        wide_p, wide_t = (centre[..., : filtered.shape[3]] for centre in self.wide_centres)
        half_c1, half_c2 = (wide_p.new_full((), constant / 2) for constant in (SSIM_C1, SSIM_C2))
        found = []
        for a, b, variance, covariance in filtered.split(step, dim=2):
            # Both halves of the fraction are a quarter of what they are in the paper.
            variance += torch.addcmul(half_c2, a, a, value=-0.5).addcmul_(b, b, value=-0.5)
            covariance += torch.addcmul(half_c2, a, b, value=-1)
            a += wide_p
            b += wide_t
            numerator = torch.addcmul(half_c1, a, b).mul_(covariance)
            denominator = torch.addcmul(half_c1, a, a, value=0.5, out=a).addcmul_(b, b, value=0.5).mul_(variance)
            found.append(self._unfinished(numerator.div_(denominator)))
        return found

    def _unfinished(self, maps: Tensor) -> Tensor:
        """Float32 sums of maps (..., rows, columns · C) over all but a few neighbouring columns: (..., columns · C)."""
        side_by_side = math.gcd(maps.shape[-1] // self.channels, SUM_PIXELS)
        return maps.flatten(-2).unflatten(-1, (-1, side_by_side * self.channels)).sum(-2)

    def _finished(self, parts: list[Tensor]) -> Tensor:
        """Unfinished sums of several bands (..., b, columns · C), added: float64 (..., b, C)."""
        if not parts:
            return torch.zeros_like(self.centres[0], dtype=torch.float64)
        return torch.stack(parts).double().sum(0).unflatten(-1, (-1, self.channels)).sum(-2)

    def _about_zero(self, moments: Tensor, ssim: Tensor, masked: Tensor) -> Tensor:
        """The fields of PatchSums, from moments about the centres."""
        a, b, aa, bb, ab, *errors = moments
        absolute, squared, *powers = errors
        centre_p, centre_t = (centre.double() for centre in self.centres)
        pixels = torch.full_like(a, self.height * self.width)
        windows = max(0, self.height - MARGIN) * max(0, self.width - MARGIN)
        masked_pixels = torch.zeros_like(a)
        if self.mask is not None:
            masked_pixels += self.mask.sum((1, 2, 3), dtype=torch.float64)[:, None]
        return torch.stack(
            [
                pixels,
                a + pixels * centre_p,
                b + pixels * centre_t,
                aa + centre_p * (2 * a + pixels * centre_p),
                bb + centre_t * (2 * b + pixels * centre_t),
                ab + centre_p * b + centre_t * (a + pixels * centre_p),
                absolute,
                squared,
                ssim / max(1, windows),
                torch.full_like(a, windows > 0),
                *powers,
                masked,
                masked_pixels,
            ]
        )


def _window_means(maps: Tensor, channels: int) -> Tensor:
    """Gaussian means of (b, rows, W · C) over the windows inside: (b, rows − 10, (W − 10) · C)."""
    images = maps.unflatten(-1, (-1, channels)).permute(0, 3, 1, 2)
    if images.device.type == "cpu" and torch.backends.mkldnn.is_available():
        taps = torch.tensor(TAPS).repeat(channels, 1)[:, None, None]
        across = F.conv2d(images, taps, groups=channels).permute(0, 2, 3, 1).flatten(2)
        return _down_columns(across)
    # Shifted sums are out of reach of TF32, and of slow convolutions where oneDNN is missing.
    for axis in (3, 2):
        size = images.shape[axis] - MARGIN
        shifted = [images.narrow(axis, offset, size) for offset in range(SSIM_WINDOW)]
        images = shifted[0] * TAPS[0]
        for image, tap in zip(shifted[1:], TAPS[1:], strict=True):
            images.add_(image, alpha=tap)
    return images.permute(0, 2, 3, 1).flatten(2)


def _down_columns(maps: Tensor) -> Tensor:
    """Gaussian means of (b, rows, columns) along the rows: (b, rows − 10, columns).

    As products with a band matrix, a few rows at a time: on a CPU faster than a convolution of every column. All have
    the same number of rows, as products of fewer may differ in the last bit with the number of threads; so the last one
    gives some rows again.
    """
    samples, rows, columns = maps.shape
    if rows < PRODUCT_ROWS + MARGIN:
        return _down_columns(F.pad(maps, (0, 0, 0, PRODUCT_ROWS + MARGIN - rows)))[:, : rows - MARGIN]
    found = maps.new_empty(samples, rows - MARGIN, columns)
    band = maps.new_zeros(PRODUCT_ROWS, PRODUCT_ROWS + MARGIN)
    for row in range(PRODUCT_ROWS):
        band[row, row : row + SSIM_WINDOW] = maps.new_tensor(TAPS)
    for source, means in zip(maps, found, strict=True):
        for start in range(0, rows - MARGIN, PRODUCT_ROWS):
            first = min(start, rows - MARGIN - PRODUCT_ROWS)
            rows_seen = source[first : first + PRODUCT_ROWS + MARGIN]
            torch.mm(band, rows_seen, out=means[first : first + PRODUCT_ROWS])
    return found
