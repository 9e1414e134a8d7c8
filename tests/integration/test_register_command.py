"""register: real processes and folders, from displaced pairs to pairs that fit, and to what is refused."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from pair_formats import write_tiff

from orion_unet.__main__ import dispatch
from orion_unet.cli.arguments import run_command
from orion_unet.config import DataOptions
from orion_unet.data.alignment import alignment_warning
from orion_unet.data.pairs import find_pairs
from orion_unet.data.scale import measure_scales
from orion_unet.demo.make import draw_core
from orion_unet.registration.transform import Affine, move

pytestmark = pytest.mark.slow

SHARED = Path(os.environ.get("ORION_SHARED_DATA", Path(__file__).resolve().parents[2] / "../shared/data"))
REAL_PAIRS = SHARED / "real_pairs"
SHIFTS = {"core_0": (6.3, -9.5), "core_1": (-4.0, 0.0), "core_2": (0.0, 0.0)}
NAMES = ["Hoechst", "CD3", "CD20"]


def stored(image, layout):
    return np.ascontiguousarray(image if layout == "hwc" else image.transpose(2, 0, 1))


@pytest.fixture
def pairs(tmp_path):
    """Three cores moved by SHIFTS, one mirrored and one with another core's H&E; H&E (H, W, 3), markers (C, H, W)."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    cores = {}
    for seed, name in enumerate([*SHIFTS, "foreign", "mirrored"]):
        he, orion = draw_core(seed, 320)
        orion = orion if orion.shape[-1] == 20 else orion.transpose(1, 2, 0)
        cores[name] = he, orion[..., :3]
    for name, (he, orion) in cores.items():
        if name in SHIFTS:
            # What the markers show at a point is found there in the H&E as it was drawn.
            back = Affine.shift(*SHIFTS[name]).inverse()
            he, _ = move(lambda y, x, h, w, he=he: he[y : y + h, x : x + w], (320, 320), back, None, (0, 0, 320, 320))
        elif name == "mirrored":
            he = he[:, ::-1]
        else:
            he = cores["core_2"][0]
        np.save(folder / f"{name}_HE.npy", np.ascontiguousarray(he))
        np.save(folder / f"{name}_ORION.npy", stored(orion, "chw"))
    (folder / "channel_names.txt").write_text("\n".join(NAMES) + "\n")
    (folder / "groups.csv").write_text("core,group\n" + "".join(f"{name},patient_{name[-1]}\n" for name in cores))
    (folder / "dataset.json").write_text(json.dumps({"schema": 1, "pixel_size_um": 0.5, "source": "made"}))
    return folder


def register(*words):
    return run_command(dispatch, ["register", *map(str, words)])


def rows_of(output):
    with open(output / "registration.csv", newline="") as file:
        return {row["core"]: row for row in csv.DictReader(file)}


def test_displaced_cores_are_moved_and_those_that_do_not_match_are_rejected(pairs, tmp_path, capsys):
    output = tmp_path / "fixed"
    assert register(pairs, "--output_dir", output, "--jobs", 1) == 0
    said = capsys.readouterr().out
    rows = rows_of(output)
    assert {name: row["state"] for name, row in rows.items()} == {
        **dict.fromkeys(SHIFTS, "kept"), "foreign": "rejected", "mirrored": "rejected",
    }  # fmt: skip
    for name, (down, right) in SHIFTS.items():
        row = {key: float(value) for key, value in rows[name].items() if key not in ("core", "state", "reason")}
        assert row["shift_down"] == pytest.approx(down, abs=0.5)
        assert row["shift_right"] == pytest.approx(right, abs=0.5)
        assert row["residual_px"] < 0.5 and row["correlation"] > 0.5
        assert row["scale"] == pytest.approx(1, abs=0.005) and abs(row["rotation_deg"]) < 0.3
        he, orion = (np.load(output / f"{name}_{kind}.npy") for kind in ("HE", "ORION"))
        top, left, height, width = (int(row[key]) for key in ("top", "left", "height", "width"))
        assert he.shape == (height, width, 3) and he.dtype == np.uint8
        # Markers are cropped and never interpolated.
        before = np.load(pairs / f"{name}_ORION.npy")
        np.testing.assert_array_equal(orion, before[:, top : top + height, left : left + width])
        # The H&E is that of the drawing again, but for two interpolations.
        drawn = draw_core(int(name[-1]), 320)[0][top : top + height, left : left + width]
        assert np.abs(he.astype(float) - drawn).mean() < 6
    assert "3 of 5 cores registered" in said and "--pairs_dir" in said
    assert "rejected        foreign: no match: the peak of" in said
    assert "rejected        mirrored: the H&E looks mirrored left to right against the markers" in said
    for name in ("channel_names.txt", "groups.csv", "dataset.json"):
        assert (output / name).read_bytes() == (pairs / name).read_bytes()
    assert imread(output / "registration.png").shape[1] > 600
    # What was written is a folder that training reads, and is in register.
    table = find_pairs(DataOptions(pairs_dir=str(output), patch_size=64))
    assert table.names.tolist() == list(SHIFTS)
    assert alignment_warning(table, measure_scales(table, False)) == ""


