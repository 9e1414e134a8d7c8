"""Does a loss that forgives small shifts help where pairs are off register, beside or instead of ``register``?

    python benchmarks/shift_tolerance.py PAIRS --seeds 3 --output_dir DIR

PAIRS are registered by ``register`` first. Then the H&E of every training core is moved by a whole number of pixels, of
a given length and a random direction, and networks are trained on these pairs as they are, on the pairs after
``register``, and on either with the tolerant loss. It moves the target of each training patch to where it correlates
best with the prediction, by at most RADIUS pixels, from the second quarter of the training on. All are scored on the
held-out cores of the registered pairs, by their last weights. What is finished is kept in DIR: a stopped run goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from registration import SMALL, _he, _orion, _recipe, register, rows_of, score
from torch import Tensor

from orion_unet.cli.arguments import Parser, run_command
from orion_unet.config import TrainConfig
from orion_unet.data.split import GROUPS_FILE
from orion_unet.losses import CompositeLoss
from orion_unet.run_log import write_json
from orion_unet.training.loop import train

SHIFTS = (0, 2, 4, 8, 16)
ARMS = ("nothing", "register", "tolerant loss", "both")
# The shift at which the pairs are also registered.
REGISTERED_SHIFT = 8
# Of the search, and of what is cut from each side of a core, so that all shifts leave the same pixels of the markers.
RADIUS = 16
PATCH, PATCHES_PER_EPOCH, EPOCHS = 96, 480, 6


def main(argv: list[str]) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path, metavar="PAIRS", help="a folder of pairs with groups.csv")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="trainings of each kind; default: 3")
    parser.add_argument("--shifts", default=",".join(map(str, SHIFTS)), metavar="N,...", help="default: %(default)s")
    parser.add_argument("--output_dir", type=Path, required=True, metavar="DIR", help="where runs and pairs go")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    registered = options.output_dir / "registered"
    if not registered.exists():
        register(options.pairs, registered)
    shifts = [int(shift) for shift in options.shifts.split(",")]
    results = options.output_dir / "scores.json"
    scores: dict[str, float] = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}
    for seed in range(options.seeds):
        for shift in shifts:
            for arm in ARMS:
                key = f"{arm}/{shift}/{seed}"
                # Registered pairs are off by a twentieth of a pixel, whatever the shift was.
                wanted = arm in ("nothing", "tolerant loss") or shift == REGISTERED_SHIFT
                if wanted and key not in scores:
                    scores[key] = trained(registered, options.output_dir, arm, shift, seed)
                    write_json(results, scores)
                    print(f"{key}: {scores[key]:.3f}", file=sys.stderr, flush=True)
    print(table(scores, shifts, options.seeds))
    return 0


def trained(registered: Path, output: Path, arm: str, shift: int, seed: int) -> float:
    """Pearson on the held-out registered cores of a network trained on moved pairs."""
    held, cores = _held_out(registered, seed)
    moved = output / f"moved_{shift}_{seed}"
    if not moved.exists():
        move_cores(registered, moved, shift, seed)
    pairs = moved
    if arm in ("register", "both"):
        pairs = output / f"registered_{shift}_{seed}"
        if not pairs.exists():
            register(moved, pairs)
        kept = {row["core"] for row in rows_of(pairs) if row["state"] == "kept"}
        cores = {name: group for name, group in cores.items() if name in kept}
    sides: dict[str, list[str]] = {"train": [], "val": []}
    for name, group in sorted(cores.items()):
        sides["val" if group in held else "train"].append(name)
    run = output / f"run_{arm.replace(' ', '_')}_{shift}_{seed}"
    split = run.with_suffix(".split.json")
    write_json(
        split,
        {"schema": 1, **{side: [{"core": name, "group": cores[name]} for name in names]
                         for side, names in sides.items()}},
    )  # fmt: skip
    settings: dict[str, Any] = {
        **_recipe(), **SMALL, "patch_size": PATCH, "pairs_dir": str(pairs), "output_dir": str(run), "seed": seed,
        "epochs": EPOCHS, "split_file": str(split),
        "patches_per_image": max(1, PATCHES_PER_EPOCH // len(sides["train"])),
    }  # fmt: skip
    forgiving = tolerant_loss() if arm in ("tolerant loss", "both") else contextlib.nullcontext()
    with forgiving, contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        if train(TrainConfig.from_options(settings)) != 0:
            raise SystemExit(f"the training in {run} failed")
    return score(run, registered, [name for name, group in _groups(registered).items() if group in held])


def _groups(folder: Path) -> dict[str, str]:
    kept = {row["core"] for row in rows_of(folder) if row["state"] == "kept"}
    with open(folder / GROUPS_FILE, newline="", encoding="utf-8") as file:
        return {row["core"]: row["group"] for row in csv.DictReader(file) if row["core"] in kept}


def _held_out(folder: Path, seed: int) -> tuple[set[str], dict[str, str]]:
    """The groups held out, a third of them or each of two in turn, and the group of every core."""
    group = _groups(folder)
    groups = sorted(set(group.values()))
    order = np.random.default_rng(seed).permutation(len(groups))
    held = {groups[seed % 2]} if len(groups) == 2 else {groups[i] for i in order[: max(1, round(len(groups) / 3))]}
    return held, group


def move_cores(source: Path, target: Path, shift: int, seed: int) -> None:
    """Copies of the pairs in which the H&E of every core lies ``shift`` pixels off, in a direction of its own."""
    target.mkdir(parents=True)
    channels = len((source / "channel_names.txt").read_text(encoding="utf-8").split())
    random = np.random.default_rng(1000 + seed)
    for name in sorted(_groups(source)):
        angle = random.uniform(0, 2 * math.pi)
        dy, dx = round(shift * math.sin(angle)), round(shift * math.cos(angle))
        he, orion = _he(source, name), _orion(source, name, channels).transpose(1, 2, 0)
        height, width = he.shape[:2]
        rows, columns = slice(RADIUS, height - RADIUS), slice(RADIUS, width - RADIUS)
        shifted = he[RADIUS + dy : height - RADIUS + dy, RADIUS + dx : width - RADIUS + dx]
        np.save(target / f"{name}_HE.npy", np.ascontiguousarray(shifted))
        np.save(target / f"{name}_ORION.npy", np.ascontiguousarray(orion[rows, columns]))
    for name in ("channel_names.txt", GROUPS_FILE):
        (target / name).write_bytes((source / name).read_bytes())


@contextlib.contextmanager
def tolerant_loss() -> Iterator[None]:
    """Within this context, losses move every training target to its prediction first."""
    strict = CompositeLoss.forward
    steps = 0

    def forward(
        self: CompositeLoss, prediction: Tensor, target: Tensor, mask: Tensor | None = None, count: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        nonlocal steps
        steps += 1
        total = EPOCHS * PATCHES_PER_EPOCH // len(prediction)
        moves = best_moves(prediction.detach(), target) if steps > total / 4 else [(0, 0)] * len(prediction)
        inner = slice(RADIUS, prediction.shape[2] - RADIUS)
        prediction = prediction[:, :, inner, inner]
        target = torch.stack([_window(image, move) for image, move in zip(target, moves, strict=True)])
        if mask is not None:
            mask = torch.stack([_window(image, move) for image, move in zip(mask, moves, strict=True)])
        return strict(self, prediction, target, mask)

    CompositeLoss.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        CompositeLoss.forward = strict  # type: ignore[method-assign]


def _window(image: Tensor, move: tuple[int, int]) -> Tensor:
    """The inner part of an image (C, H, W), moved by (dy, dx)."""
    dy, dx = move
    height, width = image.shape[1:]
    return image[:, RADIUS + dy : height - RADIUS + dy, RADIUS + dx : width - RADIUS + dx]


def best_moves(prediction: Tensor, target: Tensor) -> list[tuple[int, int]]:
    """For each patch (B, C, H, W) the (dy, dx) within the radius at which the inner target correlates best, the
    covariances of all channels added in units of their standard deviations over the batch."""
    inner = slice(RADIUS, prediction.shape[2] - RADIUS)
    p = prediction[:, :, inner, inner].float()
    p = p - p.mean((2, 3), keepdim=True)
    t = target.float() - target.float().mean((2, 3), keepdim=True)
    p = p / (p.std((0, 2, 3), keepdim=True) + 0.01)
    t = t / (t.std((0, 2, 3), keepdim=True) + 0.01)
    side = target.shape[2]
    product = torch.fft.rfft2(t) * torch.fft.rfft2(p, s=(side, side)).conj()
    # Offsets 0 .. 2 · RADIUS of the inner prediction within the target: no window leaves it, so nothing wraps around.
    places = torch.fft.irfft2(product.sum(1), s=(side, side))[:, : 2 * RADIUS + 1, : 2 * RADIUS + 1]
    best = places.flatten(1).argmax(1)
    return [(int(i) // (2 * RADIUS + 1) - RADIUS, int(i) % (2 * RADIUS + 1) - RADIUS) for i in best]


def table(scores: dict[str, float], shifts: list[int], seeds: int) -> str:
    lines = [f"| shift [pixels] | {' | '.join(ARMS)} |", "| --- |" + " --- |" * len(ARMS)]
    for shift in shifts:
        cells = []
        for arm in ARMS:
            values = [scores[key] for seed in range(seeds) if (key := f"{arm}/{shift}/{seed}") in scores]
            each = ", ".join(f"{value:.3f}" for value in values)
            cells.append(f"{np.mean(values):.3f} ({each})" if values else "")
        lines.append(f"| {shift} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_command(main))
