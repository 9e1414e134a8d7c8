"""Cells measured beside scikit-image, whatever the bands and tiles, and outlines that shapely finds valid."""

import numpy as np
import pytest

import orion_unet
from orion_unet.errors import InputError
from orion_unet.quantification import cell_labels, nuclei
from orion_unet.quantification.cell_labels import CellLabels, bands
from orion_unet.quantification.measure import measure_geometry, measure_means
from orion_unet.quantification.outlines import OutlineTracer
from orion_unet.segmentation import segment_nuclei
from orion_unet.slides.markers import ArrayMarkers
from orion_unet.slides.open import open_labels

pytest.importorskip("skimage")
from scipy import ndimage
from skimage.measure import regionprops
from skimage.segmentation import expand_labels


def in_memory(array):
    return ArrayMarkers("image", lambda: array, "chw")


def no_step():
    pass


def random_cells(seed, size=(150, 131), count=60, largest=1000):
    """Blobs with labels that leave gaps, some of them cut by the rim."""
    rng = np.random.default_rng(seed)
    seeds = np.zeros(size, np.int64)
    seeds[rng.integers(0, size[0], count), rng.integers(0, size[1], count)] = rng.permutation(largest)[:count] + 1
    return expand_labels(seeds, 6)


def tissue(seed, size=(300, 280), count=120):
    """A nuclear marker in [0, 1] with nuclei that touch, on a background with noise."""
    rng = np.random.default_rng(seed)
    image = np.zeros(size)
    rows, columns = np.mgrid[: size[0], : size[1]]
    for y, x, r in rng.uniform((0, 0, 4), (*size, 9), (count, 3)):
        image = np.maximum(image, 0.8 * (np.hypot(rows - y, columns - x) < r))
    return np.clip(ndimage.gaussian_filter(image, 1) + 0.03 * rng.standard_normal(size), 0, 1)


@pytest.fixture
def narrow_bands(monkeypatch):
    """Bands of a few rows, so that every cell crosses several."""
    monkeypatch.setattr(cell_labels, "BAND_ROWS", 7)
    monkeypatch.setattr(cell_labels, "LEAST_ROWS", 1)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.usefixtures("narrow_bands")
def test_cells_are_those_of_regionprops(dtype):
    labels = random_cells(0)
    image = (np.random.default_rng(1).random((3, *labels.shape)) * 200).astype(dtype)
    found = orion_unet.quantify(image, labels)
    expected = regionprops(labels, image.transpose(1, 2, 0))
    assert found.label.tolist() == [region.label for region in expected]
    np.testing.assert_array_equal(found.area, [region.area for region in expected])
    np.testing.assert_allclose(np.stack([found.y, found.x], 1), [region.centroid for region in expected], atol=1e-4)
    np.testing.assert_allclose(found.mean, [region.intensity_mean for region in expected], atol=1e-4)
    assert found.ring is None
    assert found.names == ("channel_00", "channel_01", "channel_02")


@pytest.mark.parametrize("rings", [1, 3, 9])
@pytest.mark.usefixtures("narrow_bands")
def test_a_ring_is_what_expand_labels_adds_to_the_whole_image(rings, monkeypatch):
    monkeypatch.setattr("orion_unet.quantification.measure.RING_COLUMNS", 23)
    labels = random_cells(2, count=40)
    image = np.random.default_rng(3).random((2, *labels.shape))
    found = orion_unet.quantify(image, labels, rings=rings)
    ring = np.where(labels == 0, expand_labels(labels, rings), 0)
    regions = {region.label: region for region in regionprops(ring, image.transpose(1, 2, 0))}
    expected = [regions[label].intensity_mean if label in regions else [np.nan] * 2 for label in found.label.tolist()]
    np.testing.assert_allclose(found.ring, expected, atol=1e-4)


def test_a_cell_without_room_has_no_ring():
    labels = np.array([[1, 2], [1, 2]])
    assert np.isnan(orion_unet.quantify(np.ones((1, 2, 2)), labels, rings=2).ring).all()


@pytest.mark.parametrize("offset", [0, 5, 2**40])
@pytest.mark.usefixtures("narrow_bands")
def test_labels_of_any_size_are_numbered_in_order(offset):
    labels = random_cells(4)
    labels = np.where(labels > 0, labels + offset, 0)
    cells = CellLabels(in_memory(labels[None]), "")
    expected = np.unique(labels, return_inverse=True)[1].reshape(labels.shape)
    read = np.concatenate([cells.read(top, rows) for top, rows in bands(labels.shape)])
    np.testing.assert_array_equal(read, expected)
    assert cells.numbers.tolist() == np.unique(labels[labels > 0]).tolist()