def test_pairs_in_tiles_are_registered_as_their_arrays_are(pairs, tmp_path):
    tiled = tmp_path / "tiled"
    tiled.mkdir()
    for path in pairs.glob("*.npy"):
        if not path.name.startswith("core_0"):
            path.unlink()
            continue
        image = np.load(path)
        write_tiff(tiled / f"{path.stem}.ome.tif", image if "_HE" in path.name else image.transpose(1, 2, 0), "zstd")
    (tiled / "channel_names.txt").write_text("\n".join(NAMES) + "\n")
    for folder in (pairs, tiled):
        assert register(folder, "--output_dir", tmp_path / f"{folder.name}_fixed", "--jobs", 1) == 0
    assert rows_of(tmp_path / "tiled_fixed") == rows_of(tmp_path / "pairs_fixed")
    for kind in ("HE", "ORION"):
        found = [np.load(tmp_path / f"{name}_fixed" / f"core_0_{kind}.npy") for name in ("pairs", "tiled")]
        np.testing.assert_array_equal(*found)


def test_an_interrupted_registration_goes_on_and_a_finished_one_does_nothing(pairs, tmp_path, capsys):
    output = tmp_path / "fixed"
    assert register(pairs, "--output_dir", output, "--jobs", 1) == 0
    first = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in output.iterdir()}
    # As if it had been killed: one core is not recorded, and a half-written file is left.
    lines = (output / "registration.jsonl").read_text().splitlines(keepends=True)
    lost = json.loads(lines[-1])["core"]
    (output / "registration.jsonl").write_text("".join(lines[:-1]) + lines[-1][:40])
    (output / f".{lost}_HE.npy.partial").write_bytes(b"half")
    capsys.readouterr()
    assert register(pairs, "--output_dir", output, "--jobs", 1) == 0
    assert "cores registered in" in (said := capsys.readouterr().out) and "4 of them before" in said
    assert (output / "registration.csv").read_bytes() == first["registration.csv"][1]
    touched = {path.name: path.stat().st_mtime_ns for path in output.glob("*_*.npy")}
    assert register(pairs, "--output_dir", output, "--jobs", 1) == 0
    assert "5 of them before" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in output.glob("*_*.npy")} == touched


