"""The steps as a person sees them: terminal and figure, before the first epoch ends and after."""

import io
import json

import numpy as np
import pytest
from monitor_runs import epoch_record, healthy_losses, step_record, write_run, write_steps
from rich.cells import cell_len

from orion_unet.monitor import plots
from orion_unet.monitor.diagnostics import Thresholds
from orion_unet.monitor.report import Run
from orion_unet.monitor.step_curves import smoothed, step_curves
from orion_unet.monitor.steps_reader import StepsReader
from orion_unet.monitor.terminal import make_console, one_line, view


def begun(folder, epochs=0, lines=12, **options):
    """A run that is in the middle of an epoch of 100 steps."""
    write_run(folder, *healthy_losses(epochs), state="training", options=options, epoch=epochs + 1, steps_per_epoch=100)
    ends = [(epoch, step) for epoch in range(1, epochs + 2) for step in range(5, 101, 5)]
    records = [
        step_record(*place, 1 / (at + 1), lr=1e-5 * (at + 1), grad_norm=2.0 + at)
        for at, place in enumerate(ends[: 20 * epochs + lines])
    ]
    write_steps(folder, records)
    return Run(folder, Thresholds()).poll()


def screen(report, width=80, height=None):
    console = make_console(io.StringIO(), width=width)
    console.print(view(report, console, height, footer="every 10 s"))
    return console.file.getvalue()


def test_the_first_epoch_is_shown_before_it_ends(tmp_path):
    text = screen(begun(tmp_path))
    for word in (
        "steps ",
        "rate  ",
        "grad  ",
        "step 60 | lr 0.00012 | max gradient 13",
        "210 patch/s",
        "data wait 2%",
    ):
        assert word in text
    assert one_line(begun(tmp_path)).endswith("step 60, step loss 0.09634")


def test_later_epochs_show_the_steps_of_this_epoch_and_the_one_before(tmp_path):
    report = begun(tmp_path, epochs=3)
    assert len(report.newest_curves) == 20 + 12
    text = screen(report)
    assert "steps " in text and "grad  " not in text


@pytest.mark.parametrize("width", [80, 140])
@pytest.mark.parametrize("epochs", [0, 1, 30])
def test_a_screen_with_steps_fits_the_window(tmp_path, width, epochs):
    lines = screen(begun(tmp_path, epochs), width, 24).splitlines()
    assert len(lines) <= 24 and max(map(cell_len, lines)) <= width
    assert not any(line.endswith("…") for line in lines)


def test_the_document_names_the_newest_step(tmp_path):
    newest = begun(tmp_path).document()["newest_step"]
    assert (newest["epoch"], newest["step"], newest["largest_grad_norm"]) == (1, 60, 13)
    assert type(newest["epoch"]) is type(newest["step"]) is int
    assert newest["smoothed_loss"] == pytest.approx(np.mean([1 / n for n in (9, 10, 11, 12)]))
    run = write_run(tmp_path / "without", *healthy_losses(3))
    assert Run(run, Thresholds()).poll().document()["newest_step"] is None


def test_steps_that_cannot_be_read_or_are_damaged_are_a_note(tmp_path):
    run = write_run(tmp_path / "folder", *healthy_losses(3))
    (run / "steps.jsonl").mkdir()
    report = Run(run, Thresholds()).poll()
    assert len(report.epochs) == 3 and ["steps.jsonl cannot be read" in note for note in report.notes] == [True]
    run = write_run(tmp_path / "damaged", *healthy_losses(3))
    (run / "steps.jsonl").write_text("{\n[]\n")
    assert Run(run, Thresholds()).poll().notes == ["2 damaged lines of steps.jsonl left out"]


def panels(report):
    figure = plots.run_figure(report)
    assert plots.png(figure).startswith(b"\x89PNG")
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def test_the_figure_of_the_first_epoch_shows_loss_rate_and_gradient(tmp_path):
    found = panels(begun(tmp_path))
    assert set(found) == {"Training loss of the steps", "Learning rate", "Largest gradient norm"}
    rate = found["Learning rate"].get_lines()[0]
    np.testing.assert_allclose(rate.get_xdata(), np.arange(1, 13) / 20)
    np.testing.assert_allclose(rate.get_ydata(), 1e-5 * np.arange(1, 13))
    assert found["Largest gradient norm"].get_lines()[0].get_ydata().max() == 13


def test_later_figures_have_a_panel_of_the_gradient_and_the_steps_in_the_loss(tmp_path):
    found = panels(begun(tmp_path, epochs=6, grad_clip=50.0))
    assert "Largest gradient norm" in found and "Validation loss terms, unweighted" in found
    assert "training, steps" in found["Training and validation loss"].get_legend_handles_labels()[1]
    assert found["Largest gradient norm"].get_legend_handles_labels()[1] == ["clipped above 50"]


def test_the_loss_panel_holds_every_step(tmp_path):
    low, high = panels(begun(tmp_path, epochs=2, lines=19))["Training and validation loss"].get_xlim()
    assert low <= 0.05 and high >= 2.95


@pytest.mark.parametrize("lines", [1, 2])
def test_very_few_steps_are_drawn(tmp_path, lines):
    assert "Learning rate" in panels(begun(tmp_path, lines=lines))


def test_a_place_is_the_epoch_and_its_part(tmp_path):
    write_steps(tmp_path, [step_record(1, 50, 0.5), step_record(1, 200, 0.5), step_record(2, 50, 0.5)])
    reader = StepsReader(tmp_path)
    reader.poll()
    assert step_curves(reader.history(), None).at.tolist() == [0.25, 1, 1.25]
    assert step_curves(reader.history(), 100).at.tolist() == [0.5, 1, 1.5]


def test_smoothing_takes_the_mean_of_a_twentieth_without_what_is_not_finite():
    values = np.array([1.0, 2.0, np.inf, 4.0, np.nan])
    np.testing.assert_allclose(smoothed(values), [1, 1.5, 1.5, 7 / 3, 3])
    ramp = np.arange(200.0)
    np.testing.assert_allclose(smoothed(ramp)[100], np.mean(ramp[91:101]))
    assert np.isnan(smoothed(np.full(3, np.inf))).all() and len(smoothed(np.array([]))) == 0


@pytest.mark.parametrize(("scheduler", "marked"), [("plateau", True), ("cosine", False), ("constant", False)])
def test_only_a_plateau_lowers_the_rate(tmp_path, scheduler, marked):
    run = write_run(tmp_path, *healthy_losses(6), options={"scheduler": scheduler})
    records = [epoch_record(epoch, 0.3, 0.3, lr=1e-4 / 2**epoch) for epoch in range(1, 7)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    labels = panels(Run(run, Thresholds()).poll())["Training and validation loss"].get_legend_handles_labels()[1]
    assert ("learning rate lowered" in labels) == marked