@pytest.mark.parametrize("seed", range(3))
def test_nuclei_found_by_tiles_are_those_of_the_whole_image(seed, tmp_path, monkeypatch):
    image = tissue(seed)
    whole = segment_nuclei(image)
    plane, count = nuclei.find_nuclei(in_memory(image[None]), 0, np.asarray, tmp_path / "one.npy", no_step)
    np.testing.assert_array_equal(plane.read([0], 0, 0, *image.shape)[0], whole)
    monkeypatch.setattr(nuclei, "ONE_TILE", 64)
    monkeypatch.setattr(nuclei, "TILE", 90)
    plane, count = nuclei.find_nuclei(in_memory(image[None]), 0, np.asarray, tmp_path / "many.npy", no_step)
    tiled = plane.read([0], 0, 0, *image.shape)[0]
    assert count == whole.max() == tiled.max() > 50
    # Each nucleus of one is a nucleus of the other, pixel by pixel, under another number.
    assert len(np.unique(np.stack([whole.ravel(), tiled.ravel()]), axis=1).T) == count + 1


def test_a_nucleus_larger_than_the_surroundings_of_a_tile_is_one(tmp_path, monkeypatch):
    rows, columns = np.mgrid[:300, :300]
    image = 0.9 * (np.hypot(rows - 150, columns - 150) < 80)
    whole = segment_nuclei(image)
    monkeypatch.setattr(nuclei, "ONE_TILE", 32)
    monkeypatch.setattr(nuclei, "TILE", 60)
    monkeypatch.setattr(nuclei, "AROUND", 16)
    plane, count = nuclei.find_nuclei(in_memory(image[None]), 0, np.asarray, tmp_path / "nuclei.npy", no_step)
    assert count == 1
    np.testing.assert_array_equal(plane.read([0], 0, 0, 300, 300)[0], whole)


def test_the_nuclear_marker_is_found_by_its_name_or_given():
    image = np.zeros((2, 300, 280))
    image[1] = tissue(0)
    by_name, given = (
        orion_unet.quantify(image, names=["CD3e", "DAPI"]),
        orion_unet.quantify(image, names=["A", "B"], nuclear_marker="B"),
    )
    np.testing.assert_array_equal(by_name.labels, given.labels)
    np.testing.assert_array_equal(by_name.label, np.arange(1, by_name.labels.max() + 1))
    with pytest.raises(InputError, match="shows no nuclei"):
        orion_unet.quantify(image, names=["A", "B"], nuclear_marker="A")


def test_noise_alone_is_no_nucleus():
    dark = np.random.default_rng(0).integers(100, 130, (1, 200, 200)).astype(np.uint16)
    with pytest.raises(InputError, match="shows no nuclei"):
        orion_unet.quantify(dark, names=["DAPI"])