def test_stricter_options_reject_what_was_kept_and_processes_change_nothing(pairs, tmp_path):
    output, beside = tmp_path / "fixed", tmp_path / "beside"
    for path in [*pairs.glob("foreign_*"), *pairs.glob("mirrored_*")]:
        path.unlink()
    assert register(pairs, "--output_dir", output, "--jobs", 1) == 0
    done = subprocess.run(
        [sys.executable, "-m", "orion_unet", "register", pairs, "--output_dir", beside, "--jobs", "2"],
        capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for path in output.glob("*.npy"):
        assert path.read_bytes() == (beside / path.name).read_bytes()
    assert rows_of(output) == rows_of(beside)
    assert register(pairs, "--output_dir", output, "--jobs", 1, "--max_shift", 5) == 0
    assert "more than --max_shift 5" in rows_of(output)["core_0"]["reason"]
    assert not (output / "core_0_HE.npy").exists() and (output / "core_1_HE.npy").exists()
    assert register(pairs, "--output_dir", output, "--jobs", 1, "--min_correlation", 0.999) == 2
    assert "under 0.999" in rows_of(output)["core_2"]["reason"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--register_on", "CD99"), "--register_on CD99: no such channel; there are Hoechst, CD3, CD20"),
        (("--channel_names", "a,b,c"), "no channel has the name of a nuclear stain; name the one that shows nuclei"),
        (("--output_dir", "{pairs}"), "is the folder of the pairs itself"),
        (("--output_dir", "{tmp}/other"), "has pairs that were not registered from"),
        (("--min_correlation", "2"), "--min_correlation 2.0"),
        (("--jobs", "0"), "--jobs 0"),
    ],
)
def test_bad_input_is_one_message_and_2(words, said, pairs, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    np.save(tmp_path / "other" / "x_HE.npy", np.zeros((2, 2)))
    given = [word.format(pairs=pairs, tmp=tmp_path) for word in words]
    assert register(pairs, "--output_dir", tmp_path / "fixed", *given) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.glob("fixed/*_HE.npy"))


def test_training_and_check_data_name_the_command_that_registers(pairs, tmp_path, capsys):
    for name in ("foreign", "mirrored"):
        for kind in ("HE", "ORION"):
            (pairs / f"{name}_{kind}.npy").unlink()
    table = find_pairs(DataOptions(pairs_dir=str(pairs), patch_size=64))
    warning = alignment_warning(table, measure_scales(table, False))
    command = f"python -m orion_unet register {pairs} --output_dir {pairs}_registered"
    assert warning.startswith("2 of 3 cores looked at are more than 2 pixels off register (core_0, core_1)")
    assert warning.endswith(command)
    assert run_command(dispatch, ["check-data", str(pairs), "--patch_size", "64", "--json"]) == 0
    (found,) = [w for w in json.loads(capsys.readouterr().out)["warnings"] if w["code"] == "shifted"]
    assert found["advice"].endswith(f"Register the pairs: {command}")
    assert run_command(dispatch, ["check-data", str(pairs), "--patch_size", "64"]) == 0
    assert f" {command}\n" in capsys.readouterr().out


@pytest.mark.skipif(not REAL_PAIRS.is_dir(), reason="the optional real pairs are not there (ORION_SHARED_DATA)")
def test_real_pairs_are_registered_and_their_foreign_and_mirrored_versions_refused(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "channel_names.txt").write_text((REAL_PAIRS / "channel_names.txt").read_text())
    names = sorted(path.name.removesuffix("_HE.npy") for path in REAL_PAIRS.glob("*_HE.npy"))
    for index, name in enumerate(names):
        he, orion = (np.load(REAL_PAIRS / f"{name}_{kind}.npy") for kind in ("HE", "ORION"))
        stranger = np.load(REAL_PAIRS / f"{names[(index + 3) % len(names)]}_HE.npy")
        versions = (("right", he), ("foreign", stranger), ("mirrored", he[:, ::-1].copy()))
        # A refusal takes as long as looking at every orientation does.
        for kind, image in versions if index % 4 == 0 else versions[:1]:
            np.save(source / f"{name}_{kind}_HE.npy", image)
            np.save(source / f"{name}_{kind}_ORION.npy", orion)
    assert register(source, "--output_dir", tmp_path / "fixed", "--jobs", 1) == 0
    rows = rows_of(tmp_path / "fixed")
    for name, row in rows.items():
        assert (row["state"] == "kept") == name.endswith("_right"), (name, row)
    right = [row for name, row in rows.items() if name.endswith("_right")]
    assert np.median([float(row["correlation"]) for row in right]) > 0.85
    assert max(float(row["residual_px"]) for row in right) < 1
