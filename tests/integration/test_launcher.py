"""train_stable_learning.sh and scripts/environment.sh, end to end and with an interpreter that only takes notes."""

import json
import os
import re
import shutil
import signal
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from tiny_runs import ROOT, TINY, command_line, command_of, free_port, read_metrics, read_status, wait_for

from orion_unet.cli.arguments import parse_train_config
from orion_unet.cli.launch import stop_timeout
from orion_unet.config import GROUPS, OutputOptions, RuntimeOptions, TrainConfig
from orion_unet.demo.make import make_demo

pytestmark = pytest.mark.slow

LAUNCHER = ROOT / "train_stable_learning.sh"
RECIPE = {
    "epochs": 30,
    "learning_rate": None,
    "batch_size": 12,
    "val_split": 0.2,
    "mse_weight": 0.8,
    "l1_weight": 0.3,
    "boundary_weight": 0.1,
    "focal_weight": 0.0,
    "variance_weight": 0.1,
    "correlation_weight": 0.1,
    "scheduler": "cosine",
    "warmup_epochs": 0.5,
    "ema_decay": 0.95,
    "early_stopping_patience": 10,
    "use_amp": True,
    "use_boundary_guidance": True,
    "noise_removal": True,
    "output_dir": "runs_sep6v1/orion_stable_learning",
}
SMALL = {name: value for name, value in TINY.items() if name not in ("learning_rate", "batch_size", "epochs")}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Four generated cores of 64 pixels."""
    folder = tmp_path_factory.mktemp("data") / "demo"
    make_demo(folder, 4, 64, 0)
    return folder


@pytest.fixture
def launch(call):
    """The launcher in the environment of these tests."""
    return lambda *words, **env: call(LAUNCHER, *words, **{"PYTHON": sys.executable, **env})


def test_the_recipe_trains_end_to_end_and_the_last_option_wins(launch, demo, tmp_path):
    given = {**SMALL, "patches_per_image": 6, "epochs": 2, "weight_decay": 0.01}
    words = ["--epochs", 9, "--output_dir", "elsewhere", *command_line({**given, "pairs_dir": demo})]
    ended = launch(*words, "--output_dir", tmp_path / "run")
    assert ended.code == 0, ended.err
    options = json.loads((tmp_path / "run" / "config.json").read_text())["options"]
    # In so few steps, the learning rate that is chosen is the highest.
    expected = {**RECIPE, "learning_rate": 1e-2, **given, "pairs_dir": str(demo), "output_dir": str(tmp_path / "run")}
    assert {name: options[name] for name in expected} == expected
    assert [record["epoch"] for record in read_metrics(tmp_path / "run")] == [1, 2]
    assert read_status(tmp_path / "run")["state"] == "finished"
    assert not (tmp_path / "elsewhere").exists()
    # What goes into a file or a pipe: no bar, one line an epoch, the same in the log.
    assert "\r" not in ended.out + ended.err
    assert [line.split()[1] for line in ended.out.splitlines() if line.startswith("epoch ")] == ["1/2", "2/2"]
    assert ended.err == ""
    log = (tmp_path / "run" / "train.log").read_text().splitlines()
    assert [line.partition(" ")[2] for line in log] == ended.out.splitlines()
    for word in ("devices", "global batch 12", "patches", "parameters", "run folder", "monitor_training.py"):
        assert word in ended.out


def test_two_machines_train_together_from_another_folder_with_relative_paths(start, demo, tmp_path):
    (tmp_path / "cores").symlink_to(demo)
    options = {**SMALL, "epochs": 1, "batch_size": 3, "pairs_dir": "cores", "output_dir": "here/run"}
    shared = {"PYTHON": sys.executable, "NNODES": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    begun = [start(LAUNCHER, *command_line(options), cwd=tmp_path, NODE_RANK=rank, **shared) for rank in (0, 1)]
    first, second = (command.end() for command in begun)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    config = json.loads((tmp_path / "here" / "run" / "config.json").read_text())
    assert (config["world_size"], config["global_batch"]) == (2, 6)
    assert len(read_metrics(tmp_path / "here" / "run")) == 1
    # Rank 0 alone speaks.
    assert first.out.count("epoch 1/1") == 1
    assert "\r" not in first.out + first.err
    assert second.out == ""


@pytest.mark.parametrize(
    ("words", "culprit"),
    [
        (["--no_such_option", "3"], "--no_such_option"),
        (["--epochs", "many"], "--epochs"),
        (["--pairs_dir", "absent"], "absent"),
        (["--mse_weight", "-1", "--depth", "0"], "--depth"),
    ],
)
def test_bad_input_is_one_message_and_2(words, culprit, launch):
    ended = launch(*words)
    assert ended.code == 2
    assert culprit in ended.err
    assert ended.err.count("error:") == 1
    assert "Traceback" not in ended.err
    assert ended.out == ""


NOTING = """#!/usr/bin/env bash
# Replaces Python: has every requirement, counts GPUS, and records what it is asked to run.
case $1 in
  scripts/check_requirements.py) exit 0 ;;
  -c) echo "${GPUS:-0}"; exit 0 ;;
