"""prepare end to end on small generated slides, and the traps of public slides."""

import csv
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from orion_unet.__main__ import dispatch
from orion_unet.cli import prepare
from orion_unet.cli.arguments import run_command
from orion_unet.config import DataOptions
from orion_unet.data.pairs import find_pairs
from orion_unet.data.split import core_groups
from orion_unet.data.zarr_writing import write_zarr
from orion_unet.demo.make import MARKERS, draw_core
from orion_unet.errors import InputError
from orion_unet.preparation import prepare as work
from orion_unet.slides.open import open_he, open_markers

pytestmark = pytest.mark.slow

tifffile = pytest.importorskip("tifffile")
ndimage = pytest.importorskip("scipy.ndimage")
SIDE = 768
UM = {"PhysicalSizeX": 0.325, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": 0.325, "PhysicalSizeYUnit": "µm"}
QUICK = ["--register", "off", "--jobs", "1", "--region_size", "256", "--regions_per_slide", "2"]


@pytest.fixture(scope="module")
def core():
    he, orion = draw_core(5, SIDE)
    return he, np.ascontiguousarray(orion.transpose(2, 0, 1))


def write_he(path, he, size=UM, **options):
    kind = {"tile": (128, 128), "compression": "jpeg"} | options
    tifffile.imwrite(path, he, photometric="rgb", metadata={"axes": "YXS", **size}, ome=True, **kind)


def write_orion(path, orion, names=MARKERS, size=UM, **options):
    kind = {"tile": (128, 128), "compression": "zstd"} | options
    about = {"axes": "CYX", **({"Channel": {"Name": list(names)}} if names else {}), **size}
    tifffile.imwrite(path, orion, photometric="minisblack", metadata=about, ome=True, **kind)


@pytest.fixture
def slides(tmp_path, core):
    """A folder with one good slide, and the CSV that lists it."""
    write_he(tmp_path / "he.ome.tif", core[0])
    write_orion(tmp_path / "orion.ome.tif", core[1])
    return listed(tmp_path, "A,he.ome.tif,orion.ome.tif")


def listed(folder, *rows, columns="slide,he,orion"):
    path = folder / "slides.csv"
    path.write_text("\n".join([columns, *rows, ""]))
    return path


def run(slides, *words):
    return prepare.main([str(slides), "--output_dir", str(slides.parent / "pairs"), *words])


def rows_of(folder, name="regions.csv"):
    with open(folder / "pairs" / name, newline="") as file:
        return list(csv.DictReader(file))


def stored(folder, row):
    """The H&E and the markers of a pair."""
    return [np.load(folder / "pairs" / f"{row['core']}_{name}.npy") for name in ("HE", "ORION")]


def place(row):
    y, x, height, width = (int(row[name]) for name in ("y", "x", "height", "width"))
    return np.s_[y : y + height, x : x + width]


def test_a_slide_becomes_a_folder_of_pairs_that_training_reads(slides, tmp_path, core, capsys):
    assert run(slides, *QUICK) == 0
    table = find_pairs(DataOptions(pairs_dir=str(tmp_path / "pairs")))
    assert table.channel_names == tuple(MARKERS)
    assert len(table) == 2
    for row in rows_of(tmp_path):
        he, orion = stored(tmp_path, row)
        np.testing.assert_array_equal(orion, core[1].transpose(1, 2, 0)[place(row)])
        with open_he(tmp_path / "he.ome.tif") as image:
            np.testing.assert_array_equal(he, image.stored(0, 0, SIDE, SIDE)[place(row)])
    document = json.loads((tmp_path / "pairs" / "dataset.json").read_text())
    assert (document["schema"], document["pixel_size_um"]) == (1, pytest.approx(0.325))
    assert [row["group"] for row in rows_of(tmp_path, "groups.csv")] == ["A", "A"]
    assert (tmp_path / "pairs" / "A_overview.png").stat().st_size > 10_000
    assert "2 of 2 regions are pairs" in capsys.readouterr().out


def test_a_finished_prepare_does_nothing_and_an_interrupted_one_goes_on(slides, tmp_path, monkeypatch, capsys):
    from orion_unet.preparation import prepare as module

    genuine, calls = module.prepare_region, []

    def counted(plan, region, *rest):
        calls.append(region.core)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return genuine(plan, region, *rest)

    monkeypatch.setattr(module, "prepare_region", counted)
    with pytest.raises(KeyboardInterrupt):
        run(slides, *QUICK)
    assert len(list((tmp_path / "pairs").glob("*.npy"))) == 2
    first = (tmp_path / "pairs" / "A_r0001_HE.npy").stat().st_mtime_ns
    assert run(slides, *QUICK) == 0
    assert calls == ["A_r0001", "A_r0002", "A_r0002"]
    monkeypatch.setattr(module, "plan_slide", None)
    assert run(slides, *QUICK) == 0
    assert len(calls) == 3
    assert (tmp_path / "pairs" / "A_r0001_HE.npy").stat().st_mtime_ns == first
    assert "2 of them before" in capsys.readouterr().out


def test_a_dask_cluster_makes_the_same_pairs(slides, tmp_path, core, monkeypatch):
    distributed = pytest.importorskip("distributed")
    options = [word for word in QUICK if word not in ("--jobs", "1")]
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=2, host="127.0.0.1", dashboard_address=None, processes=True
    ) as cluster:
        # Paths of the command line are relative to where it was called, not to where the workers run.
        monkeypatch.chdir(tmp_path)
        words = [slides.name, "--output_dir", "pairs", *options, "--dask_scheduler", cluster.scheduler_address]
        assert prepare.main(words) == 0
    assert len(rows_of(tmp_path)) == 2
    for row in rows_of(tmp_path):
        np.testing.assert_array_equal(stored(tmp_path, row)[1], core[1].transpose(1, 2, 0)[place(row)])


