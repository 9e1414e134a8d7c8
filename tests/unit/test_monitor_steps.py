"""The reader of steps.jsonl: what it keeps, what it drops, how much it reads."""

import json
import time

import numpy as np
import pytest
from monitor_runs import step_record, write_steps

from orion_unet.monitor import steps_reader
from orion_unet.monitor.steps_reader import COLUMNS, COVERED, GRAD, LOSS, NON_FINITE, SKIPPED, StepsReader


@pytest.fixture
def log(tmp_path):
    return tmp_path / "steps.jsonl"


def read(log):
    reader = StepsReader(log.parent)
    reader.poll()
    return reader


def places(rows):
    return [(int(row[0]), int(row[1])) for row in rows]


def test_lines_come_with_the_steps_they_cover(log):
    lines = [(1, 5), (1, 10), (1, 12), (2, 5)]
    write_steps(log.parent, [step_record(*place, 0.5) for place in lines])
    found = read(log)
    assert places(found.recent()) == places(found.history()) == lines
    assert found.recent()[:, COVERED].tolist() == [5, 5, 2, 5]
    assert found.recent().shape == (4, len(COLUMNS)) and found.damaged_lines == 0


def test_an_empty_or_missing_log_has_no_rows(log):
    assert read(log).recent().shape == read(log).history().shape == (0, len(COLUMNS))


def test_null_is_not_finite_for_a_loss_and_not_measured_elsewhere(log):
    write_steps(log.parent, [step_record(1, 1, None, grad_norm=None)])
    row = read(log).recent()[0]
    assert row[LOSS] == np.inf and np.isnan(row[GRAD])


def test_a_newer_attempt_replaces_what_it_repeats_in_lines_and_in_points(log):
    """Of attempt 1 the lines up to step 10 of epoch 1 count: its state was saved there."""
    first = [step_record(1, step, 0.5) for step in (5, 10, 15, 20)] + [step_record(2, 5, 0.5)]
    second = [step_record(1, step, 0.3, attempt=2) for step in (15, 20)]
    late = [step_record(2, 10, 9.0)]
    write_steps(log.parent, [*first, *second, *late])
    found = read(log)
    assert places(found.recent()) == places(found.history()) == [(1, 5), (1, 10), (1, 15), (1, 20)]
    assert found.history()[:, LOSS].tolist() == [0.5, 0.5, 0.3, 0.3]


def test_a_newer_attempt_cuts_a_point_that_stands_for_several_lines(log, monkeypatch):
    monkeypatch.setattr(steps_reader, "MAX_POINTS", 4)
    lines = [step_record(1, step, float(step)) for step in range(1, 16)]
    write_steps(log.parent, [*lines, step_record(1, 11, 99.0, attempt=2)])
    history = read(log).history()
    assert len(history) <= 5 and places(history)[-1] == (1, 11)
    weights = history[:, COVERED]
    assert weights.sum() == 11
    assert (history[:, LOSS] * weights).sum() == pytest.approx(sum(range(1, 11)) + 99)


def test_a_single_line_that_goes_back_or_far_ahead_hides_no_other(log):
    lines = [step_record(1, step, 0.5) for step in (1, 2, 3)]
    odd = [step_record(1, 1, 7.0), step_record(99, 1, 7.0)]
    write_steps(log.parent, [*lines, *odd, step_record(1, 4, 0.5), step_record(1, 5, 0.5)])
    found = read(log)
    assert places(found.recent()) == [(1, step) for step in (1, 2, 3, 4, 5)]
    assert found.damaged_lines == 1


def test_points_keep_the_mean_the_largest_norm_and_the_counts(log, monkeypatch):
    monkeypatch.setattr(steps_reader, "MAX_POINTS", 8)
    rng = np.random.default_rng(0)
    losses, norms = rng.uniform(size=100), rng.uniform(size=100)
    lines = [
        step_record(1, at + 1, losses[at], grad_norm=norms[at], skipped_steps=+(at == 50), non_finite_steps=+(at == 51))
        for at in range(100)
    ]
    write_steps(log.parent, lines)
    history = read(log).history()
    assert 4 <= len(history) <= 8
    assert np.average(history[:, LOSS], weights=history[:, COVERED]) == pytest.approx(losses.mean())
    assert history[:, GRAD].max() == norms.max()
    assert (history[:, SKIPPED].sum(), history[:, NON_FINITE].sum(), history[:, COVERED].sum()) == (1, 1, 100)


