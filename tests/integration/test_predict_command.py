"""python -m orion_unet predict: images in, images out, in the unit of the training data."""

import csv
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import tifffile
import tiny_runs
from predictions import LOWER, NAMES, UPPER, WHITE, contents, image, predictor, write_checkpoint

import orion_unet
from orion_unet.data.stain import StainProfile, measure_stain
from orion_unet.data.zarr_writing import write_zarr
from orion_unet.inference.trust import MarkerTrust, write_scorecard
from orion_unet.inference.verdict_table import read_verdicts
from orion_unet.slides.images import ArrayImage


@pytest.fixture
def model(tmp_path):
    return write_checkpoint(tmp_path / "best.pt")


@pytest.fixture
def core(tmp_path):
    np.save(tmp_path / "core_HE.npy", image())
    return tmp_path / "core_HE.npy"


@pytest.fixture
def predict(model, tmp_path, capsys):
    return predictor(model, tmp_path, capsys)


def test_an_npy_holds_every_marker_in_the_unit_of_the_training_data(predict, core):
    plain, unit = predict(core, normalized=True, out="plain"), predict(core, out="unit")
    assert (plain.code, unit.code) == (0, 0)
    assert sorted(contents(unit.dir)) == ["channel_names.txt", "core.npy", "core_overview.png"]
    assert (unit.dir / "channel_names.txt").read_text().split() == list(NAMES)
    target, found = np.load(plain.dir / "core.npy"), np.load(unit.dir / "core.npy")
    assert found.dtype == np.float32
    assert found.shape == (3, 150, 170)
    assert 0 <= target.min() < target.max() <= 1
    expected = (LOWER + target.transpose(1, 2, 0) * (UPPER - LOWER)) * WHITE
    np.testing.assert_allclose(found.transpose(1, 2, 0), expected, rtol=1e-5)


def test_an_ome_zarr_alone_or_in_a_folder_is_predicted_like_the_npy(predict, core, tmp_path):
    pytest.importorskip("zarr")
    he = np.load(core)
    (tmp_path / "slides").mkdir()
    about = {"names": ("red", "green", "blue"), "pixel_size_um": None}
    write_zarr(tmp_path / "slides" / "core_HE.ome.zarr", he.shape, he.dtype, iter([he]), about)
    plain = predict(core, out="plain")
    for where, out in ((tmp_path / "slides", "folder"), (tmp_path / "slides" / "core_HE.ome.zarr", "alone")):
        made = predict(where, out=out)
        assert made.code == 0, made.err
        np.testing.assert_array_equal(np.load(made.dir / "core.npy"), np.load(plain.dir / "core.npy"))


def test_a_log_transform_is_inverted_too(predict, core, tmp_path):
    log = write_checkpoint(tmp_path / "log.pt", transform="log1p")
    target = np.load(predict(core, normalized=True, checkpoint=log, out="plain").dir / "core.npy")
    found = np.load(predict(core, checkpoint=log, out="unit").dir / "core.npy")
    curved = (101 ** target.transpose(1, 2, 0) - 1) / 100
    np.testing.assert_allclose(found.transpose(1, 2, 0), (LOWER + curved * (UPPER - LOWER)) * WHITE, rtol=1e-4)


def test_an_ome_tiff_holds_the_same_values_with_names_and_pixel_size(predict, core):
    tifffile = pytest.importorskip("tifffile")
    exact = np.load(predict(core, out="npy").dir / "core.npy")
    levels = predict(core, out="levels", format="ome-tiff", pixel_size_um=0.5)
    floats = predict(core, out="floats", format="ome-tiff", dtype="float32", pixel_size_um=0.5)
    assert "warning" not in levels.out
    assert sorted(contents(levels.dir)) == ["core.ome.tiff", "core_overview.png"]
    with tifffile.TiffFile(levels.dir / "core.ome.tiff") as tiff:
        assert all(f'Name="{name}"' in tiff.ome_metadata for name in NAMES)
        assert 'PhysicalSizeX="0.5"' in tiff.ome_metadata
        stored = tiff.asarray()
    assert stored.dtype == np.uint16
    # The white level of the data is 65535, so a level is a unit.
    assert np.abs(stored - exact).max() <= 0.51
    np.testing.assert_array_equal(tifffile.imread(floats.dir / "core.ome.tiff"), exact)


