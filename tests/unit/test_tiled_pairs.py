"""Pairs in tiles: sliced like a memory map, the same values in every format, and every bad file named."""

import json
import pickle
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
from pair_formats import TIFFS, ZARRS, rewrite, spoil_tile, write_tiff, write_zarr

from orion_unet.config import DataOptions
from orion_unet.data import headers, measured
from orion_unet.data.dataset import pairs_at_size, pixel_size
from orion_unet.data.digests import core_digests
from orion_unet.data.packing import pack
from orion_unet.data.pairs import find_pairs
from orion_unet.data.patches import PatchPlace, PatchReader
from orion_unet.data.scale import measure_scales
from orion_unet.errors import InputError
from orion_unet.slides.open import open_markers
from orion_unet.slides.tiles import TileCache, TiledArray

PLACE = PatchPlace(1, 9, 21)


@pytest.fixture
def pairs(write_pairs):
    """Two cores of 80 x 72 pixels with four markers: more than two tiles a side, the last ones cut off."""
    return write_pairs(cores=2, size=(80, 72), channels=4)


@pytest.fixture
def one_tiff(pairs, tmp_path):
    """The pairs as OME-TIFF, and a file of them to be damaged."""
    folder = rewrite(pairs, tmp_path / "tiff", "zstd")
    return SimpleNamespace(dir=folder, orion=folder / "core_01_ORION.ome.tif", he=folder / "core_01_HE.ome.tif")


@pytest.fixture
def one_zarr(pairs, tmp_path):
    folder = rewrite(pairs, tmp_path / "zarr", "v3")
    return SimpleNamespace(dir=folder, orion=folder / "core_01_ORION.ome.zarr")


def opened(folder, **options):
    return find_pairs(DataOptions(pairs_dir=str(folder), patch_size=16, **options))


def refusal(folder, **options):
    with pytest.raises(InputError) as caught:
        opened(folder, **options)
    return str(caught.value)


def arrays(folder, core="core_01"):
    return [np.load(folder / f"{core}_{kind}.npy") for kind in ("HE", "ORION")]


@pytest.mark.parametrize("form", [*TIFFS, *ZARRS])
def test_every_format_has_the_values_of_npy(pairs, tmp_path, open_pairs, form):
    tiled = open_pairs(rewrite(pairs, tmp_path / "tiled", form), exclude_channels="1,2")
    he, orion = arrays(pairs)
    for modality, image in (("he", he), ("orion", orion)):
        stored = tiled.table.image(1, modality)
        assert isinstance(stored, TiledArray)
        np.testing.assert_array_equal(np.asarray(stored), image)
        np.testing.assert_array_equal(stored[30:70, 31:72, 1:], image[30:70, 31:72, 1:])
    rows = np.array([79, 3, 31, 32, 3])
    np.testing.assert_array_equal(tiled.table.marker_rows(1, rows, [3, 0]), orion[rows][..., [3, 0]].transpose(2, 0, 1))
    batch = tiled.reader.read([PLACE])
    found = {name: tiled.reader.formats[name].layout for name in ("he", "orion")}
    crops = [batch.he[0].numpy(), batch.orion[0].numpy()]
    crops = [
        crop if layout == "hwc" else crop.transpose(1, 2, 0) for crop, layout in zip(crops, found.values(), strict=True)
    ]
    np.testing.assert_array_equal(crops[0], he[9:25, 21:37])
    # Channels that are not kept are not decoded.
    np.testing.assert_array_equal(crops[1][..., [0, 3]], orion[9:25, 21:37][..., [0, 3]])
    plain = open_pairs(pairs)
    assert core_digests(tiled.table, [0, 1]) == core_digests(plain.table, [0, 1])


def test_of_channels_in_planes_only_the_kept_ones_are_decoded(one_tiff):
    table = opened(one_tiff.dir, exclude_channels="0,1,2")
    reader = PatchReader(table, measure_scales(table, False), 16)
    reader.read([PatchPlace(1, 0, 0)])
    # A tile of the H&E, and one of the one kept channel.
    assert reader.cache.decoded_bytes == 32 * 32 * 3 + 32 * 32 * 2


