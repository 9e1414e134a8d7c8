"""The demo data: reproducible, as sparse as real data, each marker where it belongs, and never in anyone's way."""

import csv
import json
import os
from functools import reduce
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from orion_unet.cli import make_demo as command
from orion_unet.data.camera_noise import NoiseEvidence, look_for_noise
from orion_unet.demo import make as demo
from orion_unet.demo.make import MARKERS, draw_core, holds_demo, make_demo
from orion_unet.errors import InputError

SIZE = 256


@pytest.fixture(scope="module")
def cores():
    return [draw_core(seed, SIZE) for seed in range(4)]


def channel(orion, marker):
    return orion[..., MARKERS.index(marker)] / 65535


def haematoxylin_density(he):
    """Colour deconvolution with the published vectors, written apart from the renderer's."""
    vectors = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return (-np.log10(np.maximum(he, 1) / 243.0) @ np.linalg.inv(vectors))[..., 0]


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_images_have_the_promised_shapes_and_types():
    he, orion = draw_core(1, 96)
    assert (he.shape, he.dtype) == ((96, 96, 3), np.uint8)
    assert (orion.shape, orion.dtype) == ((96, 96, 20), np.uint16)
    assert MARKERS[0] == "Hoechst" and len(set(MARKERS)) == 20


def test_a_seed_draws_the_same_core_again_and_another_seed_another(cores):
    for stored, again in zip(cores[1], draw_core(1, SIZE), strict=True):
        assert np.array_equal(stored, again)
    assert not np.array_equal(cores[0][0], cores[1][0])


def test_one_channel_is_nothing_but_camera_noise_and_no_other(cores):
    rows = [orion.transpose(2, 0, 1).astype(np.float32) / 65535 for _, orion in cores]
    noise = reduce(NoiseEvidence.joined, map(look_for_noise, rows)).noise
    assert [marker for marker, found in zip(MARKERS, noise, strict=True) if found] == ["Blank"]
    for _, orion in cores:
        image = channel(orion, "Blank")
        assert np.median(image) == pytest.approx(0.0045, abs=1e-5)
        assert np.std(image[image < 0.1]) == pytest.approx(0.00025, rel=0.05)


def test_most_markers_are_bright_in_few_pixels_only(cores):
    bright = {m: np.mean([(channel(orion, m) > 0.08).mean() for _, orion in cores]) for m in MARKERS}
    assert 0.06 < bright["Hoechst"] < 0.20
    assert all(share < 0.04 for marker, share in bright.items() if marker != "Hoechst")
    assert sum(share < 0.001 for share in bright.values()) >= 8
    for marker in MARKERS[1:]:
        assert np.median([channel(orion, marker) for _, orion in cores]) < 0.02, marker


def test_levels_follow_those_of_real_cores(cores):
    root = os.environ.get("ORION_SHARED_DATA", Path(__file__).parents[2] / "../shared/data")
    table = Path(root) / "orion_channel_stats.csv"
    if not table.is_file():
        pytest.skip(f"{table} is not here: set ORION_SHARED_DATA to the folder that holds it")
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    images = np.stack([orion for _, orion in cores]) / 65535
    flat = images.reshape(-1, len(MARKERS))
    for name, measured in (("mean", flat.mean(0)), ("p99", np.percentile(flat, 99, axis=0))):
        real = np.sort([float(row[name]) for row in rows])[::-1]
        ratio = np.sort(measured)[::-1][:-1] / real[:-1]  # without the empty channel
        assert np.abs(np.log2(ratio)).max() < 2, f"{name}: {ratio}"
        assert 0.5 < np.median(ratio) < 2, f"{name}: {ratio}"


def test_hoechst_follows_the_haematoxylin_of_the_he(cores):
    for he, orion in cores:
        assert np.corrcoef(haematoxylin_density(he).ravel(), channel(orion, "Hoechst").ravel())[0, 1] > 0.85


