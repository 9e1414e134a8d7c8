"""How long does the user wait for the first training step?

    python benchmarks/start_up.py                    # on generated demo data
    python benchmarks/start_up.py --pairs_dir D --json

Starts the trainer several times and breaks down the time from launch to the end of the first step: importing torch,
measuring the data (in the first launch, and again with cached measurements), the first step itself (which depends on
the size of the model), and the rest, which is what the toolkit adds. Also times every --help.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from orion_unet.__main__ import COMMANDS
from orion_unet.cli.arguments import Parser, run_command

ROOT = Path(__file__).resolve().parents[1]
# Runs in a separate process: notes the seconds since launch at every stage and ends after the first step.
STAGES = """
import json, os, sys, time
launched = float(os.environ["LAUNCHED"])
stages = {}
def note(name):
    stages[name] = time.time() - launched
note("interpreter")
import torch
note("import_torch")
from orion_unet.cli.arguments import parse_train_config
from orion_unet.training import loop, prepare
config = parse_train_config(sys.argv[2:])
note("import_trainer")
def timed(module, name, stage):
    original = getattr(module, name)
    def call(*given, **named):
        started = time.time()
        result = original(*given, **named)
        stages[stage] = time.time() - started
        return result
    setattr(module, name, call)
timed(prepare, "known_normalization", "normalisation")
timed(prepare, "measure_scales", "scales")
class Reached(Exception):
    pass
def first_step(*given, **named):
    note("loop_entered")
    for _ in original(*given, **named):
        note("first_step_done")
        raise Reached
original = loop.train_steps
loop.train_steps = first_step
try:
    loop.train(config)
except Reached:
    pass
with open(sys.argv[1], "w") as file:
    json.dump(stages, file)
os._exit(0)
"""


def main(argv: list[str]) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs_dir", metavar="DIR", help="pairs to train on; default: generated demo data")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="launches; reports medians; default: 5")
    parser.add_argument("--json", action="store_true", help="print JSON only")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="orion_start_") as scratch:
        pairs = options.pairs_dir or demo_pairs(Path(scratch))
        results = {"launch": launches(Path(scratch), pairs, options.repeats), "help_s": helps(options.repeats)}
    print(json.dumps(results, indent=2) if options.json else table(results))
    return 0


def demo_pairs(scratch: Path) -> str:
    from orion_unet.demo.make import make_demo

    make_demo(scratch / "pairs", 12, 512, 0)
    return str(scratch / "pairs")


def launches(scratch: Path, pairs: str, repeats: int) -> dict[str, Any]:
    """Stages of the first launch, and medians over the launches that find cached measurements."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(scratch / "cache")}
    words = ["--pairs_dir", pairs, "--patch_size", "128", "--base_features", "8", "--depth", "3", "--batch_size", "4"]
    found = []
    for index in range(repeats + 1):
        out = scratch / f"stages_{index}.json"
        command = [sys.executable, "-c", STAGES, str(out), *words, "--output_dir", str(scratch / f"run_{index}")]
        env["LAUNCHED"] = repr(time.time())
        subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL, timeout=300)
        found.append(durations(json.loads(out.read_text(encoding="utf-8"))))
    return {"first": found[0], "again": {name: median(each[name] for each in found[1:]) for name in found[0]}}


def durations(stages: dict[str, float]) -> dict[str, float]:
    """Seconds per stage; ``toolkit_s`` is everything except importing torch and measuring the data."""
    torch_s = stages["import_torch"] - stages["interpreter"]
    data_s = stages["normalisation"] + stages["scales"]
    return {
        "total_s": stages["first_step_done"],
        "import_torch_s": torch_s,
        "import_trainer_s": stages["import_trainer"] - stages["import_torch"],
        "measure_data_s": data_s,
        "prepare_run_s": stages["loop_entered"] - stages["import_trainer"] - data_s,
        "first_step_s": stages["first_step_done"] - stages["loop_entered"],
        "toolkit_s": stages["first_step_done"] - torch_s - data_s,
    }


def helps(repeats: int) -> dict[str, float]:
    """Median time of every --help."""
    commands = {
        "train_spatial_orion_unet.py": ["train_spatial_orion_unet.py"],
        "monitor_training.py": ["monitor_training.py"],
        **{name: ["-m", "orion_unet", name] for name in COMMANDS},
    }
    found = {}
    for name, words in commands.items():
        taken = []
        for _ in range(repeats):
            started = time.perf_counter()
            subprocess.run(
                [sys.executable, *words, "--help"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL, timeout=60
            )
            taken.append(time.perf_counter() - started)
        found[name] = median(taken)
    return found


def table(results: dict[str, Any]) -> str:
    """The results as a text table."""
    first, again = results["launch"]["first"], results["launch"]["again"]
    lines = [f"{'from launch to the first step':<32}{'first':>8}{'again':>8}"]
    lines += [f"{name:<32}{first[name]:>8.2f}{again[name]:>8.2f}" for name in first]
    lines += ["", f"{'--help':<32}{'seconds':>8}"]
    lines += [f"{name:<32}{seconds:>8.2f}" for name, seconds in results["help_s"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_command(main))
