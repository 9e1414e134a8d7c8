"""Is an epoch as fast as its steps, and does its cost grow at most linearly with the work?

    python benchmarks/epoch.py                       # end to end over the bare step, on 1 and 2 ranks
    python benchmarks/epoch.py --growth              # cost per patch as patches, channels, pixels and cores grow
    python benchmarks/epoch.py --profile             # profile of an epoch
    python benchmarks/epoch.py --base_features 16 --patch_size 128 --batch_size 8 --json

End to end is what the trainer runs: loader, transforms, step, sums. The bare step is a minimal loop on one batch that
stays on the device: forward, composite loss, backward, clipping, AdamW. Validation is compared with the forward pass
alone. Both sides are measured in turns in one process; the report gives medians.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from data_pipeline import make_set

from orion_unet.cli.arguments import Parser, end_process, run_command
from orion_unet.config import DataOptions, TrainConfig
from orion_unet.data.packing import pack
from orion_unet.data.pairs import find_pairs
from orion_unet.distributed import from_main_process, is_main_process, process_group, world_size
from orion_unet.training.build import build_feeds, build_loss, build_state, parallel
from orion_unet.training.devices import choose_device, describe_devices, keep_freed_memory, set_determinism
from orion_unet.training.engine import TrainSums, ValidationSums, train_steps, validate
from orion_unet.training.prepare import prepare_data

ROOT = Path(__file__).resolve().parents[1]
RECIPE = {"use_boundary_guidance": True, "noise_removal": True, "use_amp": True}
# Environment variable: the file to which rank 0 writes its results for the process that started it.
RESULT = "ORION_EPOCH_RESULT"


def main(argv: list[str]) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs_dir", metavar="DIR", help="pairs to measure on; default: a generated set")
    parser.add_argument("--patch_size", type=int, default=256, metavar="N", help="side of a patch; default: 256")
    parser.add_argument("--batch_size", type=int, default=12, metavar="N", help="patches of all ranks; default: 12")
    parser.add_argument("--base_features", type=int, default=32, metavar="N", help="width; default: 32")
    parser.add_argument("--channels", type=int, default=20, metavar="N", help="of the generated set; default: 20")
    parser.add_argument(
        "--format", choices=("npy", "ome-zarr"), default="npy", help="of the generated set; default: npy"
    )
    parser.add_argument("--steps", type=int, default=4, metavar="N", help="steps per epoch; default: 4")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="epochs; reports medians; default: 3")
    parser.add_argument("--ranks", default="1,2", metavar="N,...", help="numbers of ranks; default: 1,2")
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    parser.add_argument("--growth", action="store_true", help="measure how the cost grows, with a small model")
    parser.add_argument("--profile", action="store_true", help="profile a training epoch")
    parser.add_argument("--json", action="store_true", help="print JSON only")
    options = parser.parse_args(argv)
    if "RANK" in os.environ:
        result = compare(options)
        if result is not None:
            Path(os.environ[RESULT]).write_text(json.dumps(result), encoding="utf-8")
        return 0
    with tempfile.TemporaryDirectory(prefix="orion_epoch_") as scratch:
        os.environ["XDG_CACHE_HOME"] = str(Path(scratch) / "cache")
        if options.growth:
            results: dict[str, Any] = growth(Path(scratch), options)
        else:
            if not options.pairs_dir:
                options.pairs_dir = made(Path(scratch) / "pairs", 4, side_of_a_core(options), options.channels)
                if options.format != "npy":
                    packed = Path(scratch) / "packed"
                    pack(DataOptions(pairs_dir=options.pairs_dir, patch_size=1), packed, form=options.format)
                    options.pairs_dir = str(packed)
            if options.profile:
                print(profile(options))
                return 0
            counts = [int(count) for count in options.ranks.split(",")]
            results = {f"{count} rank{'s' * (count > 1)}": on_ranks(count, options) for count in counts}
    print(json.dumps(results, indent=2) if options.json else table(results))
    return 0


def side_of_a_core(options: argparse.Namespace) -> int:
    """Pixels, so that one core has all patches of a validation."""
    return max(2, math.isqrt(options.steps * options.batch_size - 1) + 1) * options.patch_size


def made(folder: Path, cores: int, size: int, channels: int) -> str:
    folder.mkdir(parents=True)
    make_set(folder, "uint16", "hwc", argparse.Namespace(cores=cores, size=size, channels=channels))
    return str(folder)


def on_ranks(count: int, options: argparse.Namespace) -> dict[str, Any]:
    """Run the comparison on ``count`` ranks of this machine, in separate processes."""
    words = [
        f"--{name}={getattr(options, name)}"
        for name in ("pairs_dir", "patch_size", "batch_size", "base_features", "steps", "repeats")
    ]
    launch = [sys.executable, "-m", "orion_unet.cli.launch", "--standalone", f"--nproc_per_node={count}"]
    # Through a file, because gloo prints to the ranks' standard output.
    with tempfile.TemporaryDirectory(prefix="orion_epoch_") as folder:
        path = Path(folder) / "result.json"
        subprocess.run(
            [*launch, __file__, *words, *(["--compile"] if options.compile else [])],
            env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "PYTHONPATH": str(ROOT), RESULT: str(path)},
            stdout=subprocess.DEVNULL,
            check=True,
            timeout=3000,
        )
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result


class Bench:
    """Data, model and loss of a run, without a run folder."""

    def __init__(self, options: argparse.Namespace, **changed: Any) -> None:
        cores = len(find_pairs(DataOptions(pairs_dir=options.pairs_dir, patch_size=1)))
        train = max(1, cores - max(1, round(0.2 * cores)))
        settings = {
            "pairs_dir": options.pairs_dir,
            "patch_size": options.patch_size,
            "batch_size": max(1, options.batch_size // world_size()),
            "patches_per_image": -(-options.steps * options.batch_size // train),
            # As many batches as in training, so that starting the loader weighs no more than it does there.
            "patches_per_image_val": options.steps * options.batch_size,
            "val_batch_size": max(1, options.batch_size // world_size()),
            "base_features": options.base_features,
            "compile": getattr(options, "compile", False),
            **RECIPE,
            **changed,
        }
        self.config = TrainConfig.from_options(settings)
        self.device = choose_device(self.config.runtime)
        keep_freed_memory(self.device)
        set_determinism(False)
        started = time.perf_counter()
        self.prepared = from_main_process(lambda: prepare_data(self.config, world_size()))
        self.prepare_s = time.perf_counter() - started
        self.feeds = build_feeds(self.config, self.prepared, self.device)
        self.state = build_state(self.config, self.prepared, self.device, self.feeds.order.steps)
        self.loss = build_loss(self.config, self.prepared, self.device)
        compiled = self.config.runtime.compile
        self.forward = forward = torch.compile(self.state.model, dynamic=False) if compiled else self.state.model
        self.learner = self.state.learner
        self.learner.model = parallel(forward, self.device)
        self.epoch = 0

    def end_to_end(self) -> float:
        """Patches per second of a training epoch on this rank, as the trainer logs it."""
        self.epoch += 1
        self.feeds.order.set_epoch(self.epoch)
        steps = self.feeds.order.steps
        rates = [self.state.schedule.at(0, step) for step in range(steps)]
        started = time.perf_counter()
        for _ in train_steps(self.learner, self.feeds.train, self.loss, TrainSums.start(self.loss, self.device), rates):
            pass
        duration_s = time.perf_counter() - started
        self.wait = self.feeds.train.wait_s / duration_s
        return steps * self.config.optimisation.batch_size / duration_s

    def keep_batch(self) -> None:
        """Keep one batch on the device."""
        self.feeds.order.set_epoch(1)
        self.resident = next(iter(self.feeds.train))
        self.feeds.order.set_epoch(1)

    def bare_step(self) -> float:
        """Patches per second of the minimal loop on the resident batch."""
        batch, steps = self.resident, self.feeds.order.steps
        optimizer = self.learner.optimizer
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.learner.model.train()
        self.synchronize()
        started = time.perf_counter()
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            with self.learner.precision.autocast(self.device):
                prediction = self.learner.model(batch.he)
            value, _ = self.loss(prediction, batch.target, batch.boundary)
            value.backward()
            torch.nn.utils.clip_grad_norm_(parameters, self.config.optimisation.grad_clip)
            optimizer.step()
        self.synchronize()
        return steps * len(batch.he) / (time.perf_counter() - started)

    def validation(self) -> float:
        """Patches per second of a validation of this rank's share."""
        started = time.perf_counter()
        sums = ValidationSums(self.prepared.table.kept_names, self.device)
        for _ in validate(self.forward, self.feeds.val, self.loss, sums, self.learner.precision):
            pass
        found = sums.reduced(self.loss)
        self.synchronize()
        return found.patches / world_size() / (time.perf_counter() - started)

    def bare_forward(self) -> float:
        """Patches per second of the forward pass alone."""
        batch, count = self.resident, len(self.feeds.val.loader)
        self.forward.eval()
        self.synchronize()
        started = time.perf_counter()
        with torch.inference_mode(), self.learner.precision.autocast(self.device):
            for _ in range(count):
                self.forward(batch.he)
        self.synchronize()
        return count * len(batch.he) / (time.perf_counter() - started)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def close(self) -> None:
        self.feeds.train.close()
        self.feeds.val.close()


