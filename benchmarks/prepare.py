"""From slides to pairs to a prediction that lies on its slide: errors, time, memory.

    python benchmarks/prepare.py                                   # slides of 4096 pixels: errors, speed, memory
    python benchmarks/prepare.py --side 2048 4096 8192 --regions 4    # memory against the size of a slide
    python benchmarks/prepare.py --side 12000 --whole_way          # two slides to pairs, a model, a third predicted

Makes slides of the demo's tissue as tiled OME-TIFF pyramids: discs of tissue on glass, the H&E turned, shifted and
scaled by known amounts. ``prepare`` runs as the command does with one job, in a process of its own, whose peak memory
is read (VmHWM). The errors are the shifts of blocks of every pair's H&E against the H&E as it was drawn.

Speed is measured in processor time, which other work on the machine changes little, against plain reading and writing:
the same regions of the same two files, through the same readers, written with ``numpy.save`` in the same dtype and
order. It has neither a registration nor an fsync.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from orion_unet.cli.arguments import Parser, run_command
from orion_unet.demo.make import MARKERS, draw_core
from orion_unet.registration.transform import Affine, move

ROOT = Path(__file__).resolve().parents[1]
# Side of a tile of the files and of a disc of tissue [pixels], and the markers that the slides have.
TILE, DISC = 512, 1024
UM = 0.325
# Factor from one level of a pyramid to the next, and how many smaller levels there are.
SMALLER, LEVELS = 4, 2
# What the time of prepare is spent on, by the functions of orion_unet.preparation.prepare.
STAGES = {"plan_slide": "planning", "prepare_region": "regions", "write_overview": "overviews"}


def main(argv: list[str]) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, nargs="+", default=[4096], metavar="N",
                        help="pixels of a slide, one or more; default: 4096")  # fmt: skip
    parser.add_argument("--markers", type=int, default=len(MARKERS), metavar="N",
                        help=f"markers of a slide; default: {len(MARKERS)}")  # fmt: skip
    parser.add_argument("--flat", action="store_true", help="slides without a pyramid")
    parser.add_argument("--regions", type=int, default=12, metavar="N", help="regions per slide; default: 12")
    parser.add_argument("--whole_way", action="store_true", help="also train, and predict a third slide")
    parser.add_argument("--output_dir", type=Path, metavar="DIR", help="keep everything here; default: nowhere")
    options = parser.parse_args(argv)
    print(f"{os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}\n")
    for side in options.side:
        with contextlib.ExitStack() as stack:
            output = options.output_dir or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="prepare_")))
            output = output / str(side)
            output.mkdir(parents=True, exist_ok=True)
            began = time.perf_counter()
            names = ("one", "two", "three") if options.whole_way else ("one", "two")
            slides = [Slide(output, name, side, seed, options) for seed, name in enumerate(names)]
            print(f"## {len(slides)} slides of {side:,} x {side:,} pixels, {options.markers} markers"
                  f"{', no pyramid' if options.flat else ''}: {time.perf_counter() - began:.0f} s to make\n"
            )  # fmt: skip
            pairs = prepared(slides[:2], output, options.regions)
            if options.whole_way:
                whole_way(pairs, slides[2], output)
    return 0


class Slide:
    """A generated slide: its files, and the map from points of the markers to those of the H&E."""

    def __init__(self, folder: Path, name: str, side: int, seed: int, options: argparse.Namespace) -> None:
        self.name, self.side = name, side
        self.markers, self._levels = options.markers, 0 if options.flat else LEVELS
        rng = np.random.default_rng(seed)
        drawn = [draw_core(100 * seed + index, DISC) for index in range(3)]
        self._he = [he for he, _ in drawn]
        self._orion = [(o if o.shape[-1] == len(MARKERS) else o.transpose(1, 2, 0))[..., : self.markers]
                       for _, o in drawn]  # fmt: skip
        lattice = side // DISC
        self._which = rng.integers(0, len(drawn), (lattice, lattice))
        self._turns = rng.integers(0, 4, (lattice, lattice))
        angle, scale = np.radians(rng.uniform(-4, 4)), rng.uniform(0.9, 1.1)
        turned = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        centre = np.full(2, (side - 1) / 2)
        self.truth = Affine(np.column_stack([turned, centre * scale - turned @ centre + rng.uniform(-80, 80, 2)]))
        self.he_side = round(side * scale)
        self.he, self.orion = folder / f"{name}_he.ome.tif", folder / f"{name}_orion.ome.tif"
        self.scale = scale
        if not self.he.exists():
            self._write()

    def _part(self, images: list[np.ndarray], y: int, x: int, height: int, width: int, glass: float) -> np.ndarray:
        found = np.full((height, width, images[0].shape[2]), glass, images[0].dtype)
        for row in range(y // DISC, (y + height - 1) // DISC + 1):
            for column in range(x // DISC, (x + width - 1) // DISC + 1):
                if row >= len(self._which) or column >= len(self._which):
                    continue
                disc = np.rot90(images[self._which[row, column]], self._turns[row, column])
                top, left = row * DISC - y, column * DISC - x
                inside = (slice(max(0, top), min(height, top + DISC)), slice(max(0, left), min(width, left + DISC)))
                found[inside] = disc[inside[0].start - top : inside[0].stop - top,
                                     inside[1].start - left : inside[1].stop - left]  # fmt: skip
        return found

    def _write(self) -> None:
        back, whole = self.truth.inverse(), (self.side, self.side)
        um = UM / self.scale

        def read(y: int, x: int, height: int, width: int) -> np.ndarray:
            return self._part(self._he, y, x, height, width, 244)

        def he_tiles() -> Iterator[np.ndarray]:
            for y in range(0, self.he_side, TILE):
                for x in range(0, self.he_side, TILE):
                    yield move(read, whole, back, None, (y, x, TILE, TILE))[0]

        def marker_tiles() -> Iterator[np.ndarray]:
            for channel in range(self.markers):
                images = [image[..., channel : channel + 1] for image in self._orion]
                for y in range(0, self.side, TILE):
                    for x in range(0, self.side, TILE):
                        yield self._part(images, y, x, TILE, TILE, 120)[..., 0]

        shown = {"PhysicalSizeXUnit": "µm", "PhysicalSizeYUnit": "µm"}
        self._pyramid(self.he, he_tiles(), (self.he_side, self.he_side, 3), np.uint8, um, {"axes": "YXS", **shown},
                      {"photometric": "rgb", "compression": "jpeg", "compressionargs": {"level": 92}})  # fmt: skip
        names = [MARKERS[channel] for channel in range(self.markers)]
        self._pyramid(self.orion, marker_tiles(), (self.markers, self.side, self.side), np.uint16, UM,
                      {"axes": "CYX", "Channel": {"Name": names}, **shown},
                      {"photometric": "minisblack", "compression": "zstd", "compressionargs": {"level": 1}}
        )  # fmt: skip

    def _pyramid(
        self, path: Path, tiles: Iterator[np.ndarray], shape: tuple[int, ...], dtype: Any, um: float,
        about: dict[str, Any], stored: dict[str, Any],
    ) -> None:  # fmt: skip
        """Write tiles, and smaller levels made of means of them."""
        sides, samples = (shape[:2], shape[2:]) if about["axes"] == "YXS" else (shape[1:], ())
        planes = 1 if samples else shape[0]
        across = -(-sides[1] // TILE)
        per_plane = -(-sides[0] // TILE) * across
        small = TILE // SMALLER
        smaller = np.zeros((planes, per_plane // across * small, across * small, *samples), dtype)

        def watched() -> Iterator[np.ndarray]:
            for index, tile in enumerate(tiles):
                plane, place = divmod(index, per_plane)
                y, x = (small * at for at in divmod(place, across))
                smaller[plane, y : y + small, x : x + small] = _shrunk(tile)
                yield tile

        kind = {"tile": (TILE, TILE), **stored}
        with tifffile.TiffWriter(path, bigtiff=True, ome=True) as file:
            metadata = {"PhysicalSizeX": um, "PhysicalSizeY": um, **about}
            file.write(watched(), shape=shape, dtype=dtype, subifds=self._levels, metadata=metadata, **kind)
            for _ in range(self._levels):
                sides = tuple(side // SMALLER for side in sides)
                level = np.ascontiguousarray(smaller[:, : sides[0], : sides[1]])
                file.write(level[0] if samples else level, subfiletype=1, metadata=None, **kind)
                smaller = np.stack([_shrunk(plane) for plane in level])


def _shrunk(image: np.ndarray) -> np.ndarray:
    """Means of SMALLER x SMALLER pixels of an image (H, W, ...), without what is left over."""
    height, width = (side // SMALLER for side in image.shape[:2])
    parts = image[: height * SMALLER, : width * SMALLER].reshape(height, SMALLER, width, SMALLER, -1)
    found: np.ndarray = parts.mean((1, 3)).round().astype(image.dtype)
    return found.reshape(height, width, *image.shape[2:])


def command(*words: object) -> dict[str, float]:
    """Run a command of the toolkit: its ``seconds``, the ``memory`` of its process at the peak [MB], and its processor
    time [s], ``total`` and by the STAGES of prepare."""
    code = (
        "import json, sys, time; from orion_unet.__main__ import dispatch\n"
        "from orion_unet.cli.arguments import run_command\n"
        "spent = {}\n"
        "def timed(function, name):\n"
        "    def call(*given):\n"
        "        began = time.process_time()\n"
        "        try:\n"
        "            return function(*given)\n"
        "        finally:\n"
        "            spent[name] = spent.get(name, 0) + time.process_time() - began\n"
        "    return call\n"
        "if sys.argv[1] == 'prepare':\n"
        "    from orion_unet.preparation import prepare\n"
        f"    for name, stage in {STAGES}.items():\n"
        "        setattr(prepare, name, timed(getattr(prepare, name), stage))\n"
        "code = run_command(dispatch, sys.argv[1:])\n"
        "high = [l for l in open('/proc/self/status') if l.startswith('VmHWM')][0].split()[1]\n"
        "spent |= {'memory': int(high) / 1e3, 'total': time.process_time()}\n"
        "print('MEASURED', json.dumps(spent), file=sys.stderr); sys.exit(code)"
    )
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    print("\n".join(f"    {line}" for line in done.stdout.splitlines()))
    if done.returncode:
        raise SystemExit(f"{words[0]} ended with {done.returncode}: {done.stderr}")
    (measured,) = (line for line in done.stderr.splitlines() if line.startswith("MEASURED"))
    return {"seconds": time.perf_counter() - began, **json.loads(measured.removeprefix("MEASURED"))}


def prepared(slides: list[Slide], output: Path, regions: int) -> Path:
    """Prepare the slides; prints errors, time and memory."""
    from orion_unet.slides.open import open_he, open_markers

    table, pairs = output / "slides.csv", output / "pairs"
    lines = ["slide,he,orion", *(f"{slide.name},{slide.he.name},{slide.orion.name}" for slide in slides)]
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    words = ("--region_size", DISC, "--regions_per_slide", regions, "--jobs", 1)
    spent = command("prepare", table, "--output_dir", pairs, *words)
    with open(pairs / "regions.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    kept = [row for row in rows if row["state"] == "kept"]
    errors, pixels = [], 0
    for row in kept:
        slide = next(each for each in slides if each.name == row["slide"])
        y, x, height, width = (int(row[key]) for key in ("y", "x", "height", "width"))
        pixels += height * width
        errors.append(_remaining(slide, pairs / f"{row['core']}_HE.npy", (y, x, height, width)))
    began, wall = time.process_time(), time.perf_counter()
    by_slide = {slide.name: slide for slide in slides}
    for name, slide in by_slide.items():
        with open_he(slide.he) as he, open_markers(slide.orion) as orion:
            for row in kept:
                if row["slide"] == name:
                    _plain(he, orion, [int(row[key]) for key in ("y", "x", "height", "width")], output / "plain.npy")
    plain, plain_wall = time.process_time() - began, time.perf_counter() - wall
    every = np.concatenate(errors) if errors else np.array([np.nan])
    print(f"\n{len(kept)} of {len(rows)} regions kept; error against the known displacement: median "
          f"{np.median(every):.2f} pixels, 95 % {np.quantile(every, 0.95):.2f}")  # fmt: skip
    rest = spent["total"] - sum(spent[stage] for stage in STAGES.values())
    megapixels = pixels / 1e6
    print(
        f"prepare: {spent['seconds']:.0f} s, peak memory {spent['memory']:.0f} MB; {megapixels:.1f} megapixels kept\n"
    )
    print("| | processor time [s] | a megapixel kept | plain over this |\n| --- | --- | --- | --- |")
    parts = [(stage, spent[stage]) for stage in STAGES.values()]
    whole = [("start and tables", rest), ("prepare, all", spent["total"]), ("plain reading and writing", plain)]
    for name, seconds in parts + whole:
        print(f"| {name} | {seconds:.1f} | {seconds / megapixels:.2f} | {plain / seconds:.2f} |")
    print(f"\n(plain: {plain_wall:.1f} s by the clock)\n")
    return pairs


def _remaining(slide: Slide, he: Path, region: tuple[int, int, int, int]) -> np.ndarray:
    """Lengths of the shifts of blocks of a pair's H&E against the H&E as it was drawn."""
    from orion_unet.registration.blocks import agreeing, block_centres, block_shifts, thinned
    from orion_unet.registration.shift import nuclei
    from orion_unet.registration.stains import haematoxylin

    drawn = slide._part(slide._he, *region, 244)
    one, other = (thinned(nuclei(haematoxylin(image.astype(np.float32) / 255)))
                  for image in (drawn, np.load(he, allow_pickle=False)))  # fmt: skip
    points = block_centres(drawn.shape[:2]).reshape(-1, 2)
    shifts, weights = block_shifts(other, one, points)
    found: np.ndarray = np.linalg.norm(shifts[agreeing(points, shifts, weights)], axis=1)
    return found


