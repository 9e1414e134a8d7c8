"""Tiny pairs on disk in any layout and dtype, and the objects that read them."""

import gc
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import settings

from orion_unet.config import DataOptions
from orion_unet.data.pairs import find_pairs
from orion_unet.data.patches import PatchReader
from orion_unet.data.scale import measure_scales

# A busy machine must not fail a test: no deadlines, and the same examples in every run.
settings.register_profile("steady", deadline=None, derandomize=True, database=None)
settings.load_profile("steady")

GLASS = 240

# Here and in every process that a test starts: sums over several threads would differ in the last bit; and for tensors
# this small threads cost more than they bring, most of all on a busy machine, where they wait for each other.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_finish():
    """Leave what is imported by now out of every garbage collection: all of torch, for a start."""
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _measurements_of_the_tests_alone(tmp_path_factory):
    """Neither use nor touch what runs of the user have measured."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


def store_array(path, levels, dtype, layout="hwc", order="C"):
    """Save levels 0..255 (H, W, C) as a .npy file that means the same intensity in every dtype."""
    dtype = np.dtype(dtype)
    factor = {"uint8": 1, "uint16": 257}.get(dtype.name, 1 / 255)
    array = (levels.astype(np.float64) * factor).astype(dtype)
    if layout == "chw":
        array = array.transpose(2, 0, 1)
    np.save(path, np.asarray(array, order=order))


def draw_he(rng, height, width, tissue_rows):
    """Dark, saturated noise with blank glass under the first ``tissue_rows`` rows."""
    levels = rng.integers(40, 180, (height, width, 3))
    if tissue_rows is not None:
        levels[tissue_rows:] = GLASS
    return levels


@pytest.fixture
def store():
    return store_array


@pytest.fixture
def write_pairs(tmp_path):
    """Factory: a folder of pairs core_00, core_01, ... of seeded noise; returns the folder."""

    def write(
        name="pairs",
        cores=4,
        size=(48, 40),
        channels=3,
        he_dtype="uint8",
        orion_dtype="uint16",
        he_layout="hwc",
        orion_layout="hwc",
        order="C",
        seed=0,
        tissue_rows=None,
    ):
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(seed)
        for core in range(cores):
            he = draw_he(rng, *size, tissue_rows)
            orion = rng.integers(0, 256, (*size, channels))
            store_array(folder / f"core_{core:02d}_HE.npy", he, he_dtype, he_layout, order)
            store_array(folder / f"core_{core:02d}_ORION.npy", orion, orion_dtype, orion_layout, order)
        return folder

    return write


@pytest.fixture
def open_pairs():
    """Factory: table, scales and reader of a folder."""

    def open_folder(folder, patch_size=16, **options):
        data = DataOptions(pairs_dir=str(folder), patch_size=patch_size, **options)
        table = find_pairs(data)
        scales = measure_scales(table, data.target_normalization == "none")
        return SimpleNamespace(
            options=data, table=table, scales=scales, reader=PatchReader(table, scales, data.patch_size)
        )

    return open_folder
