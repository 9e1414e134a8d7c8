"""Does registration find the displacement of the H&E and reject what does not match, and does training gain from it?

    python benchmarks/registration.py                                  # generated tissue, moved by known amounts
    python benchmarks/registration.py --pairs DIR [DIR ...]            # real pairs too: before, after, strangers
    python benchmarks/registration.py --pairs DIR ... --train --seeds 3  # and trainings on raw and registered pairs
    python benchmarks/registration.py --pairs DIR ... --train --launcher --seeds 6 --only real  # at the launcher's size

Generated tissue gives the error, because the truth is known; real pairs show how often matches are found, right and
wrong ones. Trainings hold out whole groups (a third of them, drawn by the seed) and are scored on
the held-out cores, raw and registered; a model of either kind is scored on both.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from orion_unet.__main__ import dispatch
from orion_unet.cli.arguments import Parser, run_command
from orion_unet.config import TrainConfig
from orion_unet.data.split import GROUPS_FILE
from orion_unet.demo.make import draw_core
from orion_unet.inference.model import load_trained
from orion_unet.registration.coarse import _orientations, find_coarse
from orion_unet.registration.fine import refine
from orion_unet.registration.stains import haematoxylin
from orion_unet.registration.transform import Affine, Field, move
from orion_unet.run_log import write_json
from orion_unet.training.loop import train

SIDE = 512
# Small enough for a dozen trainings on two cores.
SMALL: dict[str, Any] = {
    "base_features": 8, "depth": 3, "patch_size": 64, "num_workers": 0, "gpus": 0, "sanity_check_freq": 0,
    "patches_per_image_val": 4, "resume": "auto",
}  # fmt: skip
PATCHES_PER_EPOCH, EPOCHS = 800, 8
# The launcher's recipe as it is, but for patches that fit a core, and no end chosen on the cores that score.
LAUNCHER: dict[str, Any] = {
    "patch_size": 128, "num_workers": 0, "gpus": 0, "sanity_check_freq": 0, "early_stopping_patience": 0,
    "patches_per_image_val": 1, "resume": "auto",
}  # fmt: skip


def main(argv: list[str]) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, nargs="+", default=[], metavar="DIR", help="real pairs; default: none")
    parser.add_argument("--cores", type=int, default=20, metavar="N", help="generated cores per row; default: 20")
    parser.add_argument("--strangers", type=int, default=100, metavar="N", help="foreign pairs; default: 100")
    parser.add_argument("--train", action="store_true", help="also train on the real pairs, raw and registered")
    parser.add_argument("--launcher", action="store_true", help="train the launcher's network, as long as it does")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="trainings of each kind; default: 3")
    parser.add_argument("--only", choices=["real"], help="leave out the generated tissue")
    parser.add_argument("--output_dir", type=Path, metavar="DIR", help="keep registered pairs and runs; default: no")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(f"{os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}\n")
    if options.only != "real":
        print(generated(options.cores))
        print(strangers(options.strangers))
    with contextlib.ExitStack() as stack:
        output = options.output_dir or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="registration_")))
        for index, folder in enumerate(options.pairs):
            name = f"{index}_{folder.resolve().name}"
            print(real(folder, output / name))
            if options.train:
                print(trained(folder, output / name, options.seeds, options.launcher))
    return 0


def density(he: np.ndarray) -> np.ndarray:
    return haematoxylin(he.astype(np.float32) / 255)


def tissue(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """H&E (SIDE, SIDE, 3) uint8 and nuclear marker (SIDE, SIDE) float32 of a generated core."""
    he, orion = draw_core(seed, SIDE)
    return he, (orion if orion.shape[-1] == 20 else orion.transpose(1, 2, 0))[..., 0].astype(np.float32)


def displaced(
    he: np.ndarray, rng: np.random.Generator, degrees: float, scale: float, shift: float, warp: float, turn: int
) -> tuple[np.ndarray, Affine, Field, int]:
    """The H&E moved by random amounts up to these; the map from its points to those of the original, affine after
    field."""
    side = round(SIDE * scale)
    angle = np.radians(rng.uniform(-degrees, degrees))
    turned = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    centre = np.full(2, (SIDE - 1) / 2)
    offset = np.full(2, (side - 1) / 2) + rng.uniform(-shift, shift, 2) * scale
    upright = Affine(np.column_stack([turned, offset - turned @ centre]))
    _, orientation = _orientations((side, side))[turn]
    truth = upright.then(orientation)
    nodes = rng.normal(size=(4, 4, 2))
    bend = Field(nodes * warp * scale / max(np.linalg.norm(nodes, axis=-1).max(), 1e-9), 0.0, (side - 1) / 3)
    made, _ = move(reader(he), (SIDE, SIDE), truth.inverse(), bend, (0, 0, side, side))
    return made, truth.inverse(), bend, side


def reader(image: np.ndarray) -> Any:
    return lambda y, x, height, width: image[y : y + height, x : x + width]


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "nothing": ("register", {"degrees": 0, "scale": 1, "shift": 0, "warp": 0}),
    "shift to 40": ("register", {"degrees": 0, "scale": 1, "shift": 40, "warp": 0}),
    "shift to 20, turn to 1°, warp to 4": ("register", {"degrees": 1, "scale": 1, "shift": 20, "warp": 4}),
    "any quarter turn and mirror, shift to 100, turn to 5°": (
        "whole", {"degrees": 5, "scale": 1, "shift": 100, "warp": 0},
    ),
    "the same, scale 0.5": ("whole", {"degrees": 5, "scale": 0.5, "shift": 100, "warp": 0}),
    "the same, scale 2": ("whole", {"degrees": 5, "scale": 2, "shift": 100, "warp": 0}),
    "the same, scale 1, warp to 4": ("whole", {"degrees": 5, "scale": 1, "shift": 100, "warp": 4}),
}  # fmt: skip


def generated(cores: int) -> str:
    """Errors on generated tissue whose displacement is known."""
    lines = [
        f"## Generated tissue, {cores} cores of {SIDE} pixels a row [pixels of the markers]", "",
        "| displacement | kept | error, median | error, 95 % | residual stated, median | 95 % | s per core |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for name, (how, amounts) in CASES.items():
        errors, stated, kept, began = [], [], 0, time.perf_counter()
        for seed in range(cores):
            he, marker = tissue(1000 + seed)
            rng = np.random.default_rng(seed)
            made, back, bend, side = displaced(he, rng, **amounts, turn=seed % 8 if how == "whole" else 0)
            affine = Affine.identity()
            if how == "whole":
                found = find_coarse(density(made), marker, amounts["scale"])
                if not found.trusted:
                    continue
                affine = found.affine
                made, _ = move(reader(made), (side, side), affine, None, (0, 0, SIDE, SIDE))
            fine = refine(density(made), marker)
            if not fine.trusted:
                continue
            kept += 1
            points = np.stack(np.meshgrid(*[np.arange(40.0, SIDE - 40, 24)] * 2, indexing="ij"), -1).reshape(-1, 2)
            field = 0.0 if fine.field is None else fine.field.of(points)
            seen = affine.points(fine.affine.points(points + field))
            within = ((seen >= 0) & (seen <= side - 1)).all(1)
            errors.append(np.linalg.norm(back.points(seen + bend.of(seen)) - points, axis=1)[within])
            stated.append((fine.residual_px, fine.residual_95_px))
        seconds = (time.perf_counter() - began) / cores
        every = np.concatenate(errors) if errors else np.array([np.nan])
        middle, high = np.nanmedian(np.array(stated or [(np.nan, np.nan)]), axis=0)
        lines.append(
            f"| {name} | {kept}/{cores} | {np.median(every):.2f} | {np.quantile(every, 0.95):.2f} | {middle:.2f} | "
            f"{high:.2f} | {seconds:.1f} |"
        )
    return "\n".join([*lines, ""])


def strangers(count: int) -> str:
    """How often an alignment is found between images of different tissue."""
    fine, coarse = 0, 0
    for seed in range(count):
        he, (_, marker) = tissue(2000 + seed)[0], tissue(5000 + seed)
        fine += refine(density(he), marker).trusted
        coarse += find_coarse(density(he), marker).trusted
    return (
        f"Of {count} pairs of different generated tissue, {fine} were kept by the alignment of a region, {coarse} by "
        "that of a whole slide.\n"
    )


def rows_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "registration.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def register(source: Path, output: Path) -> list[dict[str, str]]:
    with contextlib.redirect_stdout(io.StringIO()):
        code = run_command(dispatch, ["register", str(source), "--output_dir", str(output), "--jobs", "1"])
    if code not in (0, 2):
        raise SystemExit(code)
    return rows_of(output)


def real(folder: Path, output: Path) -> str:
    """Real pairs before and after, and their foreign and mirrored versions."""
    began = time.perf_counter()
    rows = register(folder, output / "registered")
    seconds = (time.perf_counter() - began) / len(rows)
    kept = [row for row in rows if row["state"] == "kept"]
    shifts = [float(np.hypot(float(row["shift_down"]), float(row["shift_right"]))) for row in kept]
    columns = {name: [float(row[name]) for row in kept if row[name]] for name in
               ("correlation_before", "correlation", "residual_px", "residual_95_px")}  # fmt: skip
    lines = [f"## {folder.resolve().name}: {len(rows)} real pairs", "",
             "| kept | shift, median and largest | r before | r after | residual, median | 95 % | s per core |",
             "| --- | --- | --- | --- | --- | --- | --- |",
             f"| {len(kept)} | {median(shifts):.1f}, {max(shifts):.1f} | {median(columns['correlation_before']):.3f} | "
             f"{median(columns['correlation']):.3f} | {median(columns['residual_px']):.2f} | "
             f"{median(columns['residual_95_px']):.2f} | {seconds:.1f} |", ""]  # fmt: skip
    names = [row["core"] for row in rows]
    nuclear = _nuclear(folder)
    wrong = {"foreign": 0, "mirrored": 0}
    for index, name in enumerate(names):
        marker = _marker(folder, name, nuclear)
        other = density(_he(folder, names[(index + len(names) // 2) % len(names)]))
        own = density(_he(folder, name))[:, ::-1]
        for kind, image in (("foreign", other), ("mirrored", own)):
            if image.shape == marker.shape:
                wrong[kind] += refine(np.ascontiguousarray(image), marker).trusted
    lines.append(
        f"With the H&E of another pair, {wrong['foreign']} of {len(names)} were kept; with their own, mirrored, "
        f"{wrong['mirrored']}.\n"
    )
    return "\n".join(lines)


def _nuclear(folder: Path) -> int:
    from orion_unet.data.channels import nuclear_channel

    found = nuclear_channel((folder / "channel_names.txt").read_text(encoding="utf-8").split("\n"))
    return 0 if found is None else found


def _he(folder: Path, name: str) -> np.ndarray:
    image = np.load(folder / f"{name}_HE.npy", allow_pickle=False)
    return image if image.shape[-1] == 3 else image.transpose(1, 2, 0)


def _orion(folder: Path, name: str, channels: int) -> np.ndarray:
    image = np.load(folder / f"{name}_ORION.npy", allow_pickle=False)
    return image.transpose(2, 0, 1) if image.shape[-1] == channels else image


def _marker(folder: Path, name: str, nuclear: int) -> np.ndarray:
    channels = len((folder / "channel_names.txt").read_text(encoding="utf-8").split())
    return _orion(folder, name, channels)[nuclear].astype(np.float32)


def trained(folder: Path, output: Path, seeds: int, launcher: bool) -> str:
    """Correlation on held-out groups of models trained on raw and on registered pairs, scored on both."""
    registered = output / "registered"
    kept = {row["core"] for row in rows_of(registered) if row["state"] == "kept"}
    with open(folder / GROUPS_FILE, newline="", encoding="utf-8") as file:
        group = {row["core"]: row["group"] for row in csv.DictReader(file) if row["core"] in kept}
    # The same cores in both, so that only the registration differs.
    raw = output / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for name in kept:
        for kind in ("HE", "ORION"):
            link = raw / f"{name}_{kind}.npy"
            if not link.exists():
                link.symlink_to((folder / link.name).resolve())
    for name in ("channel_names.txt", GROUPS_FILE):
        (raw / name).write_bytes((folder / name).read_bytes())
    groups = sorted(set(group.values()))
    found: dict[tuple[str, str], list[float]] = {}
    for seed in range(seeds):
        order = np.random.default_rng(seed).permutation(len(groups))
        held = {groups[index] for index in order[: max(1, round(len(groups) / 3))]}
        if len(groups) == 2:
            held = {groups[seed % 2]}
        cores = {side: sorted(name for name, of in group.items() if (of in held) == (side == "val"))
                 for side in ("train", "val")}  # fmt: skip
        document = {"schema": 1, **{side: [{"core": name, "group": group[name]} for name in names]
                                    for side, names in cores.items()}}  # fmt: skip
        write_json(output / f"split_{seed}.json", document)
        for kind, pairs in (("raw", raw), ("registered", registered)):
            run = output / f"run_{kind}_{seed}"
            settings = {
                **_recipe(), "pairs_dir": str(pairs), "output_dir": str(run), "seed": seed,
                "split_file": str(output / f"split_{seed}.json"), **(LAUNCHER if launcher else SMALL),
            }  # fmt: skip
            if not launcher:
                settings |= {"epochs": EPOCHS, "patches_per_image": max(1, PATCHES_PER_EPOCH // len(cores["train"]))}
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                if train(TrainConfig.from_options(settings)) != 0:
                    raise SystemExit(f"the training in {run} failed")
            for scored, where in (("raw", raw), ("registered", registered)):
                found.setdefault((kind, scored), []).append(score(run, where, cores["val"]))
                print(f"seed {seed}, {kind} on {scored}: {found[kind, scored][-1]:.3f}", file=sys.stderr, flush=True)
    lines = ["| trained on | scored on raw | scored on registered |", "| --- | --- | --- |"]
    for kind in ("raw", "registered"):
        cells = [f"{np.mean(found[kind, scored]):.3f} ({', '.join(f'{value:.3f}' for value in found[kind, scored])})"
                 for scored in ("raw", "registered")]  # fmt: skip
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    how = "each group held out in turn" if len(groups) == 2 else "a third of the groups held out"
    status = json.loads((run / "status.json").read_text(encoding="utf-8"))
    steps = status["epochs"] * status["steps_per_epoch"]
    title = f"Pearson on held-out cores, mean over markers and {seeds} seeds ({how}; about {steps} steps):"
    return "\n".join([title, "", *lines, ""])


def _recipe() -> dict[str, Any]:
    from orion_unet.recipes import RECIPES

    return RECIPES["stable"].values


def score(run: Path, folder: Path, names: list[str]) -> float:
    """Mean over markers of Pearson's r over all pixels of these cores, by the last weights: nothing was chosen on
    them."""
    model = load_trained(run / "checkpoints" / "last.pt", "cpu")
    channels = len(model.names)
    sums = np.zeros((6, channels))
    for name in names:
        he = torch.from_numpy(np.ascontiguousarray(_he(folder, name).transpose(2, 0, 1), np.float32))[None] / 255
        predicted = model.predict(he)[0].double().numpy().reshape(channels, -1)
        measured = _orion(folder, name, channels).astype(float).reshape(channels, -1)
        sums += np.stack([np.full(channels, measured.shape[1]), predicted.sum(1), measured.sum(1),
                          (predicted**2).sum(1), (measured**2).sum(1), (predicted * measured).sum(1)])  # fmt: skip
    n, p, t, pp, tt, pt = sums
    with np.errstate(invalid="ignore", divide="ignore"):
        r = (n * pt - p * t) / np.sqrt((n * pp - p * p) * (n * tt - t * t))
    return float(np.nanmean(r))


if __name__ == "__main__":
    sys.exit(run_command(main))
