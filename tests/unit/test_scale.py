"""What a stored number means: decided by the whole folder, never by a patch; every bad file named."""

import tracemalloc

import numpy as np
import pytest

from orion_unet.data import scale
from orion_unet.data.patches import PatchPlace
from orion_unet.errors import InputError
from orion_unet.slides import intensity


def overwrite(folder, core, kind, change):
    path = folder / f"core_{core:02d}_{kind}.npy"
    array = np.load(path)
    change(array)
    np.save(path, array)


def put(value, where=(0, 0, 0)):
    def change(array):
        array[where] = value

    return change


def times(factor):
    def change(array):
        array *= factor

    return change


def test_integers_are_scaled_by_their_type_whatever_their_range(write_pairs, open_pairs):
    folder = write_pairs(he_dtype="uint16", orion_dtype="uint8")
    overwrite(folder, 0, "ORION", times(0))
    scales = open_pairs(folder).scales
    assert scales.he["uint16"] == scales.orion["uint16"] == 65535
    assert scales.he["uint8"] == scales.orion["uint8"] == 255


@pytest.mark.parametrize("dtype", ["float16", "float32", ">f4"])
@pytest.mark.parametrize("white", [1, 255])
def test_floats_declare_one_white_level_for_the_whole_folder(write_pairs, open_pairs, dtype, white):
    folder = write_pairs(he_dtype=dtype, orion_dtype=dtype)
    for core in range(4):
        overwrite(folder, core, "HE", times(white))
        overwrite(folder, core, "ORION", times(white))
    scales = open_pairs(folder).scales
    assert scales.he["float32"] == scales.he["float16"] == white
    assert scales.orion["float32"] == scales.orion["float16"] == white


def test_orion_floats_may_hold_the_range_of_uint16(write_pairs, open_pairs):
    folder = write_pairs(orion_dtype="float32")
    overwrite(folder, 2, "ORION", times(65535))
    assert open_pairs(folder).scales.orion["float32"] == 65535


def test_two_patches_of_a_folder_never_disagree(write_pairs, open_pairs):
    folder = write_pairs(he_dtype="float32", orion_dtype="float32")
    # One bright pixel in one core declares 0..255 for all, also for patches in which everything is below 1.
    overwrite(folder, 3, "HE", put(200.0, (47, 39, 2)))
    opened = open_pairs(folder)
    batch = opened.reader.read([PatchPlace(0, 0, 0), PatchPlace(3, 32, 24)])
    intensities = batch.he.numpy() / opened.reader.formats["he"].white
    stored = np.load(folder / "core_00_HE.npy")[:16, :16]
    np.testing.assert_allclose(intensities[0], stored / 255, rtol=1e-6)
    assert intensities[1].max() == pytest.approx(200 / 255)


@pytest.mark.parametrize("kind", ["HE", "ORION"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_every_file_with_nan_infinity_or_an_odd_range_is_named_in_one_message(write_pairs, open_pairs, dtype, kind):
    folder = write_pairs(cores=6, he_dtype=dtype, orion_dtype=dtype)
    overwrite(folder, 0, kind, put(np.nan, (47, 39, 2)))
    overwrite(folder, 1, kind, put(np.inf, (20, 3, 1)))
    overwrite(folder, 2, kind, put(-np.inf))
    overwrite(folder, 4, "HE", put(-5))
    overwrite(folder, 5, "HE", put(300))
    with pytest.raises(InputError) as caught:
        open_pairs(folder)
    message = str(caught.value)
    for core in (0, 1, 2):
        assert f"core_{core:02d}_{kind}.npy: contains NaN or infinity" in message
    assert "core_04_HE.npy: values from -5" in message
    assert "core_05_HE.npy: values from" in message
    assert "to 300" in message
    assert "core_03" not in message


def test_a_negative_target_is_refused_only_where_nothing_normalises_it(write_pairs, open_pairs):
    folder = write_pairs(orion_dtype="float32")
    overwrite(folder, 1, "ORION", put(-0.5))
    assert open_pairs(folder).scales.orion["float32"] == 1
    with pytest.raises(InputError, match=r"core_01_ORION.npy: values from -0\.5"):
        open_pairs(folder, target_normalization="none")


def test_targets_past_the_range_of_uint16_are_refused(write_pairs, open_pairs):
    folder = write_pairs(orion_dtype="float32")
    overwrite(folder, 1, "ORION", put(70_000))
    with pytest.raises(InputError, match=r"core_01_ORION.npy: values from 0 to 70000"):
        open_pairs(folder)


def test_rounding_past_the_white_level_is_forgiven(write_pairs, open_pairs):
    folder = write_pairs(he_dtype="float32")
    overwrite(folder, 1, "HE", put(1.00001))
    overwrite(folder, 2, "HE", put(-0.00001))
    assert open_pairs(folder).scales.he["float32"] == 1


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("position", [0, 1, 7, 8, 9, 15, 16, 48 * 40 * 3 - 1])
def test_no_pixel_is_missed_at_the_edge_of_a_chunk(write_pairs, open_pairs, monkeypatch, order, position):
    monkeypatch.setattr(intensity, "CHUNK_BYTES", 8 * 4)
    folder = write_pairs(cores=2, he_dtype="float32", order=order)
    path = folder / "core_01_HE.npy"
    array = np.load(path)
    array.ravel(order="K")[...] = 0.5
    array.reshape(-1, order=order)[position] = 200
    np.save(path, array)
    assert open_pairs(folder).scales.he["float32"] == 255


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_file_is_read_in_bounded_memory_in_either_order(write_pairs, open_pairs, monkeypatch, order):
    table = open_pairs(write_pairs(cores=2, size=(500, 400), he_dtype="float32", order=order)).table
    monkeypatch.setattr(intensity, "CHUNK_BYTES", 1 << 14)
    tracemalloc.start()
    scale.measure_scales(table, bounded_targets=False)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # One of the two files holds 2.4 MB.
    assert peak < 500_000


def test_integer_folders_are_not_read(write_pairs, open_pairs, monkeypatch):
    folder = write_pairs()
    opened = open_pairs(folder)
    monkeypatch.setattr(type(opened.table), "open", lambda *_: pytest.fail("an integer file was read"))
    scale.measure_scales(opened.table, bounded_targets=True)


def test_progress_counts_every_float_file(write_pairs, open_pairs):
    folder = write_pairs(cores=3, he_dtype="float32", orion_dtype="float16")
    table = open_pairs(folder).table
    calls = []

    def progress(total, text):
        calls.append(total)
        return lambda: calls.append("step")

    scale.measure_scales(table, bounded_targets=False, progress=progress)
    assert calls == [6] + ["step"] * 6
