"""Whole trainings on tiny data: what they write, what each option does, how they end."""

import json
import math
import os
import re
import signal
import sys
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from tiny_runs import TINY, command_line, differing, losses, read_metrics, read_status, read_steps, weights

from orion_unet.checkpoint import load, save
from orion_unet.cli.arguments import parse_train_config
from orion_unet.config import GROUPS, ModelOptions, TrainConfig
from orion_unet.data.patches import PatchPlace
from orion_unet.demo.make import make_demo
from orion_unet.errors import InputError
from orion_unet.inference.model import load_trained
from orion_unet.losses import CompositeLoss
from orion_unet.models.unet import SpatialUNet
from orion_unet.training import build, engine, recalibrate
from orion_unet.training.build import build_loss
from orion_unet.training.loop import Loop
from orion_unet.training.loop import train as run
from orion_unet.training.prepare import prepare_data

pytestmark = pytest.mark.slow

TERMS = {"mse", "l1", "boundary", "focal", "variance", "correlation"}
METRICS = {"pearson", "mae", "psnr_db", "ssim"}


def snapshot(folder):
    """Content and time of every file below a folder."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def strict_json(path):
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def test_a_run_folder_holds_what_was_promised(train):
    made = train(epochs=3, sanity_check_freq=2)
    assert made.code == 0
    names = {str(path.relative_to(made.dir)) for path in made.dir.rglob("*") if path.is_file()}
    assert names == {
        "config.json",
        "split.json",
        "normalization.json",
        "metrics.jsonl",
        "steps.jsonl",
        "status.json",
        "train.log",
        "checkpoints/last.pt",
        "checkpoints/last_previous.pt",
        "checkpoints/best.pt",
        "sanity/epoch_0002.png",
    }
    config = strict_json(made.dir / "config.json")
    assert config["options"].keys() == {f.name for group in GROUPS.values() for f in fields(group)}
    assert (config["schema"], config["world_size"], config["global_batch"], config["attempt"]) == (1, 1, 2, 1)
    assert config["device_memory_bytes"] > 1 << 28 and config["usable_cores"] >= 1
    assert (config["loader_processes"], config["target_layouts"]) == (0, ["hwc"])
    assert config["versions"].keys() >= {"torch", "numpy", "python", "orion_unet"}
    split = strict_json(made.dir / "split.json")
    assert sorted(row["core"] for side in ("train", "val") for row in split[side]) == [f"core_0{i}" for i in range(4)]
    status = strict_json(made.dir / "status.json")
    assert status.keys() >= {"updated", "pid", "host", "message"}
    assert [status[key] for key in ("state", "epoch", "epochs", "step", "steps_per_epoch")] == ["finished", 3, 3, 6, 6]
    log = (made.dir / "train.log").read_text()
    assert [f"epoch {epoch}/3" in log for epoch in (1, 2, 3, 4)] == [True, True, True, False]


def test_every_line_of_the_metrics_has_every_key_and_adds_up(train):
    records = read_metrics(train(epochs=3, focal_weight=0.2).dir)
    assert [record["epoch"] for record in records] == [1, 2, 3]
    for record in records:
        assert record.keys() >= {
            "schema", "epoch", "attempt", "time", "duration_s", "lr", "train", "val", "grad_norm", "samples_per_s",
            "data_wait_fraction", "max_memory_bytes", "skipped_steps", "best",
        }  # fmt: skip
        assert record["train"]["terms"].keys() == record["val"]["terms"].keys() == TERMS
        assert record["val"]["metrics"].keys() >= METRICS
        assert record["val"]["per_channel"].keys() == {f"channel_0{index}" for index in range(3)}
        for side in ("train", "val"):
            terms = record[side]["terms"]
            total = 0.8 * terms["mse"] + 0.3 * terms["l1"] + 0.1 * terms["boundary"]
            total += 0.2 * terms["focal"] + 0.1 * terms["variance"]
            assert record[side]["loss"] == pytest.approx(total, rel=1e-5)
        for metric in METRICS:
            per_channel = [values[metric] for values in record["val"]["per_channel"].values()]
            assert record["val"]["metrics"][metric] == pytest.approx(np.mean(per_channel), rel=1e-9)
            assert record["val"]["metrics"][f"{metric}_markers"] == 3
        assert record["val"]["metrics"]["r2"] < 1
        assert (record["schema"], record["attempt"], record["skipped_steps"]) == (1, 1, 0)
        assert (record["lr"], 0 <= record["data_wait_fraction"] <= 1) == (1e-2, True)
        assert min(record[key] for key in ("duration_s", "grad_norm", "samples_per_s", "max_memory_bytes")) > 0
    best = min(records, key=lambda record: record["val"]["loss"])
    assert best["best"]
    losses_so_far = [record["val"]["loss"] for record in records]
    assert [record["best"] for record in records] == [
        loss < min(losses_so_far[:index], default=math.inf) for index, loss in enumerate(losses_so_far)
    ]


@pytest.mark.parametrize("every", [1, 4, 0])
def test_the_lines_of_the_steps_add_up_to_the_epoch(every, train):
    made = train(epochs=2, log_every_steps=every, scheduler="cosine")
    lines = read_steps(made.dir)
    ends = {1: [1, 2, 3, 4, 5, 6], 4: [4, 6], 0: []}[every]
    assert [(line["epoch"], line["step"]) for line in lines] == [(epoch, end) for epoch in (1, 2) for end in ends]
    for record in read_metrics(made.dir) if every else []:
        own = [line for line in lines if line["epoch"] == record["epoch"]]
        sizes = np.diff([0, *ends])
        assert np.average([line["loss"] for line in own], weights=sizes) == pytest.approx(record["train"]["loss"])
        assert own[-1]["lr"] == record["lr"] and {line["attempt"] for line in own} == {1}
        assert max(line["grad_norm"] for line in own) >= record["grad_norm"] > 0
        assert all(0 <= line["data_wait_fraction"] <= 1 and line["samples_per_s"] > 0 for line in own)
        assert {line["skipped_steps"] for line in own} == {line["non_finite_steps"] for line in own} == {0}
    if every == 1:
        norms = [line["grad_norm"] for line in lines if line["epoch"] == 1]
        assert np.mean(norms) == pytest.approx(read_metrics(made.dir)[0]["grad_norm"])


def test_a_step_that_is_not_finite_is_null_and_counted(train, monkeypatch):
    forward = CompositeLoss.forward
    calls = iter(range(1000))

    def spoiled(self, *given):
        value, terms = forward(self, *given)
        return (value * math.nan, terms) if next(calls) == 1 else (value, terms)

    monkeypatch.setattr(CompositeLoss, "forward", spoiled)
    made = train(epochs=1, log_every_steps=1)
    lines = read_steps(made.dir)
    assert [line["loss"] is None for line in lines] == [False, True, False, False, False, False]
    assert [line["grad_norm"] is None for line in lines] == [False, True, False, False, False, False]
    assert [line["skipped_steps"] for line in lines] == [0, 1, 0, 0, 0, 0]
    assert [line["non_finite_steps"] for line in lines] == [0, 1, 0, 0, 0, 0]


def test_steps_that_cannot_be_written_do_not_end_the_run(train, tmp_path):
    (tmp_path / "run" / "steps.jsonl").mkdir(parents=True)
    made = train(log_every_steps=1)
    assert made.code == 0
    assert (made.dir / "train.log").read_text().count("steps.jsonl: cannot be written") == 1


def test_a_constant_marker_has_no_correlation_but_null(train, pairs):
    for path in pairs.glob("*_ORION.npy"):
        array = np.load(path)
        array[..., 1] = 0
        np.save(path, array)
    record = read_metrics(train(epochs=1).dir)[0]
    assert record["val"]["per_channel"]["channel_01"]["pearson"] is None
    assert record["val"]["metrics"]["pearson_markers"] == 2


def test_the_best_checkpoint_is_all_it_takes_to_predict(train):
    made = train(epochs=2, channel_names="Hoechst,CD45,Pan-CK")
    stored = torch.load(made.dir / "checkpoints" / "best.pt", weights_only=True)
    assert stored["channel_names"] == ["Hoechst", "CD45", "Pan-CK"]
    assert stored["options"]["patch_size"] == 64
    assert [row["name"] for row in stored["normalization"]["channels"]] == ["Hoechst", "CD45", "Pan-CK"]
    assert stored["normalization"] == strict_json(made.dir / "normalization.json")
    assert not [name for name in stored["model"] if name.startswith(("module.", "_orig_mod."))]
    options = ModelOptions(**{f.name: stored["options"][f.name] for f in fields(ModelOptions)})
    model = SpatialUNet.from_options(options, len(stored["channel_names"]))
    model.load_state_dict(stored["model"])
    assert model(torch.rand(1, 3, 64, 64)).shape == (1, 3, 64, 64)


def test_best_holds_the_averaged_weights_of_the_best_epoch(train):
    made = train(epochs=1, ema_decay=0.99)
    best, averaged, plain = weights(made.dir, "best.pt"), weights(made.dir, part="ema"), weights(made.dir)
    assert all(torch.equal(best[name], averaged[name]) for name in best)
    assert not torch.equal(best["head.weight"], plain["head.weight"])


def test_panels_are_drawn_in_the_chosen_epochs_and_can_be_compared(train):
    made = train(epochs=5, sanity_check_freq=2)
    panels = sorted(path.name for path in (made.dir / "sanity").iterdir())
    assert panels == ["epoch_0002.png", "epoch_0004.png"]
    first, second = (imread(made.dir / "sanity" / name) for name in panels)
    assert first.shape == second.shape
    assert min(first.shape[:2]) > 300
    assert first.std() > 0.1
    # The measured half stays, the predicted one learns.
    assert 0 < np.mean(first != second) < 0.6


def test_tensorboard_events_say_what_the_log_says(train):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    made = train(epochs=2, tensorboard=True)
    events = accumulator.EventAccumulator(str(made.dir / "tensorboard"))
    events.Reload()
    records = read_metrics(made.dir)
    for tag, of in (("loss/val", lambda r: r["val"]["loss"]), ("train/mse", lambda r: r["train"]["terms"]["mse"])):
        assert [event.step for event in events.Scalars(tag)] == [1, 2]
        assert [event.value for event in events.Scalars(tag)] == pytest.approx([of(r) for r in records], rel=1e-6)


# Each option, given here beside TINY and one epoch, must change what is trained or measured.
EFFECTS = {
    "mixed_cores": {"mixed_cores": 1},
    "val_split": {"val_split": 0.5},
    "fold": {"fold": "2/4"},
    "exclude_channels": {"exclude_channels": "channel_01"},
    "patch_size": {"patch_size": 48},
    "patches_per_image": {"patches_per_image": 6},
    "patches_per_image_val": {"patches_per_image_val": 0},
    "target_normalization": {"target_normalization": "core"},
    "target_normalization, none": {"target_normalization": "none"},
    "target_transform": {"target_transform": "log1p"},
    "augment": {"augment": False},
    "stain_augmentation": {"stain_augmentation": 2.0},
    "stain_augmentation, usual": {"stain_augmentation": 1.0},
    "base_features": {"base_features": 6},
    "depth": {"depth": 1},
    "norm": {"norm": "group"},
    "norm, instance": {"norm": "instance"},
    "dropout": {"dropout": 0.5},
    "encoder_rate_factor": {"encoder_rate_factor": 0.1},
    "output_start": {"output_start": "half"},
    "use_boundary_guidance": {"use_boundary_guidance": True},
    "mse_weight": {"mse_weight": 0.0},
    "l1_weight": {"l1_weight": 0.0},
    "boundary_weight": {"boundary_weight": 0.0},
    "focal_weight": {"focal_weight": 0.5},
    "variance_weight": {"variance_weight": 0.0},
    "correlation_weight": {"correlation_weight": 0.5},
    "variance_form": {"variance_form": "exponential"},
    "target_variance": {"target_variance": 0.02},
    "channel_weights": {"channel_weights": "channel_01=4"},
    "batch_size": {"batch_size": 3},
    "learning_rate": {"learning_rate": 1e-3},
    "weight_decay": {"weight_decay": 1.0},
    "scheduler": {"scheduler": "cosine"},
    "grad_clip": {"grad_clip": 0.01},
    "accumulate_steps": {"accumulate_steps": 3},
    "ema_decay": {"ema_decay": 0.9},
    "statistics_batches": {"statistics_batches": 0},
    "seed": {"seed": 43},
}
# The others, and the tests that show what they do.
SHOWN_BY = {
    "pairs_dir": "every test here",
    "output_dir": "every test here",
    "gpus": "test_a_gpu_that_is_not_there_is_bad_input",
    "use_amp": "test_mixed_precision_on_a_cpu_is_left_out_with_a_note",
    "amp_dtype": "tests/unit/test_devices.py",
    "epochs": "test_every_line_of_the_metrics_has_every_key_and_adds_up",
    "split_file": "test_a_split_file_repeats_an_earlier_split",
    "groups_csv": "test_groups_stay_together",
    "channel_names": "test_the_best_checkpoint_is_all_it_takes_to_predict",
    "pixel_size_um": "tests/integration/test_pixel_size.py",
    "level": "tests/unit/test_tiled_pairs.py",
    "cache_mb": "tests/unit/test_tiled_pairs.py",
    "he_layout": "test_a_declared_layout_is_believed",
    "orion_layout": "test_a_declared_layout_is_believed",
    "grid_stride": "test_the_stride_of_the_grid_sets_the_number_of_patches",
    "noise_removal": "test_noise_removal_changes_what_is_learned_from_hot_pixels",
    "num_workers": "test_loader_processes_and_validation_batches_change_no_number",
    "val_batch_size": "test_loader_processes_and_validation_batches_change_no_number",
    "lr_factor": "test_a_plateau_lowers_the_learning_rate",
    "lr_patience": "test_a_plateau_lowers_the_learning_rate",
    "warmup_epochs": "test_warm_up_and_cosine_shape_the_learning_rate",
    "keep_channels": "tests/unit/test_normalization.py",
    "best_by": "test_best_by_pearson_keeps_the_epoch_with_the_highest_one_and_a_resumed_run_goes_on_so",
    "early_stopping_patience": "test_early_stopping_stops_and_says_so",
    "recalibrate": "test_the_best_model_is_recalibrated_after_training_and_only_it",
    "stop_timeout_s": "tests/integration/test_launcher.py",
    "pinned_memory_mb": "tests/unit/test_loaders.py",
    "compile": "test_a_compiled_model_trains_and_is_stored_under_its_own_names",
    "deterministic": "test_deterministic_kernels_are_asked_for",
    "sanity_check_freq": "test_panels_are_drawn_in_the_chosen_epochs_and_can_be_compared",
    "log_every_steps": "test_the_lines_of_the_steps_add_up_to_the_epoch",
    "tensorboard": "test_tensorboard_events_say_what_the_log_says",
    "overwrite": "test_overwrite_replaces_the_run_and_nothing_else",
    "resume": "test_resume.py",
    "init_from": "test_transfer_runs.py",
    "upsampling": "test_transfer_runs.py",
    "init_partial": "test_transfer_runs.py",
    "encoder_train": "test_transfer_runs.py",
    "encoder": "test_timm_runs.py",
    "encoder_mean": "test_timm_unet.py",
    "encoder_std": "test_timm_unet.py",
    "encoder_weights": "test_timm_runs.py",
    "save_every_minutes": "test_resume.py",
}


def test_every_option_of_the_trainer_is_shown_to_do_something():
    declared = {f.name for group in GROUPS.values() for f in fields(group)}
    assert declared == {name.partition(",")[0] for name in EFFECTS} | set(SHOWN_BY)
    assert not [name for name in SHOWN_BY.values() if name.startswith("test_a_") and name not in globals()]


@pytest.fixture(scope="module")
def plain_losses():
    """Kept between tests: the data are the same in each."""
    return {}


@pytest.mark.parametrize("options", EFFECTS.values(), ids=EFFECTS)
def test_an_option_changes_the_training(options, train, plain_losses):
    if not plain_losses:
        plain_losses.update(losses(train("plain", epochs=1).dir))
    made = train("changed", epochs=1, **options)
    assert made.code == 0
    record = read_metrics(made.dir)[0]
    assert math.isfinite(record["train"]["loss"])
    assert math.isfinite(record["val"]["loss"])
    assert losses(made.dir) != plain_losses
    assert strict_json(made.dir / "config.json")["options"].items() >= options.items()


@pytest.mark.parametrize(
    ("options", "used", "said"),
    [
        ({"statistics_batches": 2}, 2, "statistics measured anew over 2 batches before each validation"),
        (
            {"statistics_batches": 40},
            6,
            "over 6 batches before each validation, all of an epoch (--statistics_batches 40)",
        ),
        ({"statistics_batches": 0}, 0, "validated with running averages of its statistics"),
        ({"norm": "group"}, 0, "none with --norm group, so --statistics_batches has no effect"),
        ({"batch_size": 1, "patches_per_image": 1}, 3, "measured anew over 3 batches"),
        ({"batch_size": 3, "patches_per_image": 1, "ema_decay": 0.9}, 1, "measured anew over 1 batches"),
    ],
)
def test_statistics_are_measured_over_the_last_batches_of_the_epoch(options, used, said, train, monkeypatch, capsys):
    seen = []
    forward = SpatialUNet.forward

    def watched(model, he):
        if not model.training and any(layer.training for layer in model.modules()):
            seen.append(he.clone())
        elif model.training:
            trained.append(he.clone())
        return forward(model, he)

    trained = []
    monkeypatch.setattr(SpatialUNet, "forward", watched)
    made = train(epochs=2, **options)
    assert said in capsys.readouterr().out
    half = len(trained) // 2
    expected = [*trained[:half][half - used :], *trained[half:][half - used :]]
    assert len(seen) == len(expected) == 2 * used
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))
    assert all(math.isfinite(record["val"]["loss"]) for record in read_metrics(made.dir))
    assert strict_json(made.dir / "config.json")["options"]["statistics_batches"] == options.get(
        "statistics_batches", 16
    )


def test_validation_is_calm_from_the_first_epoch_where_running_averages_are_not(train, tmp_path):
    make_demo(tmp_path / "demo", cores=6, size=160, seed=3)
    hasty = {
        "pairs_dir": str(tmp_path / "demo"), "epochs": 1, "learning_rate": 3e-2, "seed": 3, "patches_per_image": 8,
        "batch_size": 4, "upsampling": "transposed",
    }  # fmt: skip
    averaged, measured = train("averaged", statistics_batches=0, **hasty), train("measured", **hasty)
    (before,), (after,) = read_metrics(averaged.dir), read_metrics(measured.dir)
    assert before["train"] == after["train"]
    # The averages are those of weights long gone.
    assert before["val"]["metrics"]["r2"] < -1 and after["val"]["metrics"]["r2"] > -0.1


def test_a_resumed_run_keeps_its_stain_augmentation_which_was_1_before_the_option_existed(train):
    strong, usual = (losses(train(f"whole {strength}", stain_augmentation=strength).dir) for strength in (2.0, 1.0))
    train("strong", stain_augmentation=2.0, epochs=1)
    assert losses(train("strong", resume="auto").dir) == strong
    with pytest.raises(InputError, match=r"--stain_augmentation: 2\.0 in the run, 1\.0 now"):
        train("strong", resume="auto", stain_augmentation=1.0, epochs=3)
    last = train("old", stain_augmentation=1.0, epochs=1).dir / "checkpoints" / "last.pt"
    content = load(last)
    del content["options"]["stain_augmentation"]
    torch.save(content, last)
    made = train("old", resume="auto")
    assert losses(made.dir) == usual
    assert strict_json(made.dir / "config.json")["options"]["stain_augmentation"] == 1.0


def test_a_resumed_run_keeps_how_it_was_validated(train):
    train(epochs=1, statistics_batches=0)
    made = train(epochs=2, resume="auto")
    assert strict_json(made.dir / "config.json")["options"]["statistics_batches"] == 0
    made = train(epochs=3, resume="auto", statistics_batches=4)
    assert strict_json(made.dir / "config.json")["options"]["statistics_batches"] == 4


def test_every_checkpoint_knows_its_cores_by_their_content_and_the_baselines_they_give(train):
    made = train(epochs=1)
    config = strict_json(made.dir / "config.json")
    found = [load(made.dir / "checkpoints" / name) for name in ("best.pt", "last.pt")]
    for content in found:
        assert content["cores"]["digests"].keys() == {"core_00", "core_01", "core_02", "core_03"}
        assert len(set(content["cores"]["digests"].values())) == 4
        assert content["colour_regression"]["names"] == config["channel_names"]
        assert content["colour_regression"]["cores"] == 3
    assert found[0]["cores"] == found[1]["cores"]


def test_the_same_training_twice_is_the_same_bit_for_bit(train):
    assert losses(train("one", dropout=0.3).dir) == losses(train("two", dropout=0.3).dir)


def test_loader_processes_and_validation_batches_change_no_number(train, capsys):
    plain = train("plain", epochs=1)
    other = train("workers", epochs=1, num_workers=2, val_batch_size=3)
    assert "loader processes per rank: 2" in capsys.readouterr().out
    (one,), (two,) = read_metrics(plain.dir), read_metrics(other.dir)
    assert one["train"] == two["train"]
    assert one["val"]["loss"] == pytest.approx(two["val"]["loss"], rel=1e-6)


def test_noise_removal_changes_what_is_learned_from_hot_pixels(train, pairs):
    rng = np.random.default_rng(5)
    for path in pairs.glob("*_ORION.npy"):
        array = (np.load(path) // 16).astype(np.uint16)
        array[rng.integers(0, 80, 30), rng.integers(0, 72, 30)] = 65535
        np.save(path, array)
    # Networks that start at a half and stay there: only the measured pixels can differ.
    still = {"epochs": 1, "learning_rate": 1e-30, "output_start": "half", "statistics_batches": 0}
    # These pairs are random pixels, of which nothing else would be trained on.
    still["keep_channels"] = ",".join(str(channel) for channel in range(np.load(path, mmap_mode="r").shape[2]))
    noisy, cleaned = train("noisy", **still), train("cleaned", noise_removal=True, **still)
    (before,), (after,) = read_metrics(noisy.dir), read_metrics(cleaned.dir)
    # One pixel in 200 was hot, and those are the farthest from a half.
    assert after["val"]["terms"]["mse"] < 0.9999 * before["val"]["terms"]["mse"]


def test_the_stride_of_the_grid_sets_the_number_of_patches(train):
    # A core of 80 x 72: offsets 0 and 16 down and 0 and 8 across with steps of 64 and of 8.
    made = {
        stride: train(f"stride_{stride}", epochs=1, patches_per_image_val=0, grid_stride=stride) for stride in (64, 8)
    }
    assert {stride: read_metrics(at.dir)[0]["val"]["patches"] for stride, at in made.items()} == {64: 4, 8: 6}


def test_a_split_file_repeats_an_earlier_split(train):
    first = train("first", epochs=1, seed=1, val_split=0.5)
    split = first.dir / "split.json"
    again = train("again", epochs=1, seed=7, split_file=str(split))
    assert strict_json(again.dir / "split.json") == strict_json(split)
    assert strict_json(train("other", epochs=1, seed=7).dir / "split.json") != strict_json(split)


def test_a_fold_is_recorded_and_kept_by_a_resumed_run(train):
    made = train(epochs=1, fold="2/4")
    split = strict_json(made.dir / "split.json")
    assert split["fold"] == strict_json(made.dir / "config.json")["options"]["fold"] == "2/4"
    assert train(epochs=2, resume="auto").code == 0
    assert strict_json(made.dir / "split.json") == split
    assert strict_json(made.dir / "config.json")["options"]["fold"] == "2/4"
    with pytest.raises(InputError, match="--fold: 2/4 in the run, 1/4 now"):
        train(epochs=3, fold="1/4", resume="auto")


def test_groups_stay_together(train, tmp_path):
    groups = tmp_path / "patients.csv"
    groups.write_text("core,group\ncore_00,A\ncore_01,A\ncore_02,B\ncore_03,B\n")
    split = strict_json(train(epochs=1, groups_csv=str(groups)).dir / "split.json")
    sides = [{row["group"] for row in split[side]} for side in ("train", "val")]
    assert sorted(map(sorted, sides)) == [["A"], ["B"]]


def test_a_declared_layout_is_believed(train, write_pairs):
    # 3 x 80 x 3 could be either; here the files say nothing and the option decides.
    folder = write_pairs("chw", cores=4, size=(80, 72), channels=3, he_layout="chw", orion_layout="chw")
    told = train("told", epochs=1, pairs_dir=str(folder), he_layout="chw", orion_layout="chw")
    assert losses(told.dir) == losses(train("guessed", epochs=1, pairs_dir=str(folder)).dir)
    for option in ("he_layout", "orion_layout"):
        with pytest.raises(InputError, match="core_00"):
            train("wrong", epochs=1, pairs_dir=str(folder), **{option: "hwc"})


def test_mixed_precision_on_a_cpu_is_left_out_with_a_note(train, capsys):
    with_amp, without = train("amp", epochs=1, use_amp=True), train("plain", epochs=1)
    assert "mixed precision needs a GPU" in capsys.readouterr().out
    assert losses(with_amp.dir) == losses(without.dir)


def test_a_gpu_that_is_not_there_is_bad_input(train, tmp_path):
    with pytest.raises(InputError, match="99 GPUs are wanted"):
        train(gpus=99)
    assert not (tmp_path / "run").exists()


def test_deterministic_kernels_are_asked_for(train, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    assert not torch.are_deterministic_algorithms_enabled()
    assert train(epochs=1, deterministic=True).code == 0
    assert torch.are_deterministic_algorithms_enabled()


def test_a_compiled_model_trains_and_is_stored_under_its_own_names(train, monkeypatch):
    # Tracing without code generation: the wiring is what is tested, and a compiler may be missing.
    given = []

    def compile_(model, **options):
        given.append(model)
        return made(model, backend="eager", **options)

    made = torch.compile
    monkeypatch.setattr(torch, "compile", compile_)
    compiled, plain = (
        train("compiled", epochs=1, compile=True, ema_decay=0.9),
        train("plain", epochs=1, ema_decay=0.9),
    )
    # The averaged model, which validates, as well as the one that trains.
    assert sum(isinstance(model, SpatialUNet) for model in given) == 2
    assert weights(compiled.dir).keys() == weights(plain.dir).keys()
    (one,), (two,) = read_metrics(compiled.dir), read_metrics(plain.dir)
    assert one["train"]["loss"] == pytest.approx(two["train"]["loss"], rel=1e-5)


def test_the_loss_is_compiled_on_one_rank_and_not_on_several(monkeypatch):
    config, prepared = TrainConfig.from_options({"compile": True}), SimpleNamespace(channel_weights=None)
    compiled = []
    monkeypatch.setattr(CompositeLoss, "compile", lambda self, dynamic: compiled.append(self))
    loss = build_loss(config, prepared, torch.device("cpu"))
    assert compiled == [loss]
    monkeypatch.setattr(build, "world_size", lambda: 2)
    build_loss(config, prepared, torch.device("cpu"))
    monkeypatch.setattr(build, "world_size", lambda: 1)
    build_loss(TrainConfig(), prepared, torch.device("cpu"))
    assert compiled == [loss]


def test_warm_up_and_cosine_shape_the_learning_rate(train, monkeypatch):
    rates = []
    step = engine._optimizer_step

    def note(learner, parameters):
        rates.append(learner.optimizer.param_groups[0]["lr"])
        return step(learner, parameters)

    monkeypatch.setattr(engine, "_optimizer_step", note)
    # 3 training cores x 4 patches in batches of 2, two a step: 3 steps an epoch, 9 in all, the first 3 to warm up.
    train(epochs=3, warmup_epochs=1, scheduler="cosine", learning_rate=0.01, accumulate_steps=2)
    decay = [0.005 * (1 + math.cos(math.pi * step / 5)) for step in range(6)]
    assert rates == pytest.approx([0.01 / 3, 0.02 / 3, 0.01, *decay], abs=1e-12)


def test_a_plateau_lowers_the_learning_rate(train, capsys):
    # Nothing improves by 1e-4 with so small a rate: the first epoch is the best, and every two after it are bad.
    made = train(epochs=7, norm="group", learning_rate=1e-7, lr_patience=1, lr_factor=0.25, early_stopping_patience=0)
    rates = [record["lr"] for record in read_metrics(made.dir)]
    assert rates == pytest.approx([1e-7, 1e-7, 1e-7, 2.5e-8, 2.5e-8, 6.25e-9, 6.25e-9])
    assert "learning rate lowered to 2.50e-08" in capsys.readouterr().out


def test_early_stopping_stops_and_says_so(train, capsys):
    # A rate that is 0 in float32: no epoch after the first is better.
    made = train(epochs=9, norm="group", learning_rate=1e-50, early_stopping_patience=2)
    assert made.code == 0
    assert [record["best"] for record in read_metrics(made.dir)] == [True, False, False]
    assert read_status(made.dir)["state"] == "early_stopped"
    assert "stopped early" in read_status(made.dir)["message"]
    said = capsys.readouterr().out
    assert "stopped early: no better validation loss for 2 epochs" in said
    assert "best epoch 1" in said


def test_best_by_pearson_keeps_the_epoch_with_the_highest_one_and_a_resumed_run_goes_on_so(train, monkeypatch, capsys):
    # Made validations, by epoch: the loss is lowest in the second, Pearson highest in the first, then in the fourth.
    made = {1: (0.5, 0.6), 2: (0.3, 0.2), 3: (0.4, None), 4: (0.45, 0.7)}
    judge = Loop._validate

    def validate(self, epoch, times):
        found = judge(self, epoch, times)
        return replace(found, loss=made[epoch][0], metrics={**found.metrics, "pearson": made[epoch][1]})

    monkeypatch.setattr(Loop, "_validate", validate)
    by_loss = train("loss", epochs=3)
    assert load(by_loss.dir / "checkpoints" / "best.pt")["epoch"] == 2
    run = train("pearson", epochs=3, best_by="pearson")
    best = load(run.dir / "checkpoints" / "best.pt")
    assert (best["epoch"], best["best_val_loss"]) == (1, 0.5)
    assert [record["best"] for record in read_metrics(run.dir)] == [True, False, False]
    assert "best epoch 1: val Pearson 0.60000, val loss 0.50000" in capsys.readouterr().out
    with pytest.raises(InputError, match="--best_by: pearson in the run, loss now"):
        train("pearson", epochs=4, resume="auto")
    train("pearson", epochs=4, best_by="pearson", resume="auto")
    assert "best validation Pearson 0.60000" in capsys.readouterr().out
    assert load(run.dir / "checkpoints" / "best.pt")["epoch"] == 4
    assert {record["schema"] for record in read_metrics(run.dir)} == {1}


def test_a_run_made_before_best_by_existed_goes_on_by_its_loss(train):
    run = train(epochs=1)
    path = run.dir / "checkpoints" / "last.pt"
    state = torch.load(path, weights_only=True)
    del state["options"]["best_by"], state["early_stopping"]["best_loss"]
    torch.save(state, path)
    with pytest.raises(InputError, match="--best_by: loss in the run, pearson now"):
        train(epochs=2, best_by="pearson", resume="auto")
    train(epochs=2, resume="auto")
    assert strict_json(run.dir / "config.json")["options"]["best_by"] == "loss"


def test_without_early_stopping_a_run_goes_on(train):
    made = train(epochs=4, norm="group", learning_rate=1e-30, early_stopping_patience=0)
    assert (len(read_metrics(made.dir)), read_status(made.dir)["state"]) == (4, "finished")


def test_a_folder_that_holds_a_run_is_refused_and_not_touched(train):
    made = train()
    before = snapshot(made.dir)
    with pytest.raises(InputError, match="holds an earlier run") as refused:
        train(seed=1)
    assert "--resume" in str(refused.value)
    assert "--overwrite" in str(refused.value)
    assert snapshot(made.dir) == before


def test_overwrite_replaces_the_run_and_nothing_else(train):
    made = train(epochs=3, sanity_check_freq=1, tensorboard=True)
    note = made.dir / "notes.txt"
    note.write_text("mine")
    again = train(epochs=1, seed=1, sanity_check_freq=1, overwrite=True)
    assert again.code == 0
    assert [record["epoch"] for record in read_metrics(made.dir)] == [1]
    assert [path.name for path in (made.dir / "sanity").iterdir()] == ["epoch_0001.png"]
    assert not list((made.dir / "tensorboard").glob("events*"))
    assert load(made.dir / "checkpoints" / "best.pt")["options"]["seed"] == 1
    assert load(made.dir / "checkpoints" / "last_previous.pt")["options"]["seed"] == 1
    assert note.read_text() == "mine"


def test_a_folder_of_other_files_may_take_a_run(train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert train(epochs=1).code == 0
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("norm", "patches_per_image", "weight_decay", "cause"),
    [("batch", 4, 30.0, "the validation loss of epoch 2 is not finite"), ("group", 11, 4.0, "10 steps in a row")],
)
def test_a_diverging_run_ends_with_3_and_keeps_its_best(norm, patches_per_image, weight_decay, cause, train, capsys):
    # Such a decay multiplies every kernel by 1 - 30 (or 1 - 4) in every step: they overflow in the second epoch.
    made = train(
        epochs=9,
        learning_rate=1.0,
        grad_clip=0.0,
        early_stopping_patience=0,
        norm=norm,
        weight_decay=weight_decay,
        patches_per_image=patches_per_image,
    )
    assert made.code == 3
    status = read_status(made.dir)
    assert (status["state"], status["epoch"]) == ("diverged", 2)
    assert cause in status["message"]
    assert "lower --learning_rate" in status["message"]
    said = capsys.readouterr().out
    assert status["message"] in said
    if "steps" in cause:
        assert said.count("step skipped; cores in the batch: core_0") == 10
    records = read_metrics(made.dir)
    assert records[0]["best"]
    assert all(record["val"]["loss"] is None and not record["best"] for record in records[1:])
    best = load(made.dir / "checkpoints" / "best.pt")
    assert (best["epoch"], best["best_val_loss"]) == (1, records[0]["val"]["loss"])
    assert all(tensor.isfinite().all() for tensor in best["model"].values())
    assert load(made.dir / "checkpoints" / "last.pt")["epoch"] == 1


def damage_nan(pairs):
    path = pairs / "core_02_ORION.npy"
    array = np.load(path).astype(np.float32) / 65535
    array[40, 40, 1] = np.nan
    np.save(path, array)
    return {}


def damage_truncated(pairs):
    path = pairs / "core_02_ORION.npy"
    path.write_bytes(path.read_bytes()[:-100])
    return {}


def damage_size(pairs):
    np.save(pairs / "core_02_ORION.npy", np.zeros((40, 40, 3), np.uint16))
    return {}


def one_core(pairs):
    for name in ("core_01", "core_02", "core_03"):
        for kind in ("HE", "ORION"):
            (pairs / f"{name}_{kind}.npy").unlink()
    return {}


BAD_INPUT = {
    "no folder": (lambda pairs: {"pairs_dir": str(pairs / "absent")}, "absent"),
    "NaN": (damage_nan, "core_02"),
    "truncated": (damage_truncated, "core_02"),
    "sizes differ": (damage_size, "core_02"),
    "one core": (one_core, "two are needed"),
    "patch too large": (lambda pairs: {"patch_size": 128}, "patch_size"),
    "too few patches": (lambda pairs: {"batch_size": 99}, "batch_size"),
    "unknown marker": (lambda pairs: {"channel_weights": "Nothing=2"}, "Nothing"),
    "no split file": (lambda pairs: {"split_file": str(pairs / "absent.json")}, "absent.json"),
}


@pytest.mark.parametrize(("spoil", "culprit"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_refused_before_anything_is_written(spoil, culprit, train, pairs, tmp_path):
    with pytest.raises(InputError, match=culprit):
        train(**spoil(pairs))
    assert not (tmp_path / "run").exists()


def test_the_package_trains_like_the_script_and_leaves_no_process_behind(start, pairs, tmp_path):
    options = {**TINY, "pairs_dir": pairs, "output_dir": tmp_path / "run", "num_workers": 1, "epochs": 1}
    command = start(sys.executable, "-m", "orion_unet", "train", *command_line(options))
    ended = command.end()
    assert (ended.code, ended.err) == (0, "")
    assert command.others() == []
    assert "epoch 1/1" in ended.out
    assert read_status(tmp_path / "run")["state"] == "finished"


def test_a_file_that_vanishes_under_the_run_ends_it_with_one_message(train, pairs, monkeypatch, tmp_path):
    progress = Loop._progress

    def remove(self, **fields):
        progress(self, **fields)
        for path in pairs.glob("*.npy"):
            path.unlink()

    monkeypatch.setattr(Loop, "_progress", remove)
    with pytest.raises(InputError) as ended:
        train(num_workers=1)
    assert "cannot be read any more" in str(ended.value)
    assert "Traceback" not in str(ended.value)
    status = read_status(tmp_path / "run")
    assert status["state"] == "failed"
    assert "cannot be read any more" in status["message"]


def test_the_config_of_a_run_repeats_it_and_options_beside_it_win(train, pairs, tmp_path):
    first = train(dropout=0.2, norm="group", seed=3)
    source = ["--config", str(first.dir / "config.json")]
    again = parse_train_config([*source, "--output_dir", str(tmp_path / "again")])
    assert run(again) == 0
    assert losses(tmp_path / "again") == losses(first.dir)
    other = parse_train_config([*source, "--output_dir", str(tmp_path / "other"), "--seed", "4"])
    assert (other.optimisation.seed, other.model.dropout, other.data.pairs_dir) == (4, 0.2, str(pairs))


def test_the_documented_command_line_is_accepted_as_written():
    words = (
        "--pairs_dir core_patches_npy --output_dir runs_sep6v1/custom_stable --epochs 25 --learning_rate 1e-4 "
        "--batch_size 12 --mse_weight 0.8 --l1_weight 0.3 --variance_weight 0.1 --focal_weight 0.0"
    )
    config = parse_train_config(words.split())
    assert (config.optimisation.epochs, config.optimisation.batch_size) == (25, 12)
    assert config.loss.weights == {
        "mse": 0.8, "l1": 0.3, "boundary": 0.1, "focal": 0.0, "variance": 0.1, "correlation": 0.1,
    }  # fmt: skip


def test_a_rate_too_small_for_the_length_of_the_run_is_told(train, capsys):
    train("little", learning_rate=1e-4)
    said = capsys.readouterr().out
    assert re.search(r"note: \d+ steps at a learning rate of 0\.0001 move a weight by about 0\.00\d*,", said)
    assert "--learning_rate auto would be 0.01" in said
    train("enough", learning_rate=None)
    assert "note:" not in capsys.readouterr().out


# A loss of little but correlation: predictions spread too far, so that they are recalibrated.
WIDE = {"correlation_weight": 1.0, "mse_weight": 0.0, "l1_weight": 0.0, "boundary_weight": 0.0, "variance_weight": 0.0,
        "epochs": 2}  # fmt: skip


def test_the_best_model_is_recalibrated_after_training_and_only_it(learnable, train, capsys):
    made = train(**WIDE, recalibrate=False)
    raw = load_trained(made.dir, "cpu")
    assert raw.recalibration is None
    before = (made.dir / "checkpoints" / "last.pt").read_bytes()
    # The run has ended, so that nothing but the recalibration is left to do.
    assert train(**WIDE, resume="auto").code == 0
    assert "best model recalibrated: 2 of 3 markers, scales " in capsys.readouterr().out
    assert (made.dir / "checkpoints" / "last.pt").read_bytes() == before
    model = load_trained(made.dir, "cpu")
    assert model.epoch == raw.epoch
    assert differing(model.network.state_dict(), raw.network.state_dict()) == []
    assert load_trained(made.dir / "checkpoints" / "last.pt", "cpu").recalibration is None
    he = torch.rand(1, 3, 40, 50)
    found, plain, line = model.predict(he), raw.predict(he), model.recalibration
    assert ((line.scale[:2] > 0) & (line.scale[:2] < 1)).all()
    assert line.scale[2] == line.offset[2] == 0
    for marker in range(len(model.names)):
        expected = (plain[:, marker] * line.scale[marker] + line.offset[marker]).clamp(0, 1)
        torch.testing.assert_close(found[:, marker], expected.float())


def test_the_recalibration_is_the_fit_to_the_training_patches(learnable, train):
    made = train(**WIDE)
    config = TrainConfig.of_run(json.loads((made.dir / "config.json").read_text())["options"])
    prepared = prepare_data(config, 1, None)
    run = build.build_run(config, torch.device("cpu"), prepared, None)
    places = recalibrate.recalibration_patches(run)
    # Three training cores with four patches an epoch, from grids of four.
    assert len(places) == 12 and len(np.unique(places, axis=0)) == 12
    sums = recalibrate.RecalibrationSums(run)
    np.testing.assert_array_equal(np.concatenate(sums.batches), places)
    assert set(places[:, 0]) == set(prepared.split.train.tolist())
    raw = replace(load_trained(made.dir, "cpu"), recalibration=None)
    batch = run.feeds.transform(run.feeds.reader.read([PatchPlace(*row) for row in places.tolist()]), augment=False)
    p, t = (each.transpose(0, 1).flatten(1).double().numpy() for each in (raw.predict(batch.he), batch.target))
    line = load_trained(made.dir, "cpu").recalibration
    for marker in range(2):
        expected = np.polyfit(p[marker], t[marker], 1)
        np.testing.assert_allclose([line.scale[marker], line.offset[marker]], expected, rtol=1e-4, atol=1e-6)


def test_a_signal_before_the_recalibration_ends_the_run_and_the_next_one_finishes_it(learnable, train, monkeypatch):
    straight = load(train("straight", epochs=1).dir / "checkpoints" / "best.pt")
    add = recalibrate.RecalibrationSums.add

    def interrupted(self, places):
        os.kill(os.getpid(), signal.SIGTERM)
        add(self, places)

    monkeypatch.setattr(recalibrate.RecalibrationSums, "add", interrupted)
    made = train(epochs=1)
    assert made.code == 143
    status = read_status(made.dir)
    assert status["state"] == "interrupted" and "before the best model was recalibrated" in status["message"]
    assert "recalibration" not in load(made.dir / "checkpoints" / "best.pt")
    monkeypatch.setattr(recalibrate.RecalibrationSums, "add", add)
    assert train(epochs=1, resume="auto").code == 0
    assert load(made.dir / "checkpoints" / "best.pt")["recalibration"] == straight["recalibration"]


@pytest.mark.parametrize("name", ["scale", "pixels"])
def test_a_damaged_recalibration_is_refused(train, name):
    made = train(epochs=1)
    best = made.dir / "checkpoints" / "best.pt"
    content = load(best)
    content["recalibration"][name] = "x"
    save(best, content)
    with pytest.raises(InputError, match=r"best.pt: is damaged, its recalibration"):
        load_trained(made.dir, "cpu")
