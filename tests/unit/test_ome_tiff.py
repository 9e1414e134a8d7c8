"""Pyramidal OME-TIFF: what a reader finds in it, in bounded memory, whole or not at all."""

import os
import subprocess
import sys
import textwrap
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

pytest.importorskip("tifffile", reason="the optional packages for inference are not installed")
pytest.importorskip("imagecodecs", reason="the optional packages for inference are not installed")
import tifffile

from orion_unet.errors import InputError, RunError
from orion_unet.inference.ome_tiff import channel_colours, release, write_ome_tiff

ROOT = Path(__file__).resolve().parents[2]
OME = "{http://www.openmicroscopy.org/Schemas/OME/2016-06}"


@pytest.fixture
def image():
    return np.random.default_rng(3).random((3, 1301, 1102), np.float32)


def pixels_of(path):
    with tifffile.TiffFile(path) as tiff:
        return ElementTree.fromstring(tiff.ome_metadata).find(f"{OME}Image/{OME}Pixels")


def levels_of(path):
    with tifffile.TiffFile(path) as tiff:
        assert len(tiff.series) == 1
        return [level.asarray() for level in tiff.series[0].levels]


def means_of_existing_pixels(image):
    """2 x 2 means in float64, over the one, two or four pixels that are there."""
    height, width = image.shape[1:]
    padded = np.full((len(image), height + height % 2, width + width % 2), np.nan)
    padded[:, :height, :width] = image
    blocks = padded.reshape(len(image), padded.shape[1] // 2, 2, padded.shape[2] // 2, 2)
    return np.nanmean(blocks, axis=(2, 4))


def test_names_pixel_size_type_and_description_are_in_the_ome_metadata(tmp_path, image):
    names = ["Hoechst", 'CD3ε <&">', "β-catenin {x}"]
    write_ome_tiff(tmp_path / "a.ome.tif", image, names, pixel_size_um=0.325, description="3 < 4 & so on")
    pixels = pixels_of(tmp_path / "a.ome.tif")
    assert [channel.get("Name") for channel in pixels.iter(f"{OME}Channel")] == names
    assert [pixels.get(f"PhysicalSize{axis}") for axis in "XY"] == ["0.325", "0.325"]
    assert [pixels.get(f"PhysicalSize{axis}Unit") for axis in "XY"] == ["µm", "µm"]
    assert [int(pixels.get(f"Size{axis}")) for axis in "CYX"] == [3, 1301, 1102]
    assert pixels.get("Type") == "uint16"
    with tifffile.TiffFile(tmp_path / "a.ome.tif") as tiff:
        assert ElementTree.fromstring(tiff.ome_metadata).find(f"{OME}Image/{OME}Description").text == "3 < 4 & so on"


def test_a_control_character_in_a_name_leaves_the_metadata_readable(tmp_path, image):
    write_ome_tiff(tmp_path / "a.ome.tif", image[:1], ["CD\x0020"])
    assert pixels_of(tmp_path / "a.ome.tif").find(f"{OME}Channel").get("Name") == "CD 20"


def test_without_a_pixel_size_none_is_claimed(tmp_path, image):
    write_ome_tiff(tmp_path / "a.ome.tif", image, "abc")
    assert pixels_of(tmp_path / "a.ome.tif").get("PhysicalSizeX") is None
    with tifffile.TiffFile(tmp_path / "a.ome.tif") as tiff:
        assert tiff.pages[0].resolutionunit == tifffile.RESUNIT.NONE


def test_pixels_per_centimetre_halve_from_level_to_level(tmp_path, image):
    write_ome_tiff(tmp_path / "a.ome.tif", image, "abc", pixel_size_um=0.5)
    with tifffile.TiffFile(tmp_path / "a.ome.tif") as tiff:
        for level, per_centimetre in zip(tiff.series[0].levels, (20000, 10000, 5000), strict=True):
            page = level.pages[0].aspage()
            assert page.resolutionunit == tifffile.RESUNIT.CENTIMETER
            assert page.resolution == (per_centimetre, per_centimetre)


def test_levels_are_subifds_tiled_and_compressed_for_bio_formats(tmp_path, image):
    write_ome_tiff(tmp_path / "a.ome.tif", image, "abc")
    with tifffile.TiffFile(tmp_path / "a.ome.tif") as tiff:
        assert [len(page.aspage().subifds) for page in tiff.pages] == [2, 2, 2]
        for level in tiff.series[0].levels:
            page = level.pages[0].aspage()
            assert (page.tilelength, page.tilewidth) == (512, 512)
            assert page.compression == tifffile.COMPRESSION.ADOBE_DEFLATE
            assert page.predictor == tifffile.PREDICTOR.HORIZONTAL
            assert page.is_reduced == (level is not tiff.series[0].levels[0])


def test_float32_keeps_every_value_and_means_every_level(tmp_path, image):
    write_ome_tiff(tmp_path / "a.ome.tif", 7 * image - 3, "abc", dtype="float32")
    levels = levels_of(tmp_path / "a.ome.tif")
    assert [level.shape for level in levels] == [(3, 1301, 1102), (3, 651, 551), (3, 326, 276)]
    np.testing.assert_array_equal(levels[0], 7 * image - 3)
    for above, level in pairwise(levels):
        assert level.dtype == np.float32
        np.testing.assert_allclose(level, means_of_existing_pixels(above), rtol=0, atol=1e-6)


def test_uint16_stores_the_range_up_to_high_and_rounded_means(tmp_path, image):
    write_ome_tiff(tmp_path / "a.ome.tif", 300 * image, "abc", high=250.0)
    levels = levels_of(tmp_path / "a.ome.tif")
    expected = np.rint(np.minimum(image.astype(np.float64) * 300 / 250, 1) * 65535)
    assert np.abs(levels[0] - expected).max() <= 1
    for above, level in pairwise(levels):
        assert level.dtype == np.uint16
        assert np.abs(level - means_of_existing_pixels(above)).max() <= 0.5


def test_uint16_clips_below_zero_and_above_high(tmp_path):
    row = np.array([-5.0, 0.0, 1e-6, 2.0, 4.0, 1e9], np.float32)
    write_ome_tiff(tmp_path / "a.ome.tif", row.reshape(1, 1, 6), ["a"], high=4.0)
    assert levels_of(tmp_path / "a.ome.tif")[0].ravel().tolist() == [0, 0, 0, 32768, 65535, 65535]


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 512, 512), (1, 513, 3), (1, 40, 1025)])
def test_any_size_comes_back(tmp_path, shape):
    image = np.random.default_rng(0).random(shape, np.float32)
    write_ome_tiff(tmp_path / "a.ome.tif", image, "ab"[: shape[0]], dtype="float32")
    levels = levels_of(tmp_path / "a.ome.tif")
    np.testing.assert_array_equal(levels[0].reshape(shape), image)
    assert max(levels[-1].shape) <= 512
    assert len(levels) == 1 + (max(shape) > 512) + (max(shape) > 1024)


