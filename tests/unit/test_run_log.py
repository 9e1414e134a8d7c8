"""The run folder's two sides: what the trainer writes is what the monitor reads."""

import json
import math
import os
import stat
import time

import numpy as np
import pytest
from monitor_runs import epoch_record

from orion_unet.monitor import run_reader
from orion_unet.monitor.run_reader import ChannelHistory, MetricsReader
from orion_unet.run_log import Heartbeat, MetricsWriter, read_document, write_json


def line(epoch, train=0.5, val=0.6, **more):
    return json.dumps({**epoch_record(epoch, train, val), **more})


@pytest.fixture
def log(tmp_path):
    return tmp_path / "metrics.jsonl"


def read(log):
    reader = MetricsReader(log.parent)
    reader.poll()
    return reader


def test_what_the_writer_appends_the_reader_finds(tmp_path):
    writer, reader = MetricsWriter(tmp_path), MetricsReader(tmp_path)
    reader.poll()
    assert len(reader) == 0
    for record in (epoch_record(1, 0.5, 0.6), epoch_record(2, 0.4, 0.55)):
        writer.append(record)
        reader.poll()
        reader.poll()
        assert len(reader) == record["epoch"]
    np.testing.assert_array_equal(reader.column("epoch"), [1, 2])
    np.testing.assert_array_equal(reader.column("val_loss"), [0.6, 0.55])
    np.testing.assert_array_equal(reader.column("val_boundary"), [math.nan, math.nan])


def test_a_poll_reads_only_what_was_appended(log, monkeypatch):
    log.write_text("".join(line(e) + "\n" for e in range(1, 200)))
    reader = read(log)
    parsed = []
    parse = run_reader._parse
    monkeypatch.setattr(run_reader, "_parse", lambda text: parsed.append(text) or parse(text))
    with open(log, "a") as file:
        file.write(line(200) + "\n")
    reader.poll()
    assert len(parsed) == 1 and len(reader) == 200


def test_half_a_last_line_is_complete_at_the_next_poll(log):
    whole = line(2)
    log.write_text(line(1) + "\n" + whole[:40])
    reader = read(log)
    assert len(reader) == 1 and reader.damaged_lines == 0
    with open(log, "a") as file:
        file.write(whole[40:] + "\n")
    reader.poll()
    assert len(reader) == 2 and reader.damaged_lines == 0


def test_a_last_line_without_its_newline_counts_once(log):
    log.write_text(line(1) + "\n" + line(2))
    reader = read(log)
    assert len(reader) == 2
    with open(log, "a") as file:
        file.write("\n" + line(3) + "\n")
    reader.poll()
    assert len(reader) == 3 and reader.damaged_lines == 0


def test_a_line_cut_by_a_killed_writer_is_skipped_and_counted(tmp_path, log):
    log.write_text(line(1) + "\n" + line(2)[:50])
    MetricsWriter(tmp_path).append(epoch_record(2, 0.4, 0.5))
    reader = read(log)
    assert len(reader) == 2 and reader.damaged_lines == 1


@pytest.mark.parametrize(
    "bad",
    [
        "garbage",
        "[1, 2]",
        "{}",
        '{"epoch": true}',
        '{"epoch": -1}',
        '{"epoch": 2.0}',
        '{"epoch": 99999999999999999999}',
        '{"epoch": "3"}',
        '{"schema": 2, "epoch": 7}',
        "[" * 100_000,
        '{"epoch": ' + "9" * 5000 + "}",
    ],
)
def test_a_damaged_line_is_skipped_and_counted(log, bad):
    log.write_text(f"{line(1)}\n{bad}\n{line(2)}\n")
    reader = read(log)
    assert reader.damaged_lines == 1
    np.testing.assert_array_equal(reader.column("epoch"), [1, 2])


def test_an_overlong_line_is_skipped_without_keeping_it(log):
    with open(log, "w") as file:
        file.write(line(1) + "\n" + '{"epoch": 2, "x": "' + "a" * 10_000_000 + '"}\n' + line(3) + "\n")
    reader = read(log)
    assert reader.damaged_lines == 1
    np.testing.assert_array_equal(reader.column("epoch"), [1, 3])
    assert len(reader._pending) == 0


def test_a_replaced_file_is_read_again(log):
    log.write_text(line(1) + "\n" + line(2) + "\n")
    reader = read(log)
    other = log.with_name("new")
    other.write_text("".join(line(e, 0.1) + "\n" for e in range(1, 6)))
    os.replace(other, log)
    reader.poll()
    np.testing.assert_array_equal(reader.column("train_loss"), [0.1] * 5)


@pytest.mark.parametrize("epochs", [1, 2, 6])
def test_a_file_rewritten_in_place_is_read_again(log, epochs):
    log.write_text(line(1) + "\n" + line(2) + "\n")
    reader = read(log)
    log.write_text("".join(line(e, 0.25) + "\n" for e in range(1, epochs + 1)))
    reader.poll()
    np.testing.assert_array_equal(reader.column("train_loss"), [0.25] * epochs)


