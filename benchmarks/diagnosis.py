"""How often does the monitor find a fault, and how often does it raise a false alarm?

Simulates runs of known kinds and diagnoses them at their end, and healthy runs at every epoch as well. The kinds follow
the judgement of an experienced person; none is defined through a formula of the detector:

- healthy_fast, healthy_slow: V and L fall to 5-40 % of their start with a time constant of 1-6 or 6-20 epochs
  (exponential or power law); V ends 3 % of the gain below L to 6 % above; noise of V 0.3, 1 or 2 % (shrinking with
  V or not); half have a poor first epoch, a third one bad epoch (+15 to 60 %), a third a sudden fall of the loss.
- plateau: healthy, exponential with a time constant of 5-9 % of the run, floor 15-50 %: flat in the second half.
- noisy_validation: V falls by at most half and jumps by 8, 12 or 20 % of itself (sd) from epoch to epoch.
- slow: L falls by 2-18 % over 20 epochs (in proportion over fewer epochs, no more over longer runs).
- overfitting: healthy, then from 20-60 % of the run on V rises to 20-60 % above its best while L keeps falling.
- diverging: healthy, then in the last epochs V (and L) grow by 1.6-3 per epoch to over 5 times the best, or
  become infinite.

Each at loss scales 0.01, 0.1, 1, 10 and 6, 8, 10, 15, 20, 30, 60, 100, 200 epochs, noise Gaussian or heavy-tailed.

Steps within the epochs are simulated by diagnosis_steps.py, whose head describes them.

    python benchmarks/diagnosis.py [--runs 1000] [--curves ../shared/data/curves] [--out FILE]
    python benchmarks/diagnosis.py --calibrate     # steps only, on runs that no result comes from
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import diagnosis_steps

from orion_unet.findings import WARNING
from orion_unet.monitor.diagnostics import Thresholds, diagnose
from orion_unet.monitor.noise import validation_noise

SCALES = (0.01, 0.1, 1.0, 10.0)
LENGTHS = (6, 8, 10, 15, 20, 30, 60, 100, 200)
HEALTHY = ("healthy_fast", "healthy_slow", "plateau")
EXPECTED = {
    "plateau": "plateau",
    "noisy_validation": "unstable_validation",
    "slow": "slow_convergence",
    "overfitting": "overfitting",
    "diverging": "diverged",
}
KINDS = ("healthy_fast", "healthy_slow", *EXPECTED)


def falling(rng: np.random.Generator, epochs: int, floor: float, tau: float) -> np.ndarray:
    """A curve that falls from 1 towards ``floor``: (epochs,)."""
    t = np.arange(epochs)
    power = rng.uniform(1, 2)
    shape = np.exp(-t / tau) if rng.random() < 0.5 else (1 + t / (tau * power)) ** -power
    return floor + (1 - floor) * shape


def jitter(rng: np.random.Generator, epochs: int) -> np.ndarray:
    """Noise of unit variance, Gaussian or Student t with 5 degrees of freedom: (epochs,)."""
    return rng.standard_normal(epochs) if rng.random() < 0.5 else rng.standard_t(5, epochs) / math.sqrt(5 / 3)


def healthy(
    rng: np.random.Generator, epochs: int, tau: float, resting: bool = False
) -> tuple[np.ndarray, np.ndarray, float]:
    """Training and validation loss (epochs,), and the noise level of the latter."""
    if resting:
        floor = rng.uniform(0.15, 0.5)
        train = floor + (1 - floor) * np.exp(-np.arange(epochs) / tau)
    else:
        train = falling(rng, epochs, rng.uniform(0.05, 0.4), tau)
        if rng.random() < 0.3:
            train[rng.integers(epochs) :] *= rng.uniform(0.85, 0.97)
    val = train + rng.uniform(-0.03, 0.06) * (1 - train)
    if rng.random() < 0.5:
        val = val * (1 + rng.uniform(0, 1) * np.exp(-np.arange(epochs)))
    level = float(rng.choice([0.003, 0.01, 0.02]))
    val = np.maximum(val + level * np.minimum(val, 1) ** rng.uniform(0.3, 1) * jitter(rng, epochs), 0.3 * val)
    train = train * (1 + rng.choice([0.002, 0.01]) * jitter(rng, epochs))
    if rng.random() < 0.3:
        val[rng.integers(epochs)] *= rng.uniform(1.15, 1.6)
    return train, val, level


def simulate(rng: np.random.Generator, kind: str, epochs: int) -> tuple[np.ndarray, np.ndarray, float]:
    """One run of a kind: training and validation loss (epochs,), about 1 in the first epoch, and the noise level."""
    if kind in ("healthy_fast", "healthy_slow"):
        return healthy(rng, epochs, rng.uniform(1, 6) if kind == "healthy_fast" else rng.uniform(6, 20))
    if kind == "plateau":
        return healthy(rng, epochs, rng.uniform(0.05, 0.09) * epochs, resting=True)
    if kind == "noisy_validation":
        train = falling(rng, epochs, rng.uniform(0.5, 0.95), rng.uniform(2, 12))
        val = train * rng.uniform(1, 1.1)
        if rng.random() < 0.5:
            val = val * (1 + rng.uniform(0, 1) * np.exp(-np.arange(epochs)))
        level = float(rng.choice([0.08, 0.12, 0.2]))
        return train, val * np.maximum(1 + level * jitter(rng, epochs), 0.3), level
    if kind == "slow":
        total = rng.uniform(0.02, 0.18) * min(1, epochs / 20)
        train = 1 - total * (np.arange(epochs) / (epochs - 1)) ** rng.uniform(0.6, 1)
        level = float(rng.choice([0.003, 0.01, 0.02]))
        val = train * rng.uniform(0.97, 1.08) * (1 + level * jitter(rng, epochs))
        return train * (1 + rng.choice([0.002, 0.01]) * jitter(rng, epochs)), val, level
    if kind == "overfitting":
        tau = rng.uniform(0.1, 0.25) * epochs
        train = falling(rng, epochs, rng.uniform(0.05, 0.3), tau)
        turn = max(1, round(rng.uniform(0.2, 0.6) * epochs) - 1)
        if epochs - 1 - turn < 3:
            turn = epochs - 4
        val = train.copy()
        rise = np.linspace(0, 1, epochs - turn) ** rng.uniform(0.7, 1.3)
        val[turn:] = train[turn] * (1 + rng.uniform(0.2, 0.6) * rise)
        level = float(rng.choice([0.003, 0.01, 0.02]))
        return train * (1 + 0.005 * jitter(rng, epochs)), val * (1 + level * jitter(rng, epochs)), level
    train, val, level = healthy(rng, epochs, rng.uniform(1, 8))
    if rng.random() < 0.3:
        val[-1] = math.inf
        train[-1] = math.inf
        return train, val, level
    factor = rng.uniform(1.6, 3)
    last = min(epochs - 2, math.ceil(math.log(5) / math.log(factor)) + 2)
    growth = factor ** np.arange(1, last + 1)
    val[-last:] = val[: epochs - last].min() * growth
    train[-last:] = train[: epochs - last].min() * growth ** rng.uniform(0.3, 1)
    return train, val, level


def plain_noise(val: np.ndarray) -> float:
    """A simpler estimate of noise: the median second difference of the last 8 epochs."""
    recent = val[1:][-8:]
    return 1.4826 * float(np.median(np.abs(recent[2:] - 2 * recent[1:-1] + recent[:-2]))) / math.sqrt(6)


def codes(train: np.ndarray, val: np.ndarray) -> dict[str, str]:
    """Codes of the monitor's findings for these curves, with their severity."""
    return {f.code: f.severity for f in diagnose(np.arange(1, len(val) + 1), train, val)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=int, default=1000, help="runs per kind; default: 1000")
    parser.add_argument("--curves", type=Path, default=Path("../shared/data/curves"), help="labelled real curves")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, help="also write the report to this file")
    parser.add_argument(
        "--calibrate", action="store_true", help="steps only, on the runs that limits may be chosen on; needs no --out"
    )
    options = parser.parse_args()
    if options.calibrate:
        if options.out:
            parser.error("--calibrate and --out: runs for calibration give no results; leave one of the two out")
        diagnosis_steps.report(max(options.runs // 4, 1), True, print)
        return
    start = time.perf_counter()
    lines: list[str] = []

    def say(text: str = "") -> None:
        print(text, flush=True)
        lines.append(text)

    say(f"# Diagnosis of simulated runs\n\n{options.runs} runs per kind, seed {options.seed}.\n")
    end: dict[str, Counter[str]] = defaultdict(Counter)
    by: dict[tuple[str, str, object], list[bool]] = defaultdict(list)
    on_the_way: dict[str, list[bool]] = defaultdict(list)
    each_epoch: dict[int, list[bool]] = defaultdict(list)
    way_codes: Counter[str] = Counter()
    for kind in KINDS:
        rng = np.random.default_rng([options.seed, KINDS.index(kind)])
        for run in range(options.runs):
            epochs, scale = LENGTHS[run % len(LENGTHS)], SCALES[run // len(LENGTHS) % len(SCALES)]
            if kind == "plateau" and epochs < 10:
                epochs = 10
            train, val, level = simulate(rng, kind, epochs)
            train, val = train * scale, val * scale
            found = codes(train, val)
            warned = [code for code, severity in found.items() if severity == WARNING]
            end[kind].update(found.keys())
            end[kind]["any warning"] += bool(warned)
            right = not warned if kind in HEALTHY else EXPECTED[kind] in found
            for name, value in (("epochs", epochs), ("scale", scale), ("noise", level)):
                by[kind, name, value].append(right)
            if kind in HEALTHY:
                wrong = False
                for at in range(1, epochs + 1):
                    said = [c for c, s in codes(train[:at], val[:at]).items() if s == WARNING]
                    each_epoch[at].append(bool(said))
                    wrong |= bool(said)
                    way_codes.update(f"{c} {kind}" for c in said)
                on_the_way[kind].append(wrong)

    names = ("unstable_validation", "slow_convergence", "overfitting", "diverged", "plateau", "any warning")
    say("## At the end of the run: share of runs given each code [%]\n")
    say("| kind | " + " | ".join(names) + " | meant |\n|" + " --- |" * (len(names) + 2))
    for kind in KINDS:
        cells = [f"{100 * end[kind][name] / options.runs:.1f}" for name in names]
        say(f"| {kind} | {' | '.join(cells)} | {EXPECTED.get(kind, 'no warning')} |")
    say("\n## Found, or silent where healthy [%], by length, loss scale and noise of V\n")
    for name in ("epochs", "scale", "noise"):
        values = sorted({key[2] for key in by if key[1] == name})
        say(f"| {name} | " + " | ".join(f"{value:g}" for value in values) + " |\n|" + " --- |" * (len(values) + 1))
        for kind in KINDS:
            row = [by.get((kind, name, value), []) for value in values]
            say(f"| {kind} | " + " | ".join(f"{100 * np.mean(cell):.1f}" if cell else "" for cell in row) + " |")
        say()
    say("## Where noise becomes unstable: runs of 30 epochs given unstable_validation [%]\n")
    levels = (0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.15)
    say("| noise of V (sd / V) | " + " | ".join(f"{level:g}" for level in levels) + " |\n|" + " --- |" * 10)
    for share in (0.2, 0.5, 0.8):
        rng = np.random.default_rng(options.seed)
        cells = []
        for level in levels:
            said = []
            for _ in range(max(options.runs // 5, 50)):
                train = falling(rng, 30, share, rng.uniform(2, 12))
                said.append("unstable_validation" in codes(train, train * (1 + level * jitter(rng, 30))))
            cells.append(f"{100 * np.mean(said):.0f}")
        say(f"| V falls to {share:.0%} of its start | " + " | ".join(cells) + " |")
    say("\n## Against the plainer estimate: runs of 20 epochs over both relative thresholds [%]\n")
    limits = Thresholds()
    for name, estimate in (("fit to the logarithm", validation_noise), ("median second difference", plain_noise)):
        shares = {}
        for kind in (*HEALTHY, "noisy_validation"):
            rng = np.random.default_rng([options.seed, KINDS.index(kind)])
            over = []
            for _ in range(options.runs):
                val = simulate(rng, kind, 20)[1]
                level = float(np.median(val[-5:]))
                gain = max(float(np.median(val[:3])) - level, 0)
                over.append(estimate(val) > max(limits.max_noise_of_loss * level, limits.max_noise_of_gain * gain))
            shares[kind] = f"{kind} {100 * np.mean(over):.1f}"
        say(f"- {name}: {', '.join(shares.values())}")
    say("\n## False alarms of healthy runs on the way\n")
    for kind in HEALTHY:
        say(f"- {kind}: {100 * np.mean(on_the_way[kind]):.1f} % of runs had a warning at any epoch")
    rates = {at: float(np.mean(values)) for at, values in each_epoch.items()}
    worst = max(rates, key=lambda at: rates[at])
    say(f"- worst single epoch: {worst}, where {100 * rates[worst]:.1f} % of runs had a warning")
    say(f"- all epochs together: {100 * np.mean(np.concatenate(list(each_epoch.values()))):.2f} %, {dict(way_codes)}")
    diagnosis_steps.report(max(options.runs // 4, 1), False, say)
    say("\n## Labelled real curves\n")
    for path in sorted(options.curves.glob("*.json")):
        curve = json.loads(path.read_text())
        train, val = np.array(curve["train_loss"], float), np.array(curve["val_loss"], float)
        warned = sorted(code for code, severity in codes(train, val).items() if severity == WARNING)
        verdict = "right" if warned == sorted(curve["expected"]) else "WRONG"
        say(f"- {path.stem}: expected {sorted(curve['expected'])}, said {warned}: {verdict}")
    say(f"\nMeasured on {os.cpu_count()} cores, one used, in {time.perf_counter() - start:.0f} s.")
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