def test_a_scheduler_that_does_not_answer_is_named(slides, tmp_path, monkeypatch):
    pytest.importorskip("distributed")
    from orion_unet.preparation import workers

    monkeypatch.setattr(workers, "CONNECT_S", 1)
    with pytest.raises(InputError, match=r"127\.0\.0\.1:9: no scheduler answers"):
        run(slides, *QUICK, "--dask_scheduler", "tcp://127.0.0.1:9")
    assert not (tmp_path / "pairs").exists()


def test_other_options_need_overwrite_which_replaces_only_what_prepare_made(slides, tmp_path):
    run(slides, *QUICK)
    (tmp_path / "pairs" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="with other options; add --overwrite"):
        run(slides, *QUICK, "--seed", "3", "--regions_per_slide", "1")
    assert run(slides, *QUICK, "--regions_per_slide", "1", "--overwrite") == 0
    assert len(list((tmp_path / "pairs").glob("*.npy"))) == 2
    assert (tmp_path / "pairs" / "notes.txt").read_text() == "mine"


def test_pairs_of_another_origin_are_never_mixed_with_these(slides, tmp_path):
    (tmp_path / "pairs").mkdir()
    np.save(tmp_path / "pairs" / "other_HE.npy", np.zeros(3))
    with pytest.raises(InputError, match="other_HE"):
        run(slides, *QUICK)


def test_a_dry_run_says_what_would_be_made_and_makes_nothing(slides, tmp_path, capsys):
    assert run(slides, *QUICK, "--dry_run") == 0
    size = 2 * 256 * 256 * (2 * len(MARKERS) + 3) / 1e6
    assert f"would make 2 pairs of {len(MARKERS)} markers" in (said := capsys.readouterr().out)
    assert f"{size:.1f} MB" in said
    assert not (tmp_path / "pairs").exists()


