"""Interrupted, killed and damaged runs go on as if nothing had happened, bit for bit."""

import errno
import gc
import json
import os
import random
import signal
import sys
import time
import weakref

import pytest
import torch
from tiny_runs import (
    DEADLINE_S,
    ROOT,
    TINY,
    command_line,
    differing,
    environments,
    losses,
    read_metrics,
    read_status,
    read_steps,
    trainer,
    wait_for,
    weights,
)

from orion_unet import checkpoint
from orion_unet.config import load_options
from orion_unet.errors import InputError
from orion_unet.run_log import MetricsWriter
from orion_unet.training import loop
from orion_unet.training.loop import Loop
from orion_unet.training.optim import automatic_rate
from orion_unet.training.run_folder import last_attempt

pytestmark = pytest.mark.slow

# Everything whose state a restart could lose: dropout, averages, accumulation, warm-up, plateau, early stopping.
STATEFUL = {
    "epochs": 3,
    "dropout": 0.3,
    "ema_decay": 0.9,
    "accumulate_steps": 2,
    "warmup_epochs": 1.5,
    "scheduler": "plateau",
    "lr_patience": 0,
    "lr_factor": 0.5,
    "learning_rate": 0.05,
    "early_stopping_patience": 9,
}
PARTS = (("last.pt", "model"), ("last.pt", "ema"), ("best.pt", "model"))


@pytest.fixture(scope="module")
def straight_results():
    """What the uninterrupted runs of this module came to; the data are the same in every test."""
    return {}


@pytest.fixture
def straight(train, straight_results):
    """Results of the run that nothing interrupts."""

    def result(**options):
        key = tuple(options.items())
        if key not in straight_results:
            made = train("straight", **{**STATEFUL, **options})
            assert made.code == 0
            straight_results[key] = outcome(made.dir)
        return straight_results[key]

    return result


def outcome(run_dir):
    """All that must be equal: every logged loss, rate and gradient norm, every stored tensor, the recalibration."""
    best = checkpoint.load(run_dir / "checkpoints" / "best.pt")
    return losses(run_dir), {part: weights(run_dir, *part) for part in PARTS}, best["recalibration"]


def assert_equal_outcome(found, expected):
    assert found[0] == expected[0]
    assert found[2] == expected[2]
    assert {part: differing(found[1][part], expected[1][part]) for part in PARTS} == {part: [] for part in PARTS}


@pytest.fixture
def interrupt(monkeypatch):
    """Send this process a signal after a step of an epoch; returns what undoes it."""

    def arrange(number, epoch, step):
        original = Loop._progress

        def progress(self, **fields):
            original(self, **fields)
            if (self.state.epoch + 1, fields.get("step")) == (epoch, step + 1):
                os.kill(os.getpid(), number)

        monkeypatch.setattr(Loop, "_progress", progress)
        return lambda: monkeypatch.setattr(Loop, "_progress", original)

    return arrange


def test_the_straight_run_exercises_the_plateau(straight):
    # Without a lowered rate the tests below would not show that it survives.
    *_, before, last = (values[2] for values in straight()[0].values())
    assert last == pytest.approx(before / 2)


