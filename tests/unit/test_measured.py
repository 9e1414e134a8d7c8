"""Measurements of an earlier run are used again exactly as long as the files are the same."""

import json
import os

import numpy as np
import pytest

from orion_unet.config import DataOptions
from orion_unet.data import measured, normalization, scale
from orion_unet.data.normalization import known_normalization
from orion_unet.data.pairs import find_pairs
from orion_unet.data.scale import measure_scales
from orion_unet.errors import InputError

TRAIN = np.array([0, 1, 2])


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def fits(monkeypatch):
    """Notes every time a normalisation is really fitted."""
    calls = []
    original = normalization.fit_normalization
    monkeypatch.setattr(normalization, "fit_normalization", lambda *a: calls.append(a[3:5]) or original(*a))
    return calls


@pytest.fixture
def scans(monkeypatch):
    """Notes every float file that is really read."""
    calls = []
    original = scale.value_range
    monkeypatch.setattr(scale, "value_range", lambda array: calls.append(array.shape) or original(array))
    return calls


def known(opened, method="dataset", transform="linear", train=TRAIN):
    return known_normalization(opened.table, opened.scales, train, method, transform)


@pytest.mark.parametrize("method", ["dataset", "core"])
def test_the_same_cores_are_fitted_once_and_give_the_same_numbers(write_pairs, open_pairs, fits, method):
    opened = open_pairs(write_pairs())
    first, second = known(opened, method), known(opened, method)
    assert len(fits) == 1
    assert second.document() == first.document()
    np.testing.assert_array_equal(second.bounds("core_01"), first.bounds("core_01"))


