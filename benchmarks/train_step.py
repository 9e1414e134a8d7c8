"""How fast is one optimisation step, compared with MONAI's networks of equal width and with the machine?

    python benchmarks/train_step.py --json
    python benchmarks/train_step.py --base_features 32 --patch_size 256 --batch_size 4 --channels 20 --threads 2
    python benchmarks/train_step.py --device cuda --amp --compile --memory_format both --batch_size 16

A step is forward, mean squared error, backward and fused AdamW on one batch that is already on the device. Ours is
SpatialUNet (batch norm, no boundary guidance). MONAI's are BasicUNet (b, 2b, 4b, 8b, 16b, b) and DynUNet (kernel 3,
strides 1, 2, 2, 2, 2, filters b to 16b), with their default norms and activations and without our final sigmoid. In
every round, each network and each measurement of the machine takes its turn in the same process; results are medians
over the rounds.

Two lower bounds show what limits a step:

- arithmetic: the multiplications and additions of the convolutions, at the best rate that a matrix product or a plain
  3x3 convolution reached in the same rounds;
- memory: the bytes that the operators must move if each reads its inputs and writes its outputs once, at the rate of a
  plain copy. With --compile, only those of convolutions and the optimiser, since the rest may be fused away. Data that
  stays in the processor's cache between two operators moves faster, so for small sizes this is not a bound.

Peak memory: on a GPU the largest sum of tensors minus that before the network was built; on a CPU the growth of the
resident set in a separate process.

With --optimizers, also times the variants of AdamW (fused, foreach, single).
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import platform
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from orion_unet.cli.arguments import Parser, run_command
from orion_unet.errors import InputError
from orion_unet.models.unet import SpatialUNet, parameter_count
from orion_unet.training.devices import describe_devices, keep_freed_memory, set_determinism

SEED = 0
OURS = "SpatialUNet"
PEERS = ("BasicUNet", "DynUNet")
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# Each timing lasts at least this long, so that clock resolution and launch overhead do not matter.
TIMING_S = 0.25
# Operators that no compiler can fuse away.
UNFUSABLE = ("convolution", "_fused_adamw", "mm", "addmm")
ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


def main(argv: list[str]) -> int:
    options = parse(argv)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    options.device = device.type
    check(options)
    prepare(options)
    names = [OURS, *(() if options.without_monai else options.peers)]
    formats = list(FORMATS) if options.memory_format == "both" else [options.memory_format]
    subjects = [(name, form) for name in names for form in formats]
    steps, memory, failures = {}, {}, []
    for subject in subjects:
        try:
            steps[subject], memory[subject] = built(*subject, options)
        except Exception as error:
            # Not every version of torch can compile every network of MONAI.
            if subject[0] == OURS:
                raise
            reason = str(error).strip().partition("\n")[0]
            failures.append(f"{', '.join(subject)}: cannot be measured ({type(error).__name__}: {reason})")
    machine = machine_work(device, options)
    timed = {subject: step.run for subject, step in steps.items()} | {name: run for name, (run, _) in machine.items()}
    seconds = interleaved(timed, device, options.repeats)
    peaks = {name: work / seconds[name] for name, (_, work) in machine.items()}
    results: dict[str, Any] = {
        "settings": vars(options),
        "machine": {
            "device": describe_devices(device, 1),
            "processor": processor(),
            "torch": torch.__version__,
            **peaks,
        },
        "models": [
            report(*subject, step, seconds[subject], memory[subject], peaks, options) for subject, step in steps.items()
        ],
        "failures": failures,
    }
    results["speed_over_peers"] = ratios(results["models"])
    if options.optimizers:
        results["optimizers_s"] = optimizer_seconds(options)
    print(json.dumps(results, indent=2, allow_nan=False) if options.json else table(results))
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, text in (
        ("base_features", 32, "feature maps of the first level, b above"),
        ("patch_size", 256, "side of a patch, a multiple of 16 [pixels]"),
        ("batch_size", 4, "patches per batch"),
        ("channels", 20, "predicted markers"),
        ("repeats", 5, "rounds; reports medians"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text}; default: {default}")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; default: torch's choice")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--memory_format", choices=(*FORMATS, "both"), default="contiguous", help="default: contiguous")
    parser.add_argument("--compile", action="store_true", help="compile every network with torch.compile")
    parser.add_argument("--amp", action="store_true", help="mixed precision for every network (GPU only)")
    parser.add_argument("--optimizers", action="store_true", help="also time the variants of AdamW")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS, help="MONAI's networks; default: all")
    parser.add_argument("--without_monai", action="store_true", help="measure our network only")
    parser.add_argument("--json", action="store_true", help="print JSON only")
    return parser.parse_args(argv)


def check(options: argparse.Namespace) -> None:
    """Raise InputError if this cannot be measured here."""
    for name in ("base_features", "patch_size", "batch_size", "channels", "repeats"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name} {getattr(options, name)}: must be at least 1")
    if options.threads is not None and options.threads < 1:
        raise InputError(f"--threads {options.threads}: must be at least 1")
    if options.patch_size % 16 or options.patch_size < 32:
        raise InputError(f"--patch_size {options.patch_size}: must be a multiple of 16, and at least 32")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU here")
    if options.amp and options.device != "cuda":
        raise InputError("--amp: mixed precision is measured on a GPU only; add --device cuda or leave it out")
    if not options.without_monai:
        try:
            import monai.networks.nets  # noqa: F401
        except ImportError as error:
            raise InputError(
                f"MONAI cannot be imported ({error}): `pip install 'orion-unet[bench]'`, or skip its networks "
                "with --without_monai"
            ) from None


def prepare(options: argparse.Namespace) -> None:
    """Set up this process as the trainer does, in the same way for all networks."""
    if options.threads:
        torch.set_num_threads(options.threads)
    keep_freed_memory(torch.device(options.device))
    set_determinism(False)
    if options.device == "cuda" and torch.backends.cudnn.allow_tf32:
        # cuDNN uses TF32 for float32 convolutions by default, so the matrix product they are compared with must too.
        torch.set_float32_matmul_precision("high")


def network(name: str, options: argparse.Namespace) -> nn.Module:
    """One of the compared networks, with weights drawn from the seed."""
    torch.manual_seed(SEED)
    width, channels = options.base_features, options.channels
    widths = [width * 2**level for level in range(5)]
    if name == OURS:
        return SpatialUNet(channels, base_features=width, depth=4, norm="batch")
    from monai.networks.nets import BasicUNet, DynUNet

    if name == "BasicUNet":
        return BasicUNet(spatial_dims=2, in_channels=3, out_channels=channels, features=(*widths, width))
    return DynUNet(
        spatial_dims=2,
        in_channels=3,
        out_channels=channels,
        kernel_size=[3] * 5,
        strides=[1, 2, 2, 2, 2],
        upsample_kernel_size=[2] * 4,
        filters=widths,
    )


class Step:
    """One optimisation step of a network on one batch on the device."""

    def __init__(self, model: Any, memory_format: str, options: argparse.Namespace) -> None:
        self.device = torch.device(options.device)
        self.model: nn.Module = model.to(self.device, memory_format=FORMATS[memory_format]).train()
        self.forward: Callable[[Tensor], Tensor] = torch.compile(self.model) if options.compile else self.model
        self.optimizer = AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.amp = options.amp
        self.dtype = step_dtype(options)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.he, self.target = batch(memory_format, options)

    def run(self, forward: Callable[[Tensor], Tensor] | None = None) -> None:
        """Forward, loss, backward, optimiser; does not wait for the device."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, self.dtype, enabled=self.amp):
            loss = F.mse_loss((forward or self.forward)(self.he), self.target)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def flops(self) -> int:
        """Number of multiplications and additions in the convolutions of a step, forward and backward."""
        with FlopCounterMode(display=False) as counter:
            self.run(self.model)
        return counter.get_total_flops()

    def moved(self) -> tuple[int, int]:
        """Bytes moved by all operators of a step, and by those that cannot be fused away."""
        with BytesMoved() as counter:
            self.run(self.model)
        return counter.total, counter.unfusable