def test_too_little_disk_is_said_before_anything_is_written(slides, tmp_path, monkeypatch):
    from orion_unet.errors import RunError

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(RunError, match="too little disk space"):
        run(slides, *QUICK)
    assert not list((tmp_path / "pairs").glob("*.npy")) if (tmp_path / "pairs").exists() else True


TRAPS = {
    "1.0 without a unit": ({"PhysicalSizeX": 1.0, "PhysicalSizeY": 1.0}, "1 without a unit"),
    "axes that differ": ({**UM, "PhysicalSizeY": 0.34}, "0.325 µm across and 0.34 µm down"),
    "no size": ({}, "states no pixel size"),
}


@pytest.mark.parametrize(("size", "message"), TRAPS.values(), ids=TRAPS)
def test_an_he_whose_pixel_size_cannot_be_believed_needs_the_column(size, message, tmp_path, core, monkeypatch):
    write_he(tmp_path / "he.ome.tif", core[0], size, **({"resolution": None} if size else {}))
    write_orion(tmp_path / "orion.ome.tif", core[1])
    with pytest.raises(InputError) as raised:
        run(listed(tmp_path, "A,he.ome.tif,orion.ome.tif"), *QUICK)
    assert message in str(raised.value)
    assert "column he_pixel_size_um" in str(raised.value)
    columns = "slide,he,orion,he_pixel_size_um"
    assert run(listed(tmp_path, "A,he.ome.tif,orion.ome.tif,0.325", columns=columns), *QUICK) == 0


def test_an_he_of_planes_whose_names_are_out_of_order_keeps_its_pixels(tmp_path, core):
    """The public release has planar, deflated H&E with channels called R, B, G over pixels in the order R, G, B."""
    meta = {"axes": "CYX", "Channel": {"Name": ["R", "B", "G"]}, **UM}
    planes = np.ascontiguousarray(core[0].transpose(2, 0, 1))
    options = {"photometric": "minisblack", "compression": "zlib", "tile": (128, 128), "ome": True}
    tifffile.imwrite(tmp_path / "he.ome.tif", planes, metadata=meta, **options)
    write_orion(tmp_path / "orion.ome.tif", core[1])
    assert run(listed(tmp_path, "A,he.ome.tif,orion.ome.tif"), *QUICK) == 0
    for row in rows_of(tmp_path):
        np.testing.assert_array_equal(stored(tmp_path, row)[0], core[0][place(row)])


def test_channels_that_the_list_removes_are_not_written(slides, tmp_path, core):
    lines = [f"{name},{'TRUE' if index in (1, 4) else ''}" for index, name in enumerate(MARKERS)]
    (tmp_path / "markers.csv").write_text("\n".join(["marker_name,remove", *lines]))
    assert run(slides, *QUICK, "--markers", str(tmp_path / "markers.csv")) == 0
    kept = [index for index in range(len(MARKERS)) if index not in (1, 4)]
    row = rows_of(tmp_path)[0]
    np.testing.assert_array_equal(stored(tmp_path, row)[1], core[1][kept].transpose(1, 2, 0)[place(row)])
    assert (tmp_path / "pairs" / "channel_names.txt").read_text().split("\n")[:-1] == [MARKERS[i] for i in kept]


def test_every_slide_at_fault_is_listed_and_the_others_go_on_when_asked(slides, tmp_path, core):
    blank = np.full((SIDE, SIDE, 3), 245, np.uint8)
    write_he(tmp_path / "blank.ome.tif", blank)
    write_orion(tmp_path / "few.ome.tif", core[1][:4], MARKERS[:4])
    listed(
        tmp_path, "A,he.ome.tif,orion.ome.tif", "B,nowhere.tif,orion.ome.tif", "C,blank.ome.tif,orion.ome.tif",
        "D,he.ome.tif,few.ome.tif", "E,orion.ome.tif,orion.ome.tif",
    )  # fmt: skip
    with pytest.raises(InputError) as raised:
        run(slides, *QUICK)
    for words in ("slide B: ", "slide C: ", "shows no tissue", "slide D: has another panel", "slide E: ", "--skip_bad"):
        assert words in str(raised.value)
    assert not (tmp_path / "pairs").exists()
    with pytest.raises(InputError, match="these slides failed, the others are done"):
        run(slides, *QUICK, "--skip_bad")
    assert {row["slide"] for row in rows_of(tmp_path)} == {"A"}


