"""What a person sees: terminal, page and figure, with ordinary runs and with hostile ones."""

import html
import io
import json
import re
import struct
import unicodedata

import numpy as np
import pytest
from monitor_runs import MARKERS, epoch_record, former_losses, healthy_losses, write_run
from rich.cells import cell_len

from orion_unet.monitor import plots
from orion_unet.monitor.compare import comparison, differing_options
from orion_unet.monitor.diagnostics import Thresholds
from orion_unet.monitor.page import page
from orion_unet.monitor.page_script import SCRIPT
from orion_unet.monitor.report import Run
from orion_unet.monitor.terminal import ASCII_BLOCKS, BLOCKS, make_console, one_line, sparkline, view
from orion_unet.text import clean

HOSTILE = "\x1b[2J\x1b]0;owned\x07<script>alert(1)</script>$\\frac{1}{2}$[red]b[/red]\u202eevil\r\n\x9b31m\u0000é\ud800"


def report(folder):
    return Run(folder, Thresholds()).poll()


def screen(found, width, height=None, file=None):
    console = make_console(file or io.StringIO(), width=width)
    console.print(view(found, console, height, footer="every 10 s"))
    return console.file.getvalue()


@pytest.fixture
def hostile(tmp_path):
    """A run in which every text and number is meant to do harm."""
    run = write_run(tmp_path / "run", *former_losses(), options={"note": HOSTILE, "output_dir": HOSTILE})
    status = {
        "schema": 1,
        "state": "failed",
        "message": HOSTILE,
        "epochs": 1e300,
        "epoch": -5,
        "step": [1],
        "host": HOSTILE,
    }
    (run / "status.json").write_text(json.dumps(status))
    record = epoch_record(21, 1e308, -1e308, lr=1e-320, markers=(HOSTILE, "_hidden", "漢字" * 20, *MARKERS))
    record["duration_s"], record["grad_norm"] = 1e300, True
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")
    return run


@pytest.mark.parametrize("width", [80, 140])
@pytest.mark.parametrize("height", [24, 40])
@pytest.mark.parametrize("losses", [healthy_losses(1), healthy_losses(30), former_losses()])
def test_a_live_screen_fits_the_window(tmp_path, width, height, losses):
    text = screen(report(write_run(tmp_path, *losses)), width, height)
    lines = text.splitlines()
    assert len(lines) <= height
    assert max(cell_len(line) for line in lines) <= width
    assert "every 10 s" in lines[-1]


def test_a_small_window_says_what_it_leaves_out(tmp_path):
    text = screen(report(write_run(tmp_path, *former_losses())), 60, 15)
    assert len(text.splitlines()) <= 15 and "more lines" in text


def test_a_wider_screen_shows_more_columns_and_a_higher_one_more_epochs(tmp_path):
    found = report(write_run(tmp_path, *healthy_losses(30)))
    small, large = screen(found, 80, 24), screen(found, 140, 40)
    assert "psnr dB" in large and "psnr dB" not in small
    rows = [len(re.findall(r"^ +\d+ +\d\.", text, re.M)) for text in (small, large)]
    assert 5 <= rows[0] < rows[1]


def test_the_view_shows_progress_best_markers_warnings_and_options(tmp_path):
    train, val = former_losses()
    run = write_run(tmp_path / "former", train, val, options={"learning_rate": 5e-4})
    text = " ".join(screen(report(run), 100).split())
    assert "former finished" in text and "epoch 20 of 30" in text and "best 0.43 (epoch 7)" in text
    assert "Hoechst 0.900" in text and "Blank -" in text
    assert "warning unstable_validation" in text and "--learning_rate 5e-5" in text
    assert "learning rate 0.0005 is high" in text


def test_a_healthy_run_says_no_warnings(tmp_path):
    assert "no warnings" in screen(report(write_run(tmp_path, *healthy_losses(20))), 80)


def test_output_to_a_pipe_has_no_escapes(tmp_path):
    assert "\x1b" not in screen(report(write_run(tmp_path, *former_losses())), 80)


def test_hostile_text_moves_no_cursor_and_hides_nothing(hostile):
    for text in (screen(report(hostile), 80), screen(report(hostile), 140, 40), one_line(report(hostile))):
        odd = {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c != "\n"}
        assert not odd
        text.encode()
    assert "\\x1b[2J" in screen(report(hostile), 200) and "[red]" in screen(report(hostile), 200)


def test_hostile_text_reaches_the_page_escaped(hostile):
    text = page(report(hostile), b"png", refresh_s=10)
    assert text.count("<script") == text.count(f"<script>{SCRIPT}</script>") == 1
    assert "\x1b" not in text and "\u202e" not in text
    assert "&lt;script&gt;" in text
    assert re.findall(r'(?:src|href|url)\s*[=(]\s*"?([^"\s)]+)', text) == ["data:image/png;base64,cG5n"]
    text.encode()


def test_hostile_numbers_and_names_are_drawn(hostile):
    assert_png(plots.png(plots.run_figure(report(hostile))))
    assert_png(plots.png(plots.comparison_figure([report(hostile)] * 2, [clean(HOSTILE)] * 2)))


def assert_png(content):
    width, height = struct.unpack(">II", content[16:24])
    assert content.startswith(b"\x89PNG") and (width, height) == (1500, 900)


