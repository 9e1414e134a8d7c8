"""Ranks that wait for each other: as long as there is progress, and not for ever."""

import sys

import pytest
from tiny_runs import environments

pytestmark = pytest.mark.slow

PRELUDE = """
import sys, time
from datetime import timedelta
import torch
from orion_unet import distributed as d
from orion_unet.cli.arguments import end_process, run_command
from orion_unet.errors import RunError
CPU = torch.device("cpu")
"""

PREPARING = """
# Rank 0 prepares for longer than a collective would wait, first with progress and then without.
d.TIMEOUT = timedelta(seconds=1.5)
d.PREPARATION_STALL_S = 1.5

def prepare(progress):
    for _ in range(8):
        time.sleep(0.5)
        if progress:
            d.note_progress()
    return "prepared"

def main(argv):
    with d.process_group(CPU):
        print(d.from_main_process(lambda: prepare(True)), flush=True)
        d.from_main_process(lambda: prepare(False))
    return 0
"""

STUCK = """
# Rank 1 stops answering in the middle of training; rank 0 waits for it in a collective.
def main(argv):
    with d.process_group(CPU), d.Watchdog(lambda reason: print("left:", reason, flush=True), stuck_s=3.0) as watchdog:
        d.all_reduce_sum(torch.ones(1))
        watchdog.progress()
        if d.rank() == 1:
            time.sleep(10)
        d.all_reduce_sum(torch.ones(1))
    return 0
"""

FAILED = """
# Rank 1 fails while rank 0 is where no message of the transport reaches it.
d.GRACE_S = 1.0

def main(argv):
    with d.process_group(CPU), d.Watchdog():
        d.all_reduce_sum(torch.ones(1))
        if d.rank() == 1:
            raise ValueError("a core is bad")
        time.sleep(20)
    return 0
"""


@pytest.fixture
def ranks(start):
    """Run a script on two ranks; what became of each."""

    def run(script):
        program = PRELUDE + script + "\nend_process(run_command(main))\n"
        begun = [start(sys.executable, "-c", program, **env) for env in environments(2)]
        return [command.end(60) for command in begun]

    return run


def test_the_others_wait_for_rank_0_as_long_as_it_makes_progress_and_no_longer(ranks):
    first, second = ranks(PREPARING)
    assert first.out.splitlines()[0] == second.out.splitlines()[0] == "prepared"
    assert second.code == 1
    assert "rank 0 has made no progress for" in second.err


def test_a_rank_whose_peer_is_stuck_says_so_and_ends(ranks):
    first, _ = ranks(STUCK)
    assert first.code == 1
    assert "error: rank 0: no step was finished for 3 s: another rank is stuck or lost" in first.err
    assert first.out.startswith("left: no step was finished")


def test_a_rank_ends_soon_after_another_has_failed(ranks):
    first, second = ranks(FAILED)
    assert second.code == 1
    assert "ValueError: a core is bad" in second.err
    assert first.code == 1
    assert "error: rank 0: another rank failed (rank 1 failed: ValueError: a core is bad)" in first.err
