"""Tiles cover every pixel once in sum, fall together again without seams, and never hold the whole image."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orion_unet.errors import InputError
from orion_unet.inference.tiling import TiledPrediction, Tiling, choose_tiling, reflected
from orion_unet.inference.tissue import tissue_cells
from orion_unet.models.unet import SpatialUNet
from orion_unet.slides.images import ArrayImage


class Model:
    """What tiling asks of a trained model, around any function (B, 3, H, W) -> (B, C, H, W)."""

    device = torch.device("cpu")

    def __init__(self, function, channels=3, depth=2, norm="batch", patch_size=32, sees_whole_image=False):
        self.names = tuple(f"marker_{index}" for index in range(channels))
        self.network = SimpleNamespace(depth=depth, sees_whole_image=sees_whole_image)
        self.config = SimpleNamespace(
            data=SimpleNamespace(patch_size=patch_size), model=SimpleNamespace(norm=norm, use_boundary_guidance=False)
        )
        self.function = function
        self.seen = []

    def predict(self, he):
        self.seen.append(tuple(he.shape))
        return self.function(he)


def same(he):
    return he.clone()


def network(depth, seed=0):
    torch.manual_seed(seed)
    return SpatialUNet(3, base_features=4, depth=depth).eval().requires_grad_(False)


def noise(height, width, dtype=np.uint8, seed=0):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, (height, width, 3)).astype(dtype)


def tiled(model, he, tiling, first=0, **options):
    """The whole prediction, and the row from which on it was predicted."""
    tiles = TiledPrediction(model, ArrayImage(Path("he"), lambda: he), tiling, **options)
    channels = len(options["kept"]) if "kept" in options else len(model.names)
    found = np.full((channels, *he.shape[:2]), np.nan, np.float32)
    for y, rows in tiles.run(first):
        assert np.isnan(found[:, y : y + rows.shape[1]]).all(), "a row was given twice"
        found[:, y : y + rows.shape[1]] = rows.numpy()
    return found


tilings = st.builds(
    lambda overlap, more: Tiling(2 * overlap + more, overlap, -(-overlap // 2)), st.integers(1, 24), st.integers(0, 40)
)


@given(tilings, st.integers(1, 300))
def test_tiles_reach_from_margin_to_margin_at_equal_steps(tiling, length):
    starts = tiling.starts(length)
    assert starts[0] == -tiling.margin
    assert set(np.diff(starts)) <= {tiling.tile - tiling.overlap}
    assert starts[-1] + tiling.tile >= length + tiling.margin
    assert starts[-1] < length
    # Not a tile too many.
    assert len(starts) == 1 or starts[-2] + tiling.tile < length + tiling.margin


@given(tilings, st.integers(1, 6))
def test_the_shares_of_all_tiles_at_a_pixel_add_up_to_one(tiling, count):
    shares = tiling.shares(count)
    total = np.zeros(tiling.stride * (count - 1) + tiling.tile)
    for index, share in enumerate(shares):
        total[index * tiling.stride : index * tiling.stride + tiling.tile] += share
    np.testing.assert_allclose(total, 1, atol=1e-6)
    assert (shares > 0).all()


def test_a_share_falls_smoothly_from_one_to_nearly_nothing_across_the_overlap():
    shares = Tiling(64, 16, 8).shares(3)
    left, right = shares[0][48:], shares[1][:16]
    np.testing.assert_allclose(left, right[::-1], atol=1e-6)
    assert (np.diff(left) < 0).all()
    assert left[-1] < 0.002
    np.testing.assert_allclose(shares[1][16:48], 1, atol=2e-3)


@given(st.integers(-200, 200), st.integers(1, 100), st.integers(1, 60))
def test_reflection_is_that_of_numpy(start, count, length):
    before, after = max(0, -start), max(0, start + count - length)
    padded = np.pad(np.arange(length), (before, after), mode="reflect")
    expected = padded[start + before : start + before + count]
    np.testing.assert_array_equal(reflected(start, count, length), expected)


@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from([1, 2, 5]), st.sampled_from([4, 8, 12]))
def test_every_pixel_comes_back_to_its_own_place(height, width, batch_size, overlap):
    he = noise(height, width)
    found = tiled(Model(same), he, Tiling(24, overlap, overlap // 2), batch_size=batch_size)
    np.testing.assert_allclose(found, he.transpose(2, 0, 1) / 255, atol=1e-6)


@pytest.mark.parametrize(("dtype", "white"), [(np.uint8, 255), (np.uint16, 65535)])
def test_the_network_sees_intensities_between_0_and_1(dtype, white):
    he = noise(50, 41, dtype)
    np.testing.assert_allclose(tiled(Model(same), he, Tiling(24, 8, 4)), he.transpose(2, 0, 1) / white, atol=1e-6)


def test_tiles_agree_with_the_image_predicted_in_one_piece_except_near_their_borders():
    depth, he = 2, noise(200, 168)
    unet = network(depth)
    far = 32
    image = torch.from_numpy(np.pad(he, ((far, far), (far, far), (0, 0)), mode="reflect"))
    whole = unet(image.permute(2, 0, 1)[None] / 255)[0, :, far:-far, far:-far].numpy()
    found = tiled(Model(unet, depth=depth), he, Tiling(96, 40, 20))
    # The receptive field reaches 6 * 2**depth - 4 = 20 pixels: where a tile is alone nothing may differ at all,
    # where tiles meet little.
    assert np.abs(found - whole).max() < 0.02 * (whole.max() - whole.min())
    alone = np.abs(found - whole)[:, 76:92, 76:92]
    assert alone.max() < 1e-5


def test_memory_follows_the_width_no_region_is_higher_than_a_tile():
    he = noise(400, 50)
    image = ArrayImage(Path("he"), lambda: he)
    asked = []
    read = image.stored
    image.stored = lambda y, x, height, width: asked.append(height) or read(y, x, height, width)
    tiling = Tiling(32, 8, 4)
    sizes = [rows.shape[1] for _, rows in TiledPrediction(Model(same), image, tiling).run()]
    assert max(asked) <= 32
    assert max(sizes) <= 32
    assert sum(sizes) == 400


@pytest.mark.parametrize("tissue_only", [False, True])
@pytest.mark.parametrize("first", [0, 1, 3])
def test_a_run_that_goes_on_at_a_tile_row_gives_the_same_bits(first, tissue_only):
    he, tiling = noise(150, 60), Tiling(48, 16, 8)
    he[40:90, 20:] = 240
    model = Model(network(2))
    whole = tiled(model, he, tiling, tissue_only=tissue_only)
    rest = tiled(model, he, tiling, first=first, tissue_only=tissue_only)
    begin = max(tiling.starts(150)[first], 0)
    assert np.isnan(rest[:, :begin]).all()
    np.testing.assert_array_equal(rest[:, begin:], whole[:, begin:])


def test_tiles_of_glass_are_skipped_and_become_zero():
    he = np.full((32, 200, 3), 240, np.uint8)
    he[:, 150:] = noise(32, 50) // 2
    model = Model(lambda he: torch.full((len(he), 3, *he.shape[2:]), 0.5))
    tiling = Tiling(48, 8, 4)
    found = tiled(model, he, tiling, tissue_only=True)
    assert (found[:, :, :100] == 0).all()
    np.testing.assert_allclose(found[:, :, 150:], 0.5, atol=1e-6)
    assert len(model.seen) < len(tiling.starts(200))
    everything = tiled(model, he, tiling)
    np.testing.assert_allclose(everything, 0.5, atol=1e-6)


def half(he):
    return torch.full_like(he, 0.5)


@settings(max_examples=30)
@given(st.integers(0, 63), st.integers(0, 363), st.sampled_from([6, 9, 37]), st.integers(0, 2**32 - 1))
def test_tissue_is_predicted_in_full_wherever_it_is_and_however_small(y, x, side, seed):
    """A tile beside it that is skipped takes nothing away, and no island falls between what is looked at."""
    he = np.full((100, 400, 3), 240, np.uint8)
    island = (slice(y, y + side), slice(x, x + side))
    he[island] = np.random.default_rng(seed).integers(60, 120, (side, side, 3))
    model, tiling = Model(half), Tiling(48, 16, 8)
    found = tiled(model, he, tiling, tissue_only=True)
    np.testing.assert_allclose(found[:, *island], 0.5, atol=1e-6)
    assert set(np.unique(found.round(6))) == {0, 0.5}
    assert 0 < sum(batch for batch, *_ in model.seen) <= 9 < len(tiling.starts(400))


def test_beside_skipped_tiles_a_pixel_is_what_the_predicted_ones_say_weighed_by_their_shares():
    he = np.full((48, 300, 3), 240, np.uint8)
    he[10:20, 60:110] = 100
    tiling = Tiling(48, 16, 8)
    # Each tile predicts another constant.
    values = iter(np.linspace(0.1, 0.9, 9))
    found = tiled(Model(lambda tiles: torch.full_like(tiles, next(values))), he, tiling, tissue_only=True)
    starts, shares = tiling.starts(300), tiling.shares(len(tiling.starts(300)))
    predicted = [place for place, start in enumerate(starts) if start < 110 and start + 48 > 60]
    total, weight = np.zeros(400), np.zeros(400)
    for value, place in zip(np.linspace(0.1, 0.9, 9), predicted, strict=False):
        at = slice(starts[place] + 50, starts[place] + 98)
        total[at] += value * shares[place]
        weight[at] += shares[place]
    expected = np.divide(total, weight, out=np.zeros(400), where=weight > 0)[50:350]
    np.testing.assert_allclose(found[0, 20], expected, atol=1e-5)
    assert len(predicted) == 3


@pytest.mark.parametrize("fill", [0, 6])
def test_black_fill_of_a_scanner_is_not_tissue(fill):
    he = np.full((200, 260, 3), 240, np.uint8)
    he[:, 100:] = fill
    model = Model(half)
    assert not tiled(model, he, Tiling(48, 16, 8), tissue_only=True).any()
    assert not model.seen


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_cells_show_tissue_where_half_of_their_pixels_are_neither_glass_nor_black(dtype):
    white = 1.0 if dtype == np.float32 else float(np.iinfo(dtype).max)
    shades = {"glass": (0.9, 0.92, 0.93), "pink": (0.9, 0.7, 0.8), "dark": (0.2, 0.2, 0.25), "black": (0.02, 0.0, 0.03)}
    glass, pink, dark, black = (np.array(shade) * white for shade in shades.values())
    he = np.zeros((10, 17, 3)) + glass
    he[:4, :4], he[:4, 4:8], he[:4, 8:12] = pink, dark, black
    # Of the third row of cells two rows of pixels are left, of the last column of cells one column.
    he[4:6, 4:8], he[4:5, 8:12], he[8:9, :4], he[8:, 16] = pink, pink, pink, dark
    expected = [[1, 1, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 1]]
    np.testing.assert_array_equal(tissue_cells(he.astype(dtype), white), np.array(expected, bool))


def test_augmentation_is_the_mean_over_the_eight_symmetries_of_the_square():
    unet = network(2, seed=3)
    he = noise(32, 32)
    found = tiled(Model(unet), he, Tiling(64, 32, 16), augmented=True)
    tile = np.pad(he, ((16, 16), (16, 16), (0, 0)), mode="reflect").transpose(2, 0, 1) / np.float32(255)
    mean = np.zeros((3, 64, 64))
    for mirrored in (False, True):
        for quarter in range(4):
            seen = np.rot90(tile[:, :, ::-1] if mirrored else tile, quarter, axes=(1, 2))
            predicted = np.rot90(unet(torch.from_numpy(seen.copy())[None])[0].numpy(), -quarter, axes=(1, 2))
            mean += (predicted[:, :, ::-1] if mirrored else predicted) / 8
    np.testing.assert_allclose(found, mean[:, 16:48, 16:48], atol=1e-5)
    assert np.abs(found - tiled(Model(unet), he, Tiling(64, 32, 16))).max() > 1e-3


def test_only_the_markers_wanted_are_kept_in_the_order_wanted():
    he = noise(40, 30)
    found = tiled(Model(same), he, Tiling(24, 8, 4), kept=[2, 0])
    np.testing.assert_allclose(found, he.transpose(2, 0, 1)[[2, 0]] / 255, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (37, 900), (560, 512), (20000, 20000), (3000, 90000)])
@pytest.mark.parametrize("depth", [1, 3, 4, 7])
def test_the_default_tiles_fit_the_network_and_the_image(shape, depth):
    model = Model(same, channels=20, depth=depth, patch_size=256)
    tiling = choose_tiling(model, shape)
    assert tiling.tile % 2**depth == tiling.overlap % 2**depth == tiling.margin % 2**depth == 0
    assert 0 < tiling.overlap <= tiling.tile // 2
    assert tiling.tile <= 640 or depth == 7
    assert len(tiling.starts(1)) == 1


def test_a_small_image_is_one_tile():
    tiling = choose_tiling(Model(same, depth=3), (512, 512))
    assert len(tiling.starts(512)) == 1
    assert tiling.tile < 600


@pytest.mark.parametrize(("norm", "sees_whole_image"), [("group", False), ("instance", False), ("batch", True)])
def test_a_network_that_depends_on_the_whole_tile_gets_tiles_of_the_patch_size(norm, sees_whole_image):
    model = Model(same, depth=3, norm=norm, patch_size=256, sees_whole_image=sees_whole_image)
    assert choose_tiling(model, (5000, 5000)).tile == 256
    # Patches are padded inside the network to a multiple of its deepest stride, and so are tiles.
    model.config.data.patch_size = 250
    assert choose_tiling(model, (5000, 5000)).tile == 256


def test_a_wide_image_gets_smaller_tiles_so_that_its_rows_fit_into_memory():
    model = Model(same, channels=20, depth=4)
    assert choose_tiling(model, (100, 100000)).tile * 100000 * 20 * 4 < 2e9


@pytest.mark.parametrize(
    ("tile", "overlap", "words"),
    [(100, None, "--tile 100: must be a multiple of 16"), (32, None, "at least 64"), (128, 8, "--overlap 8"),
     (128, 80, "at most half of 128"), (128, 0, "--overlap 0"), (None, -16, "--overlap -16")],
)  # fmt: skip
def test_impossible_tiles_are_refused(tile, overlap, words):
    with pytest.raises(InputError, match=words):
        choose_tiling(Model(same, depth=4), (1000, 1000), tile, overlap)
