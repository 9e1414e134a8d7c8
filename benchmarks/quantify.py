"""Are cells measured as fast as scikit-image does it, in bounded memory?

    python benchmarks/quantify.py [--json FILE]
    python benchmarks/quantify.py --quick                       # seconds; its numbers mean little
    python benchmarks/quantify.py --only slide --slide 20000    # 400 megapixels with some 300,000 cells

- speed: cells per second of ``orion_unet.quantify`` on an image of 20 markers with given labels, over those of
  ``skimage.measure.regionprops_table`` (area, centroid, means) on the same arrays, in turns in one process (goal: at
  least 1), and the largest difference of their results;
- memory: peak memory of the command, outlines and tables included, in a process of its own, for images of growing
  height and of growing width, with nuclei found in the image;
- slide (only with --only slide): the command on one large image of the markers of the demo tissue.

The images are demo tissue, repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import tifffile  # noqa: E402
from skimage.measure import regionprops_table  # noqa: E402

import orion_unet  # noqa: E402
from orion_unet.demo.make import MARKERS, draw_core  # noqa: E402
from orion_unet.segmentation import segment_nuclei  # noqa: E402

PARTS, APART = ("speed", "memory"), ("slide",)
TISSUE, TILE = 1024, 512
SIZE, SIZES = 2048, [1024, 2048, 4096, 8192]
QUICK_TISSUE, QUICK_SIZE, QUICK_SIZES = 256, 256, [256]
# The command in a process of its own, which says its peak memory [kB] last.
MEASURED = """
import sys
from orion_unet.__main__ import dispatch
code = dispatch(sys.argv[1:])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
raise SystemExit(code)
"""


def tissue(size: int) -> np.ndarray:
    """Markers of demo tissue (C, size, size) uint16 without the glass around it, mirrored so that it tiles."""
    _, markers = draw_core(seed=1, size=size)
    if markers.shape[0] > markers.shape[2]:
        markers = markers.transpose(2, 0, 1)
    quarter = markers[:, size // 4 : 3 * size // 4, size // 4 : 3 * size // 4]
    half = np.concatenate([quarter, quarter[:, ::-1]], axis=1)
    return np.concatenate([half, half[:, :, ::-1]], axis=2)


def write_image(path: Path, pattern: np.ndarray, height: int, width: int, markers: int, zoom: int = 1) -> None:
    """Write a tiled OME-TIFF of repeated tissue with so many markers, tile by tile; ``zoom`` enlarges its pixels."""
    side = pattern.shape[1]

    def tiles() -> Iterator[np.ndarray]:
        for channel in range(markers):
            for y in range(0, height, TILE):
                for x in range(0, width, TILE):
                    rows, columns = (np.arange(at, at + TILE) // zoom % side for at in (y, x))
                    yield np.ascontiguousarray(pattern[channel][rows[:, None], columns])

    names = list(MARKERS)[:markers]
    pixel = {"PhysicalSizeX": 0.325, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": 0.325, "PhysicalSizeYUnit": "µm"}
    with tifffile.TiffWriter(path, bigtiff=True, ome=True) as tiff:
        tiff.write(
            tiles(), shape=(markers, height, width), dtype=np.uint16, tile=(TILE, TILE), photometric="minisblack",
            compression="adobe_deflate", compressionargs={"level": 1}, predictor=True, maxworkers=1,
            metadata={"axes": "CYX", "Channel": {"Name": names}, **pixel},
        )  # fmt: skip


def speed(pattern: np.ndarray, size: int, repeats: int) -> dict[str, Any]:
    """Cells per second of both, as medians over rounds, and how much their results differ."""
    times = -(-size // pattern.shape[1])
    image = np.ascontiguousarray(np.tile(pattern, (1, times, times))[:, :size, :size])
    nuclear = image[list(MARKERS).index("Hoechst")].astype(np.float32)
    labels = segment_nuclei(nuclear / nuclear.max())
    channels_last = np.ascontiguousarray(image.transpose(1, 2, 0))
    seconds: dict[str, list[float]] = {"quantify": [], "skimage": []}
    for turn in range(repeats + 1):
        began = time.perf_counter()
        found = orion_unet.quantify(image, labels)
        between = time.perf_counter()
        table = regionprops_table(labels, channels_last, properties=("label", "area", "centroid", "intensity_mean"))
        # The first round is a warm-up.
        if turn:
            seconds["quantify"].append(between - began)
            seconds["skimage"].append(time.perf_counter() - between)
    means = np.stack([table[f"intensity_mean-{channel}"] for channel in range(len(image))], axis=1)
    centres = np.stack([table["centroid-0"], table["centroid-1"]], axis=1)
    ratios = [skimage / own for own, skimage in zip(seconds["quantify"], seconds["skimage"], strict=True)]
    return {
        "pixels": size * size,
        "markers": len(image),
        "cells": len(found.label),
        "cells_per_s": {name: len(found.label) / statistics.median(values) for name, values in seconds.items()},
        "ratio": statistics.median(ratios),
        "largest_relative_difference_of_means": float(
            np.max(np.abs(found.mean / np.maximum(means, 1e-9) - 1) * (means > 0))
        ),
        "largest_difference_of_centroids_px": float(np.abs(np.stack([found.y, found.x], axis=1) - centres).max()),
    }


def command(image: Path, out: Path, *options: str) -> tuple[float, float, int]:
    """Peak resident memory [MB], seconds and number of cells of the command in a separate process."""
    words = ["quantify", "--image", image, "--output_dir", out, "--overwrite", *options]
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    cells = json.loads((out / "quantify.json").read_text(encoding="utf-8"))["images"][0]["cells"]
    return int(done.stdout.split()[-1]) / 1024, seconds, cells


def memory(folder: Path, pattern: np.ndarray, sizes: list[int]) -> list[dict[str, Any]]:
    """Peak memory for growing heights at one width, then for growing widths at one height; 4 markers, rings of 3."""
    found = []
    for height, width in [(size, sizes[0]) for size in sizes] + [(sizes[0], size) for size in sizes[1:]]:
        image = folder / "memory.ome.tif"
        write_image(image, pattern, height, width, markers=4)
        peak_mb, seconds, cells = command(image, folder / "memory", "--rings", "3")
        found.append({"height": height, "width": width, "cells": cells, "peak_mb": peak_mb, "seconds": seconds})
    return found


def slide(folder: Path, pattern: np.ndarray, side: int, markers: int) -> dict[str, Any]:
    """The command on one large square image, with rings of 3 pixels."""
    image = folder / "slide.ome.tif"
    if not image.exists():
        # Enlarged, because nuclei of the demo tissue are smaller than those of a slide at this pixel size.
        write_image(image, pattern, side, side, markers, zoom=2)
    peak_mb, seconds, cells = command(image, folder / "slide", "--rings", "3", "--positive", "CD45=1500")
    sizes = {path.name: path.stat().st_size / 1e6 for path in sorted((folder / "slide").iterdir())}
    return {
        "side": side, "markers": markers, "cells": cells, "peak_mb": peak_mb, "seconds": seconds, "files_mb": sizes,
    }  # fmt: skip


def report(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [found["machine"]]
    if "speed" in found:
        row = found["speed"]
        rates = row["cells_per_s"]
        lines += [
            "",
            "| megapixels | markers | cells | quantify [cells/s] | regionprops_table [cells/s] | ratio |",
            "| --- | --- | --- | --- | --- | --- |",
            f"| {row['pixels'] / 1e6:.1f} | {row['markers']} | {row['cells']} | {rates['quantify']:.0f} | "
            f"{rates['skimage']:.0f} | {row['ratio']:.1f} |",
            "",
            f"Largest difference of means: {row['largest_relative_difference_of_means']:.1g} of their value; of "
            f"centroids: {row['largest_difference_of_centroids_px']:.1g} pixels.",
        ]
    if "memory" in found:
        lines += ["", "| height | width | cells | peak memory [MB] | seconds |", "| --- | --- | --- | --- | --- |"]
        lines += [
            f"| {row['height']} | {row['width']} | {row['cells']} | {row['peak_mb']:.0f} | {row['seconds']:.0f} |"
            for row in found["memory"]
        ]
    if "slide" in found:
        row = found["slide"]
        files = ", ".join(f"{name} {size:.0f} MB" for name, size in row["files_mb"].items())
        lines += [
            "",
            f"{row['side']} x {row['side']} pixels, {row['markers']} markers: {row['cells']} cells, peak memory "
            f"{row['peak_mb']:.0f} MB, {row['seconds']:.0f} s; {files}.",
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=(*PARTS, *APART), default=PARTS, help=f"default: {PARTS}")
    parser.add_argument("--slide", type=int, default=20000, help="side of the slide [pixels]; default: 20000")
    parser.add_argument("--markers", type=int, default=10, help="markers of the slide; default: 10")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of speed; default: 5")
    parser.add_argument("--quick", action="store_true", help="small images, to see that the benchmark runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers as JSON")
    parser.add_argument(
        "--work_dir", type=Path, metavar="DIR", help="keep images and tables here; a slide that is there is used again"
    )
    options = parser.parse_args()
    found: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores; load {os.getloadavg()[0]:.1f} at the start"
        + ("; --quick: these numbers mean little" if options.quick else "")
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.work_dir or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        pattern = tissue(QUICK_TISSUE if options.quick else TISSUE)
        if "speed" in options.only:
            found["speed"] = speed(
                pattern, QUICK_SIZE if options.quick else SIZE, 1 if options.quick else options.repeats
            )
        if "memory" in options.only:
            found["memory"] = memory(folder, pattern, QUICK_SIZES if options.quick else SIZES)
        if "slide" in options.only:
            found["slide"] = slide(folder, pattern, options.slide, options.markers)
    print(report(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
