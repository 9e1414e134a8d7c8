"""Text that is shown to people: hostile names are harmless, numbers and durations are readable."""

import csv
import io
import math
from datetime import date

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from orion_unet.text import clean, clean_lines, csv_bytes, duration, for_figure, named, short_number


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 漢", "plain é 漢"),
        ("\x1b[31m", "\\x1b[31m"),
        ("a\nb\tc\r", "a\\x0ab\\x09c\\x0d"),
        ("\u202e\u2066\u200b", "\\u202e\\u2066\\u200b"),
        ("\ud800", "\\ud800"),
        ("\U000e0041", "\\U000e0041"),
        ("a" + "\u0301" * 50, "a\u0301\u0301"),
        ("x" * 500, "x" * 119 + "…"),
        (None, "None"),
    ],
)
def test_clean_escapes_what_could_act(text, shown):
    assert clean(text) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0 s"),
        (0.0416, "0.042 s"),
        (4.25, "4.2 s"),
        (41.4, "41 s"),
        (720, "12 min"),
        (12_000, "3 h 20 min"),
        (200_000, "2 d 7 h"),
        (None, "-"),
        (-1, "-"),
        (1e300, "-"),
        (float("nan"), "-"),
    ],
)
def test_durations_are_readable(seconds, shown):
    assert duration(seconds) == shown


def test_without_a_limit_nothing_is_shortened():
    assert clean("x" * 500, None) == "x" * 500
    assert clean("\x1b" * 200, None) == "\\x1b" * 200


def test_lines_stay_lines_and_each_is_cleaned():
    assert clean_lines("first\x1b[2J\n  - second\u202e\n") == "first\\x1b[2J\n  - second\\u202e\n"


@pytest.mark.parametrize("text", ["$\\frac$", "a $b$ c", r"cost \$5", "$", "$$$", "plain", "_hidden"])
def test_a_figure_shows_the_text_itself_and_no_formula(text):
    """matplotlib refuses an unknown formula; what it lays out is the name with its dollar signs."""
    figure = Figure()
    FigureCanvasAgg(figure)
    shown = figure.text(0.5, 0.5, for_figure(text))
    figure.canvas.draw()
    assert shown._preprocess_math(shown.get_text()) == (text, False)


def test_a_figure_shows_no_control_characters_and_shortens():
    assert for_figure("a\x1b[31m\nb") == "a\\x1b[31m\\x0ab"
    assert for_figure("abcdef", 4) == "abc…"


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.123456, "0.1235"), (12345.6, "1.235e+04"), (None, "-"), (math.nan, "-"), (math.inf, "not finite"), (0.0, "0")],
)
def test_a_short_number_has_four_digits(value, shown):
    assert short_number(value) == shown


def test_a_table_is_read_back_with_what_is_undefined_empty():
    rows = [
        ["a,b", 1, 0.12345678, np.float32(0.5), None, True],
        ['say "x"\ny', np.int64(7), math.nan, np.float64(math.inf), 1e-12, date(2026, 1, 2)],
    ]
    content = csv_bytes(["name", "n", "x", "y", "z", "w"], iter(rows))
    read = list(csv.reader(io.StringIO(content.decode(), newline="")))
    assert read == [
        ["name", "n", "x", "y", "z", "w"],
        ["a,b", "1", "0.123457", "0.5", "", "True"],
        ['say "x"\ny', "7", "", "", "1e-12", "2026-01-02"],
    ]
    assert b"\r" not in content
    assert csv_bytes(["x"], [[123456.789]], digits=9) == b"x\n123456.789\n"


def test_a_file_name_that_is_not_utf8_makes_a_table_that_is():
    assert csv_bytes(["core"], [["core\udcff"]]).decode() == "core\ncore\\udcff\n"


def test_a_long_list_is_cut():
    assert named(str(index) for index in range(11)) == "0, 1, 2, 3, 4, 5, 6, 7, and 3 more"
    assert named("ab") == "a, b"
