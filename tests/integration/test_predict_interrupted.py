"""predict stopped, killed or out of disk: nothing half done under a final name, and the same bits afterwards."""

import errno
import json
import os
import shutil
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_runs
from predictions import contents, image, predictor, write_checkpoint

from orion_unet.inference import working_file
from orion_unet.inference.tiling import TiledPrediction

pytestmark = pytest.mark.slow


@pytest.fixture
def model(tmp_path):
    return write_checkpoint(tmp_path / "best.pt")


@pytest.fixture
def core(tmp_path):
    np.save(tmp_path / "core_HE.npy", image())
    return tmp_path / "core_HE.npy"


@pytest.fixture
def predict(model, tmp_path, capsys):
    return predictor(model, tmp_path, capsys)


class StopAfter:
    """Lets a prediction make so many rows of tiles, then raises as if Ctrl-C had been pressed."""

    def __init__(self, monkeypatch, rows):
        run = TiledPrediction.run
        self.predicted = []

        def stopped(tiles, first=0, *rest):
            for count, found in enumerate(run(tiles, first, *rest)):
                if count == rows:
                    raise KeyboardInterrupt
                self.predicted.append(found[0])
                yield found

        monkeypatch.setattr(TiledPrediction, "run", stopped)


@pytest.mark.parametrize("form", [{}, {"format": "ome-tiff"}], ids=["npy", "ome-tiff"])
def test_an_interrupted_prediction_goes_on_at_its_tile_row_and_ends_the_same(form, predict, core, monkeypatch):
    if form:
        pytest.importorskip("tifffile")
    options = {**form, "tile": 48, "overlap": 16}
    straight = predict(core, out="straight", **options)
    result = "core.ome.tiff" if form else "core.npy"
    with monkeypatch.context() as patched:
        StopAfter(patched, 2)
        stopped = predict(core, **options)
    assert stopped.code == 130
    assert "the same command continues from there" in stopped.out
    assert result not in contents(stopped.dir)
    with monkeypatch.context() as patched:
        rest = StopAfter(patched, 99)
        done = predict(core, **options)
    assert done.code == 0
    assert "continuing at tile row 3 of 5" in done.out
    assert len(rest.predicted) == 3
    if form:
        import tifffile

        first, second = (tifffile.imread(folder / result) for folder in (straight.dir, done.dir))
        np.testing.assert_array_equal(first, second)
    else:
        assert (straight.dir / result).read_bytes() == (done.dir / result).read_bytes()
    assert not [name for name in contents(done.dir) if name.startswith(".")]


@pytest.mark.parametrize("change", ["option", "input", "checkpoint"])
def test_what_was_left_by_another_call_is_not_gone_on_with(change, predict, core, model, monkeypatch):
    options = {"tile": 48, "overlap": 16}
    with monkeypatch.context() as patched:
        StopAfter(patched, 2)
        predict(core, **options)
    if change == "option":
        options["normalized"] = True
    elif change == "input":
        np.save(core, image(seed=1))
    else:
        write_checkpoint(model, norm="group")
    done = predict(core, **options)
    assert "continuing at" not in done.out
    fresh = predict(core, out="fresh", **options)
    assert (done.dir / "core.npy").read_bytes() == (fresh.dir / "core.npy").read_bytes()


def test_a_killed_process_leaves_nothing_under_the_final_name_and_is_gone_on_with(predict, model, tmp_path):
    np.save(tmp_path / "tall_HE.npy", image(3000, 64))
    straight = predict(tmp_path / "tall_HE.npy", out="straight", tile=32, overlap=8)
    words = [sys.executable, "-m", "orion_unet", "predict", "--checkpoint", model, "--tile", 32, "--overlap", 8]
    command = tiny_runs.Command(
        [*words, "--input", tmp_path / "tall_HE.npy", "--output_dir", tmp_path / "out"], tiny_runs.ROOT, {}
    )
    note = tmp_path / "out" / ".tall.partial.json"
    try:
        tiny_runs.wait_for(lambda: note.exists() and json.loads(note.read_text())["tile_rows"] > 3, "some tile rows")
        command.signal(signal.SIGKILL)
        assert command.end().code == -signal.SIGKILL
    finally:
        command.kill()
    assert not (tmp_path / "out" / "tall.npy").exists()
    done = predict(tmp_path / "tall_HE.npy", tile=32, overlap=8)
    assert "continuing at tile row" in done.out
    assert (done.dir / "tall.npy").read_bytes() == (straight.dir / "tall.npy").read_bytes()


def test_a_disk_too_small_is_told_before_any_work(predict, core, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    done = predict(core)
    assert done.code == 1
    assert "too little room on the disk" in done.err
    assert sorted(contents(done.dir)) == ["channel_names.txt"]


def test_a_disk_that_fills_up_ends_with_a_sentence_and_no_half_output(predict, core, monkeypatch):
    write = os.pwrite

    def full(handle, data, place):
        if place > 60_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(handle, data, place)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        done = predict(core)
    assert done.code == 1
    assert "No space left on device" in done.err
    assert "Traceback" not in done.err
    assert "core.npy" not in contents(done.dir)
    assert predict(core).code == 0


def test_a_second_process_on_the_same_output_is_refused(predict, core, monkeypatch):
    run = TiledPrediction.run
    codes = []

    def while_running(tiles, *rest):
        for found in run(tiles, *rest):
            if not codes:
                codes.append(0)
                codes.append(predict(core))
            yield found

    monkeypatch.setattr(TiledPrediction, "run", while_running)
    assert predict(core).code == 0
    assert codes[1].code == 2
    assert "another predict is writing it" in codes[1].err


def test_an_output_that_another_process_finishes_meanwhile_is_not_replaced(predict, core, monkeypatch):
    claimed = working_file.WorkingFile._claimed

    def after_another(self):
        monkeypatch.setattr(working_file.WorkingFile, "_claimed", claimed)
        assert predict(core, normalized=True).code == 0
        return claimed(self)

    monkeypatch.setattr(working_file.WorkingFile, "_claimed", after_another)
    done = predict(core)
    assert done.code == 2
    assert "core.npy" in done.err and "--overwrite" in done.err
    assert np.load(done.dir / "core.npy").max() <= 1
    assert not [name for name in contents(done.dir) if name.startswith(".")]