def compare(options: argparse.Namespace) -> dict[str, Any] | None:
    """Measure epochs and bare loops in turns, on every rank. Rank 0 returns the rates of all ranks together."""
    device = choose_device(TrainConfig().runtime)
    with process_group(device):
        bench = Bench(options)
        bench.keep_batch()
        subjects: dict[str, Callable[[], float]] = {
            "bare_step": bench.bare_step,
            "end_to_end": bench.end_to_end,
            "bare_forward": bench.bare_forward,
            "validation": bench.validation,
        }
        rates: dict[str, list[float]] = {name: [] for name in subjects}
        waits = []
        for repeat in range(options.repeats + 1):
            for name, subject in subjects.items():
                rate = subject() * world_size()
                if repeat:
                    rates[name].append(rate)
            waits.append(bench.wait)
        bench.close()
        # Ask inside the block: without its process group, every rank counts as rank 0.
        if not is_main_process():
            return None
        found: dict[str, Any] = {f"{name}_patches_per_s": median(taken) for name, taken in rates.items()}
        pairs = list(zip(rates["end_to_end"], rates["bare_step"], strict=True))
        shares = list(zip(rates["validation"], rates["bare_forward"], strict=True))
        return {
            "device": describe_devices(device, world_size()),
            **found,
            "end_to_end_over_bare_step": median(whole / bare for whole, bare in pairs),
            "validation_over_forward": median(whole / bare for whole, bare in shares),
            "data_wait_fraction": median(waits[1:]),
        }


