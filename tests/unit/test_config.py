"""Options: each one there with its default, the last one wins, a run's config.json comes back, mistakes are named."""

import json
import math
import re

import pytest

from orion_unet.cli.arguments import parse_train_config, run_command
from orion_unet.config import TrainConfig, load_options
from orion_unet.errors import InputError, RunError
from orion_unet.recipes import RECIPES, find_recipe

# The contract, by hand: option -> default. None where nothing is given or it is found out at the start.
DEFAULTS = {
    "data": {
        "pairs_dir": "core_patches_npy",
        "val_split": 0.2,
        "fold": None,
        "split_file": None,
        "groups_csv": None,
        "channel_names": None,
        "exclude_channels": None,
        "keep_channels": None,
        "pixel_size_um": None,
        "he_layout": "auto",
        "orion_layout": "auto",
        "level": 0,
        "patch_size": 256,
        "patches_per_image": 12,
        "patches_per_image_val": 8,
        "grid_stride": None,
        "target_normalization": "dataset",
        "target_transform": "linear",
        "noise_removal": False,
        "augment": True,
        "stain_augmentation": None,
        "num_workers": None,
        "mixed_cores": 0,
        "cache_mb": 256.0,
    },
    "model": {
        "base_features": 32,
        "depth": 4,
        "norm": "batch",
        "dropout": 0.0,
        "output_start": "mean",
        "upsampling": None,
        "use_boundary_guidance": False,
        "encoder": "unet",
        "encoder_mean": None,
        "encoder_std": None,
    },
    "transfer": {
        "init_from": None,
        "init_partial": False,
        "encoder_weights": None,
        "encoder_train": "full",
        "encoder_rate_factor": 1.0,
    },
    "loss": {
        "mse_weight": 0.8,
        "l1_weight": 0.3,
        "boundary_weight": 0.1,
        "focal_weight": 0.0,
        "variance_weight": 0.1,
        "correlation_weight": 0.0,
        "variance_form": "target",
        "target_variance": 0.01,
        "channel_weights": None,
    },
    "optimisation": {
        "epochs": 30,
        "batch_size": 12,
        "val_batch_size": 8,
        "learning_rate": 1e-4,
        "weight_decay": 2e-4,
        "scheduler": "plateau",
        "lr_factor": 0.5,
        "lr_patience": 5,
        "warmup_epochs": 0.0,
        "best_by": "loss",
        "early_stopping_patience": 10,
        "grad_clip": 1.0,
        "accumulate_steps": 1,
        "ema_decay": 0.0,
        "statistics_batches": None,
        "recalibrate": True,
        "seed": 42,
    },
    "runtime": {
        "use_amp": False,
        "amp_dtype": "auto",
        "gpus": None,
        "compile": False,
        "deterministic": False,
        "pinned_memory_mb": 4096.0,
        "stop_timeout_s": 120.0,
        "resume": None,
    },
    "output": {
        "output_dir": "runs/orion_spatial",
        "sanity_check_freq": 2,
        "save_every_minutes": 0.0,
        "log_every_steps": None,
        "tensorboard": False,
        "overwrite": False,
    },
}
FLAT = {name: value for group in DEFAULTS.values() for name, value in group.items()}
ON_OFF = sorted(name for name, value in FLAT.items() if isinstance(value, bool))
CHOICES = {
    "he_layout": ("auto", "hwc", "chw"),
    "orion_layout": ("auto", "hwc", "chw"),
    "target_normalization": ("dataset", "core", "none"),
    "target_transform": ("linear", "log1p"),
    "norm": ("batch", "group", "instance"),
    "output_start": ("mean", "half"),
    "upsampling": ("bilinear", "transposed"),
    "encoder_train": ("full", "frozen", "last"),
    "variance_form": ("target", "exponential"),
    "scheduler": ("plateau", "cosine", "constant"),
    "best_by": ("loss", "pearson"),
    "amp_dtype": ("auto", "bfloat16", "float16"),
}


