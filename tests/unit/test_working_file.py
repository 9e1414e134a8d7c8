"""A prediction on its way to disk belongs to one process, whenever another comes."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from orion_unet.errors import InputError
from orion_unet.inference.working_file import WorkingFile

ROOT = Path(__file__).resolve().parents[2]
SHAPE = (2, 3, 4)
VALUES = np.arange(24, dtype=np.float32).reshape(SHAPE)


def working_file(folder, fingerprint="a"):
    return WorkingFile(folder, "core", SHAPE, "<f4", {"options": fingerprint})


def write(working):
    for channel, rows in enumerate(VALUES):
        working.write(channel, 0, rows)


@pytest.mark.parametrize("ending", ["becomes the output", "is removed"])
def test_a_file_whose_owner_finishes_between_opening_and_locking_is_left_alone(ending, tmp_path, monkeypatch):
    final = tmp_path / "core.npy"
    first = working_file(tmp_path)
    write(first)
    flock = fcntl.flock
    calls = []

    def finish_then_lock(file, operation):
        calls.append(operation)
        if len(calls) == 1:
            with first:
                first.become(final) if ending == "becomes the output" else first.remove()
        return flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", finish_then_lock)
    with working_file(tmp_path, "b") as second:
        assert len(calls) == 2
        if ending == "becomes the output":
            np.testing.assert_array_equal(np.load(final), VALUES)
        assert second.finished_rows == 0
        write(second)
        np.testing.assert_array_equal(second.open(), VALUES)


def test_a_file_that_another_process_writes_is_refused_until_it_has_ended(tmp_path):
    script = (
        "import sys; from pathlib import Path; from orion_unet.inference.working_file import WorkingFile\n"
        "with WorkingFile(Path(sys.argv[1]), 'core', (2, 3, 4), '<f4', {}): print('open', flush=True); input()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as other:  # fmt: skip
        assert other.stdout.readline() == "open\n"
        with pytest.raises(InputError, match="another predict is writing it"):
            working_file(tmp_path)
        other.communicate("\n", timeout=60)
    assert other.returncode == 0
    with working_file(tmp_path) as working:
        assert working.finished_rows == 0
