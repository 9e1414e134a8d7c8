"""The verdict on a marker follows from the ends of its interval, and belongs to one checkpoint."""

import json
import math

import pytest

from orion_unet.inference.trust import (
    NOT_JUDGED,
    NOT_SUPPORTED,
    SUPPORTED,
    WEAK,
    MarkerTrust,
    judge_marker,
    read_scorecard,
    summary,
    write_scorecard,
)


@pytest.mark.parametrize(
    ("low", "regression", "verdict"),
    [
        (0.31, 0.3, SUPPORTED),
        (0.3, 0.3, WEAK),
        (0.01, 0.3, WEAK),
        (0.0, -0.5, NOT_SUPPORTED),
        (-0.2, 0.3, NOT_SUPPORTED),
        (0.2, None, WEAK),
        (0.2, math.nan, SUPPORTED),
        (0.2, -0.1, SUPPORTED),
        (math.nan, 0.3, NOT_JUDGED),
    ],
)
def test_the_verdict_compares_the_lower_end_with_0_and_with_the_regression(low, regression, verdict):
    assert judge_marker(low, regression) == verdict


MARKERS = {
    "CD3": MarkerTrust(0.5, 0.4, 0.6, 0.3, SUPPORTED),
    "Blank": MarkerTrust(math.nan, math.nan, math.nan, math.nan, NOT_JUDGED),
}


@pytest.fixture
def best(tmp_path):
    path = tmp_path / "run" / "checkpoints" / "best.pt"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"weights")
    return path


def test_a_scorecard_is_strict_json_and_is_read_back(best):
    path = write_scorecard(best, MARKERS, {"command": "evaluate"})
    assert path == best.parents[1] / "scorecard.json"
    assert "NaN" not in path.read_text()
    found, why = read_scorecard(best)
    assert why == ""
    assert found["CD3"] == MARKERS["CD3"]
    assert found["Blank"].verdict == NOT_JUDGED
    assert math.isnan(found["Blank"].low)


def test_a_scorecard_of_other_weights_is_not_believed(best):
    write_scorecard(best, MARKERS, {})
    best.write_bytes(b"other weights")
    found, why = read_scorecard(best)
    assert found is None
    assert "is of another checkpoint" in why


@pytest.mark.parametrize("content", ["", "[]", "{}", json.dumps({"schema": 1, "checkpoint": 3})])
def test_a_damaged_scorecard_is_named_and_ignored(best, content):
    (best.parents[1] / "scorecard.json").write_text(content)
    found, why = read_scorecard(best)
    assert found is None
    assert "is no scorecard" in why


def test_without_a_scorecard_one_line_says_what_writes_it(best):
    found, why = read_scorecard(best)
    assert found is None
    assert "evaluate or crossval" in why
    assert "\n" not in why


def test_the_summary_names_every_marker_once_and_those_unknown_as_not_judged():
    assert summary(MARKERS, ["CD3", "Blank", "New"]) == "On held-out tissue supported: CD3; not judged: Blank, New"