@pytest.mark.parametrize(
    ("number", "code", "epoch", "step", "stops_at"),
    [
        (signal.SIGTERM, 143, 2, 2, 4),
        (signal.SIGINT, 130, 1, 0, 2),
        (signal.SIGUSR1, 143, 3, 1, 4),
        (signal.SIGTERM, 143, 2, 4, 6),
        (signal.SIGTERM, 143, 3, 5, 6),
    ],
)
def test_a_signal_saves_the_step_and_the_resumed_run_equals_the_straight_one(
    number, code, epoch, step, stops_at, train, interrupt, straight, capsys
):
    calm = interrupt(number, epoch, step)
    made = train(**STATEFUL)
    assert made.code == code
    assert read_status(made.dir)["state"] == "interrupted"
    stored = checkpoint.load(made.dir / "checkpoints" / "last.pt", to_resume=True)
    # After the last step of an epoch, its validation is left for later.
    assert (stored["epoch"], stored["step"]) == (epoch - 1, stops_at)
    assert "--resume auto" in capsys.readouterr().out
    calm()
    resumed = train(**STATEFUL, resume="auto")
    assert resumed.code == 0
    assert_equal_outcome(outcome(resumed.dir), straight())
    said = capsys.readouterr().out
    assert f"resumed         at epoch {stored['epoch'] + 1} step {stops_at}" in said
    assert "learning rate" in said
    records = read_metrics(resumed.dir)
    assert [record["epoch"] for record in records] == [1, 2, 3]
    assert [record["attempt"] for record in records] == [1] * stored["epoch"] + [2] * (3 - stored["epoch"])
    assert read_status(resumed.dir)["state"] == "finished"


def test_the_steps_of_a_run_that_goes_on_are_those_of_both_attempts(train, interrupt):
    """A line ends where the state was saved, so that the next attempt repeats nothing of it."""
    calm = interrupt(signal.SIGTERM, 2, 2)
    train(**STATEFUL, log_every_steps=3)
    calm()
    made = train(**STATEFUL, log_every_steps=3, resume="auto")
    ends = [(line["epoch"], line["step"], line["attempt"]) for line in read_steps(made.dir)]
    assert ends == [(1, 3, 1), (1, 6, 1), (2, 3, 1), (2, 4, 1), (2, 6, 2), (3, 3, 2), (3, 6, 2)]
    straight = {(line["epoch"], line["step"]): line for line in read_steps(train("other", **STATEFUL).dir)}
    apart = {(line["epoch"], line["step"]): line for line in read_steps(made.dir)}
    # The other run wrote a line a step; here a line has the mean of three.
    assert apart[3, 3]["loss"] == pytest.approx(sum(straight[3, step]["loss"] for step in (1, 2, 3)) / 3)
    assert apart[2, 6]["lr"] == straight[2, 6]["lr"]


def test_a_run_interrupted_at_every_epoch_equals_the_straight_one(train, interrupt, straight):
    for epoch in (1, 2, 3):
        calm = interrupt(signal.SIGTERM, epoch, 1)
        assert train(**STATEFUL, resume="auto").code == 143
        calm()
    resumed = train(**STATEFUL, resume="auto")
    assert_equal_outcome(outcome(resumed.dir), straight())
    assert [record["attempt"] for record in read_metrics(resumed.dir)] == [2, 3, 4]


