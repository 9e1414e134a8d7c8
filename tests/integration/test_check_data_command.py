"""check-data from the command line: the checks of training, the tables, the files, and the faults it must find."""

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from orion_unet.__main__ import dispatch
from orion_unet.cli.arguments import parse_train_config, run_command
from orion_unet.data.pairs import find_pairs

pytestmark = pytest.mark.slow

SHARED = Path(os.environ.get("ORION_SHARED_DATA", Path(__file__).resolve().parents[2] / "../shared/data"))
NAMES = "DAPI,CD3,Blank"


def draw_pair(seed, shift=(0, 0), side=160):
    """Nuclei in an H&E and in DAPI, which is moved ``shift`` pixels up and left; some nuclei also show CD3."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side]
    spots = [(y - row) ** 2 + (x - column) ** 2 < 20 for row, column in rng.integers(0, side, (70, 2))]
    nuclei, some = np.any(spots, axis=0), np.any(spots[:4], axis=0)
    he = np.where(nuclei[..., None], (90, 70, 150), (235, 170, 205)) + rng.integers(0, 6, (side, side, 3))
    he[-side // 4 :] = 243
    noise = rng.integers(900, 1100, (side, side, 2))
    orion = np.stack([nuclei * 20_000, some * 9_000], axis=-1) + noise
    orion = np.roll(orion, (-shift[0], -shift[1]), (0, 1))
    return he.astype(np.uint8), np.concatenate([orion, np.zeros((side, side, 1))], axis=-1).astype(np.uint16)


@pytest.fixture
def folder(tmp_path):
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    for core in range(6):
        he, orion = draw_pair(core)
        np.save(pairs / f"core_{core}_HE.npy", he)
        np.save(pairs / f"core_{core}_ORION.npy", orion)
    (pairs / "channel_names.txt").write_text(NAMES.replace(",", "\n"))
    (pairs / "groups.csv").write_text("core,group\n" + "".join(f"core_{c},patient_{c // 2}\n" for c in range(6)))
    return pairs


def check(folder, *options):
    return run_command(dispatch, ["check-data", str(folder), "--patch_size", "64", *map(str, options)])


def document(capsys, folder, *options):
    assert check(folder, "--json", *options) == 0
    return json.loads(capsys.readouterr().out, parse_constant=pytest.fail)


def codes(found):
    return [warning["code"] for warning in found["warnings"]]


def test_a_sound_folder_has_no_warnings(folder, capsys):
    assert check(folder, "--exclude_channels", "Blank") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.endswith("Nothing wrong was found.")
    assert "6 cores of 160 x 160 pixels in 3 groups, 2 channels" in shown
    assert "H&E uint8 hwc; ORION uint16 hwc" in shown


@pytest.mark.parametrize("columns", [80, 140])
def test_the_tables_fit_the_terminal(folder, capsys, monkeypatch, columns):
    long = "a-core-with-a-rather-long-name-of-a-slide-and-a-block"
    for kind in ("HE", "ORION"):
        (folder / f"core_0_{kind}.npy").rename(folder / f"{long}_{kind}.npy")
    (folder / "groups.csv").unlink()
    monkeypatch.setenv("COLUMNS", str(columns))
    assert check(folder) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns
    headings = next(line for line in lines if line.startswith("channel"))
    assert ("threshold" in headings) == (columns == 140)
    assert [line.split()[0] for line in lines if line.startswith(("DAPI ", "CD3 ", "Blank "))] == NAMES.split(",")
    assert any("groups.csv" in line for line in lines)


def test_every_planted_fault_is_found(folder, capsys):
    np.save(folder / "core_1_ORION.npy", draw_pair(1, shift=(6, -8))[1])
    np.save(folder / "core_2_ORION.npy", draw_pair(50)[1])
    np.save(folder / "core_3_HE.npy", np.full((160, 160, 3), 243, np.uint8))
    shutil.copy(folder / "core_0_HE.npy", folder / "core_4_HE.npy")
    shutil.copy(folder / "core_0_ORION.npy", folder / "core_4_ORION.npy")
    no_cd3 = np.load(folder / "core_5_ORION.npy")
    no_cd3[..., 1] = 0
    np.save(folder / "core_5_ORION.npy", no_cd3)
    found = document(capsys, folder)
    assert codes(found) == [
        "same_tissue_across_groups",
        "shifted",
        "mismatched",
        "empty_channel",
        "missing_in_core",
        "little_tissue",
    ]
    messages = {warning["code"]: warning["message"] for warning in found["warnings"]}
    assert "core_0 and core_4 (identical)" in messages["same_tissue_across_groups"]
    assert "core_1 by +6, -8" in messages["shifted"]
    assert "core_2" in messages["mismatched"]
    assert "core_3" not in messages["mismatched"]
    assert "Blank" in messages["empty_channel"]
    assert "core_5 (CD3)" in messages["missing_in_core"]
    assert "core_3 (0%)" in messages["little_tissue"]


def test_cores_too_small_to_register_are_a_note_and_no_mismatch(folder, capsys):
    for core in range(6):
        for kind in ("HE", "ORION"):
            path = folder / f"core_{core}_{kind}.npy"
            np.save(path, np.load(path)[: 48 if core < 2 else 160])
    options = ("--patch_size", "32", "--exclude_channels", "Blank")
    found = document(capsys, folder, *options)
    assert codes(found) == []
    assert [note for note in found["notes"] if "too small" in note] == [
        "2 of 6 cores are less than 96 pixels high or wide, too small to check the registration of: core_0, core_1"
    ]
    small, large = found["per_core"][0], found["per_core"][5]
    assert small["nuclear_correlation"] > 0.8
    assert small["best_correlation"] is small["shift_down"] is small["shift_right"] is small["shift_peak"] is None
    assert (large["shift_down"], large["shift_right"]) == (0, 0)
    assert check(folder, *options) == 0
    assert "too small to check" in " ".join(capsys.readouterr().out.split())


def test_the_numbers_are_those_of_the_pixels(folder, capsys):
    found = document(capsys, folder)
    pixels = np.stack([np.load(folder / f"core_{core}_ORION.npy") for core in range(6)]) / 65535
    assert found["sampled_pixels"] == pixels[..., 0].size
    for index, row in enumerate(found["channels"]):
        values = pixels[..., index]
        assert row["min"] == pytest.approx(values.min())
        assert row["max"] == pytest.approx(values.max())
        assert row["mean"] == pytest.approx(values.mean(), rel=1e-5)
        for share in (1, 50, 99, 99.9):
            assert row[f"q{share:g}"] == pytest.approx(np.quantile(values, share / 100), rel=1e-5)
    # Spots are 9,000 above a background of 900 to 1,100.
    assert found["channels"][1]["fraction_positive"] == pytest.approx((pixels[..., 1] > 5000 / 65535).mean(), abs=1e-6)
    for core in found["per_core"]:
        assert core["tissue_fraction"] == pytest.approx(0.75, abs=0.05)
        assert (core["shift_down"], core["shift_right"]) == (0, 0)
        assert core["nuclear_correlation"] > 0.8


def test_the_files_contain_every_channel_and_core(folder, tmp_path, capsys):
    out = tmp_path / "deep" / "out"
    assert check(folder, "--output_dir", out) == 0
    written = capsys.readouterr().out.splitlines()[-3:]
    assert written == [f"Written to {out}:", "channels.csv, cores.csv, check_data.json", "contact_sheet_01.png"]
    with open(out / "channels.csv", newline="") as file:
        channels = list(csv.DictReader(file))
    assert [row["channel"] for row in channels] == NAMES.split(",")
    assert channels[2]["state"] == "empty"
    with open(out / "cores.csv", newline="") as file:
        assert [row["core"] for row in csv.DictReader(file)] == [f"core_{core}" for core in range(6)]
    stored = json.loads((out / "check_data.json").read_text(), parse_constant=pytest.fail)
    assert stored == document(capsys, folder)
    height, width = imread(out / "contact_sheet_01.png").shape[:2]
    assert 200 < height < 3000
    assert 500 < width < 3000
    assert sorted(entry.name for entry in out.iterdir()) == [
        "channels.csv",
        "check_data.json",
        "contact_sheet_01.png",
        "cores.csv",
    ]


HOSTILE = "$\\frac$ [red]x \x1b]0;owned\x07\x9b31m\u202e"


def printable(text):
    return all(letter.isprintable() or letter == "\n" for letter in text)


@pytest.fixture
def hostile(folder):
    """Names of a core, a group and two channels that would control a terminal, or that matplotlib cannot parse."""
    for kind in ("HE", "ORION"):
        (folder / f"core_0_{kind}.npy").rename(folder / f"{HOSTILE}_{kind}.npy")
    (folder / "groups.csv").write_text(
        f"core,group\n{HOSTILE},{HOSTILE}\n" + "".join(f"core_{core},p{core}\n" for core in range(1, 6))
    )
    (folder / "channel_names.txt").write_text(f"DAPI {HOSTILE}\nCD3\nBlank {HOSTILE}")
    return folder


def test_hostile_names_reach_neither_terminal_nor_figure(hostile, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert check(hostile, "--output_dir", tmp_path / "out") == 0
    shown = capsys.readouterr().out
    assert printable(shown)
    assert "[red]" in shown and "\\x1b]0;owned" in shown and "\\x9b31m" in shown and "\\u202e" in shown
    with open(tmp_path / "out" / "cores.csv", newline="") as file:
        assert HOSTILE in [row["core"] for row in csv.DictReader(file)]


def test_hostile_names_are_escaped_in_json_and_mean_the_same(hostile, capsys):
    assert check(hostile, "--json") == 0
    shown = capsys.readouterr().out
    assert printable(shown) and shown.isascii()
    found = json.loads(shown)
    assert HOSTILE in [core["core"] for core in found["per_core"]]
    assert [row["channel"] for row in found["channels"]] == [f"DAPI {HOSTILE}", "CD3", f"Blank {HOSTILE}"]


def test_hostile_names_in_an_error_are_escaped(hostile, capsys):
    assert check(hostile, "--nuclear_marker", "DRAQ5") == 2
    shown = capsys.readouterr().err
    assert printable(shown) and "\\x1b]0;owned" in shown


def test_many_cores_make_several_pages(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("orion_unet.inspection.contact_sheet.PER_PAGE", 4)
    assert check(folder, "--output_dir", tmp_path / "out") == 0
    assert capsys.readouterr().out.endswith("\ncontact_sheet_01.png to contact_sheet_02.png\n")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == [
        "contact_sheet_01.png",
        "contact_sheet_02.png",
    ]


def test_another_marker_may_be_the_nuclear_one(folder, capsys):
    found = document(capsys, folder, "--nuclear_marker", "CD3")
    assert found["nuclear_marker"] == "CD3"
    assert found["per_core"][0]["nuclear_correlation"] < 0.5


def test_without_a_nuclear_stain_the_registration_is_left_out(folder, capsys):
    found = document(capsys, folder, "--channel_names", "CD8,CD3,Blank")
    assert found["nuclear_marker"] is None
    assert found["per_core"][0]["nuclear_correlation"] is None
    assert any("--nuclear_marker" in note for note in found["notes"])
    assert check(folder, "--channel_names", "CD8,CD3,Blank") == 0


def test_an_unknown_nuclear_marker_is_refused_with_a_list_of_channels(folder, capsys):
    assert check(folder, "--nuclear_marker", "DRAQ5") == 2
    assert capsys.readouterr().err == "error: --nuclear_marker DRAQ5: no such channel; there are DAPI, CD3, Blank\n"


def test_a_bad_folder_is_refused_with_the_message_of_training(folder, capsys):
    np.save(folder / "core_1_HE.npy", np.zeros((160, 150, 3), np.uint8))
    (folder / "core_3_ORION.npy").write_bytes(b"no array")
    from orion_unet.errors import InputError

    with pytest.raises(InputError) as refused:
        find_pairs(parse_train_config(["--pairs_dir", str(folder), "--patch_size", "64"]).data)
    assert check(folder) == 2
    shown = capsys.readouterr()
    assert shown.err == f"error: {refused.value}\n"
    assert "core_1_ORION.npy" in shown.err
    assert "core_3_ORION.npy" in shown.err
    assert shown.out == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--patch_size", "500"), "smaller than --patch_size 500"),
        (("--patch_size", "3"), "--patch_size 3: must be at least 16"),
        (("--exclude_channels", "CD99"), "no channel CD99"),
        (("--groups_csv", "nowhere.csv"), "nowhere.csv: cannot be read"),
        (("--epochs", "3"), "unrecognized arguments: --epochs 3"),
    ],
)
def test_options_are_checked_as_in_training(folder, capsys, options, message):
    assert check(folder, *options) == 2
    assert message in capsys.readouterr().err


def test_an_output_folder_that_cannot_be_made_is_reported_before_the_work(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert check(folder, "--output_dir", tmp_path / "file" / "out") == 2
    assert "--output_dir" in capsys.readouterr().err


def test_the_measured_shift_of_real_pairs_is_real():
    """After cropping the markers at the shift that was found, no shift is left."""
    pairs = SHARED / "real_pairs"
    if not pairs.is_dir():
        pytest.skip("the optional real pairs are not there (ORION_SHARED_DATA)")
    from orion_unet.registration.shift import overlap, register
    from orion_unet.registration.stains import haematoxylin

    for core in (0, 5):
        he = np.load(pairs / f"core_{core:03d}_HE.npy").astype(np.float32) / 255
        dapi = np.load(pairs / f"core_{core:03d}_ORION.npy")[..., 0].astype(np.float32)
        density = haematoxylin(he)
        found = register(density, dapi)
        again = register(*overlap(density, dapi, *found.shift))
        assert found.best_correlation > 0.85
        # Real tissue is also warped a little between two stainings.
        assert max(map(abs, again.shift)) <= 1
        assert again.correlation == pytest.approx(found.best_correlation)
