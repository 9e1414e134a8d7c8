"""The figure in other forms, and over steps, patches and hours."""

import json
import zlib
from xml.etree import ElementTree

import numpy as np
import pytest
from monitor_runs import epoch_record, healthy_losses, step_record, write_run, write_steps

from orion_unet.cli.monitor import main
from orion_unet.errors import InputError
from orion_unet.monitor import plots
from orion_unet.monitor.diagnostics import Thresholds
from orion_unet.monitor.horizontal import EPOCHS, horizontals
from orion_unet.monitor.report import Run


def report(folder):
    return Run(folder, Thresholds()).poll()


def timed(folder, durations_s, **status):
    """A run whose epochs took so long."""
    write_run(folder, *healthy_losses(len(durations_s)), **status)
    lines = [epoch_record(e, 0.3, 0.4) | {"duration_s": s} for e, s in enumerate(durations_s, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def axis(folder, kind):
    (found,) = horizontals([report(folder)], kind)
    return found


def test_hours_are_the_sum_of_the_durations_and_go_on_after_the_last_epoch(tmp_path):
    hours = axis(timed(tmp_path / "run", [7200, 3600, 3600]), "hours")
    assert hours.label == "hours of training"
    np.testing.assert_allclose(hours.of(np.array([0, 0.5, 1, 2, 2.5, 3, 3.5, 5])), [0, 1, 2, 3, 3.5, 4, 4.5, 6])


def test_an_epoch_without_a_duration_counts_as_long_as_the_others(tmp_path):
    hours = axis(timed(tmp_path / "run", [3600, None, -5, 3600]), "hours")
    np.testing.assert_allclose(hours.of(np.array([1, 2, 3, 4])), [1, 2, 3, 4])


def test_steps_and_patches_come_from_the_length_of_an_epoch_and_the_batch_of_a_step(tmp_path):
    # 12 patches per optimiser step, which is two steps of the loop.
    options = {"accumulate_steps": 2}
    folder = write_run(tmp_path / "run", *healthy_losses(3), options=options, steps_per_epoch=50)
    assert axis(folder, "step").of(2.5) == 125
    assert axis(folder, "patches").of(2.0) == 600


def test_without_a_length_in_the_status_the_longest_epoch_of_the_steps_counts(tmp_path):
    folder = write_run(tmp_path / "run", *healthy_losses(2))
    write_steps(folder, [step_record(1, 10, 0.4), step_record(1, 40, 0.3), step_record(2, 10, 0.3)])
    assert axis(folder, "step").of(2.0) == 80


def test_epochs_are_used_for_all_runs_where_one_does_not_say_enough(tmp_path):
    known = timed(tmp_path / "known", [3600, 3600], steps_per_epoch=5)
    unknown = timed(tmp_path / "unknown", [None, None])
    for kind in ("step", "patches", "hours"):
        assert horizontals([report(known), report(unknown)], kind) == [EPOCHS, EPOCHS]
        assert horizontals([report(known)] * 2, kind)[0] is not EPOCHS


@pytest.mark.parametrize("kind", ["epoch", "step", "patches", "hours"])
def test_curves_of_epochs_and_steps_share_the_axis(kind, tmp_path):
    folder = timed(tmp_path / "run", [3600 * (1 + e % 3) for e in range(12)], steps_per_epoch=20)
    write_steps(folder, [step_record(e, s, 0.4) for e in range(1, 14) for s in (10, 20)])
    figure = plots.run_figure(report(folder), kind)
    by_title = {axes.get_title(loc="left"): axes for axes in figure.axes}
    loss = by_title["Training and validation loss"]
    lines = {line.get_label(): line.get_xdata() for line in loss.lines}
    expected = {
        "epoch": np.arange(1, 13),
        "step": 20 * np.arange(1, 13),
        "patches": 240 * np.arange(1, 13),
        "hours": np.cumsum([1 + e % 3 for e in range(12)]),
    }[kind]
    np.testing.assert_allclose(lines["validation"], expected)
    np.testing.assert_allclose(lines["training, steps"][1:24:2], expected)
    rate = by_title["Learning rate"]
    assert rate.get_xlabel() == {"patches": "patches seen", "hours": "hours of training"}.get(kind, kind)
    left, right = loss.get_xlim()
    assert left <= 0 < expected[-1] < right
    assert by_title["Validation Pearson per marker"].get_xlabel() == "epoch"


@pytest.mark.parametrize("kind", ["step", "hours"])
def test_a_run_in_its_first_epoch_is_drawn(kind, tmp_path):
    folder = write_run(tmp_path / "run", [], [], state="training", steps_per_epoch=20)
    write_steps(folder, [step_record(1, s, 0.4) for s in range(1, 10)])
    figure = plots.run_figure(report(folder), kind)
    labels = {axes.get_xlabel() for axes in figure.axes}
    assert labels == {"step" if kind == "step" else "epoch"}
    assert plots.png(figure).startswith(b"\x89PNG")


def test_the_runs_of_a_comparison_are_drawn_by_their_own_hours(tmp_path):
    reports = [report(timed(tmp_path / "fast", [3600] * 4)), report(timed(tmp_path / "slow", [7200] * 3))]
    figure = plots.comparison_figure(reports, ["fast", "slow"], "hours")
    axes = figure.axes[0]
    drawn = {line.get_label(): line.get_xdata().tolist() for line in axes.lines}
    assert drawn["fast"] == [1, 2, 3, 4]
    assert drawn["slow"] == [2, 4, 6]
    assert axes.get_xlabel() == "hours of training"
    assert axes.get_xlim()[1] > 6


def test_the_figure_is_written_as_svg_and_as_pdf(tmp_path, capsys):
    folder = write_run(tmp_path / "run", *healthy_losses(5))
    assert main(["--output_dir", str(folder), "--format", "svg"]) == 0
    root = ElementTree.fromstring((folder / "training_progress.svg").read_bytes())
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "training_progress.svg" in capsys.readouterr().out
    assert not (folder / "training_progress.png").exists()
    assert main(["--output_dir", str(folder), "--figure", str(tmp_path / "figure.pdf")]) == 0
    pdf = (tmp_path / "figure.pdf").read_bytes()
    assert pdf.startswith(b"%PDF")
    # Letters as TrueType outlines.
    assert b"/FontFile2" in pdf + b"".join(_streams(pdf))


def _streams(pdf):
    for part in pdf.split(b"stream\n")[1:]:
        try:
            yield zlib.decompressobj().decompress(part)
        except zlib.error:
            continue


@pytest.mark.parametrize("form", ["png", "svg", "pdf"])
def test_the_same_run_gives_the_same_bytes(form, tmp_path):
    found = report(write_run(tmp_path / "run", *healthy_losses(3)))
    assert plots.rendered(plots.run_figure(found), form) == plots.rendered(plots.run_figure(found), form)


def test_a_page_has_a_png_beside_another_form(tmp_path):
    folder = write_run(tmp_path / "run", *healthy_losses(3))
    page = tmp_path / "page.html"
    assert main(["--output_dir", str(folder), "--format", "pdf", "--html", str(page)]) == 0
    assert "data:image/png;base64,iVBOR" in page.read_text()


def test_a_form_that_contradicts_the_ending_is_refused(tmp_path):
    folder = write_run(tmp_path / "run", *healthy_losses(3))
    with pytest.raises(InputError, match="the ending differs"):
        main(["--output_dir", str(folder), "--format", "svg", "--figure", str(tmp_path / "figure.png")])
    assert not (folder / "monitor.json").exists()


@pytest.mark.parametrize("words", [["--format", "svg"], ["--x", "hours"]])
def test_options_of_the_figure_are_refused_where_there_is_none(words, tmp_path):
    with pytest.raises(InputError, match=f"--runs and {words[0]} do not go together"):
        main(["--runs", str(tmp_path), *words])