@pytest.mark.parametrize(("recalibrate", "ends"), [(False, (0, "finished")), (True, (143, "interrupted"))])
def test_a_signal_after_the_last_validation_leaves_a_run_finished_unless_it_is_to_be_recalibrated(
    recalibrate, ends, train, monkeypatch
):
    append = MetricsWriter.append

    def append_and_signal(self, record):
        append(self, record)
        if record["epoch"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(MetricsWriter, "append", append_and_signal)
    made = train(epochs=2, recalibrate=recalibrate)
    assert (made.code, read_status(made.dir)["state"]) == ends


@pytest.mark.parametrize("after", [0, 1])
def test_a_signal_during_the_validation_stops_between_its_batches_and_keeps_the_epoch(
    after, train, straight, monkeypatch
):
    original, seen = loop.validate, []

    def validate(*given):
        for patches in original(*given):
            seen.append(patches)
            if len(seen) == 2 + after + 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield patches

    # Three validation patches, two a batch: the second epoch's first or second batch is the third or fourth.
    monkeypatch.setattr(loop, "validate", validate)
    made = train(**STATEFUL)
    if after == 0:
        assert made.code == 143
        assert len(seen) == 3
        assert "before its validation" in read_status(made.dir)["message"]
        stored = checkpoint.load(made.dir / "checkpoints" / "last.pt", to_resume=True)
        assert (stored["epoch"], stored["step"]) == (1, 6)
    else:
        # After the last batch the epoch is finished first.
        assert (made.code, len(read_metrics(made.dir))) == (143, 2)
    monkeypatch.setattr(loop, "validate", original)
    assert_equal_outcome(outcome(train(**STATEFUL, resume="auto").dir), straight())


def test_a_kill_during_the_validation_loses_no_step(train, straight, monkeypatch):
    original = loop.validate

    def validate(*given):
        yield next(original(*given))
        raise Killed

    monkeypatch.setattr(loop, "validate", validate)
    with pytest.raises(Killed):
        train(**STATEFUL)
    monkeypatch.setattr(loop, "validate", original)
    trained = []
    monkeypatch.setattr(
        Loop,
        "_progress",
        lambda self, before=Loop._progress, **fields: (before(self, **fields), trained.append(fields)),
    )
    resumed = train(**STATEFUL, resume="auto")
    assert_equal_outcome(outcome(resumed.dir), straight())
    assert [fields["step"] for fields in trained if "step" in fields] == [*range(1, 7)] * 2
    # No step was trained in this attempt: nothing is known of its speed.
    first = read_metrics(resumed.dir)[0]
    assert (first["epoch"], first["samples_per_s"], first["data_wait_fraction"]) == (1, None, None)


def test_handlers_of_the_caller_are_put_back(train, interrupt):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    interrupt(signal.SIGTERM, 1, 1)
    train()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before


def test_a_second_ctrl_c_ends_at_once(train, monkeypatch):
    def progress(self, **fields):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Loop, "_progress", progress)
    with pytest.raises(KeyboardInterrupt):
        train()


class Killed(BaseException):
    """Plays the end of the process: nothing in the program catches it."""


@pytest.mark.parametrize(
    ("moment", "epoch"),
    [("before best", 1), ("before the line", 2), ("after the line", 1), ("during last", 2), ("after last", 2)],
)
def test_a_kill_between_the_writes_of_an_epoch_loses_and_doubles_nothing(moment, epoch, train, straight, monkeypatch):
    append, save = MetricsWriter.append, checkpoint.save

    def append_or_die(self, record):
        if record["epoch"] == epoch and moment == "before the line":
            raise Killed
        append(self, record)
        if record["epoch"] == epoch and moment == "after the line":
            raise Killed

    def save_or_die(path, content, keep_previous=False):
        now = content["epoch"] == epoch
        if now and (path.name, moment) in (("best.pt", "before best"), ("last.pt", "during last")):
            # Half a file under a temporary name, as a killed save leaves it.
            (path.parent / f".{path.name}.1.tmp").write_bytes(b"half")
            raise Killed
        save(path, content, keep_previous)
        if now and (path.name, moment) == ("last.pt", "after last"):
            raise Killed

    monkeypatch.setattr(MetricsWriter, "append", append_or_die)
    monkeypatch.setattr(checkpoint, "save", save_or_die)
    with pytest.raises(Killed):
        train(**STATEFUL)
    monkeypatch.setattr(MetricsWriter, "append", append)
    monkeypatch.setattr(checkpoint, "save", save)
    resumed = train(**STATEFUL, resume="auto")
    assert_equal_outcome(outcome(resumed.dir), straight())
    assert sorted({record["epoch"] for record in read_metrics(resumed.dir)}) == [1, 2, 3]
    assert not list(resumed.dir.rglob("*.tmp"))