esac
for word in "$@"; do printf '%s\\n' "$word"; done >>"$NOTES"
echo --- >>"$NOTES"
"""


@pytest.fixture
def noted(call, tmp_path):
    """What the launcher asks its interpreter to run: one list of words a command."""
    python = tmp_path / "noting" / "python"
    python.parent.mkdir()
    python.write_text(NOTING)
    python.chmod(0o755)
    smi = python.with_name("nvidia-smi")
    smi.write_text("#!/bin/sh\n")
    smi.chmod(0o755)
    notes = tmp_path / "notes"

    def run(*words, **env):
        notes.unlink(missing_ok=True)
        path = os.pathsep.join([str(python.parent), os.environ["PATH"]])
        ended = call(LAUNCHER, *words, **{"PYTHON": python, "NOTES": notes, "PATH": path, **env})
        assert ended.code == 0, ended.err
        return [command.splitlines() for command in notes.read_text().split("---\n")[:-1]]

    return run


def resolved(words):
    """The options that the trainer would get from such a command."""
    at = words.index(str(ROOT / "train_spatial_orion_unet.py"))
    return parse_train_config(words[at + 1 :])


def test_the_recipe_is_the_stable_one_and_all_else_is_default(noted):
    (command,) = noted()
    assert command[0] == str(ROOT / "train_spatial_orion_unet.py")
    assert resolved(command) == TrainConfig.from_options(RECIPE, "stable")


def test_options_behind_the_recipe_win(noted):
    (command,) = noted("--epochs", "5", "--no_use_amp", "--boundary_weight=0.4", "--channel_names", "A B,C")
    changed = {"epochs": 5, "use_amp": False, "boundary_weight": 0.4, "channel_names": "A B,C"}
    assert resolved(command) == TrainConfig.from_options({**RECIPE, **changed}, "stable")


@pytest.mark.parametrize(
    ("words", "env", "ranks"),
    [
        ([], {"GPUS": 4}, "4"),
        (["--gpus", "2"], {"GPUS": 4}, "2"),
        (["--gpus=3"], {"GPUS": 4}, "3"),
        (["--gpus", "auto"], {"GPUS": 2}, "2"),
        (["--gpus", "3", "--gpus", "2"], {}, "2"),
        ([], {"NPROC_PER_NODE": 3}, "3"),
        (["--gpus", "2"], {"NPROC_PER_NODE": 2, "GPUS": 8}, "2"),
    ],
)
def test_a_rank_is_started_for_every_gpu(words, env, ranks, noted):
    (command,) = noted(*words, **env)
    launcher = ["-m", "orion_unet.cli.launch", "--standalone", "--nproc_per_node", ranks]
    assert command[:6] == [*launcher, str(ROOT / "train_spatial_orion_unet.py")]


@pytest.mark.parametrize(("words", "env"), [([], {}), (["--gpus", "0"], {"GPUS": 4}), ([], {"GPUS": 1})])
def test_a_single_rank_needs_no_launcher(words, env, noted):
    (command,) = noted(*words, **env)
    assert command[0] == str(ROOT / "train_spatial_orion_unet.py")


def test_several_machines_are_told_to_the_launcher(noted):
    env = {"NNODES": 3, "NODE_RANK": 1, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": 4711, "NPROC_PER_NODE": 4}
    (command,) = noted(**env)
    before = command[: command.index(str(ROOT / "train_spatial_orion_unet.py"))]
    assert before == [
        "-m", "orion_unet.cli.launch", "--nnodes", "3", "--node_rank", "1",
        "--master_addr", "10.0.0.1", "--master_port", "4711", "--nproc_per_node", "4",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("env", "missing"), [({"NODE_RANK": 0}, "MASTER_ADDR"), ({"MASTER_ADDR": "10.0.0.1"}, "NODE_RANK")]
)
def test_a_machine_that_does_not_know_its_place_is_told_what_to_set(env, missing, launch):
    ended = launch(NNODES=2, **env)
    assert ended.code != 0
    assert missing in ended.err
    assert "set it to" in ended.err


SLOW_TO_STOP = """
import signal, sys, time

