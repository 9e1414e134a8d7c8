"""The benchmarks that train on some groups and judge the others: upsampling and encoders, in their quick forms."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from timm_here import TinyEncoder

from orion_unet.models import timm_unet

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def benchmark(monkeypatch):
    """Import a benchmark."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


def test_a_grid_is_the_step_at_multiples_over_the_step_elsewhere(benchmark):
    # Every column is 1 brighter than the one before, at multiples of 4 it is 2.
    x = np.arange(64)
    image = np.broadcast_to(x + x // 4, (1, 64, 64)).astype(np.float32)
    (ratios,) = benchmark("upsampling").grid_ratios(image)
    # Of the seven steps between multiples of 8, one is 2.
    np.testing.assert_allclose(ratios, [2.0, 2 / (8 / 7)], rtol=0.02)
    turned = benchmark("upsampling").grid_ratios(image.transpose(0, 2, 1))
    np.testing.assert_allclose(turned[0], ratios)
    assert np.isnan(benchmark("upsampling").grid_ratios(np.ones((1, 16, 16)))).all()
    plain = benchmark("upsampling").grid_ratios(np.random.default_rng(0).random((1, 256, 256)))
    np.testing.assert_allclose(plain, 1, atol=0.01)


@pytest.mark.slow
def test_the_quick_form_compares_upsamplings_and_repeats_only_what_is_missing(benchmark, tmp_path, capsys):
    module = benchmark("upsampling")
    threads = torch.get_num_threads()
    assert module.main(["--quick", "--output_dir", str(tmp_path)]) == 0
    first = capsys.readouterr().out
    assert "| bilinear | " in first and "| transposed, Hoechst | 8 | " in first
    kept = json.loads((tmp_path / "trials_quick.json").read_text())
    lost = kept.pop("0 bilinear")
    (tmp_path / "trials_quick.json").write_text(json.dumps(kept))
    assert module.main(["--quick", "--report", "--output_dir", str(tmp_path)]) == 0
    assert "No seed is finished" in capsys.readouterr().out
    assert module.main(["--quick", "--output_dir", str(tmp_path)]) == 0
    # A training is a function of its seed.
    assert json.loads((tmp_path / "trials_quick.json").read_text())["0 bilinear"] == lost
    assert not list(tmp_path.glob("seed_*"))
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_an_encoder_is_compared_at_equal_steps_and_at_equal_seconds(
    benchmark, monkeypatch, tmp_path, write_pairs, capsys
):
    monkeypatch.setattr(timm_unet, "create_encoder", lambda name: TinyEncoder())
    monkeypatch.setattr(timm_unet, "_colours", lambda name: ((0.5,) * 3, (0.2,) * 3))
    module = benchmark("encoders")
    for name, value in (("EPOCHS", 2), ("BASE", 4), ("PATCH", 16), ("PATCHES", 4), ("BATCH", 2)):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module, "step_ratio", lambda options: 2.2)
    pairs = write_pairs("pairs", cores=4, size=(32, 32), channels=2)
    (pairs / "groups.csv").write_text("\n".join(["core,group", *(f"core_{core:02d},{core // 2}" for core in range(4))]))
    torch.manual_seed(8)
    torch.save(TinyEncoder().state_dict(), tmp_path / "weights.pt")
    words = ["--pairs", pairs, "--encoder", "timm:tiny", "--encoder_weights", tmp_path / "weights.pt", "--seeds", 1,
             "--training_groups", 1, "--output_dir", tmp_path / "out"]  # fmt: skip
    threads = torch.get_num_threads()
    assert module.main([str(word) for word in words]) == 0
    torch.set_num_threads(threads)
    text = capsys.readouterr().out
    for way in module.WAYS:
        assert f"| {way} | " in text
    assert "A step with the encoder takes 2.20 times as long" in text
    assert "- encoder, pretrained, frozen against the U-Net at equal seconds: " in text
    found = json.loads((tmp_path / "out" / "trials.json").read_text())
    scores = {way: found[f"0 {way}"]["sums"] for way in module.WAYS}
    # Every way is another training; all are judged on the same pixels of both markers.
    different = {json.dumps(sums): way for way, sums in scores.items()}
    assert list(different.values()) == list(module.WAYS)
    assert all(sums[0] == [2 * 32 * 32] * 2 for sums in scores.values())
    assert len({json.dumps([sums[2], sums[4]]) for sums in scores.values()}) == 1