def test_a_log_read_in_pieces_is_the_log_read_at_once(log):
    content = "".join(json.dumps(step_record(1, step, 1 / step)) + "\n" for step in range(1, 300)).encode()
    log.write_bytes(content)
    at_once = read(log)
    log.write_bytes(b"")
    pieces = StepsReader(log.parent)
    rng = np.random.default_rng(1)
    for piece in np.split(np.frombuffer(content, np.uint8), np.sort(rng.integers(0, len(content), 40))):
        with open(log, "ab") as file:
            file.write(piece.tobytes())
        pieces.poll()
    np.testing.assert_array_equal(pieces.history(), at_once.history())
    np.testing.assert_array_equal(pieces.recent(), at_once.recent())


def test_a_replaced_log_is_read_again(log):
    write_steps(log.parent, [step_record(1, step, 0.5) for step in range(1, 9)])
    reader = read(log)
    write_steps(log.parent, [step_record(1, 1, 0.25)])
    reader.poll()
    assert places(reader.history()) == [(1, 1)]


def test_damaged_lines_are_counted_and_left_out(log):
    good = json.dumps(step_record(1, 1, 0.5))
    bad = ["{", "[]", "null", good[:-4], json.dumps({**step_record(1, 2, 0.5), "schema": 2}), '{"epoch": 1}',
           '{"epoch": true, "step": 1}', '{"epoch": 1, "step": 1e9}', '{"epoch": 1, "step": -1}']  # fmt: skip
    log.write_text("\n".join([good, *bad, json.dumps(step_record(1, 3, 0.5))]) + "\n")
    found = read(log)
    assert places(found.recent()) == [(1, 1), (1, 3)] and found.damaged_lines == len(bad)


def test_a_long_log_is_sampled_and_its_end_read_in_full(log, monkeypatch):
    monkeypatch.setattr(steps_reader, "FIRST_BYTES", 1 << 16)
    monkeypatch.setattr(steps_reader, "POLL_BYTES", 1 << 15)
    monkeypatch.setattr(steps_reader, "TAIL_BYTES", 1 << 14)
    monkeypatch.setattr(steps_reader, "SAMPLES", 40)
    count = 20_000
    falling = [1 / (1 + at / 1000) for at in range(count)]
    write_steps(log.parent, [step_record(1 + at // 100, 1 + at % 100, falling[at]) for at in range(count)])
    reader = read(log)
    history, recent = reader.history(), reader.recent()
    assert reader.sampled and reader.damaged_lines == 0
    assert reader.lines == pytest.approx(count, rel=0.05)
    assert places(recent)[-3:] == [(200, 98), (200, 99), (200, 100)]
    at = (history[:, 0] - 1) * 100 + history[:, 1] - 1
    assert at[0] < count / 30 and np.diff(at).max() < count / 30 and (np.diff(at) > 0).all()
    np.testing.assert_allclose(history[:-5, LOSS], 1 / (1 + at[:-5] / 1000), rtol=0.1)
    # A little more is read in full, much more is sampled again.
    with open(log, "a") as file:
        file.write(json.dumps(step_record(201, 1, 0.5)) + "\n")
    reader.poll()
    assert places(reader.recent())[-2:] == [(200, 100), (201, 1)]
    with open(log, "a") as file:
        file.write("".join(json.dumps(step_record(201, step, 0.5)) + "\n" for step in range(2, 1000)))
    reader.poll()
    assert places(reader.recent())[-1] == (201, 999) and reader.damaged_lines == 0


def test_memory_is_bounded_and_the_newest_lines_are_whole(log):
    count = 30_000
    write_steps(log.parent, [step_record(1, step, 0.5) for step in range(1, count + 1)])
    reader = read(log)
    assert not reader.sampled
    assert steps_reader.MAX_POINTS / 2 <= len(reader.history()) <= steps_reader.MAX_POINTS
    assert places(reader.recent()) == [(1, step) for step in range(count - steps_reader.MAX_RECENT + 1, count + 1)]


def test_a_poll_of_one_new_line_reads_no_other(log, monkeypatch):
    write_steps(log.parent, [step_record(1, step, 0.5) for step in range(1, 5000)])
    reader = read(log)
    parsed = []
    parse = steps_reader.parse_object
    monkeypatch.setattr(steps_reader, "parse_object", lambda line: parsed.append(line) or parse(line))
    with open(log, "a") as file:
        file.write(json.dumps(step_record(1, 5000, 0.5)) + "\n")
    started = time.perf_counter()
    reader.poll()
    assert len(parsed) == 1 and time.perf_counter() - started < 1