def save(number, frame):
    time.sleep(4)
    open("saved", "w").close()
    sys.exit(143)

signal.signal(signal.SIGTERM, save)
open("ready", "w").close()
time.sleep(60)
"""


@pytest.mark.parametrize(("seconds", "saved"), [(1, False), (60, True)])
def test_the_launcher_waits_for_its_ranks_as_long_as_asked(seconds, saved, start, tmp_path):
    (tmp_path / "rank.py").write_text(SLOW_TO_STOP)
    words = ["-m", "orion_unet.cli.launch", "--standalone", "--nproc_per_node", "1", "rank.py"]
    command = start(sys.executable, *words, "--stop_timeout_s", seconds)
    wait_for(lambda: (tmp_path / "ready").exists(), "the rank")
    command.signal(signal.SIGTERM)
    assert command.end().code == 143
    assert (tmp_path / "saved").exists() == saved


def test_the_time_to_wait_is_found_among_the_words_of_the_trainer():
    assert stop_timeout(["--epochs", "3", "--stop_timeout_s", "7"]) == 7
    assert stop_timeout(["train", "--stop_timeout_s=8.5"]) == 8.5
    assert stop_timeout(["--epochs", "3"]) == RuntimeOptions.stop_timeout_s
    assert stop_timeout(["--not", "our options"]) == RuntimeOptions.stop_timeout_s


def test_the_demo_makes_its_data_and_trains_a_small_model_on_them(noted):
    make, train = noted("--demo", "--epochs", "3")
    assert make == ["-m", "orion_unet", "make-demo", "demo_pairs"]
    config = resolved(train)
    assert (config.data.pairs_dir, config.output.output_dir) == ("demo_pairs", "runs/demo")
    assert config.optimisation.epochs == 3
    assert config.output.overwrite
    assert config.model.base_features < 32


@pytest.mark.parametrize("words", [["--output_dir", "mine"], ["--output_dir=mine"], ["--resume", "auto"]])
def test_the_demo_never_replaces_a_folder_that_was_named(words, noted):
    _, train = noted("--demo", *words)
    assert not resolved(train).output.overwrite


def test_the_launcher_names_a_recipe_and_holds_no_value_of_an_option():
    text = LAUNCHER.read_text().partition("set -euo")[2]
    declared = {f.name for group in GROUPS.values() for f in fields(group)}
    assert not re.search(rf"--({'|'.join(declared)})[ =]+[\d.]", text)
    assert "--recipe stable" in text
    assert "--recipe demo" in text


def test_the_config_of_an_earlier_run_wins_over_the_recipe_and_gives_way_to_the_command_line(noted, tmp_path):
    stored = TrainConfig.from_options({"epochs": 7, "scheduler": "constant", "ema_decay": 0.5, "mse_weight": 2.0})
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"options": stored.options()}))
    (command,) = noted("--config", file, "--mse_weight", "3")
    expected = {**stored.options(), "mse_weight": 3.0, "output_dir": RECIPE["output_dir"]}
    assert resolved(command).options() == expected


def test_nothing_but_the_demo_overwrites(noted):
    assert next(f.default for f in fields(OutputOptions) if f.name == "overwrite") is False
    (command,) = noted("--pairs_dir", "cores")
    assert not resolved(command).output.overwrite


# From here on the environment itself, in a copy of the scripts so that no .venv is ever made in the repository.


@pytest.fixture
def copied(tmp_path):
    """The files that find or make an environment, in a folder of their own."""
    folder = tmp_path / "copy"
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    for name in ("pyproject.toml", "constraints.txt", LAUNCHER.name):
        shutil.copy(ROOT / name, folder / name)
    return folder


SOURCE = '. scripts/environment.sh "$1" && echo "$PYTHON"'


def test_the_active_environment_is_used_where_it_suffices(call, copied):
    for extra in ("", "", "inference"):
        ended = call("bash", "-c", SOURCE, "bash", extra, cwd=copied, PYTHON=sys.executable)
        assert (ended.code, ended.out.strip(), ended.err) == (0, sys.executable, "")
    assert not (copied / ".venv").exists()


def test_the_launcher_looks_at_its_own_options_and_not_at_those_of_the_environment(call, copied):
    # A sourced file sees the words of the one that sources it, unless it is given its own.
    ended = call(copied / LAUNCHER.name, "--epochs", "x", cwd=copied, PYTHON=sys.executable)
    assert "making the Python environment" not in ended.err
    assert not (copied / ".venv").exists()


# A Python without any package, and the one in the .venv it makes. What pip is asked for is noted, and from then on
# installed as far as check_requirements.py can see; that script itself is run for real.
WITHOUT_PACKAGES = """#!/usr/bin/env bash
case "$*" in
  scripts/check_requirements.py*) PYTHONPATH=$(dirname "$0")/../site exec "$REAL" -S "$@" ;;
  "-c import sys, venv"*) exit "${TOO_OLD:-0}" ;;
  "-m venv "*)
    if [ -n "${VENV_FAILS:-}" ]; then exit 1; fi
    mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  "-m pip"*)
    echo "pip $PIP_CONSTRAINT $*" >>"$NOTES"
    if [ -n "${PIP_FAILS:-}" ]; then exit 1; fi
    while [ -n "${GATE:-}" ] && [ ! -e "$GATE" ]; do sleep 0.05; done
    exec "$REAL" "$PIP" .venv/site "${@: -1}" ;;
