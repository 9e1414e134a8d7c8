"""How fast is the monitor, and how much memory does it need, at 30, 1,000 and 100,000 epochs, and at 600, 100,000 and
10 million lines of steps?

Each size is measured in a separate process, pinned to one core if the system allows it:

- first text: from starting ``python monitor_training.py`` until its report is on standard output;
- whole command: until it has also written the figure and ended;
- poll: reading one new epoch, or one new line of steps, diagnosing the run, rendering the terminal view and writing
  monitor.json;
- poll, nothing new: the same without a new line; figure: drawing the figure, which --watch does not do at every poll.

The longest log of steps takes 2.4 GB in the folder for temporary files.

    python benchmarks/monitor.py [--out FILE]
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SIZES = (30, 1_000, 100_000)
STEP_LINES = (600, 100_000, 10_000_000)
LINES_AN_EPOCH = 20
MARKERS = 20


def write_run(folder: Path, epochs: int) -> None:
    """Write a finished run with 20 markers and four metrics per marker: about 3.4 kB per epoch."""
    folder.mkdir(parents=True)
    rng = random.Random(0)
    with open(folder / "metrics.jsonl", "w") as file:
        for epoch in range(1, epochs + 1):
            file.write(json.dumps(record(rng, epoch)) + "\n")
    options = {"epochs": epochs, "learning_rate": 1e-4}
    (folder / "config.json").write_text(json.dumps({"schema": 1, "options": options, "global_batch": 12}))
    status = {"schema": 1, "state": "finished", "epoch": epochs, "epochs": epochs}
    (folder / "status.json").write_text(json.dumps(status))


def record(rng: random.Random, epoch: int) -> dict[str, object]:
    """One line of the log."""
    loss = 0.1 + 0.4 / (1 + epoch / 5) + rng.gauss(0, 0.002)
    terms = {name: loss * rng.random() for name in ("mse", "l1", "boundary", "focal", "variance", "correlation")}
    metrics = ("pearson", "mae", "psnr_db", "ssim")
    return {
        "schema": 1,
        "epoch": epoch,
        "attempt": 1,
        "time": "2026-01-31T10:00:00Z",
        "duration_s": 41.2 + rng.random(),
        "lr": 1e-4,
        "train": {"loss": loss, "terms": terms},
        "val": {
            "loss": loss * 1.05 + rng.gauss(0, 0.002),
            "terms": terms,
            "metrics": {name: rng.random() for name in metrics} | {"pearson_markers": MARKERS},
            "per_channel": {f"marker_{n:02d}": {name: rng.random() for name in metrics} for n in range(MARKERS)},
        },
        "grad_norm": rng.random(),
        "samples_per_s": 210.0,
        "data_wait_fraction": 0.02,
        "max_memory_bytes": 1234567,
        "skipped_steps": 0,
        "best": False,
    }


def write_steps(folder: Path, lines: int) -> None:
    """Write the steps of a run, 20 lines an epoch: about 240 bytes per line."""
    rng = random.Random(2)
    jumps = [rng.gauss(0, 0.01) for _ in range(997)]
    with open(folder / "steps.jsonl", "w", buffering=1 << 20) as file:
        file.writelines(step_line(at, 0.1 + 0.4 / (1 + at / 100) + jumps[at % 997]) for at in range(lines))


def step_line(at: int, loss: float) -> str:
    """Line ``at`` of the log of steps."""
    epoch, step = at // LINES_AN_EPOCH + 1, 50 * (at % LINES_AN_EPOCH + 1)
    return (
        f'{{"schema": 1, "epoch": {epoch}, "step": {step}, "attempt": 1, "time": "2026-01-31T10:00:00Z", '
        f'"loss": {loss!r}, "lr": 0.0001, "grad_norm": {1 + 20 * abs(loss - 0.1)!r}, "samples_per_s": 210.0, '
        f'"data_wait_fraction": 0.02, "skipped_steps": 0, "non_finite_steps": 0}}\n'
    )


def start_up(folder: Path) -> tuple[float, float, float]:
    """Seconds until the report is on standard output, seconds until the command ends, and total processor seconds."""
    begin, used = time.perf_counter(), processor_s()
    command = [sys.executable, str(ROOT / "monitor_training.py"), "--output_dir", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        first = 0.0
        for line in process.stdout:
            if not line.startswith("figure:"):
                first = time.perf_counter() - begin
        process.wait()
    return first, time.perf_counter() - begin, processor_s() - used


def load() -> str:
    """How busy the machine was, from its load average."""
    if not hasattr(os, "getloadavg"):
        return "under unknown load"
    busy = os.getloadavg()[0]
    return f"{'quiet' if busy < 1.3 else 'shared with other work'} (load {busy:.1f})"


def processor_s() -> float:
    """Processor seconds of all ended child processes, on which other load has less effect than on wall time."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def inside(folder: Path, steps: int = 0) -> dict[str, float]:
    """Times of a watching monitor in this process [s], and its peak memory [MB]; with a log of ``steps`` lines, of
    polls with a new line there."""
    from orion_unet.monitor.diagnostics import Thresholds
    from orion_unet.monitor.plots import png, run_figure
    from orion_unet.monitor.report import Run
    from orion_unet.monitor.terminal import make_console, view
    from orion_unet.monitor.watch import Outputs, Request

    console = make_console(io.StringIO(), width=140)
    run = Run(folder, Thresholds())
    outputs = Outputs(Request(folder))

    def poll() -> float:
        begin = time.perf_counter()
        report = run.poll()
        console.print(view(report, console, height=39))
        outputs.write_document(report)
        return time.perf_counter() - begin

    first = poll()
    idle = [poll() for _ in range(10)]
    rng, polls = random.Random(1), []
    for _ in range(10):
        name = "steps.jsonl" if steps else "metrics.jsonl"
        with open(folder / name, "a") as file:
            more = step_line(steps + len(polls), 0.1) if steps else json.dumps(record(rng, len(run.reader) + 1)) + "\n"
            file.write(more)
        polls.append(poll())
    begin = time.perf_counter()
    png(run_figure(run.poll()))
    return {
        "first": first,
        "idle": statistics.median(idle),
        "poll": statistics.median(polls),
        "worst": max(polls),
        "figure": time.perf_counter() - begin,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def measured(folder: Path, log: str, steps: int = 0) -> str:
    """The cells of the table for one run folder, whose file ``log`` is the long one."""
    starts = [start_up(folder) for _ in range(5)]
    size = (folder / log).stat().st_size / 1e6
    words = [sys.executable, __file__, "--inside", str(folder), "--steps", str(steps)]
    t = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    first, whole, used = (statistics.median(values) for values in zip(*starts, strict=True))
    return (
        f"| {size:.1f} | {first:.2f} | {whole:.2f} | {used:.2f} | {1e3 * t['poll']:.1f}"
        f" | {1e3 * t['worst']:.1f} | {1e3 * t['idle']:.1f} | {1e3 * t['figure']:.0f} | {t['memory']:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    if options.inside:
        print(json.dumps(inside(options.inside, options.steps)))
        return
    columns = (
        " log [MB] | first text [s] | whole command, with figure [s] | its processor time [s] | poll, one new line [ms]"
        " | worst of 10 [ms] | poll, nothing new [ms] | figure [ms] | peak memory [MB] |"
    )
    lines = [
        "# Speed of the monitor",
        "",
        f"1 of {os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}; medians of 5 starts",
        f"In the minute before, the machine was {load()}.",
        "",
        "| epochs |" + columns,
        "|" + " --- |" * 10,
    ]
    with tempfile.TemporaryDirectory() as scratch:
        for epochs in SIZES:
            folder = Path(scratch) / str(epochs)
            write_run(folder, epochs)
            lines.append(f"| {epochs:,} {measured(folder, 'metrics.jsonl')}")
        lines += ["", "| lines of steps, in a run of 30 epochs |" + columns, "|" + " --- |" * 10]
        for count in STEP_LINES:
            folder = Path(scratch) / f"steps_{count}"
            write_run(folder, 30)
            write_steps(folder, count)
            lines.append(f"| {count:,} {measured(folder, 'steps.jsonl', count)}")
            (folder / "steps.jsonl").unlink()
    print("\n".join(lines))
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
