import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from orion_unet.errors import InputError
from orion_unet.training import run_folder
from orion_unet.training.run_folder import LOCK_FILE, STALE_S, RunLock


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
    code = "import sys, pathlib, orion_unet.training.run_folder as l; l.RunLock(pathlib.Path(sys.argv[1])).acquire()"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60)
    assert (tmp_path / LOCK_FILE).exists()
    RunLock(tmp_path).acquire()
    assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]


def test_a_process_number_that_was_given_to_another_process_does_not_hold_the_lock(tmp_path):
    hold(tmp_path, host=socket.gethostname(), pid=os.getpid(), started="1")
    RunLock(tmp_path).acquire()


@pytest.fixture
def quick(monkeypatch):
    """A lock that polls fast, of a holder that is dead after 2 seconds of silence."""
    monkeypatch.setattr(run_folder, "STALE_S", 2.0)
    monkeypatch.setattr(run_folder, "LOCK_POLL_S", 0.05)


def test_another_machine_holds_the_lock_as_long_as_its_heartbeat_moves(tmp_path, quick):
    hold(tmp_path, host="elsewhere", pid=1, started="1")
    stop = threading.Event()

    def beat():
        while not stop.wait(0.3):
            (tmp_path / "status.json").write_text("{}")

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(InputError, match="process 1 on elsewhere"):
            RunLock(tmp_path).acquire()
    finally:
        stop.set()
        thread.join()
    old = time.time() - STALE_S - 60
    for name in (LOCK_FILE, "status.json"):
        os.utime(tmp_path / name, (old, old))
    RunLock(tmp_path).acquire()


def test_the_fresh_lock_of_a_killed_holder_on_another_machine_is_waited_for_and_taken_over(tmp_path, quick):
    hold(tmp_path, host="elsewhere", pid=1, started="1")
    (tmp_path / "status.json").write_text("{}")
    said = []
    started = time.monotonic()
    RunLock(tmp_path, said.append).acquire()
    assert time.monotonic() - started > 1.0
    assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert len(said) == 1
    assert "process 1 on elsewhere" in said[0]


def test_a_lock_that_its_holder_gives_back_meanwhile_is_taken(tmp_path, quick):
    hold(tmp_path, host="elsewhere", pid=1, started="1")
    timer = threading.Timer(0.3, (tmp_path / LOCK_FILE).unlink)
    timer.start()
    started = time.monotonic()
    RunLock(tmp_path).acquire()
    assert time.monotonic() - started < 1.5
    timer.join()


@pytest.mark.parametrize("content", ["", "[]", "{", '{"host": 3}'])
def test_a_damaged_lock_counts_as_that_of_another_machine(tmp_path, content, quick):
    lock = tmp_path / LOCK_FILE
    lock.write_text(content)
    renew = threading.Timer(0.3, (tmp_path / "status.json").write_text, ["{}"])
    renew.start()
    with pytest.raises(InputError, match="another run"):
        RunLock(tmp_path).acquire()
    renew.join()
    (tmp_path / "status.json").unlink()
    old = time.time() - STALE_S - 60
    os.utime(lock, (old, old))
    RunLock(tmp_path).acquire()


def test_release_without_a_lock_is_no_error(tmp_path):
    RunLock(tmp_path).release()
