"""What check-data measures, against known answers and independent implementations."""

import dataclasses

import numpy as np
import pytest

from orion_unet.inspection.channels import describe_channel, most_varied
from orion_unet.inspection.cores import (
    CoreView,
    block_means,
    he_thumbnail,
    marker_thumbnail,
    sample_rows,
    thinned,
    view_core,
)
from orion_unet.inspection.duplicates import find_twins
from orion_unet.inspection.findings import find_all, mismatched, shifted, too_small
from orion_unet.registration.shift import Registration, overlap, register
from orion_unet.registration.stains import haematoxylin


def draw_nuclei(seed, side=256, count=150):
    """Round spots of 1 on 0, of nuclear size, at seeded places."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side]
    image = np.zeros((side, side), np.float32)
    for row, column in rng.integers(0, side, (count, 2)):
        image = np.maximum(image, ((y - row) ** 2 + (x - column) ** 2 < 25).astype(np.float32))
    return image


def stain(nuclei):
    """An H&E in [0, 1] with haematoxylin where the nuclei are, and some eosin everywhere."""
    density = nuclei[..., None] * np.array([0.65, 0.70, 0.29]) + 0.1 * np.array([0.07, 0.99, 0.11])
    return np.exp(-density).astype(np.float32)


def a_core(name="a", group=None, thumbnail=None, **changes):
    view = CoreView(
        name=name,
        group=group or name,
        height=512,
        width=512,
        tissue=0.6,
        he_level=0.95,
        digest=name,
        constant=(),
        registration=Registration(0.8, 0.8, (0, 0), 20.0),
        thumbnail=np.random.default_rng(len(name)).random((32, 32), np.float32) if thumbnail is None else thumbnail,
    )
    return dataclasses.replace(view, **changes)


def codes(channels=(), cores=(), twins=(), nuclear="DAPI"):
    return [finding.code for finding in find_all(list(channels), list(cores), list(twins), nuclear)]


# Registration


@pytest.mark.parametrize("shift", [(0, 0), (5, -9), (-17, 3), (40, 50)])
def test_the_shift_that_aligns_the_marker_is_found(shift):
    nuclei = draw_nuclei(1)
    marker = np.roll(nuclei, (-shift[0], -shift[1]), (0, 1)) + 0.02 * np.random.default_rng(0).random(nuclei.shape)
    found = register(haematoxylin(stain(nuclei)), marker.astype(np.float32))
    assert found.shift == shift
    assert found.best_correlation > 0.95
    assert found.peak > 10
    assert found.correlation == pytest.approx(np.corrcoef(nuclei.ravel(), marker.ravel())[0, 1], abs=0.01)


@pytest.mark.parametrize("seed", range(6))
def test_other_tissue_is_no_better_at_any_shift_than_chance(seed):
    found = register(haematoxylin(stain(draw_nuclei(seed))), draw_nuclei(seed + 100))
    assert mismatched(a_core(registration=found))
    assert not shifted(a_core(registration=found))


def test_the_outline_of_the_tissue_alone_is_no_match():
    y, x = np.mgrid[:256, :256]
    disc = ((y - 128) ** 2 + (x - 128) ** 2 < 100**2).astype(np.float32)
    he = stain(disc * draw_nuclei(1, count=400))
    assert mismatched(a_core(registration=register(haematoxylin(he), disc * draw_nuclei(2, count=400))))


SIDES = (16, 32, 48, 51, 52, 64, 80, 95, 96, 112, 128)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("seed", range(4))
def test_a_sound_core_of_any_size_has_no_finding(side, seed):
    nuclei = draw_nuclei(seed, side, 12 + side * side // 400)
    marker = (nuclei + 0.3 * np.random.default_rng(seed).random(nuclei.shape)).astype(np.float32)
    core = a_core(height=side, width=side, registration=register(haematoxylin(stain(nuclei)), marker))
    assert codes(cores=[core]) == []
    expected = np.corrcoef(nuclei.ravel(), marker.ravel())[0, 1]
    assert core.registration.correlation == pytest.approx(expected, abs=0.01)
    assert (core.registration.shift is None) == (side < 96)
    assert bool(too_small([core])) == (side < 96)


@pytest.mark.parametrize("side", SIDES)
def test_a_wrong_pair_is_found_where_it_is_large_enough_to_judge(side):
    nuclei, other = (draw_nuclei(seed, side, 12 + side * side // 400) for seed in (0, 100))
    core = a_core(height=side, width=side, registration=register(haematoxylin(stain(nuclei)), other))
    assert codes(cores=[core]) == (["mismatched"] if side >= 96 else [])


def test_cores_too_small_to_judge_are_named_in_one_note():
    small = a_core("tiny", registration=Registration(0.4, np.nan, None, np.nan))
    note = too_small([a_core(), small, dataclasses.replace(small, name="narrow"), a_core("b", registration=None)])
    assert note.startswith("2 of 4 cores are less than 96 pixels high or wide") and note.endswith("tiny, narrow")
    assert too_small([a_core()]) == ""


def test_a_marker_without_signal_has_no_correlation():
    found = register(haematoxylin(stain(draw_nuclei(1))), np.zeros((256, 256), np.float32))
    assert np.isnan(found.correlation)
    assert mismatched(a_core(registration=found))


def test_haematoxylin_is_proportional_to_scikit_image():
    color = pytest.importorskip("skimage.color", reason="scikit-image is not installed")
    he = np.random.default_rng(0).uniform(0.05, 1, (20, 30, 3)).astype(np.float32)
    ours, theirs = haematoxylin(he), color.separate_stains(he, np.linalg.inv(color.rgb_from_hed))[..., 0]
    # scikit-image clips negative densities.
    positive = theirs > 0
    ratio = ours[positive] / theirs[positive]
    assert positive.mean() > 0.3
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-3)


def test_overlap_pairs_the_overlapping_pixels():
    still, moved = np.arange(12).reshape(3, 4), np.arange(12).reshape(3, 4) + 100
    first, second = overlap(still, moved, 1, -2)
    assert first.tolist() == [[4, 5], [8, 9]]
    assert second.tolist() == [[102, 103], [106, 107]]


# Channels


def test_a_sparse_marker_counts_as_positive_above_its_background():
    rng = np.random.default_rng(0)
    values = rng.normal(0.1, 0.01, 100_000)
    values[:300] = 0.8 + 0.01 * rng.random(300)
    row = describe_channel("CD8", values.astype(np.float32), 1 / 65535)
    assert row.threshold == pytest.approx(0.15, abs=0.001)
    assert row.positive == pytest.approx(0.003, abs=1e-5)
    assert row.mean == pytest.approx(0.003 * 0.805 + 0.997 * 0.1, abs=2e-4)
    assert row.quantiles[1:] == pytest.approx((0.1, 0.1248, 0.8067), abs=1e-3)
    assert (row.state, row.saturated) == ("", 0)


def test_noise_is_not_taken_for_signal():
    values = np.clip(np.random.default_rng(1).normal(0.1, 0.01, 100_000), 0.06, 0.14)
    assert describe_channel("Blank", values.astype(np.float32), 0.0).state == "noise"


def test_eight_bit_noise_of_a_step_is_no_signal():
    values = np.random.default_rng(1).choice([0, 1, 2], 10_000, p=[0.7, 0.25, 0.05]) / 255
    row = describe_channel("Blank", values.astype(np.float32), 1 / 255)
    assert (row.state, row.positive, row.saturated) == ("noise", 0, 0)


@pytest.mark.parametrize(("level", "state"), [(0.0, "empty"), (0.2, "constant")])
def test_a_single_value_is_empty_or_constant(level, state):
    row = describe_channel("a", np.full(1000, level, np.float32), 1 / 255)
    assert (row.state, row.positive, row.saturated) == (state, 0, 0)


def test_a_plateau_at_the_top_is_saturation_even_below_full_scale():
    rng = np.random.default_rng(2)
    values = np.minimum(rng.exponential(0.02, 50_000), 4095 / 65535)
    row = describe_channel("a", values.astype(np.float32), 1 / 65535)
    assert row.saturated == pytest.approx(np.exp(-4095 / 65535 / 0.02), rel=0.1)


def test_the_most_varied_channel_is_not_the_brightest():
    rng = np.random.default_rng(0)
    sample = np.stack([0.9 + 0.001 * rng.random(500), 0.1 * (rng.random(500) > 0.5)]).astype(np.float32)
    assert most_varied(["bright", "varied"], sample) == "varied"


# Reading


@pytest.mark.parametrize("layout", ["hwc", "chw"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_samples_and_thumbnails_are_intensities_of_the_kept_channels(write_pairs, open_pairs, layout, dtype):
    folder = write_pairs(orion_layout=layout, he_layout=layout, he_dtype=dtype, orion_dtype=dtype)
    found = open_pairs(folder, exclude_channels="1")
    white = {"uint8": 255, "uint16": 65535, "float32": 1}[dtype]
    he, orion = (np.load(folder / f"core_02_{kind}.npy") / white for kind in ("HE", "ORION"))
    if layout == "chw":
        he, orion = he.transpose(1, 2, 0), orion.transpose(1, 2, 0)
    whole = thinned(sample_rows(found.table, found.scales, 2, 48 * 40), 48 * 40)
    np.testing.assert_allclose(whole, orion[..., [0, 2]].reshape(-1, 2).T, rtol=1e-6)
    few = thinned(sample_rows(found.table, found.scales, 2, 100), 100)
    assert few.shape == (2, 100)
    assert {tuple(pixel) for pixel in few.T.tolist()} <= {tuple(pixel) for pixel in whole.T.tolist()}
    np.testing.assert_allclose(
        he_thumbnail(found.table, found.scales, 2, 24), he.reshape(24, 2, 20, 2, 3).mean(axis=(1, 3)), atol=1e-6
    )
    marker = marker_thumbnail(found.table, found.scales, 2, 2, 24)
    np.testing.assert_allclose(marker, orion[1::2, :, 2].reshape(24, 20, 2).mean(axis=2), atol=1e-6)


def test_block_means_of_any_size_keep_the_weighted_mean():
    image = np.random.default_rng(0).random((7, 10, 2))
    assert block_means(image, 7, 5) == pytest.approx(image.reshape(7, 5, 2, 2).mean(axis=2))
    assert block_means(image, 3, 3).shape == (3, 3, 2)
    assert block_means(np.full((9, 11), 4, np.uint8), 4, 3) == pytest.approx(np.full((4, 3), 4))


def test_a_core_is_described(write_pairs, open_pairs):
    folder = write_pairs(tissue_rows=12, orion_dtype="uint8")
    stored = np.load(folder / "core_01_ORION.npy")
    stored[..., 1] = 7
    np.save(folder / "core_01_ORION.npy", stored)
    found = open_pairs(folder)
    sample = thinned(sample_rows(found.table, found.scales, 1, 500), 500)
    view = view_core(found.table, found.scales, 1, "slide 3", None, sample)
    assert (view.name, view.group, view.height, view.width) == ("core_01", "slide 3", 48, 40)
    assert view.tissue == pytest.approx(0.25, abs=0.03)
    assert view.he_level == pytest.approx(240 / 255, abs=0.01)
    assert view.constant == ("channel_01",)
    assert view.registration is None


# Duplicates


@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("flip", [False, True])
def test_a_turned_brightened_noisy_copy_is_the_same_tissue(turns, flip):
    rng = np.random.default_rng(1)
    image = block_means(draw_nuclei(3), 32, 32)
    copy = np.rot90(image.T if flip else image, turns)
    copy = 0.7 * copy + 0.1 + 0.01 * rng.standard_normal(copy.shape)
    others = [a_core(f"other {seed}", thumbnail=block_means(draw_nuclei(seed), 32, 32)) for seed in range(4, 8)]
    twins = find_twins([a_core("a", thumbnail=image), *others, a_core("b", thumbnail=copy.astype(np.float32))])
    assert [(pair.first.name, pair.second.name) for pair in twins] == [("a", "b")]
    assert 0.95 < twins[0].likeness < 1
    assert twins[0].across_groups


def test_round_cores_of_different_tissue_are_not_the_same():
    y, x = np.mgrid[:256, :256]
    disc = (y - 128) ** 2 + (x - 128) ** 2 < 110**2
    cores = [
        a_core(f"core {seed}", thumbnail=block_means(disc * (0.3 + 0.3 * draw_nuclei(seed)), 32, 32))
        for seed in range(8)
    ]
    assert find_twins(cores) == []


def test_identical_files_are_called_identical_within_and_across_groups():
    cores = [a_core("a", "p1", digest="x"), a_core("bb", "p1", digest="x"), a_core("ccc", "p2", digest="x")]
    twins = find_twins(cores)
    assert [(p.first.name, p.second.name, p.likeness, p.across_groups) for p in twins] == [
        ("a", "ccc", 1.0, True),
        ("a", "bb", 1.0, False),
    ]
    assert codes(cores=cores, twins=twins) == ["same_tissue_across_groups", "same_tissue"]


def test_blank_cores_are_not_the_same_tissue():
    assert find_twins([a_core(name, thumbnail=np.zeros((32, 32), np.float32)) for name in "ab"]) == []


# Findings


def test_sound_data_has_no_finding():
    values = np.r_[np.random.default_rng(0).normal(0.1, 0.01, 9999), 0.9].astype(np.float32)
    assert codes([describe_channel("DAPI", values, 0.0)], [a_core()]) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"tissue": 0.01}, ["little_tissue"]),
        ({"he_level": 0.06}, ["dark_he"]),
        ({"constant": ("CD3",)}, ["missing_in_core"]),
        ({"registration": Registration(0.3, 0.8, (3, -4), 20.0)}, ["shifted"]),
        ({"registration": Registration(0.3, 0.8, (3, 0), 20.0)}, []),
        ({"registration": Registration(0.78, 0.8, (3, -4), 20.0)}, []),
        ({"registration": Registration(0.1, 0.2, (30, -4), 3.0)}, ["mismatched"]),
        ({"registration": Registration(0.1, 0.2, (30, -4), 3.0), "tissue": 0.0}, ["little_tissue"]),
        ({"registration": None}, []),
    ],
)
def test_each_fault_of_a_core_has_its_finding(changes, expected):
    assert codes(cores=[a_core(), a_core("b", **changes)]) == expected


def test_a_channel_that_is_empty_everywhere_is_reported_once():
    channels = [describe_channel("Blank", np.zeros(100, np.float32), 0.0)]
    found = find_all(channels, [a_core(constant=("Blank",))], [], None)
    assert [finding.code for finding in found] == ["empty_channel"]
    assert '--exclude_channels "Blank"' in found[0].advice[0]


def test_saturation_is_reported_with_its_share():
    values = np.minimum(np.random.default_rng(2).exponential(0.3, 50_000), 1).astype(np.float32)
    (found,) = find_all([describe_channel("CD3", values, 0.0)], [], [], None)
    assert found.code == "saturated"
    assert "CD3 (3." in found.message
