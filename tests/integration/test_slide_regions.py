"""Pairs that stay in their slides: the pixels, crops and runs of written pairs, and every way to break them."""

import csv
import json
import shutil

import numpy as np
import pytest
from pair_formats import write_zarr
from tiny_runs import differing, losses, weights

from orion_unet.__main__ import dispatch
from orion_unet.cli import check_data, evaluate, pack, prepare
from orion_unet.cli.arguments import run_command
from orion_unet.config import DataOptions
from orion_unet.data import file_states, measured
from orion_unet.data.digests import core_digests
from orion_unet.data.pairs import find_pairs
from orion_unet.data.patches import PatchPlace, PatchReader
from orion_unet.data.scale import measure_scales
from orion_unet.data.slide_files import write_slide_files
from orion_unet.demo.make import MARKERS, draw_core
from orion_unet.errors import InputError
from orion_unet.slides.remote import input_path
from orion_unet.slides.tiles import TileCache, TiledArray

pytestmark = pytest.mark.slow

tifffile = pytest.importorskip("tifffile")
pytest.importorskip("zarr")
ndimage = pytest.importorskip("scipy.ndimage")
SIDE, FINER = 384, 1.2
KEPT = [0, 2, 3, 5]
UM = {"PhysicalSizeX": 0.325, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": 0.325, "PhysicalSizeYUnit": "µm"}


def bent(he):
    """The H&E with smaller pixels, turned by 3 degrees, shifted, and bent by some pixels."""
    rows, columns = np.mgrid[: round(SIDE * FINER), : round(SIDE * FINER)] / FINER
    angle, middle = np.radians(3.0), (SIDE - 1) / 2
    down, right = rows - middle, columns - middle
    y = np.cos(angle) * down - np.sin(angle) * right + middle + 5.3 + 2.5 * np.sin(columns / 60)
    x = np.sin(angle) * down + np.cos(angle) * right + middle - 8.1 + 2.5 * np.cos(rows / 70)
    return np.stack([ndimage.map_coordinates(he[..., c], (y, x), order=1, mode="nearest") for c in range(3)], -1)


@pytest.fixture(scope="module", autouse=True)
def coarse_pictures():
    """Drawing takes longer than all the rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("orion_unet.preparation.slide_overview.DPI", 30)
        patch.setattr("orion_unet.evaluation.figures._png", lambda figure: b"")
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with two slides: slide A in tiled TIFF, B as .npy and OME-Zarr; prepared as .npy and as regions."""
    folder = tmp_path_factory.mktemp("made")
    slides = folder / "slides"
    slides.mkdir()
    he, orion = draw_core(5, SIDE)
    tiled = {"tile": (128, 128), "ome": True}
    size = {name: value / FINER if isinstance(value, float) else value for name, value in UM.items()}
    about = {"axes": "YXS", **size}
    tifffile.imwrite(slides / "A_he.tif", bent(he), photometric="rgb", compression="jpeg", metadata=about, **tiled)
    planes = np.ascontiguousarray(orion.transpose(2, 0, 1))
    about = {"axes": "CYX", "Channel": {"Name": list(MARKERS)}, **UM}
    tifffile.imwrite(
        slides / "A_orion.tif", planes, photometric="minisblack", compression="zstd", metadata=about, **tiled
    )
    he, orion = draw_core(6, 300)
    np.save(slides / "B_he.npy", he)
    write_zarr(slides / "B_orion.zarr", orion, shards=True, chunk=64)
    rows = ["A,A_he.tif,A_orion.tif,,", "B,B_he.npy,B_orion.zarr,0.325,0.325", ""]
    (slides / "slides.csv").write_text("\n".join(["slide,he,orion,he_pixel_size_um,orion_pixel_size_um", *rows]))
    lines = [f"{name},{'' if index in KEPT else 'TRUE'}" for index, name in enumerate(MARKERS)]
    (slides / "markers.csv").write_text("\n".join(["marker_name,remove", *lines]))
    for name, form in (("written", "npy"), ("regions", "none")):
        assert prepared(folder, folder / name, "--format", form) == 0
    return folder


def prepared(folder, output, *words):
    slides = folder / "slides"
    return prepare.main([
        str(slides / "slides.csv"), "--output_dir", str(output), "--jobs", "1", "--markers",
        str(slides / "markers.csv"), "--regions", "whole", "--region_size", "256", *words,
    ])  # fmt: skip


@pytest.fixture
def regions(made, tmp_path):
    """A copy of the regions and of their slides, to be changed."""
    for name in ("slides", "regions"):
        shutil.copytree(made / name, tmp_path / name)
    return tmp_path / "regions"


def opened(folder, **options):
    return find_pairs(DataOptions(pairs_dir=str(folder), patch_size=32, **options))


def refusal(folder, **options):
    with pytest.raises(InputError) as caught:
        opened(folder, **options)
    return str(caught.value)


def test_packed_regions_are_the_written_pairs_byte_for_byte(made, tmp_path):
    written, regions, packed = made / "written", made / "regions", tmp_path / "packed"
    names = {path.name for path in written.glob("*.npy")}
    assert len(names) >= 8
    fields = [json.loads(path.read_text())["field"] for path in regions.glob("A_*_HE.region.json")]
    assert any(np.abs(field["nodes"]).max() > 0.5 for field in fields)
    assert pack.main([str(regions), "--output_dir", str(packed), "--patch_size", "32"]) == 0
    assert {path.name for path in packed.glob("*.npy")} == names
    for name in (*names, "channel_names.txt", "groups.csv"):
        assert (packed / name).read_bytes() == (written / name).read_bytes(), name
    for name in ("regions.csv", "rejected.csv"):
        assert (regions / name).read_bytes() == (written / name).read_bytes()
    # With the same details before and after the registration.
    assert (regions / "A_overview.png").read_bytes() == (written / "A_overview.png").read_bytes()
    # Nothing but text and the overviews.
    assert not [path for path in regions.iterdir() if path.suffix in (".npy", ".zarr", ".tif")]


@pytest.mark.parametrize("cache_bytes", [0, 150_000, 100_000_000])
def test_any_crop_has_the_pixels_of_the_written_pair(made, cache_bytes):
    tables = [opened(made / name, exclude_channels="1") for name in ("written", "regions")]
    readers = [PatchReader(table, measure_scales(table, False), 32, cache_bytes) for table in tables]
    rng = np.random.default_rng(0)
    places = []
    for core in range(len(tables[0])):
        height, width, _ = tables[0].shape(core, "he")
        for y, x in (rng.random((6, 2)) * (height - 31, width - 31)).astype(int).tolist():
            places.append(PatchPlace(core, y, x))
    for place in places:
        expected, found = (reader.tissue_fraction(place.core, place.y, place.x) for reader in readers)
        assert found == expected
    for one in [places[at : at + 4] for at in rng.permutation(len(places) - 4)[:8]]:
        expected, found = (reader.read(one) for reader in readers)
        np.testing.assert_array_equal(found.he.numpy(), expected.he.numpy())
        # Markers of slides come channel by channel; those that are not kept are not read.
        markers = found.orion.numpy().transpose(0, 2, 3, 1)
        np.testing.assert_array_equal(markers[..., [0, 2, 3]], expected.orion.numpy()[..., [0, 2, 3]])


def test_everything_that_reads_pairs_finds_the_same_numbers(made):
    written, regions = (opened(made / name) for name in ("written", "regions"))
    assert regions.kept_names == written.kept_names == tuple(MARKERS[index] for index in KEPT)
    assert regions.pixel_size_um == pytest.approx(0.325)
    assert core_digests(regions, range(len(regions))) == core_digests(written, range(len(written)))
    for core in range(len(written)):
        rows = np.array([200, 3, 120, 63, 64, 3]) % written.shape(core, "orion")[0]
        np.testing.assert_array_equal(regions.marker_rows(core, rows, [3, 1]), written.marker_rows(core, rows, [3, 1]))
        for modality in ("he", "orion"):
            stored, expected = regions.image(core, modality), np.asarray(written.image(core, modality))
            assert isinstance(stored, TiledArray)
            np.testing.assert_array_equal(np.asarray(stored), expected)
            np.testing.assert_array_equal(stored[5:90, 7:70, 1:3], expected[5:90, 7:70, 1:3])


def test_regions_of_a_slide_share_its_tiles_and_only_kept_channels_are_decoded(made):
    table, cache = opened(made / "regions"), TileCache(1 << 28)
    cores = [core for core, name in enumerate(table.names.tolist()) if name.startswith("A")]
    for core in cores[:2]:
        table.open(core, "orion", cache).read(100, 100, 100, 100, [0, 2])
    assert {place[1] for _, place in cache.kept} == {KEPT[0], KEPT[2]}
    assert len({owner for owner, _ in cache.kept}) == 1
    first, _ = (table.open(core, "orion", cache) for core in cores[:2])
    decoded = cache.decoded_bytes
    first.read(110, 110, 50, 50, [2])
    assert cache.decoded_bytes == decoded


OPTIONS = {"epochs": 2, "exclude_channels": "1", "mixed_cores": 2, "patches_per_image": 3}


def assert_same_run(found, expected):
    assert losses(found) == losses(expected)
    assert differing(weights(found), weights(expected)) == []


def test_a_run_from_slides_is_the_same_to_the_last_bit_and_so_it_is_resumed(made, train, killed_in_epoch_2):
    npy = train("npy", pairs_dir=str(made / "written"), **OPTIONS)
    assert npy.code == 0
    regions = {"pairs_dir": str(made / "regions"), **OPTIONS}
    # A loader process, and a cache that has room for hardly a tile, change nothing.
    run = train("regions", num_workers=1, cache_mb=0.05, **regions)
    assert run.code == 0
    assert_same_run(run.dir, npy.dir)
    with killed_in_epoch_2():
        train("resumed", **regions)
    resumed = train("resumed", resume="auto", **regions)
    assert resumed.code == 0
    assert_same_run(resumed.dir, npy.dir)


def test_check_data_and_evaluate_say_the_same_of_them(made, train, tmp_path, capsys):
    train("run", pairs_dir=str(made / "written"), epochs=1)
    looked, scores = [], []
    for name in ("written", "regions"):
        capsys.readouterr()
        assert check_data.main([str(made / name), "--json", "--patch_size", "64"]) == 0
        looked.append(json.loads(capsys.readouterr().out))
        words = ["--checkpoint", tmp_path / "run", "--pairs_dir", made / name, "--output_dir", tmp_path / name]
        assert evaluate.main([*map(str, words), "--split", "val", "--device", "cpu"]) == 0
        scores.append((tmp_path / name / "scores.csv").read_text())
    assert looked[0]["cores"] == looked[1]["cores"]
    assert looked[0]["channels"] == looked[1]["channels"]
    assert scores[0] == scores[1]


def test_a_finished_prepare_does_nothing_and_an_interrupted_one_goes_on(made, tmp_path, monkeypatch, capsys):
    from orion_unet.preparation import prepare as module

    for name in ("slides", "regions"):
        shutil.copytree(made / name, tmp_path / name)
    # The copies have other paths, so the folder is prepared anew.
    options = ("--format", "none", "--register", "off", "--overwrite")
    genuine, calls = module.prepare_region, []

    def counted(plan, region, *rest):
        calls.append(region.core)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return genuine(plan, region, *rest)

    monkeypatch.setattr(module, "prepare_region", counted)
    with pytest.raises(KeyboardInterrupt):
        prepared(tmp_path, tmp_path / "regions", *options)
    regions = tmp_path / "regions"
    assert len(list(regions.glob("*.region.json"))) == 4
    first = (regions / "A_r0001_HE.region.json").stat().st_mtime_ns
    assert prepared(tmp_path, regions, *options[:-1]) == 0
    assert calls[2] == calls[3] and len(calls) == len(set(calls)) + 1
    monkeypatch.setattr(module, "plan_slide", None)
    # The list of slides is there before the first region is.
    assert "B_orion.zarr" in (regions / "slide_files.csv").read_text()
    (regions / "A_r0002_ORION.region.json").unlink()
    assert prepared(tmp_path, regions, *options[:-1]) == 0
    assert calls[-1] == "A_r0002" and len(calls) == len(set(calls)) + 2
    assert (regions / "A_r0001_HE.region.json").stat().st_mtime_ns == first
    assert "4 of them before" in capsys.readouterr().out
    assert len(opened(regions)) == 5


def test_a_dry_run_knows_how_small_it_is_and_resampled_markers_are_refused(made, tmp_path, capsys):
    assert prepared(made, tmp_path / "pairs", "--format", "none", "--dry_run") == 0
    assert "would make 5 pairs of 4 markers" in (said := capsys.readouterr().out)
    assert float(said.partition("pairs, ")[2].split(" MB")[0]) < 0.2 and not (tmp_path / "pairs").exists()
    with pytest.raises(InputError, match=r"--pixel_size_um 0\.65: .* and --format none resamples no markers"):
        prepared(made, tmp_path / "pairs", "--format", "none", "--pixel_size_um", "0.65", "--register", "off")


def edit(path, change):
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def edit_files(folder, change):
    """Change the rows of slide_files.csv."""
    with open(folder / "slide_files.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        change(row)
    with open(folder / "slide_files.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def test_the_folder_survives_moving_it_with_its_slides_and_moving_these_alone(made, regions, tmp_path):
    expected = np.asarray(opened(made / "written").image(0, "he"))
    np.testing.assert_array_equal(np.asarray(opened(regions).image(0, "he")), expected)
    (tmp_path / "elsewhere").mkdir()
    for path in (tmp_path / "slides").iterdir():
        path.rename(tmp_path / "elsewhere" / path.name)
    said = refusal(regions)
    assert said.count("A_he.tif cannot be read (No such file or directory)") == 1
    assert f"slide A: {regions}/../slides/A_he.tif" in said and f"correct {regions}/slide_files.csv" in said
    where = tmp_path / "elsewhere"
    edit_files(
        regions, lambda row: row.update({name: str(where / row[name].split("/")[-1]) for name in ("he", "orion")})
    )
    np.testing.assert_array_equal(np.asarray(opened(regions).image(0, "he")), expected)


def test_a_slide_that_was_changed_is_named_and_measurements_of_it_are_not_used(regions, tmp_path, monkeypatch):
    table = opened(regions)
    path = regions / "A_r0001_HE.region.json"
    before = measured.file_state(path)
    assert measured.file_state(path) == before
    with open(tmp_path / "slides" / "A_he.tif", "r+b") as file:
        file.seek(-100, 2)
        file.write(b"\x55")
    assert measured.file_state(path) != before
    said = refusal(regions)
    assert said.count("A_he.tif is not the file that the pairs were made from") == 1
    assert "slide A: " in said and "slide_files.csv" in said
    with pytest.raises(InputError, match=r"slide A: .*is not the file"):
        table.open(0, "he")
    chunk = next((tmp_path / "slides" / "B_orion.zarr" / "0" / "c").rglob("*/*/0"))
    chunk.write_bytes(chunk.read_bytes()[:-1])
    # Another process would not know how it was.
    monkeypatch.setattr(file_states, "_RECENT", {})
    assert "slide B: " in refusal(regions)


def test_a_list_of_slides_that_cannot_be_used_is_named(regions):
    listed = regions / "slide_files.csv"
    content = listed.read_text()
    listed.write_text("".join(line for line in content.splitlines(True) if not line.startswith("B")))
    assert f"{listed}: does not list slide B" in refusal(regions)
    listed.write_text(content.replace("he_bytes", "size"))
    assert f"{listed}: is damaged (no column 'he_bytes')" in refusal(regions)
    listed.unlink()
    said = refusal(regions)
    assert said.count(f"{listed}: cannot be read") == 1 and "copy it with them" in said


def shift_affine(document):
    document["affine"][0][2] += 400


BROKEN = {
    "another schema": ("HE", lambda d: d.update(schema=2), "says schema 2, known is 1"),
    "no place": ("HE", lambda d: d.pop("place"), "is damaged: has no 'place'"),
    "a place of text": ("ORION", lambda d: d.update(place=["0", 0, 10, 10]), "something else than whole numbers"),
    "an empty place": ("ORION", lambda d: d.update(place=[0, 0, 0, 10]), "is no rectangle"),
    "NaN": ("HE", lambda d: d["affine"][0].__setitem__(0, float("nan")), "affine is not made of finite numbers"),
    "a tiny scale": ("HE", lambda d: d.update(affine=[[1e-9, 0, 0], [0, 1e-9, 0]]), "affine scales by"),
    "a wild field": ("HE", lambda d: d["field"]["nodes"][0].__setitem__(0, [30, 0]), "field moves by 30 pixels"),
    "a ragged field": (
        "HE",
        lambda d: d["field"]["nodes"].pop().append([1]) or d["field"]["nodes"][0].pop(),
        "nodes is not",
    ),
    "a step of 0": ("HE", lambda d: d["field"].update(step=0), "step is 0"),
    "a transform out of range": ("HE", shift_affine, "its transform leads beyond the H&E of slide A"),
    "a place out of range": ("ORION", lambda d: d["place"].__setitem__(0, 400), "reaches beyond slide A"),
    "a channel out of range": ("ORION", lambda d: d["channels"].__setitem__(1, 20), "has channel 20, but "),
    "a channel below 0": ("ORION", lambda d: d["channels"].__setitem__(1, -1), "channels are [0, -1, 3, 5]"),
    "a name too few": ("ORION", lambda d: d["names"].pop(), "names are not one for each channel"),
    "another size": ("ORION", lambda d: d["place"].__setitem__(2, 100), "height and width must be equal"),
}


@pytest.mark.parametrize(("kind", "change", "message"), BROKEN.values(), ids=BROKEN)
def test_a_region_file_that_cannot_be_used_is_named(made, tmp_path, kind, change, message):
    folder = tmp_path / "regions"
    folder.mkdir()
    for name in ("A_r0001_HE.region.json", "A_r0001_ORION.region.json", "slide_files.csv"):
        shutil.copy(made / "regions" / name, folder)
    edit_files(
        folder, lambda row: row.update({n: str(made / "slides" / row[n].split("/")[-1]) for n in ("he", "orion")})
    )
    assert len(opened(folder)) == 1
    edit(folder / f"A_r0001_{kind}.region.json", change)
    said = refusal(folder)
    assert f"A_r0001_{kind}.region.json: " in said and message in said


def test_files_that_are_no_json_levels_and_commands_are_refused_in_one_message(regions, capsys):
    assert "A_r0001_HE.region.json: has no level 1; a region" in refusal(regions, level=1)
    (regions / "A_r0001_HE.region.json").write_text('{"schema": 1, "sl')
    (regions / "A_r0002_ORION.region.json").write_text("[" * 10_000)
    assert run_command(dispatch, ["check-data", str(regions), "--patch_size", "32"]) == 2
    said = capsys.readouterr().err
    assert "A_r0001_HE.region.json: is damaged, it is not JSON" in said
    assert "A_r0002_ORION.region.json: is damaged, it is not JSON" in said and "Traceback" not in said


def test_a_slide_without_tiles_is_read_in_loader_processes_that_were_forked_from_one_that_read_it(tmp_path, train):
    """The threads by which its reader decodes do not survive the fork."""
    pytest.importorskip("openslide", reason="the extra openslide is not installed", exc_type=ImportError)
    he, orion = draw_core(7, 256)
    (tmp_path / "slides").mkdir()
    tifffile.imwrite(tmp_path / "slides" / "he.ndpi", he, photometric="rgb", tile=(64, 64), compression="jpeg")
    np.save(tmp_path / "slides" / "orion.npy", orion[..., :4])
    columns = "slide,he,orion,he_pixel_size_um,orion_pixel_size_um"
    # And an H&E in OME-Zarr, which has tiles, beside markers in .npy, which have none.
    write_zarr(tmp_path / "slides" / "D_HE.zarr", he, chunk=64)
    rows = [f"{name},{he},orion.npy,0.325,0.325" for name, he in (("C", "he.ndpi"), ("D", "D_HE.zarr"))]
    (tmp_path / "slides" / "slides.csv").write_text("\n".join([columns, *rows, ""]))
    (tmp_path / "slides" / "markers.csv").write_text("marker_name\nHoechst\nCD3\nCD4\nCD8\n")
    options = ("--register", "off", "--region_size", "128")
    folders = {form: tmp_path / form for form in ("npy", "none")}
    runs = []
    for form, folder in folders.items():
        assert prepared(tmp_path, folder, *options, "--format", form) == 0
        more = {"num_workers": 1} if form == "none" else {}
        runs.append(train(f"run_{form}", pairs_dir=str(folder), epochs=1, **more))
    assert_same_run(runs[1].dir, runs[0].dir)


def test_slides_and_their_regions_may_be_on_object_storage(made, tmp_path):
    pytest.importorskip("fsspec")
    from stores import clear, upload

    (tmp_path / "slides").mkdir()
    for name in ("A_he.tif", "A_orion.tif"):
        shutil.copy(made / "slides" / name, tmp_path / "slides")
    shutil.copytree(made / "regions", tmp_path / "regions", ignore=shutil.ignore_patterns("B_*", ".prepare", "*.png"))
    clear()
    try:
        upload(tmp_path / "slides", "memory://bucket/study/slides")
        # Both, by the relative paths in the list; then the slides alone, by their URLs, as prepare lists them.
        tables = [opened(upload(tmp_path / "regions", "memory://bucket/study/pairs"))]
        where = "memory://bucket/study/slides"
        before = (tmp_path / "regions" / "slide_files.csv").read_text()
        write_slide_files(
            tmp_path / "regions", [("A", *(input_path(f"{where}/{name}") for name in ("A_he.tif", "A_orion.tif")))]
        )
        # The copies have the sizes and digests of the originals.
        assert (tmp_path / "regions" / "slide_files.csv").read_text() == before.replace("../slides/A_", f"{where}/A_")
        tables.append(opened(tmp_path / "regions"))
        written = opened(made / "written")
        for table in tables:
            for core, modality in ((0, "he"), (1, "orion")):
                expected = np.asarray(written.image(core, modality))
                np.testing.assert_array_equal(np.asarray(table.image(core, modality)), expected)
        clear()
        file_states._RECENT.clear()
        said = refusal(tmp_path / "regions")
        assert said.count(f"slide A: {where}/A_he.tif: cannot be read (there is no such object") == 1
    finally:
        clear()
