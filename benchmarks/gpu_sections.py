"""The sections of ``gpu_check.py``: each takes a ``Check``, does its steps and notes a row of the report for each."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import time
import traceback
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

TRAINER = "train_spatial_orion_unet.py"
# Goals of the project on a GPU: end to end over the step on a resident batch, our step over MONAI BasicUNet's, the
# loader over a memory copy, prediction over the bare network.
EPOCH_GOAL, STEP_GOAL, LOADER_GOAL, PREDICT_GOAL = 0.95, 1.3, 0.8, 0.85
# By these fractions the loss of the first epoch may change with the precision, the compiler, the number of ranks.
CLOSE_AMP, CLOSE_COMPILED, CLOSE_RANKS = 0.1, 0.05, 0.01
PROFILED_STEPS = 50


@dataclass
class Row:
    """One step of a section: what it did, what came out in a line, and its state: ok, failed or skipped."""

    what: str
    result: str
    state: str = "ok"
    seconds: float = 0.0
    detail: str = ""


class Skipped(Exception):
    """A step that this machine cannot do; the message says why."""


class Failed(Exception):
    """A step that did not do what it should: the message in a line, and what a command printed."""

    def __init__(self, message: str, output: str = "") -> None:
        super().__init__(message)
        self.output = output


class Check:
    """One run of a section: the device, small settings or not, a folder for its files, and the rows noted so far.

    The rows are kept in a file, so that those of a section that is ended from outside are not lost.
    """

    def __init__(self, section: str, device: str, quick: bool, folder: Path) -> None:
        self.device = device
        self.quick = quick
        self.folder = folder
        self.rows_file, self.now_file = folder / f"{section}.jsonl", folder / f"{section}.now"
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.env = {**os.environ, "PYTHONPATH": path, "XDG_CACHE_HOME": str(folder / "cache")}
        if device == "cpu":
            self.env["CUDA_VISIBLE_DEVICES"] = ""

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU is checked."""
        return self.device == "cuda"

    def note(self, row: Row) -> None:
        """Keep a row."""
        with self.rows_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(row)) + "\n")

    def step(self, what: str, work: Callable[[], str | tuple[str, str]]) -> None:
        """Do one step and note its row; ``work`` returns the result in a line, or that and more of it in Markdown."""
        self.now_file.write_text(what, encoding="utf-8")
        started = time.monotonic()
        row = Row(what, "")
        try:
            found = work()
            row.result, row.detail = found if isinstance(found, tuple) else (found, "")
        except Skipped as reason:
            row.result, row.state = str(reason), "skipped"
        except Exception as error:
            row.result, row.state = first_line(error), "failed"
            shown = error.output if isinstance(error, Failed) else traceback.format_exc()
            row.detail = block("\n".join(shown.strip().splitlines()[-30:])) if shown.strip() else ""
        row.seconds = time.monotonic() - started
        self.note(row)

    def goal(self, value: float, goal: float) -> str:
        """A goal beside a number; only a GPU can miss it."""
        missed = ", **missed**" if self.on_gpu and value < goal else ""
        return f"goal {goal:g}{missed}"

    def command(self, *words: object, expected: int = 0) -> str:
        """Everything that a Python command prints; raises Failed where it ends with another code than expected."""
        done = subprocess.run(
            [sys.executable, *map(str, words)],
            cwd=ROOT, env=self.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace",
        )  # fmt: skip
        if done.returncode != expected:
            lines = [line for line in done.stdout.splitlines() if line.strip()]
            errors = [line for line in lines if line.startswith("error:")]
            last = [*lines[-1:], *errors[:1]]
            raise Failed(f"exit code {done.returncode}: {last[-1] if last else 'without a word'}", done.stdout)
        return done.stdout

    def numbers(self, script: str, *words: object) -> dict[str, Any]:
        """The JSON that a benchmark prints, or the end of what it prints."""
        output = self.command(f"benchmarks/{script}.py", *words, "--json")
        found: dict[str, Any] = json.loads(output[output.index("{") :])
        return found


def first_line(error: BaseException) -> str:
    """An error in a line."""
    lines = str(error).strip().splitlines()
    name = "" if isinstance(error, Failed) else f"{type(error).__name__}: "
    return name + (lines[0] if lines else "without a word")


