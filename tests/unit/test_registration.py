"""How an H&E is aligned with its markers: maps, block shifts, and what is refused, on tissue that was moved by hand."""

import math

import numpy as np
import pytest
from scipy import ndimage

from orion_unet.demo.make import draw_core
from orion_unet.registration import coarse, fine, transform
from orion_unet.registration.coarse import UPRIGHT, _orientations, find_coarse
from orion_unet.registration.fine import LARGEST_DISPLACEMENT, refine
from orion_unet.registration.stains import haematoxylin
from orion_unet.registration.transform import Affine, Field, covered, move


def turned(degrees, scale=1.0, about=(0.0, 0.0), shift=(0.0, 0.0)):
    angle = math.radians(degrees)
    matrix = scale * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    about = np.array(about)
    return Affine(np.column_stack([matrix, about - matrix @ about + shift]))


def reader(image, asked=None):
    def read(y, x, height, width):
        assert y >= 0 and x >= 0 and y + height <= image.shape[0] and x + width <= image.shape[1]
        if asked is not None:
            asked.append(height * width)
        return image[y : y + height, x : x + width]

    return read


@pytest.fixture(scope="module")
def core():
    """H&E (H, W, 3) uint8 and nuclear marker (H, W) float32 of a generated core."""
    he, orion = draw_core(3, 512)
    return he, orion[..., 0].astype(np.float32) if orion.shape[-1] == 20 else orion[0].astype(np.float32)


def density(he):
    return haematoxylin(he.astype(np.float32) / 255)


def test_maps_compose_and_invert():
    one, two = turned(20, 1.5, (3, 4), (5, -6)), turned(-50, 0.7)
    points = np.array([[0.0, 0.0], [10.0, 3.0], [-2.5, 7.25]])
    np.testing.assert_allclose(one.then(two).points(points), two.points(one.points(points)))
    np.testing.assert_allclose(one.inverse().points(one.points(points)), points, atol=1e-12)
    assert one.scale == pytest.approx(1.5) and not one.mirrored
    assert Affine(np.array([[1.0, 0, 0], [0, -1, 9]])).mirrored
    # Right (0, 1) turns towards up (-sin, cos).
    assert one.rotation_deg == pytest.approx(-20)


def test_a_field_is_interpolated_linearly_and_constant_beyond_its_nodes():
    nodes = np.zeros((2, 2, 2))
    nodes[1, 0], nodes[0, 1] = (2, 0), (0, 4)
    field = Field(nodes, first=10.0, step=20.0)
    found = field.at(np.array([0.0, 10, 20, 30, 99]), np.array([10.0, 15.0]))
    np.testing.assert_allclose(found[0, :, 0], [0, 0, 1, 2, 2])
    np.testing.assert_allclose(found[:, 2, 1], [0.5 * 0.75 * 2, 0.5 * 0.25 * 4])
    np.testing.assert_allclose(field.of(np.array([[20.0, 15.0]]))[0], found[:, 2, 1])
    assert field.largest == 4


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_an_unmoved_image_is_the_same_and_a_shifted_one_is_a_slice(dtype):
    rng = np.random.default_rng(0)
    image = rng.random((60, 50, 3))
    image = image.astype(dtype) if dtype == "float32" else (image * np.iinfo(dtype).max).astype(dtype)
    same, inside = move(reader(image), (60, 50), Affine.identity(), None, (0, 0, 60, 50))
    assert same.dtype == image.dtype and inside.all()
    np.testing.assert_allclose(same, image, atol=1e-5 if dtype == "float32" else 1 if dtype == "uint16" else 0)
    moved, inside = move(reader(image), (60, 50), Affine.shift(-5, 7), None, (2, 3, 20, 40))
    expected = np.zeros((20, 40), bool)
    expected[3:, : 50 - 10] = True
    np.testing.assert_array_equal(inside, expected)
    np.testing.assert_allclose(moved[3:], image[0:17, 10:50], atol=1e-5 if dtype == "float32" else 1)
    # Beyond the image there is glass.
    assert (moved[:3] == (1.0 if dtype == "float32" else np.iinfo(dtype).max)).all()


