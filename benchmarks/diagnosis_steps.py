"""Simulated steps for benchmarks/diagnosis.py: how often are faults within the epochs found, how often is one imagined?

Runs of 20 lines an epoch, each line the mean of 1 to 100 steps, judged after every line, as a monitor does that looks
often. No kind is defined through a formula of the detector:

- healthy: the loss falls to 5-70 % with a time constant of 0.03-3 epochs (exponential or power law). Noise of a line
  1-15 % (Gaussian or heavy-tailed), for half of the runs also a wandering of 1-4 % that lasts for some lines. A third
  has one to three bad lines (+50 to 400 %), a third a sudden fall, a fifth a bump of 3-8 % while the rate warms up.
  Gradient norms fall to 10-100 % of their start, half rise again by up to three times; their noise is log-normal (sd
  0.2-0.6), one line in a hundred is ten times as high. Half train in float16: 8-15 overflows in the first 100 steps,
  later one in 1,000 steps. A tenth has a single step that is not finite.
- rising_steps: from 30-60 % of the run on, the loss rises to 1.4-4 times what it was.
- growing_gradients: from 30-70 % of the run on, the norms grow to 30-1000 times.
- non_finite_steps: from 20-80 % of the run on, 3-50 % of the steps are not finite.
- skipped_steps: all the time, 10-50 % of the steps overflow.

Limits are chosen on the runs of CALIBRATION_SEED, which ``--calibrate`` shows; results come from REPORT_SEED.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import numpy as np

from orion_unet.monitor.diagnostics import Thresholds
from orion_unet.monitor.step_rules import diagnose_steps
from orion_unet.monitor.steps_reader import COLUMNS, COVERED, EPOCH, GRAD, LOSS, NON_FINITE, SKIPPED, STEP, WAIT

CALIBRATION_SEED, REPORT_SEED = 11, 47
LINES = 20
EPOCHS = (1, 2, 5, 15)
FAULTS = ("rising_steps", "growing_gradients", "non_finite_steps", "skipped_steps")
KINDS = ("healthy", *FAULTS)


def simulate(rng: np.random.Generator, kind: str, epochs: int) -> np.ndarray:
    """The lines of one run as rows of a StepsReader: (20 * epochs, len(COLUMNS))."""
    count = LINES * epochs
    covered = round(10 ** rng.uniform(0, 2))
    at = np.arange(1, count + 1) / LINES
    rows = np.zeros((count, len(COLUMNS)))
    rows[:, EPOCH] = np.arange(count) // LINES + 1
    rows[:, STEP] = (np.arange(count) % LINES + 1) * covered
    rows[:, COVERED] = covered
    rows[:, WAIT] = 0.02
    rows[:, LOSS] = _loss(rng, at, rising=kind == "rising_steps")
    rows[:, GRAD] = _norms(rng, at, growing=kind == "growing_gradients")
    _skips(rng, rows, covered, kind)
    return rows


def _noise(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.standard_normal(count) if rng.random() < 0.5 else rng.standard_t(5, count) / math.sqrt(5 / 3)


def _loss(rng: np.random.Generator, at: np.ndarray, rising: bool) -> np.ndarray:
    count, tau, power = len(at), 10 ** rng.uniform(-1.5, 0.5), rng.uniform(0.5, 2)
    floor = rng.uniform(0.05, 0.7)
    shape = np.exp(-at / tau) if rng.random() < 0.5 else (1 + at / (tau * power)) ** -power
    loss = floor + (1 - floor) * shape
    if rng.random() < 1 / 3:
        loss[rng.integers(count) :] *= rng.uniform(0.7, 0.95)
    if rng.random() < 0.2:
        loss *= 1 + rng.uniform(0.03, 0.08) * np.exp(-(((at - rng.uniform(0.2, 1)) / rng.uniform(0.1, 0.4)) ** 2))
    if rising:
        turn = int(rng.uniform(0.3, 0.6) * count)
        loss[turn:] = loss[turn] * np.linspace(1, rng.uniform(1.4, 4), count - turn) ** rng.uniform(0.7, 1.5)
    loss = loss * np.maximum(1 + rng.uniform(0.01, 0.15) * _noise(rng, count), 0.3)
    if rng.random() < 0.5:
        walk, memory = np.zeros(count), rng.uniform(0.5, 0.9)
        for line, push in enumerate(rng.standard_normal(count) * math.sqrt(1 - memory**2)):
            walk[line] = (memory * walk[line - 1] if line else 0.0) + push
        loss = loss * np.maximum(1 + rng.uniform(0.01, 0.04) * walk, 0.3)
    if rng.random() < 1 / 3:
        for line in rng.integers(count, size=rng.integers(1, 4)):
            loss[line] *= rng.uniform(1.5, 5)
    return loss


def _norms(rng: np.random.Generator, at: np.ndarray, growing: bool) -> np.ndarray:
    count = len(at)
    end = 10 ** rng.uniform(-1, 0)
    norms = end + (1 - end) * np.exp(-at / 10 ** rng.uniform(-1.3, 0.5))
    if rng.random() < 0.5:
        norms = norms * (1 + rng.uniform(0, 2) * at / at[-1])
    if growing:
        turn = int(rng.uniform(0.3, 0.7) * count)
        norms[turn:] *= 10 ** (rng.uniform(1.5, 3) * np.linspace(0, 1, count - turn))
    norms = norms * np.exp(rng.uniform(0.2, 0.6) * rng.standard_normal(count))
    return norms * np.where(rng.random(count) < 0.01, 10, 1)


def _skips(rng: np.random.Generator, rows: np.ndarray, covered: int, kind: str) -> None:
    count = len(rows)
    begun = np.cumsum(rows[:, COVERED]) - covered
    if rng.random() < 0.5:
        early = begun < 100
        rows[early, SKIPPED] = rng.multinomial(rng.integers(8, 16), np.full(early.sum(), 1 / early.sum()))
        rows[~early, SKIPPED] = rng.binomial(covered, 1 / 1000, (~early).sum())
    if kind == "skipped_steps":
        rows[:, SKIPPED] = rng.binomial(covered, rng.uniform(0.1, 0.5), count)
    broken = np.zeros(count)
    if kind == "non_finite_steps":
        turn = int(rng.uniform(0.2, 0.8) * count)
        broken[turn:] = rng.binomial(covered, rng.uniform(0.03, 0.5), count - turn)
    elif rng.random() < 0.1:
        broken[rng.integers(count)] = 1
    rows[:, NON_FINITE] = broken
    rows[:, SKIPPED] = np.minimum(rows[:, SKIPPED], covered - np.minimum(broken, covered)) + np.minimum(broken, covered)
    rows[broken >= covered, LOSS] = np.inf
    rows[broken >= covered, GRAD] = np.nan


def codes(rows: np.ndarray) -> list[str]:
    """Codes of the monitor's findings on these lines."""
    return [finding.code for finding in diagnose_steps(rows, rows, Thresholds(), {})]