def write_pyramid(path, planes, shape, kind, about):
    """Two levels; returns offset and length of the tile at (row 1, column 1) of each, in the first page."""
    with tifffile.TiffWriter(path, ome=True) as file:
        file.write(planes, subifds=1, tile=(128, 128), metadata=about, **kind)
        file.write(np.ascontiguousarray(planes[shape]), subfiletype=1, tile=(128, 128), metadata=None, **kind)
    with tifffile.TiffFile(path) as file:
        pages = [level.pages[0].keyframe for level in file.series[0].levels]
        tiles = [SIDE // 128 + 1, SIDE // 256 + 1]
        return [(page.dataoffsets[at], page.databytecounts[at]) for page, at in zip(pages, tiles, strict=True)]


def damage(path, place):
    content = bytearray(path.read_bytes())
    content[place[0] : sum(place)] = b"\xff" * place[1]
    path.write_bytes(content)


def test_a_damaged_tile_is_named_with_its_level_and_place_and_everything_else_is_done(slides, tmp_path, core, capsys):
    kind = {"photometric": "minisblack", "compression": "deflate"}
    about = {"axes": "CYX", "Channel": {"Name": list(MARKERS)}, **UM}
    places = write_pyramid(tmp_path / "bad.ome.tif", core[1], np.s_[:, ::2, ::2], kind, about)
    damage(tmp_path / "bad.ome.tif", places[0])
    kind = {"photometric": "rgb", "compression": "deflate"}
    places = write_pyramid(tmp_path / "badhe.ome.tif", core[0], np.s_[::2, ::2], kind, {"axes": "YXS", **UM})
    damage(tmp_path / "badhe.ome.tif", places[1])
    listed(tmp_path, "A,he.ome.tif,orion.ome.tif", "B,he.ome.tif,bad.ome.tif", "C,badhe.ome.tif,orion.ome.tif")
    words = [str(slides), "--output_dir", str(tmp_path / "pairs"), *QUICK[:4], "--regions", "whole"]
    # Thumbnails of half the side, which are made from the second level.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("orion_unet.preparation.slide_plan.THUMBNAIL", SIDE // 2)
        assert run_command(dispatch, ["prepare", *words, "--region_size", "384"]) == 2
        said = capsys.readouterr().err
        assert "badhe.ome.tif: is damaged or truncated at level 1, row 128, column 128" in said
        assert "--skip_bad" in said and not (tmp_path / "pairs").exists()
        assert run_command(dispatch, ["prepare", *words, "--region_size", "384", "--skip_bad"]) == 2
    said = capsys.readouterr().err
    assert "slide C: " in said and "these slides failed, the others are done" in said
    assert "slide B: " in said and "bad.ome.tif: is damaged or truncated at level 0, row 128, column 128" in said
    rows = {(row["slide"], int(row["y"]), int(row["x"])): row for row in rows_of(tmp_path)}
    assert set(rows) == {(slide, y, x) for slide in "AB" for y in (0, 384) for x in (0, 384)}
    lost = {place for place, row in rows.items() if row["state"] != "kept"}
    assert lost == {("B", 0, 0)}
    assert "bad.ome.tif: is damaged or truncated at level 0" in rows["B", 0, 0]["reason"]
    assert "bad.ome.tif: is damaged" in (tmp_path / "pairs" / "rejected.csv").read_text()
    # Once the file is whole again, the lost region alone is prepared.
    assert not (tmp_path / "pairs" / f"{rows['B', 0, 0]['core']}_HE.npy").exists()


def test_nineteen_channels_listed_in_another_order_get_their_own_names_and_a_short_list_is_refused(tmp_path, core):
    write_he(tmp_path / "he.ome.tif", core[0])
    write_orion(tmp_path / "orion.ome.tif", core[1][:19], MARKERS[:19])
    order = np.random.default_rng(0).permutation(19)
    lines = [f"{index},{MARKERS[index]},1" for index in order]
    (tmp_path / "markers.csv").write_text("\n".join(["channel_number,marker_name,cycle_number", *lines]))
    slides = listed(tmp_path, "A,he.ome.tif,orion.ome.tif")
    assert run(slides, *QUICK, "--markers", str(tmp_path / "markers.csv")) == 0
    row = rows_of(tmp_path)[0]
    assert (tmp_path / "pairs" / "channel_names.txt").read_text().split() == [MARKERS[index] for index in order]
    np.testing.assert_array_equal(stored(tmp_path, row)[1], core[1][order].transpose(1, 2, 0)[place(row)])
    (tmp_path / "markers.csv").write_text("\n".join(["marker_name", "DNA", *MARKERS[1:18]]))
    with pytest.raises(InputError, match="has 19 channels, but its list of markers has 18"):
        run(slides, *QUICK, "--markers", str(tmp_path / "markers.csv"), "--overwrite")


def test_no_region_is_taken_from_under_a_pen_mark(tmp_path, core):
    he = core[0].copy()
    he[: SIDE // 2] = (30, 60, 190)
    write_he(tmp_path / "he.ome.tif", he)
    write_orion(tmp_path / "orion.ome.tif", core[1])
    slides = listed(tmp_path, "A,he.ome.tif,orion.ome.tif")
    assert run(slides, *QUICK[:4], "--region_size", "128") == 0
    assert len(rows_of(tmp_path)) >= 4 and min(int(row["y"]) for row in rows_of(tmp_path)) >= SIDE // 2 - 64


def test_a_section_is_no_microarray(slides):
    with pytest.raises(InputError, match=r"slide A: .*use --regions tissue for a section"):
        run(slides, *QUICK[:4], "--regions", "tma")


def test_a_killed_prepare_goes_on(slides, tmp_path):
    """Killed where the second region is half written: nothing is lost, and nothing half written is left."""
    code = (
        "import os, sys; from orion_unet.preparation import one_region, writing\n"
        "genuine = writing.write_npy\n"
        "def killed(path, shape, dtype, bands):\n"
        "    def half():\n"
        "        for band in bands:\n"
        "            yield band[:100]\n"
        "            os.kill(os.getpid(), 9)\n"
        "    genuine(path, shape, dtype, half() if 'r0002' in path.name else bands)\n"
        "one_region.write_npy = killed\n"
        "from orion_unet.cli.prepare import main; main(sys.argv[1:])"
    )
    words = [str(slides), "--output_dir", str(tmp_path / "pairs"), *QUICK]
    assert subprocess.run([sys.executable, "-c", code, *words], capture_output=True).returncode == -9
    pairs = tmp_path / "pairs"
    assert sorted(path.name for path in pairs.glob("*.npy")) == ["A_r0001_HE.npy", "A_r0001_ORION.npy"]
    with open(pairs / ".prepare" / "regions.jsonl", "a") as record:
        record.write('{"core": "A_r0002", "sl')
    first = (pairs / "A_r0001_HE.npy").stat().st_mtime_ns
    assert run(slides, *QUICK) == 0
    assert (pairs / "A_r0001_HE.npy").stat().st_mtime_ns == first
    assert len(rows_of(tmp_path)) == 2 and len(list(pairs.glob("*.npy"))) == 4
    assert not list(pairs.glob(".*.partial"))


def test_pairs_of_another_pixel_size_are_means_over_areas(slides, tmp_path, core):
    assert run(slides, *QUICK, "--pixel_size_um", "0.65", "--region_size", "128") == 0
    row = rows_of(tmp_path)[0]
    _, orion = stored(tmp_path, row)
    y, x = (round(float(row[name])) for name in ("y", "x"))
    source = core[1][:, y : y + 256, x : x + 256].reshape(-1, 128, 2, 128, 2).mean((2, 4))
    assert np.abs(orion.transpose(2, 0, 1) - source).max() <= 0.5
    assert json.loads((tmp_path / "pairs" / "dataset.json").read_text())["pixel_size_um"] == pytest.approx(0.65)


def test_pairs_as_ome_zarr_have_the_same_pixels_names_and_size(slides, tmp_path, core):
    pytest.importorskip("zarr")
    assert run(slides, *QUICK, "--format", "ome-zarr") == 0
    row = rows_of(tmp_path)[0]
    with open_markers(tmp_path / "pairs" / f"{row['core']}_ORION.ome.zarr") as image:
        assert image.channel_names == tuple(MARKERS)
        assert image.pixel_size_um == pytest.approx(0.325)
        found = image.read(range(len(MARKERS)), 0, 0, 256, 256)
    np.testing.assert_array_equal(found, core[1][(slice(None), *place(row))])


def test_the_overview_shows_the_same_details_whatever_the_format(slides, tmp_path):
    pytest.importorskip("zarr")
    pictures = []
    for form in ("npy", "ome-zarr"):
        words = [*QUICK[2:5], "256", "--regions_per_slide", "1", "--format", form, "--overwrite"]
        assert run(slides, "--register", "auto", *words) == 0
        pictures.append((tmp_path / "pairs" / "A_overview.png").read_bytes())
    assert pictures[0] == pictures[1]
    assert run(slides, *QUICK, "--overwrite") == 0
    heights = [
        int.from_bytes(png[20:24], "big") for png in (pictures[0], (tmp_path / "pairs" / "A_overview.png").read_bytes())
    ]
    assert heights[0] > heights[1]


def test_pairs_that_are_there_keep_the_names_of_their_channels_whichever_slide_comes_first(slides, tmp_path, core):
    swapped = [1, 0, *range(2, len(MARKERS))]
    write_orion(tmp_path / "other.ome.tif", core[1][swapped], [MARKERS[at] for at in swapped])
    assert run(slides, *QUICK) == 0
    listed(tmp_path, "B,he.ome.tif,other.ome.tif", "A,he.ome.tif,orion.ome.tif")
    assert run(slides, *QUICK) == 0
    assert (tmp_path / "pairs" / "channel_names.txt").read_text().splitlines() == list(MARKERS)
    rows = rows_of(tmp_path)
    assert {row["slide"] for row in rows} == {"A", "B"}
    for row in rows:
        np.testing.assert_array_equal(stored(tmp_path, row)[1], core[1].transpose(1, 2, 0)[place(row)])


def test_a_slide_of_the_same_name_in_another_call_is_opened_anew(monkeypatch, slides, tmp_path, core):
    write_orion(tmp_path / "other.ome.tif", core[1])
    seen = []
    monkeypatch.setattr(work, "prepare_region", lambda plan, region, options, he, orion: seen.append(orion.path.name))
    for call, name in (("one", "orion.ome.tif"), ("one", "orion.ome.tif"), ("two", "other.ome.tif")):
        slide = SimpleNamespace(name="A", he=tmp_path / "he.ome.tif", orion=tmp_path / name)
        work._try_region(SimpleNamespace(slide=slide), None, None, call)
    work._close_images()
    assert seen == ["orion.ome.tif", "orion.ome.tif", "other.ome.tif"]


def test_overwriting_removes_nothing_before_everything_is_known_to_be_usable(slides, tmp_path):
    assert run(slides, *QUICK) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "pairs").iterdir() if path.is_file()}
    listed(tmp_path, "A,he.ome.tif,orion.ome.tif", "B,nowhere.tif,orion.ome.tif")
    with pytest.raises(InputError, match="nowhere"):
        run(slides, *QUICK, "--overwrite")
    listed(tmp_path, "A,he.ome.tif,orion.ome.tif")
    assert run(slides, *QUICK[:4], "--region_size", "384", "--overwrite", "--dry_run") == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "pairs").iterdir() if path.is_file()} == before
    listed(tmp_path, "C,he.ome.tif,orion.ome.tif")
    assert run(slides, *QUICK, "--overwrite") == 0
    assert not [path for path in (tmp_path / "pairs").iterdir() if path.name.startswith("A_")]