def test_the_cache_decodes_again_only_what_it_had_no_room_for(one_tiff):
    table = opened(one_tiff.dir)
    tile = 32 * 32 * 2
    # Four channels of one tile, then of the next, of the same, and of the first again.
    for limit, decoded in ((8 * tile, 8), (4 * tile, 12), (3 * tile, 16), (0, 16)):
        cache = TileCache(limit)
        stored = table.open(1, "orion", cache)
        for x in (0, 32, 32, 0):
            stored.read(0, x, 16, 16)
        assert cache.decoded_bytes == decoded * tile


def test_floats_in_tiles_are_ranged_band_by_band(write_pairs, tmp_path):
    folder = rewrite(write_pairs(orion_dtype="float32", size=(80, 72), cores=2), tmp_path / "floats", "v3")
    scales = measure_scales(opened(folder), False)
    assert scales.white("orion", np.dtype("float32")) == 1.0


def test_formats_may_be_mixed_and_h_and_e_may_be_jpeg(pairs, tmp_path, open_pairs):
    import tifffile

    folder = rewrite(pairs, tmp_path / "mixed", "v3", keep_npy=("core_00",))
    (folder / "core_01_HE.ome.zarr").rename(tmp_path / "gone")
    he, orion = arrays(pairs)
    write_tiff(folder / "core_01_HE.ome.tiff", he, "jpeg", compression="jpeg")
    mixed = open_pairs(folder)
    batch = mixed.reader.read([PatchPlace(0, 0, 0), PLACE])
    decoded = tifffile.imread(folder / "core_01_HE.ome.tiff")
    assert np.abs(decoded.astype(int) - he).mean() > 0
    np.testing.assert_array_equal(batch.he[1].numpy(), decoded[9:25, 21:37])
    np.testing.assert_array_equal(batch.orion[1].numpy(), orion[9:25, 21:37])
    np.testing.assert_array_equal(batch.orion[0].numpy(), arrays(pairs, "core_00")[1][:16, :16])


@pytest.mark.parametrize("write", [write_tiff, write_zarr])
def test_level_picks_a_level_of_the_pyramid_with_its_pixel_size(write, write_pairs, tmp_path):
    source = write_pairs("source", cores=1, size=(80, 72))
    folder = tmp_path / "levels"
    folder.mkdir()
    suffix = ".ome.tif" if write is write_tiff else ".ome.zarr"
    for kind, image in zip(("HE", "ORION"), arrays(source, "core_00"), strict=True):
        write(folder / f"core_00_{kind}{suffix}", image, levels=2)
    (folder / "dataset.json").write_text(json.dumps({"schema": 1, "pixel_size_um": 0.5}))
    table = opened(folder, level=1)
    for modality, image in zip(("he", "orion"), arrays(source, "core_00"), strict=True):
        np.testing.assert_array_equal(np.asarray(table.image(0, modality)), image[::2, ::2])
    assert pixel_size(table, None) == 1.0
    options = DataOptions(pairs_dir=str(folder), patch_size=16, pixel_size_um=1.0)
    by_size = pairs_at_size(options)
    assert (by_size.level, pixel_size(by_size, 1.0)) == (1, 1.0)
    assert "level 1 of the pyramids is used" in by_size.warnings[-1]
    assert pairs_at_size(replace(options, pixel_size_um=0.5)).level == 0
    # Of no level, and contradicted by the folder.
    with pytest.raises(InputError, match=r"--pixel_size_um 0\.8 contradicts the 0\.5"):
        pixel_size(pairs_at_size(replace(options, pixel_size_um=0.8)), 0.8)
    assert f"core_00_HE{suffix}: has no level 2; its levels are 0 to 1" in refusal(folder, level=2)
    assert "core_00_HE.npy: has no level 1" in refusal(source, level=1)