def step_dtype(options: argparse.Namespace) -> torch.dtype:
    """Dtype of the convolutions, chosen as the trainer's --use_amp does."""
    if not options.amp:
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def batch(memory_format: str, options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """H&E (B, 3, P, P) and target (B, C, P, P) in [0, 1], the same for every network."""
    generator = torch.Generator().manual_seed(SEED)
    side = options.patch_size
    images = [
        torch.rand((options.batch_size, channels, side, side), generator=generator)
        for channels in (3, options.channels)
    ]
    he, target = (image.to(options.device, memory_format=FORMATS[memory_format]) for image in images)
    return he, target


class BytesMoved(TorchDispatchMode):
    """Sums the bytes that each operator reads and writes, counting each tensor once; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.unfusable = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.is_view or name in ALLOCATIONS:
            return returned
        given = {**dict(zip((a.name for a in func._schema.arguments), args, strict=False)), **(kwargs or {})}
        moved = 0
        for argument in func._schema.arguments:
            size = stored_bytes(given.get(argument.name))
            # An argument that is changed in place is read and written.
            moved += 2 * size if argument.alias_info is not None and argument.alias_info.is_write else size
        values = returned if isinstance(returned, tuple) else (returned,)
        for value, declared in zip(values, func._schema.returns, strict=False):
            moved += stored_bytes(value) if declared.alias_info is None else 0
        self.total += moved
        if name.startswith(UNFUSABLE):
            self.unfusable += moved
        return returned


def stored_bytes(value: Any) -> int:
    """Bytes of all tensors in a value; for an expanded tensor, those of its storage."""
    tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return sum(min(leaf.numel() * leaf.element_size(), leaf.untyped_storage().nbytes()) for leaf in tensors)


def built(name: str, memory_format: str, options: argparse.Namespace) -> tuple[Step, int | None]:
    """A warmed-up step and its peak memory [bytes]."""
    if options.device == "cpu":
        # In a separate process, because memory freed by an earlier network would hide what this one needs.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            memory = pool.submit(resident_growth, name, memory_format, options).result()
        step = Step(network(name, options), memory_format, options)
        for _ in range(2):
            step.run()
        return step, memory
    before = torch.cuda.memory_allocated()
    step = Step(network(name, options), memory_format, options)
    # The batch does not depend on the network.
    before += stored_bytes((step.he, step.target))
    for _ in range(3):
        step.run()
    torch.cuda.synchronize()
    # Choosing algorithms and compiling need memory once, which does not belong to a step.
    torch.cuda.reset_peak_memory_stats()
    step.run()
    torch.cuda.synchronize()
    return step, torch.cuda.max_memory_allocated() - before


def resident_growth(name: str, memory_format: str, options: argparse.Namespace) -> int | None:
    """Growth of the resident set by a step [bytes], on Linux in a fresh process; None on other systems."""
    prepare(options)
    # A tiny step first, so that threads, libraries and the batch exist before the measurement.
    smallest = argparse.Namespace(**{**vars(options), "base_features": 1, "patch_size": 32})
    network(name, smallest)
    Step(nn.Conv2d(3, options.channels, 3, padding=1), memory_format, smallest).run()
    batch(memory_format, options)
    before = resident("VmRSS")
    step = Step(network(name, options), memory_format, options)
    step.run()
    with suppress(OSError):
        # Reset the high-water mark, as the first step may have compiled.
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    step.run()
    after = resident("VmHWM")
    return after - before if before and after else None


def resident(field: str) -> int | None:
    """A size in bytes from /proc/self/status; None if there is none."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return None


class Sizes(NamedTuple):
    """Smallest sizes at which a device reaches its best rate."""

    matmul: int
    conv: tuple[int, int, int]
    copy_bytes: int


SIZES = {"cpu": Sizes(1536, (4, 128, 64), 1 << 28), "cuda": Sizes(8192, (32, 256, 128), 1 << 30)}


def machine_work(device: torch.device, options: argparse.Namespace) -> dict[str, tuple[Callable[[], object], float]]:
    """Measurements of the machine: name of the rate, function to time, and its work in operations or bytes."""
    sizes = SIZES[device.type]
    dtype = step_dtype(options)
    torch.manual_seed(SEED)
    one = torch.rand(sizes.matmul, sizes.matmul, device=device, dtype=dtype)
    product = torch.empty_like(one)
    count, width, side = sizes.conv
    weight = torch.rand(width, width, 3, 3, device=device, dtype=dtype)
    images = torch.rand(count, width, side, side, device=device, dtype=dtype)
    source = torch.rand(sizes.copy_bytes // 4, device=device)
    copy = torch.empty_like(source)
    conv_flops = 2.0 * count * width * width * 9 * side * side
    work: dict[str, tuple[Callable[[], object], float]] = {
        "matmul_flops_per_s": (lambda: torch.mm(one, one, out=product), 2.0 * sizes.matmul**3),
        "memory_bytes_per_s": (lambda: copy.copy_(source), 2.0 * source.nbytes),
    }
    for name, form in FORMATS.items():
        # Which memory format is faster depends on the device.
        held_images, held_weight = (tensor.to(memory_format=form) for tensor in (images, weight))

        def convolve(given: Tensor = held_images, kernel: Tensor = held_weight) -> Tensor:
            with torch.no_grad():
                return F.conv2d(given, kernel, padding=1)

        work[f"conv3x3_{name}_flops_per_s"] = (convolve, conv_flops)
    return work


def interleaved(subjects: dict[Any, Callable[[], object]], device: torch.device, rounds: int) -> dict[Any, float]:
    """Median seconds of one call of each subject, over rounds in which they take turns."""
    times = {}
    for name, run in subjects.items():
        # The first call may include one-time work.
        once = min(timed(run, 1, device) for _ in range(2))
        times[name] = max(1, math.ceil(TIMING_S / once))
    seconds: dict[Any, list[float]] = {name: [] for name in subjects}
    order = list(subjects)
    for _ in range(rounds):
        for name in order:
            seconds[name].append(timed(subjects[name], times[name], device))
        # So that each follows a different one in the next round.
        order.reverse()
    return {name: median(taken) for name, taken in seconds.items()}


def timed(run: Callable[[], object], times: int, device: torch.device) -> float:
    """Mean seconds per call over several calls in a row, by the device's own clock."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(times):
            run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / times
    started = time.perf_counter()
    for _ in range(times):
        run()
    return (time.perf_counter() - started) / times


def processor() -> str:
    """Name of the CPU."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def report(
    name: str,
    memory_format: str,
    step: Step,
    seconds: float,
    memory: int | None,
    peaks: dict[str, float],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Results for one network in one memory format."""
    flops = step.flops()
    moved, unfusable = step.moved()
    matmul = peaks["matmul_flops_per_s"]
    conv = max(rate for peak, rate in peaks.items() if peak.startswith("conv3x3"))
    floors = {
        "arithmetic": flops / max(matmul, conv),
        "memory": (unfusable if options.compile else moved) / peaks["memory_bytes_per_s"],
    }
    bound = max(floors, key=lambda kind: floors[kind])
    return {
        "model": name,
        "memory_format": memory_format,
        "parameters": parameter_count(step.model),
        "patches_per_s": options.batch_size / seconds,
        "step_s": seconds,
        "peak_memory_bytes": memory,
        "flops_per_patch": flops / options.batch_size,
        "flops_per_s": flops / seconds,
        "fraction_of_matmul_peak": flops / seconds / matmul,
        "fraction_of_conv_peak": flops / seconds / conv,
        "bytes_moved_per_step": moved,
        "bytes_moved_unfusable_per_step": unfusable,
        "floor_arithmetic_s": floors["arithmetic"],
        "floor_memory_s": floors["memory"],
        "bound_by": bound,
        "fraction_of_floor": floors[bound] / seconds,
    }


def ratios(models: list[dict[str, Any]]) -> dict[str, float]:
    """Patches per second of our network over those of each peer, each in its best memory format."""
    best: dict[str, float] = {}
    for found in models:
        best[found["model"]] = max(best.get(found["model"], 0.0), found["patches_per_s"])
    return {name: best[OURS] / rate for name, rate in best.items() if name != OURS}


def optimizer_seconds(options: argparse.Namespace) -> dict[str, float]:
    """Median seconds of an optimiser step for each variant of AdamW, with the parameters of our network."""
    device = torch.device(options.device)
    forms: dict[str, dict[str, Any]] = {
        "fused": {"fused": True},
        "foreach": {"foreach": True},
        "single": {"foreach": False, "fused": False},
    }
    subjects: dict[str, Callable[[], object]] = {}
    for name, form in forms.items():
        parameters = [parameter.detach() for parameter in network(OURS, options).to(device).parameters()]
        generator = torch.Generator(device).manual_seed(SEED)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator, device=device)
        subjects[name] = AdamW(parameters, lr=1e-4, **form).step
    return interleaved(subjects, device, options.repeats)


def table(results: dict[str, Any]) -> str:
    """The results as a text table."""
    machine = results["machine"]
    conv = {name.split("_", 1)[1].removesuffix("_flops_per_s"): r for name, r in machine.items() if "conv3x3" in name}
    lines = [
        f"{machine['device']}, torch {machine['torch']}",
        f"processor: {machine['processor']}",
        f"measured peaks: matrix product {machine['matmul_flops_per_s'] / 1e9:.0f} GFLOP/s, "
        f"copy {machine['memory_bytes_per_s'] / 1e9:.1f} GB/s,",
        "3x3 convolution " + ", ".join(f"{rate / 1e9:.0f} GFLOP/s {name}" for name, rate in conv.items()),
        "",
        f"{'':<26}{'patches':>9}{'memory':>8}{'of':>8}{'of':>7}{'of':>7}",
        f"{'network':<26}{'per s':>9}{'MB':>8}{'matmul':>8}{'conv':>7}{'floor':>7}  bound by",
    ]
    for found in results["models"]:
        memory = found["peak_memory_bytes"]
        lines.append(
            f"{found['model'] + ', ' + found['memory_format']:<26}{found['patches_per_s']:>9.2f}"
            f"{'n/a' if memory is None else f'{memory / 1e6:.0f}':>8}{found['fraction_of_matmul_peak']:>8.2f}"
            f"{found['fraction_of_conv_peak']:>7.2f}{found['fraction_of_floor']:>7.2f}  {found['bound_by']}"
        )
    lines += [f"{OURS} is {ratio:.2f} times as fast as {name}" for name, ratio in results["speed_over_peers"].items()]
    lines += results["failures"]
    for name, seconds in results.get("optimizers_s", {}).items():
        lines.append(f"AdamW, {name}: {1e3 * seconds:.2f} ms a step")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_command(main))
