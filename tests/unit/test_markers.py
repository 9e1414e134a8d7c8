"""Marker images of every layout read by region, and thumbnails made of their levels."""

import numpy as np
import pytest

from orion_unet.errors import InputError
from orion_unet.slides.open import open_he, open_markers
from orion_unet.slides.thumbnails import he_thumbnail, marker_thumbnail

tifffile = pytest.importorskip("tifffile")
RNG = np.random.default_rng(0)
MARKERS = RNG.integers(0, 60000, (5, 150, 131), dtype=np.uint16)
NAMES = ["DNA", "CD3", "CD8", "PanCK", "AF"]
META = {"axes": "CYX", "Channel": {"Name": NAMES}, "PhysicalSizeX": 0.325, "PhysicalSizeXUnit": "µm",
        "PhysicalSizeY": 0.325, "PhysicalSizeYUnit": "µm"}  # fmt: skip
TILES = {"tile": (64, 32), "photometric": "minisblack"}


def half(image):
    return image[..., ::2, ::2]


def write_ome(path, compression=None, bigtiff=False, subifds=True, **kind):
    with tifffile.TiffWriter(path, bigtiff=bigtiff, ome=True) as writer:
        options = {"compression": compression, **(kind or TILES)}
        writer.write(MARKERS, subifds=1 if subifds else None, metadata=META, **options)
        if subifds:
            writer.write(half(MARKERS), subfiletype=1, **options)
    return path


def write_flat_pyramid(path):
    """A pyramid whose levels are further pages of the file, as early writers of mIF left them."""
    description = tifffile.OmeXml()
    description.addimage(np.uint16, MARKERS.shape, (5, 1, 1, 150, 131, 1), **META)
    with tifffile.TiffWriter(path, ome=False) as writer:
        for level in (MARKERS, half(MARKERS)):
            for index, plane in enumerate(level):
                text = description.tostring().encode() if level is MARKERS and index == 0 else None
                writer.write(plane, description=text, metadata=None, compression="lzw", **TILES)
    return path


FILES = {
    "tiles, deflate": lambda path: write_ome(path / "m.ome.tif", "deflate"),
    "BigTIFF, zstd": lambda path: write_ome(path / "m.ome.tif", "zstd", bigtiff=True),
    "strips, lzw": lambda path: write_ome(path / "m.ome.tif", "lzw", rowsperstrip=16, photometric="minisblack"),
    "uncompressed in one piece": lambda path: write_ome(path / "m.ome.tif", subifds=False, photometric="minisblack"),
    "levels without SubIFDs": lambda path: write_flat_pyramid(path / "m.ome.tif"),
    "one planar page": lambda path: write_ome(
        path / "m.ome.tif", "lzw", subifds=False, planarconfig="separate", photometric="minisblack", tile=(32, 64)
    ),
}


@pytest.mark.parametrize(("kind", "write"), FILES.items(), ids=FILES)
def test_markers_of_a_tiff_are_read_by_region_with_their_names_and_pixel_size(kind, write, tmp_path):
    with open_markers(write(tmp_path)) as image:
        assert image.shape == MARKERS.shape
        assert image.dtype == np.uint16
        # OME has one name for all samples of a page.
        assert list(image.channel_names) == ([] if kind == "one planar page" else NAMES)
        assert image.pixel_size_um == pytest.approx(0.325)
        np.testing.assert_array_equal(image.read([4, 1], 40, 20, 70, 111), MARKERS[[4, 1], 40:110, 20:131])


@pytest.mark.parametrize("write", FILES.values(), ids=FILES)
def test_a_thumbnail_of_markers_is_the_mean_over_areas_of_the_image_or_of_its_nearest_level(write, tmp_path):
    with open_markers(write(tmp_path)) as image:
        thumbnail = marker_thumbnail(image, [2], 33)
        level = image.nearest_level(2.0)
    # The level of these files is every second pixel, and one side of it is rounded up.
    source = half(MARKERS) if level.shape != MARKERS.shape else MARKERS
    step = round(thumbnail.factor * source.shape[1] / 150)
    height, width = source.shape[1] // step, source.shape[2] // step
    blocks = source[2, : height * step, : width * step].reshape(height, step, width, step).astype(float)
    np.testing.assert_allclose(thumbnail.pixels[..., 0], blocks.mean((1, 3)), rtol=1e-5)
    assert thumbnail.factor == pytest.approx(150 / 33, rel=0.2)


def test_levels_that_are_further_pages_are_used(tmp_path):
    with open_markers(write_flat_pyramid(tmp_path / "m.ome.tif")) as image:
        assert image.nearest_level(2.0).shape == (5, 75, 66)
        assert image.nearest_level(1.5) is image


