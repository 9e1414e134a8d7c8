"""The benchmarks that train on some groups and judge the others: upsampling, encoders and stains, in quick forms."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from timm_here import TinyEncoder

from orion_unet.data.loaders import TrainingSamples
from orion_unet.data.patches import PatchPlace
from orion_unet.data.transforms import jitter_colour
from orion_unet.errors import InputError
from orion_unet.models import timm_unet
from orion_unet.registration.stains import STAINS, optical_density, separation

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
    lost = kept["trials"].pop("0 bilinear")
    (tmp_path / "trials_quick.json").write_text(json.dumps(kept))
    assert module.main(["--quick", "--report", "--output_dir", str(tmp_path)]) == 0
    assert "No seed is finished" in capsys.readouterr().out
    assert module.main(["--quick", "--output_dir", str(tmp_path)]) == 0
    # A training is a function of its seed.
    assert json.loads((tmp_path / "trials_quick.json").read_text())["trials"]["0 bilinear"] == lost
    assert not list(tmp_path.glob("seed_*"))
    # Trials of other settings are neither reported nor replaced.
    (tmp_path / "trials_quick.json").write_text(json.dumps({**kept, "settings": {}}))
    with pytest.raises(InputError, match="its trials have other settings"):
        module.main(["--quick", "--output_dir", str(tmp_path)])
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
    found = json.loads((tmp_path / "out" / "trials.json").read_text())["trials"]
    scores = {way: found[f"0 {way}"]["sums"] for way in module.WAYS}
    # Every way is another training; all are judged on the same pixels of both markers.
    different = {json.dumps(sums): way for way, sums in scores.items()}
    assert list(different.values()) == list(module.WAYS)
    assert all(sums[0] == [2 * 32 * 32] * 2 for sums in scores.values())
    assert len({json.dumps([sums[2], sums[4]]) for sums in scores.values()}) == 1

    # Fewer cores: other trainings of as many steps, in a table of their own.
    fewer = [str(word) for word in [*words, "--training_cores", 1, "--only", "U-Net"]]
    assert module.main(fewer) == 0
    torch.set_num_threads(threads)
    assert len(capsys.readouterr().out.split("| U-Net | ")) == 2
    again = json.loads((tmp_path / "out" / "trials.json").read_text())["trials"]
    assert set(again) - set(found) == {"0 U-Net, 1 cores", "0 U-Net, seconds of the encoder, 1 cores"}
    assert again["0 U-Net, 1 cores"]["sums"] != scores["U-Net"]
    assert module.main([*fewer[:-4], "--report"]) == 0
    assert text.strip().endswith(capsys.readouterr().out.strip())


@pytest.mark.slow
def test_learning_rates_are_compared_at_every_length(benchmark, tmp_path, capsys):
    module = benchmark("learning_rates")
    threads = torch.get_num_threads()
    words = ["--quick", "--rates", "0.001", "0.01", "--output_dir", str(tmp_path)]
    assert module.main(words) == 0
    torch.set_num_threads(threads)
    text = "| steps |" + capsys.readouterr().out.partition("| steps |")[2]
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines()[2:]]
    # Both lengths are so short that auto is the highest rate.
    assert [row[:2] for row in rows] == [["4", "0.01"], ["8", "0.01"]]
    found = json.loads((tmp_path / "trials_quick.json").read_text())["trials"]
    assert list(found) == [f"0 {steps} steps at {rate}" for steps in (4, 8) for rate in ("0.001", "0.01")]
    assert len({json.dumps(trial["sums"]) for trial in found.values()}) == 4
    assert module.main([*words, "--report"]) == 0
    torch.set_num_threads(threads)
    assert capsys.readouterr().out == text


def test_the_best_rate_of_a_length_is_compared_with_the_one_nearest_the_automatic_one(benchmark):
    module = benchmark("learning_rates")

    def of(r):
        """Sums of 100 pixels of one marker with this correlation: both have mean 0 and variance 1."""
        return {"sums": [[100.0], [0.0], [0.0], [100.0], [100.0], [100.0 * r]]}

    from orion_unet.correlation import pearson

    order = {"sums": np.array(of(0.5)["sums"])}
    assert pearson(order["sums"]) == pytest.approx(0.5), "the order of the sums"
    trials = {f"{seed} {module.name_of(8000, rate)}": of(r + 0.1 * seed)
              for seed in (0, 1) for rate, r in ((0.001, 0.3), (0.01, 0.4))}  # fmt: skip
    trials[f"2 {module.name_of(8000, 0.001)}"] = of(0.9)
    (row,) = module.report(trials, [100, 8000], [0.001, 0.01]).splitlines()[2:]
    # A seed that is not finished at all rates does not count.
    assert row == "| 8000 | 0.001 | 0.350 (0.300, 0.400) | 0.450 (0.400, 0.500) | 0.01: +0.100 |"


@pytest.mark.slow
def test_ways_are_compared_on_groups_that_choose_and_on_groups_that_score(benchmark, tmp_path, capsys):
    module = benchmark("equal_compute")
    threads = torch.get_num_threads()
    changed = ["twice as long", "patches twice as wide"]
    words = ["--quick", "--ways", *changed, "--output_dir", str(tmp_path)]
    assert module.main(words) == 0
    torch.set_num_threads(threads)
    text = capsys.readouterr().out.partition("## On the groups that choose")[2]
    ways = [module.USUAL, *changed]
    assert all(text.count(f"\n| {way} | ") == 2 for way in ways)
    found = json.loads((tmp_path / "trials_quick.json").read_text())["trials"]
    ratios = json.loads((tmp_path / "ratios_quick.json").read_text())["trials"]
    assert set(ratios) == set(ways) and ratios[module.USUAL] == ratios["twice as long"] == 1 != ratios[changed[1]]
    # One group trains, one chooses, one scores, and all ways are judged on the same pixels.
    trials = [found[f"0 {way}"] for way in ways]
    groups = {group: np.array([trial["sums"][group] for trial in trials]) for group in trials[0]["sums"]}
    assert len(groups) == 2 and trials[0]["choosing"] == [sorted(groups)[0]]
    # Half of the training groups, here still one, take other options than as it is: none.
    again = [*words[:2], "half of the training groups", *words[-2:]]
    assert module.main(again) == 0
    torch.set_num_threads(threads)
    fewer = json.loads((tmp_path / "trials_quick.json").read_text())["trials"]["0 half of the training groups"]
    assert fewer["sums"] == trials[0]["sums"]
    for sums in groups.values():
        assert len({each[[0, 2, 4]].tobytes() for each in sums}) == 1
        assert len({each.tobytes() for each in sums}) == len(ways)


def test_ways_are_compared_over_the_seeds_of_both(benchmark):
    module = benchmark("equal_compute")
    from orion_unet.correlation import moments, pearson

    rng = np.random.default_rng(7)
    measured = rng.random((2, 400))
    near, far = measured + 0.1 * rng.random((2, 400)), rng.random((2, 400))

    def of(chosen, scored):
        sums = {"a": moments(chosen, measured).tolist(), "b": moments(scored, measured).tolist()}
        return {"markers": ["DAPI", "CD3"], "choosing": ["a"], "seconds": 60.4, "sums": sums}

    usual, changed = module.USUAL, "correlation 1"
    trials = {f"{seed} {usual}": of(far, near) for seed in range(3)} | {f"1 {changed}": of(near, far)}
    tables = [[[cell.strip() for cell in line.strip("| ").split(" | ")] for line in part.splitlines()[4:] if line]
              for part in module.report(trials, [usual, changed]).split("## ")[1:]]  # fmt: skip
    r = {id(each): pearson(moments(each, measured)) for each in (near, far)}
    r2 = {id(each): 1 - ((each - measured) ** 2).mean(axis=1) / measured.var(axis=1) for each in (near, far)}
    for (first, second), good, bad in ((tables[0], near, far), (tables[1], far, near)):
        assert first[1:5] == [f"{r[id(bad)][0]:.3f}", f"{r[id(bad)][1]:.3f}", f"{r[id(bad)].mean():.3f}", "3"]
        assert second[1:5] == [f"{r[id(good)][0]:.3f}", f"{r[id(good)][1]:.3f}", f"{r[id(good)].mean():.3f}", "1"]
        gains = [(value[id(good)] - value[id(bad)]).mean() for value in (r, r2)]
        assert second[5:] == [f"{gains[0]:+.3f}", f"{gains[0]:+.3f}", f"{gains[1]:+.3f}", "60"]


def test_lines_are_judged_on_cores_that_they_were_not_fitted_to(benchmark):
    module = benchmark("recalibration")
    from orion_unet.correlation import moments
    from orion_unet.models.recalibration import Recalibration

    rng = np.random.default_rng(3)
    measured = rng.random((8, 3, 500))
    # Predictions spread twice as far as they should: the third marker is empty.
    predicted = 2 * (measured - 0.5) + 0.5 + 0.1 * rng.standard_normal(measured.shape)
    sums = [moments(p, m).tolist() for p, m in zip(predicted, measured, strict=True)]
    stored = Recalibration(np.array([0.5, 1.0, 0.0]), np.array([0.25, 0.0, 0.0]), 500)
    found = {"lines": stored.document(), "empty": [False, False, True],
             "sums": {"training": sums[:2], "chosen": sums[2:6], "scored": sums[6:]}}  # fmt: skip
    errors, means, flattery = module.errors_of(found)
    difference = [(a * p + b - m) ** 2 for (a, b), p, m in zip(((0.5, 0.25), (1, 0)), predicted[6:].swapaxes(0, 1),
                                                                measured[6:].swapaxes(0, 1), strict=False)]  # fmt: skip
    np.testing.assert_allclose(errors["training patches"], [each.mean() for each in difference])
    np.testing.assert_allclose(errors["as the network gives them"][1], difference[1].mean())
    fitted = [np.polyfit(predicted[2:6, at].ravel(), measured[2:6, at].ravel(), 1) for at in range(2)]
    expected = [((np.polyval(line, predicted[6:, at]) - measured[6:, at]) ** 2).mean()
                for at, line in enumerate(fitted)]  # fmt: skip
    np.testing.assert_allclose(errors["cores that choose"], expected)
    about = measured[:2, :2].mean(axis=(0, 2))
    np.testing.assert_allclose(means, ((measured[6:, :2] - about[:, None]) ** 2).mean(axis=(0, 2)))
    assert 1 < flattery < 1.05
    text = module.report({"0 pairs, A held out": found, "0 pairs, B held out": found})
    assert "## pairs, 1 seed" in text and f"{np.mean(errors['both']):.5f}" in text and "0 in 2 trainings" in text


@pytest.mark.slow
def test_the_quick_form_fits_lines_to_three_kinds_of_cores(benchmark, tmp_path, capsys):
    module = benchmark("recalibration")
    words = ["--quick", "--sets", "demo", "--output_dir", str(tmp_path)]
    assert module.main(words) == 0
    text = capsys.readouterr().out
    assert "## demo, 1 seed" in text
    assert module.main([*words, "--report"]) == 0
    assert text.endswith(capsys.readouterr().out)


def degrees(one, other):
    """Angles between the rows of two arrays of unit vectors."""
    return np.rad2deg(np.arccos(np.clip((one * other).sum(axis=1), -1, 1)))


def test_generated_stains_turn_the_vectors_and_multiply_the_amounts_of_each_image(benchmark):
    module = benchmark("stain_shift")
    rng = np.random.default_rng(2)
    vectors = module.unit(np.array([[0.55, 0.75, 0.37], [0.18, 0.82, 0.55]]))
    # Nuclei, cytoplasm, and a mixture of both.
    amounts = rng.uniform(0.2, 0.9, (64 * 64, 2)) * np.repeat([[1, 0], [0, 1], [1, 1], [0.5, 1]], 1024, axis=0)
    he = np.rint(255 * np.exp(-amounts @ vectors)).astype(np.uint8).reshape(64, 64, 3)
    found = module.stain_vectors(optical_density(he.reshape(-1, 3) / 255))
    assert degrees(found, vectors).max() < 1.5
    assert np.array_equal(module.shifted(he, (0, 1, 1), 0, 0), he)
    for core in range(4):
        turned = module.shifted(he, (8, 1, 1), 0, core)
        moved = degrees(module.stain_vectors(optical_density(turned.reshape(-1, 3) / 255)), found)
        np.testing.assert_allclose(moved, 8, atol=1)
        assert np.array_equal(turned, module.shifted(he, (8, 1, 1), 0, core))
        assert not np.array_equal(turned, module.shifted(he, (8, 1, 1), 1, core))
        changed = optical_density(module.shifted(he, (0, 1.25, 1), 0, core).reshape(-1, 3) / 255)
        factors = np.linalg.lstsq(vectors.T, changed.T, rcond=None)[0].sum(axis=1) / amounts.sum(axis=0)
        assert all(min(abs(factor - 1.25), abs(factor - 0.8)) < 0.02 for factor in factors)
        gains = (module.shifted(he, (0, 1, 1.1), 0, core) / he.clip(1)).reshape(-1, 3)[he.reshape(-1, 3).max(1) < 230]
        assert all(min(abs(gain - 1.1), abs(gain - 1 / 1.1)) < 0.02 for gain in np.median(gains, axis=0))


def test_mixing_moves_mean_and_spread_towards_another_core_before_the_jitter(benchmark):
    module = benchmark("stain_shift")
    # By core: mean and standard deviation of haematoxylin, then of eosin.
    stains = {0: np.array([[0.4, 0.2], [0.3, 0.1]]), 1: np.array([[0.8, 0.3], [0.2, 0.2]])}
    drawn = np.random.default_rng(4)
    weight, other = drawn.random(), stains[[0, 1][drawn.integers(2)]]
    place = module.mixed(PatchPlace(0, 3, 5, colour=(0.0,) * 8), stains, np.random.default_rng(4))
    jitter = np.array([0.5, -0.4, 0.3, 0.2, -0.6, 0.1, 0, 0])
    jittered = module.mixed(PatchPlace(0, 3, 5, colour=tuple(jitter)), stains, np.random.default_rng(4))
    assert (place.core, place.y, place.x) == (0, 3, 5)
    expected = (1 - weight) * stains[0] + weight * other
    vectors = np.array(STAINS) / np.linalg.norm(STAINS, axis=1, keepdims=True)
    amounts = np.random.default_rng(5).normal(stains[0][:, 0], stains[0][:, 1] / 2, (1, 4000, 2))
    he = torch.from_numpy(np.exp(-amounts @ vectors[:2]).transpose(2, 0, 1)[None]).float()
    for colour, factor, offset in ((place.colour, 1, 0), (jittered.colour, 1 + 0.15 * jitter[:2], 0.02 * jitter[3:5])):
        after = jitter_colour(he, torch.tensor([colour]))[0].numpy().transpose(1, 2, 0)
        found = (optical_density(after) @ separation())[0, :, :2]
        moved = expected[:, 1] / stains[0][:, 1] * (amounts[0] - stains[0][:, 0]) + expected[:, 0]
        np.testing.assert_allclose(found, moved * factor + offset, atol=1e-3)
    # A core without tissue has no stain to move from.
    assert module.mixed(PatchPlace(2, 0, 0), stains, np.random.default_rng(4)) == PatchPlace(2, 0, 0)


def test_the_rule_takes_the_best_strength_that_costs_little_and_gains_enough(benchmark):
    module = benchmark("stain_shift")

    def said(plain, over):
        r = [{way: np.array(values) for way, values in zip(module.WAYS, each, strict=True)} for each in (plain, over)]
        return module.verdict(*r)

    same = [[0.5, 0.5]] * 5
    assert "strength 1, and mixing does not" in said(same, same)
    better = [[0.3, 0.3], [0.3, 0.3], [0.33, 0.34], [0.4, 0.5], [0.3, 0.3]]
    assert "strength 3, and mixing does not" in said(same, better)
    assert "strength 2," in said([*same[:3], [0.48, 0.49], same[4]], better)
    # In one seed of two, or too little.
    assert "strength 1," in said(same, [*better[:2], [0.36, 0.29], better[0], better[4]])
    assert "strength 1," in said(same, [*better[:2], [0.305, 0.306], better[0], better[4]])
    assert "strength 3, and mixing becomes" in said(same, [*better[:4], [0.42, 0.52]])
    assert "strength 3, and mixing does not" in said([*same[:4], [0.4, 0.4]], [*better[:4], [0.42, 0.52]])


@pytest.mark.slow
def test_the_quick_form_compares_stain_augmentations_on_every_shift(benchmark, tmp_path, capsys):
    module = benchmark("stain_shift")
    threads, places = torch.get_num_threads(), TrainingSamples.places
    assert module.main(["--quick", "--output_dir", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    for shift in module.SHIFTS:
        assert f"| {shift} | " in shown
    assert "By the rule, the default is strength " in shown
    assert TrainingSamples.places is places
    kept = json.loads((tmp_path / "trials_quick.json").read_text())
    # Every way is another training, and every shift another prediction of the same pixels.
    sums = [np.array(kept["trials"][f"0 {way}"]["sums"][shift]) for way in module.WAYS for shift in module.SHIFTS]
    assert len({each.tobytes() for each in sums}) == len(module.WAYS) * len(module.SHIFTS)
    assert len({each[[0, 2, 4]].tobytes() for each in sums}) == 1
    assert not list(tmp_path.glob("seed_*"))
    # A training is a function of its seed, mixing included.
    lost = kept["trials"].pop(f"0 {module.MIXING}")
    (tmp_path / "trials_quick.json").write_text(json.dumps(kept))
    assert module.main(["--quick", "--report", "--output_dir", str(tmp_path)]) == 0
    assert "No seed is finished" in capsys.readouterr().out
    assert module.main(["--quick", "--output_dir", str(tmp_path)]) == 0
    again = json.loads((tmp_path / "trials_quick.json").read_text())["trials"][f"0 {module.MIXING}"]
    assert again["sums"] == lost["sums"]
    torch.set_num_threads(threads)


def test_the_pages_repeat_what_the_pretrained_encoder_gained():
    table = (ROOT / "benchmarks" / "results" / "transfer.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")] for line in table.splitlines() if line.startswith("| ")]
    by_seed = {
        cells[1]: np.array(cells[7].split(", "), float) for cells in rows if cells[1].startswith(("U-Net", "enc"))
    }
    gains = by_seed["encoder, pretrained, frozen"] - by_seed["U-Net, seconds of the encoder"]
    text = f"by {gains.mean():.2f} in Pearson (three seeds: {', '.join(f'{gain:+.2f}' for gain in gains)})"
    assert text in " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    transfer = " ".join((ROOT / "docs" / "transfer.md").read_text(encoding="utf-8").split())
    assert f"frozen by {gains.mean():.2f} although the U-Net trained twice as long" in transfer
    trained = by_seed["encoder, pretrained"] - by_seed["U-Net, seconds of the encoder"]
    assert f"trained along by {trained.mean():.2f} at equal seconds" in transfer


def test_the_pages_repeat_what_was_gained_at_equal_compute():
    page = (ROOT / "benchmarks" / "results" / "equal_compute.md").read_text(encoding="utf-8")
    scored = page.partition("## On the groups that score")[2]
    gains = {cells[1]: cells[-3] for cells in ([cell.strip() for cell in line.split("|")[:-1]]
             for line in scored.splitlines()[4:] if line.startswith("| "))}  # fmt: skip
    text = " ".join((ROOT / "TRAINING_IMPROVEMENTS.md").read_text(encoding="utf-8").split())
    for way, words in (("twice as long", "twice the compute gained {}"), ("coarse view", "a coarse view of the "
                       "surroundings {}"), ("crops with scarce markers", "crops with scarce markers {}")):  # fmt: skip
        assert words.format(f"{float(gains[way].split()[0]):.3f}") in text
    ends = [f"{float(end):+.2f}" for end in gains["crops with scarce markers"].rstrip(")").split()[-3::2]]
    assert f"interval from {ends[0]} to {ends[1]}" in text
