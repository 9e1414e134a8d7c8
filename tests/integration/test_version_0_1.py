"""Runs of version 0.1 resume as if nothing had changed."""

import json
import zipfile

import pytest
from runs_of_version_0_1 import ARCHIVE, COMPLETE, INTERRUPTED, losses, write_pairs_of_version_0_1

from orion_unet.cli.arguments import parse_train_config
from orion_unet.config import TrainConfig
from orion_unet.training.loop import train as train_run


@pytest.fixture
def earlier(tmp_path, monkeypatch):
    """The folder with the runs and their pairs, and what version 0.1 came to."""
    write_pairs_of_version_0_1(tmp_path / "pairs")
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path, json.loads((tmp_path / "expected.json").read_text())


@pytest.mark.parametrize(("name", "options"), [("complete", {**COMPLETE, "epochs": 3}), ("interrupted", INTERRUPTED)])
def test_a_run_of_version_0_1_continues_to_the_same_losses(name, options, earlier):
    folder, expected = earlier
    config = TrainConfig.from_options({**options, "output_dir": name, "resume": "auto"})
    assert train_run(config) == 0
    found = losses(folder / name)
    assert found.keys() == expected[name].keys()
    for epoch, (trained, validated, rate) in expected[name].items():
        # The numbers were recorded on one processor, where training losses are the same bit for bit. Another one rounds
        # convolutions differently, which the validation, whose sums now have another order, shows most.
        assert found[epoch][2] == rate
        assert found[epoch][0] == pytest.approx(trained, rel=1e-6)
        assert found[epoch][1] == pytest.approx(validated, rel=1e-5)


def test_the_options_of_a_run_of_version_0_1_come_back_whatever_the_recipe(earlier):
    folder, _ = earlier
    stored = json.loads((folder / "complete" / "config.json").read_text())["options"]
    for named in ([], ["--recipe", "published"]):
        config = parse_train_config([*named, "--config", "complete/config.json", "--output_dir", "complete"])
        assert {name: config.options()[name] for name in stored} == stored
        # Options that version 0.1 did not know.
        assert config.runtime.stop_timeout_s == 120
        assert config.recipe == "none"