def options(*argv):
    """What a command line without a recipe comes to."""
    return parse_train_config(["--recipe", "none", *argv]).options()


def refusal(capsys, *argv):
    """What a person sees on stderr, after exit code 2."""
    code = run_command(lambda given: parse_train_config(given) and 0, list(argv))
    shown = capsys.readouterr()
    assert code == 2
    assert shown.err.startswith("error: ")
    assert "Traceback" not in shown.err
    assert shown.out == ""
    return shown.err


def test_every_option_exists_with_its_default_and_no_other():
    assert options() == FLAT
    config = parse_train_config(["--recipe", "none"])
    for group, values in DEFAULTS.items():
        assert set(vars(getattr(config, group))) == set(values)


@pytest.mark.parametrize("name", ON_OFF)
def test_an_on_off_option_has_a_no_form_and_the_last_one_wins(name):
    assert options(f"--{name}")[name] is True
    assert options(f"--no_{name}")[name] is False
    assert options(f"--{name}", f"--no_{name}")[name] is False
    assert options(f"--no_{name}", f"--{name}")[name] is True


@pytest.mark.parametrize("name", sorted(set(FLAT) - set(ON_OFF) - set(CHOICES)))
def test_an_option_takes_a_value_and_the_last_one_wins(name):
    words = {
        "stop_timeout_s": "2.5",
        "pinned_memory_mb": "2.5",
        "weight_decay": "0.25",
        "learning_rate": "0.25",
        "lr_factor": "0.25",
        "val_split": "0.25",
        "stain_augmentation": "0.25",
    }
    if name == "fold":
        assert options("--fold", "1/3", "--fold=2/3")[name] == "2/3"
        return
    text = isinstance(FLAT[name], str) or name in (
        "split_file", "groups_csv", "channel_names", "exclude_channels", "keep_channels", "channel_weights",
        "resume", "init_from", "encoder_weights", "encoder_mean", "encoder_std",
    )  # fmt: skip
    number = words.get(name, "0.25" if isinstance(FLAT[name], float) else "7")
    first, last = ("first", "last") if text else (str(FLAT[name] or 16), "16" if name == "patch_size" else number)
    first, last = {
        "encoder": ("unet", "timm:resnet18"),
        "encoder_mean": ("0,0,0", "0.5,0.5,0.5"),
        "encoder_std": ("1,1,1", "0.5,0.5,0.5"),
    }.get(name, (first, last))
    found = options(f"--{name}", first, f"--{name}={last}")[name]
    assert found == (last if text else float(last))
    fraction = isinstance(FLAT[name], float) or name in ("pixel_size_um", "stain_augmentation")
    assert text or type(found) is (float if fraction else int)


@pytest.mark.parametrize(("name", "choice"), [(name, choice) for name in CHOICES for choice in CHOICES[name]])
def test_every_choice_is_taken(name, choice):
    assert options(f"--{name}", choice)[name] == choice


@pytest.mark.parametrize("name", ["gpus", "num_workers"])
def test_auto_is_found_out_at_the_start(name):
    assert options(f"--{name}", "3", f"--{name}", "auto")[name] is None
    assert options(f"--{name}", "auto", f"--{name}", "0")[name] == 0


def test_help_shows_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as ended:
        parse_train_config(["--recipe", "none", "--help"])
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for group in DEFAULTS:
        assert f"{group}:" in shown
    for name, value in FLAT.items():
        entry = re.search(rf" --{name}[ ,](?:(?! --(?!no_{name})).)*?default: (\S+)", shown)
        assert entry, name
        written = f"{value:g}" if isinstance(value, float) else str(value)
        usual = "none" if value is None else {"True": "on", "False": "off"}.get(written, written)
        usual = {
            "gpus": "auto",
            "num_workers": "auto",
            "statistics_batches": "auto",
            "log_every_steps": "auto",
            "grid_stride": "patch_size",
            "pixel_size_um": "that",
            "upsampling": "that",
            "stain_augmentation": "that",
            "encoder_mean": "timm's",
            "encoder_std": "timm's",
        }.get(name, usual)
        assert entry[1] == usual, name
        assert (f"--no_{name}" in entry[0]) == isinstance(value, bool)