def test_a_moved_image_is_close_to_that_of_scipy():
    he, _ = draw_core(1, 128)
    affine = turned(7, 0.9, (60, 60), (2.3, -4.6))
    moved, inside = move(reader(he), (128, 128), affine, None, (0, 0, 100, 110))
    for colour in range(3):
        smooth = he[..., colour].astype(float)
        judge = ndimage.affine_transform(smooth, affine.matrix[:, :2], affine.matrix[:, 2], (100, 110), order=3)
        within = ndimage.binary_erosion(inside, iterations=3)
        difference = np.abs(moved[..., colour] - judge)[within]
        assert difference.mean() < 1.5 and np.quantile(difference, 0.99) < 8


def test_regions_are_parts_of_the_whole_and_read_no_more_than_they_need():
    he, _ = draw_core(1, 256)
    affine = turned(3, 1.2, shift=(4.5, -3.25))
    whole, inside = move(reader(he), (256, 256), affine, None, (0, 0, 200, 180))
    asked = []
    part, within = move(reader(he, asked), (256, 256), affine, None, (70, 40, 50, 60))
    np.testing.assert_array_equal(part, whole[70:120, 40:100])
    np.testing.assert_array_equal(within, inside[70:120, 40:100])
    assert max(asked) < 90 * 100


@pytest.mark.parametrize("scale", [0.7, 1.2, 2.3])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_every_part_has_the_bits_of_the_whole(scale, dtype, monkeypatch):
    rng = np.random.default_rng(3)
    he = rng.random((300, 280, 3)).astype("float32")
    he = he if dtype == "float32" else (he * 255).astype(dtype)
    affine, field = turned(8, scale, (150, 140), (71.3, -67.9)), Field(rng.normal(size=(4, 5, 2)) * 1.5, 20.0, 40.0)
    whole, inside = move(reader(he), (300, 280), affine, field, (0, 0, 230, 250))
    assert 0 < inside.mean() < 1 and len(np.unique(whole)) > 150
    np.testing.assert_array_equal(covered((300, 280), affine, field, (0, 0, 230, 250)), inside)
    # In pieces of other sizes, as a larger region is.
    monkeypatch.setattr(transform, "ROWS", 37)
    monkeypatch.setattr(transform, "COLUMNS", 61)
    np.testing.assert_array_equal(move(reader(he), (300, 280), affine, field, (0, 0, 230, 250))[0], whole)
    for _ in range(60):
        height, width = rng.integers(1, 120, 2).tolist()
        y, x = (int(rng.integers(0, side - length + 1)) for side, length in ((230, height), (250, width)))
        part, _ = move(reader(he), (300, 280), affine, field, (y, x, height, width))
        np.testing.assert_array_equal(part, whole[y : y + height, x : x + width])


def test_a_finer_image_is_smoothed_before_it_is_sampled():
    # Stripes of one pixel: without smoothing, every fourth pixel would be black or white.
    stripes = np.zeros((200, 200, 3), np.uint8)
    stripes[:, ::2] = 255
    moved, _ = move(reader(stripes), (200, 200), turned(0, 4.0), None, (5, 5, 30, 30))
    assert np.abs(moved.astype(int) - 127).max() <= 3


@pytest.mark.parametrize(
    ("degrees", "scale", "shift", "warp"), [(0, 1, (0, 0), 0), (1.5, 1.01, (9, -12), 0), (-0.5, 1, (-30, 14), 2.5)]
)
def test_a_moved_he_is_found_to_half_a_pixel(degrees, scale, shift, warp, core):
    he, marker = core
    # From a point of the moved H&E to the point of the H&E that it shows.
    truth = turned(degrees, scale, (255.5, 255.5), shift)
    rng = np.random.default_rng(2)
    nodes = rng.normal(size=(4, 4, 2))
    bend = Field(nodes * warp / np.abs(nodes).max(), 0.0, 511 / 3)
    moved, _ = move(reader(he), (512, 512), truth, bend if warp else None, (0, 0, 512, 512))
    found = refine(density(moved), marker)
    assert found.trusted, found.reason
    points = np.stack(np.meshgrid(np.arange(80.0, 430, 50), np.arange(80.0, 430, 50), indexing="ij"), -1).reshape(-1, 2)
    # A point of the markers lies at `seen` in the moved H&E, which shows there what was at `back`.
    seen = found.affine.points(points + found.field.of(points))
    back = truth.points(seen + (bend.of(seen) if warp else 0))
    error = np.linalg.norm(back - points, axis=1)
    assert np.median(error) < 0.5 and np.quantile(error, 0.95) < 1.5
    assert found.residual_px < 0.5 and found.residual_95_px < 1.5
    assert found.correlation > max(found.correlation_before - 1e-3, 0.5)
    assert found.field.largest <= LARGEST_DISPLACEMENT


