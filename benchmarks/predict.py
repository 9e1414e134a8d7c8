"""Is prediction as fast as its network, constant in memory, and free of seams?

    python benchmarks/predict.py [--checkpoint RUN] [--json FILE]
    python benchmarks/predict.py --only slide --slide 20000        # a slide of 400 megapixels, in bounded memory
    python benchmarks/predict.py --only reading                    # slides/tiff.py beside tifffile's zarr store

- speed: megapixels per second of ``predict`` on a tiled TIFF, from the open file to the finished output, over those of
  the bare network on the same tiles, measured in turns in one process (goal: at least 0.85);
- memory: peak memory of a process that predicts images of growing height, and of growing width;
- seams: compares the prediction of a large image with those of shifted crops, whose tiles meet elsewhere: the
  difference where tiles of the large image meet over the difference inside them (goal: about 1), and the step between
  neighbouring pixels there over the step elsewhere;
- slide (only with --only slide): a generated slide, predicted by a tiny network in a separate process;
- reading (only with --only reading; needs zarr 3): reads the regions of TIFFs that prediction needs with the toolkit's
  reader and with zarr, without and with its cache of decoded tiles, each in a separate process; then reads damaged
  files with both.

The images are repeated demo tissue. Without ``--checkpoint`` the network has random weights.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import tifffile  # noqa: E402
import torch  # noqa: E402

from orion_unet import checkpoint  # noqa: E402
from orion_unet.command_options import PredictOptions  # noqa: E402
from orion_unet.config import TrainConfig  # noqa: E402
from orion_unet.data.normalization import Normalization  # noqa: E402
from orion_unet.demo.make import MARKERS, draw_core  # noqa: E402
from orion_unet.inference.model import TrainedModel, load_trained  # noqa: E402
from orion_unet.inference.predict import predict  # noqa: E402
from orion_unet.inference.predict_files import predict_files  # noqa: E402
from orion_unet.inference.tiling import TiledPrediction, Tiling, choose_tiling  # noqa: E402
from orion_unet.models.unet import SpatialUNet  # noqa: E402
from orion_unet.slides.images import ArrayImage  # noqa: E402
from orion_unet.slides.open import open_he  # noqa: E402

PARTS, APART = ("speed", "memory", "seams"), ("slide", "reading")
TISSUE = 1024
TILE = 256


@functools.cache
def tissue(size: int = TISSUE) -> np.ndarray:
    """Demo tissue (size, size, 3) uint8 without the glass around it, mirrored both ways so that it tiles."""
    core, _ = draw_core(seed=1, size=size)
    quarter = core[size // 4 : 3 * size // 4, size // 4 : 3 * size // 4]
    half = np.concatenate([quarter, quarter[::-1]])
    return np.concatenate([half, half[:, ::-1]], axis=1)


def write_slide(path: Path, height: int, width: int) -> None:
    """Write a tiled TIFF of repeated tissue, tile by tile; the pixel size is 0.325 micrometres."""
    pattern = tissue()

    def tiles() -> Iterator[np.ndarray]:
        for y in range(0, height, TILE):
            for x in range(0, width, TILE):
                rows, columns = np.arange(y, y + TILE) % TISSUE, np.arange(x, x + TILE) % TISSUE
                yield np.ascontiguousarray(pattern[rows[:, None], columns])

    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        tiff.write(
            tiles(), shape=(height, width, 3), dtype=np.uint8, tile=(TILE, TILE), photometric="rgb",
            compression="jpeg", resolution=(1e4 / 0.325,) * 2, resolutionunit="CENTIMETER", maxworkers=1,
        )  # fmt: skip


def write_model(path: Path, markers: int, **options: Any) -> Path:
    """Write a checkpoint with random weights from a fixed seed."""
    config = TrainConfig.from_options(options)
    torch.manual_seed(0)
    network = SpatialUNet.from_options(config.model, markers)
    names = tuple(MARKERS)[:markers]
    bounds = np.zeros(markers), np.ones(markers), np.zeros(markers)
    content = {
        "model": network.state_dict(),
        "options": config.options(),
        "normalization": Normalization(names, *bounds, white=65535.0).document(),
        "channel_names": list(names),
        "split": {},
        "epoch": 0,
    }
    checkpoint.save(path, content)
    return path


def bare_forward_s(model: TrainedModel, source: Path) -> float:
    """Seconds of the bare network on all tiles of the image, in the same batches as predict."""
    with open_he(source) as image:
        tiles = TiledPrediction(model, image, choose_tiling(model, image.shape))
        count = len(tiles.rows) * len(tiles.columns)
        batch = torch.rand(tiles.batch_size, 3, tiles.tiling.tile, tiles.tiling.tile, device=model.device)
    began = time.perf_counter()
    for start in range(0, count, tiles.batch_size):
        predicted = model.predict(batch[: min(tiles.batch_size, count - start)])
    # Wait for the result: a GPU computes asynchronously.
    predicted[..., 0, 0].cpu()
    return time.perf_counter() - began


def speed(folder: Path, model: TrainedModel, size: int, repeats: int) -> dict[str, Any]:
    """Megapixels per second of the command and of the bare network, as medians over rounds."""
    source = folder / "speed.tif"
    write_slide(source, size, size)
    found: dict[str, list[float]] = {"forward": [], "npy": [], "ome-tiff": []}
    for turn in range(repeats + 1):
        seconds = {"forward": bare_forward_s(model, source)}
        for kind in ("npy", "ome-tiff"):
            options = PredictOptions(format=kind, tissue_only=False, overview=False, overwrite=True)
            began = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):
                predict_files(model, [source], folder / "speed", options)
            seconds[kind] = time.perf_counter() - began
        # The first round is a warm-up.
        if turn:
            for name, value in seconds.items():
                found[name].append(value)
    rates = {name: size * size / 1e6 / statistics.median(values) for name, values in found.items()}
    ratios = {
        kind: statistics.median(f / value for f, value in zip(found["forward"], found[kind], strict=True))
        for kind in ("npy", "ome-tiff")
    }
    tiling = choose_tiling(model, (size, size))
    return {
        "pixels": size * size,
        "markers": len(model.names),
        "tile": tiling.tile,
        "overlap": tiling.overlap,
        "mp_per_s": rates,
        "over_forward": ratios,
    }


# VmHWM is the peak of the program itself; ru_maxrss begins at that of the process that started it.
MEASURED = """
import sys
from orion_unet.__main__ import main
code = main()
with open("/proc/self/status") as status:
    print("peak_kb", next(line.split()[1] for line in status if line.startswith("VmHWM")))
