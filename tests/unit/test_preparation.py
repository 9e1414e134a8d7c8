"""The parts of prepare: table of slides, panel, tissue, regions, lattice, resampling."""

import numpy as np
import pytest

from orion_unet.config import DataOptions
from orion_unet.data.pairs import find_pairs
from orion_unet.errors import InputError
from orion_unet.preparation import register_pairs
from orion_unet.preparation.one_pair import Judgement
from orion_unet.preparation.panel import choose_panel, read_markers
from orion_unet.preparation.regions import Areas, spread, tissue_regions, whole_regions
from orion_unet.preparation.slide_table import read_slide_table
from orion_unet.preparation.tma import find_cores
from orion_unet.preparation.writing import resampled_bands


def table(tmp_path, text):
    path = tmp_path / "slides.csv"
    path.write_text(text)
    return path


def test_a_table_of_slides_has_paths_relative_to_itself_and_groups_by_patient(tmp_path):
    path = table(tmp_path, "slide,he,orion,patient,he_pixel_size_um\nA,x/he.tif,o.tif,P1,0.5\nB,b.tif,o2.tif,,\n")
    first, second = read_slide_table(path)
    assert (first.he, first.group, first.he_pixel_size_um) == (tmp_path / "x/he.tif", "P1", 0.5)
    assert (second.orion, second.group, second.he_pixel_size_um) == (tmp_path / "o2.tif", "B", None)


def test_every_row_at_fault_is_named_at_once(tmp_path):
    path = table(tmp_path, "slide,he,orion,he_pixel_size_um\nA,,o.tif,\nB/..,h,o,\nA,h,o,zero\n")
    with pytest.raises(InputError) as raised:
        read_slide_table(path)
    for words in (
        "row 1: he is empty",
        "row 2: slide 'B/..'",
        "row 3: he_pixel_size_um 'zero'",
        "slide A: is listed in more",
    ):
        assert words in str(raised.value)


def test_a_table_without_its_columns_is_refused(tmp_path):
    with pytest.raises(InputError, match="has no column orion; has an unknown column 'mif'"):
        read_slide_table(table(tmp_path, "slide,he,mif\nA,b,c\n"))


def markers(tmp_path, text):
    path = tmp_path / "markers.csv"
    path.write_text(text)
    return read_markers(path)


def test_markers_in_another_order_than_the_image_are_matched_by_name(tmp_path):
    listed = markers(tmp_path, "channel_number,marker_name\n1,CD3\n2,DNA\n3,CD8\n")
    panel = choose_panel(tmp_path / "o.tif", 3, ("DNA", "CD8", "CD3"), listed)
    assert (panel.names, panel.channels) == (("CD3", "DNA", "CD8"), (2, 0, 1))


def test_removed_channels_are_left_out(tmp_path):
    listed = markers(tmp_path, "marker_name,background,remove\nDNA,,\nAF1,,TRUE\nCD3,AF1,FALSE\n")
    panel = choose_panel(tmp_path / "o.tif", 3, (), listed)
    assert (panel.names, panel.channels) == (("DNA", "CD3"), (0, 2))


def test_names_one_a_line_name_the_channels_in_order(tmp_path):
    assert choose_panel(tmp_path / "o.tif", 2, (), markers(tmp_path, "DNA\nCD3\n")).names == ("DNA", "CD3")


@pytest.mark.parametrize(
    ("text", "ome", "message"),
    [
        ("marker_name\nDNA\nCD3\n", (), "has 3 channels, but its list of markers has 2"),
        ("marker_name\nDNA\nCD3\nDNA\n", (), "duplicate or empty: DNA"),
        ("cycle,name\n1,DNA\n", (), "no marker_name"),
        ("marker_name,remove\nA,1\nB,1\nC,1\n", (), "removes every channel"),
        ("marker_name\nCD3\nDNA\nNew\n", ("DNA", "CD3", "CD8"), "the channels cannot be matched"),
    ],
)
def test_lists_of_markers_that_do_not_fit_are_refused(text, ome, message, tmp_path):
    with pytest.raises(InputError, match=message):
        choose_panel(tmp_path / "o.tif", 3, ome, markers(tmp_path, text))


def test_an_image_without_names_needs_a_list(tmp_path):
    with pytest.raises(InputError, match="--markers FILE"):
        choose_panel(tmp_path / "o.tif", 19, (), None)


HE_PINK, GLASS = (0.8, 0.5, 0.75), (0.96, 0.95, 0.96)


def picture():
    he = np.full((200, 300, 3), GLASS, np.float32)
    he[40:160, 30:150] = HE_PINK
    return he


@pytest.mark.parametrize("ink", [(0.1, 0.2, 0.7), (0.1, 0.6, 0.2), (0.05, 0.05, 0.05)], ids=["blue", "green", "black"])
def test_glass_pen_marks_and_specks_are_no_tissue(ink):
    pytest.importorskip("scipy")
    from orion_unet.preparation.tissue_map import tissue_map

    he = picture()
    he[80:120, 200:280] = ink
    he[10:12, 10:12] = HE_PINK
    found = tissue_map(he)
    assert found[45:155, 35:145].all()
    assert not found[:, 155:].any()
    assert not found[:30].any()