def test_no_pair_is_left_without_its_row(slides, tmp_path, core):
    write_he(tmp_path / "second.ome.tif", core[0])
    listed(tmp_path, "A,he.ome.tif,orion.ome.tif", "B,second.ome.tif,orion.ome.tif")
    assert run(slides, *QUICK) == 0
    cores = {row["core"] for row in rows_of(tmp_path, "groups.csv")}
    listed(tmp_path, "A,he.ome.tif,orion.ome.tif")
    with pytest.raises(InputError, match=r"has pairs of slides that .*slides\.csv does not list: B"):
        run(slides, *QUICK)
    # A slide that cannot be reached any more is left out with --skip_bad; its pairs are there, and so are their rows.
    (tmp_path / "second.ome.tif").unlink()
    listed(tmp_path, "A,he.ome.tif,orion.ome.tif", "B,second.ome.tif,orion.ome.tif")
    with pytest.raises(InputError, match="these slides failed, the others are done"):
        run(slides, *QUICK, "--skip_bad")
    assert {row["core"] for row in rows_of(tmp_path, "groups.csv")} == cores
    table = find_pairs(DataOptions(pairs_dir=str(tmp_path / "pairs")))
    assert set(core_groups(table, None)) == {"A", "B"}


def test_a_chunk_replaced_inside_an_ome_zarr_slide_is_noticed(tmp_path, core):
    pytest.importorskip("zarr")
    write_he(tmp_path / "he.ome.tif", core[0])
    about = {"names": tuple(MARKERS), "pixel_size_um": 0.325}
    planes = core[1].transpose(1, 2, 0)
    write_zarr(tmp_path / "orion.ome.zarr", planes.shape, planes.dtype, iter([planes]), about)
    slides = listed(tmp_path, "A,he.ome.tif,orion.ome.zarr")
    assert run(slides, *QUICK) == 0
    before = (tmp_path / "pairs" / "dataset.json").stat().st_mtime_ns
    chunk = max(
        (path for path in (tmp_path / "orion.ome.zarr").rglob("*") if path.is_file()), key=lambda p: p.stat().st_size
    )
    chunk.write_bytes(chunk.read_bytes() + b"\0")
    with pytest.raises(InputError, match="were made of other files"):
        run(slides, *QUICK)
    assert (tmp_path / "pairs" / "dataset.json").stat().st_mtime_ns == before


