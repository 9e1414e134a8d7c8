"""Each rule on the steps and on resources, on both sides of its limit."""

import json

import numpy as np
import pytest
from monitor_runs import epoch_record, healthy_losses, step_record, write_run, write_steps

from orion_unet.monitor import advice
from orion_unet.monitor.diagnostics import Thresholds
from orion_unet.monitor.report import Run
from orion_unet.monitor.resource_rules import Usage, diagnose_resources
from orion_unet.monitor.step_rules import diagnose_steps
from orion_unet.monitor.steps_reader import COLUMNS, COVERED, EPOCH, GRAD, LOSS, NON_FINITE, SKIPPED, STEP, WAIT

CONFIG = {
    "device": "1 x NVIDIA H100",
    "device_memory_bytes": 80 << 30,
    "loader_processes": 2,
    "usable_cores": 16,
    "world_size": 1,
    "target_layouts": ["chw"],
}


def steps(count, loss=0.5, grad=1.0, wait=0.02, skipped=0, broken=0, each=10, seed=0):
    """Rows of ``count`` lines, 20 an epoch, with 2 % of noise; the other values are numbers or arrays."""
    rows = np.zeros((count, len(COLUMNS)))
    rows[:, EPOCH] = np.arange(count) // 20 + 1
    rows[:, STEP] = (np.arange(count) % 20 + 1) * each
    rows[:, COVERED] = each
    rows[:, LOSS] = loss * (1 + 0.02 * np.random.default_rng(seed).standard_normal(count))
    for column, values in ((GRAD, grad), (WAIT, wait), (SKIPPED, skipped), (NON_FINITE, broken)):
        rows[:, column] = values
    return rows


def find(rows, options=None, **limits):
    return {f.code: f for f in diagnose_steps(rows, rows, Thresholds(**limits), options or {})}


def held_back(waits=(), memory=(), rows=None, config=CONFIG, options=None, gpus=()):
    rows = np.zeros((0, len(COLUMNS))) if rows is None else rows
    epochs = np.arange(1, max(len(waits), len(memory)) + 1)
    usage = Usage(epochs, np.array(waits), np.array(memory), rows, gpus)
    found = diagnose_resources(usage, Thresholds(), config, options or {})
    return {finding.code: finding for finding in found}