def test_a_memory_map_in_any_axis_order_is_written_like_an_array(tmp_path, image):
    np.save(tmp_path / "hwc.npy", image.transpose(1, 2, 0))
    view = np.load(tmp_path / "hwc.npy", mmap_mode="r").transpose(2, 0, 1)
    write_ome_tiff(tmp_path / "a.ome.tif", view, "abc", dtype="float32")
    np.testing.assert_array_equal(levels_of(tmp_path / "a.ome.tif")[0], image)


@pytest.mark.parametrize("mode", ["r", "r+", "c"])
def test_releasing_a_map_loses_no_value(tmp_path, mode):
    np.save(tmp_path / "a.npy", np.arange(10_000.0))
    mapped = np.load(tmp_path / "a.npy", mmap_mode=mode)
    if mode != "r":
        mapped[5] = -1
    release(mapped[2:])
    assert mapped[5] == (5 if mode == "r" else -1)
    assert mapped[6] == 6


def test_colours_are_distinct_and_nuclei_alone_are_blue():
    from skimage.color import rgb2lab

    names = ["CD3", "Hoechst", *(f"marker {index}" for index in range(18))]
    colours = channel_colours(names)
    assert colours[1] == (0, 90, 255)
    lab = rgb2lab(np.array(colours) / 255.0)
    distance = np.linalg.norm(lab[:, None] - lab, axis=-1) + 1000 * np.eye(len(names))
    # A difference of 2 is what an eye just notices side by side.
    assert distance.min() > 20
    assert lab[np.arange(20) != 1, 0].min() > 45
    assert channel_colours(names[:7]) == colours[:7]


def test_a_colour_is_stored_as_signed_rgba(tmp_path, image):
    write_ome_tiff(tmp_path / "a.ome.tif", image, ["DAPI", "b", "c"])
    stored = [int(channel.get("Color")) for channel in pixels_of(tmp_path / "a.ome.tif").iter(f"{OME}Channel")]
    assert stored[0] == (0 << 24) + (90 << 16) + (255 << 8) + 255
    assert all(-(2**31) <= value < 2**31 and value % 256 == 255 for value in stored)


