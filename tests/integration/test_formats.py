"""Pairs as OME-TIFF and OME-Zarr: every command reads them as it reads .npy, and a run is the same to the last bit."""

import json

import numpy as np
import pytest
from pair_formats import rewrite, spoil_tile
from tiny_runs import differing, losses, read_metrics, trainer, wait_for, weights

from orion_unet.cli import check_data, evaluate, pack
from orion_unet.errors import InputError

pytestmark = pytest.mark.slow

OPTIONS = {"epochs": 2, "exclude_channels": "1", "mixed_cores": 2}


@pytest.fixture
def formats(pairs, tmp_path):
    """The same pairs as OME-TIFF, as sharded OME-Zarr with one core left as .npy, and as OME-Zarr version 2."""
    return {
        "ome-tiff": rewrite(pairs, tmp_path / "tiff", "zstd"),
        "ome-zarr": rewrite(pairs, tmp_path / "zarr", "v3 shards", keep_npy=("core_02",)),
        "ome-zarr 2": rewrite(pairs, tmp_path / "zarr2", "v2 blosc"),
    }


def assert_same_run(found, expected):
    assert losses(found) == losses(expected)
    assert differing(weights(found), weights(expected)) == []


def test_the_same_run_from_every_format_is_the_same_to_the_last_bit(train, formats):
    npy = train("npy", **OPTIONS)
    assert npy.code == 0
    for form, folder in formats.items():
        # A loader process, and a cache that keeps two tiles, change nothing.
        more = {"num_workers": 1, "cache_mb": 0.01} if form == "ome-zarr" else {}
        run = train(form, pairs_dir=str(folder), **OPTIONS, **more)
        assert run.code == 0
        assert_same_run(run.dir, npy.dir)


@pytest.mark.parametrize("form", ["ome-tiff", "ome-zarr"])
def test_a_run_from_tiles_that_is_killed_goes_on_as_if_nothing_had_happened(form, train, formats, start, tmp_path):
    options = {"pairs_dir": str(formats[form]), "epochs": 3}
    straight = train("straight", **options)
    killed = tmp_path / "killed"
    command = start(*trainer(output_dir=killed, **options))
    wait_for(lambda: read_metrics(killed), "the first epoch")
    command.kill()
    assert train("killed", resume="auto", **options).code == 0
    assert_same_run(killed, straight.dir)


def test_a_damaged_tile_is_named_with_level_row_and_column(train, pairs, tmp_path):
    folder = rewrite(pairs, tmp_path / "damaged", "zstd")
    spoil_tile(folder / "core_01_ORION.ome.tif", page=2, index=4)
    with pytest.raises(
        InputError, match=r"core_01_ORION\.ome\.tif: is damaged or truncated at level 0, row 32, column 32"
    ):
        train(pairs_dir=str(folder))


def test_every_command_that_takes_pairs_takes_them(train, pairs, formats, tmp_path, capsys):
    train("run", epochs=1)
    tiff = formats["ome-tiff"]
    looked, scores = [], []
    for folder in (pairs, tiff):
        capsys.readouterr()
        assert check_data.main([str(folder), "--json", "--patch_size", "64"]) == 0
        looked.append(json.loads(capsys.readouterr().out))
        output = tmp_path / f"scores_{folder.name}"
        words = ["--checkpoint", tmp_path / "run", "--pairs_dir", folder, "--output_dir", output, "--split", "all"]
        assert evaluate.main([*map(str, words), "--device", "cpu"]) == 0
        scores.append((output / "scores.csv").read_text())
    assert looked[0]["cores"] == looked[1]["cores"]
    assert looked[0]["channels"] == looked[1]["channels"]
    assert scores[0] == scores[1]

    packed = tmp_path / "packed"
    assert pack.main([str(formats["ome-zarr"]), "--output_dir", str(packed), "--patch_size", "64"]) == 0
    for path in pairs.glob("*.npy"):
        np.testing.assert_array_equal(np.load(packed / path.name), np.load(path))