def test_a_removed_file_is_an_empty_log(log):
    log.write_text(line(1) + "\n")
    reader = read(log)
    log.unlink()
    reader.poll()
    assert len(reader) == 0


def test_the_later_attempt_wins_in_any_order(log):
    rows = [line(1), line(2, 0.5), line(3, 0.5), line(2, 0.2, attempt=2), line(3, 0.9, attempt=1)]
    rows += [line(3, 0.3, attempt=2), line(3, 0.8, attempt=1)]
    log.write_text("\n".join(rows) + "\n")
    reader = read(log)
    np.testing.assert_array_equal(reader.column("epoch"), [1, 2, 3])
    np.testing.assert_array_equal(reader.column("train_loss"), [0.5, 0.2, 0.3])
    np.testing.assert_array_equal(reader.column("attempt"), [1, 2, 2])


def test_epochs_of_an_earlier_attempt_beyond_the_newest_do_not_count(log):
    """The run went back to the checkpoint of epoch 3, so its former epochs 5 and 6 no longer count."""
    log.write_text("".join(line(epoch, epoch / 10) + "\n" for epoch in range(1, 7)))
    reader = read(log)
    assert len(reader) == 6
    with open(log, "a") as file:
        file.write(line(4, 0.44, attempt=2) + "\n")
    for poll in (lambda: reader.poll() or reader, lambda: read(log)):
        found = poll()
        np.testing.assert_array_equal(found.column("epoch"), [1, 2, 3, 4])
        np.testing.assert_array_equal(found.column("train_loss"), [0.1, 0.2, 0.3, 0.44])
        np.testing.assert_array_equal(found.channels.pearson()[0], [1, 2, 3, 4])
    with open(log, "a") as file:
        file.write(line(6, 0.9) + "\n" + line(5, 0.55, attempt=2) + "\n")
    reader.poll()
    np.testing.assert_array_equal(reader.column("train_loss"), [0.1, 0.2, 0.3, 0.44, 0.55])
    np.testing.assert_array_equal(reader.column("attempt"), [1, 1, 1, 2, 2])


def test_epochs_out_of_order_come_out_sorted(log):
    log.write_text("\n".join(line(e, e / 10) for e in (3, 1, 2)) + "\n")
    reader = read(log)
    np.testing.assert_array_equal(reader.column("epoch"), [1, 2, 3])
    np.testing.assert_array_equal(reader.column("train_loss"), [0.1, 0.2, 0.3])


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (None, math.inf),
        (1e400, math.inf),
        (10**400, math.inf),
        (5e-324, 0.0),
        (True, math.nan),
        ("0.5", math.nan),
        ([1], math.nan),
    ],
)
def test_a_null_loss_is_not_finite_a_tiny_one_is_0_and_anything_else_is_no_measurement(log, loss, expected):
    record = epoch_record(1, 0.5, 0.6)
    record["val"]["loss"] = loss
    text = json.dumps(record).replace("Infinity", "1e400")
    log.write_text(text + "\n")
    np.testing.assert_array_equal(read(log).column("val_loss"), [expected])