BAD_VALUES = [
    ("--val_split", "0"),
    ("--val_split", "1"),
    ("--val_split", "nan"),
    *(("--fold", text) for text in ("2", "0/3", "4/3", "1/1", "-1/3", "1/x", "²/3", "1/3/5", "")),
    ("--patch_size", "15"),
    ("--patch_size", "5000"),
    ("--patch_size", "64.5"),
    ("--patches_per_image", "0"),
    ("--patches_per_image_val", "-1"),
    ("--grid_stride", "0"),
    *(("--stain_augmentation", text) for text in ("-0.1", "4.5", "nan", "inf", "strong")),
    ("--grid_stride", "257"),
    ("--target_normalization", "minmax"),
    ("--num_workers", "-2"),
    ("--num_workers", "some"),
    ("--pairs_dir", ""),
    ("--pairs_dir", "  "),
    ("--base_features", "0"),
    ("--depth", "8"),
    ("--norm", "layer"),
    ("--dropout", "1"),
    ("--mse_weight", "-0.1"),
    ("--focal_weight", "inf"),
    ("--target_variance", "0"),
    ("--variance_form", "linear"),
    ("--epochs", "0"),
    ("--epochs", "ten"),
    ("--batch_size", "-4"),
    ("--learning_rate", "0"),
    ("--learning_rate", "2"),
    ("--learning_rate", "nan"),
    ("--weight_decay", "-1"),
    ("--lr_factor", "1"),
    ("--lr_patience", "-1"),
    ("--warmup_epochs", "30"),
    ("--grad_clip", "-1"),
    ("--accumulate_steps", "0"),
    ("--ema_decay", "1"),
    ("--seed", "-1"),
    ("--seed", str(2**63)),
    ("--seed", "1" + "0" * 400),
    ("--gpus", "-1"),
    ("--amp_dtype", "float64"),
    ("--sanity_check_freq", "-1"),
    ("--early_stopping_patience", "-1"),
    ("--output_dir", ""),
    ("--epochs", ""),
]


@pytest.mark.parametrize(("name", "value"), BAD_VALUES)
def test_a_value_out_of_range_ends_with_2_and_names_its_option(capsys, name, value):
    assert name in refusal(capsys, name, value)


@pytest.mark.parametrize(
    ("argv", "culprits"),
    [
        (["--learning_rat", "1e-3"], ["--learning_rat"]),
        (["--learn", "1e-3"], ["--learn"]),
        (["--val-split", "0.3"], ["--val-split"]),
        (["--no_epochs"], ["--no_epochs"]),
        (["--use_amp=1"], ["--use_amp"]),
        (["stray"], ["stray"]),
        (["--epochs"], ["--epochs"]),
        (["--overwrite", "--resume", "auto"], ["--overwrite", "--resume"]),
        (
            [f"--{name}_weight=0" for name in ("mse", "l1", "boundary", "focal", "variance", "correlation")],
            ["all loss weights are 0", "--mse_weight", "--variance_weight"],
        ),
        (["--warmup_epochs", "5", "--epochs", "5"], ["--warmup_epochs", "--epochs"]),
        (["--encoder", "resnet18"], ["--encoder resnet18: must be unet or timm:NAME"]),
        (["--encoder", "timm:"], ["--encoder timm:"]),
        (["--encoder_mean", "1,2"], ["--encoder_mean 1,2: must be three numbers"]),
        (["--encoder_std", "1,0,1"], ["--encoder_std 1,0,1: every number must be above 0"]),
        (["--patch_size", "64", "--grid_stride", "65"], ["--grid_stride 65", "--patch_size 64"]),
    ],
)
def test_unknown_or_contradictory_options_end_with_2_and_are_named(capsys, argv, culprits):
    message = refusal(capsys, *argv)
    for culprit in culprits:
        assert culprit in message