def test_names_and_pixel_size_of_ome_metadata_serve_where_the_folder_states_none(write_pairs, tmp_path):
    import tifffile

    folder = write_pairs(cores=1, size=(80, 72), channels=2)
    image = arrays(folder, "core_00")[1]
    (folder / "core_00_ORION.npy").unlink()
    metadata = {
        "axes": "CYX", "Channel": {"Name": ["Hoechst", "CD3"]},
        "PhysicalSizeX": 0.325, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": 0.325, "PhysicalSizeYUnit": "µm",
    }  # fmt: skip
    tifffile.imwrite(
        folder / "core_00_ORION.ome.tif", image.transpose(2, 0, 1), tile=(32, 32), compression="zstd", metadata=metadata
    )
    table = opened(folder)
    assert table.channel_names == ("Hoechst", "CD3")
    assert pixel_size(table, None) == 0.325
    (folder / "channel_names.txt").write_text("DNA\nT cells\n")
    (folder / "dataset.json").write_text(json.dumps({"schema": 1, "pixel_size_um": 0.5}))
    table = opened(folder)
    assert table.channel_names == ("DNA", "T cells")
    assert pixel_size(table, None) == 0.5


def test_strips_are_read_with_one_warning_that_names_pack(pairs, tmp_path):
    folder = tmp_path / "strips"
    folder.mkdir()
    for path in pairs.glob("*.npy"):
        write_tiff(folder / f"{path.stem}.tif", np.load(path), "deflate", tile=None, rowsperstrip=8)
    table = opened(folder)
    (warning,) = table.warnings
    assert warning.startswith("4 files are compressed in strips")
    assert f"python -m orion_unet pack {folder} --output_dir {folder}_packed" in warning
    np.testing.assert_array_equal(np.asarray(table.image(1, "orion")), arrays(pairs)[1])
    pack(DataOptions(pairs_dir=str(folder), patch_size=16), tmp_path / "packed")
    np.testing.assert_array_equal(np.load(tmp_path / "packed" / "core_01_ORION.npy"), arrays(pairs)[1])


def test_a_plain_tiff_in_one_piece_is_a_memory_map_like_npy(pairs, tmp_path):
    folder = tmp_path / "plain"
    folder.mkdir()
    for path in pairs.glob("*.npy"):
        write_tiff(folder / f"{path.stem}.tif", np.load(path), "plain", tile=None)
    table = opened(folder)
    assert table.warnings == []
    assert isinstance(table.open(1, "orion"), np.memmap)
    for modality, image in zip(("he", "orion"), arrays(pairs), strict=True):
        np.testing.assert_array_equal(table.image(1, modality), image)


def test_two_files_of_one_image_are_refused(one_tiff, pairs):
    (one_tiff.dir / "core_01_HE.npy").write_bytes((pairs / "core_01_HE.npy").read_bytes())
    assert "core_01: has core_01_HE.npy and core_01_HE.ome.tif; keep one of them" in refusal(one_tiff.dir)


def test_a_tile_that_cannot_be_decoded_is_named_with_level_row_and_column(one_tiff):
    spoil_tile(one_tiff.orion, page=2, index=4)
    table = opened(one_tiff.dir)
    with pytest.raises(
        InputError, match=r"core_01_ORION\.ome\.tif: is damaged or truncated at level 0, row 32, column 32"
    ):
        np.asarray(table.open(1, "orion"))


def test_a_tiff_that_ends_too_early_is_named_with_its_first_missing_tile(one_tiff):
    import tifffile

    with tifffile.TiffFile(one_tiff.he) as tiff:
        end = max(tiff.pages[0].dataoffsets)
    with open(one_tiff.he, "r+b") as file:
        file.truncate(end + 3)
    message = refusal(one_tiff.dir)
    assert "core_01_HE.ome.tif: is truncated" in message or "core_01_HE.ome.tif: is damaged" in message


def test_a_missing_chunk_has_the_fill_value_but_a_missing_array_is_refused(one_zarr, pairs):
    (one_zarr.orion / "0" / "c" / "2" / "1" / "1").unlink()
    expected = arrays(pairs)[1].copy()
    expected[32:64, 32:64, 2] = 0
    np.testing.assert_array_equal(np.asarray(opened(one_zarr.dir).image(1, "orion")), expected)
    (one_zarr.orion / "0" / "c").rename(one_zarr.dir / "moved")
    assert "core_01_ORION.ome.zarr: has no pixels at level 0" in refusal(one_zarr.dir)
    (one_zarr.orion / "0" / "zarr.json").unlink()
    assert "core_01_ORION.ome.zarr: lacks the array 0 of level 0" in refusal(one_zarr.dir)