def test_an_unknown_pixel_size_is_a_warning_and_that_of_the_input_is_kept(predict, core, tmp_path):
    tifffile = pytest.importorskip("tifffile")
    done = predict(core, format="ome-tiff", out="unknown")
    assert done.code == 0
    assert "warning: core: its pixel size is unknown" in done.out
    tifffile.imwrite(tmp_path / "slide.tif", image(), resolution=(20000, 20000), resolutionunit="CENTIMETER")
    done = predict(tmp_path / "slide.tif", format="ome-tiff", out="known")
    assert "warning" not in done.out
    with tifffile.TiffFile(done.dir / "slide.ome.tiff") as tiff:
        assert 'PhysicalSizeX="0.5"' in tiff.ome_metadata


@pytest.mark.parametrize("form", ["npy", "ome-tiff"])
def test_a_pixel_size_that_is_no_length_is_unknown_and_said_once(form, predict, tmp_path):
    tifffile = pytest.importorskip("tifffile")
    metadata = {"axes": "YXS", "PhysicalSizeX": 1.0, "PhysicalSizeXUnit": "pixel"}
    tifffile.imwrite(tmp_path / "slide.ome.tif", image(), photometric="rgb", metadata=metadata)
    done = predict(tmp_path / "slide.ome.tif", format=form)
    assert done.code == 0
    assert [line for line in done.out.splitlines() if "warning" in line] == [
        "warning: slide: the pixel size of the file is not used (it states 1 pixel, which is no length); "
        "give --pixel_size_um"
    ]
    if form == "ome-tiff":
        with tifffile.TiffFile(done.dir / "slide.ome.tiff") as tiff:
            assert "PhysicalSizeX" not in tiff.ome_metadata
    given = predict(tmp_path / "slide.ome.tif", format=form, out="given", pixel_size_um=0.5)
    assert "warning" not in given.out


def test_the_same_pixels_give_the_same_prediction_from_every_kind_of_file(predict, core, tmp_path):
    tifffile = pytest.importorskip("tifffile")
    pillow = pytest.importorskip("PIL.Image")
    expected = np.load(predict(core).dir / "core.npy")
    pillow.fromarray(image()).save(tmp_path / "picture.png")
    tifffile.imwrite(tmp_path / "slide.ome.tif", image(), tile=(64, 64), compression="deflate", photometric="rgb")
    done = predict(tmp_path / "picture.png", tmp_path / "slide.ome.tif", out="others")
    assert done.code == 0
    for name in ("picture", "slide"):
        np.testing.assert_array_equal(np.load(done.dir / f"{name}.npy"), expected)


def test_a_slide_that_openslide_reads_is_predicted_like_the_array(predict, core, tmp_path):
    tifffile = pytest.importorskip("tifffile")
    pytest.importorskip("openslide", reason="the extra openslide is not installed", exc_type=ImportError)
    (tmp_path / "slides").mkdir()
    options = {"tile": (64, 64), "compression": "deflate", "photometric": "rgb", "metadata": None}
    tifffile.imwrite(tmp_path / "slides" / "slide.ndpi", image(), **options)
    done = predict(tmp_path / "slides", out="slides")
    assert done.code == 0
    np.testing.assert_array_equal(np.load(done.dir / "slide.npy"), np.load(predict(core).dir / "core.npy"))


def test_the_python_interface_gives_what_the_command_writes(predict, core, model):
    trained = orion_unet.load_model(model)
    expected = np.load(predict(core).dir / "core.npy")
    np.testing.assert_array_equal(orion_unet.predict(image(), trained), expected)
    np.testing.assert_array_equal(orion_unet.predict(image().transpose(2, 0, 1), trained), expected)
    np.testing.assert_allclose(orion_unet.predict(image() / 255, trained), expected, rtol=1e-4)
    assert orion_unet.predict(image(), trained, normalized=True).max() <= 1