def _plain(he: Any, orion: Any, region: list[int], target: Path) -> None:
    """Read a region of both files, and write it as prepare does."""
    y, x, height, width = region
    np.save(target, he.stored(min(y, he.shape[0] - height), min(x, he.shape[1] - width), height, width))
    markers = orion.read(range(orion.shape[0]), y, x, height, width)
    np.save(target, np.ascontiguousarray(markers.transpose(1, 2, 0)))


def whole_way(pairs: Path, slide: Slide, output: Path) -> None:
    """Train on the pairs, predict the third slide, and draw the prediction beside and over its H&E."""
    run = output / "run"
    spent = command("train", "--pairs_dir", pairs, "--output_dir", run, "--overwrite", "--base_features", 8,
                         "--depth", 3, "--patch_size", 128, "--epochs", 6, "--val_split", 0.3, "--gpus", 0)  # fmt: skip
    print(f"\ntraining: {spent['seconds']:.0f} s")
    spent = command("predict", "--checkpoint", run, "--input", slide.he, "--output_dir", output / "predicted",
                              "--format", "ome-tiff", "--overwrite")  # fmt: skip
    print(f"\nprediction of the third slide: {spent['seconds']:.0f} s, peak memory {spent['memory']:.0f} MB")
    (predicted,) = (output / "predicted").glob("*.ome.tiff")
    print(f"picture: {draw(slide, predicted, output / 'whole_way.png')}")