def test_a_turned_cropped_he_with_a_fold_is_moved_where_it_fits_and_rejected_where_not(tmp_path, core):
    """The H&E is turned by 90 and 2 degrees, shifted, larger on one side and cropped on another; a region is folded."""
    he, orion = core
    folded = he.copy()
    folded[:384, :384] = he[:384, :384][::-1, ::-1]
    angle = np.radians(2.0)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    middle = (np.array(he.shape[:2]) - 1) / 2
    offset = middle - turn @ middle + (6.4, -9.3)
    moved = [ndimage.affine_transform(folded[..., c], turn, offset, order=3, mode="nearest") for c in range(3)]
    turned = np.pad(np.rot90(np.stack(moved, -1)), ((60, 0), (0, 0), (0, 0)), mode="edge")[:, 30:]
    write_he(tmp_path / "he.ome.tif", np.ascontiguousarray(turned), compression="lzw")
    write_orion(tmp_path / "orion.ome.tif", orion)
    slides = listed(tmp_path, "A,he.ome.tif,orion.ome.tif")
    assert run(slides, "--jobs", "1", "--regions", "whole", "--region_size", "384") == 0
    rows = rows_of(tmp_path)
    states = {(int(float(row["y"])) >= 350, int(float(row["x"])) >= 350): row for row in rows}
    assert len(rows) == 4
    assert states[False, False]["state"] == "rejected"
    assert rows_of(tmp_path, "rejected.csv")[0]["reason"]
    for row in rows:
        if row["state"] == "kept":
            written, markers = stored(tmp_path, row)
            np.testing.assert_array_equal(markers, orion.transpose(1, 2, 0)[place(row)])
            assert written.shape[:2] == markers.shape[:2]
            inner = np.s_[8:-8, 8:-8]
            expected = he[place(row)][inner].astype(float)
            assert np.corrcoef(written[inner].astype(float).ravel(), expected.ravel())[0, 1] > 0.97
            assert float(row["residual_px"]) < 0.5
    assert sum(row["state"] == "kept" for row in rows) == 3