def test_the_python_interface_is_there_without_loading_torch_or_numpy():
    script = (
        "import sys, orion_unet; assert {'predict', 'load_model'} <= set(dir(orion_unet));"
        "print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tiny_runs.ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "False"]
    with pytest.raises(AttributeError, match="no attribute 'forecast'"):
        _ = orion_unet.forecast


def test_markers_are_chosen_by_name_in_the_order_given(predict, core):
    whole = np.load(predict(core, out="whole").dir / "core.npy")
    done = predict(core, out="some", markers="Blank,Hoechst")
    np.testing.assert_array_equal(np.load(done.dir / "core.npy"), whole[[2, 0]])
    assert (done.dir / "channel_names.txt").read_text() == "Blank\nHoechst\n"


def test_of_a_folder_of_pairs_the_stains_are_predicted(predict, core, tmp_path):
    folder = tmp_path / "pairs"
    folder.mkdir()
    for name in ("a_HE.npy", "b_HE.npy", "a_ORION.npy", ".hidden_HE.npy", "other.npy"):
        shutil.copy(core, folder / name)
    done = predict(folder, overview=False)
    assert done.code == 0
    assert sorted(contents(done.dir)) == ["a.npy", "b.npy", "channel_names.txt"]
    (folder / "a_HE.npy").unlink()
    (folder / "b_HE.npy").unlink()
    assert "other.npy" in contents(predict(folder, out="second").dir)


def test_glass_of_a_slide_is_background_unless_asked_for(predict, tmp_path):
    tifffile = pytest.importorskip("tifffile")
    slide = np.full((100, 900, 3), 240, np.uint8)
    slide[:, :60] = image(100, 60) // 2
    tifffile.imwrite(tmp_path / "slide.tif", slide, photometric="rgb")
    options = {"normalized": True, "tile": 64, "overlap": 16}
    skipped = np.load(predict(tmp_path / "slide.tif", out="a", **options).dir / "slide.npy")
    everything = np.load(predict(tmp_path / "slide.tif", out="b", tissue_only=False, **options).dir / "slide.npy")
    assert (skipped[:, :, 200:] == 0).all()
    assert (everything[:, :, 200:] > 0).all()
    np.testing.assert_array_equal(skipped[:, :, :40], everything[:, :, :40])


def test_existing_outputs_are_refused_before_any_work_and_replaced_on_request(predict, core, tmp_path):
    shutil.copy(core, tmp_path / "new_HE.npy")
    first = predict(core)
    before = contents(first.dir)
    again = predict(tmp_path / "new_HE.npy", core)
    assert again.code == 2
    assert "core.npy" in again.err
    assert "--overwrite" in again.err
    assert contents(first.dir) == before
    assert predict(core, overwrite=True, normalized=True).code == 0
    assert np.load(first.dir / "core.npy").max() <= 1


def test_names_of_other_markers_are_not_replaced_unasked(predict, core, tmp_path):
    shutil.copy(core, tmp_path / "new_HE.npy")
    predict(core)
    done = predict(tmp_path / "new_HE.npy", markers="CD3e")
    assert done.code == 2
    assert "channel_names.txt (of other markers)" in done.err


def test_an_output_never_replaces_an_input(predict, core, tmp_path):
    source = tmp_path / "plain.npy"
    shutil.copy(core, source)
    done = predict(source, out=".", overwrite=True)
    assert done.code == 2
    assert "is an input, and would be replaced" in done.err
    np.testing.assert_array_equal(np.load(source), image())


def test_a_slide_found_damaged_halfway_leaves_nothing_behind(predict, tmp_path):
    tifffile = pytest.importorskip("tifffile")
    path = tmp_path / "slide.tif"
    tifffile.imwrite(path, image(300, 64), tile=(64, 64), compression="deflate", photometric="rgb")
    with tifffile.TiffFile(path) as tiff:
        start, count = tiff.pages[0].dataoffsets[-1], tiff.pages[0].databytecounts[-1]
    content = bytearray(path.read_bytes())
    content[start : start + count] = bytes(count)
    path.write_bytes(content)
    done = predict(path, tile=48, overlap=16)
    assert done.code == 2
    assert "slide.tif: is damaged or truncated at level 0, row 256" in done.err
    assert sorted(contents(done.dir)) == ["channel_names.txt"]


WRITING = [("tifffile", "tifffile"), ("imagecodecs", "imagecodecs"), ("skimage.color", "scikit-image")]
READING = [("slide.tif", *WRITING[0]), ("slide.svs", *WRITING[1]), ("picture.png", "PIL.Image", "pillow")]


@pytest.mark.parametrize(("module", "package"), WRITING)
def test_a_package_that_an_ome_tiff_needs_is_missed_before_any_work(module, package, predict, core, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    done = predict(core, format="ome-tiff")
    assert done.code == 2
    assert f'the package {package} is needed for this: pip install "orion-unet[inference]"' in done.err
    assert not done.dir.exists()
    assert predict(core, overview=False).code == 0


@pytest.mark.parametrize(("name", "module", "package"), READING)
def test_a_package_that_an_input_needs_is_missed_before_any_work(
    name, module, package, predict, core, tmp_path, monkeypatch
):
    (tmp_path / name).write_bytes(b"not looked at")
    monkeypatch.setitem(sys.modules, module, None)
    done = predict(core, tmp_path / name)
    assert done.code == 2
    assert f'the package {package} is needed for this: pip install "orion-unet[inference]"' in done.err
    assert not done.dir.exists()


def test_two_inputs_with_one_name_are_refused(predict, core, tmp_path):
    (tmp_path / "b").mkdir()
    shutil.copy(core, tmp_path / "b" / "core.npy")
    done = predict(core, tmp_path / "b" / "core.npy")
    assert done.code == 2
    assert "both would become core" in done.err


def test_an_image_that_cannot_be_read_does_not_stop_the_others_and_is_tried_again(predict, core, tmp_path):
    bad = tmp_path / "bad_HE.npy"
    bad.write_bytes(core.read_bytes()[:1000])
    shutil.copy(core, tmp_path / "zero_HE.npy")
    inputs = (core, bad, tmp_path / "zero_HE.npy")
    done = predict(*inputs)
    assert done.code == 2
    assert f"error: {bad}" in done.err
    assert {"core.npy", "zero.npy"} <= contents(done.dir).keys()
    assert not [name for name in contents(done.dir) if "bad" in name]
    before = (done.dir / "core.npy").stat().st_mtime_ns
    shutil.copy(core, bad)
    again = predict(*inputs)
    assert again.code == 0, again.err
    assert "2 of 3 images were finished before" in again.out
    assert (done.dir / "core.npy").stat().st_mtime_ns == before
    assert not [name for name in contents(done.dir) if name.startswith(".")]
    # Nothing is left to go on with: now they exist.
    assert predict(*inputs).code == 2


def test_escapes_in_names_are_shown_as_such_and_stay_in_the_files(tmp_path, capsys):
    hostile = ("Hoe\x1b[31mchst", "CD\u202e3\x07", "Blank")
    checkpoint = write_checkpoint(tmp_path / "best.pt", names=hostile)
    np.save(tmp_path / "co\x1b[2Jre_HE.npy", image(40, 40))
    np.save(tmp_path / "b\x1b[2Jad_HE.npy", image(40, 40).astype(np.int32))
    predict = predictor(checkpoint, tmp_path, capsys)
    done = predict(tmp_path / "co\x1b[2Jre_HE.npy", tmp_path / "b\x1b[2Jad_HE.npy")
    wrong = predict(tmp_path / "co\x1b[2Jre_HE.npy", markers="CD\x1b[0m99", out="wrong")
    assert (done.code, wrong.code) == (2, 2)
    said = done.out + done.err + wrong.out + wrong.err
    assert not {letter for letter in said if not letter.isprintable()} - {"\n"}
    assert "co\\x1b[2Jre.npy: 40 x 40 pixels" in done.out
    assert "b\\x1b[2Jad_HE.npy: has dtype int32" in done.err
    assert "no marker CD\\x1b[0m99; the model predicts Hoe\\x1b[31mchst, CD\\u202e3\\x07, Blank" in wrong.err
    assert (done.dir / "channel_names.txt").read_text(encoding="utf-8").split("\n") == [*hostile, ""]


BAD_OPTIONS = [
    ({"markers": "CD3e,CD99"}, "--markers CD3e,CD99: no marker CD99; the model predicts Hoechst, CD3e, Blank"),
    ({"markers": ","}, "--markers ,:"),
    ({"markers": "CD3e,CD3e"}, "once"),
    ({"tile": 30}, "--tile 30: must be a multiple of 4"),
    ({"overlap": 6}, "--overlap 6: must be a multiple of 4"),
    ({"batch_size": 0}, "--batch_size 0: must be at least 1"),
    ({"pixel_size_um": -1}, "--pixel_size_um -1.0: must be above 0"),
    ({"device": "tpu"}, "--device tpu"),
    ({"format": "jpg"}, "--format"),
    ({"dtype": "float32"}, "--dtype float32: is for --format ome-tiff"),
]


@pytest.mark.parametrize(("options", "words"), BAD_OPTIONS, ids=[next(iter(options)) for options, _ in BAD_OPTIONS])
def test_a_bad_option_is_one_sentence(options, words, predict, core):
    done = predict(core, **options)
    assert done.code == 2
    assert words in done.err
    assert not done.dir.exists()


def test_a_bad_checkpoint_or_input_is_one_sentence(predict, core, tmp_path):
    (tmp_path / "junk.pt").write_bytes(b"junk")
    (tmp_path / "empty").mkdir()
    cases = [
        (predict(core, checkpoint=tmp_path / "junk.pt"), "junk.pt: is damaged or not a checkpoint"),
        (predict(core, checkpoint=tmp_path / "none.pt"), "none.pt: cannot be read"),
        (predict(tmp_path / "none.npy"), "none.npy: does not exist"),
        (predict(tmp_path / "empty"), "empty: contains no image"),
        (predict(tmp_path / "junk.pt"), "junk.pt: cannot be read; use .npy"),
    ]
    for done, words in cases:
        assert done.code == 2
        assert words in done.err
        assert "Traceback" not in done.err


def test_progress_off_a_terminal_is_a_line_an_image(predict, core):
    lines = predict(core).out.splitlines()
    assert len(lines) == 5
    assert lines[2].startswith("no verdict on the markers")
    assert lines[3] == "note: the checkpoint does not keep the stain of its training"
    assert lines[-1].startswith("core.npy: 170 x 150 pixels, 3 markers, ")
    assert all(len(line) <= 80 or "best.pt" in line or "scorecard.json" in line for line in lines)


TRUST = {
    "Hoechst": MarkerTrust(0.9, 0.8, 0.95, 0.7, "supported"),
    "CD3e": MarkerTrust(0.1, -0.1, 0.3, 0.2, "not supported"),
}
VERDICTS = {
    "Hoechst": "supported: Pearson 0.900, 95 % interval 0.800 to 0.950; regression from colours 0.700",
    "CD3e": "not supported: Pearson 0.100, 95 % interval -0.100 to 0.300; regression from colours 0.200",
    "Blank": "not judged",
}


def test_an_ome_tiff_and_a_table_carry_the_verdict_on_every_marker(predict, core, model):
    write_scorecard(model, TRUST, {"command": "evaluate"})
    made = predict(core, format="ome-tiff")
    assert made.code == 0
    said = " ".join(made.out.split())
    assert "On held-out tissue supported: Hoechst; not supported: CD3e; not judged: Blank" in said
    with tifffile.TiffFile(made.dir / "core.ome.tiff") as tiff:
        root = ElementTree.fromstring(tiff.ome_metadata)
        assert tiff.series[0].shape[0] == 3
    of = "{http://www.openmicroscopy.org/Schemas/OME/2016-06}"
    annotation = root.find(f"{of}StructuredAnnotations/{of}MapAnnotation")
    assert annotation.get("Namespace") == "orion-unet/held-out-tissue"
    assert {pair.get("K"): pair.text for pair in annotation.iter(f"{of}M")} == VERDICTS
    rows = (made.dir / "marker_verdicts.csv").read_text().splitlines()
    assert rows[0] == "marker,verdict,pearson,pearson_low,pearson_high,regression_pearson"
    assert rows[1:] == [
        "Hoechst,supported,0.9,0.8,0.95,0.7",
        "CD3e,not supported,0.1,-0.1,0.3,0.2",
        "Blank,not judged,,,,",
    ]


def test_the_table_of_verdicts_has_all_markers_of_the_model_whichever_are_written(predict, core, model, tmp_path):
    write_scorecard(model, TRUST, {})
    assert predict(core, markers="CD3e", format="ome-tiff").code == 0
    np.save(tmp_path / "second_HE.npy", np.load(core))
    made = predict(tmp_path / "second_HE.npy", markers="Hoechst", format="ome-tiff")
    assert made.code == 0, made.err
    assert set(read_verdicts(made.dir)) == set(NAMES)


def stain_near(he, groups=12):
    """The document of a training whose cores are stained like an H&E, give or take a tenth."""
    values = measure_stain(ArrayImage(Path("he"), lambda: he))
    values = values + np.random.default_rng(0).normal(0, 0.1, (groups, len(values)))
    return StainProfile(values, tuple(map(str, range(groups)))).document()


def test_an_image_of_a_foreign_stain_is_warned_of_with_its_number(predict, core, tmp_path):
    pale = np.load(core)
    np.save(tmp_path / "pale_HE.npy", 255 - (255 - pale) // 4)
    np.save(tmp_path / "glass_HE.npy", np.full_like(pale, 240))
    known = write_checkpoint(tmp_path / "known.pt", stain=stain_near(pale))
    made = predict(core, tmp_path / "pale_HE.npy", tmp_path / "glass_HE.npy", checkpoint=known, format="ome-tiff")
    assert made.code == 0, made.err
    warnings = [line for line in made.out.splitlines() if "stain" in line]
    assert len(warnings) == 1
    assert warnings[0].startswith("warning: pale: H&E stain outside that of the training (distance ")
    with open(made.dir / "image_stain.csv", newline="") as file:
        rows = {row["image"]: row for row in csv.DictReader(file)}
    assert {name: row["stain"] for name, row in rows.items()} == {
        "core": "within", "pale": "outside", "glass": "not judged",
    }  # fmt: skip
    assert float(rows["pale"]["stain_distance"]) > float(rows["pale"]["stain_limit"])
    assert rows["glass"]["stain_distance"] == ""
    for name, start in (("core", "H&E stain within"), ("pale", "H&E stain outside"), ("glass", "H&E stain not judged")):
        with tifffile.TiffFile(made.dir / f"{name}.ome.tiff") as tiff:
            root = ElementTree.fromstring(tiff.ome_metadata)
        pairs = {pair.get("K"): pair.text for pair in root.iter() if pair.tag.endswith("}M")}
        assert pairs["H&E stain"].startswith(start)


def test_a_table_that_predict_did_not_write_is_found_before_any_work(predict, core, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "image_stain.csv").write_text("image,colour\n")
    made = predict(core)
    assert made.code == 2
    assert "is not a table that predict wrote" in made.err
    assert not (made.dir / "core.npy").exists()


def test_a_damaged_stain_in_a_checkpoint_is_refused(predict, core, tmp_path):
    made = predict(core, checkpoint=write_checkpoint(tmp_path / "bad.pt", stain={"values": 3}))
    assert made.code == 2
    assert "bad.pt: the stain of the training is damaged" in made.err


def test_without_a_scorecard_predict_says_so_in_one_line_and_claims_nothing(predict, core):
    made = predict(core, format="ome-tiff")
    assert [line for line in made.out.splitlines() if line.startswith("no verdict on the markers")]
    assert not (made.dir / "marker_verdicts.csv").exists()
    with tifffile.TiffFile(made.dir / "core.ome.tiff") as tiff:
        assert "MapAnnotation" not in tiff.ome_metadata


def test_a_table_of_another_scorecard_is_not_replaced_unasked(predict, core, model):
    write_scorecard(model, TRUST, {})
    assert predict(core, out="one").code == 0
    (core.parent / "one" / "core.npy").unlink()
    (core.parent / "one" / "core_overview.png").unlink()
    write_scorecard(model, {**TRUST, "CD3e": TRUST["Hoechst"]}, {})
    made = predict(core, out="one")
    assert made.code == 2
    assert "marker_verdicts.csv (of another scorecard)" in made.err


def test_the_verdicts_of_an_earlier_model_do_not_stay_beside_a_prediction_without_any(predict, core, model):
    card = write_scorecard(model, TRUST, {})
    assert predict(core, out="one").code == 0
    card.unlink()
    made = predict(core, out="one")
    assert made.code == 2
    assert "marker_verdicts.csv (of another scorecard)" in made.err
    assert predict(core, out="one", overwrite=True).code == 0
    assert not (made.dir / "marker_verdicts.csv").exists()