@pytest.mark.parametrize("form", ["v3", "v3 shards", "v2 blosc"])
def test_a_truncated_chunk_or_shard_is_named(pairs, tmp_path, form):
    folder = rewrite(pairs, tmp_path / "zarr", form)
    keys = {"v3": "c/2/1/1", "v3 shards": "c/2/0/0", "v2 blosc": "2.1.1"}
    chunk = folder / "core_01_ORION.ome.zarr" / "0" / keys[form]
    chunk.write_bytes(chunk.read_bytes()[:-20])
    with pytest.raises(
        InputError, match=r"core_01_ORION\.ome\.zarr: is damaged or truncated at level 0, row \d+, column \d+"
    ):
        np.asarray(opened(folder).open(1, "orion"))


def test_codecs_that_are_not_installed_are_named(one_tiff, one_zarr):
    import tifffile

    described = json.loads((one_zarr.orion / "0" / "zarr.json").read_text())
    described["codecs"][1] = {"name": "brand_new", "configuration": {}}
    (one_zarr.orion / "0" / "zarr.json").write_text(json.dumps(described))
    message = refusal(one_zarr.dir)
    assert "core_01_ORION.ome.zarr: level 0 is compressed with a codec that is not installed" in message
    with tifffile.TiffFile(one_tiff.orion, mode="r+b") as tiff:
        for page in tiff.pages:
            page.tags["Compression"].overwrite(34676)
    message = refusal(one_tiff.dir)
    assert "core_01_ORION.ome.tif: is compressed as " in message
    assert "pip install" in message


@pytest.mark.parametrize(("form", "package"), [("zstd", "tifffile"), ("zstd", "imagecodecs"), ("v3", "zarr")])
def test_a_missing_package_is_one_sentence_with_the_pip_line(pairs, tmp_path, monkeypatch, form, package):
    folder = rewrite(pairs, tmp_path / "tiled", form)
    monkeypatch.setitem(sys.modules, package, None)
    assert refusal(folder) == f'the package {package} is needed for this: pip install "orion-unet[inference]"'
    assert len(opened(pairs)) == 2


def test_headers_are_kept_and_only_those_of_changed_files_are_read_again(one_zarr, monkeypatch):
    first = opened(one_zarr.dir)
    read = []
    monkeypatch.setattr(headers, "stored_image", lambda path, *_: read.append(path.name))
    second = opened(one_zarr.dir)
    assert read == []
    assert (second.he.tolist(), second.orion.tolist()) == (first.he.tolist(), first.orion.tolist())
    monkeypatch.undo()
    state = measured.file_state(one_zarr.orion)
    (one_zarr.orion / "0" / "c" / "2" / "1" / "1").write_bytes(b"")
    assert measured.file_state(one_zarr.orion) != state


@pytest.mark.parametrize("source", ["npy", "zstd"])
def test_pack_writes_sharded_ome_zarr_of_the_same_values_and_goes_on_where_it_stopped(
    pairs, tmp_path, source, monkeypatch
):
    monkeypatch.setattr("orion_unet.data.zarr_writing.CHUNK", 32)
    monkeypatch.setattr("orion_unet.data.zarr_writing.SHARD", (1, 2))
    monkeypatch.setattr("orion_unet.data.packing.BAND_BYTES", 25 * 72 * 4 * 2)
    (pairs / "channel_names.txt").write_text("DNA\nCD3\nCD4\nCD8\n")
    (pairs / "dataset.json").write_text(json.dumps({"schema": 1, "pixel_size_um": 0.5}))
    folder = pairs if source == "npy" else rewrite(pairs, tmp_path / "tiled", source)
    options, output = DataOptions(pairs_dir=str(folder), patch_size=16), tmp_path / "packed"
    assert (pack(options, output, form="ome-zarr").written, pack(options, output, form="ome-zarr").found) == (4, 4)
    table = opened(output)
    assert table.channel_names == ("DNA", "CD3", "CD4", "CD8")
    assert (pixel_size(table, None), table.pixel_size_um) == (0.5, 0.5)
    for modality, image in zip(("he", "orion"), arrays(pairs), strict=True):
        np.testing.assert_array_equal(np.asarray(table.image(1, modality)), image)
    # Three rows of shards of one channel each, and two columns.
    assert len(list((output / "core_01_ORION.ome.zarr" / "0" / "c").rglob("*/*/0"))) == 4 * 3
    shutil.rmtree(output / "core_01_HE.ome.zarr")
    done = pack(options, output, form="ome-zarr")
    assert (done.written, done.found) == (1, 3)


