"""Does everything that has never run on a GPU work there, and how fast? One report, in under 10 minutes on one GPU.

    scripts/gpu_check.sh                              on a GPU; writes benchmarks/results/gpu.md
    scripts/gpu_check.sh --only speed profile         some sections; writes runs/gpu_check.md
    scripts/gpu_check.sh --device cpu --quick         tries the check itself, without a GPU; writes runs/gpu_check.md

Every section runs in processes of its own, with a time limit of its own; what fails is reported, and the next section
follows. Exit code 1 if anything failed. A goal that is missed is reported as such and is no failure.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from gpu_sections import ROOT, SECTIONS, Check, Row

from orion_unet.cli.arguments import Parser, run_command
from orion_unet.errors import InputError

RESULT, PARTIAL = ROOT / "benchmarks" / "results" / "gpu.md", ROOT / "runs" / "gpu_check.md"
# All sections together on a GPU; with the start and the report, 10 minutes. A CPU, perhaps busy, may take longer.
TOTAL_S = 570.0
PATIENCE = {"cuda": 1.0, "cpu": 10.0}
MARK = "ORION_GPU_CHECK"
DEVICE = """
import torch
print(torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory // 2**20, torch.version.cuda,
      torch.backends.cudnn.version(), sep="|")
"""


def main(argv: list[str]) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    parser.add_argument("--quick", action="store_true", help="tiny settings, whose speeds mean nothing")
    parser.add_argument("--output", type=Path, metavar="FILE.md", help="default: as above")
    parser.add_argument("--only", nargs="+", choices=tuple(SECTIONS), default=tuple(SECTIONS), help="default: all")
    parser.add_argument("--section", choices=tuple(SECTIONS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.section:
        SECTIONS[options.section].run(Check(options.section, options.device, options.quick, options.folder))
        return 0
    whole = options.device == "cuda" and not options.quick and set(options.only) == set(SECTIONS)
    output = (options.output or (RESULT if whole else PARTIAL)).resolve()
    machine = described(options.device)
    if options.device == "cpu" and output == RESULT:
        raise InputError(f"--output {options.output}: is for results of a GPU, not for --device cpu")
    started = time.monotonic()
    patience = PATIENCE[options.device]
    if options.device == "cpu" and options.quick:
        # For tensors this small, threads cost more than they bring.
        os.environ["OMP_NUM_THREADS"] = "1"
    found: dict[str, list[Row]] = {}
    with tempfile.TemporaryDirectory(prefix="orion_gpu_check_") as folder:
        for name in options.only:
            words = ["--section", name, "--folder", folder, "--device", options.device, *["--quick"] * options.quick]
            left_s = TOTAL_S - (time.monotonic() - started) / patience
            limit_s = patience * min(SECTIONS[name].limit_s, left_s)
            print(f"{name}: {SECTIONS[name].title} ...", flush=True)
            found[name] = run_section(name, [sys.executable, __file__, *words], Path(folder), limit_s)
            for row in found[name]:
                print(f"  {row.state:<8}{row.what}: {row.result} ({row.seconds:.0f} s)", flush=True)
        text = report(found, machine, options.quick, time.monotonic() - started)
        for path, name in ((folder, "FOLDER"), (str(ROOT), ".")):
            text = text.replace(path, name)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text, encoding="utf-8")
    print(f"written to {output}")
    return int(any(row.state == "failed" for rows in found.values() for row in rows))


def described(device: str) -> str:
    """The machine, for a person; raises InputError where there is no such device."""
    import torch

    software = f"Python {platform.python_version()}, torch {torch.__version__}"
    if device == "cpu":
        return f"CPU ({platform.machine()}, {len(os.sched_getaffinity(0))} cores), {software}"
    if not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU here; --device cpu tries the check itself")
    # In a process of its own, which leaves nothing on the GPU.
    done = subprocess.run([sys.executable, "-c", DEVICE], capture_output=True, text=True, check=True)
    name, memory, cuda, cudnn = done.stdout.strip().split("|")
    count = torch.cuda.device_count()
    return f"{name}, {memory} MB{f' (one of {count})' if count > 1 else ''}, CUDA {cuda}, cuDNN {cudnn}, {software}"


def run_section(name: str, command: Sequence[str], folder: Path, limit_s: float) -> list[Row]:
    """Run a section in a process of its own; its rows, and one more where it did not end well in time."""
    if limit_s <= 0:
        return [Row(SECTIONS[name].title, f"not run: the {TOTAL_S:.0f} s of the whole check are over", "failed")]
    mark = uuid.uuid4().hex
    log = folder / f"{name}.log"
    started = time.monotonic()
    problem = ""
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, MARK: mark},
            stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            code = process.wait(limit_s)
            if code != 0:
                lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
                problem = f"ended with code {code}: {lines[-1] if lines else 'without a word'}"
        except subprocess.TimeoutExpired:
            problem = f"ran past its limit of {limit_s:.0f} s"
        finally:
            end_marked(mark)
            process.kill()
            process.wait()
    rows_file, now = folder / f"{name}.jsonl", folder / f"{name}.now"
    lines = rows_file.read_text(encoding="utf-8").splitlines() if rows_file.exists() else []
    rows = [Row(**json.loads(line)) for line in lines]
    if problem or not rows:
        what = now.read_text(encoding="utf-8") if now.exists() else SECTIONS[name].title
        spent = time.monotonic() - started - sum(row.seconds for row in rows)
        rows.append(Row(what, problem or "did nothing", "failed", max(0.0, spent)))
    return rows


def end_marked(mark: str) -> None:
    """Kill every process that carries the mark: the ranks of a launcher are in sessions of their own."""
    wanted = f"{MARK}={mark}".encode()
    for _ in range(100):
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if wanted in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
        for process in found:
            with suppress(OSError):
                os.kill(process, signal.SIGKILL)
        if not found:
            return
        time.sleep(0.05)


def report(found: dict[str, list[Row]], machine: str, quick: bool, seconds: float) -> str:
    """The whole result in Markdown."""
    on_gpu = not machine.startswith("CPU")
    failed = sum(row.state == "failed" for rows in found.values() for row in rows)
    steps = sum(len(rows) for rows in found.values())
    lines = [
        "# GPU check" if on_gpu else "# GPU check, tried on a CPU",
        "",
        f"`scripts/gpu_check.sh`: {machine}. {steps} steps in {seconds:.0f} s, {failed or 'none'} failed.",
        "",
    ]
    if not on_gpu:
        lines += ["**Run on a CPU: this shows that the check itself works, and nothing about a GPU.**", ""]
    if quick:
        lines += ["Quick: networks and data are tiny, and their speeds mean nothing.", ""]
    lines += ["| section | what it did | result | s |", "| --- | --- | --- | --- |"]
    for name, rows in found.items():
        for row in rows:
            state = {"ok": "", "failed": "**failed**: ", "skipped": "skipped: "}[row.state]
            cells = (name, row.what, state + row.result, f"{row.seconds:.1f}")
            lines.append("| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |")
    for name, rows in found.items():
        detailed = [row for row in rows if row.detail]
        if detailed:
            lines += ["", f"## {name}: {SECTIONS[name].title}"]
            for row in detailed:
                lines += ["", f"{row.what}:", "", row.detail]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(run_command(main))