def test_a_process_killed_in_the_middle_of_its_work_resumes_to_the_same_end(start, pairs, tmp_path, straight):
    expected, draw = straight(), random.Random(7)
    for trial in range(4):
        run_dir = tmp_path / f"run_{trial}"
        words = trainer(**STATEFUL, pairs_dir=pairs, output_dir=run_dir, resume="auto", num_workers=1)
        if kill_within_training(start(*words), run_dir, draw.uniform(0, 0.3)):
            break
    else:
        pytest.fail("every run ended before its kill")
    again = start(*words).end()
    assert again.code == 0, again.err
    assert_equal_outcome(outcome(run_dir), expected)
    assert not list(run_dir.rglob("*.tmp"))
    assert not (run_dir / "run.lock").exists()


def kill_within_training(command, run_dir, after_s):
    """Kill a trainer some time after its first step; returns whether it had not ended before."""

    def trains():
        return (run_dir / "status.json").exists() and read_status(run_dir)["state"] in ("training", "validating")

    wait_for(lambda: trains() or command.process.poll() is not None, "the first step")
    time.sleep(after_s)
    command.signal(signal.SIGKILL)
    command.process.wait(timeout=DEADLINE_S)
    # The loader's process notices, in its own time, that it has lost its rank.
    wait_for(lambda: not command.others(), "the end of the loader's process")
    return command.process.returncode == -signal.SIGKILL and trains()


def test_a_command_ends_with_143_on_sigterm_and_leaves_no_process(start, pairs, tmp_path, straight):
    many = {**STATEFUL, "epochs": 500, "early_stopping_patience": 0}
    command = start(*trainer(**many, pairs_dir=pairs, output_dir=tmp_path / "run", num_workers=1))
    log = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: log.exists() and log.stat().st_size, "the first epoch")
    command.signal(signal.SIGTERM)
    ended = command.end()
    assert (ended.code, ended.err) == (143, "")
    assert "interrupted" in ended.out
    assert read_status(tmp_path / "run")["state"] == "interrupted"
    assert command.others() == []
    # More epochs were wanted, but those that are done are those of the shorter run.
    done = losses(tmp_path / "run")
    shared = done.keys() & straight()[0].keys()
    assert {epoch: done[epoch] for epoch in shared} == {epoch: straight()[0][epoch] for epoch in shared}


@pytest.mark.parametrize("ignored", [False, True])
def test_a_hang_up_saves_and_ends_unless_it_is_ignored_as_under_nohup(ignored, start, pairs, tmp_path):
    many = {**STATEFUL, "epochs": 6 if ignored else 500, "early_stopping_patience": 0}
    words = trainer(**many, pairs_dir=pairs, output_dir=tmp_path / "run")
    trap = "trap '' HUP; " if ignored else ""
    command = start("bash", "-c", trap + 'exec "$@"', "bash", *words)
    log = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: log.exists() and log.stat().st_size, "the first epoch")
    command.signal(signal.SIGHUP)
    ended = command.end()
    state = "finished" if ignored else "interrupted"
    assert (ended.code, read_status(tmp_path / "run")["state"]) == (0 if ignored else 143, state)


def test_a_terminal_that_is_gone_does_not_end_the_run(train, monkeypatch, tmp_path):
    class Gone:
        def write(self, text):
            raise OSError(errno.EIO, "Input/output error")

        def flush(self):
            pass

        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdout", Gone())
    monkeypatch.setattr(sys, "stderr", Gone())
    assert train(epochs=1).code == 0
    assert "epoch 1/1" in (tmp_path / "run" / "train.log").read_text()


# One epoch of some seconds, so that the signal finds the ranks within it.
RANKS = {**TINY, **STATEFUL, "batch_size": 1, "patches_per_image": 16, "epochs": 1, "warmup_epochs": 0.5}