def test_a_packed_level_has_the_pixel_size_of_that_level(write_pairs, tmp_path):
    source, folder = write_pairs("source", cores=1, size=(80, 72)), tmp_path / "levels"
    folder.mkdir()
    for kind, image in zip(("HE", "ORION"), arrays(source, "core_00"), strict=True):
        write_tiff(folder / f"core_00_{kind}.ome.tif", image, levels=2)
    (folder / "dataset.json").write_text(json.dumps({"schema": 1, "pixel_size_um": 0.5}))
    pack(DataOptions(pairs_dir=str(folder), patch_size=16, level=1), tmp_path / "packed")
    table = opened(tmp_path / "packed")
    assert pixel_size(table, None) == 1.0
    np.testing.assert_array_equal(table.image(0, "orion"), arrays(source, "core_00")[1][::2, ::2])


class Malicious:
    """What pickle would run."""

    def __reduce__(self):
        return (exec, ("import sys; sys.orion_was_run = True",))


@pytest.mark.parametrize("place", ["compressor", "filters"])
def test_pickled_chunks_are_refused_and_never_loaded(one_zarr, pairs, place):
    path = one_zarr.dir / "core_00_ORION.ome.zarr"
    shutil.rmtree(path)
    write_zarr(path, arrays(pairs, "core_00")[1], 2, "zlib")
    described = json.loads((path / "0" / ".zarray").read_text())
    described |= {"compressor": None, place: {"id": "pickle"} if place == "compressor" else [{"id": "pickle"}]}
    if place == "filters":
        described |= {"dtype": "|O", "fill_value": 0}
    (path / "0" / ".zarray").write_text(json.dumps(described))
    for chunk in (path / "0").iterdir():
        if not chunk.name.startswith("."):
            chunk.write_bytes(pickle.dumps(Malicious()))
    assert "core_00_ORION.ome.zarr: level 0 " in refusal(one_zarr.dir)
    with pytest.raises(InputError, match="level 0 "):
        open_markers(path)
    assert not hasattr(sys, "orion_was_run")


def test_chunks_too_large_for_memory_are_refused(one_zarr, monkeypatch):
    monkeypatch.setattr("orion_unet.slides.zarr_tiles.LARGEST_SEGMENT", 1000)
    message = refusal(one_zarr.dir)
    assert "core_01_HE.ome.zarr: level 0 is stored in chunks of (3, 32, 32)" in message


def test_levels_that_are_no_arrays_are_refused(one_zarr):
    path = one_zarr.orion / "0"
    shutil.rmtree(path / "c")
    (path / "zarr.json").write_text(json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {}}))
    assert "core_01_ORION.ome.zarr: " in refusal(one_zarr.dir)


def test_names_and_pixel_size_that_only_files_state_go_with_the_packed_pairs(write_pairs, tmp_path):
    source, folder = write_pairs("source", cores=1, size=(80, 72), channels=3), tmp_path / "stated"
    folder.mkdir()
    he, orion = arrays(source, "core_00")
    write_tiff(folder / "core_00_HE.ome.tif", he)
    meta = {"axes": "CYX", "Channel": {"Name": ["Hoechst", "CD3", "CD20"]}}
    planes = np.ascontiguousarray(orion.transpose(2, 0, 1))
    tifffile.imwrite(
        folder / "core_00_ORION.ome.tif", planes, ome=True, photometric="minisblack", tile=(32, 32), metadata=meta
    )
    table = opened(folder)
    assert table.channel_names == table.stated_names == ("Hoechst", "CD3", "CD20")
    pack(DataOptions(pairs_dir=str(folder), patch_size=16), tmp_path / "packed")
    assert opened(tmp_path / "packed").channel_names == table.channel_names
    # Names given by hand are no property of the files.
    renamed = opened(folder, channel_names="A,B,C")
    assert (renamed.channel_names, renamed.stated_names) == (("A", "B", "C"), table.stated_names)
