"""Error rates of the test for camera noise: noise kept as signal, and rare cells mistaken for noise.

    python benchmarks/noise_channels.py                       # 1,000 channels of each kind, about half an hour
    python benchmarks/noise_channels.py --channels 20         # a look

Noise is normal, of photons, or resampled (neighbours alike), with a standard deviation of 3 to 100 counts on 100 to
1,000, another level in every core, and hot pixels. Rare cells cover 0.05 % of the pixels: round, 6 to 14 pixels wide,
3 to 30 standard deviations of the noise high. The sets have 3 to 20 cores of 512 or 1,024 pixels, and rows are sampled
as the normalisation samples them: 2 million pixels of a set.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from orion_unet.cli.arguments import Parser, run_command
from orion_unet.data.camera_noise import NoiseEvidence, look_for_noise
from orion_unet.data.normalization import SAMPLED_PIXELS

KINDS = ("normal", "photons", "resampled")
SETS = ((3, 512), (8, 512), (20, 512), (6, 1024))
COVERED = 5e-4
HOT = 1.2e-5


def main(argv: list[str]) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=1000, metavar="N", help="of each kind; default: 1000")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    options = parser.parse_args(argv)
    rng = np.random.default_rng(options.seed)
    wrong = dict.fromkeys(((kind, rare) for kind in KINDS for rare in (False, True)), 0)
    seen = dict.fromkeys(wrong, 0)
    for _ in range(options.channels):
        kind = KINDS[rng.integers(len(KINDS))]
        for rare in (False, True):
            seen[kind, rare] += 1
            wrong[kind, rare] += judged_noise(rng, kind, rare) == rare
    print(f"{'noise':<12}{'channels':>10}{'noise kept':>14}{'rare cells lost':>18}")
    for kind in KINDS:
        print(f"{kind:<12}{seen[kind, False]:>10}{wrong[kind, False]:>14}{wrong[kind, True]:>18}")
    for rare, name in ((False, "noise kept"), (True, "rare cells lost")):
        print(f"{name}: {sum(wrong[kind, rare] for kind in KINDS) / options.channels:.2%}")
    return 0


def judged_noise(rng: np.random.Generator, kind: str, rare: bool) -> bool:
    """Whether one generated channel, with or without rare cells, counts as noise."""
    sd = np.exp(rng.uniform(np.log(3), np.log(100)))
    level = rng.uniform(max(100, 4 * sd), 1000)
    height, width = np.exp(rng.uniform(np.log(3), np.log(30))), rng.uniform(6, 14)
    cores, side = SETS[rng.integers(len(SETS))]
    evidence: NoiseEvidence | None = None
    for _ in range(cores):
        count = min(side, -(-SAMPLED_PIXELS // cores // side))
        # Only the rows that are read: the others decide nothing.
        edges = np.linspace(0, side, count + 1)
        rows = (edges[:-1] + rng.random(count) * np.diff(edges)).astype(int)
        image = noise(rng, kind, sd, level + rng.uniform(0, 20), side)[rows]
        if rare:
            image += height * sd * cells(rng, side, width)[rows]
        stored = np.clip(np.rint(image), 0, 65535).astype(np.float32) / 65535
        found = look_for_noise(stored[None])
        evidence = found if evidence is None else evidence.joined(found)
    assert evidence is not None
    return bool(evidence.noise[0])


def noise(rng: np.random.Generator, kind: str, sd: float, level: float, side: int) -> np.ndarray:
    """Camera noise (side, side) in counts."""
    if kind == "photons":
        gain = sd * sd / level
        image = rng.poisson(level / gain, (side, side)) * gain
    else:
        white = rng.standard_normal((side, side), dtype=np.float32)
        if kind == "resampled":
            white = ndimage.gaussian_filter(white, 0.6)
            white /= white.std()
        image = level + sd * white
    hot = rng.integers(0, side, (2, max(3, round(HOT * side * side))))
    image[tuple(hot)] += rng.uniform(50, 3000, hot.shape[1])
    return image


def cells(rng: np.random.Generator, side: int, width: float) -> np.ndarray:
    """Round cells of height about 1 (side, side) that cover ``COVERED`` of the pixels on average."""
    image = np.zeros((side, side), np.float32)
    half = int(width) + 1
    rows, columns = np.ogrid[-half : half + 1, -half : half + 1]
    cell = np.clip(width / 2 - np.hypot(rows, columns) + 0.5, 0, 1)
    for _ in range(rng.poisson(COVERED * side * side / (np.pi * width**2 / 4))):
        y, x = rng.integers(half, side - half, 2)
        image[y - half : y + half + 1, x - half : x + half + 1] += rng.uniform(0.7, 1.3) * cell
    return image


if __name__ == "__main__":
    sys.exit(run_command(main))
