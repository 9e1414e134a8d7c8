"""How often does the monitor find a fault, and how often does it raise a false alarm?

Simulates runs of known kinds and diagnoses them at their end, and healthy runs at every epoch as well. The kinds follow
the judgement of an experienced person; none is defined through a formula of the detector:

- healthy_fast, healthy_slow: V and L fall to 5-40 % of their start with a time constant of 1-6 or 6-20 epochs
  (exponential or power law); V ends 3 % of the gain below L to 6 % above; in half of the runs it is up to half an epoch
  ahead of L (measured at the end of the epoch, where L is its mean) or behind (averaged weights); noise of V 0.3, 1 or
  2 % (shrinking with V or not); half have a poor first epoch, a third one bad epoch (+15 to 60 %), a third a sudden
  fall of the loss. Predictions come to explain 10-80 % of the markers' variance.
- plateau: healthy, exponential with a time constant of 5-9 % of the run, floor 15-50 %: flat in the second half.
- early: what the network learns it learns within epoch 1: L falls by 2-18 % after it, and 30-80 % of the variance are
  explained from epoch 1 on.
- noisy_validation: V falls by at most half and jumps by 8, 12 or 20 % of itself (sd) from epoch to epoch.
- slow: L falls by 2-18 % over 20 epochs (in proportion over fewer epochs, no more over longer runs), less than a tenth
  of the variance is explained.
- overfitting: healthy, then from 20-60 % of the run on V rises to 20-60 % above its best while L keeps falling.
- worse_than_mean: the losses of a healthy run, and a squared error of 2.3 to 7 times that of the means.
- diverging: healthy, then in the last epochs V (and L) grow by 1.6-3 per epoch to over 5 times the best, or
  become infinite.

Each at loss scales 0.01, 0.1, 1, 10 and 6, 8, 10, 15, 20, 30, 60, 100, 200 epochs, noise Gaussian or heavy-tailed. The
learning rate of a third of the runs is constant; of a third it is halved once or twice in the second half; a third has
the launcher's cosine with half an epoch of warm-up, which takes L and V down by up to a further 15 %.

A slow run under a cosine is judged at its last epoch with a tenth of the highest rate: after that, the monitor does not
advise to learn faster.

Limits are chosen on the runs of CALIBRATION_SEED, which ``--calibrate`` shows; results come from REPORT_SEED. A result
cannot be made of runs that a limit was chosen on. Seeds 7 and 23 gave results before, and are used no more.

Steps within the epochs are simulated by diagnosis_steps.py, whose head describes them.

    python benchmarks/diagnosis.py [--runs 1000] [--curves ../shared/data/curves] [--out FILE]
    python benchmarks/diagnosis.py --calibrate     # on runs that no result comes from
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import diagnosis_steps
from diagnosis_steps import CALIBRATION_SEED, REPORT_SEED

from orion_unet.findings import WARNING
from orion_unet.monitor.diagnostics import Thresholds, diagnose
from orion_unet.monitor.noise import recent_level, validation_noise

SCALES = (0.01, 0.1, 1.0, 10.0)
LENGTHS = (6, 8, 10, 15, 20, 30, 60, 100, 200)
HEALTHY = ("healthy_fast", "healthy_slow", "plateau", "early")
SCHEDULES = ("constant", "plateau", "cosine")
EXPECTED = {
    "plateau": "plateau",
    "noisy_validation": "unstable_validation",
    "slow": "slow_convergence",
    "overfitting": "overfitting",
    "worse_than_mean": "worse_than_mean",
    "diverging": "diverged",
}
KINDS = ("healthy_fast", "healthy_slow", "early", *EXPECTED)
# Lengths at which estimates of noise are compared, and the false alarms that each of them may give there.
SHORT, ALLOWED = (6, 7, 8, 9, 10, 12, 15), 0.02


@dataclass(frozen=True)
class Simulated:
    """A run (epochs,): losses, V without its noise, the noise's level, learning rate, share of the variance explained,
    schedule."""

    train: np.ndarray
    val: np.ndarray
    trend: np.ndarray
    level: float
    rate: np.ndarray
    r2: np.ndarray
    schedule: str

    def codes(self, end: int | None = None) -> dict[str, str]:
        """Codes of the monitor's findings after ``end`` epochs, with their severity."""
        epochs = np.arange(1, len(self.val) + 1)
        curves = (each[:end] for each in (epochs, self.train, self.val))
        options = {"scheduler": self.schedule}
        found = diagnose(*curves, options=options, r2=self.r2[:end], rate=self.rate[:end])
        return {finding.code: finding.severity for finding in found}

    def judged_at(self, kind: str) -> int:
        """The number of epochs after which the run is judged."""
        if kind == "slow" and self.schedule == "cosine":
            return int(np.flatnonzero(self.rate >= 0.1 * self.rate.max())[-1]) + 1
        return len(self.val)


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
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Training and validation loss (epochs,), the latter without noise, and the level of that noise."""
    if resting:
        floor = rng.uniform(0.15, 0.5)
        train = floor + (1 - floor) * np.exp(-np.arange(epochs) / tau)
    else:
        train = falling(rng, epochs, rng.uniform(0.05, 0.4), tau)
        if rng.random() < 0.3:
            train[rng.integers(epochs) :] *= rng.uniform(0.85, 0.97)
    behind = rng.uniform(-0.5, 0.5) if rng.random() < 0.5 else 0.0
    followed = np.interp(np.arange(epochs) - behind, np.arange(epochs), train)
    val = followed + rng.uniform(-0.03, 0.06) * (1 - followed)
    if rng.random() < 0.5:
        val = val * (1 + rng.uniform(0, 1) * np.exp(-np.arange(epochs)))
    level, trend = float(rng.choice([0.003, 0.01, 0.02])), val
    val = np.maximum(val + level * np.minimum(val, 1) ** rng.uniform(0.3, 1) * jitter(rng, epochs), 0.3 * val)
    train = train * (1 + rng.choice([0.002, 0.01]) * jitter(rng, epochs))
    if rng.random() < 0.3:
        val[rng.integers(epochs)] *= rng.uniform(1.15, 1.6)
    return train, val, trend, level


def simulate(rng: np.random.Generator, kind: str, epochs: int) -> Simulated:
    """One run of a kind; its losses are about 1 in the first epoch."""
    train, val, trend, level = _losses(rng, kind, epochs)
    schedule = SCHEDULES[rng.integers(3)]
    rate = np.ones(epochs)
    if schedule == "plateau":
        for _ in range(rng.integers(1, 3)):
            rate[rng.integers(epochs // 2, epochs) :] *= 0.5
    elif schedule == "cosine":
        end = np.arange(1, epochs + 1)
        rate = np.minimum(end / 0.5, 1) * (1 + np.cos(np.pi * np.maximum(end - 0.5, 0) / (epochs - 0.5))) / 2
        further = 1 - rng.uniform(0, 0.15) * (1 - rate)
        train, val, trend = train * further, val * further, trend * further
    learnt = (trend[0] - np.minimum.accumulate(trend)) / max(trend[0] - trend.min(), 1e-9)
    explained = rng.uniform(0.1, 0.8) * learnt
    if kind in ("early", "slow"):
        explained = np.full(epochs, rng.uniform(0.3, 0.8) if kind == "early" else rng.uniform(0, 0.1))
    elif kind == "worse_than_mean":
        explained = np.full(epochs, -rng.uniform(1.3, 6))
    r2 = explained + 0.02 * rng.standard_normal(epochs)
    return Simulated(train, val, trend, level, rate, r2, schedule)


def _losses(rng: np.random.Generator, kind: str, epochs: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Training and validation loss (epochs,), the latter without noise, and the level of that noise."""
    if kind in ("healthy_fast", "healthy_slow", "worse_than_mean"):
        return healthy(rng, epochs, rng.uniform(6, 20) if kind == "healthy_slow" else rng.uniform(1, 6))
    if kind == "plateau":
        return healthy(rng, epochs, rng.uniform(0.05, 0.09) * epochs, resting=True)
    if kind == "noisy_validation":
        train = falling(rng, epochs, rng.uniform(0.5, 0.95), rng.uniform(2, 12))
        trend = train * rng.uniform(1, 1.1)
        if rng.random() < 0.5:
            trend = trend * (1 + rng.uniform(0, 1) * np.exp(-np.arange(epochs)))
        level = float(rng.choice([0.08, 0.12, 0.2]))
        return train, trend * np.maximum(1 + level * jitter(rng, epochs), 0.3), trend, level
    if kind in ("slow", "early"):
        total = rng.uniform(0.02, 0.18) * min(1, epochs / 20)
        train = 1 - total * (np.arange(epochs) / (epochs - 1)) ** rng.uniform(0.6, 1)
        trend = train * rng.uniform(0.97, 1.08)
        level = float(rng.choice([0.003, 0.01, 0.02]))
        val = trend * (1 + level * jitter(rng, epochs))
        return train * (1 + rng.choice([0.002, 0.01]) * jitter(rng, epochs)), val, trend, level
    if kind == "overfitting":
        tau = rng.uniform(0.1, 0.25) * epochs
        train = falling(rng, epochs, rng.uniform(0.05, 0.3), tau)
        turn = max(1, round(rng.uniform(0.2, 0.6) * epochs) - 1)
        if epochs - 1 - turn < 3:
            turn = epochs - 4
        trend = train.copy()
        rise = np.linspace(0, 1, epochs - turn) ** rng.uniform(0.7, 1.3)
        trend[turn:] = train[turn] * (1 + rng.uniform(0.2, 0.6) * rise)
        level = float(rng.choice([0.003, 0.01, 0.02]))
        val = trend * (1 + level * jitter(rng, epochs))
        return train * (1 + 0.005 * jitter(rng, epochs)), val, trend, level
    train, val, trend, level = healthy(rng, epochs, rng.uniform(1, 8))
    if rng.random() < 0.3:
        val[-1] = math.inf
        train[-1] = math.inf
        return train, val, trend, level
    factor = rng.uniform(1.6, 3)
    last = min(epochs - 2, math.ceil(math.log(5) / math.log(factor)) + 2)
    growth = factor ** np.arange(1, last + 1)
    val[-last:] = val[: epochs - last].min() * growth
    train[-last:] = train[: epochs - last].min() * growth ** rng.uniform(0.3, 1)
    return train, val, trend, level