def test_what_changes_the_numbers_makes_a_new_fit(write_pairs, open_pairs, fits):
    folder = write_pairs()
    opened = open_pairs(folder)
    known(opened)
    known(opened, method="core")
    known(opened, transform="log1p")
    known(opened, train=np.array([0, 1]))
    known(open_pairs(folder, exclude_channels="1"))
    known(open_pairs(folder, channel_names="a,b,c"))
    assert len(fits) == 6
    path = opened.table.path(1, "orion")
    np.save(path, np.load(path) // 2)
    os.utime(path, ns=(1, 1))
    changed = known(open_pairs(folder))
    assert len(fits) == 7
    assert changed.upper[0] < known(opened, train=np.array([0, 2])).upper[0] * 1.01


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_other_content_of_the_same_size_and_time_is_measured_anew(write_pairs, open_pairs, fits, scans, dtype):
    """As a copying tool leaves it that keeps times, out of an archive whose files all have the same."""
    folder = write_pairs(orion_dtype=dtype)
    known(open_pairs(folder))
    before = len(scans)
    path = folder / "core_01_ORION.npy"
    times = path.stat()
    np.save(path, (np.load(path) / 2).astype(dtype))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    known(open_pairs(folder))
    assert len(fits) == 2
    assert len(scans) - before == (dtype == "float32")


def test_other_code_measures_for_itself(write_pairs, open_pairs, fits, monkeypatch):
    opened = open_pairs(write_pairs())
    known(opened)
    monkeypatch.setattr(measured, "measuring_code", lambda: "changed")
    known(opened)
    assert len(fits) == 2


def test_the_code_that_measures_is_known_by_its_content_not_by_its_version_alone(tmp_path, monkeypatch):
    package = tmp_path / "orion_unet" / "data"
    package.mkdir(parents=True)
    (package / "normalization.py").write_text("LOWER = 1.0\n")
    monkeypatch.setattr(measured, "__file__", str(package / "measured.py"))
    digest = measured.measuring_code.__wrapped__
    before = digest()
    assert digest() == before
    (package / "normalization.py").write_text("LOWER = 2.0\n")
    assert digest() != before


def test_the_ranges_of_files_measured_before_a_kill_are_kept(write_pairs, scans, monkeypatch):
    folder = write_pairs(he_dtype="float32", orion_dtype="float32")
    monkeypatch.setattr(scale, "KEEP_EVERY_S", 0.0)
    original, seen = scale.value_range, []

    def scan(array):
        if len(seen) == 5:
            raise KeyboardInterrupt
        seen.append(array.shape)
        return original(array)

    monkeypatch.setattr(scale, "value_range", scan)
    monkeypatch.setattr(scale, "reading_threads", lambda folder: 1)
    table = find_pairs(DataOptions(pairs_dir=str(folder), patch_size=16))
    with pytest.raises(KeyboardInterrupt):
        measure_scales(table, False)
    monkeypatch.setattr(scale, "value_range", original)
    rest = []
    monkeypatch.setattr(scale, "value_range", lambda array: rest.append(array.shape) or original(array))
    measure_scales(table, False)
    assert len(rest) == 8 - 5


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_a_file_that_goes_meanwhile_is_named(write_pairs, dtype):
    table = find_pairs_of(write_pairs(orion_dtype=dtype))
    scales = measure_scales(find_pairs_of(write_pairs("other", orion_dtype=dtype)), False)
    table.path(1, "orion").unlink()
    with pytest.raises(InputError, match="core_01_ORION"):
        if dtype == "float32":
            measure_scales(table, False)
        known_normalization(table, scales, TRAIN, "dataset", "linear")


def test_a_change_in_a_held_out_core_keeps_the_fit_of_the_others(write_pairs, open_pairs, fits):
    folder = write_pairs()
    known(open_pairs(folder))
    path = open_pairs(folder).table.path(3, "orion")
    np.save(path, np.load(path) // 2)
    known(open_pairs(folder))
    assert len(fits) == 1


def test_float_files_are_read_again_only_where_they_have_changed(write_pairs, scans):
    folder = write_pairs(he_dtype="float32", orion_dtype="float32")
    table = find_pairs_of(folder)
    first = measure_scales(table, False)
    assert len(scans) == 8
    assert measure_scales(find_pairs_of(folder), False) == first
    assert len(scans) == 8
    path = table.path(2, "orion")
    np.save(path, np.load(path) * np.float32(255))
    os.utime(path, ns=(1, 1))
    assert measure_scales(find_pairs_of(folder), False).orion["float32"] == 255
    assert len(scans) == 9


def test_a_file_that_cannot_be_used_is_read_again_after_it_was_mended(write_pairs, scans):
    folder = write_pairs(orion_dtype="float32")
    path = find_pairs_of(folder).path(0, "orion")
    good = np.load(path)
    bad = good.copy()
    bad[0, 0, 0] = np.nan
    np.save(path, bad)
    state = path.stat()
    for _ in range(2):
        with pytest.raises(InputError, match="NaN"):
            measure_scales(find_pairs_of(folder), False)
    assert len(scans) == 5
    np.save(path, good)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    measure_scales(find_pairs_of(folder), False)
    assert len(scans) == 6


@pytest.mark.parametrize(
    "content", ["", "{}", "[1]", '{"files": [1]}', '{"files": {"core_00_ORION.npy": "x"}}', "[" * 9999]
)
def test_a_damaged_measurement_counts_as_none(write_pairs, open_pairs, fits, content):
    folder = write_pairs(orion_dtype="float32")
    opened = open_pairs(folder)
    expected = known(opened).document()
    for path in measured.cache_folder().glob("*.json"):
        path.write_text(content)
    again = open_pairs(folder)
    assert again.scales == opened.scales
    assert known(again).document() == expected
    assert len(fits) == 2


def test_without_a_place_to_keep_them_everything_is_measured(write_pairs, open_pairs, fits, tmp_path, monkeypatch):
    blocked = tmp_path / "a_file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    opened = open_pairs(write_pairs(orion_dtype="float32"))
    assert known(opened).document() == known(opened).document()
    assert len(fits) == 2


def test_a_user_without_a_home_measures_every_time(write_pairs, open_pairs, fits, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(measured.Path, "home", homeless)
    opened = open_pairs(write_pairs(orion_dtype="float32"))
    assert known(opened).document() == known(opened).document()
    assert len(fits) == 2


@pytest.mark.parametrize("given", ["", "relative/place"])
def test_a_cache_folder_that_is_not_absolute_counts_as_not_given(monkeypatch, given, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", given)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert measured.cache_folder() == tmp_path / ".cache" / "orion_unet"


def test_the_oldest_measurements_go_first(monkeypatch):
    monkeypatch.setattr(measured, "KEPT", 3)
    for index in range(5):
        measured.remember(f"m{index}", {"value": index})
        os.utime(measured.cache_folder() / f"m{index}.json", ns=(index + 1, index + 1))
    assert sorted(path.stem for path in measured.cache_folder().iterdir()) == ["m2", "m3", "m4"]
    assert measured.recall("m4") == {"value": 4}
    assert measured.recall("m0") is None


def test_measurements_are_plain_json(write_pairs, open_pairs):
    known(open_pairs(write_pairs(orion_dtype="float32")))
    documents = [json.loads(path.read_text()) for path in measured.cache_folder().iterdir()]
    assert len(documents) == 2


def find_pairs_of(folder):

    return find_pairs(DataOptions(pairs_dir=str(folder), patch_size=16))