def test_the_corners_are_bright_colourless_glass_without_markers(cores):
    corner = np.s_[: SIZE // 10, : SIZE // 10]
    for he, orion in cores:
        glass = he[corner].astype(float)
        assert glass.min() > 225 and np.ptp(glass.mean((0, 1))) < 8
        assert np.percentile(orion[corner], 99, axis=(0, 1)).max() < 0.012 * 65535


def test_markers_are_in_their_compartments(cores):
    def where(marker, threshold=0.03):
        return np.concatenate([channel(orion, marker) > threshold for _, orion in cores])

    def share(part, of):
        return (part & of).sum() / of.sum()

    nuclei = where("Hoechst", 0.05)
    near = ndimage.binary_dilation
    assert share(near(nuclei), where("Ki67")) > 0.95 and share(nuclei, where("Pan-CK")) < 0.3
    assert share(near(where("CD3e", 0.015)), where("CD8a")) > 0.95
    assert share(near(where("CD8a"), iterations=2), where("Granzyme B")) > 0.8
    assert share(near(where("CD45", 0.02), iterations=2), where("CD20")) > 0.95
    assert share(where("Pan-CK", 0.012), where("E-cadherin")) > 0.9
    assert share(near(where("Pan-CK")), where("CD20")) < 0.1
    assert share(where("Pan-CK"), where("SMA")) < 0.05
    assert share(where("CD8a"), where("CD3e")) < 0.6  # a subset, not the same cells


def test_each_stained_channel_has_a_few_isolated_hot_pixels(cores):
    ring = np.ones((3, 3), bool)
    ring[1, 1] = False
    for marker in MARKERS:
        found = 0
        for _, orion in cores:
            image = channel(orion, marker)
            found += ((image > 0.15) & (image > 2 * ndimage.maximum_filter(image, footprint=ring))).sum()
        assert 4 <= found <= 16, marker


def test_a_folder_holds_pairs_names_and_groups_of_two(tmp_path):
    names = make_demo(tmp_path / "new" / "demo", cores=3, size=64)
    folder = tmp_path / "new" / "demo"
    assert names == ["core_000", "core_001", "core_002"]
    pairs = {f"{name}_{kind}.npy" for name in names for kind in ("HE", "ORION")}
    assert set(contents(folder)) == pairs | {"channel_names.txt", "groups.csv", "dataset.json", "demo.json"}
    assert (folder / "channel_names.txt").read_text().split("\n") == [*MARKERS, ""]
    assert json.loads((folder / "dataset.json").read_text())["pixel_size_um"] == 0.325
    rows = list(csv.DictReader((folder / "groups.csv").open()))
    assert [(row["core"], row["group"]) for row in rows] == list(
        zip(names, ["patient_00", "patient_00", "patient_01"], strict=True)
    )
    assert np.load(folder / "core_002_HE.npy", allow_pickle=False).shape == (64, 64, 3)
    assert np.load(folder / "core_002_ORION.npy", allow_pickle=False).dtype == np.uint16


def test_a_core_does_not_depend_on_how_many_are_made(tmp_path):
    make_demo(tmp_path / "few", cores=2, size=64, seed=5)
    make_demo(tmp_path / "more", cores=4, size=64, seed=5)
    few, more = contents(tmp_path / "few"), contents(tmp_path / "more")
    assert all(few[name] == more[name] for name in few if name.endswith(".npy"))
    assert few["core_000_HE.npy"] != few["core_001_HE.npy"]


def test_the_same_set_is_used_again_untouched(tmp_path, monkeypatch):
    names = make_demo(tmp_path, cores=2, size=64)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    monkeypatch.setattr(demo, "draw_core", None)
    assert make_demo(tmp_path, cores=2, size=64) == names
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times


def test_an_interrupted_set_has_no_half_file_and_is_completed(tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    make_demo(whole, cores=3, size=64)
    drawn = []

    def draw_two(*args, **kwargs):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(args)
        return draw_core(*args, **kwargs)

    monkeypatch.setattr(demo, "draw_core", draw_two)
    with pytest.raises(KeyboardInterrupt):
        make_demo(broken, cores=3, size=64)
    expected = contents(whole)
    files = {name: content for name, content in contents(broken).items() if name != "demo.json"}
    assert len(files) == 7 and all(content == expected[name] for name, content in files.items())
    assert not holds_demo(broken, 3, 64, 0)

    monkeypatch.undo()
    make_demo(broken, cores=3, size=64)
    assert contents(broken) == expected and holds_demo(broken, 3, 64, 0)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["mine_HE.npy", "core_000_ORION.npy", "groups.csv", "demo.json"])
def test_other_peoples_files_are_refused_and_kept(tmp_path, name, overwrite):
    (tmp_path / name).write_bytes(b"precious")
    with pytest.raises(InputError, match=name):
        make_demo(tmp_path, cores=2, size=64, overwrite=overwrite)
    assert contents(tmp_path) == {name: b"precious"}


def test_another_demo_set_is_replaced_only_with_overwrite(tmp_path):
    make_demo(tmp_path, cores=3, size=64, seed=1)
    before = contents(tmp_path)
    with pytest.raises(InputError, match=r"seed 1.*--overwrite"):
        make_demo(tmp_path, cores=2, size=64, seed=2)
    assert contents(tmp_path) == before
    make_demo(tmp_path, cores=2, size=64, seed=2, overwrite=True)
    make_demo(tmp_path.parent / "fresh", cores=2, size=64, seed=2)
    assert contents(tmp_path) == contents(tmp_path.parent / "fresh")


def test_a_demo_file_that_someone_changed_is_not_overwritten(tmp_path):
    make_demo(tmp_path, cores=2, size=64)
    (tmp_path / "core_001_HE.npy").write_bytes(b"precious")
    before = contents(tmp_path)
    with pytest.raises(InputError, match="core_001_HE"):
        make_demo(tmp_path, cores=2, size=64, seed=3, overwrite=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("numbers", [{"cores": 1}, {"cores": 1001}, {"size": 63}, {"size": 4097}, {"seed": -1}])
def test_numbers_out_of_range_are_named(tmp_path, numbers):
    with pytest.raises(InputError, match=f"--{next(iter(numbers))}"):
        make_demo(tmp_path / "demo", **numbers)
    assert not (tmp_path / "demo").exists()


def test_a_folder_that_cannot_be_made_is_bad_input(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file"):
        make_demo(tmp_path / "file", cores=2, size=64)


def test_the_command_prints_one_line_with_how_to_train(tmp_path, capfd):
    folder = tmp_path / "my demo"
    assert command.main([str(folder), "--cores", "2", "--size", "64", "--seed", "7"]) == 0
    printed = capfd.readouterr()
    assert printed.out.count("\n") == 1 and printed.out.startswith("Made 2 cores of 64 x 64")
    assert f"--pairs_dir '{folder}'" in printed.out
    assert printed.err == ""  # no progress bar where there is no terminal
    assert holds_demo(folder, 2, 64, 7)

    command.main([str(folder), "--cores", "2", "--size", "64", "--seed", "7"])
    assert capfd.readouterr().out.startswith("Found 2 cores")


@pytest.mark.parametrize("argv", [[], ["x", "--cores", "two"], ["x", "--speed", "1"], ["x", "--size", "8"]])
def test_the_command_refuses_a_bad_command_line(argv, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError):
        command.main(argv)
    assert not list(tmp_path.iterdir())