def outlines(labels, rows):
    """Polygons of every label, from bands of so many rows."""
    last = np.array([np.nonzero((labels == number).any(1))[0][-1] // rows for number in range(1, labels.max() + 1)])
    tracer, found = OutlineTracer(last), {}
    for top in range(0, len(labels), rows):
        above = labels[top - 1] if top else np.zeros(labels.shape[1], np.int32)
        for number, polygons in tracer.add(labels[top : top + rows], above, top, top + rows >= len(labels)):
            assert number not in found
            found[number] = polygons
    return found


@pytest.mark.parametrize("seed", range(40))
def test_outlines_are_valid_polygons_with_the_pixels_of_the_cell(seed):
    """Noise has holes, islands in holes, parts and pixels that touch at a corner."""
    shapely = pytest.importorskip("shapely", reason="shapely is not installed")
    rng = np.random.default_rng(seed)
    labels = np.unique(rng.integers(0, rng.integers(2, 4), rng.integers(2, 25, 2)), return_inverse=True)
    labels = labels[1].reshape(labels[1].shape).astype(np.int32)
    found = outlines(labels, int(rng.integers(1, len(labels) + 1)))
    assert sorted(found) == list(range(1, labels.max() + 1))
    for number, polygons in found.items():
        shapes = [shapely.Polygon(polygon[0], polygon[1:]) for polygon in polygons]
        assert all(shape.exterior.is_ccw and not any(hole.is_ccw for hole in shape.interiors) for shape in shapes)
        whole = shapely.MultiPolygon(shapes)
        assert whole.is_valid, shapely.is_valid_reason(whole)
        assert whole.area == (labels == number).sum()
        centres = [shapely.Point(x + 0.5, y + 0.5) for y, x in zip(*np.nonzero(labels == number), strict=True)]
        assert all(whole.contains(centre) for centre in centres)


def test_a_cell_of_one_pixel_is_a_square():
    assert outlines(np.array([[0, 0], [0, 1]], np.int32), 1) == {1: [[[(2, 2), (1, 2), (1, 1), (2, 1)]]]}


@pytest.mark.usefixtures("narrow_bands")
def test_the_measured_values_do_not_depend_on_the_bands(monkeypatch):
    labels, image = random_cells(5), np.random.default_rng(6).random((4, 150, 131)).astype(np.float32)
    cells = CellLabels(in_memory(labels[None]), "")
    small = measure_geometry(cells, no_step), measure_means(cells, in_memory(image), range(4), 2, None, no_step)
    monkeypatch.setattr(cell_labels, "BAND_ROWS", 512)
    large = measure_geometry(cells, no_step), measure_means(cells, in_memory(image), range(4), 2, None, no_step)
    np.testing.assert_allclose(small[0].y, large[0].y, rtol=1e-12)
    np.testing.assert_allclose(small[1].mean, large[1].mean, rtol=1e-12)
    np.testing.assert_allclose(small[1].ring, large[1].ring, rtol=1e-12)


@pytest.mark.parametrize("name", ["cells.npy", "cells.tif", "packed.tif", "labels/nuclei"])
def test_labels_of_every_format_read_the_same(name, tmp_path):
    tifffile, zarr = pytest.importorskip("tifffile"), pytest.importorskip("zarr")
    labels = random_cells(7).astype(np.uint32)
    path = tmp_path / name
    if path.suffix == ".npy":
        np.save(path, labels)
    elif path.suffix == ".tif":
        packed = {"tile": (32, 32), "compression": "zlib"} if name == "packed.tif" else {}
        tifffile.imwrite(path, labels, **packed)
    else:
        group = zarr.open_group(str(path), mode="w", zarr_format=2)
        group.create_array("0", data=labels, chunks=(64, 64))
        axes = [{"name": axis, "type": "space"} for axis in "yx"]
        group.attrs["multiscales"] = [{"axes": axes, "datasets": [{"path": "0"}]}]
    with open_labels(path) as image:
        assert image.shape == (1, *labels.shape)
        np.testing.assert_array_equal(image.read([0], 10, 20, 100, 90)[0], labels[10:110, 20:110])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros((4, 4), np.float32), r"is float32 \(1, 4, 4\); labels are one plane of integers"),
        (np.zeros((2, 4, 4), np.int32), r"is int32 \(2, 4, 4\); labels are one plane of integers"),
    ],
)
def test_labels_that_are_none_are_refused(labels, message, tmp_path):
    np.save(tmp_path / "cells.npy", labels)
    with pytest.raises(InputError, match=message):
        open_labels(tmp_path / "cells.npy")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"image": np.ones((4, 4))}, r"image: has shape \(4, 4\)"),
        ({"image": np.ones((1, 4, 4)), "labels": np.ones((4, 5), int)}, r"labels: is int64 \(4, 5\)"),
        ({"image": np.ones((1, 4, 4)), "labels": np.zeros((4, 4), int)}, "labels: holds no cell"),
        ({"image": np.ones((1, 4, 4)), "labels": np.full((4, 4), -1)}, "holds negative labels"),
        ({"image": np.ones((1, 4, 4)), "names": ["CD3e"]}, "no marker is named like a nuclear stain"),
        ({"image": np.ones((1, 4, 4)), "names": ["CD3e", "CD20"]}, "names: has 2 names for 1 markers"),
        ({"image": np.ones((1, 4, 4)), "labels": np.ones((4, 4), int), "rings": -1}, "rings: is -1"),
    ],
)
def test_arrays_that_cannot_be_used_are_refused(given, message):
    with pytest.raises(InputError, match=message):
        orion_unet.quantify(**given)
