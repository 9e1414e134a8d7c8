"""The benchmark of prediction measures what it says it does."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow

tifffile = pytest.importorskip("tifffile")
pytest.importorskip("imagecodecs")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("predict_benchmark", ROOT / "benchmarks" / "predict.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_memory_of_a_prediction_is_that_of_its_own_process(benchmark, tmp_path):
    model = benchmark.write_model(tmp_path / "tiny.pt", markers=2, base_features=2, depth=1, patch_size=16)
    np.save(tmp_path / "core.npy", np.full((64, 64, 3), 100, np.uint8))
    # More than the command needs; written to, so that it is in memory.
    ballast = np.ones(1_500_000_000, np.uint8)
    peak_mb, seconds = benchmark.peak_memory(model, tmp_path / "core.npy", tmp_path / "out", "--no_overview")
    assert 100 < peak_mb < ballast.nbytes / 1e6 / 1.3
    assert seconds > 0
    assert (tmp_path / "out" / "core.npy").exists()


def test_readers_are_compared_on_the_same_rows_and_on_damaged_files(benchmark, tmp_path, monkeypatch):
    pytest.importorskip("zarr", reason="the extra bench is not installed")
    layouts = {name: benchmark.LAYOUTS[name] for name in ("tiles, JPEG", "planar tiles, deflate")}
    monkeypatch.setattr(benchmark, "LAYOUTS", layouts)
    monkeypatch.setattr(benchmark, "READERS", ("toolkit", "zarr"))
    for layout in layouts:
        benchmark.write_layout(tmp_path / "whole.tif", layout, 512, 1024)
        read = {}
        for reader in benchmark.READERS:
            with benchmark.region_reader(reader, tmp_path / "whole.tif") as (shape, rows):
                assert tuple(shape) == (512, 1024)
                read[reader] = rows(100, 400)
        assert read["toolkit"].shape == (300, 1024, 3)
        np.testing.assert_array_equal(read["toolkit"], read["zarr"])
    found = benchmark.damaged(tmp_path)
    assert {name: dict(outcomes["toolkit"]) for name, outcomes in found.items()} == {
        "zeros": {"refused": 2},
        "its second half zeros": {"refused": 1, "wrong": 1},
        "left out": {"white": 2},
        "cut off by the end": {"refused": 2},
    }
    monkeypatch.setattr(benchmark, "LAYOUTS", {"tiles, JPEG": layouts["tiles, JPEG"]})
    (row,) = benchmark.reading(tmp_path, 256, 512, repeats=1)
    assert row["layout"] == "tiles, JPEG"
    for reader in benchmark.READERS:
        seconds, processor_s, mb = row[reader]
        assert seconds > 0 and processor_s > 0 and mb >= 0