def codes(train: np.ndarray, val: np.ndarray) -> dict[str, str]:
    """Codes of the monitor's findings for curves alone, with their severity."""
    return {f.code: f.severity for f in diagnose(np.arange(1, len(val) + 1), train, val)}


def plain_noise(run: Simulated) -> float:
    """A simpler estimate of noise: the median second difference of the last 8 epochs."""
    recent = run.val[1:][-8:]
    return 1.4826 * float(np.median(np.abs(recent[2:] - 2 * recent[1:-1] + recent[:-2]))) / math.sqrt(6)


def perfect_noise(run: Simulated) -> float:
    """The best estimate there can be: around the trend that V really has, which nobody knows, without the epoch that is
    farthest off; the first two epochs do not count, as for the monitor."""
    residual = np.sort(np.abs(np.log(run.val / run.trend))[2:])
    count = len(residual) - 1
    return math.sqrt(float((residual[:-1] ** 2).sum()) / max(count - 1, 1)) * recent_level(run.val)


ESTIMATES: dict[str, Callable[[Simulated], float]] = {
    "median second difference": plain_noise,
    "polynomial": lambda run: validation_noise(run.val),
    "with the training loss (the monitor's)": lambda run: validation_noise(run.val, run.train),
    "around the true trend": perfect_noise,
}


