"""The benchmarks of data path, epoch and start-up run from one command and give figures that fit together."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_data_pipeline_measures_the_pairs_it_is_given(write_pairs):
    tiny = ("--patch_size", 16, "--batch_size", 2, "--patches", 8, "--repeats", 2, "--num_workers", 2)
    found = json.loads(run_benchmark("data_pipeline", "--pairs_dir", write_pairs(), *tiny, "--cold", "--json"))
    # 16 x 16 pixels: 3 bytes of H&E and 3 channels of 2 bytes.
    assert found["patch_bytes"] == 16 * 16 * 9
    assert found["patches_per_s"] > 0 and found["n_workers_patches_per_s"] > 0 and found["n_workers"] == 2
    assert found["fraction_of_raw_copy"] == pytest.approx(found["patches_per_s"] / found["raw_copy_patches_per_s"])
    assert found["fraction_of_raw_crop"] == pytest.approx(found["patches_per_s"] / found["raw_crop_patches_per_s"])
    assert found["cold_patches_per_s"] > 0 and found["cold_default_bytes_read_per_patch"] >= 0


def test_epoch_measures_one_rank_and_two_with_the_same_global_batch(write_pairs):
    tiny = ("--patch_size", 16, "--batch_size", 4, "--base_features", 2, "--steps", 2, "--repeats", 1)
    found = json.loads(run_benchmark("epoch", "--pairs_dir", write_pairs(), *tiny, "--json"))
    assert list(found) == ["1 rank", "2 ranks"]
    for result in found.values():
        assert result["end_to_end_over_bare_step"] == pytest.approx(
            result["end_to_end_patches_per_s"] / result["bare_step_patches_per_s"]
        )
        assert 0 <= result["data_wait_fraction"] <= 1
    assert found["2 ranks"]["device"].startswith("2 CPU ranks")


def test_start_up_takes_the_way_to_the_first_step_apart(write_pairs):
    found = json.loads(run_benchmark("start_up", "--pairs_dir", write_pairs(size=(160, 160)), "--repeats", 1, "--json"))
    first = found["launch"]["first"]
    parts = ("import_torch_s", "import_trainer_s", "measure_data_s", "prepare_run_s", "first_step_s")
    # What is left is the start of the interpreter.
    assert 0 <= first["total_s"] - sum(first[part] for part in parts) < 10
    assert first["toolkit_s"] == pytest.approx(first["total_s"] - first["import_torch_s"] - first["measure_data_s"])
    assert {"train_spatial_orion_unet.py", "predict", "evaluate", "check-data"} <= set(found["help_s"])