@pytest.mark.parametrize("array", [MARKERS, np.ascontiguousarray(MARKERS.transpose(1, 2, 0))], ids=["chw", "hwc"])
def test_markers_of_an_array_file_are_read_in_either_layout(array, tmp_path):
    np.save(tmp_path / "m.npy", array)
    with open_markers(tmp_path / "m.npy") as image:
        assert image.shape == MARKERS.shape
        np.testing.assert_array_equal(image.read([0, 3], 7, 9, 30, 40), MARKERS[[0, 3], 7:37, 9:49])


def test_markers_of_an_ome_zarr_are_read_by_region_with_their_names_and_pixel_size(tmp_path):
    zarr = pytest.importorskip("zarr")
    group = zarr.open_group(str(tmp_path / "m.ome.zarr"), mode="w", zarr_format=3)
    scale = [{"type": "scale", "scale": [1, 325.0, 325.0]}]
    axes = [{"name": "c", "type": "channel"}, *({"name": n, "type": "space", "unit": "nanometer"} for n in "yx")]
    for name, level in (("0", MARKERS), ("1", half(MARKERS))):
        group.create_array(name, data=np.ascontiguousarray(level), chunks=(1, 64, 64))
    datasets = [{"path": "0", "coordinateTransformations": scale}, {"path": "1"}]
    group.attrs["ome"] = {
        "version": "0.5",
        "multiscales": [{"axes": axes, "datasets": datasets}],
        "omero": {"channels": [{"label": name} for name in NAMES]},
    }
    with open_markers(tmp_path / "m.ome.zarr") as image:
        assert (image.shape, list(image.channel_names)) == (MARKERS.shape, NAMES)
        assert image.pixel_size_um == pytest.approx(0.325)
        np.testing.assert_array_equal(image.read([3], 60, 60, 80, 71), MARKERS[[3], 60:140, 60:131])
        assert image.nearest_level(2.0).shape == (5, 75, 66)


def test_a_stack_of_depths_is_not_taken_for_markers(tmp_path):
    tifffile.imwrite(
        tmp_path / "z.ome.tif", RNG.integers(0, 9, (3, 2, 64, 64), dtype=np.uint16), metadata={"axes": "ZCYX"}
    )
    with pytest.raises(InputError, match="one plane per channel"):
        open_markers(tmp_path / "z.ome.tif")


def test_a_truncated_marker_file_is_refused_when_it_is_opened(tmp_path):
    path = write_ome(tmp_path / "m.ome.tif", "deflate", subifds=False)
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(InputError, match=r"m\.ome\.tif: is (truncated|damaged)"):
        open_markers(path)


def test_damage_in_a_smaller_level_names_the_level_and_the_place(tmp_path):
    path = write_flat_pyramid(tmp_path / "m.ome.tif")
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[5 + 2]
        start, count = page.dataoffsets[4], page.databytecounts[4]
    content = bytearray(path.read_bytes())
    content[start : start + count] = b"\xff" * count
    path.write_bytes(content)
    with open_markers(path) as image, pytest.raises(InputError, match=r"m\.ome\.tif: .*level 1, row 64, column 32"):
        marker_thumbnail(image, [2], 33)


def test_a_damaged_chunk_of_an_ome_zarr_names_its_place(tmp_path):
    zarr = pytest.importorskip("zarr")
    group = zarr.open_group(str(tmp_path / "m.ome.zarr"), mode="w", zarr_format=3)
    group.create_array("0", data=MARKERS, chunks=(1, 64, 64))
    axes = [{"name": name} for name in "cyx"]
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": [{"path": "0"}]}]}
    (tmp_path / "m.ome.zarr" / "0" / "c" / "1" / "1" / "0").write_bytes(b"nonsense")
    with open_markers(tmp_path / "m.ome.zarr") as image:
        assert image.read([1], 0, 0, 64, 131).shape == (1, 64, 131)
        with pytest.raises(InputError, match=r"m\.ome\.zarr: is damaged or truncated at level 0, row 64, column 0"):
            image.read([1], 64, 0, 10, 10)


def test_a_thumbnail_of_an_he_has_its_colours(tmp_path):
    he = np.kron(RNG.integers(0, 255, (20, 25, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
    tifffile.imwrite(tmp_path / "he.tif", he, tile=(64, 64), photometric="rgb", compression="deflate")
    with open_he(tmp_path / "he.tif") as image:
        thumbnail = he_thumbnail(image, 25)
    assert thumbnail.factor == 8
    np.testing.assert_allclose(thumbnail.pixels, he[::8, ::8] / 255, atol=1e-6)