sys.exit(code)
"""


def peak_memory(checkpoint_path: Path, source: Path, out: Path, *options: str) -> tuple[float, float]:
    """Peak resident memory [MB] and seconds of the command in a separate process."""
    words = ["predict", "--checkpoint", checkpoint_path, "--input", source, "--output_dir", out, "--device", "cpu"]
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, words), "--no_tissue_only", *options],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return int(done.stdout.split()[-1]) / 1024, time.perf_counter() - began


def memory(folder: Path, sizes: list[int]) -> list[dict[str, Any]]:
    """Peak memory for growing heights at one width, then for growing widths at one height."""
    model = write_model(folder / "tiny.pt", markers=4, base_features=4, depth=2, patch_size=64)
    found = []
    for height, width in [(size, sizes[0]) for size in sizes] + [(sizes[0], size) for size in sizes[1:]]:
        source = folder / "memory.tif"
        write_slide(source, height, width)
        tiling = choose_tiling(load_trained(model, "cpu"), (height, width))
        row: dict[str, Any] = {"height": height, "width": width, "tile": tiling.tile, "overlap": tiling.overlap}
        for overview in ("overview", "no_overview"):
            words = ("--format", "ome-tiff", "--overwrite", f"--{overview}")
            row[f"peak_mb_{overview}"], row["seconds"] = peak_memory(model, source, folder / "memory", *words)
        found.append(row)
    return found


def seams(model: TrainedModel, size: int, crops: int) -> dict[str, float]:
    """Differences between a large image and shifted crops of it, where its tiles meet and inside them."""
    he = np.tile(tissue(), (-(-size // TISSUE), -(-size // TISSUE), 1))[:size, :size]
    tile = 32 * 2**model.network.depth
    image = ArrayImage(Path("he"), lambda: he)
    tiles = TiledPrediction(model, image, choose_tiling(model, image.shape, tile))
    large = predict(he, model, normalized=True, tile=tile)
    meeting = np.zeros((size, size), bool)
    lines = np.zeros(size - 1, bool)
    for start in tiles.rows[1:]:
        meeting[start : start + tiles.tiling.overlap] = meeting[:, start : start + tiles.tiling.overlap] = True
        # Where the weight of one tile starts and where that of the other ends.
        lines[[line for line in (start - 1, start + tiles.tiling.overlap - 1) if line < size - 1]] = True
    rng = np.random.default_rng(0)
    # Compare only the inside of one tile of the crop, where no seam of the crop itself can be.
    apart, deep = tiles.tiling.stride, tiles.tiling.overlap
    sums = {(kind, at): [0.0, 0] for kind in ("aligned", "shifted") for at in (True, False)}
    for index in range(crops):
        kind = "aligned" if index % 2 else "shifted"
        step = 2**model.network.depth
        y, x = rng.integers(0, size - 3 * tile, 2).tolist()
        y, x = (y // step * step, x // step * step) if kind == "aligned" else (y | 1, x | 1)
        crop = predict(he[y : y + 3 * tile, x : x + 3 * tile], model, normalized=True, tile=tile)
        begin = apart - tiles.tiling.margin + deep
        inner = slice(begin, begin + tile - 2 * deep)
        outer = tuple(slice(at + begin, at + begin + tile - 2 * deep) for at in (y, x))
        difference = np.abs(crop[:, inner, inner] - large[:, outer[0], outer[1]]).mean(axis=0)
        at_seam = meeting[outer]
        for at in (True, False):
            sums[kind, at][0] += float(difference[at_seam == at].sum())
            sums[kind, at][1] += int((at_seam == at).sum())
    means = {key: total / max(count, 1) for key, (total, count) in sums.items()}
    steps = np.abs(np.diff(large, axis=2)).mean(axis=(0, 1))
    return {
        "sd_of_prediction": float(large.std()),
        "aligned_at_seams": means["aligned", True],
        "aligned_inside": means["aligned", False],
        "shifted_at_seams": means["shifted", True],
        "shifted_inside": means["shifted", False],
        "shifted_ratio": means["shifted", True] / means["shifted", False],
        "step_ratio": float(steps[lines].mean() / steps[~lines].mean()),
    }


def slide(folder: Path, size: int, keep: bool) -> dict[str, Any]:
    """Seconds and peak memory for a slide of ``size`` x ``size`` pixels and a network of 4 markers."""
    model = write_model(folder / "tiny.pt", markers=4, base_features=4, depth=2, patch_size=64)
    source = folder / "slide.tif"
    write_slide(source, size, size)
    peak, seconds = peak_memory(model, source, folder / "slide", "--format", "ome-tiff", "--overwrite")
    result = folder / "slide" / "slide.ome.tiff"
    tiling = choose_tiling(load_trained(model, "cpu"), (size, size))
    found = {
        "size": size,
        "tile": tiling.tile,
        "overlap": tiling.overlap,
        "seconds": seconds,
        "mp_per_s": size * size / 1e6 / seconds,
        "peak_mb": peak,
        "input_mb": source.stat().st_size / 1e6,
        "output_mb": result.stat().st_size / 1e6,
    }
    if not keep:
        result.unlink()
    return found


# Of the default network for an image wide enough.
READ_TILE, READ_OVERLAP = 640, 96
LAYOUTS: dict[str, dict[str, Any]] = {
    "tiles, JPEG": {"tile": (TILE, TILE), "compression": "jpeg"},
    "tiles, deflate": {"tile": (TILE, TILE), "compression": "deflate", "predictor": True},
    "tiles, LZW": {"tile": (TILE, TILE), "compression": "lzw", "predictor": True},
    "strips of 8 rows, deflate": {"rowsperstrip": 8, "compression": "deflate"},
    "strips of a row, LZW": {"rowsperstrip": 1, "compression": "lzw"},
    "planar tiles, deflate": {"tile": (TILE, TILE), "compression": "deflate", "planarconfig": "separate"},
    "a page per channel, LZW": {"tile": (TILE, TILE), "compression": "lzw", "ome": True},
}
READERS = ("toolkit", "zarr", "zarr, cached")


def write_layout(path: Path, layout: str, height: int, width: int) -> None:
    """Write a TIFF of repeated tissue in one of the layouts; sides are multiples of 1024 pixels, or smaller."""
    options = {"photometric": "rgb", "metadata": None, **LAYOUTS[layout]}
    if options.get("ome"):
        options |= {"photometric": "minisblack", "metadata": {"axes": "CYX"}}
    he = np.tile(tissue(), (-(-height // TISSUE), -(-width // TISSUE), 1))[:height, :width]
    if "planarconfig" in options or "ome" in options:
        he = np.ascontiguousarray(he.transpose(2, 0, 1))
    tifffile.imwrite(path, he, **options)


@contextlib.contextmanager
def region_reader(reader: str, path: Path) -> Iterator[tuple[tuple[int, int], Callable[[int, int], np.ndarray]]]:
    """Height, width, and a function that reads rows from ``top`` to ``bottom``, (h, W, 3)."""
    if reader == "toolkit":
        with open_he(path) as image:
            yield image.shape, lambda top, bottom: image.stored(top, 0, bottom - top, image.shape[1])
        return
    import zarr
    from zarr.experimental.cache_store import CacheStore
    from zarr.storage import MemoryStore

    with tifffile.TiffFile(path) as tiff:
        series = tiff.series[0].levels[0]
        store = series.aszarr(level=0, fillvalue=255)
        if reader == "zarr, cached":
            # As large as the toolkit's own.
            store = CacheStore(store, cache_store=MemoryStore(), max_size=1 << 27)
        array = zarr.open_array(store, mode="r", zarr_format=2)
        if series.axes[0] in "CS":
            yield array.shape[1:], lambda top, bottom: np.ascontiguousarray(array[:, top:bottom].transpose(1, 2, 0))
        else:
            yield array.shape[:2], lambda top, bottom: array[top:bottom]


def resident_mb(key: str) -> float:
    """VmRSS or VmHWM of this process [MB]."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(key))