# One axis grows at a time; everything else is as small as is meaningful.
AXES: dict[str, list[dict[str, int]]] = {
    "patches per epoch": [{"steps": steps} for steps in (4, 8, 16, 32)],
    "channels": [{"channels": channels} for channels in (1, 5, 20, 60)],
    "patch size": [{"patch_size": size} for size in (64, 128, 256)],
    "cores": [{"cores": cores} for cores in (5, 50, 500, 5000)],
}


def growth(scratch: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds per patch and seconds of preparation along each axis, with a model of width 4."""
    results: dict[str, Any] = {}
    for axis, points in AXES.items():
        results[axis] = []
        for index, point in enumerate(points):
            folder = scratch / f"{axis.replace(' ', '_')}_{index}"
            size = 64 if axis == "cores" else 512
            made(folder, point.get("cores", 5), size, point.get("channels", 5))
            chosen = argparse.Namespace(pairs_dir=str(folder), patch_size=64, batch_size=8, steps=8, base_features=4)
            chosen.__dict__.update({name: value for name, value in point.items() if hasattr(chosen, name)})
            # Every core has a patch in every epoch; with many cores, one each.
            bench = Bench(chosen, depth=3, patches_per_image_val=1)
            bench.end_to_end()
            train = [bench.end_to_end() for _ in range(options.repeats)]
            bench.validation()
            val = [bench.validation() for _ in range(options.repeats)]
            memory = loader_memory(bench)
            bench.close()
            results[axis].append(
                {
                    **point,
                    "train_ms_per_patch": 1e3 / median(train),
                    "val_ms_per_patch": 1e3 / median(val),
                    "prepare_s": bench.prepare_s,
                    "loader_private_mb": memory,
                }
            )
    return results


def loader_memory(bench: Bench) -> float | None:
    """Private memory of a loader process [MB], i.e. without what it shares with the rank."""
    found = []
    for process in bench.feeds.train.loader.worker_ids():
        lines = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="ascii").splitlines()
        found.append(sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024)
    return max(found) if found else None


def profile(options: argparse.Namespace) -> str:
    """Operators of one training epoch, sorted by their own time, from torch's profiler."""
    bench = Bench(options)
    bench.end_to_end()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if bench.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        rate = bench.end_to_end()
    bench.close()
    key = "self_cuda_time_total" if bench.device.type == "cuda" else "self_cpu_time_total"
    shown = profiler.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=48)
    return f"{shown}\n{rate:.2f} patches/s, waiting for data {bench.wait:.1%}"


def table(results: dict[str, Any]) -> str:
    """The results as a text table."""
    first = next(iter(results.values()))
    if isinstance(first, list):
        lines = []
        for axis, points in results.items():
            lines.append(f"{axis:<20}{'train ms/patch':>16}{'val ms/patch':>14}{'prepare s':>11}{'loader MB':>11}")
            for point in points:
                value, memory = next(iter(point.values())), point["loader_private_mb"]
                lines.append(
                    f"{value:<20}{point['train_ms_per_patch']:>16.2f}{point['val_ms_per_patch']:>14.2f}"
                    f"{point['prepare_s']:>11.2f}{'' if memory is None else f'{memory:.0f}':>11}"
                )
        return "\n".join(lines)
    lines = [f"{'patches/s':<30}" + "".join(f"{name:>12}" for name in results)]
    for key in first:
        if key != "device":
            digits = 1 if key.endswith("per_s") else 3
            lines.append(f"{key.removesuffix('_patches_per_s'):<30}" + "".join(
                f"{found[key]:>12.{digits}f}" for found in results.values()
            ))  # fmt: skip
    lines += [f"{name}: {found['device']}" for name, found in results.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    end_process(run_command(main))
