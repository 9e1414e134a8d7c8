"""Positions of patches: the grid reaches every edge, crops prefer tissue, and few memory maps stay open."""

import gc
import pickle
import weakref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orion_unet.data import patches
from orion_unet.data.pairs import PairTable
from orion_unet.data.patches import PatchPlace, draw_training_patch, grid_starts, validation_patches


@given(length=st.integers(1, 400), patch=st.integers(1, 400), stride=st.integers(1, 400))
def test_the_grid_covers_every_row_and_stays_inside(length, patch, stride):
    patch, stride = min(patch, length), min(stride, patch, length)
    starts = grid_starts(length, patch, stride)
    covered = np.zeros(length, int)
    for start in starts:
        assert 0 <= start <= length - patch
        covered[start : start + patch] += 1
    assert covered.min() >= 1
    assert starts == sorted(set(starts))
    # Never more patches than the stride calls for.
    assert len(starts) == -(-(length - patch) // stride) + 1


@pytest.mark.parametrize(("size", "patch", "stride"), [((47, 61), 16, None), ((33, 40), 32, 7), ((16, 16), 16, None)])
def test_the_validation_grid_covers_every_pixel_of_every_core(write_pairs, open_pairs, size, patch, stride):
    opened = open_pairs(write_pairs(size=size, cores=2), patch_size=patch, grid_stride=stride, patches_per_image_val=0)
    rows = validation_patches(opened.reader, np.array([0, 1]), opened.options, seed=0)
    for core in (0, 1):
        seen = np.zeros(size, int)
        for _, y, x in rows[rows[:, 0] == core]:
            seen[y : y + patch, x : x + patch] += 1
        assert seen.min() >= 1
    assert len(np.unique(rows, axis=0)) == len(rows)


def test_validation_patches_show_tissue_first_and_are_the_same_in_every_call(write_pairs, open_pairs):
    # 64 rows of tissue over 448 rows of glass: 8 of the 64 patches of a core show tissue.
    folder = write_pairs(size=(512, 512), cores=2, tissue_rows=64)
    opened = open_pairs(folder, patch_size=64, patches_per_image_val=6)
    rows = validation_patches(opened.reader, np.array([0, 1]), opened.options, seed=3)
    assert rows.shape == (12, 3)
    assert (rows[:, 1] == 0).all()
    assert len(np.unique(rows, axis=0)) == 12
    fresh = open_pairs(folder, patch_size=64, patches_per_image_val=6)
    np.testing.assert_array_equal(validation_patches(fresh.reader, np.array([0, 1]), fresh.options, seed=3), rows)
    other = validation_patches(opened.reader, np.array([0, 1]), opened.options, seed=4)
    assert not np.array_equal(other, rows)
    # A core's patches do not depend on which others are held out with it.
    alone = validation_patches(opened.reader, np.array([1]), opened.options, seed=3)
    np.testing.assert_array_equal(alone, rows[rows[:, 0] == 1])


def test_blank_patches_fill_up_where_tissue_does_not_suffice(write_pairs, open_pairs):
    opened = open_pairs(write_pairs(size=(128, 128), cores=1, tissue_rows=32), patch_size=32, patches_per_image_val=7)
    rows = validation_patches(opened.reader, np.array([0]), opened.options, seed=0)
    assert len(np.unique(rows, axis=0)) == 7
    assert (rows[:, 1] == 0).sum() == 4


@pytest.mark.parametrize("wanted", [16, 17, 500])
def test_a_core_with_too_small_a_grid_gives_all_of_it(write_pairs, open_pairs, wanted):
    opened = open_pairs(write_pairs(size=(64, 64), cores=1), patches_per_image_val=wanted)
    assert len(validation_patches(opened.reader, np.array([0]), opened.options, seed=0)) == 16


@pytest.mark.parametrize("layout", ["hwc", "chw"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float16", "float32"])
def test_training_crops_prefer_tissue_on_a_core_that_is_mostly_glass(write_pairs, open_pairs, layout, dtype):
    folder = write_pairs(size=(320, 64), cores=1, channels=1, tissue_rows=32, he_dtype=dtype, he_layout=layout)
    opened = open_pairs(folder, patch_size=32)
    places = [draw_training_patch(opened.reader, 0, 0, 1, index, True) for index in range(300)]
    # A crop at row y shows 32 - y rows of tissue; at least a quarter means y <= 24, which 25 of 289 starts are.
    share = np.mean([place.y <= 24 for place in places])
    expected = 1 - (1 - 25 / 289) ** 8
    assert abs(share - expected) < 5 * np.sqrt(expected * (1 - expected) / 300)
    assert share > 4 * 25 / 289


def test_training_crops_of_whole_tissue_are_spread_over_all_of_it(write_pairs, open_pairs):
    opened = open_pairs(write_pairs(size=(24, 20), cores=1))
    places = [draw_training_patch(opened.reader, 0, 0, 1, index, True) for index in range(2000)]
    counts = np.zeros((9, 5))
    for place in places:
        counts[place.y, place.x] += 1
    # 45 corners, about 44 each: every one is drawn, the last row and column too, and none is favoured.
    assert counts.min() > 44.4 - 5 * 6.7
    assert counts.max() < 44.4 + 5 * 6.7


@pytest.mark.parametrize("pixel", [(240, 240, 240), (200, 195, 205), (255, 255, 255)])
def test_bright_unsaturated_pixels_are_glass(tmp_path, store, open_pairs, pixel):
    store(tmp_path / "a_HE.npy", np.full((16, 16, 3), pixel), "uint8")
    store(tmp_path / "a_ORION.npy", np.zeros((16, 16, 1)), "uint8")
    assert open_pairs(tmp_path).reader.tissue_fraction(0, 0, 0) == 0


@pytest.mark.parametrize("pixel", [(230, 180, 210), (120, 80, 160), (180, 180, 180), (0, 0, 0), (255, 0, 255)])
def test_stained_or_dark_pixels_are_tissue(tmp_path, store, open_pairs, pixel):
    store(tmp_path / "a_HE.npy", np.full((16, 16, 3), pixel), "uint8")
    store(tmp_path / "a_ORION.npy", np.zeros((16, 16, 1)), "uint8")
    assert open_pairs(tmp_path).reader.tissue_fraction(0, 0, 0) == 1


def test_a_sample_depends_on_seed_epoch_and_index_alone(write_pairs, open_pairs):
    opened = open_pairs(write_pairs())

    def draw(seed, epoch, index):
        return draw_training_patch(opened.reader, 1, seed, epoch, index, True)

    first = [draw(7, 2, index) for index in range(50)]
    assert [draw(7, 2, index) for index in reversed(range(50))] == first[::-1]
    assert len({(place.colour, place.geometry) for place in first}) == 50
    for other in (draw(8, 2, 0), draw(7, 3, 0), draw(7, 2, 1)):
        assert other.colour != first[0].colour


def test_augmentation_covers_all_geometries_and_stays_in_range(write_pairs, open_pairs):
    opened = open_pairs(write_pairs())
    places = [draw_training_patch(opened.reader, 0, 0, 0, index, True) for index in range(400)]
    _, counts = np.unique([place.geometry for place in places], axis=0, return_counts=True)
    assert len(counts) == 8
    assert np.abs(counts - 50).max() < 5 * np.sqrt(400 / 8 * 7 / 8)
    colours = np.array([place.colour for place in places])
    assert colours.min() < -0.95
    assert colours.max() > 0.95
    assert np.abs(colours).max() <= 1
    assert np.abs(colours.mean(axis=0)).max() < 5 / np.sqrt(3 * 400)


def test_without_augmentation_the_crop_is_the_same_and_nothing_else_is_drawn(write_pairs, open_pairs):
    opened = open_pairs(write_pairs())
    plain = draw_training_patch(opened.reader, 0, 0, 1, 5, False)
    augmented = draw_training_patch(opened.reader, 0, 0, 1, 5, True)
    assert (plain.y, plain.x) == (augmented.y, augmented.x)
    assert plain == PatchPlace(0, plain.y, plain.x)
    assert not any(plain.geometry)
    assert not any(plain.colour)


@pytest.mark.parametrize(("he_layout", "orion_layout"), [("hwc", "chw"), ("chw", "hwc")])
def test_a_batch_holds_the_stored_bytes_in_the_folders_own_layout(write_pairs, open_pairs, he_layout, orion_layout):
    folder = write_pairs(he_layout=he_layout, orion_layout=orion_layout)
    opened = open_pairs(folder)
    places = [PatchPlace(2, 32, 24), PatchPlace(0, 1, 2)]
    batch = opened.reader.read(places)
    for tensor, kind, layout in ((batch.he, "HE", he_layout), (batch.orion, "ORION", orion_layout)):
        for row, place in zip(tensor.numpy(), places, strict=True):
            stored = np.load(folder / f"core_{place.core:02d}_{kind}.npy")
            window = np.s_[place.y : place.y + 16, place.x : place.x + 16]
            np.testing.assert_array_equal(row, stored[window] if layout == "hwc" else stored[:, *window])
            assert row.dtype == stored.dtype
    assert batch.core.tolist() == [2, 0]


@pytest.mark.parametrize("modality", ["he", "orion"])
def test_floats_up_to_255_beside_integers_are_brought_to_one_scale(write_pairs, open_pairs, modality):
    # uint8 cores 0 and 1; core 2 holds the same numbers as float32, whose range then declares 0 to 255.
    folder = write_pairs(cores=3, orion_dtype="uint8")
    kind = modality.upper()
    path = folder / f"core_02_{kind}.npy"
    np.save(path, np.load(folder / f"core_01_{kind}.npy").astype(np.float32))
    opened = open_pairs(folder)
    assert getattr(opened.scales, modality)["float32"] == 255
    batch = getattr(opened.reader.read([PatchPlace(1, 3, 4), PatchPlace(2, 3, 4)]), modality).numpy()
    assert opened.reader.formats[modality].white == 1
    np.testing.assert_allclose(batch[0], batch[1], rtol=1e-6)
    np.testing.assert_allclose(batch[1], np.load(path)[3:19, 4:20] / 255, rtol=1e-6)


def test_open_memory_maps_are_few_and_those_in_use_stay(write_pairs, open_pairs, monkeypatch):
    monkeypatch.setattr(patches, "OPEN_MAPS", 5)
    opened = open_pairs(write_pairs(cores=12))
    maps = []
    plain_open = PairTable.open

    def watched_open(table, core, modality, cache):
        found = plain_open(table, core, modality, cache)
        maps.append((core, weakref.ref(found)))
        return found

    monkeypatch.setattr(PairTable, "open", watched_open)
    most = 0
    for core in range(1, 12):
        opened.reader.read([PatchPlace(0, 0, 0), PatchPlace(core, 0, 0)])
        gc.collect()
        most = max(most, sum(reference() is not None for _, reference in maps))
    assert most == 5
    assert sum(core == 0 for core, _ in maps) == 2


def test_a_reader_travels_to_a_worker_without_the_pixels_it_has_open(write_pairs, open_pairs):
    opened = open_pairs(write_pairs(size=(300, 300)))
    place = [PatchPlace(1, 2, 3)]
    before = opened.reader.read(place)
    sent = pickle.dumps(opened.reader)
    assert len(sent) < 20_000
    after = pickle.loads(sent).read(place)  # noqa: S301
    np.testing.assert_array_equal(before.he.numpy(), after.he.numpy())
    np.testing.assert_array_equal(before.orion.numpy(), after.orion.numpy())