def test_dark_nuclei_are_tissue():
    pytest.importorskip("scipy")
    from orion_unet.preparation.tissue_map import tissue_map

    he = picture()
    he[60:100, 60:100] = (0.25, 0.15, 0.45)
    assert tissue_map(he)[45:155, 35:145].all()


def test_squares_of_tissue_do_not_overlap_and_are_at_least_half_tissue():
    tissue = np.zeros((100, 120), bool)
    tissue[13:70, 21:100] = True
    full = np.kron(tissue, np.ones((10, 10), bool))
    places = tissue_regions(Areas(tissue, 10.0), (1000, 1200), 200)
    taken = np.zeros_like(full, int)
    for y, x, height, width, share in places:
        part = np.s_[y : y + height, x : x + width]
        assert full[part].shape == (200, 200)
        assert share == pytest.approx(full[part].mean())
        assert share >= 0.5
        taken[part] += 1
    assert taken.max() == 1
    assert len(places) >= 8


def test_the_whole_slide_reaches_every_edge_where_there_is_tissue():
    places = whole_regions(Areas(np.ones((10, 13), bool), 10.0), (100, 130), 64)
    taken = np.zeros((100, 130), int)
    for y, x, height, width, _ in places:
        taken[y : y + height, x : x + width] += 1
    assert (taken == 1).all()


def test_regions_are_spread_over_the_tissue_by_the_seed():
    places = [(y, x, 10, 10, 1.0) for y in range(0, 100, 10) for x in range(0, 100, 10)]
    chosen = spread(places, 4, seed=3)
    assert chosen == spread(places, 4, seed=3)
    assert chosen != spread(places, 4, seed=4)
    centres = np.array([place[:2] for place in chosen])
    distances = np.linalg.norm(centres[:, None] - centres, axis=-1)[np.triu_indices(4, 1)]
    assert distances.min() > 35
    assert spread(places, None, 0) == places


def test_cores_of_a_turned_microarray_are_named_by_row_and_column_and_missing_ones_listed():
    pytest.importorskip("scipy")
    y, x = np.mgrid[:400, :500]
    tissue = np.zeros((400, 500), bool)
    angle = np.radians(4)
    for row in range(4):
        for column in range(5):
            if (row, column) in ((1, 2), (3, 0)):
                continue
            down, right = 60 + 85 * row, 70 + 85 * column
            at = (down * np.cos(angle) + right * np.sin(angle) - 20, right * np.cos(angle) - down * np.sin(angle) + 20)
            tissue |= np.hypot(y - at[0], x - at[1]) < 28
    tissue[390:393, 480:484] = True
    regions, missing = find_cores(tissue, 4.0, (1600, 2000), "T")
    assert missing == ["B03", "D01"]
    assert {region.core for region in regions} == {
        f"T_{letter}0{number}" for letter in "ABCD" for number in range(1, 6)
    } - {"T_B03", "T_D01"}
    first = next(region for region in regions if region.core == "T_A01")
    assert abs(first.y + first.height / 2 - 4 * (60 * np.cos(angle) + 70 * np.sin(angle) - 20)) < 8
    assert 220 <= first.height <= 260


def test_tissue_without_discs_is_no_microarray():
    pytest.importorskip("scipy")
    with pytest.raises(InputError, match="no lattice"):
        find_cores(np.pad(np.ones((50, 50), bool), 20), 1.0, (90, 90), "T")


@pytest.mark.parametrize(("step", "corner"), [(2.0, (3, 5)), (1.5, (3, 5)), (0.8, (3.2, 5.1))])
def test_resampling_keeps_the_mean_over_areas(step, corner):
    image = np.random.default_rng(0).random((2, 60, 70)).astype(np.float32)
    size = (16, 20)
    bands = resampled_bands(lambda y, x, h, w: image[:, y : y + h, x : x + w], corner, size, step, (60, 70))
    found = np.concatenate(list(bands))
    # The integral over a pixel, on a grid fine enough for these steps and corners.
    fine = np.kron(image, np.ones((1, 10, 10)))
    for row, column in ((0, 0), (3, 7), (15, 19)):
        top, left = (round(10 * (start + step * index)) for start, index in zip(corner, (row, column), strict=True))
        side = round(10 * step)
        expected = fine[:, top : top + side, left : left + side].mean((1, 2))
        np.testing.assert_allclose(found[row, column], expected, rtol=1e-4)


def test_without_resampling_values_are_those_stored():
    image = np.random.default_rng(0).integers(0, 65535, (3, 1100, 40), dtype=np.uint16)
    bands = resampled_bands(lambda y, x, h, w: image[:, y : y + h, x : x + w], (7, 2), (1050, 30), 1, (1100, 40))
    np.testing.assert_array_equal(np.concatenate(list(bands)), image[:, 7:1057, 2:32].transpose(1, 2, 0))


def test_a_registration_of_another_layout_is_done_again(tmp_path):
    np.save(tmp_path / "core_HE.npy", np.zeros((16, 16, 3), np.uint8))
    np.save(tmp_path / "core_ORION.npy", np.zeros((16, 16, 16), np.uint8))
    judgement = Judgement(nuclear=0, min_correlation=0.3, max_shift=20)
    found = [
        register_pairs._origin(
            find_pairs(DataOptions(pairs_dir=str(tmp_path), patch_size=16, orion_layout=layout)), 0, judgement
        )
        for layout in ("hwc", "chw", "hwc")
    ]
    assert found[0] == found[2] != found[1]