def report(runs: int, calibrate: bool, say: Callable[[str], None]) -> None:
    """Simulate ``runs`` runs of each kind and length, and say what was found."""
    seed = CALIBRATION_SEED if calibrate else REPORT_SEED
    of_calibration = ", the runs for calibration: **not a result**" if calibrate else ""
    say(f"\n## Steps: {runs} runs of each kind and length, seed {seed}{of_calibration}\n")
    say("Healthy runs judged after every line; share of runs with a false alarm after any line [%]:\n")
    say("| epochs of 20 lines | any | " + " | ".join(FAULTS) + " | at the end, any |\n|" + " --- |" * 7)
    for epochs in EPOCHS:
        rng = np.random.default_rng([seed, 0, epochs])
        ever: Counter[str] = Counter()
        for _ in range(runs):
            rows = simulate(rng, "healthy", epochs)
            said = [codes(rows[:end]) for end in range(1, len(rows) + 1)]
            once = {code for found in said for code in found}
            ever.update(once)
            ever["any"] += bool(once)
            ever["end"] += bool(said[-1])
        cells = [f"{100 * ever[name] / runs:.1f}" for name in ("any", *FAULTS, "end")]
        say(f"| {epochs} | {' | '.join(cells)} |")
    say("\nFaults found at the end of the run, and (in brackets) runs then given a code of another fault [%]:\n")
    say("| epochs of 20 lines | " + " | ".join(FAULTS) + " |\n|" + " --- |" * 5)
    for epochs in EPOCHS:
        cells = []
        for number, kind in enumerate(FAULTS, 1):
            rng = np.random.default_rng([seed, number, epochs])
            found = [codes(simulate(rng, kind, epochs)) for _ in range(runs)]
            right = np.mean([kind in one for one in found])
            other = np.mean([bool(set(one) - {kind}) for one in found])
            cells.append(f"{100 * right:.1f} ({100 * other:.1f})")
        say(f"| {epochs} | {' | '.join(cells)} |")
