"""The overview PNG: every marker is drawn, at the size and in the range its title states."""

import io

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from orion_unet.errors import RunError
from orion_unet.inference import overview
from orion_unet.inference.overview import Layout, bar_length, title_within, write_overview

BRIGHTEST = np.array([252, 255, 164]) / 255  # the upper end of inferno


def thumbnails(markers, height=40, width=50):
    rng = np.random.default_rng(markers)
    return rng.random((height, width, 3), np.float32), rng.random((markers, height, width), np.float32)


def figure_of(markers, **options):
    he, image = thumbnails(markers)
    return overview._draw(he, image, [f"m{index}" for index in range(markers)], options.get("pixel_size_um"))


@pytest.mark.parametrize("markers", [1, 3, 6, 20, 60])
def test_a_png_of_bounded_size_is_written(tmp_path, markers):
    he, image = thumbnails(markers)
    write_overview(tmp_path / "a.png", he, image, [f"m{index}" for index in range(markers)], pixel_size_um=0.5)
    height, width = imread(tmp_path / "a.png").shape[:2]
    assert 300 < height <= 12 * 120
    assert 600 < width <= 22 * 120
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("aspect", [0.2, 1.0, 4.0])
@pytest.mark.parametrize("markers", [1, 2, 3, 4, 6, 20, 37, 60])
def test_markers_stand_around_the_he_without_touching_it_or_each_other(markers, aspect):
    layout = Layout.of(markers, aspect)
    places = list(layout.places())
    assert len(places) == len(set(places)) >= markers
    assert not [place for place in places if max(place) < layout.block]
    assert layout.cell_height > 0.5


def test_titles_state_marker_and_range_and_the_first_is_the_he():
    he, image = thumbnails(3)
    image[0] = np.linspace(0, 0.4, image[0].size).reshape(image[0].shape)
    image[1] = 0.001
    axes = overview._draw(he, image, ["CD3", "Blank", "$x_1$"], None).axes
    titles = [each.get_title(loc="left") for each in axes]
    assert titles[:3] == ["H&E", "CD3  0–0.40", "Blank  0–0.05"]
    assert titles[3].startswith("$x_1$  0–")


def test_a_value_at_the_top_of_its_range_is_drawn_brightest(tmp_path):
    he, image = np.zeros((40, 40, 3), np.float32), np.zeros((1, 40, 40), np.float32)
    image[0, :, 20:] = 0.3
    figure = overview._draw(he, image, ["a"], None)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=100)
    pixels = imread(io.BytesIO(drawn.getvalue()))
    left, low, right, high = figure.axes[1].get_position().extents
    height, width = pixels.shape[:2]
    row = int((1 - (low + high) / 2) * height)
    bright, dark = (pixels[row, int((left + share * (right - left)) * width), :3] for share in (0.75, 0.25))
    np.testing.assert_allclose(bright, BRIGHTEST, atol=0.01)
    assert dark.max() < 0.02


def test_of_70_markers_the_first_60_are_drawn_and_the_others_left_out(tmp_path, monkeypatch):
    he, image = thumbnails(70, 8, 8)
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    write_overview(tmp_path / "a.png", he, image, [f"m{index}" for index in range(70)])
    (figure,) = figures
    stain, *markers = figure.axes
    np.testing.assert_array_equal(stain.images[0].get_array(), he)
    assert len(markers) == 60
    for index, axes in enumerate(markers):
        assert axes.get_title(loc="left").split()[0] == f"m{index}"
        np.testing.assert_array_equal(axes.images[0].get_array(), image[index])


@pytest.mark.parametrize(("width_um", "expected"), [(100, 20), (79, 10), (200, 50), (4000, 1000), (0.9, 0.2)])
def test_the_scale_bar_is_the_longest_round_length_within_a_quarter(width_um, expected):
    assert bar_length(width_um) == pytest.approx(expected)


@pytest.mark.parametrize(("pixel_size_um", "text"), [(0.5, "5 µm"), (80, "1 mm"), (None, None), (0, None)])
def test_the_scale_bar_says_its_length_where_the_pixel_size_is_known(pixel_size_um, text):
    axes = figure_of(1, pixel_size_um=pixel_size_um).axes[0]
    assert [shown.get_text() for shown in axes.texts] == ([text] if text else [])
    if text:
        length_um = {"5 µm": 5, "1 mm": 1000}[text]
        assert axes.patches[-1].get_width() == pytest.approx(length_um / pixel_size_um)


def test_a_long_name_is_cut_and_its_range_stays():
    shown = title_within("a-very-long-name-of-a-marker", "  0–0.40", 1.5)
    assert shown.endswith("…  0–0.40")
    assert len(shown) < 22
    assert title_within("CD3e", "  0–0.40", 1.5) == "CD3e  0–0.40"


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(RunError, match=r"nowhere/a\.png: cannot be written"):
        write_overview(tmp_path / "nowhere" / "a.png", *thumbnails(1), ["a"])