def block(text: str) -> str:
    """Text as a block of Markdown."""
    return f"```\n{text}\n```"


# -- training ---------------------------------------------------------------------------------------------------------


def demo_pairs(check: Check) -> Path:
    """The demo data, made on first use."""
    folder, made = check.folder / "pairs", check.folder / "pairs.made"
    if not made.exists():
        size = ("--cores", 4, "--size", 128) if check.quick else ()
        check.command("-m", "orion_unet", "make-demo", folder, *size)
        made.touch()
    return folder


def train(check: Check, name: str, *words: object, launcher: tuple[object, ...] = ()) -> tuple[list[Any], str]:
    """A few steps of the demo recipe: the records of its two epochs, and what it printed. Trains once in a check."""
    run = check.folder / "runs" / name
    printed, metrics = run.with_suffix(".txt"), run / "metrics.jsonl"
    if printed.exists():
        return [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()], printed.read_text()
    small = ["--patch_size", 64, "--patches_per_image", 8, "--base_features", 4, "--depth", 1, "--num_workers", 1]
    output = check.command(
        *launcher, TRAINER, "--recipe", "demo", "--pairs_dir", demo_pairs(check), "--output_dir", run, "--overwrite",
        *("--epochs", 2, "--sanity_check_freq", 0), *(small if check.quick else ()), *words,
    )  # fmt: skip
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    if len(records) != 2 or any(record[side]["loss"] is None for record in records for side in ("train", "val")):
        raise Failed("the losses of two epochs were expected", output)
    if records[1]["train"]["loss"] >= records[0]["train"]["loss"]:
        raise Failed("the training loss does not fall", output)
    printed.write_text(output)
    return records, output


def described(records: list[Any]) -> str:
    """A training in a line."""
    first, last = (record["train"]["loss"] for record in records)
    skipped = sum(record["skipped_steps"] for record in records)
    return (
        f"training loss {first:.4f}, then {last:.4f}; {records[-1]['samples_per_s']:.0f} patches/s"
        + (f"; {skipped} steps skipped" if skipped else "")
    )  # fmt: skip


def compare(records: list[Any], others: list[Any], tolerance: float, what: str) -> str:
    """The relative difference of the losses of two trainings' first epochs; raises Failed where it is larger."""
    # Later the smallest difference has grown: it says more of the recipe than of the device.
    one, two = records[0]["train"]["loss"], others[0]["train"]["loss"]
    difference = abs(one / two - 1)
    if not difference <= tolerance:
        raise Failed(f"training loss {one:.5f}, {two:.5f} {what}: {difference:.1%} apart, {tolerance:.0%} are allowed")
    return f"{difference:.2%} from the loss {what}"


def one_device(check: Check) -> tuple[object, ...]:
    """Options for a single rank."""
    return ("--gpus", 1 if check.on_gpu else 0)


def trained_in(check: Check, dtype: str) -> tuple[list[Any], str]:
    """The demo recipe in float32, bfloat16 or float16, as ``train`` gives it."""
    words = ("--no_use_amp",) if dtype == "float32" else ("--use_amp", "--amp_dtype", dtype)
    return train(check, dtype, *words, *one_device(check))


def has_bfloat16(check: Check) -> bool:
    """Whether the device computes in bfloat16; of a CPU it is not asked."""
    import torch

    return not check.on_gpu or torch.cuda.is_bf16_supported(including_emulation=False)


def precision(check: Check) -> None:
    """The demo recipe in float32, bfloat16 and float16."""

    def mixed(dtype: str) -> str:
        if dtype == "bfloat16" and not has_bfloat16(check):
            raise Skipped("this GPU has no bfloat16")
        records, output = trained_in(check, dtype)
        if "not finite" in output:
            raise Failed("a loss was not finite", output)
        if not check.on_gpu:
            return f"{described(records)}; in float32, as mixed precision needs a GPU"
        if f"AMP {dtype}" not in output:
            raise Failed(f"did not train in {dtype}", output)
        plain, _ = trained_in(check, "float32")
        return f"{described(records)}; {compare(records, plain, CLOSE_AMP, 'in float32')}"

    check.step("demo recipe, float32", lambda: described(trained_in(check, "float32")[0]))
    for dtype in ("bfloat16", "float16"):
        check.step(f"demo recipe, AMP {dtype}", lambda dtype=dtype: mixed(dtype))