esac
"""
PIP = r"""
import pathlib, re, sys, tomllib
site, wanted = pathlib.Path(sys.argv[1]), re.fullmatch(r"\.\[(.*)\]", sys.argv[2])[1]
project = tomllib.loads(pathlib.Path("pyproject.toml").read_text())["project"]
pins = dict(re.findall(r"^([^#\s]+)==(\S+)$", pathlib.Path("constraints.txt").read_text(), re.MULTILINE))
wanted = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in wanted.split(","))]
for requirement in sum(wanted, []):
    name = requirement.partition(">=")[0]
    version = {re.sub("[-_]", "-", key): pin for key, pin in pins.items()}[name]
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
"""
NAMES = ("python3", "python", "python3.11", "python3.12", "python3.13", "python3.14")
OF_THE_TESTS = "test,inference,tensorboard"


@pytest.fixture
def python_without_packages(tmp_path):
    """Environment variables with which every Python on PATH is WITHOUT_PACKAGES; NOTES is the file pip writes to."""
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in NAMES:
        (folder / name).write_text(WITHOUT_PACKAGES)
        (folder / name).chmod(0o755)
    (tmp_path / "pip.py").write_text(PIP)
    (tmp_path / "notes").touch()
    path = os.pathsep.join([str(folder), os.environ["PATH"]])
    files = {"NOTES": tmp_path / "notes", "PIP": tmp_path / "pip.py"}
    return {**files, "REAL": sys.executable, "PATH": path, "PYTHON": ""}


@pytest.fixture
def bare(call, python_without_packages, copied):
    """Source environment.sh where no Python has the requirements; also returns what pip was asked for so far."""

    def source(extras="", **env):
        ended = call("bash", "-c", SOURCE, "bash", extras, **{"cwd": copied, **python_without_packages, **env})
        return ended, python_without_packages["NOTES"].read_text().splitlines()

    return source


def edit(path, *replacements):
    """Replace texts of a file, each of which must be there."""
    text = path.read_text()
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)


def assert_quiet(found, folder):
    """The environment was ready: pip was not asked again, and nothing was said."""
    ended, asked = found
    assert (ended.code, ended.err, len(asked)) == (0, "", 1)
    assert ended.out.strip() == str(folder / ".venv" / "bin" / "python")


def test_an_environment_is_made_once_from_the_pinned_versions(bare, copied):
    ended, asked = bare("test")
    assert ended.code == 0, ended.err
    assert ended.out.strip() == str(copied / ".venv" / "bin" / "python")
    assert "making the Python environment .venv" in ended.err
    assert len(asked) == 1
    assert asked[0].startswith(f"pip {copied / 'constraints.txt'} ")
    assert asked[0].endswith("--editable .[inference,test]")
    assert_quiet(bare("test"), copied)


def test_the_environment_of_the_tests_serves_the_launcher_without_pip(bare, copied):
    bare(OF_THE_TESTS)
    assert_quiet(bare(""), copied)
    assert_quiet(bare(OF_THE_TESTS), copied)


def test_the_environment_of_the_launcher_is_given_what_the_tests_lack(bare, copied):
    bare("")
    ended, asked = bare(OF_THE_TESTS)
    assert ended.code == 0
    said = ended.err.splitlines()
    assert said[0].startswith("updating the Python environment .venv (missing: pytest>=")
    assert "torch" not in said[0] and "scipy" not in said[0]
    assert len(asked) == 2
    ended, asked = bare("")
    assert (ended.err, len(asked)) == ("", 2)


def test_edits_that_change_no_requirement_run_no_pip(bare, copied):
    bare("")
    edit(
        copied / "pyproject.toml",
        ("line-length = 120", "line-length = 100"),
        ('description = "', 'description = "New: '),
        ('addopts = "', 'addopts = "-v '),
    )
    with open(copied / "constraints.txt", "a") as file:
        file.write("\n# a remark\n")
    assert_quiet(bare(""), copied)


@pytest.mark.parametrize(
    ("name", "old", "new", "reason"),
    [
        ("pyproject.toml", '"torch>=2.6"', '"torch>=2.7"', "the requirements have changed"),
        ("pyproject.toml", 'bench = ["monai>=1.4"', 'bench = ["monai>=1.5"', "the requirements have changed"),
        ("pyproject.toml", '">=3.11"', '">=3.11.1"', "the requirements have changed"),
        ("constraints.txt", "\ntqdm==", "\ntqdm==9", "the requirements have changed"),
        ("pyproject.toml", '"tqdm>=4.66"', '"zarr>=99"', "missing: zarr>=99"),
    ],
)
def test_a_changed_requirement_runs_pip_again(name, old, new, reason, bare, copied):
    bare("")
    edit(copied / name, (old, new))
    ended, asked = bare("")
    assert len(asked) == 2
    assert f"updating the Python environment .venv ({reason})" in ended.err


def test_a_change_that_cannot_be_installed_leaves_a_sufficient_environment_in_use(bare, copied):
    bare("")
    edit(copied / "constraints.txt", ("\ntqdm==", "\ntqdm==9"))
    ended, asked = bare("", PIP_FAILS=1)
    assert (ended.code, len(asked)) == (0, 2)
    assert ended.out.strip() == str(copied / ".venv" / "bin" / "python")
    assert "warning: .venv could not be updated" in ended.err
    ended, asked = bare("")
    assert (ended.code, len(asked)) == (0, 3)


def test_an_environment_that_could_not_be_made_is_tried_again(bare):
    ended, _ = bare(PIP_FAILS=1)
    assert ended.code == 1
    assert "error: the environment could not be made" in ended.err
    ended, asked = bare()
    assert (ended.code, len(asked)) == (0, 2)
    assert "making the Python environment" in ended.err


def test_a_making_that_was_cut_short_is_begun_anew(bare, copied):
    ended, asked = bare(VENV_FAILS=1)
    assert (ended.code, asked) == (1, [])
    assert (copied / ".venv").exists() and not (copied / ".venv" / "bin" / "python").exists()
    (copied / ".venv" / "half").touch()
    ended, asked = bare()
    assert (ended.code, len(asked)) == (0, 1)
    assert not (copied / ".venv" / "half").exists()


@pytest.mark.parametrize("broken", ["of others", "of the launcher", "a dangling link"])
def test_a_broken_environment_is_reported_and_never_deleted(broken, bare, copied):
    python = copied / ".venv" / "bin" / "python"
    if broken == "a dangling link":
        (copied / ".venv").symlink_to(copied / "gone")
    else:
        if broken == "of the launcher":
            bare("")
            python.unlink()
        python.parent.mkdir(parents=True, exist_ok=True)
        python.symlink_to("/no/such/python3.11")
        (copied / ".venv" / "kept").touch()
    ended, asked = bare("")
    assert (ended.code, ended.out) == (2, "")
    assert len(asked) == (1 if broken == "of the launcher" else 0)
    (line,) = ended.err.splitlines()
    assert line.startswith("error: .venv has no working Python 3.11 or newer")
    assert "rm -r .venv" in line
    assert (copied / ".venv").is_symlink() or (copied / ".venv" / "kept").exists()


def test_an_environment_made_by_hand_is_used_as_it_is(bare, copied):
    bare("")
    (copied / ".venv" / "orion.stamp").unlink()
    edit(copied / "constraints.txt", ("\ntqdm==", "\ntqdm==9"))
    assert_quiet(bare(""), copied)
    assert not (copied / ".venv" / "orion.stamp").exists()


@pytest.mark.skipif(shutil.which("flock") is None, reason="flock is not installed")
def test_launchers_that_start_together_fill_one_environment_once(start, python_without_packages, copied, tmp_path):
    env = {**python_without_packages, "GATE": tmp_path / "gate"}
    begun = [start("bash", "-c", SOURCE, "bash", "", cwd=copied, **env) for _ in range(2)]

    def one_fills_and_one_waits():
        asked = env["NOTES"].read_text()
        return asked and "flock 9 " in [command_of(pid) for command in begun for pid in command.others()]

    wait_for(one_fills_and_one_waits, "a launcher at pip and one at the lock")
    (tmp_path / "gate").touch()
    first, second = (command.end() for command in begun)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert sorted((first.err, second.err))[0] == ""
    assert len(env["NOTES"].read_text().splitlines()) == 1


def test_a_machine_without_a_fit_python_is_told_so(bare, copied):
    ended, asked = bare(TOO_OLD=1)
    assert ended.code == 2
    assert "Python 3.11 or newer" in ended.err
    assert asked == []
    assert not (copied / ".venv").exists()


def test_requirements_are_compared_by_number(copied, call):
    script = copied / "scripts" / "check_requirements.py"
    assert call(sys.executable, script, "inference", cwd=copied).code == 0
    project = copied / "pyproject.toml"
    text = project.read_text()
    project.write_text(text.replace("numpy>=1.26", "numpy>=999.1").replace("tqdm>=4.66", "no-such-package>=1"))
    assert project.read_text() != text
    ended = call(sys.executable, script, cwd=copied)
    assert ended.code == 1
    assert ended.err.strip() == "missing: numpy>=999.1, no-such-package>=1"
    assert Path(script).exists()