def test_a_weak_match_is_compared_with_all_other_ways_round(core, monkeypatch):
    he, marker = core
    monkeypatch.setattr(fine, "SURE_PEAK", math.inf)
    monkeypatch.setattr(fine, "LEAST_PEAK", 0.0)
    assert refine(density(he), marker).trusted
    for turned_he in (he[:, ::-1], np.rot90(he), he[::-1, ::-1]):
        assert "mirrored or turned it fits better" in refine(density(np.ascontiguousarray(turned_he)), marker).reason


def test_foreign_mirrored_and_empty_pairs_are_not_trusted(core):
    he, marker = core
    foreign = draw_core(8, 512)[0]
    for stranger in (foreign, he[:, ::-1].copy(), he[::-1, ::-1].copy()):
        found = refine(density(stranger), marker)
        assert not found.trusted and "no match" in found.reason and found.field is None
    assert "constant" in refine(np.zeros((256, 256), np.float32), marker[:256, :256]).reason
    assert "too small: 64 x 512" in refine(density(he)[:64], marker[:64]).reason


@pytest.mark.slow
@pytest.mark.parametrize("index", [3, 6])
def test_every_quarter_turn_and_mirror_is_found_at_another_scale(index, core):
    he, marker = core
    rng = np.random.default_rng(index)
    scale = [0.5, 0.7, 1.0, 1.4, 2.0, 0.6, 1.2, 1.7][index]
    side = round(512 * scale)
    middle = np.array([255.5, 255.5])
    upright = turned(rng.uniform(-5, 5), scale, middle)
    upright = upright.then(Affine.shift(*((side - 1) / 2 - middle + rng.uniform(-20, 20, 2))))
    name, orientation = _orientations((side, side))[index]
    truth = upright.then(orientation)
    made, _ = move(reader(he), (512, 512), truth.inverse(), None, (0, 0, side, side))
    found = find_coarse(density(made), marker, scale * rng.uniform(0.97, 1.03))
    assert found.trusted, found.reason
    assert found.orientation == name and found.affine.mirrored == truth.mirrored
    points = np.stack(np.meshgrid(np.arange(100.0, 420, 40), np.arange(100.0, 420, 40), indexing="ij"), -1).reshape(
        -1, 2
    )
    error = np.linalg.norm(found.affine.points(points) - truth.points(points), axis=1) / scale
    assert np.median(error) < 1.5


def a_lattice(seed):
    """Nine discs of tissue on glass: H&E (H, W, 3) and nuclear marker (H, W)."""
    he, marker = np.full((768, 768, 3), 244, np.uint8), np.full((768, 768), 0.01, np.float32)
    rows, columns = np.ogrid[:224, :224]
    disc = np.hypot(rows - 111.5, columns - 111.5) < 105
    for index in range(9):
        drawn, stained = draw_core(10 * seed + index, 224)
        place = (slice(y := 16 + 256 * (index // 3), y + 224), slice(x := 16 + 256 * (index % 3), x + 224))
        he[place][disc] = drawn[disc]
        marker[place][disc] = stained[..., 0][disc] / 65535
    return he, marker


@pytest.mark.slow
def test_the_lattice_of_a_microarray_fits_every_way_round_and_its_tissue_only_one(monkeypatch):
    # As on a slide so large that no search sees its tissue.
    monkeypatch.setattr(coarse, "SEARCHED_SIDES", (48,))
    he, marker = a_lattice(1)
    turned = np.rot90(he, 2)
    found = find_coarse(density(turned), marker)
    assert found.trusted and found.orientation == "turned by 180°"
    corner = found.affine.points(np.array([[0.0, 0.0]]))[0]
    np.testing.assert_allclose(corner, [767, 767], atol=2)
    foreign = find_coarse(density(a_lattice(2)[0]), marker)
    assert not foreign.trusted and "no match: the best of eight orientations" in foreign.reason


def test_a_foreign_or_empty_slide_is_not_trusted(core):
    _, marker = core
    found = find_coarse(density(draw_core(9, 512)[0]), marker)
    assert not found.trusted and "no match: the best of eight orientations" in found.reason
    assert not find_coarse(np.zeros((64, 64), np.float32), marker).trusted
    assert UPRIGHT in dict(_orientations((8, 9)))