def draw(slide: Slide, predicted: Path, path: Path) -> Path:
    """A piece of the third slide: H&E, predicted nuclei over its haematoxylin, and the correlation of the two."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from orion_unet.registration.stains import haematoxylin
    from orion_unet.slides.open import open_he, open_markers

    side = 512
    with open_he(slide.he) as he, open_markers(predicted) as markers:
        scale = markers.shape[-1] / he.shape[1]
        y = x = int(he.shape[0] * 0.4)
        stain = he.read(y, x, side, side)
        nuclei = markers.read([0], round(y * scale), round(x * scale), round(side * scale), round(side * scale))[0]
        whole = he.read(0, 0, he.shape[0], he.shape[1])[::16, ::16]
    nuclei = torch.nn.functional.interpolate(torch.from_numpy(nuclei.astype(np.float32))[None, None], size=(side, side),
                                             mode="bilinear")[0, 0].numpy()  # fmt: skip
    density = haematoxylin(stain)
    r = float(np.corrcoef(density.ravel(), nuclei.ravel())[0, 1])
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4.6))
    shown = [np.clip(image / max(float(np.quantile(image, 0.995)), 1e-6), 0, 1) for image in (density, nuclei)]
    titles = (
        "the third slide",
        "a piece of it",
        f"haematoxylin (magenta), predicted {MARKERS[0]} (green); r {r:.2f}",
    )
    pictures: list[Any] = [whole, stain, np.stack([shown[0], shown[1], shown[0]], -1)]
    for axis, picture, title in zip(axes, pictures, titles, strict=True):
        axis.imshow(picture)
        axis.set_title(title, fontsize=10)
        axis.set_axis_off()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    return path


if __name__ == "__main__":
    sys.exit(run_command(main))
