"""Short forms of the cases of benchmarks/faults.py: real processes, broken for real."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Every step of a case has a deadline of its own.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
# Others take longer, and run in the benchmark only; what they show has tests of its own.
CASES = ("foreign_lock", "rank_0_cannot_save", "kills", "bad_numbers", "file_size", "full_disk")


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory):
    """The outcomes to come of the selected cases. Two run at a time: half of what they do is waiting."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from faults import Scale, run_case
    finally:
        sys.path.pop(0)
    selected = [item.callspec.params["case"] for item in request.session.items if item.module is request.module]
    with ThreadPoolExecutor(2) as pool:
        yield {
            case: pool.submit(run_case, case, tmp_path_factory.mktemp(case), Scale(kills=2, short=True))
            for case in selected
        }


@pytest.mark.parametrize("case", CASES)
def test_a_run_survives(case, outcomes):
    try:
        assert outcomes[case].result()
    except PermissionError as error:
        pytest.skip(str(error))