def test_two_ranks_interrupted_within_an_epoch_resume_to_the_same_end(start, pairs, tmp_path):
    run_dir = tmp_path / "run"
    options = command_line({**RANKS, "pairs_dir": pairs, "output_dir": run_dir})
    launched = start(ROOT / "train_stable_learning.sh", *options, NPROC_PER_NODE=2, PYTHON=sys.executable)
    wait_for(lambda: (run_dir / "status.json").exists() and read_status(run_dir)["state"] == "training", "a step")
    launched.signal(signal.SIGTERM)
    ended = launched.end()
    assert ended.code == 143, ended.err
    assert read_status(run_dir)["state"] == "interrupted"
    assert launched.others() == []
    assert checkpoint.load(run_dir / "checkpoints" / "last.pt")["step"] > 0

    def two_ranks(*words):
        script = [sys.executable, ROOT / "train_spatial_orion_unet.py", "--config", run_dir / "config.json"]
        ranks = [start(*script, *words, **env) for env in environments(2)]
        for ended in [rank.end() for rank in ranks]:
            assert ended.code == 0, ended.err

    two_ranks("--output_dir", run_dir, "--resume", "auto")
    two_ranks("--output_dir", tmp_path / "straight")
    assert_equal_outcome(outcome(run_dir), outcome(tmp_path / "straight"))
    assert [record["attempt"] for record in read_metrics(run_dir)] == [2]


@pytest.mark.parametrize("ranks", [3, 4])
def test_more_ranks_interrupted_within_an_epoch_resume_to_the_same_end(ranks, train_on_ranks, pairs):
    # From three ranks on, a sum over ranks depends on the order in which the gradients are laid out.
    options = {**RANKS, "pairs_dir": str(pairs), "accumulate_steps": 1, "base_features": 8}
    run, straight = train_on_ranks(ranks, options)
    assert_equal_outcome(outcome(run), outcome(straight))


def test_a_resumed_run_keeps_no_second_copy_of_its_state(train, monkeypatch):
    made = train(**{**STATEFUL, "epochs": 2})
    stored, alive = [], []
    find = loop.find_earlier

    def find_and_note(*given):
        earlier = find(*given)
        moments = earlier["optimizer"]["state"][0]["exp_avg"]
        stored.extend(weakref.ref(tensor) for tensor in (earlier["model"]["head.weight"], moments))
        return earlier

    def epoch(self, number, before=Loop._epoch):
        gc.collect()
        alive.extend(reference() is not None for reference in stored)
        before(self, number)

    monkeypatch.setattr(loop, "find_earlier", find_and_note)
    monkeypatch.setattr(Loop, "_epoch", epoch)
    assert train(**STATEFUL, resume="auto").dir == made.dir
    assert alive == [False, False]


def test_changed_options_are_refused_with_their_list(train):
    made = train()
    before = (made.dir / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError) as refused:
        train(resume="auto", epochs=5, learning_rate=0.5, norm="group", l1_weight=0.0)
    lines = str(refused.value).splitlines()
    assert [line.split(":")[0].strip(" -") for line in lines[1:-1]] == ["norm", "l1_weight", "learning_rate"]
    assert "0.01 in the run, 0.5 now" in str(refused.value)
    assert (made.dir / "metrics.jsonl").read_bytes() == before


def test_another_global_batch_is_refused_and_options_that_change_no_number_are_not(train):
    made = train()
    with pytest.raises(InputError, match="global batch"):
        train(resume="auto", epochs=3, batch_size=3)
    assert train(resume="auto", epochs=3, num_workers=1, val_batch_size=3, sanity_check_freq=1).code == 0
    assert [record["epoch"] for record in read_metrics(made.dir)] == [1, 2, 3]


def test_a_finished_run_may_be_given_more_epochs(train):
    made, whole = train("short", epochs=2), train("whole", epochs=4)
    assert train("short", epochs=4, resume="auto").code == 0
    assert losses(made.dir) == losses(whole.dir)
    assert differing(weights(made.dir), weights(whole.dir)) == []