def run_python(script, *arguments):
    script = textwrap.dedent(script)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(words, env=env, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory that Linux tells")
@pytest.mark.slow
def test_memory_stays_far_below_the_size_of_the_image(tmp_path):
    shape = (4, 4096, 4096)
    np.lib.format.open_memmap(tmp_path / "big.npy", "w+", np.float32, shape).flush()
    done = run_python(
        """
        import re, sys
        from pathlib import Path
        import numpy, imagecodecs, tifffile
        from orion_unet.inference.ome_tiff import write_ome_tiff
        def peak_bytes():
            # Not ru_maxrss, which starts at the peak of the process that started this one.
            return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
        small = numpy.ones((4, 16, 16), numpy.float32)
        write_ome_tiff(Path(sys.argv[2]), small, "abcd", dtype="float32")
        before = peak_bytes()
        image = numpy.load(sys.argv[1], mmap_mode="r")
        write_ome_tiff(Path(sys.argv[2]), image, "abcd", dtype="float32")
        print(peak_bytes() - before)
        """,
        tmp_path / "big.npy",
        tmp_path / "big.ome.tif",
    )
    assert done.returncode == 0, done.stderr
    image_bytes = 4 * np.prod(shape)
    assert 0 < int(done.stdout) < image_bytes * 2 / 3
    with tifffile.TiffFile(tmp_path / "big.ome.tif") as tiff:
        assert tiff.series[0].shape == shape
        assert len(tiff.series[0].levels) == 4


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of a file as POSIX systems can")
def test_a_disk_that_fills_up_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "a.ome.tif").write_bytes(b"old")
    done = run_python(
        """
        import resource, sys
        from pathlib import Path
        import numpy
        from orion_unet.errors import RunError
        from orion_unet.inference.ome_tiff import write_ome_tiff
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        try:
            write_ome_tiff(Path(sys.argv[1]), numpy.random.default_rng(0).random((2, 1024, 1024), "f4"), "ab")
        except RunError as error:
            print(error)
        """,
        tmp_path / "a.ome.tif",
    )
    assert done.stdout.startswith(f"{tmp_path / 'a.ome.tif'}: cannot be written (File too large; "), done.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.ome.tif"]
    assert (tmp_path / "a.ome.tif").read_bytes() == b"old"


def test_an_error_of_the_image_leaves_nothing_behind(tmp_path):
    class Failing:
        shape, ndim, size = (1, 600, 600), 3, 360_000

        def __len__(self):
            return 1

        def __iter__(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_ome_tiff(tmp_path / "a.ome.tif", Failing(), ["a"])
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_named(tmp_path, image):
    with pytest.raises(RunError, match=r"nowhere/a\.ome\.tif: cannot be written \(No such file"):
        write_ome_tiff(tmp_path / "nowhere" / "a.ome.tif", image, "abc")


@pytest.mark.parametrize(
    ("module", "package"), [("tifffile",) * 2, ("imagecodecs",) * 2, ("skimage.color", "scikit-image")]
)
def test_a_missing_package_is_named_with_what_to_install(module, package, tmp_path, image, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=rf'{package} is needed for this: pip install "orion-unet\[inference\]"'):
        write_ome_tiff(tmp_path / "a.ome.tif", image, "abc")


def test_more_than_a_classic_tiff_holds_becomes_a_bigtiff(tmp_path, image, monkeypatch):
    write_ome_tiff(tmp_path / "small.ome.tif", image, "abc")
    monkeypatch.setattr("orion_unet.inference.ome_tiff.CLASSIC_BYTES", 1_000_000)
    write_ome_tiff(tmp_path / "large.ome.tif", image, "abc")
    for name, big in (("small", False), ("large", True)):
        with tifffile.TiffFile(tmp_path / f"{name}.ome.tif") as tiff:
            assert tiff.is_bigtiff is big


@pytest.mark.parametrize(
    "wrong", [{"dtype": "uint8"}, {"high": 0.0}, {"high": float("nan")}, {"names": "ab"}], ids=lambda wrong: str(wrong)
)
def test_what_cannot_be_meant_is_refused(tmp_path, image, wrong):
    with pytest.raises(ValueError, match=r"dtype|high"):
        write_ome_tiff(tmp_path / "a.ome.tif", image, **{"names": "abc", **wrong})
