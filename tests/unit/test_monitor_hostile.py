"""Mutated logs never crash the monitor. MONITOR_EXAMPLES=10000 searches longer."""

import io
import json
import os
import tempfile
import warnings
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from monitor_runs import epoch_record, former_losses, step_record, write_run

from orion_unet.errors import InputError
from orion_unet.monitor.diagnostics import Thresholds
from orion_unet.monitor.page import page
from orion_unet.monitor.plots import png, run_figure
from orion_unet.monitor.report import Run
from orion_unet.monitor.terminal import make_console, one_line, view
from orion_unet.monitor.watch import to_json

EXAMPLES = int(os.environ.get("MONITOR_EXAMPLES", "200"))
DRAWN_OF = 50
"""Only one poll in this many is drawn: a figure takes as long as a hundred reports."""

numbers = st.one_of(
    st.floats(),
    st.integers(-(10**40), 10**40),
    st.sampled_from([0, -0.0, 1e308, -1e308, 5e-324, 10**4000, 2**63, 1e30, 0.43, 0.54]),
)
anything = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
paths = st.sampled_from(
    [
        ("epoch",),
        ("attempt",),
        ("schema",),
        ("lr",),
        ("duration_s",),
        ("train",),
        ("train", "loss"),
        ("train", "terms"),
        ("val",),
        ("val", "loss"),
        ("val", "terms", "mse"),
        ("val", "metrics"),
        ("val", "metrics", "pearson"),
        ("val", "per_channel"),
        ("val", "per_channel", "Hoechst"),
        ("val", "per_channel", "Hoechst", "pearson"),
        ("grad_norm",),
    ]
)
epochs = st.one_of(st.integers(0, 12), st.integers(), anything)


@st.composite
def mutated_lines(draw):
    """A line of the log with a few fields replaced, removed or doubled, or its bytes cut, changed or repeated."""
    record = epoch_record(draw(st.integers(0, 30)), draw(numbers), draw(numbers), attempt=draw(st.integers(0, 3)))
    for path in draw(st.lists(paths, max_size=3)):
        at = record
        for name in path[:-1]:
            at = at.get(name) if isinstance(at, dict) else None
        if isinstance(at, dict):
            if draw(st.booleans()):
                at[path[-1]] = draw(epochs if path == ("epoch",) else anything)
            else:
                at.pop(path[-1], None)
    with_digits = json.dumps(record, ensure_ascii=draw(st.booleans()), default=str)
    line = with_digits.encode("utf-8", "surrogatepass")
    kind = draw(st.sampled_from(["whole", "whole", "whole", "cut", "byte", "doubled", "raw"]))
    if kind == "cut":
        return line[: draw(st.integers(0, len(line)))]
    if kind == "byte":
        at = draw(st.integers(0, len(line) - 1))
        return line[:at] + draw(st.binary(min_size=1, max_size=3)) + line[at + 1 :]
    if kind == "doubled":
        return line[:-1] + b"," + line[1:]
    return draw(st.binary(max_size=60)) if kind == "raw" else line


@st.composite
def mutated_steps(draw):
    """A line of steps.jsonl with a few fields replaced or removed, or cut."""
    record = step_record(
        draw(st.integers(1, 3)), draw(st.integers(1, 40)), draw(numbers), attempt=draw(st.integers(1, 3))
    )
    for name in draw(st.lists(st.sampled_from(sorted(record)), max_size=3)):
        if draw(st.booleans()):
            record[name] = draw(epochs if name in ("epoch", "step") else anything)
        else:
            record.pop(name, None)
    line = json.dumps(record, default=str).encode("utf-8", "surrogatepass")
    return line[: draw(st.integers(0, len(line)))] if draw(st.integers(0, 5)) == 0 else line


STATUS_FIELDS = (
    *("state", "epoch", "epochs", "step", "steps_per_epoch", "schema", "message", "pid", "host"),
    *("since", "progressed", "step_s", "updated"),
    *("options", "recipe", "device", "world_size", "regression_pearson", "empty_channels"),
)
documents = st.one_of(
    st.none(),
    st.binary(max_size=40),
    st.dictionaries(
        st.sampled_from(STATUS_FIELDS),
        st.one_of(anything, st.sampled_from(["training", "finished", "failed", 1, "2026-01-31T10:00:00Z"])),
    ).map(lambda document: json.dumps({"schema": 1} | document, default=str).encode()),
)


@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
@given(
    st.lists(mutated_lines(), max_size=10),
    documents,
    st.one_of(
        documents,
        st.dictionaries(st.text(max_size=8), anything).map(lambda o: json.dumps({"options": o}, default=str).encode()),
    ),
    st.lists(mutated_steps(), max_size=40),
    st.integers(20, 200),
    st.integers(5, 60),
)
@pytest.mark.slow
def test_no_log_crashes_the_monitor(lines, status, config, steps, width, height):
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("error")
        folder = Path(scratch)
        (folder / "metrics.jsonl").write_bytes(b"\n".join(lines[:5]))
        (folder / "steps.jsonl").write_bytes(b"\n".join(steps[:25]))
        for name, content in (("status.json", status), ("config.json", config)):
            if content is not None:
                (folder / name).write_bytes(content)
        run = Run(folder, Thresholds())
        for further in (b"", b"\n" + b"\n".join(lines[5:]) + b"\n"):
            with open(folder / "metrics.jsonl", "ab") as file:
                file.write(further)
            with open(folder / "steps.jsonl", "ab") as file:
                file.write(b"\n" + b"\n".join(steps[25:]) if further else b"")
            try:
                report = run.poll()
            except InputError:
                continue
            look(report, width, height, drawn=zlib.crc32(b"".join(lines)) % DRAWN_OF == 1)


def look(report, width, height, drawn):
    """Show the report in every way."""
    json.loads(to_json(report.document()))
    console = make_console(io.StringIO(), width=width)
    console.print(view(report, console, height))
    console.print(view(report, console))
    shown = console.file.getvalue() + one_line(report)
    assert not any(char in shown for char in "\x1b\x07\x08\x9b\r\t\u202e\u2066")
    shown.encode()
    page(report, b"").encode()
    if drawn:
        png(run_figure(report))


@settings(max_examples=max(EXAMPLES // 3, 50))
@given(st.binary(max_size=400), st.lists(st.integers(1, 3000), max_size=8))
def test_a_log_read_in_pieces_is_the_log_read_at_once(noise, cuts):
    """There may be any bytes between whole lines, and the file may grow by any steps."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_run(Path(scratch), *former_losses())
        lines = (folder / "metrics.jsonl").read_bytes().splitlines()[:5]
        content = b"\n".join([*lines[:3], noise, *lines[3:], b""])
        log = folder / "metrics.jsonl"
        log.write_bytes(content)
        at_once = Run(folder, Thresholds()).poll()
        log.write_bytes(b"")
        pieces = Run(folder, Thresholds())
        position = 0
        for size in [*cuts, len(content)]:
            with open(log, "ab") as file:
                file.write(content[position : position + size])
            position += size
            report = pieces.poll()
        assert report.reader.damaged_lines == at_once.reader.damaged_lines
        assert report.epochs.tolist() == at_once.epochs.tolist() == [1, 2, 3, 4, 5]