@pytest.mark.parametrize("name", ["plain", "a}}b", 'quo"te', "back\\slash", "per_channel", "x" * 500, "{", "é☃"])
def test_markers_of_any_name_come_through(log, name):
    record = epoch_record(1, 0.5, 0.6, markers=("Hoechst", name, "CD20"))
    log.write_text(json.dumps(record) + "\n" + json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n")
    reader = read(log)
    epochs, pearson = reader.channels.pearson()
    assert reader.damaged_lines == 0 and epochs.tolist() == [1]
    assert [shown[:200] for shown in reader.channels.names] == ["Hoechst", name[:200], "CD20"]
    np.testing.assert_allclose(pearson[:, 0], [0.9, 0.8, 0.7], rtol=1e-6)
    assert reader.channels.newest()["CD20"]["mae"] == 0.04


def test_a_marker_that_appears_late_or_goes_is_nan_elsewhere(log):
    rows = [
        epoch_record(1, 1, 1, markers=("a",)),
        epoch_record(2, 1, 1, markers=("b", "a")),
        epoch_record(3, 1, 1, markers=("b",)),
    ]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reader = read(log)
    np.testing.assert_allclose(reader.channels.pearson()[1], [[0.9, 0.8, np.nan], [np.nan, 0.9, 0.9]], rtol=1e-6)


def test_many_epochs_keep_few_rows_of_markers_and_always_the_newest():
    history = ChannelHistory()
    for epoch in range(1, 20_001):
        history.put(epoch, {"a": {"pearson": epoch / 20_000}})
    epochs, pearson = history.pearson()
    assert len(epochs) <= run_reader.MAX_CHANNEL_ROWS + 1
    assert epochs[-1] == 20_000
    np.testing.assert_allclose(pearson[0], epochs / 20_000, rtol=1e-6)


def test_the_number_of_markers_is_bounded(monkeypatch):
    monkeypatch.setattr(run_reader, "MAX_CHANNELS", 50)
    history = ChannelHistory()
    for epoch in range(40):
        history.put(epoch, {f"m{epoch}_{n}": {"pearson": 0.5} for n in range(10)})
    assert len(history.names) == 50 and history.left_out == 350


def test_a_pipe_or_a_folder_instead_of_the_log_is_an_error_at_once(tmp_path, log):
    os.mkfifo(log)
    with pytest.raises(OSError, match="not a regular file"):
        MetricsReader(tmp_path).poll()
    log.unlink()
    log.mkdir()
    with pytest.raises(OSError):
        MetricsReader(tmp_path).poll()


def test_a_document_comes_with_its_modification_time(tmp_path):
    path = tmp_path / "status.json"
    write_json(path, {"state": "training", "loss": math.nan})
    os.utime(path, (1000, 2000))
    assert read_document(path) == ({"state": "training", "loss": None}, 2000)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff\xfe", b'{"a":' * 50_000])
def test_a_document_that_is_not_an_object_is_none(tmp_path, content):
    path = tmp_path / "status.json"
    path.write_bytes(content)
    assert read_document(path)[0] is None


def test_an_oversized_document_is_none(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"a": "x" * 1000}))
    assert read_document(path, limit_bytes=100)[0] is None
    assert read_document(path, limit_bytes=2000)[0] is not None


def test_a_file_name_that_is_not_utf8_is_written_and_read_back(tmp_path):
    name = os.fsdecode(b"core\xff")
    write_json(tmp_path / "split.json", {"train": [name]})
    assert read_document(tmp_path / "split.json")[0] == {"train": [name]}
    MetricsWriter(tmp_path).append(epoch_record(1, 0.5, 0.6, markers=(name,)))
    assert read(tmp_path / "metrics.jsonl").channels.newest().keys() == {name}


def read_status(folder):
    return read_document(folder / "status.json")[0]


@pytest.fixture
def clock(monkeypatch):
    """Both clocks, set by hand: seconds since 2026-01-31T10:00:00Z."""
    now = [0.0]
    monkeypatch.setattr(time, "time", lambda: 1769853600 + now[0])
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_the_status_says_when_the_run_last_progressed(tmp_path, clock):
    heart = Heartbeat(tmp_path)
    heart.update(state="training", epoch=1, step=0)
    assert read_status(tmp_path)["progressed"] is None
    clock[0] = 65
    heart.progress(step=1)
    clock[0] = 70
    heart._write()
    status = read_status(tmp_path)
    assert (status["since"], status["progressed"], status["updated"]) == (
        "2026-01-31T10:00:00Z",
        "2026-01-31T10:01:05Z",
        "2026-01-31T10:01:10Z",
    )
    assert status["step"] == 1 and status["step_s"] is None


def test_a_step_is_timed_apart_in_each_state_and_not_across_states(tmp_path, clock):
    heart = Heartbeat(tmp_path)

    def steps(state, epoch, *seconds):
        heart.update(state=state, epoch=epoch)
        for each in seconds:
            clock[0] += each
            heart.progress()
        heart._write()
        return read_status(tmp_path)["step_s"]

    # The first step after a change of state is not timed: it compiles, or waits for the loader.
    assert steps("training", 1, 100, 2, 4) is None
    assert steps("training", 1, 3) == 3
    assert steps("validating", 1, 50, 1, 1, 1) == 1
    assert steps("training", 2) is None
    assert steps("training", 2, 100) == 3
    assert steps("validating", 2, 70, *[1] * 20, *[9] * 100) == pytest.approx(9, abs=0.1)


def test_progress_writes_no_file(tmp_path, monkeypatch):
    heart = Heartbeat(tmp_path)
    heart.update(state="training", epoch=1)
    monkeypatch.setattr(heart, "_write", lambda: pytest.fail("wrote a file"))
    for step in range(100):
        heart.progress(step=step + 1, epoch=1, state="training")


def test_the_heartbeat_beats_and_ends_with_the_failure(tmp_path):
    with pytest.raises(RuntimeError), Heartbeat(tmp_path, interval_s=0.01) as heart:
        heart.update(state="training", epoch=1, epochs=3)
        first = read_document(tmp_path / "status.json")
        assert first[0]["state"] == "training" and first[0]["pid"] == os.getpid()
        raise RuntimeError("out of memory")
    status, _ = read_document(tmp_path / "status.json")
    assert status["state"] == "failed" and "out of memory" in status["message"]
    assert stat.S_ISREG((tmp_path / "status.json").stat().st_mode)