def test_an_automatic_learning_rate_stays_what_it_was_when_a_run_is_given_more_epochs(train):
    made = train(learning_rate=None)
    first = json.loads((made.dir / "config.json").read_text())["options"]["learning_rate"]
    assert first == automatic_rate(2 * read_status(made.dir)["steps_per_epoch"])
    assert train(learning_rate=None, epochs=6, resume="auto").code == 0
    assert json.loads((made.dir / "config.json").read_text())["options"]["learning_rate"] == first
    assert {record["lr"] for record in read_metrics(made.dir)} == {first}
    # An earlier run's config.json gives the number, not the word.
    assert load_options(made.dir / "config.json")[0]["learning_rate"] == first


def test_a_finished_run_resumed_trains_nothing(train):
    made = train()
    before = weights(made.dir)
    assert train(resume="auto").code == 0
    assert differing(weights(made.dir), before) == []
    assert len(read_metrics(made.dir)) == 2


def test_resume_auto_in_an_empty_folder_starts_afresh(train, tmp_path):
    (tmp_path / "run").mkdir()
    made = train(resume="auto")
    assert made.code == 0
    assert [record["attempt"] for record in read_metrics(made.dir)] == [1, 1]
    assert losses(made.dir) == losses(train("plain").dir)


def damage_last(made, how):
    last = made.dir / "checkpoints" / "last.pt"
    content = bytearray(last.read_bytes())
    if how == "truncated":
        content = content[: len(content) // 2]
    elif how == "empty":
        content = b""
    else:
        # One bit of a weight, which the archive's directory does not show.
        tensor = next(iter(weights(made.dir).values()))
        at = bytes(content).index(tensor.numpy().tobytes()[:64])
        content[at + 3] ^= 1
    last.write_bytes(bytes(content))


@pytest.mark.parametrize("how", ["truncated", "empty", "one bit"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before_it_with_a_warning(how, train, straight, capsys):
    made = train(**{**STATEFUL, "epochs": 2})
    damage_last(made, how)
    resumed = train(**STATEFUL, resume="auto")
    assert resumed.code == 0
    said = capsys.readouterr().out
    assert "warning" in said
    assert "last.pt" in said
    assert "last_previous.pt" in said
    # The second epoch is done again, and the later attempt is the true one.
    records = read_metrics(resumed.dir)
    assert [(record["epoch"], record["attempt"]) for record in records] == [(1, 1), (2, 1), (2, 2), (3, 2)]
    assert_equal_outcome(outcome(resumed.dir), straight())


def test_two_damaged_checkpoints_are_bad_input(train):
    made = train()
    for name in ("last.pt", "last_previous.pt"):
        (made.dir / "checkpoints" / name).write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"\.pt"):
        train(resume="auto", epochs=3)


def test_a_run_can_be_continued_from_a_named_checkpoint(train, tmp_path):
    made, whole = train(epochs=1), train("whole", epochs=3)
    named = str(made.dir / "checkpoints" / "last.pt")
    assert train(epochs=3, resume=named).code == 0
    assert losses(made.dir) == losses(whole.dir)


def test_a_run_continued_in_another_folder_takes_its_best_model_along(train, tmp_path, capsys):
    # The first epoch stays the best: a rate of nearly nothing, and no norm whose statistics move.
    still = {"norm": "group", "learning_rate": 1e-30}
    made = train("made", epochs=1, **still)
    named = str(made.dir / "checkpoints" / "last.pt")
    other = train("other", epochs=2, resume=named, **still)
    assert [record["best"] for record in read_metrics(other.dir)] == [False]
    assert checkpoint.load(other.dir / "checkpoints" / "best.pt")["epoch"] == 1
    assert differing(weights(other.dir, "best.pt"), weights(made.dir, "best.pt")) == []
    (made.dir / "checkpoints" / "best.pt").unlink()
    capsys.readouterr()
    third = train("third", epochs=2, resume=named, **still)
    said = capsys.readouterr().out
    assert "warning: the best model so far, of epoch 1, cannot be carried over" in said
    assert "best epoch 1" in said
    assert f"its model is not in {third.dir / 'checkpoints'}" in said


def test_an_epoch_continued_on_another_number_of_ranks_logs_the_mean_over_all_its_steps(train, interrupt, straight):
    # As two ranks leave it after four steps: the same sums on both, since here both trained on the same batches.
    calm = interrupt(signal.SIGTERM, 1, 2)
    made = train(**STATEFUL)
    calm()
    last = made.dir / "checkpoints" / "last.pt"
    content = checkpoint.load(last, to_resume=True)
    assert content["step"] == 4
    checkpoint.save(last, {**content, "ranks": content["ranks"] * 2})
    resumed = train(**STATEFUL, resume="auto")
    assert_equal_outcome(outcome(resumed.dir), straight())


@pytest.mark.parametrize("name", ["best.pt", "absent.pt"])
def test_a_checkpoint_that_cannot_be_continued_is_bad_input(name, train):
    made = train()
    with pytest.raises(InputError, match=name):
        train("other", resume=str(made.dir / "checkpoints" / name))


def test_a_named_checkpoint_does_not_write_into_another_run(train):
    made, other = train("made"), train("other", seed=5)
    before = (other.dir / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match="holds an earlier run"):
        train("other", epochs=3, resume=str(made.dir / "checkpoints" / "last.pt"))
    assert (other.dir / "metrics.jsonl").read_bytes() == before


def test_a_folder_in_which_a_run_is_under_way_is_refused(train, monkeypatch):
    refused = []
    progress = Loop._progress

    def start_another(self, **fields):
        progress(self, **fields)
        monkeypatch.setattr(Loop, "_progress", progress)
        for again in ({"resume": "auto"}, {"overwrite": True}):
            with pytest.raises(InputError, match="another run is writing there") as error:
                train(**again)
            refused.append(str(error.value))

    monkeypatch.setattr(Loop, "_progress", start_another)
    made = train()
    assert made.code == 0
    assert len(refused) == 2
    assert str(os.getpid()) in refused[0]
    assert [record["epoch"] for record in read_metrics(made.dir)] == [1, 2]
    assert not (made.dir / "run.lock").exists()


def test_saving_within_an_epoch_loses_at_most_the_steps_since(train, straight, monkeypatch):
    # A save is due after every step; the process dies within the second epoch.
    saved = Loop._save_within_epoch

    def save_and_die(self, step, sums):
        saved(self, step, sums)
        if (self.state.epoch, step) == (1, 4):
            raise Killed

    monkeypatch.setattr(Loop, "_save_within_epoch", save_and_die)
    with pytest.raises(Killed):
        train(**STATEFUL, save_every_minutes=1e-9)
    monkeypatch.setattr(Loop, "_save_within_epoch", saved)
    resumed = train(**STATEFUL, resume="auto")
    assert_equal_outcome(outcome(resumed.dir), straight())


def test_a_checkpoint_holds_nothing_but_tensors_and_plain_values(train):
    made = train(**{**STATEFUL, "epochs": 2})
    for name in ("last.pt", "best.pt"):
        unknown = []

        def visit(value, at, unknown=unknown):
            if isinstance(value, dict):
                for key, item in value.items():
                    visit(item, f"{at}.{key}")
            elif isinstance(value, list | tuple):
                for index, item in enumerate(value):
                    visit(item, f"{at}[{index}]")
            elif not (value is None or isinstance(value, torch.Tensor | str | int | float | bool)):
                unknown.append(at)

        visit(torch.load(made.dir / "checkpoints" / name, weights_only=True), name)
        assert not unknown


def test_starts_that_die_before_they_save_still_count_as_attempts(tmp_path):
    assert last_attempt(tmp_path) == 0
    for content, attempt in (("{", 0), ("[]", 0), ('{"attempt": "x"}', 0), ('{"attempt": 3}', 3)):
        (tmp_path / "config.json").write_text(content)
        assert last_attempt(tmp_path) == attempt
