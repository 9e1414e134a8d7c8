"""Finds what holds a run back: waiting for data, memory that is nearly full. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from orion_unet.findings import NOTICE, WARNING, Finding, Lines
from orion_unet.monitor import advice
from orion_unet.monitor.diagnostics import Thresholds
from orion_unet.monitor.gpus import Gpu, busiest
from orion_unet.monitor.step_rules import WINDOW_LINES, step_lines, step_place
from orion_unet.monitor.steps_reader import COVERED, EPOCH, WAIT
from orion_unet.run_log import METRICS_FILE
from orion_unet.text import short_number


@dataclass(frozen=True)
class Usage:
    """What a run has used.

    ``epochs`` (E,), ``waits`` (E,): the fraction of each epoch's training spent waiting for data, ``memory_bytes``
    (E,): the largest memory so far; nan where not measured. ``recent`` are the newest lines of the steps, ``gpus``
    those of the run's machine.
    """

    epochs: np.ndarray
    waits: np.ndarray
    memory_bytes: np.ndarray
    recent: np.ndarray
    gpus: Sequence[Gpu] = ()


def diagnose_resources(
    usage: Usage, limits: Thresholds, config: Mapping[str, Any], options: Mapping[str, Any]
) -> list[Finding]:
    """Judge what the run waits for, and how much of its device's memory it takes.

    ``config`` is the document of config.json, ``options`` the run's own.
    """
    found = [_starving(usage, limits, config, options), _memory(usage, limits, config, options)]
    return [finding for finding in found if finding is not None]


def _starving(
    usage: Usage, limits: Thresholds, config: Mapping[str, Any], options: Mapping[str, Any]
) -> Finding | None:
    known = np.flatnonzero(np.isfinite(usage.waits))[-2:]
    advised = advice.starving(config, options)
    evidence = _busy(usage.gpus, config)
    # The first epoch may fill caches; from two epochs on it is the rule.
    if len(known) == 2:
        waits = usage.waits[known]
        wait = float(waits.min())
        if wait <= limits.max_data_wait:
            return None
        message = (
            f"training spends {waits[0]:.0%} and {waits[1]:.0%} of its time waiting for data in the last two epochs"
        )
        lines = _epochs(usage.epochs[known])
        return Finding("starving", WARNING, message + evidence, wait, limits.max_data_wait, advised, lines)
    recent = usage.recent
    if not len(recent):
        return None
    rows = recent[(recent[:, EPOCH] == recent[-1, EPOCH]) & np.isfinite(recent[:, WAIT])]
    # Not the first half, in which the loader starts.
    rows = rows[len(rows) // 2 :]
    if len(rows) < WINDOW_LINES // 4:
        return None
    wait = float(np.average(np.minimum(rows[:, WAIT], 1), weights=np.maximum(np.nan_to_num(rows[:, COVERED]), 1e-9)))
    if wait <= limits.max_data_wait:
        return None
    message = (
        f"steps since {step_place(rows[0])} spend {wait:.0%} of their time waiting for data; later epochs may wait less"
    )
    return Finding("starving", NOTICE, message + evidence, wait, limits.max_data_wait, advised, step_lines(rows))


def _busy(gpus: Sequence[Gpu], config: Mapping[str, Any]) -> str:
    """How busy the run's GPUs are, as a further half sentence; nothing where that is not known."""
    ranks = advice.option_number(config, "world_size") or 1
    used = busiest(gpus, int(min(max(ranks, 1), len(gpus))))
    if not used:
        return ""
    shares = [f"{100 * gpu.busy:.0f} %" for gpu in sorted(used, key=lambda gpu: gpu.index)]
    which = "the GPU is" if len(gpus) == 1 else "the busiest GPU is" if len(used) == 1 else "its GPUs are"
    looks = min(gpu.looks for gpu in used)
    return f"; {which} busy {', '.join(shares)} of the time (nvidia-smi, {looks} look{'' if looks == 1 else 's'})"


def _memory(usage: Usage, limits: Thresholds, config: Mapping[str, Any], options: Mapping[str, Any]) -> Finding | None:
    known = np.flatnonzero(np.isfinite(usage.memory_bytes))
    total = advice.option_number(config, "device_memory_bytes")
    if not len(known) or not total or total <= 0:
        return None
    used = float(usage.memory_bytes[known[-1]])
    share = used / total
    # More than all of it is another device's: the run was moved.
    if not limits.max_memory < share <= 1:
        return None
    return Finding(
        "memory",
        WARNING,
        f"{_gigabytes(used)} of the device's {_gigabytes(total)} of memory ({share:.0%}) were in use: an epoch with a "
        "little more may fail",
        share,
        limits.max_memory,
        advice.memory(config, options),
        _epochs(usage.epochs[known[-1:]]),
    )


def _epochs(epochs: np.ndarray) -> Lines:
    return Lines(METRICS_FILE, (int(epochs[0]),), (int(epochs[-1]),))


def _gigabytes(count: float) -> str:
    return f"{short_number(count / 2**30, 3)} GiB"