@pytest.mark.parametrize("epochs", [0, 1, 2, 3, 40, 3000])
def test_a_figure_of_any_length_is_drawn(tmp_path, epochs):
    assert_png(plots.png(plots.run_figure(report(write_run(tmp_path, *healthy_losses(epochs))))))


def test_the_figure_names_its_panels_and_marks_best_restart_and_lower_rate(tmp_path):
    run = write_run(tmp_path, *healthy_losses(12))
    with open(run / "metrics.jsonl", "a") as file:
        for epoch in (13, 14):
            file.write(json.dumps(epoch_record(epoch, 0.1, 0.12, lr=5e-5, attempt=2)) + "\n")
    figure = plots.run_figure(report(run))
    titles = " | ".join(axes.get_title(loc="left") for axes in figure.axes)
    for word in ("Training and validation loss", "Stability", "Gap", "Learning rate", "loss terms", "Pearson"):
        assert word in titles
    labels = [label for axes in figure.axes for label in axes.get_legend_handles_labels()[1]]
    assert {"best, epoch 13", "restart", "learning rate lowered", "warning above 0.1"} <= set(labels)
    assert all(axes.get_ylabel() for axes in figure.axes[:5])


def test_long_curves_keep_their_extremes(tmp_path):
    train, val = healthy_losses(20_000)
    val[12_345] = 7.0
    figure = plots.run_figure(report(write_run(tmp_path, train, val)))
    line = next(line for line in figure.axes[0].get_lines() if line.get_label() == "validation")
    assert len(line.get_xdata()) <= plots.MAX_POINTS and np.nanmax(line.get_ydata()) == 7.0


def test_ten_thousand_markers_show_the_best_and_the_worst_and_count_the_rest(tmp_path):
    run = write_run(tmp_path, *healthy_losses(3))
    record = epoch_record(4, 0.2, 0.2)
    record["val"]["per_channel"] = {f"m{n}": {"pearson": n / 10_000} for n in range(10_000)}
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")
    found = report(run)
    text = screen(found, 80, 24)
    assert "m9999" in text and re.search(r"\bm0\b", text) and re.search(r"\+99\d\d more", text)
    assert "9960 between best and worst left out" in html.unescape(page(found, b""))
    assert "9964 between them left out" in " ".join(
        axes.get_title(loc="left").replace("\n", " ") for axes in plots.run_figure(found).axes
    )


@pytest.mark.parametrize("blocks", [BLOCKS, ASCII_BLOCKS])
def test_a_sparkline_runs_from_low_to_high(blocks):
    values = np.array([0.0, 1.0, np.inf, np.nan])
    assert sparkline(values, 4, 0, 1, blocks) == f"{blocks[0]}{blocks[-1]}x "
    assert len(sparkline(np.linspace(0, 1, 1000), 50, 0, 1, blocks)) == 50
    assert sparkline(np.array([]), 10, 0, 1) == ""


def test_a_terminal_without_blocks_gets_plain_characters(tmp_path):
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    console = make_console(file, width=80)
    console.print(view(report(write_run(tmp_path, *healthy_losses(9))), console), end="")
    file.flush()
    assert b"train ###" in file.buffer.getvalue()


def test_every_compared_run_is_in_the_legend(tmp_path):
    """matplotlib leaves out labels that begin with an underscore, and parses text between dollar signs."""
    names = ["_first", r"$\frac$", "third"]
    reports = [report(write_run(tmp_path / str(at), *healthy_losses(5))) for at in range(3)]
    figure = plots.comparison_figure(reports, names)
    assert_png(plots.png(figure))
    shown = [text.get_text().strip() for text in figure.axes[0].get_legend().get_texts()]
    assert shown == ["_first", r"\$\frac\$", "third"]


def test_advice_names_alternatives_and_steps(tmp_path):
    """Options are alternatives; sentences are steps, and not something to paste."""
    train, val = former_losses()
    found = report(write_run(tmp_path / "run", train, val, options={"learning_rate": 5e-4}))
    shown = " ".join(screen(found, 200).split())
    assert "try --learning_rate 5e-5, or --batch_size 16, or" in shown
    slow = "calm the validation loss first; try --weight_decay 5e-05; check that the patches are diverse"
    assert slow in shown
    text = html.unescape(page(found, b""))
    assert "calm the validation loss first; try <code>--weight_decay 5e-05</code>; check that" in text


def test_a_line_never_ends_between_an_option_and_its_value(tmp_path):
    found = report(write_run(tmp_path, *former_losses()))
    for width in range(50, 141):
        lines = screen(found, width).splitlines()
        assert sum(line.startswith("  ") and "--" in line for line in lines) >= 3
        assert not [line for line in lines if re.search(r"--\w+$", line.rstrip())]


def test_compared_runs_stand_side_by_side_with_the_options_that_differ(tmp_path):
    first = report(write_run(tmp_path / "a", *healthy_losses(25), options={"learning_rate": 1e-4, "output_dir": "a"}))
    second = report(write_run(tmp_path / "b", *former_losses(), options={"learning_rate": 5e-4, "output_dir": "b"}))
    assert differing_options([first, second]) == {"learning_rate": [1e-4, 5e-4]}
    columns, rows = comparison([first, second])
    table = {row[0]: row[1:] for row in rows}
    assert columns == ["", "a", "b"]
    assert table["best epoch"] == ["24", "7"] and table["best validation loss"][0].endswith("*")
    assert table["--learning_rate"] == ["0.0001", "0.0005"]
    assert table["time per epoch"] == ["40 s", "40 s"]