def short_runs(seed: int, runs: int, say: Callable[[str], None]) -> None:
    """What could be found at all in short runs: every estimate with the limit that gives ALLOWED false alarms, chosen
    on runs of CALIBRATION_SEED and scored on those of ``seed``."""
    say(
        f"## Noise in short runs: found [%], and false alarms of healthy runs [%] in brackets\n\nEvery estimate with "
        f"its own limit, the one with {ALLOWED:.0%} false alarms in runs of seed {CALIBRATION_SEED}.\n"
    )
    say(f"| epochs | {' | '.join(ESTIMATES)} |\n|" + " --- |" * (len(ESTIMATES) + 1))
    for epochs in SHORT:
        shares = {}
        for name in (CALIBRATION_SEED, seed):
            for noisy, kinds in ((False, HEALTHY), (True, ("noisy_validation",))):
                found = []
                for kind in kinds:
                    rng = np.random.default_rng([name, 3, KINDS.index(kind), epochs])
                    for _ in range(runs // len(kinds)):
                        run = simulate(rng, kind, epochs)
                        found.append([estimate(run) / _relative_limit(run) for estimate in ESTIMATES.values()])
                shares[name, noisy] = np.nan_to_num(np.array(found))
        limits = np.quantile(shares[CALIBRATION_SEED, False], 1 - ALLOWED, axis=0)
        hits, alarms = ((100 * (shares[seed, noisy] > limits).mean(axis=0)) for noisy in (True, False))
        cells = [
            f"{hit:.0f} ({alarm:.1f})" if limit > 0 else "-"
            for hit, alarm, limit in zip(hits, alarms, limits, strict=True)
        ]
        say(f"| {epochs} | {' | '.join(cells)} |")
    say("")


def _relative_limit(run: Simulated) -> float:
    """The monitor's limit for the noise at any scale of the loss, without what few epochs add to it."""
    level, limits = recent_level(run.val), Thresholds()
    gain = max(float(np.median(run.val[:3])) - level, 0)
    return max(limits.max_noise_of_loss * level, limits.max_noise_of_gain * gain)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=int, default=1000, help="runs per kind; default: 1000")
    parser.add_argument("--curves", type=Path, default=Path("../shared/data/curves"), help="labelled real curves")
    parser.add_argument("--out", type=Path, help="also write the report to this file")
    parser.add_argument(
        "--calibrate", action="store_true", help="on the runs that limits may be chosen on; no result, so no --out"
    )
    options = parser.parse_args()
    if options.calibrate and options.out:
        parser.error("--calibrate and --out: runs for calibration give no results; leave one of the two out")
    seed = CALIBRATION_SEED if options.calibrate else REPORT_SEED
    start = time.perf_counter()
    lines: list[str] = []

    def say(text: str = "") -> None:
        print(text, flush=True)
        lines.append(text)

    of_calibration = ", the runs for calibration: **not a result**" if options.calibrate else ""
    say(f"# Diagnosis of simulated runs\n\n{options.runs} runs per kind, seed {seed}{of_calibration}.\n")
    end: dict[str, Counter[str]] = defaultdict(Counter)
    by: dict[tuple[str, str, object], list[bool]] = defaultdict(list)
    on_the_way: dict[str, list[bool]] = defaultdict(list)
    each_epoch: dict[int, list[bool]] = defaultdict(list)
    way_codes: Counter[str] = Counter()
    for kind in KINDS:
        rng = np.random.default_rng([seed, 1, KINDS.index(kind)])
        for number in range(options.runs):
            epochs, scale = LENGTHS[number % len(LENGTHS)], SCALES[number // len(LENGTHS) % len(SCALES)]
            if kind == "plateau" and epochs < 10:
                epochs = 10
            run = simulate(rng, kind, epochs)
            run = replace(run, train=run.train * scale, val=run.val * scale)
            found = run.codes(run.judged_at(kind))
            warned = [code for code, severity in found.items() if severity == WARNING]
            end[kind].update(found.keys())
            end[kind]["any warning"] += bool(warned)
            right = not warned if kind in HEALTHY else EXPECTED[kind] in found
            for name, value in (("epochs", epochs), ("scale", scale), ("noise", run.level), ("schedule", run.schedule)):
                by[kind, name, value].append(right)
            if kind in HEALTHY:
                wrong = False
                for at in range(1, epochs + 1):
                    said = [c for c, s in run.codes(at).items() if s == WARNING]
                    each_epoch[at].append(bool(said))
                    wrong |= bool(said)
                    way_codes.update(f"{c} {kind}" for c in said)
                on_the_way[kind].append(wrong)

    names = (*("unstable_validation", "slow_convergence", "overfitting", "worse_than_mean", "diverged", "plateau"),)
    names = (*names, "any warning")
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
        rng = np.random.default_rng([seed, 2])
        cells = []
        for level in levels:
            said = []
            for _ in range(max(options.runs // 5, 50)):
                train = falling(rng, 30, share, rng.uniform(2, 12))
                said.append("unstable_validation" in codes(train, train * (1 + level * jitter(rng, 30))))
            cells.append(f"{100 * np.mean(said):.0f}")
        say(f"| V falls to {share:.0%} of its start | " + " | ".join(cells) + " |")
    say("")
    short_runs(seed, options.runs, say)
    say("## False alarms of healthy runs on the way\n")
    for kind in HEALTHY:
        say(f"- {kind}: {100 * np.mean(on_the_way[kind]):.1f} % of runs had a warning at any epoch")
    rates = {at: float(np.mean(values)) for at, values in each_epoch.items()}
    worst = max(rates, key=lambda at: rates[at])
    say(f"- worst single epoch: {worst}, where {100 * rates[worst]:.1f} % of runs had a warning")
    say(f"- all epochs together: {100 * np.mean(np.concatenate(list(each_epoch.values()))):.2f} %, {dict(way_codes)}")
    diagnosis_steps.report(max(options.runs // 4, 1), options.calibrate, say)
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
