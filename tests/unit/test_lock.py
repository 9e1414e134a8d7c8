import json
import os
import socket
import subprocess
import sys
import time

import pytest

from orion_unet.errors import InputError
from orion_unet.training.lock import LOCK_FILE, STALE_S, RunLock


def hold(run_dir, **holder):
    (run_dir / LOCK_FILE).write_text(json.dumps(holder))


def test_a_second_lock_is_refused_while_the_first_is_held_and_names_its_holder(tmp_path):
    first = RunLock(tmp_path)
    first.acquire()
    with pytest.raises(InputError, match=f"process {os.getpid()} on {socket.gethostname()}"):
        RunLock(tmp_path).acquire()
    first.release()
    RunLock(tmp_path).acquire()


def test_a_dead_process_s_lock_is_taken_over_and_nothing_is_left_beside_it(tmp_path):
    code = "import sys, pathlib, orion_unet.training.lock as l; l.RunLock(pathlib.Path(sys.argv[1])).acquire()"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60)
    assert (tmp_path / LOCK_FILE).exists()
    RunLock(tmp_path).acquire()
    assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]


def test_a_process_number_that_was_given_to_another_process_does_not_hold_the_lock(tmp_path):
    hold(tmp_path, host=socket.gethostname(), pid=os.getpid(), started="1")
    RunLock(tmp_path).acquire()


def test_another_machine_holds_the_lock_as_long_as_its_heartbeat_is_fresh(tmp_path):
    hold(tmp_path, host="elsewhere", pid=1, started="1")
    with pytest.raises(InputError, match="elsewhere"):
        RunLock(tmp_path).acquire()
    old = time.time() - STALE_S - 60
    os.utime(tmp_path / LOCK_FILE, (old, old))
    (tmp_path / "status.json").write_text("{}")
    with pytest.raises(InputError, match="elsewhere"):
        RunLock(tmp_path).acquire()
    os.utime(tmp_path / "status.json", (old, old))
    RunLock(tmp_path).acquire()


@pytest.mark.parametrize("content", ["", "[]", "{", '{"host": 3}'])
def test_a_damaged_lock_counts_as_that_of_another_machine(tmp_path, content):
    lock = tmp_path / LOCK_FILE
    lock.write_text(content)
    with pytest.raises(InputError, match="another run"):
        RunLock(tmp_path).acquire()
    old = time.time() - STALE_S - 60
    os.utime(lock, (old, old))
    RunLock(tmp_path).acquire()


def test_release_without_a_lock_is_no_error(tmp_path):
    RunLock(tmp_path).release()
