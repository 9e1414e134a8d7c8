"""What do the lines of steps.jsonl cost a training step?

Times ``StepLog.add`` over whole epochs, with the lines that it writes, and divides by the time of a training step: on
this machine that of a small network on the CPU, and as an example a step of 20 ms. Every interval is measured
``--repeats`` times, the median counts.

    python benchmarks/step_log.py [--out FILE] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

GOAL = 0.001
FAST_STEP_S = 0.02


def cost_s(folder: Path, every: int | None, steps: int, repeats: int) -> float:
    """Seconds that the log takes of an epoch's step, the lines included."""
    from orion_unet.run_log import StepsWriter
    from orion_unet.training.engine import Step
    from orion_unet.training.steps import StepLog, line_interval

    found = []
    for repeat in range(repeats):
        log = StepLog(StepsWriter(folder), line_interval(every, steps), steps, 12, 1, print)
        log.begin(repeat + 1)
        done = [Step(step, 0.1 + 1 / (step + 1), grad_norm=1.0) for step in range(steps)]
        started = time.perf_counter()
        for step in done:
            log.add(step, 1e-4, 0.0)
        found.append((time.perf_counter() - started) / steps)
    return statistics.median(found)


def step_s(repeats: int) -> float:
    """Seconds of a training step of a small network (base 8, depth 2, two patches of 64 pixels) on one CPU thread."""
    import torch

    from orion_unet.config import OptimisationOptions
    from orion_unet.data.transforms import Batch
    from orion_unet.losses import CompositeLoss
    from orion_unet.models.unet import SpatialUNet
    from orion_unet.training.averages import RunningStatistics
    from orion_unet.training.engine import Learner, TrainSums, train_steps
    from orion_unet.training.optim import build_optimizer

    torch.set_num_threads(1)
    model = SpatialUNet(20, base_features=8, depth=2)
    loss = CompositeLoss({"mse": 0.8, "l1": 0.3, "boundary": 0.1, "focal": 0.0, "variance": 0.1, "correlation": 0.0})
    cpu = torch.device("cpu")
    learner = Learner(model, build_optimizer(model, OptimisationOptions(), cpu), RunningStatistics(model))
    batch = Batch(torch.rand(2, 3, 64, 64), torch.rand(2, 20, 64, 64), torch.ones(2, 1, 64, 64) > 0, torch.arange(2))
    found = []
    last = time.perf_counter()
    for _ in train_steps(learner, [batch] * (repeats + 3), loss, TrainSums.start(loss, cpu), [1e-4] * (repeats + 3)):
        now = time.perf_counter()
        found.append(now - last)
        last = now
    return statistics.median(found[3:])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    own = step_s(max(options.repeats, 5))
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for steps, every in ((50, None), (200, None), (1000, None), (1000, 1)):
            cost = cost_s(Path(scratch), every, steps, options.repeats)
            interval = "automatic" if every is None else f"every {every}"
            rows.append({"steps": steps, "lines": interval, "cost_s": cost,
                         "of_this_step": cost / own, "of_fast_step": cost / FAST_STEP_S})  # fmt: skip
    if options.json:
        print(json.dumps({"step_s": own, "rows": rows}))
        return
    lines = [
        "# Cost of steps.jsonl",
        "",
        f"{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}, a local disk; medians of "
        f"{options.repeats}. The small step takes {1e3 * own:.1f} ms. Goal: at most {GOAL:.1%} of a step.",
        "",
        "| steps an epoch | lines | cost a step [µs] | ratio to the small step | ratio to a step of "
        f"{1e3 * FAST_STEP_S:.0f} ms | goal, there |",
        "|" + " --- |" * 6,
    ]
    lines += [
        f"| {row['steps']} | {row['lines']} | {1e6 * row['cost_s']:.1f} | {row['of_this_step']:.5f} "
        f"| {row['of_fast_step']:.5f} | {'met' if row['of_fast_step'] <= GOAL else '**missed**'} |"
        for row in rows
    ]
    print("\n".join(lines))
    if options.out:
        options.out.write_text("\n".join([*lines, "", "    python benchmarks/step_log.py"]) + "\n")


if __name__ == "__main__":
    main()
