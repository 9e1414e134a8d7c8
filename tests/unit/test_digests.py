"""Digests of cores: the same tissue in any form has one, other tissue has another."""

import itertools
import time

import numpy as np
import pytest

from orion_unet.config import DataOptions
from orion_unet.data.digests import DIGITS, core_digests
from orion_unet.data.packing import pack


def digests(opened):
    return core_digests(opened.table, range(len(opened.table)))


def test_every_core_has_a_digest_of_its_own_under_its_name(write_pairs, open_pairs):
    found = digests(open_pairs(write_pairs(cores=5)))
    assert list(found) == [f"core_{index:02d}" for index in range(5)]
    assert len(set(found.values())) == 5
    assert all(len(digest) == DIGITS and set(digest) <= set("0123456789abcdef") for digest in found.values())


FORMS = list(itertools.product(("hwc", "chw"), ("uint8", ">u2", "float32"), "CF"))


@pytest.mark.parametrize(("he_layout", "dtype", "order"), FORMS)
def test_the_digest_does_not_depend_on_how_the_core_is_stored(write_pairs, open_pairs, he_layout, dtype, order):
    plain = digests(open_pairs(write_pairs("plain", he_dtype=np.dtype(dtype).newbyteorder("<"))))
    other = write_pairs("other", he_dtype=dtype, he_layout=he_layout, order=order, orion_layout="chw")
    assert digests(open_pairs(other)) == plain


def test_packing_renaming_and_other_markers_leave_the_digest_as_it_is(write_pairs, open_pairs, tmp_path):
    folder = write_pairs(he_layout="chw", order="F")
    before = digests(open_pairs(folder))
    pack(DataOptions(pairs_dir=str(folder), patch_size=16), tmp_path / "packed")
    assert digests(open_pairs(tmp_path / "packed")) == before
    for path in folder.glob("*_ORION.npy"):
        np.save(path, np.load(path)[..., :1])
    for path in folder.glob("core_00_*"):
        path.rename(path.with_name(path.name.replace("core_00", "other")))
    after = digests(open_pairs(folder))
    assert after["other"] == before["core_00"]
    assert {name: after[name] for name in before if name != "core_00"} == {
        name: digest for name, digest in before.items() if name != "core_00"
    }


def test_the_same_pixels_in_another_shape_are_another_core(write_pairs, open_pairs):
    tall, wide = (write_pairs(name, cores=1, size=size) for name, size in (("tall", (48, 40)), ("wide", (40, 48))))
    for folder in (tall, wide):
        path = folder / "core_00_HE.npy"
        np.save(path, np.full_like(np.load(path), 255))
    assert digests(open_pairs(tall)) != digests(open_pairs(wide))


def test_small_cores_and_few_of_them_are_no_exception(write_pairs, open_pairs):
    opened = open_pairs(write_pairs(cores=3, size=(9, 7)), patch_size=4)
    assert list(core_digests(opened.table, [2])) == ["core_02"]
    assert core_digests(opened.table, []) == {}


def test_a_small_change_over_the_whole_core_is_seen(write_pairs, open_pairs):
    folder = write_pairs(cores=1)
    before = digests(open_pairs(folder))
    path = folder / "core_00_HE.npy"
    np.save(path, np.roll(np.load(path), 1, axis=1))
    assert digests(open_pairs(folder)) != before


def test_large_cores_take_little_time(tmp_path, open_pairs):
    for name, channels in (("HE", 3), ("ORION", 1)):
        array = np.lib.format.open_memmap(tmp_path / f"core_{name}.npy", "w+", np.uint8, (4096, 4096, channels))
        array[::64] = 7
        del array
    opened = open_pairs(tmp_path)
    digests(opened)
    started = time.perf_counter()
    for _ in range(10):
        digests(opened)
    # Reading the whole file takes several times as long.
    assert (time.perf_counter() - started) / 10 < 0.05
