"""The benchmarks of data path, epoch and start-up run from one command, and measure right by a known clock."""

import importlib
import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from orion_unet.data.patches import PatchReader

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 200


def run_benchmark(name, *words):
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *map(str, words)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


class Clock:
    """Replaces the module time: the work under measurement sets the clock."""

    now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def benchmark(monkeypatch):
    """Import a benchmark."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


@pytest.mark.slow
def test_data_pipeline_measures_the_pairs_it_is_given(write_pairs):
    tiny = ("--patch_size", 16, "--batch_size", 2, "--patches", 8, "--repeats", 2, "--num_workers", 2)
    found = json.loads(run_benchmark("data_pipeline", "--pairs_dir", write_pairs(), *tiny, "--cold", "--json"))
    # 16 x 16 pixels: 3 bytes of H&E and 3 channels of 2 bytes.
    assert found["patch_bytes"] == 16 * 16 * 9
    assert found["patches_per_s"] > 0 and found["n_workers_patches_per_s"] > 0 and found["n_workers"] == 2
    assert found["cold_patches_per_s"] > 0 and found["cold_default_bytes_read_per_patch"] >= 0


def test_data_pipeline_counts_every_patch_once_and_leaves_the_first_pass_out(benchmark, write_pairs, monkeypatch):
    module, clock = benchmark("data_pipeline"), Clock()

    class Loader:
        """10 ms a patch and worker. The first pass also takes 1000 s, the second 5 s."""

        def __init__(self, samples, order, batch_size, workers):
            self.order, self.patch_s, self.extra_s = order, 0.01 / workers, [1000, 5]

        def __iter__(self):
            clock.now += self.extra_s.pop(0) if self.extra_s else 0
            for request in self.order:
                clock.now += self.patch_s * len(request.indices)
                yield request

        def close(self):
            pass

    crop = PatchReader.crop

    def crop_in_1_ms(self, *place):
        clock.now += 0.001
        return crop(self, *place)

    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(module, "BatchLoader", Loader)
    monkeypatch.setattr(PatchReader, "crop", crop_in_1_ms)
    options = Namespace(patch_size=16, batch_size=2, patches=8, repeats=3, num_workers=4, cold=False)
    found = module.measure(str(write_pairs()), options)
    assert found["patches_per_s"] == pytest.approx(100)
    assert found["n_workers_patches_per_s"] == pytest.approx(400)
    # H&E and markers: two crops a patch.
    assert found["raw_copy_patches_per_s"] == found["raw_crop_patches_per_s"] == pytest.approx(500)
    assert found["fraction_of_raw_copy"] == found["fraction_of_raw_crop"] == pytest.approx(0.2)


@pytest.mark.slow
def test_epoch_measures_one_rank_and_two_with_the_same_global_batch_from_a_format():
    pytest.importorskip("zarr")
    tiny = ("--patch_size", 16, "--batch_size", 4, "--base_features", 2, "--steps", 2, "--repeats", 1)
    found = json.loads(run_benchmark("epoch", "--format", "ome-zarr", "--channels", 2, *tiny, "--json"))
    assert list(found) == ["1 rank", "2 ranks"]
    for result in found.values():
        assert 0 <= result["data_wait_fraction"] <= 1
    assert found["2 ranks"]["device"].startswith("2 CPU ranks")


def test_epoch_takes_the_median_of_ratios_of_neighbours_without_the_first(benchmark, monkeypatch):
    module = benchmark("epoch")

    class Bench:
        """Known rates in turn, the first of each for nothing."""

        def __init__(self, options):
            for name, rates in {
                "bare_step": [1, 10, 20, 40],
                "end_to_end": [1, 9, 10, 8],
                "bare_forward": [1, 50, 50, 50],
                "validation": [1, 10, 40, 20],
            }.items():
                setattr(self, name, iter(rates).__next__)

        wait = 0.25

        def keep_batch(self):
            pass

        close = keep_batch

    monkeypatch.setattr(module, "Bench", Bench)
    found = module.compare(Namespace(repeats=3))
    assert (found["bare_step_patches_per_s"], found["end_to_end_patches_per_s"]) == (20, 9)
    # Of 0.9, 0.5 and 0.2; the ratio of the medians would be 0.45.
    assert found["end_to_end_over_bare_step"] == 0.5
    assert found["validation_over_forward"] == pytest.approx(0.4)
    assert found["data_wait_fraction"] == 0.25


@pytest.mark.slow
def test_start_up_takes_the_way_to_the_first_step_apart(write_pairs):
    found = json.loads(run_benchmark("start_up", "--pairs_dir", write_pairs(size=(160, 160)), "--repeats", 1, "--json"))
    first = found["launch"]["first"]
    parts = ("import_torch_s", "import_trainer_s", "measure_data_s", "prepare_run_s", "first_step_s")
    # What is left is the start of the interpreter.
    assert 0 <= first["total_s"] - sum(first[part] for part in parts) < 10
    assert {"train_spatial_orion_unet.py", "predict", "evaluate", "check-data"} <= set(found["help_s"])


@pytest.mark.slow
def test_step_log_gives_its_cost_as_a_ratio():
    found = json.loads(run_benchmark("step_log", "--repeats", 2, "--json"))
    assert [row["steps"] for row in found["rows"]] == [50, 200, 1000, 1000]
    for row in found["rows"]:
        assert row["of_this_step"] == pytest.approx(row["cost_s"] / found["step_s"]) and 0 < row["cost_s"] < 0.1


@pytest.mark.slow
def test_diagnosis_keeps_the_runs_for_calibration_apart(benchmark, tmp_path):
    shown = run_benchmark("diagnosis", "--calibrate", "--runs", 8)
    assert shown.count("seed 11") == 3 and "seed 47" not in shown and shown.count("**not a result**") == 2
    assert len(re.findall(r"^\| 15 \|", shown, re.MULTILINE)) == 3
    command = [sys.executable, str(ROOT / "benchmarks" / "diagnosis.py"), "--calibrate", "--out", str(tmp_path / "x")]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert refused.returncode == 2 and "leave one of the two out" in refused.stderr
    said = []
    benchmark("diagnosis_steps").report(1, False, said.append)
    assert "seed 47" in said[0] and "calibration" not in said[0]


def test_start_up_takes_stages_apart_as_by_hand(benchmark):
    noted = {"interpreter": 1, "import_torch": 3, "import_trainer": 3.5, "loop_entered": 6.5, "first_step_done": 10}
    assert benchmark("start_up").durations({**noted, "normalisation": 1, "scales": 0.5}) == {
        "total_s": 10,
        "import_torch_s": 2,
        "import_trainer_s": 0.5,
        "measure_data_s": 1.5,
        "prepare_run_s": 1.5,
        "first_step_s": 3.5,
        # Of the 10 s, all but 2 s for torch and 1.5 s for the data.
        "toolkit_s": 6.5,
    }
