"""A run of version 0.1 is evaluated and predicts as it did then, but for the tiles of its scored predictions."""

import json
import zipfile

import numpy as np
import pytest
from runs_of_version_0_1 import ARCHIVE, write_pairs_of_version_0_1

from orion_unet.__main__ import dispatch
from orion_unet.cli.arguments import run_command

# Version 0.1 scored predictions of its own windows, not those that predict writes: markers of this barely trained
# network differ by at most half as much.
TILER = {"psnr_db": 0.2, **dict.fromkeys(("pearson", "pearson_boxes", "spearman"), 0.04)}
TILER |= dict.fromkeys(("mae", "ssim", "auc", "average_precision"), 0.016)


@pytest.fixture
def expected(tmp_path, monkeypatch):
    """What version 0.1 itself found; the working folder holds its runs and pairs."""
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(tmp_path)
    write_pairs_of_version_0_1(tmp_path / "pairs")
    monkeypatch.chdir(tmp_path)
    return json.loads((tmp_path / "expected.json").read_text(encoding="utf-8"))


def test_it_predicts_what_it_predicted_then(expected):
    words = ["--checkpoint", "complete", "--input", "pairs/core_0_HE.npy", "--output_dir", "predicted"]
    assert run_command(dispatch, ["predict", *words, "--no_overview"]) == 0
    predicted = np.load("predicted/core_0.npy")[:, ::9, ::9]
    assert predicted / 65535 == pytest.approx(np.array(expected["predicted"]) / 65535, abs=1e-5)


def test_its_baselines_have_the_scores_that_they_had_then_and_the_model_nearly_those(expected, capsys):
    words = ["--checkpoint", "complete", "--pairs_dir", "pairs", "--split", "all"]
    assert run_command(dispatch, ["evaluate", *words]) == 0
    with open("complete/evaluation/scores.json", encoding="utf-8") as file:
        found = json.load(file)
    then = expected["scores"]
    assert [row["split"] for row in found["cores"]] == [row["split"] for row in then["cores"]]
    for now, before in [(found["overall"], then["overall"])] + [
        (found["markers"][name], then["markers"][name]) for name in ("Hoechst", "C1", "C2")
    ]:
        assert now["baselines"].keys() == before["baselines"].keys() == {"mean", "regression"}
        for baseline, scores in before["baselines"].items():
            # Not closer, because the regression is in float32, which processors round differently.
            assert now["baselines"][baseline] == pytest.approx(scores, abs=1e-5)
        positive = before["model"]["fraction_positive"]["value"]
        assert now["model"]["fraction_positive"]["value"] == pytest.approx(positive, abs=1e-6)
        for metric, most in TILER.items():
            value = before["model"][metric]["value"]
            assert now["model"][metric]["value"] == pytest.approx(value, abs=most), metric
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("warning: the checkpoint is of version 0.1") == 1
    assert "recognised by name alone" in said
    assert "in this folder, because the checkpoint is of version 0.1" in said
