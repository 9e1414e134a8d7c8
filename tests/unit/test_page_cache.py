"""Sets that memory cannot hold: the very bytes of a crop are asked for, and the patches are the same."""

import mmap

import numpy as np
import pytest
import torch

from orion_unet.data import page_cache, patches
from orion_unet.data.patches import PatchPlace, PatchReader

CROPS = {
    "rows of pixels": ((60, 70, 5), np.s_[10:42, 3:35]),
    "planes": ((5, 60, 70), np.s_[:, 10:42, 3:35]),
    "rows far apart": ((40, 9000, 5), np.s_[4:36, 100:132]),
    "planes far apart": ((3, 40, 20_000), np.s_[:, 4:36, 100:132]),
}


@pytest.mark.parametrize(("shape", "window"), CROPS.values(), ids=CROPS)
@pytest.mark.parametrize("transposed", [False, True])
def test_the_pieces_hold_every_byte_of_a_crop_and_little_else(shape, window, transposed):
    array = np.zeros(shape, np.uint16)
    crop = array[window]
    touched = np.zeros(array.nbytes, bool)
    for start, stop in page_cache._pieces(crop.transpose(2, 0, 1) if transposed else crop):
        first = start - array.ctypes.data
        assert 0 <= first < stop - array.ctypes.data <= array.nbytes
        touched[first : stop - array.ctypes.data] = True
    marked = array.copy()
    marked[window] = 0xFFFF
    wanted = marked.reshape(-1).view(np.uint8) > 0
    assert touched[wanted].all()
    rows = crop.size // crop.shape[-1] if shape[0] == crop.shape[0] else crop.shape[0]
    assert touched.sum() <= wanted.sum() + rows * page_cache.GAP_BYTES


def test_the_requested_range_is_inside_the_map_and_covers_the_crop(tmp_path, monkeypatch):
    np.save(tmp_path / "a.npy", np.zeros((300, 400, 7), np.uint16))
    stored = np.load(tmp_path / "a.npy", mmap_mode="r")
    asked = []

    class Memory:
        def madvise(self, advice, start, length):
            assert start % mmap.PAGESIZE == 0
            asked.append((advice, start, start + length))

    crop = np.asarray(stored)[250:282, 17:49]
    monkeypatch.setattr(stored, "_mmap", Memory(), raising=False)
    page_cache.ask_for(stored, crop)
    assert {advice for advice, _, _ in asked} == {mmap.MADV_WILLNEED}
    # The header of this file is 128 bytes long.
    first, last = 128 + (250 * 400 + 17) * 14, 128 + ((281 * 400) + 49) * 14
    assert asked[0][1] <= first < asked[0][1] + mmap.PAGESIZE
    assert asked[-1][2] == last


@pytest.mark.parametrize("layout", ["hwc", "chw"])
def test_patches_of_a_set_that_memory_cannot_hold_are_the_same(write_pairs, open_pairs, monkeypatch, layout):
    opened = open_pairs(write_pairs(orion_layout=layout, he_layout=layout))
    places = [PatchPlace(core, 3 * core, 5) for core in (2, 0, 3)]
    assert not opened.reader.from_disk
    expected = opened.reader.read(places)
    asked = []
    monkeypatch.setattr(page_cache, "memory_limit", lambda: opened.table.nbytes)
    monkeypatch.setattr(patches, "ask_for", lambda stored, crop: asked.append(crop.shape))
    reader = PatchReader(opened.table, opened.scales, 16)
    assert reader.from_disk
    found = reader.read(places)
    assert len(asked) == 6
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert reader.tissue_fraction(1, 4, 4) == opened.reader.tissue_fraction(1, 4, 4)


def test_the_size_of_a_set_is_that_of_its_arrays(write_pairs, open_pairs):
    table = open_pairs(write_pairs()).table
    assert table.nbytes == sum(table.open(core, kind).nbytes for core in range(4) for kind in ("he", "orion"))


def test_the_memory_of_a_container_counts_where_it_is_less(tmp_path, monkeypatch):
    whole = page_cache.memory_limit()
    assert whole > 2**28
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(page_cache, "CGROUPS", tmp_path)
    monkeypatch.setattr(page_cache, "OWN_CGROUPS", tmp_path / "absent")
    limit.write_text("268435456\n")
    assert page_cache.memory_limit() == 2**28
    assert page_cache.fits_page_cache(2**27)
    assert not page_cache.fits_page_cache(2**28)
    limit.write_text("max\n")
    assert page_cache.memory_limit() == whole


@pytest.mark.parametrize(
    ("listed", "limited"),
    [
        ("0::/system.slice/job_7/step_0", "system.slice/job_7/memory.max"),
        ("0::/system.slice/job_7/step_0", "system.slice/job_7/step_0/memory.max"),
        ("5:cpu:/a\n9:pids,memory:/slurm/job:7", "memory/slurm/job:7/memory.limit_in_bytes"),
        ("9:memory:/docker/of/the/host", "memory/memory.limit_in_bytes"),
        ("0::/", "memory.max"),
        ("nonsense", "memory.max"),
    ],
)
def test_the_memory_of_a_job_counts_wherever_around_the_process_it_is_limited(tmp_path, monkeypatch, listed, limited):
    whole = page_cache.memory_limit()
    monkeypatch.setattr(page_cache, "CGROUPS", tmp_path)
    monkeypatch.setattr(page_cache, "OWN_CGROUPS", tmp_path / "cgroup")
    (tmp_path / "cgroup").write_text(listed + "\n")
    (tmp_path / limited).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / limited).write_text("268435456\n")
    (tmp_path / "cpu" / "a").mkdir(parents=True)
    (tmp_path / "cpu" / "a" / "memory.limit_in_bytes").write_text("1\n")
    assert whole > page_cache.memory_limit() == 2**28
