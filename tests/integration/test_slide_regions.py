"""Pairs that stay in their slides: the pixels, crops and runs of written pairs, and every way to break them."""

import csv
import json
import shutil

import numpy as np
import pytest
from tiny_runs import TINY, differing, losses, weights

from orion_unet.__main__ import dispatch
from orion_unet.cli import check_data, evaluate, pack, prepare
from orion_unet.config import DataOptions, TrainConfig
from orion_unet.data.pairs import find_pairs
from orion_unet.data.patches import PatchPlace, PatchReader
from orion_unet.data.scale import measure_scales
from orion_unet.demo.make import MARKERS, draw_core
from orion_unet.errors import InputError
from orion_unet.slides.tiles import TiledArray
from orion_unet.training.loop import train as train_run

pytestmark = pytest.mark.slow

tifffile = pytest.importorskip("tifffile")
ndimage = pytest.importorskip("scipy.ndimage")
SIDE, KEPT = 640, [0, 2, 3, 5]
UM = {"PhysicalSizeX": 0.325, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": 0.325, "PhysicalSizeYUnit": "µm"}


def bent(he):
    """The H&E at 1.2 times the resolution, turned by 3 degrees, shifted, and bent by some pixels."""
    side = round(SIDE * 1.2)
    rows, columns = np.mgrid[:side, :side] / 1.2
    angle, middle = np.radians(3.0), (SIDE - 1) / 2
    down, right = rows - middle, columns - middle
    y = np.cos(angle) * down - np.sin(angle) * right + middle + 5.3 + 2.5 * np.sin(columns / 90)
    x = np.sin(angle) * down + np.cos(angle) * right + middle - 8.1 + 2.5 * np.cos(rows / 110)
    return np.stack([ndimage.map_coordinates(he[..., c], (y, x), order=1, mode="nearest") for c in range(3)], -1)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with two slides, prepared as .npy and as regions."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "slides").mkdir()
    he, orion = draw_core(5, SIDE)
    size = {name: value / 1.2 if name.endswith(("X", "Y")) else value for name, value in UM.items()}
    tifffile.imwrite(folder / "slides" / "A_he.ome.tif", bent(he), photometric="rgb", tile=(128, 128), ome=True,
                     compression="jpeg", metadata={"axes": "YXS", **size})  # fmt: skip
    planes = np.ascontiguousarray(orion.transpose(2, 0, 1))
    tifffile.imwrite(folder / "slides" / "A_orion.ome.tif", planes, photometric="minisblack", tile=(128, 128), ome=True,
                     compression="zstd", metadata={"axes": "CYX", "Channel": {"Name": list(MARKERS)}, **UM})  # fmt: skip
    he, orion = draw_core(6, SIDE)
    np.save(folder / "slides" / "B_he.npy", he)
    np.save(folder / "slides" / "B_orion.npy", orion)
    rows = ["slide,he,orion,he_pixel_size_um,orion_pixel_size_um", "A,A_he.ome.tif,A_orion.ome.tif,,",
            "B,B_he.npy,B_orion.npy,0.325,0.325"]  # fmt: skip
    (folder / "slides" / "slides.csv").write_text("\n".join([*rows, ""]))
    lines = [f"{name},{'' if index in KEPT else 'TRUE'}" for index, name in enumerate(MARKERS)]
    (folder / "slides" / "markers.csv").write_text("\n".join(["marker_name,remove", *lines]))
    for form, name in (("npy", "written"), ("none", "regions")):
        assert run(folder, folder / name, form) == 0
    return folder


def run(folder, output, form, *words):
    return prepare.main([
        str(folder / "slides" / "slides.csv"), "--output_dir", str(output), "--format", form, "--jobs", "1",
        "--markers", str(folder / "slides" / "markers.csv"), "--regions", "whole", "--region_size", "320", *words,
    ])  # fmt: skip


@pytest.fixture
def regions(made, tmp_path):
    """A copy of the regions, and of their slides, to be damaged."""
    for name in ("slides", "regions"):
        shutil.copytree(made / name, tmp_path / name)
    return tmp_path / "regions"


def opened(folder, **options):
    return find_pairs(DataOptions(pairs_dir=str(folder), patch_size=64, **options))


def refusal(folder, **options):
    with pytest.raises(InputError) as caught:
        opened(folder, **options)
    return str(caught.value)


def test_packed_regions_are_the_written_pairs_byte_for_byte(made, tmp_path):
    written, regions = made / "written", made / "regions"
    names = {path.name for path in written.glob("*.npy")}
    assert len(names) >= 12 and sum(path.stat().st_size for path in regions.glob("*.json")) < 200_000
    fields = [json.loads(path.read_text())["field"] for path in regions.glob("A_*_HE.region.json")]
    assert any(field and np.abs(field["nodes"]).max() > 0.5 for field in fields)
    assert pack.main([str(regions), "--output_dir", str(tmp_path / "packed"), "--patch_size", "64"]) == 0
    assert {path.name for path in (tmp_path / "packed").glob("*.npy")} == names
    for name in names | {"channel_names.txt", "groups.csv"}:
        assert (tmp_path / "packed" / name).read_bytes() == (written / name).read_bytes(), name
    for name in ("regions.csv", "rejected.csv"):
        assert (regions / name).read_bytes() == (written / name).read_bytes()