def test_the_cores_of_a_turned_microarray_become_pairs_and_the_missing_one_is_listed(tmp_path):
    pitch, size = 256, 208
    he = np.full((3 * pitch, 3 * pitch, 3), 244, np.uint8)
    orion = np.full((len(MARKERS), 3 * pitch, 3 * pitch), 120, np.uint16)
    rows, columns = np.ogrid[:size, :size]
    disc = np.hypot(rows - (size - 1) / 2, columns - (size - 1) / 2) < size / 2 - 4
    for index in set(range(9)) - {5}:
        drawn, stained = draw_core(300 + index, size)
        at = (slice(y := 24 + pitch * (index // 3), y + size), slice(x := 24 + pitch * (index % 3), x + size))
        he[at][disc] = drawn[disc]
        orion[(slice(None), *at)][:, disc] = stained.transpose(2, 0, 1)[:, disc]
    write_he(tmp_path / "he.ome.tif", np.rot90(he))
    write_orion(tmp_path / "orion.ome.tif", orion)
    assert run(listed(tmp_path, "A,he.ome.tif,orion.ome.tif"), "--regions", "tma", "--jobs", "1") == 0
    found = rows_of(tmp_path)
    assert [row["core"][2:] for row in found] == ["A01", "A02", "A03", "B01", "B02", "C01", "C02", "C03"]
    assert all(row["state"] == "kept" and float(row["residual_95_px"]) < 0.5 for row in found)
    for row in found:
        written = stored(tmp_path, row)
        np.testing.assert_array_equal(written[1], orion.transpose(1, 2, 0)[place(row)])
        assert np.abs(written[0].astype(int) - he[place(row)]).mean() < 3  # stored as JPEG, turned back
    (missing,) = rows_of(tmp_path, "rejected.csv")
    assert missing == {"core": "A_B03", "slide": "A", "reason": "no core at this place of the lattice"}


def test_slides_of_different_tissue_are_refused_and_checking_rejects_what_is_off(slides, tmp_path, core):
    other, _ = draw_core(99, SIDE)
    write_he(tmp_path / "other.ome.tif", other)
    listed(tmp_path, "A,other.ome.tif,orion.ome.tif")
    with pytest.raises(InputError, match="are they the same tissue"):
        run(slides, "--jobs", "1")
    write_he(tmp_path / "he.ome.tif", np.roll(core[0], 5, axis=0))
    listed(tmp_path, "A,he.ome.tif,orion.ome.tif")
    with pytest.raises(InputError, match="no region could be kept"):
        run(slides, *QUICK[2:], "--register", "check", "--min_correlation", "-1")
    assert "off by 5" in rows_of(tmp_path, "rejected.csv")[0]["reason"]
