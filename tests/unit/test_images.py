"""Every kind of H&E file gives the same pixels by region as the array it was written from, or one plain sentence."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from orion_unet.data.zarr_writing import write_zarr
from orion_unet.errors import InputError
from orion_unet.slides.images import ArrayImage
from orion_unet.slides.open import open_he
from orion_unet.slides.thumbnails import he_thumbnail
from orion_unet.slides.whole_slide import WholeSlide

tifffile = pytest.importorskip("tifffile")
pillow = pytest.importorskip("PIL.Image")
pytest.importorskip("imagecodecs")

# Sides that no tile or strip divides.
LEVELS = np.random.default_rng(0).integers(0, 256, (150, 131, 3), dtype=np.uint8)
CHW = np.ascontiguousarray(LEVELS.transpose(2, 0, 1))
OPAQUE = np.dstack([LEVELS, np.full(LEVELS.shape[:2], 255, np.uint8)])
RGB = {"photometric": "rgb"}
TIFFS = {
    "one uncompressed piece": (LEVELS, RGB),
    "one uncompressed piece, big-endian uint16": (LEVELS.astype(np.uint16) * 257, {**RGB, "byteorder": ">"}),
    "planar, one uncompressed piece": (CHW, {**RGB, "planarconfig": "separate"}),
    "a page per channel": (CHW, {"photometric": "minisblack"}),
    "strips of a row": (LEVELS, {**RGB, "rowsperstrip": 1, "compression": "lzw", "predictor": True}),
    "strips": (LEVELS, {**RGB, "rowsperstrip": 7, "compression": "deflate"}),
    "tiles": (LEVELS, {**RGB, "tile": (64, 32), "compression": "deflate"}),
    "tiles, uncompressed": (LEVELS, {**RGB, "tile": (32, 64)}),
    "tiles, uint16": (LEVELS.astype(np.uint16) * 257, {**RGB, "tile": (64, 32), "compression": "zstd"}),
    "tiles, big-endian uint16": (LEVELS.astype(np.uint16) * 257, {**RGB, "tile": (16, 16), "byteorder": ">"}),
    "tiles, lossless JPEG 2000": (LEVELS, {**RGB, "tile": (64, 64), "compression": "jpeg2000"}),
    "planar tiles": (CHW, {**RGB, "planarconfig": "separate", "tile": (32, 32), "compression": "deflate"}),
    "tiles with alpha": (OPAQUE, {**RGB, "tile": (32, 32), "compression": "deflate", "extrasamples": ["unassalpha"]}),
    "alpha, one uncompressed piece": (OPAQUE, {**RGB, "extrasamples": ["unassalpha"]}),
    "OME, interleaved tiles": (LEVELS, {**RGB, "ome": True, "tile": (64, 64), "compression": "deflate"}),
    "OME, compressed page per channel": (
        CHW,
        {"photometric": "minisblack", "ome": True, "metadata": {"axes": "CYX"}, "tile": (64, 64), "compression": "lzw"},
    ),
    "BigTIFF": (LEVELS, {**RGB, "bigtiff": True, "tile": (64, 64)}),
}


def write_tiff(path, array, options):
    whole = {name: options[name] for name in ("byteorder", "bigtiff", "ome") if name in options}
    rest = {name: value for name, value in options.items() if name not in whole}
    with tifffile.TiffWriter(path, **whole) as tiff:
        tiff.write(array, **rest)
    return path


def assert_same_pixels(image, expected=LEVELS):
    height, width = image.shape
    assert (height, width) == expected.shape[:2]
    rng = np.random.default_rng(1)
    regions = [(0, 0, height, width), (height - 1, width - 1, 1, 1)]
    for _ in range(12):
        y, x = int(rng.integers(height)), int(rng.integers(width))
        regions.append((y, x, int(rng.integers(1, height - y + 1)), int(rng.integers(1, width - x + 1))))
    for y, x, h, w in regions:
        region = image.read(y, x, h, w)
        assert region.dtype == np.float32
        np.testing.assert_allclose(region, expected[y : y + h, x : x + w] / 255, atol=1e-6)


@pytest.mark.parametrize(("array", "options"), TIFFS.values(), ids=TIFFS)
def test_a_tiff_is_read_by_region_whatever_its_layout(array, options, tmp_path):
    with open_he(write_tiff(tmp_path / "slide.tif", array, options)) as image:
        assert image.is_slide
        assert_same_pixels(image)


def test_of_a_pyramid_the_full_resolution_is_read(tmp_path):
    with tifffile.TiffWriter(tmp_path / "slide.ome.tif", ome=True) as tiff:
        tiff.write(LEVELS, subifds=1, tile=(64, 64), **RGB)
        tiff.write(LEVELS[::2, ::2], subfiletype=1, tile=(64, 64), **RGB)
    with open_he(tmp_path / "slide.ome.tif") as image:
        assert_same_pixels(image)


FOREIGN = {
    "ImageJ": "ImageJ=1.53\nimages=3\nslices=3\n",
    "tifffile": '{"shape": [3, 150, 131, 3]}',
    "ImageScope": "Aperio Image Library v11.2.1 \r\n150x131 (64x64) JPEG/RGB Q=30|AppMag = 20|MPP = 0.4990|Left = 25",
}


def write_pages(path, levels, description):
    """A pyramid as libvips writes it: a page a level, with the description of its input in each."""
    with tifffile.TiffWriter(path) as tiff:
        for level in levels:
            tiff.write(level, tile=(64, 64), compression="deflate", description=description, metadata=None, **RGB)


@pytest.mark.parametrize("description", FOREIGN.values(), ids=FOREIGN)
def test_of_a_pyramid_that_carries_the_description_of_another_file_the_first_page_is_read(description, tmp_path):
    write_pages(tmp_path / "slide.tif", (LEVELS, LEVELS[::2, ::2], LEVELS[::4, ::4]), description)
    with open_he(tmp_path / "slide.tif") as image:
        assert_same_pixels(image)


def test_where_the_description_fits_no_page_and_a_later_page_is_larger_the_file_is_refused(tmp_path):
    write_pages(tmp_path / "slide.tif", (LEVELS[::2, ::2], LEVELS, LEVELS[::4, ::4]), FOREIGN["ImageJ"])
    with pytest.raises(InputError, match=r"slide\.tif: .*the first page is not the largest"):
        open_he(tmp_path / "slide.tif")


def test_jpeg_tiles_and_strips_are_decoded_to_rgb(tmp_path):
    smooth = np.stack(np.meshgrid(np.arange(128), np.arange(128)), -1).astype(np.uint8)
    smooth = np.dstack([smooth, 255 - smooth[..., :1]])
    # Stored as YCbCr by both writers.
    write_tiff(tmp_path / "tiles.svs", smooth, {**RGB, "tile": (64, 64), "compression": "jpeg"})
    pillow.fromarray(smooth).save(tmp_path / "strips.tif", compression="jpeg", quality=95)
    for name in ("tiles.svs", "strips.tif"):
        with open_he(tmp_path / name) as image:
            assert np.abs(image.read(0, 0, 128, 128) - smooth / 255).max() < 0.05


def test_a_tile_that_the_file_leaves_out_is_white_glass(tmp_path):
    def tiles():
        yield LEVELS[:64, :64]
        yield None

    with tifffile.TiffWriter(tmp_path / "slide.tif") as tiff:
        tiff.write(tiles(), shape=(64, 128, 3), dtype=np.uint8, tile=(64, 64), compression="deflate", **RGB)
    with open_he(tmp_path / "slide.tif") as image:
        region = image.read(0, 0, 64, 128)
    np.testing.assert_allclose(region[:, :64], LEVELS[:64, :64] / 255, atol=1e-6)
    assert (region[:, 64:] == 1).all()


@pytest.mark.parametrize("layout", ["hwc", "chw"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", ">u2", "float16", "float32"])
def test_an_npy_file_means_the_same_in_every_layout_and_dtype(dtype, order, layout, store, tmp_path):
    store(tmp_path / "core_HE.npy", LEVELS, dtype, layout, order)
    with open_he(tmp_path / "core_HE.npy") as image:
        assert not image.is_slide
        if dtype == "float16":
            np.testing.assert_allclose(image.read(0, 0, 150, 131), LEVELS / 255, atol=1e-3)
        else:
            assert_same_pixels(image)


def test_floats_up_to_255_are_declared_by_the_whole_file(tmp_path):
    levels = LEVELS.astype(np.float32)
    levels[:100] = 0.5
    np.save(tmp_path / "core.npy", levels)
    with open_he(tmp_path / "core.npy") as image:
        assert image.read(0, 0, 1, 1).max() == pytest.approx(0.5 / 255)


@pytest.mark.parametrize("name", ["core.png", "core.PNG"])
def test_a_png_keeps_its_pixels_and_loses_its_alpha(name, tmp_path):
    pillow.fromarray(OPAQUE).save(tmp_path / name)
    with open_he(tmp_path / name) as image:
        assert_same_pixels(image)


def test_reading_outside_the_image_gives_what_lies_inside(tmp_path):
    pillow.fromarray(LEVELS).save(tmp_path / "core.png")
    with open_he(tmp_path / "core.png") as image:
        np.testing.assert_allclose(image.read(-5, 120, 10, 50), LEVELS[:5, 120:] / 255, atol=1e-6)
        assert image.read(-20, 0, 10, 10).shape == (0, 10, 3)


def test_the_pixel_size_comes_from_ome_xml_in_its_own_unit(tmp_path):
    metadata = {"axes": "YXS", "PhysicalSizeX": 325.0, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 325.0}
    write_tiff(tmp_path / "slide.ome.tif", LEVELS, {**RGB, "ome": True, "metadata": metadata})
    assert open_he(tmp_path / "slide.ome.tif").pixel_size_um == pytest.approx(0.325)


OME_SIZES = {
    "micrometres by default": ({"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}, 0.5, ""),
    "one axis": ({"PhysicalSizeX": 0.5, "PhysicalSizeXUnit": "µm"}, 0.5, ""),
    "1 micrometre": ({"PhysicalSizeX": 1.0, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": 1.0}, 1.0, ""),
    "less than 1 % apart": ({"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.504}, 0.5, ""),
    "more than 1 % apart": ({"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.51}, None, "0.5 µm across and 0.51 µm down"),
    "in pixels": ({"PhysicalSizeX": 0.5, "PhysicalSizeXUnit": "pixel"}, None, "0.5 pixel, which is no length"),
    "in reference frames": ({"PhysicalSizeX": 2.0, "PhysicalSizeXUnit": "reference frame"}, None, "no length"),
    "1 without a unit": ({"PhysicalSizeX": 1.0, "PhysicalSizeY": 1.0}, None, "1 without a unit"),
    "one axis is 1 without a unit": ({"PhysicalSizeX": 0.5, "PhysicalSizeY": 1.0}, None, "1 without a unit"),
    "in millimetres": ({"PhysicalSizeX": 0.0005, "PhysicalSizeXUnit": "mm"}, 0.5, ""),
}


@pytest.mark.parametrize(("stated", "expected", "doubt"), OME_SIZES.values(), ids=OME_SIZES)
def test_a_pixel_size_in_ome_xml_is_believed_only_as_a_length_equal_on_both_axes(stated, expected, doubt, tmp_path):
    metadata = {"axes": "YXS", **stated}
    image = open_he(write_tiff(tmp_path / "slide.ome.tif", LEVELS, {**RGB, "ome": True, "metadata": metadata}))
    assert image.pixel_size_um == (None if expected is None else pytest.approx(expected))
    assert doubt in image.pixel_size_doubt
    assert bool(doubt) == bool(image.pixel_size_doubt)


def test_what_ome_xml_leaves_in_doubt_other_tags_may_state(tmp_path):
    options = {"ome": True, "metadata": {"axes": "YXS", "PhysicalSizeX": 1.0}}
    options |= {"resolution": (20000, 20000), "resolutionunit": "CENTIMETER", **RGB}
    image = open_he(write_tiff(tmp_path / "slide.ome.tif", LEVELS, options))
    assert image.pixel_size_um == pytest.approx(0.5)
    assert not image.pixel_size_doubt


def test_resolutions_that_differ_between_the_axes_are_no_pixel_size(tmp_path):
    options = {**RGB, "resolution": (20000, 25000), "resolutionunit": "CENTIMETER", "metadata": None}
    pillow.fromarray(LEVELS).save(tmp_path / "slide.png", dpi=(50800, 40000))
    for path in (write_tiff(tmp_path / "slide.tif", LEVELS, options), tmp_path / "slide.png"):
        image = open_he(path)
        assert image.pixel_size_um is None
        assert "across" in image.pixel_size_doubt


def test_the_pixel_size_comes_from_the_description_of_imagescope(tmp_path):
    description = "Aperio Image Library v11.2.1 \r\n150x131 (64x64) JPEG/RGB Q=30|AppMag = 20|MPP = 0.4990|Left = 25"
    write_tiff(tmp_path / "slide.svs", LEVELS, {**RGB, "tile": (64, 64), "description": description, "metadata": None})
    assert open_he(tmp_path / "slide.svs").pixel_size_um == pytest.approx(0.499)


@pytest.mark.parametrize(
    ("resolution", "unit", "expected"),
    [(20000, "CENTIMETER", 0.5), (50800, "INCH", 0.5), (72, "INCH", None), (96, "INCH", None), (20000, "NONE", None)],
)
def test_resolution_tags_count_where_a_microscope_could_have_set_them(resolution, unit, expected, tmp_path):
    options = {**RGB, "resolution": (resolution, resolution), "resolutionunit": unit, "metadata": None}
    write_tiff(tmp_path / "slide.tif", LEVELS, options)
    found = open_he(tmp_path / "slide.tif").pixel_size_um
    assert found == (None if expected is None else pytest.approx(expected))


def test_the_pixel_size_of_imagej_is_in_its_own_unit(tmp_path):
    options = {"imagej": True, "resolution": (2, 2), "metadata": {"unit": "um"}, "photometric": "rgb"}
    tifffile.imwrite(tmp_path / "slide.tif", LEVELS, **options)
    image = open_he(tmp_path / "slide.tif")
    assert image.pixel_size_um == pytest.approx(0.5)
    assert_same_pixels(image)


REFUSED = {
    "gray": (LEVELS[..., 0], {}),
    "palette": (LEVELS[..., 0], {"photometric": "palette", "colormap": np.zeros((3, 256), np.uint16)}),
    "two channels": (LEVELS[..., :2], {"photometric": "minisblack", "planarconfig": "contig"}),
    "cmyk": (OPAQUE, {"photometric": "separated"}),
    "float": (LEVELS.astype(np.float32), RGB),
    "a stack of 5": (np.zeros((5, 40, 40), np.uint8), {"photometric": "minisblack"}),
}


@pytest.mark.parametrize(("array", "options"), REFUSED.values(), ids=REFUSED)
def test_a_tiff_that_is_no_rgb_image_is_refused_by_name(array, options, tmp_path):
    write_tiff(tmp_path / "slide.tif", array, options)
    with pytest.raises(InputError, match=r"slide\.tif: ") as error:
        open_he(tmp_path / "slide.tif")
    assert "\n" not in str(error.value)


def test_a_png_without_three_channels_is_refused(tmp_path):
    pillow.fromarray(LEVELS[..., 0]).save(tmp_path / "gray.png")
    pillow.fromarray(LEVELS).quantize(16).save(tmp_path / "palette.png")
    for name in ("gray.png", "palette.png"):
        with pytest.raises(InputError, match=rf"{name}: is of mode .*three channels"):
            open_he(tmp_path / name)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((8, 8), np.uint8), "3 channels"),
        (np.zeros((8, 8, 4), np.uint8), "3 channels"),
        (np.zeros((3, 8, 3), np.uint8), "can be read as"),
        (np.zeros((0, 8, 3), np.uint8), "no pixel"),
        (np.zeros((8, 8, 3), np.int32), "dtype int32"),
        (np.full((8, 8, 3), 300.0, np.float32), "300"),
        (np.full((8, 8, 3), -1.0, np.float32), "-1"),
        (np.full((8, 8, 3), np.nan, np.float32), "NaN"),
        (np.array([[[{}] * 3]]), "not a .npy file"),
    ],
)
def test_an_npy_that_is_no_image_is_refused_by_name(array, words, tmp_path):
    # Pickles only what this test makes: the reader must refuse the object array.
    np.save(tmp_path / "core.npy", array, allow_pickle=True)
    with pytest.raises(InputError, match=rf"core\.npy: .*{words}"):
        open_he(tmp_path / "core.npy")


@pytest.mark.parametrize("name", ["core.npy", "core.png", "core.jpg", "core.tif"])
@pytest.mark.parametrize("content", [b"", b"nonsense", b"II*\0\x08\0\0\0", b"\x93NUMPY\x01\0"])
def test_nonsense_is_refused_by_name(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=name):
        open_he(tmp_path / name)


@pytest.mark.parametrize("kind", ["strips of a row", "tiles", "one uncompressed piece", "tiles, uncompressed"])
@pytest.mark.parametrize("share", [0.3, 0.7, 0.95])
def test_a_tiff_cut_short_is_refused_and_never_read_as_something_else(kind, share, tmp_path):
    path = write_tiff(tmp_path / "slide.tif", *TIFFS[kind])
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match=r"slide\.tif: "), open_he(path) as image:
        image.read(0, 0, 150, 131)


@pytest.mark.parametrize("name", ["core.png", "core.jpg", "core.npy"])
def test_a_picture_cut_short_is_refused(name, tmp_path):
    path = tmp_path / name
    np.save(path, LEVELS) if name.endswith("npy") else pillow.fromarray(LEVELS).save(path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(InputError, match=name):
        open_he(path)


def test_damage_inside_a_tiff_names_the_file_and_the_place(tmp_path):
    path = write_tiff(tmp_path / "slide.tif", *TIFFS["tiles"])
    with tifffile.TiffFile(path) as tiff:
        start, count = tiff.pages[0].dataoffsets[6], tiff.pages[0].databytecounts[6]
    content = bytearray(path.read_bytes())
    content[start : start + count] = bytes(count)
    path.write_bytes(content)
    with open_he(path) as image:
        image.read(0, 0, 64, 131)
        with pytest.raises(InputError, match=r"slide\.tif: .*level 0, row 64, column 32"):
            image.read(60, 0, 10, 131)


def write_tiles(path, tiles, shape):
    """A tiled TIFF that OpenSlide reads as a slide; a tile that is None is left out."""
    with tifffile.TiffWriter(path) as tiff:
        options = {**RGB, "tile": (64, 64), "compression": "deflate", "metadata": None}
        tiff.write(iter(tiles), shape=(*shape, 3), dtype=np.uint8, **options)


@pytest.fixture
def openslide():
    return pytest.importorskip("openslide", reason="the extra openslide is not installed", exc_type=ImportError)


@pytest.mark.usefixtures("openslide")
@pytest.mark.parametrize("suffix", [".ndpi", ".mrxs", ".scn", ".bif", ".svslide", ".SCN"])
def test_openslide_reads_the_formats_of_scanners_by_region(suffix, tmp_path, monkeypatch):
    # Pieces narrower than the image.
    monkeypatch.setattr("orion_unet.slides.whole_slide.LARGEST_WIDTH", 50)
    options = {**RGB, "tile": (64, 64), "compression": "deflate", "description": FOREIGN["ImageScope"]}
    write_tiff(tmp_path / f"slide{suffix}", LEVELS, {**options, "metadata": None})
    with open_he(tmp_path / f"slide{suffix}") as image:
        assert image.is_slide
        assert image.pixel_size_um == pytest.approx(0.499)
        assert_same_pixels(image)
        assert image.read(-20, 0, 10, 10).shape == (0, 10, 3)


@pytest.mark.usefixtures("openslide")
def test_openslide_states_the_pixel_size_where_both_axes_agree(tmp_path):
    for across, expected in ((20000, 0.5), (25000, None)):
        options = {**RGB, "tile": (64, 64), "resolution": (across, 20000), "resolutionunit": "CENTIMETER"}
        with open_he(write_tiff(tmp_path / "slide.scn", LEVELS, {**options, "metadata": None})) as image:
            assert image.pixel_size_um == (None if expected is None else pytest.approx(expected))
            assert ("0.4 µm across and 0.5 µm down" in image.pixel_size_doubt) == (expected is None)


@pytest.mark.usefixtures("openslide")
def test_what_a_scanner_left_out_is_white_inside_the_slide_and_cropped_around_it(tmp_path):
    tile = LEVELS[:64, :64]
    write_tiles(tmp_path / "slide.scn", [tile, None, tile, None, None, None, None, None], (128, 256))
    with open_he(tmp_path / "slide.scn") as image:
        region = image.read(0, 0, 64, 192)
        assert image.shape == (64, 192)
    expected = np.concatenate([tile / 255, np.ones((64, 64, 3)), tile / 255], axis=1)
    np.testing.assert_allclose(region, expected, atol=1e-6)


@pytest.mark.usefixtures("openslide")
def test_a_thumbnail_of_a_scanner_format_is_made_from_its_nearest_level(tmp_path, monkeypatch):
    levels = [np.full((side, side, 3), value, np.uint8) for side, value in ((512, 200), (128, 120), (32, 60))]
    with tifffile.TiffWriter(tmp_path / "slide.scn") as tiff:
        for index, pixels in enumerate(levels):
            tiff.write(pixels, subfiletype=int(index > 0), tile=(32, 32), metadata=None, compression="deflate", **RGB)
    read, genuine = [], WholeSlide.stored
    monkeypatch.setattr(
        WholeSlide, "stored", lambda image, *region: read.append(image.shape) or genuine(image, *region)
    )
    with open_he(tmp_path / "slide.scn") as image:
        assert image.nearest_level(3.9) is image
        thumbnail = he_thumbnail(image, 64)
        assert (thumbnail.factor, set(read)) == (8, {(128, 128)})
        np.testing.assert_allclose(thumbnail.pixels, 120 / 255, atol=1e-6)
        assert image.nearest_level(16).stored(3, 5, 7, 9).tolist() == np.full((7, 9, 3), 60).tolist()


def test_half_transparent_pixels_are_seen_through_onto_white():
    def read_region(corner, level, size):
        assert (corner, level, size) == ((5, 7), 0, (2, 1))
        return pillow.fromarray(np.array([[[100, 50, 0, 51], [10, 20, 30, 255]]], np.uint8))

    bounds = {"openslide.bounds-x": "5", "openslide.bounds-y": "7"}
    slide = SimpleNamespace(properties=bounds, dimensions=(2, 1), read_region=read_region)
    image = WholeSlide(Path("slide.mrxs"), slide)
    # 100 at a fifth of opacity: 100 / 5 + 255 * 4 / 5.
    assert image.stored(0, 0, 1, 2).tolist() == [[[224, 214, 204], [10, 20, 30]]]


@pytest.mark.usefixtures("openslide")
def test_a_slide_that_openslide_finds_damaged_is_refused_by_name(tmp_path):
    path = tmp_path / "slide.ndpi"
    write_tiff(path, LEVELS, {**RGB, "tile": (64, 64), "compression": "deflate", "metadata": None})
    content = bytearray(path.read_bytes())
    # By its name, tifffile would look for the long offsets of NDPI.
    with tifffile.TiffFile(path, is_ndpi=False) as tiff:
        start, count = tiff.pages[0].dataoffsets[4], tiff.pages[0].databytecounts[4]
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"slide\.ndpi: cannot be read by OpenSlide"):
        open_he(path)
    content[start : start + count] = bytes(count)
    path.write_bytes(content)
    with open_he(path) as image, pytest.raises(InputError, match=r"slide\.ndpi: is damaged at level 0, rows 60 to 70"):
        image.read(60, 0, 10, 131)
    path.write_bytes(b"nonsense")
    with pytest.raises(InputError, match=r"slide\.ndpi: cannot be read by OpenSlide"):
        open_he(path)


def test_without_openslide_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openslide", None)
    (tmp_path / "slide.mrxs").write_bytes(b"not looked at")
    with pytest.raises(InputError, match=r'openslide-python is needed for this: pip install "orion-unet\[openslide\]"'):
        open_he(tmp_path / "slide.mrxs")


def test_a_missing_file_a_folder_and_an_unknown_kind_are_refused(tmp_path):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "notes.txt").write_text("no image")
    for name in ("missing.npy", "folder.png", "notes.txt"):
        with pytest.raises(InputError, match=name):
            open_he(tmp_path / name)


def test_a_picture_too_large_to_decode_whole_is_refused_with_advice(tmp_path, monkeypatch):
    monkeypatch.setattr("orion_unet.slides.open.LARGEST_PICTURE", 150 * 131 - 1)
    pillow.fromarray(LEVELS).save(tmp_path / "core.png")
    with pytest.raises(InputError, match="tiled TIFF"):
        open_he(tmp_path / "core.png")
    assert pillow.MAX_IMAGE_PIXELS is not None


def test_a_slide_compressed_in_one_huge_piece_is_refused_with_advice(tmp_path, monkeypatch):
    monkeypatch.setattr("orion_unet.slides.tiff_tiles.LARGEST_SEGMENT", LEVELS.nbytes - 1)
    write_tiff(tmp_path / "slide.tif", LEVELS, {**RGB, "rowsperstrip": 150, "compression": "deflate"})
    with pytest.raises(InputError, match="tiled TIFF"):
        open_he(tmp_path / "slide.tif")


def test_of_the_last_region_the_lowest_tiles_are_kept_within_the_cache_and_read_no_more(tmp_path, monkeypatch):
    monkeypatch.setattr("orion_unet.slides.segments.CACHE_BYTES", 5 * 64 * 32 * 3)
    path = write_tiff(tmp_path / "slide.tif", *TIFFS["tiles"])
    with open_he(path) as image:
        image.read(0, 0, 110, 131)
        path.write_bytes(b"")
        # Five tiles a row: those of the second row come from the cache, those of the first are gone with the file.
        np.testing.assert_allclose(image.read(70, 0, 50, 131), LEVELS[70:120] / 255, atol=1e-6)
        with pytest.raises(InputError, match="slide"):
            image.read(10, 0, 10, 10)


def test_an_array_in_memory_reads_like_a_file():
    assert_same_pixels(ArrayImage(Path("he"), lambda: CHW))


@pytest.fixture
def zarr_he(tmp_path):
    """An H&E as OME-Zarr with a level of half the side, and its pixels."""
    zarr = pytest.importorskip("zarr")
    he = np.random.default_rng(0).integers(0, 256, (90, 70, 3)).astype(np.uint8)
    root = zarr.open_group(tmp_path / "slide_HE.ome.zarr", mode="w", zarr_format=2)
    for level, image in enumerate((he, he[::2, ::2])):
        root.create_array(str(level), data=np.ascontiguousarray(image.transpose(2, 0, 1)), chunks=(3, 32, 32))
    scales = [[{"type": "scale", "scale": [1.0, size, size]}] for size in (0.5, 1.0)]
    root.attrs["multiscales"] = [{
        "version": "0.4",
        "axes": [{"name": "c", "type": "channel"}]
        + [{"name": name, "type": "space", "unit": "micrometer"} for name in "yx"],
        "datasets": [{"path": str(at), "coordinateTransformations": scale} for at, scale in enumerate(scales)],
    }]  # fmt: skip
    return tmp_path / "slide_HE.ome.zarr", he


def test_an_ome_zarr_is_read_by_region_from_its_nearest_level(zarr_he):
    path, he = zarr_he
    with open_he(path) as image:
        assert (image.shape, image.white, image.pixel_size_um, image.is_slide) == ((90, 70), 255.0, 0.5, True)
        np.testing.assert_array_equal(image.stored(20, 30, 41, 40), he[20:61, 30:70])
        np.testing.assert_allclose(image.read(80, -3, 20, 10), he[80:90, :7] / np.float32(255), rtol=1e-6)
        np.testing.assert_array_equal(image.nearest_level(2).stored(0, 0, 45, 35), he[::2, ::2])
        assert image.nearest_level(1.5) is image


def test_the_transformation_of_a_whole_pyramid_scales_its_pixels(zarr_he):
    import zarr

    path, _ = zarr_he
    root = zarr.open_group(path)
    (multiscale,) = root.attrs["multiscales"]
    scale = {"type": "scale", "scale": [1.0, 0.65, 0.65]}
    root.attrs["multiscales"] = [{**multiscale, "coordinateTransformations": [scale]}]
    with open_he(path) as image:
        assert image.pixel_size_um == pytest.approx(0.5 * 0.65)


def test_an_ome_zarr_that_is_no_he_is_refused_by_name(tmp_path):
    pytest.importorskip("zarr")
    four = np.ones((40, 40, 4), np.uint8)
    write_zarr(tmp_path / "four.zarr", four.shape, four.dtype, iter([four]), {"names": "abcd", "pixel_size_um": None})
    with pytest.raises(InputError, match=r"four\.zarr: has 4 channels; an H&E has 3"):
        open_he(tmp_path / "four.zarr")
    floats = np.ones((40, 40, 3), np.float32)
    write_zarr(tmp_path / "f.zarr", floats.shape, floats.dtype, iter([floats]), {"names": "abc", "pixel_size_um": None})
    with pytest.raises(InputError, match=r"f\.zarr: has dtype float32; an H&E as OME-Zarr is uint8 or uint16"):
        open_he(tmp_path / "f.zarr")
    with pytest.raises(InputError, match=r"none\.zarr: cannot be read"):
        open_he(tmp_path / "none.zarr")
