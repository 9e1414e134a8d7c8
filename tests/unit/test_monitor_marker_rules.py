"""Markers that the network tells nothing about: which are named, which are not, and what the user is told to do."""

import json

import pytest
from monitor_runs import MARKERS, healthy_losses, write_run

from orion_unet.monitor.diagnostics import Thresholds
from orion_unet.monitor.marker_rules import diagnose_markers
from orion_unet.monitor.report import Run

NEWEST = {"Hoechst": 0.8, "CD45": 0.4, "CD4": 0.1, "Blank": float("nan")}
COLOURS = {"Hoechst": 0.6, "CD45": 0.5, "CD4": 0.11, "Blank": None}


def find(newest=NEWEST, epoch=6, options=None, **config):
    config = {"regression_pearson": COLOURS, "empty_channels": ["Blank"], **config}
    metrics = {name: {"pearson": value} for name, value in newest.items()}
    found = diagnose_markers(epoch, metrics, config, options or {})
    return found[0] if found else None


def test_a_marker_clearly_below_the_colours_is_named_with_both_numbers():
    finding = find()
    assert (finding.code, finding.severity, finding.value) == ("no_signal", "notice", 1)
    assert "1 of 4 markers in epoch 6: below a linear regression" in finding.message
    # CD4 lies below by less than 0.02; Blank is trained as empty.
    assert finding.message.endswith("colours of the H&E: CD45 0.40 (colours 0.50)")


def test_a_marker_without_correlation_is_named_unless_it_is_trained_as_empty():
    finding = find(empty_channels=[], regression_pearson={})
    assert "constant: Blank" in finding.message and "regression" not in finding.message
    assert "check that these markers have signal" in " ".join(finding.advice)
    assert find({"Blank": float("nan")}) is None
    # Where no validation core has the marker, a correlation that is missing says nothing.
    assert find(empty_channels=[], unvalidated_channels=["Blank"], regression_pearson={}) is None


def test_the_first_epochs_say_nothing_and_a_good_run_is_silent():
    assert find(epoch=5) is None
    assert find({"Hoechst": 0.9, "CD45": 0.5}) is None


def test_advice_never_names_what_the_run_has():
    assert "--correlation_weight 0.1" in find().advice
    assert "--correlation_weight 0.1" not in find(options={"correlation_weight": 0.1}).advice


def test_the_worst_of_many_are_named():
    many = {f"m{at:02d}": at / 100 for at in range(20)}
    finding = find(many, regression_pearson=dict.fromkeys(many, 0.9))
    assert finding.message.count("(colours") == 8 and finding.message.endswith("m07 0.07 (colours 0.90), and 12 more")


@pytest.mark.parametrize("odd", [None, 3, [], "x", {"CD45": "y"}, {"CD45": True}, {"CD45": 1e300}])
def test_odd_documents_say_nothing(odd):
    assert find(regression_pearson=odd) is None
    assert find({"CD45": 0.4}, empty_channels=odd, regression_pearson={}) is None


def test_a_run_is_judged_by_its_newest_epoch(tmp_path):
    folder = write_run(tmp_path / "run", *healthy_losses(8))
    config = json.loads((folder / "config.json").read_text())
    config |= {"regression_pearson": dict.fromkeys(MARKERS, 0.75), "empty_channels": []}
    (folder / "config.json").write_text(json.dumps(config))
    (finding,) = [f for f in Run(folder, Thresholds()).poll().findings if f.code == "no_signal"]
    assert "constant: Blank; below" in finding.message and "Pan-CK 0.70 (colours 0.75)" in finding.message
