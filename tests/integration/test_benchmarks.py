"""The benchmarks run from one command, and what they count is right."""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from orion_unet.cli.arguments import run_command

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 200
TINY_STEP = ["--base_features", "4", "--patch_size", "32", "--batch_size", "2", "--channels", "3", "--threads", "1"]


def train_step_module():
    spec = importlib.util.spec_from_file_location("train_step", ROOT / "benchmarks" / "train_step.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def unet_sizes(width, side, channels):
    """Weights, and multiplications of a forward pass, layer by layer: (B, 3, side, side), depth 4, batch norm."""
    weights, multiplications = 0, 0

    def convolution(inputs, outputs, kernel, pixels, bias):
        nonlocal weights, multiplications
        weights += inputs * outputs * kernel**2 + (outputs if bias else 0)
        multiplications += inputs * outputs * kernel**2 * pixels

    def block(inputs, outputs, pixels):
        nonlocal weights
        convolution(inputs, outputs, 3, pixels, bias=False)
        convolution(outputs, outputs, 3, pixels, bias=False)
        weights += 4 * outputs

    before = 3
    for level in range(5):
        block(before, width * 2**level, (side // 2**level) ** 2)
        before = width * 2**level
    for level in reversed(range(4)):
        wide, pixels = width * 2**level, (side // 2**level) ** 2
        # Before the interpolation, which has no weights, so of a quarter of the pixels.
        convolution(2 * wide, wide, 1, pixels // 4, bias=True)
        block(2 * wide, wide, pixels)
    convolution(width, channels, 1, side**2, bias=True)
    return weights, multiplications


@pytest.mark.slow
def test_train_step(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "train_step.py"), *TINY_STEP, "--repeats", "1", "--json"]
    command += ["--without_monai", "--optimizers", "--memory_format", "both", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert [found["memory_format"] for found in results["models"]] == ["contiguous", "channels_last"]
    assert all(rate > 1e6 for name, rate in results["machine"].items() if name.endswith("_per_s"))
    assert set(results["optimizers_s"]) == {"fused", "foreach", "single"}
    weights, multiplications = unet_sizes(width=4, side=32, channels=3)
    # A product is a multiplication and an addition; forward, and backward to the weights and to the input, which
    # the first convolution does without.
    flops = 2 * (3 * multiplications - 3 * 4 * 9 * 32**2)
    for found in results["models"]:
        assert found["parameters"] == weights
        assert found["flops_per_patch"] == flops
        # AdamW alone reads weights, gradients and two moments, and writes all but the gradients.
        assert found["bytes_moved_per_step"] > found["bytes_moved_unfusable_per_step"] > 7 * 4 * weights
        assert found["bound_by"] in ("arithmetic", "memory")
        if sys.platform == "linux":
            assert found["peak_memory_bytes"] > 0


def test_train_step_counts_every_tensor_once_an_operator():
    module = train_step_module()
    one, other = torch.zeros(10), torch.zeros(10)

    def moved(work):
        with module.BytesMoved() as counter:
            work()
        return counter.total, counter.unfusable

    assert moved(lambda: one + other) == (120, 0)
    assert moved(lambda: one.add_(other)) == (120, 0)
    assert moved(lambda: one.view(2, 5).t()) == (0, 0)
    assert moved(lambda: torch.empty(100)) == (0, 0)
    assert moved(lambda: torch.zeros(1).expand(1000) + 1) == (4 + 4 + 4000, 0)
    assert moved(lambda: torch.cat((one, other))) == (160, 0)
    image, kernel = torch.zeros(1, 2, 8, 8), torch.zeros(3, 2, 3, 3)
    size = 4 * (2 * 64 + 3 * 2 * 9 + 3 * 64)
    assert moved(lambda: torch.conv2d(image, kernel, padding=1)) == (size, size)


def test_train_step_divides_its_time_by_the_calls_and_takes_the_median_round(monkeypatch):
    module = train_step_module()
    # Two calls first, whose faster one says that three calls fill the quarter of a second; then rounds of three.
    seconds = iter([9.0, 0.1, *[0.1] * 3, *[0.4] * 3, *[0.2] * 3])
    clock = argparse.Namespace(now=0.0)

    def run():
        clock.now += next(seconds)

    monkeypatch.setattr(module, "time", argparse.Namespace(perf_counter=lambda: clock.now))
    assert module.interleaved({"step": run}, torch.device("cpu"), 3) == {"step": pytest.approx(0.2)}
    assert list(seconds) == []


@pytest.mark.parametrize(
    ("compiled", "memory_s", "bound", "of_floor"), [(False, 0.8, "memory", 1.6), (True, 0.2, "arithmetic", 0.5)]
)
def test_train_step_reports_rates_and_floors_as_by_hand(compiled, memory_s, bound, of_floor):
    step = argparse.Namespace(model=torch.nn.Linear(3, 2), flops=lambda: 1e9, moved=lambda: (8e8, 2e8))
    machine = {
        "matmul_flops_per_s": 4e9,
        "conv3x3_contiguous_flops_per_s": 1e9,
        "conv3x3_channels_last_flops_per_s": 2e9,
        "memory_bytes_per_s": 1e9,
    }
    options = argparse.Namespace(compile=compiled, batch_size=2)
    found = train_step_module().report("net", "contiguous", step, 0.5, None, machine, options)
    expected = {
        "parameters": 8,
        "patches_per_s": 4,
        "flops_per_patch": 5e8,
        "flops_per_s": 2e9,
        "fraction_of_matmul_peak": 0.5,
        "fraction_of_conv_peak": 1,
        "floor_arithmetic_s": 0.25,
        "floor_memory_s": memory_s,
        "fraction_of_floor": of_floor,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["bound_by"] == bound


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--amp", "--device", "cpu"], "--amp"),
        (["--patch_size", "50"], "--patch_size 50"),
        (["--repeats", "0"], "--repeats 0"),
        ([], "--without_monai"),
    ],
)
def test_train_step_says_in_one_line_what_it_cannot_measure(monkeypatch, capsys, words, expected):
    monkeypatch.setitem(sys.modules, "monai", None)
    assert run_command(train_step_module().main, words) == 2
    said = capsys.readouterr().err
    assert expected in said and said.count("\n") == 1


def test_train_step_goes_on_without_a_peer_that_cannot_run(monkeypatch, capsys):
    module = train_step_module()

    def built(name, memory_format, options):
        if name == "BasicUNet":
            raise RuntimeError("no kernel\nfor this")
        # A network half as wide replaces MONAI's.
        options = argparse.Namespace(**{**vars(options), "base_features": 4 if name == module.OURS else 2})
        return module.Step(module.network(module.OURS, options), memory_format, options), None

    for name in ("check", "prepare"):
        monkeypatch.setattr(module, name, lambda options: None)
    monkeypatch.setattr(module, "built", built)
    monkeypatch.setattr(module, "TIMING_S", 0.0)
    monkeypatch.setattr(module, "SIZES", {"cpu": module.Sizes(32, (1, 4, 8), 1 << 12)})
    assert module.main([*TINY_STEP, "--repeats", "1", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "BasicUNet, contiguous: cannot be measured (RuntimeError: no kernel)" in said
    assert "SpatialUNet is" in said and "times as fast as DynUNet" in said
    assert "n/a" in said
    assert max(map(len, said.splitlines())) <= 80
