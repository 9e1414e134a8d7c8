"""Commands in a Python that lacks torch or the package of an extra: one sentence, and exit code 2."""

import json
import re
import shutil
import sys
import tomllib

import pytest
from monitor_runs import write_run
from tiny_runs import ROOT

from orion_unet.cli.arguments import PACKAGES

ABSENT = """
raise ModuleNotFoundError("No module named {name!r}", name={name!r})
"""
IMPORT = """
from orion_unet.cli.arguments import run_command
raise SystemExit(run_command(lambda argv: __import__(argv[0])))
"""
COMMANDS = {
    "trainer": ["train_spatial_orion_unet.py", "--pairs_dir", "pairs", "--output_dir", "run"],
    "launcher of ranks": ["-m", "orion_unet.cli.launch", "--nproc_per_node", "2", "train_spatial_orion_unet.py"],
    "train": ["-m", "orion_unet", "train", "--gpus", "2", "--pairs_dir", "pairs", "--output_dir", "run"],
    "predict": ["-m", "orion_unet", "predict", "--checkpoint", "run", "--input", "pairs", "--output_dir", "out"],
    "evaluate": ["-m", "orion_unet", "evaluate", "--checkpoint", "run", "--pairs_dir", "pairs"],
    "check-data": ["-m", "orion_unet", "check-data", "pairs"],
}
# As a package is imported, and as it is called where it is installed from.
DISTRIBUTIONS = {"PIL": "pillow", "skimage": "scikit-image", "sklearn": "scikit-learn"}


@pytest.fixture
def copied(tmp_path):
    """The toolkit in a folder of its own, beside which a .venv may be put."""
    folder = tmp_path / "copy"
    shutil.copytree(ROOT / "orion_unet", folder / "orion_unet", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train_spatial_orion_unet.py", "monitor_training.py", "train_stable_learning.sh"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture
def without(call, copied, tmp_path):
    """Run the copied toolkit in a Python that lacks a package."""

    def run(package, *words, cwd=copied):
        absent = tmp_path / "absent" / package
        absent.mkdir(parents=True, exist_ok=True)
        (absent / "__init__.py").write_text(ABSENT.format(name=package))
        return call(sys.executable, *words, cwd=cwd, PYTHONPATH=f"{absent.parent}:{copied}")

    return run


def beside(folder, package):
    """A .venv with a package."""
    (folder / ".venv" / "lib" / "python3.11" / "site-packages" / package).mkdir(parents=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_without_torch_names_the_environment_to_activate(command, without, copied):
    beside(copied, "torch")
    ended = without("torch", *COMMANDS[command])
    assert (ended.code, ended.out) == (2, "")
    assert ended.err == (
        f"error: {sys.executable} has no torch; activate the environment that has it: . .venv/bin/activate\n"
    )


def test_without_an_environment_to_activate_the_command_that_makes_one_is_named(without, copied, tmp_path):
    ended = without("torch", *COMMANDS["predict"])
    assert ended.code == 2
    assert ended.err == (
        f"error: {sys.executable} has no torch; ./train_stable_learning.sh --help makes an environment, "
        ". .venv/bin/activate activates it\n"
    )
    # An environment without torch is none to activate; from another folder, the paths are whole.
    beside(copied, "numpy")
    ended = without("torch", *COMMANDS["predict"], cwd=tmp_path)
    assert f"{copied}/train_stable_learning.sh --help makes an environment" in ended.err
    assert f". {copied}/.venv/bin/activate" in ended.err


def test_a_package_of_an_extra_is_named_with_it(without):
    ended = without("scipy", "-c", IMPORT, "scipy.ndimage")
    assert ended.code == 2
    assert ended.err == (
        f'error: {sys.executable} has no scipy (extra "inference"); '
        f'install it: {sys.executable} -m pip install "orion-unet[inference]"\n'
    )


def test_another_missing_module_is_a_fault_with_its_traceback(without):
    ended = without("scipy", "-c", IMPORT, "orion_unet.absent")
    assert ended.code == 1
    assert "Traceback" in ended.err


def test_the_monitor_needs_no_torch(without, copied):
    write_run(copied / "run", [0.3, 0.2], [0.3, 0.25])
    ended = without("torch", "monitor_training.py", "--output_dir", "run", "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)


def test_the_packages_are_those_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {"": project["dependencies"], **project["optional-dependencies"]}
    for extra in ("", "inference", "tensorboard", "bench", "cells"):
        names = {re.match(r"[\w-]+", requirement)[0] for requirement in declared[extra]}
        assert {DISTRIBUTIONS.get(name, name) for name, of in PACKAGES.items() if of == extra} == names