def read_rows(reader: str, path: str) -> None:
    """Read a TIFF as prediction does; print seconds, processor seconds, and memory on top of the imports [MB]."""
    with region_reader(reader, Path(path)) as (_, read):
        # Loads the decoder.
        read(0, 1)
        before = resident_mb("VmRSS")
    began, used = time.perf_counter(), time.process_time()
    with region_reader(reader, Path(path)) as ((height, _), read):
        for start in Tiling(READ_TILE, READ_OVERLAP, READ_OVERLAP // 2).starts(height):
            read(max(start, 0), min(start + READ_TILE, height))
    print(json.dumps([time.perf_counter() - began, time.process_time() - used, resident_mb("VmHWM") - before]))


def reading(folder: Path, height: int, width: int, repeats: int) -> list[dict[str, Any]]:
    """Medians of ``read_rows`` for every reader and layout, measured in turns."""
    script = "import sys; from predict import read_rows; read_rows(*sys.argv[1:])"
    env = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks")}
    source, found = folder / "reading.tif", []
    for layout in LAYOUTS:
        write_layout(source, layout, height, width)
        turns: dict[str, list[list[float]]] = {reader: [] for reader in READERS}
        for _ in range(repeats):
            for reader, results in turns.items():
                words = [sys.executable, "-c", script, reader, str(source)]
                done = subprocess.run(words, env=env, stdout=subprocess.PIPE, text=True, check=True)
                results.append(json.loads(done.stdout))
        medians = {reader: [statistics.median(values) for values in zip(*results, strict=True)]
                   for reader, results in turns.items()}  # fmt: skip
        found.append({"layout": layout, **medians})
    source.unlink()
    return found


def damages(source: Path) -> dict[str, bytes]:
    """The file with one tile or strip in the middle damaged (one per plane, if channels are planes), by name."""
    whole = source.read_bytes()
    zeroed, halved, left_out = bytearray(whole), bytearray(whole), bytearray(whole)
    with tifffile.TiffFile(source) as tiff:
        pages = [page.aspage() for page in tiff.series[0].pages]
        planes = 3 if pages[0].planarconfig == 2 else 1
        for page in pages:
            segments = len(page.dataoffsets) // planes
            for index in range(segments // 2, len(page.dataoffsets), segments):
                offset, count = page.dataoffsets[index], page.databytecounts[index]
                zeroed[offset : offset + count] = bytes(count)
                halved[offset + count // 2 : offset + count] = bytes(count - count // 2)
                for kind in ("Offsets", "ByteCounts"):
                    tag = page.tags[("Tile" if page.is_tiled else "Strip") + kind]
                    size = tag.valuebytecount // tag.count
                    start = tag.valueoffset + index * size
                    left_out[start : start + size] = bytes(size)
        last = max(sum(end) for page in pages for end in zip(page.dataoffsets, page.databytecounts, strict=True))
        short = whole[: last - pages[-1].databytecounts[-1] // 2]
    return {"zeros": zeroed, "its second half zeros": halved, "left out": left_out, "cut off by the end": short}


def damaged(folder: Path) -> dict[str, dict[str, Counter[str]]]:
    """Number of layouts, by damage and reader, in which the file is refused, read as white, or read wrongly."""
    # What zarr leaves of tasks that failed beside the one that is raised.
    for name in ("asyncio", "tifffile"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    source = folder / "damaged.tif"
    found: dict[str, dict[str, Counter[str]]] = {}
    for layout in LAYOUTS:
        write_layout(source, layout, TISSUE, TISSUE)
        with region_reader("toolkit", source) as (_, read):
            expected = read(0, TISSUE)
        for name, content in damages(source).items():
            source.write_bytes(content)
            for reader in READERS[:2]:
                try:
                    with region_reader(reader, source) as (_, read):
                        pixels = read(0, TISSUE)
                    differs = (pixels != expected).any(axis=2)
                    outcome = "white" if differs.any() and (pixels[differs] == 255).all() else "wrong"
                except Exception:
                    outcome = "refused"
                found.setdefault(name, {each: Counter() for each in READERS[:2]})[reader][outcome] += 1
    source.unlink()
    return found


def report(found: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = ["# Prediction: speed, memory, seams", "", found["machine"], ""]
    if "speed" in found:
        part = found["speed"]
        lines += [
            f"{part['pixels'] / 1e6:.1f} megapixels, {part['markers']} markers, {found['network']}, tiles of "
            f"{part['tile']} with an overlap of {part['overlap']}, without overview.",
            "",
        ]
        lines += ["| | megapixels/s | over the bare network |", "| --- | --- | --- |"]
        lines += [f"| bare network, same tiles | {part['mp_per_s']['forward']:.3f} | 1 |"]
        lines += [
            f"| predict, {kind} | {part['mp_per_s'][kind]:.3f} | {part['over_forward'][kind]:.2f} |"
            for kind in ("npy", "ome-tiff")
        ]
        lines.append("")
    if "memory" in found:
        lines += ["| height | width | tile | overlap | peak memory [MB] | the same without overview | seconds |"]
        lines += ["| --- " * 7 + "|"]
        lines += [
            f"| {row['height']} | {row['width']} | {row['tile']} | {row['overlap']} | {row['peak_mb_overview']:.0f} "
            f"| {row['peak_mb_no_overview']:.0f} | {row['seconds']:.1f} |"
            for row in found["memory"]
        ]
        lines.append("")
    if "seams" in found:
        lines += ["| seams | |", "| --- | --- |"]
        lines += [f"| {name.replace('_', ' ')} | {value:.3g} |" for name, value in found["seams"].items()]
        lines.append("")
    if "slide" in found:
        part = found["slide"]
        lines += [
            f"A slide of {part['size']:,} x {part['size']:,} pixels (tiled JPEG, {part['input_mb']:.0f} MB), "
            f"4 markers, a tiny network, tiles of {part['tile']} with an overlap of {part['overlap']}, with overview: "
            f"{part['seconds']:.0f} s ({part['mp_per_s']:.2f} MP/s), peak memory {part['peak_mb']:.0f} MB, "
            f"output {part['output_mb']:.0f} MB.",
            "",
        ]
    if "reading" in found:
        lines += ["| seconds, of a processor, megabytes | " + " | ".join(READERS) + " |", "| --- " * 4 + "|"]
        for row in found["reading"]:
            cells = [f"{row[reader][0]:.2f}, {row[reader][1]:.2f}, {row[reader][2]:.0f}" for reader in READERS]
            lines.append(" | ".join([f"| {row['layout']}", *cells]) + " |")
        lines += ["", "| a tile or strip is | toolkit | zarr |", "| --- | --- | --- |"]
        for name, outcomes in found["damaged"].items():
            cells = [", ".join(f"{kind} {count}" for kind, count in sorted(of.items())) for of in outcomes.values()]
            lines.append(" | ".join([f"| {name}", *cells]) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a trained model for speed and seams; default: random weights")
    parser.add_argument("--only", nargs="+", choices=(*PARTS, *APART), default=PARTS, help=f"default: {PARTS}")
    parser.add_argument(
        "--size",
        type=int,
        default=2048,
        help="side for speed and seams [pixels]; reading: twice as high, 8 times as wide",
    )
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[1024, 2048, 4096, 8192], help="sides for memory [pixels]"
    )
    parser.add_argument("--slide", type=int, default=20000, help="side of the slide [pixels]; default: 20000")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of speed; default: 5")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers as JSON")
    parser.add_argument(
        "--work_dir", type=Path, metavar="DIR", help="keep images and predictions here; default: a temporary folder"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.work_dir or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        given = options.checkpoint or write_model(folder / "random.pt", markers=20, use_boundary_guidance=True)
        model = load_trained(given)
        kind = model.config.model
        found: dict[str, Any] = {
            "machine": f"{model.device}, {torch.get_num_threads()} threads, {platform.machine()}, "
            f"torch {torch.__version__}; load {os.getloadavg()[0]:.1f} at the start",
            "network": f"{kind.base_features} base features, depth {kind.depth}"
            + ("" if options.checkpoint else ", random weights"),
        }
        if "speed" in options.only:
            found["speed"] = speed(folder, model, options.size, options.repeats)
        if "memory" in options.only:
            found["memory"] = memory(folder, options.sizes)
        if "seams" in options.only:
            found["seams"] = seams(model, options.size, crops=24)
        if "reading" in options.only:
            found["reading"] = reading(folder, 2 * options.size, 8 * options.size, options.repeats)
            found["damaged"] = damaged(folder)
        if "slide" in options.only:
            found["slide"] = slide(folder, options.slide, keep=options.work_dir is not None)
    print(report(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