def test_all_options_out_of_range_are_named_in_one_message(capsys):
    bad = {
        "val_split": "1.5",
        "depth": "0",
        "mse_weight": "-1.5",
        "epochs": "0",
        "gpus": "-1",
        "sanity_check_freq": "-5",
    }
    message = refusal(capsys, *[f"--{name}={value}" for name, value in bad.items()])
    for name, value in bad.items():
        assert f"--{name} {value}: must be" in message
    assert "--help" in message


def test_only_the_first_rank_of_a_machine_speaks_of_bad_input(capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert run_command(lambda given: parse_train_config(given) and 0, ["--epochs", "0"]) == 2
    assert capsys.readouterr().err == ""


def write_config(path, stored, **document):
    path.write_text(json.dumps({"schema": 1, "options": stored, **document}, allow_nan=False))
    return str(path)


def test_a_runs_config_comes_back_and_options_beside_it_win(tmp_path):
    given = ["--epochs", "7", "--norm", "group", "--no_augment", "--channel_weights", "CD3=2"]
    given += ["--resume", "auto", "--output_dir", "runs/earlier"]
    stored = options(*given)
    file = write_config(tmp_path / "config.json", stored)
    again = options("--config", file)
    assert again == {**stored, "resume": None, "output_dir": "runs/orion_spatial"}
    assert options("--epochs", "9", "--config", file, "--augment") == {**again, "epochs": 9, "augment": True}
    assert options("--config", file, "--num_workers", "2", "--num_workers", "auto")["num_workers"] is None


def test_what_concerns_one_start_only_is_not_inherited(tmp_path):
    one_start = ("output_dir", "overwrite", "resume", "pixel_size_um")
    stored = {**FLAT, "epochs": 3}
    file = write_config(tmp_path / "config.json", {**stored, "overwrite": True, "output_dir": "runs/earlier"})
    assert load_options(file) == ({name: value for name, value in stored.items() if name not in one_start}, "none")
    assert options("--config", file) == stored


def test_a_config_may_hold_a_part_of_the_options_and_whole_numbers_for_fractions(tmp_path):
    file = write_config(tmp_path / "config.json", {"grad_clip": 5, "epochs": 3})
    # The part that is missing is what runs did before the option existed.
    assert options("--config", file) == {
        **FLAT,
        "grad_clip": 5,
        "epochs": 3,
        "statistics_batches": 0,
        "upsampling": "transposed",
        "stain_augmentation": 1.0,
        "recalibrate": False,
    }


@pytest.mark.parametrize(
    ("text", "culprits"),
    [
        ("", ["is not JSON"]),
        ("{", ["is not JSON"]),
        ("[" * 50_000, ["is not JSON"]),
        ("[]", ["is not the config.json of a run"]),
        ('{"epochs": 3}', ["is not the config.json of a run"]),
        ('{"options": [1]}', ["is not the config.json of a run"]),
        (
            json.dumps(
                {
                    "options": {
                        "epoch": 3,
                        "epochs": "3",
                        "patch_size": 64.0,
                        "use_amp": 1,
                        "val_split": True,
                        "norm": None,
                        "channel_names": ["a"],
                        "seed": 1,
                    }
                }
            ),
            [
                "epoch: no such",
                "epochs: '3'",
                "patch_size: 64.0",
                "use_amp: 1",
                "val_split: True",
                "norm: None",
                "['a']",
            ],
        ),
        (json.dumps({"options": {"epochs": 0, "val_split": 2.0}}), ["--epochs 0", "--val_split 2.0"]),
        ('{"options": {"learning_rate": NaN}}', ["--learning_rate nan"]),
        ('{"options": {"scheduler": "step"}}', ["--scheduler step"]),
    ],
)
def test_a_config_at_fault_ends_with_2_and_names_every_option(capsys, tmp_path, text, culprits):
    file = tmp_path / "config.json"
    file.write_text(text)
    message = refusal(capsys, "--config", str(file))
    for culprit in culprits:
        assert culprit in message
    assert "seed" not in message


@pytest.mark.parametrize("kind", ["missing", "folder", "no text"])
def test_a_config_that_cannot_be_read_is_told(capsys, tmp_path, kind):
    file = tmp_path / "config.json"
    if kind == "folder":
        file.mkdir()
    elif kind == "no text":
        file.write_bytes(b"\xff\xfe\x00")
    assert f"--config {file}" in refusal(capsys, "--config", str(file))


def test_changes_that_would_alter_a_resumed_run_are_told_and_others_are_not():
    earlier = options()
    now = parse_train_config(
        ["--recipe", "none", "--epochs", "50", "--learning_rate", "2e-4", "--output_dir", "x", "--depth", "3"]
    )
    assert now.changes_from(earlier) == [
        "--depth: 4 in the run, 3 now",
        "--learning_rate: 0.0001 in the run, 0.0002 now",
    ]
    assert parse_train_config(["--recipe", "none"]).changes_from(earlier) == []


def test_options_survive_strict_json():
    config = parse_train_config(["--channel_weights", "ε=2"])
    back = TrainConfig.from_options(json.loads(json.dumps(config.options(), allow_nan=False)), config.recipe)
    assert back == config
    assert all(math.isfinite(v) for v in config.options().values() if isinstance(v, float))
    with pytest.raises(InputError, match="--epochs -1"):
        TrainConfig.from_options({**config.options(), "epochs": -1})


# The contract, by hand: what the launcher has always trained with, and the two recipes before it.
PUBLISHED = {
    "epochs": 30, "batch_size": 12, "val_split": 0.2, "learning_rate": 1e-4, "scheduler": "plateau", "lr_factor": 0.5,
    "lr_patience": 5, "mse_weight": 0.8, "l1_weight": 0.3, "boundary_weight": 0.1, "focal_weight": 0.0,
    "variance_weight": 0.1, "correlation_weight": 0.0, "early_stopping_patience": 10, "use_amp": True,
    "use_boundary_guidance": True, "noise_removal": True, "stain_augmentation": 1.0, "statistics_batches": 0,
    "recalibrate": False,
}  # fmt: skip
STABLE = {
    **PUBLISHED, "learning_rate": None, "scheduler": "cosine", "warmup_epochs": 0.5, "ema_decay": 0.95,
    "correlation_weight": 0.1, "stain_augmentation": None, "statistics_batches": None, "recalibrate": True,
}  # fmt: skip
DEMO = {
    **STABLE, "pairs_dir": "demo_pairs", "output_dir": "runs/demo", "patch_size": 128, "patches_per_image": 16,
    "base_features": 12, "depth": 3, "epochs": 12, "batch_size": 8, "warmup_epochs": 1.0, "l1_weight": 0.0,
}  # fmt: skip
FORMER = {
    **PUBLISHED, "epochs": 20, "batch_size": 8, "val_split": 0.15, "learning_rate": 5e-4, "lr_factor": 0.7,
    "lr_patience": 3, "focal_weight": 0.1, "variance_weight": 0.5, "variance_form": "exponential",
    "output_start": "half",
}  # fmt: skip
FINE_TUNE = {**STABLE, "learning_rate": 1e-3}
RECIPE_VALUES = {
    "stable": STABLE,
    "fine_tune": FINE_TUNE,
    "published": PUBLISHED,
    "former": FORMER,
    "demo": DEMO,
    "none": {},
}


@pytest.mark.parametrize(("name", "values"), RECIPE_VALUES.items(), ids=RECIPE_VALUES)
def test_a_recipe_sets_its_options_and_leaves_the_others_at_their_defaults(name, values):
    assert options("--recipe", name) == {**FLAT, **values}
    assert parse_train_config(["--recipe", name]).recipe == name


def test_every_recipe_is_known_here_and_gives_a_reason_for_every_value():
    assert RECIPES.keys() == RECIPE_VALUES.keys()
    for recipe in RECIPES.values():
        assert recipe.about
        assert all(found.reason for found in recipe.reasons.values())
    assert find_recipe("stable") is RECIPES["stable"]


def test_the_stable_recipe_is_the_default():
    assert parse_train_config([]) == parse_train_config(["--recipe", "stable"])


def test_a_recipe_that_does_not_exist_ends_with_2_and_names_those_that_do(capsys):
    message = refusal(capsys, "--recipe", "best")
    assert "--recipe best" in message
    assert all(name in message for name in RECIPES)


def test_precedence_is_default_recipe_config_command_line(tmp_path):
    stored = options("--epochs", "7", "--ema_decay", "0.5", "--recipe", "former")
    file = write_config(tmp_path / "config.json", stored, recipe="former")
    # The run's config decides every option, whatever recipe is named beside it; the command line wins over both.
    for named in ([], ["--recipe", "stable"], ["--recipe", "published"]):
        config = parse_train_config([*named, "--config", file, "--seed", "9"])
        assert config.options() == {**stored, "seed": 9}
        assert config.recipe == "former"
    # What is not inherited comes from the recipe.
    assert parse_train_config(["--recipe", "demo", "--config", file]).output.output_dir == "runs/demo"


def test_options_unknown_to_an_older_run_have_their_defaults_not_the_recipes_values(tmp_path):
    stored = {name: value for name, value in FLAT.items() if name != "correlation_weight"}
    file = write_config(tmp_path / "config.json", stored)
    assert parse_train_config(["--recipe", "stable", "--config", file]).loss.correlation_weight == 0.0


def test_help_shows_the_values_of_the_recipe_as_defaults(capsys):
    for named, rate, batch in (([], "auto", "12"), (["--recipe=former"], "0.0005", "8")):
        with pytest.raises(SystemExit):
            parse_train_config([*named, "--help"])
        shown = " ".join(capsys.readouterr().out.split())
        assert f"auto = from the number of optimiser steps; default: {rate} " in shown
        assert f"training patches per GPU and step; default: {batch} " in shown


def test_options_that_do_not_exist_are_refused_by_name():
    with pytest.raises(InputError, match="no such option in this version: epoch, learning_rat"):
        TrainConfig.from_options({**FLAT, "epoch": 3, "learning_rat": 0.1})


def test_a_known_failure_is_one_message_and_ends_with_1(capsys):
    def fail(argv):
        raise RunError("the disk is full")

    assert run_command(fail, []) == 1
    assert capsys.readouterr().err == "error: the disk is full\n"


def test_a_failure_that_is_no_bad_input_shows_its_traceback_and_ends_with_1(capsys):
    def fail(argv):
        raise RuntimeError("broken")

    assert run_command(fail, []) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("other", [("--val_split", "0.3"), ("--split_file", "split.json")])
def test_a_fold_beside_another_choice_of_held_out_cores_is_refused(other):
    with pytest.raises(InputError, match=f"{other[0]} and --fold|--fold and {other[0]}"):
        options("--fold", "1/3", *other)


def test_a_fold_on_the_command_line_replaces_the_split_of_the_earlier_run_and_the_reverse(tmp_path):
    earlier = tmp_path / "config.json"
    earlier.write_text(json.dumps({"options": {"split_file": "split.json"}}))
    found = options("--config", str(earlier), "--fold", "1/3")
    assert (found["fold"], found["split_file"]) == ("1/3", None)
    earlier.write_text(json.dumps({"options": {"fold": "1/3"}}))
    assert options("--config", str(earlier))["fold"] == "1/3"
    found = options("--config", str(earlier), "--val_split", "0.3")
    assert (found["fold"], found["val_split"]) == (None, 0.3)