def compiled(check: Check) -> None:
    """The demo recipe with torch.compile, beside the same without."""

    def work() -> str:
        if shutil.which(os.environ.get("CXX", "g++")) is None:
            raise Skipped("torch.compile needs a C++ compiler, and there is none")
        dtype = "bfloat16" if has_bfloat16(check) else "float16"
        plain, _ = trained_in(check, dtype)
        started = time.monotonic()
        words = ("--use_amp", "--amp_dtype", dtype, "--compile", *one_device(check))
        records, _ = train(check, "compiled", *words)
        speed = records[-1]["samples_per_s"] / plain[-1]["samples_per_s"]
        return (
            f"{described(records)}, {speed:.2f} times the speed without; "
            f"{compare(records, plain, CLOSE_COMPILED, 'without')}; {time.monotonic() - started:.0f} s with compiling"
        )

    check.step("demo recipe, --compile", work)


def ranks(check: Check) -> None:
    """One rank and two through the launcher, with the global batch and the loss of a rank without it."""
    backend = "NCCL" if check.on_gpu else "gloo"
    same = ("--norm", "group", "--no_use_amp", "--learning_rate", "1e-3")
    batch = 4 if check.quick else 8

    def launched(count: int) -> str:
        if check.on_gpu:
            import torch

            if torch.cuda.device_count() < count:
                raise Skipped(f"{count} GPUs are needed, and there is one")
        alone, _ = train(check, "alone", *same, "--batch_size", batch, *one_device(check))
        launcher = ("-m", "orion_unet.cli.launch", "--standalone", "--nproc_per_node", count)
        gpus = ("--gpus", count if check.on_gpu else 0)
        words = (*same, "--batch_size", batch // count, *gpus)
        records, _ = train(check, f"ranks_{count}", *words, launcher=launcher)
        speed = records[-1]["samples_per_s"] / alone[-1]["samples_per_s"]
        return (
            f"{described(records)}, {speed:.2f} times the speed of one without the launcher; "
            f"{compare(records, alone, CLOSE_RANKS, 'of one without it')}"
        )

    check.step(f"one rank through the launcher, {backend}", lambda: launched(1))
    check.step(f"two ranks through the launcher, {backend}", lambda: launched(2))


def memory(check: Check) -> None:
    """The message of a training whose batch cannot fit into the GPU's memory."""

    def work() -> str:
        if not check.on_gpu:
            raise Skipped("a CPU has no memory of its own to run out of")
        import torch

        # A patch of this network needs about 1 GB in float32.
        batch = math.ceil(2 * torch.cuda.get_device_properties(0).total_memory / 0.8e9)
        size = ("--patch_size", 256, "--base_features", 128, "--depth", 4, "--batch_size", batch, "--val_batch_size", 1)
        run = check.folder / "runs" / "memory"
        demo = check.folder / "large"
        check.command("-m", "orion_unet", "make-demo", demo, "--cores", 4, "--size", 320)
        output = check.command(
            TRAINER, "--recipe", "demo", "--pairs_dir", demo, "--output_dir", run, "--overwrite", "--no_use_amp", *size,
            *("--patches_per_image", batch, "--num_workers", 0), *one_device(check),
            expected=1,
        )  # fmt: skip
        said = [line for line in output.splitlines() if line.startswith("error: out of GPU memory: lower --batch_size")]
        if not said or "Traceback" in output:
            raise Failed("the message about GPU memory is missing", output)
        state = json.loads((run / "status.json").read_text(encoding="utf-8"))["state"]
        if state != "failed":
            raise Failed(f"status.json says {state}", output)
        return f"batch of {batch}: {said[0]}"

    check.step("a batch that cannot fit", work)


# -- tests ------------------------------------------------------------------------------------------------------------


def tests(check: Check) -> None:
    """The tests marked gpu, a row for each of them."""
    report = check.folder / "tests.xml"
    words = ("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}", "tests")
    check.env["ORION_TEST_DEVICE"] = check.device

    def work() -> str:
        try:
            check.command(*words)
        except Failed:
            # The report says which; where there is none, the tests did not start.
            if not report.exists():
                raise
        for row in test_rows(report):
            check.note(row)
        return "a row for each of them is above"

    check.step("tests marked gpu, in all", work)


def test_rows(report: Path) -> list[Row]:
    """A row for each test function of a JUnit report, over all its parameters."""
    found: dict[str, Row] = {}
    counts: dict[str, dict[str, int]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        what = str(case.get("name")).partition("[")[0].removeprefix("test_").replace("_", " ")
        row = found.setdefault(what, Row(what, "", "skipped"))
        row.seconds += float(case.get("time") or 0)
        states = [child for child in case if child.tag in ("failure", "error", "skipped")]
        state = {"failure": "failed", "error": "failed", "skipped": "skipped"}[states[0].tag] if states else "passed"
        counts.setdefault(what, {}).setdefault(state, 0)
        counts[what][state] += 1
        message = (str(states[0].get("message") or "").splitlines() or [""])[0] if states else ""
        if state == "failed" and row.state != "failed":
            row.state, row.result = "failed", f"{case.get('name')}: {message}"
            row.detail = block("\n".join((states[0].text or "").strip().splitlines()[-30:]))
        elif state == "passed" and row.state == "skipped":
            row.state = "ok"
        elif state == "skipped" and row.state == "skipped":
            row.result = message
    for what, row in found.items():
        total = ", ".join(f"{count} {state}" for state, count in sorted(counts[what].items()))
        row.result = total if row.state == "ok" else f"{row.result} ({total})"
    return list(found.values())


# -- speed ------------------------------------------------------------------------------------------------------------


def norms(check: Check) -> None:
    """Step time with batch and group norm in both memory layouts, and which the trainer uses."""
    import torch
    from torch.nn.functional import mse_loss
    from torch.optim import AdamW
    from train_step import FORMATS, interleaved, prepare

    from orion_unet.models.unet import SpatialUNet, memory_format

    device = torch.device(check.device)
    amp = (torch.bfloat16 if has_bfloat16(check) else torch.float16) if check.on_gpu else None
    width, side, batch = (4, 64, 2) if check.quick else (32, 256, 12)

    def stepper(norm: str, layout: torch.memory_format) -> Callable[[], None]:
        torch.manual_seed(0)
        model = SpatialUNet(20, width, 4, norm, use_boundary_guidance=True).to(device, memory_format=layout).train()  # type: ignore[call-overload]
        optimizer = AdamW(model.parameters(), fused=True)
        he, target = (torch.rand(batch, count, side, side, device=device).to(memory_format=layout) for count in (3, 20))

        def run() -> None:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, amp or torch.bfloat16, enabled=amp is not None):
                loss = mse_loss(model(he), target)
            loss.backward()
            optimizer.step()

        return run

    def work() -> tuple[str, str]:
        prepare(Namespace(threads=None, device=check.device))
        subjects = {(norm, name): stepper(norm, form) for norm in ("batch", "group") for name, form in FORMATS.items()}
        seconds = interleaved(subjects, device, 2 if check.quick else 3)
        lines, slow = ["| norm | layout | ms a step | |", "| --- | --- | --- | --- |"], []
        for norm in ("batch", "group"):
            used = next(name for name, form in FORMATS.items() if form == memory_format(norm, device))
            other = min((name for name in FORMATS if name != used), key=lambda name: seconds[norm, name])
            if seconds[norm, used] > 1.05 * seconds[norm, other]:
                slow.append(f"with {norm} norm, {other} would be {seconds[norm, used] / seconds[norm, other]:.2f} "
                            "times as fast")  # fmt: skip
            lines += [
                f"| {norm} | {name} | {1e3 * seconds[norm, name]:.2f} | {'used by the trainer' * (name == used)} |"
                for name in FORMATS
            ]
        ratio = min(seconds["group", name] for name in FORMATS) / min(seconds["batch", name] for name in FORMATS)
        verdict = "; ".join(slow) if slow else "the layouts that the trainer uses are the fastest, or within 5 %"
        return f"a step with group norm takes {ratio:.2f} times that with batch norm; {verdict}", "\n".join(lines)

    kind = f"AMP {str(amp).removeprefix('torch.')}" if amp else "float32"
    check.step(f"batch and group norm, both layouts, {kind}, base {width}, {batch} patches of {side} pixels", work)


def speed(check: Check) -> None:
    """Loader, step and epoch, by their own benchmarks with small settings."""
    has_monai = importlib.util.find_spec("monai") is not None
    small = ("--base_features", 4, "--patch_size", 32, "--batch_size", 4)
    size = small if check.quick else ("--batch_size", 12)

    def loader() -> str:
        patch = ("--patch_size", 32, "--patches", 32, "--repeats", 2) if check.quick else ("--repeats", 3)
        found = check.numbers("data_pipeline", "--pairs_dir", demo_pairs(check), *patch)
        share = found["fraction_of_raw_copy"]
        return (
            f"{found['patches_per_s']:.0f} patches/s by one worker, {found['n_workers_patches_per_s']:.0f} by "
            f"{found['n_workers']}; {share:.2f} of a memory copy ({check.goal(share, LOADER_GOAL)})"
        )

    def step() -> str:
        fast = ("--amp", "--compile", "--memory_format", "both") if check.on_gpu else ()
        peers = ("--peers", "BasicUNet") if has_monai else ("--without_monai",)
        repeats = 1 if check.quick else 3
        found = check.numbers("train_step", "--device", check.device, *fast, *peers, "--repeats", repeats, *size)
        rates = ", ".join(
            f"{model['model']} {model['memory_format']} {model['patches_per_s']:.1f}" for model in found["models"]
        )
        if not has_monai:
            wanted = f"goal {STEP_GOAL:g} times MONAI BasicUNet: not measured, MONAI is not installed"
        elif "BasicUNet" not in found["speed_over_peers"]:
            wanted = f"goal {STEP_GOAL:g} times MONAI BasicUNet: {'; '.join(found['failures'])}"
        else:
            ratio = found["speed_over_peers"]["BasicUNet"]
            wanted = f"{ratio:.2f} times MONAI BasicUNet ({check.goal(ratio, STEP_GOAL)})"
        return f"{rates} patches/s; {wanted}"

    def epoch(*more: str) -> str:
        count = ("--steps", 4, "--repeats", 1) if check.quick else ("--steps", 30, "--repeats", 3)
        (found,) = check.numbers("epoch", "--ranks", 1, *count, *size, *more).values()
        share = found["end_to_end_over_bare_step"]
        return (
            f"{found['end_to_end_patches_per_s']:.0f} patches/s, {share:.3f} of the step on a resident batch "
            f"({check.goal(share, EPOCH_GOAL)}); waiting for data {found['data_wait_fraction']:.1%}; "
            f"validation {found['validation_over_forward']:.2f} of the forward pass"
        )

    check.step("loader", loader)
    check.step(f"step{', AMP, --compile' if check.on_gpu else ''}", step)
    check.step("epoch, AMP" if check.on_gpu else "epoch", epoch)
    if check.on_gpu:
        check.step("epoch, AMP, --compile", lambda: epoch("--compile"))


def predict(check: Check) -> None:
    """Prediction of a tiled TIFF, by a network of the usual size; with quick settings by a tiny one."""

    def work() -> str:
        missing = [name for name in ("tifffile", "imagecodecs") if importlib.util.find_spec(name) is None]
        if missing:
            raise Skipped(f'{" and ".join(missing)} not installed (extra "inference")')
        report = check.folder / "predict.json"
        words: tuple[object, ...] = ("--size", 2048, "--repeats", 2)
        if check.quick:
            trained_in(check, "float32")
            words = ("--size", 256, "--repeats", 1, "--checkpoint", check.folder / "runs" / "float32")
        check.command("benchmarks/predict.py", "--only", "speed", *words, "--json", report)
        found = json.loads(report.read_text(encoding="utf-8"))["speed"]
        return "; ".join(
            f"{found['mp_per_s'][kind]:.2f} MP/s to {kind}, {share:.2f} of the bare network "
            f"({check.goal(share, PREDICT_GOAL)})"
            for kind, share in found["over_forward"].items()
        )

    check.step("prediction of a tiled TIFF", work)


def profile(check: Check) -> None:
    """A profile of PROFILED_STEPS training steps; on a GPU with the times in which it did nothing."""
    steps = 5 if check.quick else PROFILED_STEPS
    check.step(f"{steps} training steps", lambda: profiled(check, steps))


def profiled(check: Check, steps: int) -> tuple[str, str]:
    """The most expensive operators of an epoch and, on a GPU, the gaps between its kernels."""
    import torch
    from epoch import Bench, made

    size = {"patch_size": 32, "batch_size": 2, "base_features": 4} if check.quick else {
        "patch_size": 256, "batch_size": 12, "base_features": 32,
    }  # fmt: skip
    pairs = made(check.folder / "profiled", 4, 2 * size["patch_size"], 20)
    kinds = torch.profiler.ProfilerActivity
    activities = [kinds.CPU, kinds.CUDA] if check.on_gpu else [kinds.CPU]
    options = Namespace(pairs_dir=pairs, steps=steps, compile=False, **size)
    bench = Bench(options, gpus=None if check.on_gpu else 0)
    try:
        bench.end_to_end()
        with torch.profiler.profile(activities=activities) as profiler:
            rate = bench.end_to_end()
    finally:
        bench.close()
    key = "self_device_time_total" if check.on_gpu else "self_cpu_time_total"
    averages = sorted(profiler.key_averages(), key=lambda event: -getattr(event, key))
    total = sum(getattr(event, key) for event in averages) or 1
    lines = ["| operator | % of the time | calls |", "| --- | --- | --- |"]
    lines += [
        f"| {str(event.key)[:60].replace('|', '/')} | {100 * getattr(event, key) / total:.1f} | {event.count} |"
        for event in averages[:15]
    ]
    said = f"{rate:.1f} patches/s under the profiler, waiting for data {bench.wait:.1%}"
    if not check.on_gpu:
        return f"{said}; a CPU has no idle gaps of its own", "\n".join(lines)
    kernels = [
        (event.time_range.start, event.time_range.end, str(event.name))
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    idle = idle_gaps(kernels)
    if idle is None:
        raise Failed("the profiler has seen no kernel")
    span_us, gaps = idle
    lines += ["", "| idle [us] | after | before |", "| --- | --- | --- |"]
    lines += [
        f"| {gap:.0f} | {after[:50].replace('|', '/')} | {before[:50].replace('|', '/')} |"
        for gap, after, before in sorted(gaps, reverse=True)[:10]
    ]
    share = sum(gap for gap, *_ in gaps) / span_us
    return f"{said}; idle {share:.1%} of {span_us / 1e3:.0f} ms, in {len(gaps)} gaps", "\n".join(lines)


def idle_gaps(work: list[tuple[float, float, str]]) -> tuple[float, list[tuple[float, str, str]]] | None:
    """The time from the first to the last piece of work (start, end, name), and each gap in which none was under way,
    with the work before it and after it; None without work."""
    if not work:
        return None
    work = sorted(work)
    begin, busy_until, last = work[0]
    gaps = []
    for start, end, name in work:
        if start > busy_until:
            gaps.append((start - busy_until, last, name))
        if end >= busy_until:
            busy_until, last = end, name
    return busy_until - begin, gaps


@dataclass(frozen=True)
class Section:
    """What a section is about, the seconds that it may take, and what does it."""

    title: str
    limit_s: float
    run: Callable[[Check], None]


SECTIONS = {
    "tests": Section("tests of what only a GPU can show", 150, tests),
    "precision": Section("the demo recipe in every precision", 90, precision),
    "compile": Section("the demo recipe with torch.compile", 120, compiled),
    "ranks": Section("ranks through the launcher", 90, ranks),
    "norms": Section("norm layers and memory layouts", 60, norms),
    "speed": Section("loader, step and epoch", 240, speed),
    "predict": Section("prediction", 60, predict),
    "profile": Section("where the time of training goes", 60, profile),
    "memory": Section("running out of GPU memory", 90, memory),
}
