"""Short forms of the cases of benchmarks/faults.py: real processes, broken for real."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("case", ["kills", "bad_numbers", "two_writers", "file_size", "full_disk"])
@pytest.mark.slow
def test_a_run_survives(case):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / "faults.py"), "--kills", "2", "--only", case, "--no_write"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    if "not tried" in done.stdout:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0 and "survived" in done.stdout, done.stdout + done.stderr
