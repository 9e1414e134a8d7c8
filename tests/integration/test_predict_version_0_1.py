"""A model of version 0.1 predicts what it predicted then, from the files it was given then and from others."""

import json
import zipfile

import numpy as np
import pytest
from predictions import predictor
from runs_of_version_0_1 import ARCHIVE, write_pairs_of_version_0_1


@pytest.mark.parametrize("kind", ["npy", "png", "tif", "ndpi"])
def test_a_run_of_version_0_1_predicts_the_same(kind, tmp_path, capsys):
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(tmp_path)
    write_pairs_of_version_0_1(tmp_path / "pairs")
    source = tmp_path / "pairs" / "core_0_HE.npy"
    options = {"overview": False}
    if kind == "png":
        pillow = pytest.importorskip("PIL.Image")
        pillow.fromarray(np.load(source)).save(tmp_path / "core_0.png")
    elif kind != "npy":
        tifffile = pytest.importorskip("tifffile")
        pytest.importorskip("openslide" if kind == "ndpi" else "imagecodecs", exc_type=ImportError)
        tiles = {"tile": (64, 64), "compression": "deflate", "photometric": "rgb", "metadata": None}
        tifffile.imwrite(tmp_path / f"core_0.{kind}", np.load(source), **tiles)
        options["tissue_only"] = False
    given = source if kind == "npy" else tmp_path / f"core_0.{kind}"
    done = predictor(tmp_path / "complete", tmp_path, capsys)(given, **options)
    assert done.code == 0, done.err
    expected = np.array(json.loads((tmp_path / "expected.json").read_text())["predicted"])
    found = np.load(done.dir / "core_0.npy")
    assert found.shape == (3, 144, 136)
    # In the unit of the training data, of which 65535 is white.
    np.testing.assert_allclose(found[:, ::9, ::9] / 65535, expected / 65535, rtol=0, atol=1e-6)