def falling_then(factor, count=60):
    """A loss that falls, and in its last third changes to ``factor`` times its lowest."""
    first = np.linspace(1, 0.4, count * 2 // 3)
    return np.concatenate([first, 0.4 * np.linspace(1, factor, count - len(first))])


def test_a_loss_that_rises_over_the_last_third_is_found():
    finding = find(steps(60, falling_then(2.0)))["rising_steps"]
    assert finding.severity == "warning" and finding.threshold == 0.1
    assert finding.value == pytest.approx(1, abs=0.15)
    assert "between epoch 3 step 10 and epoch 3 step 200" in finding.message
    assert "--warmup_epochs 1" in finding.advice


@pytest.mark.parametrize("factor", [0.9, 1.0, 1.08])
def test_a_loss_that_falls_rests_or_hardly_rises_is_silent(factor):
    assert find(steps(60, falling_then(factor))) == {}


def test_noise_that_could_pass_for_a_rise_is_silent_and_so_are_few_lines():
    rng = np.random.default_rng(0)
    noisy = 0.5 * (1 + 0.4 * rng.standard_normal((50, 60)))
    assert not [row for row in noisy if find(steps(60, row))]
    assert find(steps(17, falling_then(2.0, 17))) == {} and find(steps(0)) == {}


def test_a_loss_that_returns_from_a_sudden_fall_is_silent():
    loss = np.concatenate([np.full(40, 1.0), np.linspace(0.5, 0.9, 20)])
    assert find(steps(60, loss)) == {}
    assert "rising_steps" in find(steps(60, np.concatenate([np.full(40, 1.0), np.linspace(0.5, 1.4, 20)])))


def test_a_single_high_line_is_no_rise():
    loss = np.full(60, 0.5)
    loss[57] = 5.0
    assert find(steps(60, loss)) == {}


def test_the_limit_of_the_rise_is_an_option():
    assert find(steps(60, falling_then(2.0)), max_rise=1.5) == {}


@pytest.mark.parametrize(("growth", "found"), [(9, False), (12, True), (0.01, False)])
def test_gradients_that_grow_tenfold_are_found(growth, found):
    grad = np.where(np.arange(60) < 45, 1.0, growth)
    assert ("growing_gradients" in find(steps(60, grad=grad))) == found


def test_growing_gradients_name_numbers_and_clipping_and_a_spike_is_none():
    grad = np.where(np.arange(60) < 45, 2.0, 60.0)
    finding = find(steps(60, grad=grad), {"grad_clip": 1.0})["growing_gradients"]
    assert finding.value == 30 and "60, clipped to 1" in finding.message
    assert "--grad_clip 1" not in finding.advice
    spikes = np.where(np.arange(60) % 15 == 14, 1000.0, 1.0)
    assert find(steps(60, grad=spikes)) == {}


@pytest.mark.parametrize(("broken", "found"), [(0, False), (2, False), (3, True)])
def test_steps_that_are_not_finite_are_counted_over_about_an_epoch(broken, found):
    # Of the last 20 lines with 200 steps, 1 % are 2.
    counts = np.zeros(60)
    counts[50] = broken
    counts[10] = 50
    assert ("non_finite_steps" in find(steps(60, broken=counts, skipped=counts))) == found


def test_steps_that_are_not_finite_say_where_and_what_to_look_at():
    counts = np.zeros(60)
    counts[[45, 52]] = 4
    finding = find(steps(60, broken=counts, skipped=counts), {"use_amp": True})["non_finite_steps"]
    assert "8 of the last 200 steps" in finding.message and "before epoch 3 step 130" in finding.message
    assert finding.value == 0.04 and "train.log" in finding.advice[0] and "--no_use_amp" in finding.advice
    assert "skipped_steps" not in find(steps(60, broken=counts, skipped=counts))
    assert "--no_use_amp" not in find(steps(60, broken=counts, skipped=counts))["non_finite_steps"].advice


def test_overflows_are_ordinary_at_the_start_and_where_there_are_few():
    early = np.where(np.arange(60) < 10, 3, 0)
    assert find(steps(60, skipped=early)[:12]) == {}
    few = np.where(np.arange(60) % 2, 1, 0)
    assert find(steps(60, skipped=few)) == {}
    finding = find(steps(60, skipped=np.ones(60)), {"amp_dtype": "float16"})["skipped_steps"]
    assert (finding.value, finding.threshold) == (0.1, 0.05) and "20 of the last 200 steps" in finding.message
    assert finding.advice == ("--amp_dtype auto", "--no_use_amp")
    assert find(steps(60, skipped=np.ones(60)), {"amp_dtype": "auto"})["skipped_steps"].advice == ("--no_use_amp",)


@pytest.mark.parametrize(("waits", "found"), [
    ([], False), ([0.9], False), ([0.9, 0.1], False), ([0.1, 0.9], False), ([0.2, 0.2], False), ([0.1, 0.3, 0.3], True),
])  # fmt: skip
def test_two_epochs_that_wait_for_data_are_found(waits, found):
    assert ("starving" in held_back(waits)) == found


def test_starving_advises_what_the_run_does_not_have_yet():
    assert held_back([0.4, 0.4])["starving"].advice == (
        "--num_workers 4",
        "pack the pairs once, so that a patch is read in fewer pieces: python -m orion_unet pack",
        "keep the pairs on a disk of this machine",
    )
    full = {**CONFIG, "loader_processes": 15, "target_layouts": ["hwc"]}
    assert held_back([0.4, 0.4], config=full)["starving"].advice == (
        "a machine with more cores (ranks and loader processes use all 16 of this one)",
        "keep the pairs on a disk of this machine",
    )
    # On a CPU, transforms are no part of the wait.
    assert "--no_noise_removal" in advice.starving({"device": "1 GPU (made)"}, {"noise_removal": True})
    assert "--no_noise_removal" not in advice.starving({"device": "CPU, 1 rank"}, {"noise_removal": True})
    # Four ranks share the cores: three processes each leave one core a rank.
    assert "--num_workers 3" in advice.starving({**CONFIG, "world_size": 4}, {})
    assert not [a for a in advice.starving({**CONFIG, "world_size": 8}, {}) if a.startswith("--num_workers")]
    assert advice.starving({}, {}) == ("keep the pairs on a disk of this machine",)


def test_waiting_within_the_first_epoch_is_a_notice():
    finding = held_back(rows=steps(14, wait=0.5))["starving"]
    assert finding.severity == "notice" and finding.value == 0.5 and "since epoch 1 step 80" in finding.message
    assert held_back(rows=steps(14, wait=0.19)) == {} == held_back(rows=steps(8, wait=0.5))
    # The loader starts, then keeps up.
    assert held_back(rows=steps(14, wait=np.where(np.arange(14) < 7, 0.9, 0.05))) == {}


@pytest.mark.parametrize(("share", "found"), [(0.94, False), (0.951, True), (1.0, True), (1.2, False)])
def test_memory_within_five_percent_of_the_device_is_found(share, found):
    assert ("memory" in held_back(memory=[share * (80 << 30)])) == found


def test_memory_advises_the_same_gradient_in_smaller_batches():
    options = {"batch_size": 12, "accumulate_steps": 2, "use_amp": False, "val_batch_size": 8}
    finding = held_back(memory=[79 << 30], options=options)["memory"]
    assert finding.advice == ("--batch_size 6 --accumulate_steps 4", "--use_amp")
    assert "79 GiB of the device's 80 GiB" in finding.message
    on_cpu = {**CONFIG, "device": "CPU (2 threads)"}
    smallest = held_back(memory=[79 << 30], config=on_cpu, options=options | {"batch_size": 1})["memory"]
    assert smallest.advice == ("--val_batch_size 1",)
    assert held_back(memory=[79 << 30], config={}) == {} == held_back(memory=[np.nan])


def test_a_report_names_what_its_files_say(tmp_path):
    """From the files to the findings: nothing is lost on the way."""
    train, val = healthy_losses(3)
    run = write_run(tmp_path, train, val, state="training", epoch=4, steps_per_epoch=20)
    records = [
        epoch_record(epoch, train[epoch - 1], val[epoch - 1]) | {"data_wait_fraction": 0.5, "max_memory_bytes": 990}
        for epoch in (1, 2, 3)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = json.loads((run / "config.json").read_text()) | CONFIG | {"device_memory_bytes": 1000}
    (run / "config.json").write_text(json.dumps(config))
    loss = falling_then(2.0)
    lines = [
        step_record(at // 20 + 1, at % 20 + 1, loss[at], grad_norm=1.0 if at < 45 else 50.0,
                    skipped_steps=int(at > 45), non_finite_steps=int(at in (50, 52, 54)))
        for at in range(60)
    ]  # fmt: skip
    write_steps(run, lines)
    report = Run(run, Thresholds()).poll()
    assert [f.code for f in report.findings] == [
        "non_finite_steps", "rising_steps", "growing_gradients", "starving", "memory"
    ]  # fmt: skip
    assert all(f.message and f.advice for f in report.findings)


def test_a_healthy_run_with_steps_stays_silent_after_every_line(tmp_path):
    rows = steps(200, 0.1 + 0.9 * np.exp(-np.arange(200) / 30), grad=0.5 + np.exp(-np.arange(200) / 30))
    assert [find(rows[:end]) for end in range(201)] == [{}] * 201
