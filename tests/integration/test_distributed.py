"""Several ranks are one process with a larger batch; and when one of them is lost, all end."""

import os
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import rank_work
import torch
from tiny_runs import LAUNCH, ROOT, environments, read_metrics, read_status, read_steps, trainer, wait_for

from orion_unet.checkpoint import load

pytestmark = pytest.mark.slow

# All ranks must be gone so many seconds after one of them.
GONE_S = 90


@pytest.fixture(scope="module")
def by_ranks():
    """Found by real ranks, once for the module."""
    return {}


@pytest.fixture
def found_by(start, tmp_path, by_ranks):
    """What each of so many gloo ranks has found."""

    def run(ranks):
        if ranks not in by_ranks:
            script = Path(rank_work.__file__)
            begun = [start(sys.executable, script, tmp_path, **env) for env in environments(ranks)]
            for command in begun:
                ended = command.end()
                assert ended.code == 0, ended.err
            files = [tmp_path / f"rank_{rank}.pt" for rank in range(ranks)]
            by_ranks[ranks] = [torch.load(file, weights_only=True) for file in files]
        return by_ranks[ranks]

    return run


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_ranks_give_the_gradients_of_one_process_with_the_double_batch(accumulate, found_by):
    expected, means = rank_work.gradients(accumulate)
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 1e-3
    for found in found_by(2):
        gradients, found_means = found["gradients"][accumulate]
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=0, msg=name)
        assert found_means["terms"] == pytest.approx(means["terms"], rel=1e-5)
        assert found_means["loss"] == pytest.approx(means["loss"], rel=1e-5)
        assert found_means["grad_norm"] == pytest.approx(means["grad_norm"], rel=1e-5)


def test_two_ranks_give_the_gradients_and_validation_of_one_process_where_panels_differ(found_by):
    """One marker is measured on one rank only, another on none."""
    (expected, means), validation = rank_work.gradients(1, panels=True), rank_work.validation(1, panels=True)
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 1e-3
    for found in found_by(2):
        (gradients, found_means), found_validation = found["panels"]
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=0, msg=name)
        assert found_means["terms"] == pytest.approx(means["terms"], rel=1e-5)
        assert found_means["loss"] == pytest.approx(means["loss"], rel=1e-5)
        known = {name: value for name, value in validation.items() if value is not None}
        assert {name: found_validation[name] for name in known} == pytest.approx(known, rel=1e-9)
        assert {name for name, value in found_validation.items() if value is None} == validation.keys() - known.keys()
    assert "CD45 pearson" in known
    assert {name for name in validation if name.startswith("Pan-CK")}.isdisjoint(known)
    assert expected["head.weight"][1].any() and not expected["head.weight"][2].any()


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(("batch_size", "tolerance"), [(1, {"rel": 1e-9}), (4, {"abs": 1e-8})])
def test_validation_of_21_patches_is_the_same_on_any_number_of_ranks(ranks, batch_size, tolerance, found_by):
    # In batches of several, the network itself rounds a patch's prediction by the batch it is in.
    expected = rank_work.validation(batch_size)
    assert expected["patches"] == 21
    for found in found_by(ranks):
        assert found["validation"][batch_size] == pytest.approx(expected, **tolerance)


def test_every_rank_computes_the_same_numbers_to_the_last_bit(found_by):
    for ranks in (2, 3):
        first, *others = (found["validation"] for found in found_by(ranks))
        assert all(other == first for other in others)
    one, two = (found["gradients"] for found in found_by(2))
    assert all(torch.equal(one[1][0][name], two[1][0][name]) for name in one[1][0])


def test_a_loss_that_is_nan_on_one_rank_skips_the_step_on_all(found_by):
    for rank, found in enumerate(found_by(2)):
        nan = found["nan"]
        assert (nan["bad"], nan["skipped"]) == ([False, True], 1)
        changed = [name for name, value in nan["before"].items() if not torch.equal(value, nan["after"][name])]
        # The count of forward passes is used by nobody.
        assert [name for name in changed if not name.endswith("num_batches_tracked")] == []
        assert bool(nan["culprits"]) == (rank == 1)


def test_a_request_to_stop_on_one_rank_stops_all_after_the_same_step(found_by):
    assert [found["stop"] for found in found_by(2)] == [(True, 4), (True, 4)]


def test_running_statistics_are_averaged_over_ranks(found_by):
    (first, together), (second, also) = (found["statistics"] for found in found_by(2))
    assert not torch.equal(first, second)
    torch.testing.assert_close(together, (first + second) / 2)
    assert torch.equal(together, also)


def test_only_the_first_rank_writes_the_steps(start, pairs, tmp_path):
    run_dir = tmp_path / "run"
    options = {"pairs_dir": pairs, "output_dir": run_dir, "epochs": 2, "batch_size": 1, "log_every_steps": 4}
    assert start(*trainer(*LAUNCH, 2, **options)).end().code == 0
    lines = read_steps(run_dir)
    # 12 patches of three cores, one a rank and step.
    assert [(line["epoch"], line["step"]) for line in lines] == [(1, 4), (1, 6), (2, 4), (2, 6)]
    assert all(line["samples_per_s"] > 0 and line["grad_norm"] > 0 for line in lines)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_helpers_answer_for_any_number_of_ranks(ranks, found_by):
    answers = [found["answers"] for found in found_by(ranks)] if ranks > 1 else [rank_work.shared_answers()]
    for rank, answer in enumerate(answers):
        assert answer == {
            "rank": (rank, ranks, rank == 0),
            "sum": sum(range(1, ranks + 1)),
            "any": (True, False),
            "broadcast": {"from": 0},
            "gather": [f"rank {index}" for index in range(ranks)],
            "computed once": "by 0",
            "refused": "no such folder",
        }


def torchrun():
    """torchrun beside the interpreter, or as a module."""
    beside = Path(sys.executable).with_name("torchrun")
    return [beside] if beside.exists() else [sys.executable, "-m", "torch.distributed.run"]


def test_a_run_under_torchrun_logs_what_one_rank_with_the_double_batch_logs(call, train, pairs, tmp_path):
    options = {
        "norm": "group",
        "learning_rate": 1e-3,
        "focal_weight": 0.1,
        "correlation_weight": 0.2,
        "patch_size": 16,
        "patches_per_image_val": 21,
    }
    one = train("one", batch_size=2, **options)
    words = trainer(pairs_dir=pairs, output_dir=tmp_path / "two", **{**options, "batch_size": 1})[1:]
    ended = call(*torchrun(), "--standalone", "--nproc_per_node", 2, *words)
    assert ended.code == 0, ended.err
    alone, together = read_metrics(one.dir), read_metrics(tmp_path / "two")
    assert [record["val"]["patches"] for record in together] == [21, 21]
    for first, second in zip(alone, together, strict=True):
        for side in ("train", "val"):
            assert second[side]["loss"] == pytest.approx(first[side]["loss"], rel=1e-5)
            assert second[side]["terms"] == pytest.approx(first[side]["terms"], rel=1e-4)
        assert second["val"]["metrics"] == pytest.approx(first["val"]["metrics"], rel=1e-3, abs=1e-4)
        assert second["lr"] == first["lr"]
    # Rank 0 alone speaks, and a wrapped model is stored bare.
    assert ended.out.count("epoch 1/2") == ended.out.count("run folder") == 1
    assert "2 CPU ranks" in ended.out
    stored = load(tmp_path / "two" / "checkpoints" / "best.pt")["model"]
    assert not [name for name in stored if name.startswith("module.")]


def test_bad_input_under_our_launcher_is_one_message_and_2(start, pairs, tmp_path):
    command = start(*trainer(*LAUNCH, 2, pairs_dir=pairs, output_dir=tmp_path / "run", patch_size=128))
    ended = command.end()
    assert ended.code == 2
    assert ended.err.count("error:") == 1
    assert "--patch_size" in ended.err
    assert "Traceback" not in ended.err + ended.out
    assert not (tmp_path / "run").exists()
    assert command.others() == []


def test_a_killed_rank_ends_all_ranks_and_the_status_says_failed(start, pairs, tmp_path):
    run_dir = tmp_path / "run"
    options = {"pairs_dir": pairs, "output_dir": run_dir, "epochs": 5000, "early_stopping_patience": 0}
    command = start(*trainer(*LAUNCH, 2, **options, batch_size=1))
    log = run_dir / "metrics.jsonl"
    wait_for(lambda: log.exists() and log.stat().st_size, "the first epoch")
    os.kill(command.ranks()[1], signal.SIGKILL)
    killed = time.monotonic()
    ended = command.end(GONE_S)
    assert time.monotonic() - killed < GONE_S
    assert command.others() == []
    assert ended.code == 1
    assert "SIGKILL" in ended.err
    assert read_status(run_dir)["state"] == "failed"
    load(run_dir / "checkpoints" / "last.pt", to_resume=True)


def test_an_error_on_one_machine_ends_all_with_its_own_cause(start, pairs, tmp_path):
    # The second machine lacks the data: it fails on its first patch, after the first has checked everything.
    second = tmp_path / "second"
    second.mkdir()
    options = {"pairs_dir": pairs.name, "output_dir": tmp_path / "run", "epochs": 5000, "batch_size": 1}
    machines = [{**env, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1} for env in environments(2)]
    begun = [start(*trainer(**options), cwd=cwd, **env) for cwd, env in zip((tmp_path, second), machines, strict=True)]
    failed = begun[1].end()
    other = begun[0].end(GONE_S)
    assert (failed.code, other.code) == (2, 1)
    for said in (failed.err, read_status(tmp_path / "run")["message"]):
        assert "core_0" in said
        assert "cannot be read any more" in said
    assert "lost another rank" in other.err
    assert "Traceback" not in failed.err + other.err
    assert read_status(tmp_path / "run")["state"] == "failed"


def test_a_rank_counts_only_its_own_machine_for_its_threads(start, tmp_path):
    # torchrun would give each rank one thread; our launcher shares the machine's cores between its ranks.
    script = tmp_path / "threads.py"
    script.write_text("import os, sys; print(os.environ['OMP_NUM_THREADS'])\n")
    words = [sys.executable, *LAUNCH, 1, script]
    env = {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": ""}
    ended = start("env", "-u", "OMP_NUM_THREADS", *words, **env).end()
    assert ended.code == 0, ended.err
    assert ended.out.split() == [str(len(os.sched_getaffinity(0)))]


def test_two_ranks_recalibrate_as_one_does(tmp_path, learnable, start):
    wide = {"correlation_weight": 1.0, "mse_weight": 0.0, "l1_weight": 0.0, "boundary_weight": 0.0}
    options = {"pairs_dir": learnable, "output_dir": tmp_path / "one", **wide, "variance_weight": 0.0}
    assert start(*trainer(**options, recalibrate=False)).end().code == 0
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert start(*trainer(**options, resume="auto")).end().code == 0
    halves = {**options, "output_dir": tmp_path / "two", "resume": "auto", "batch_size": 1, "val_batch_size": 1}
    assert start(*trainer(*LAUNCH, 2, **halves)).end().code == 0
    one, two = (load(tmp_path / name / "checkpoints" / "best.pt")["recalibration"] for name in ("one", "two"))
    assert one["pixels"] == two["pixels"] > 0
    assert 1 not in one["scale"]
    for name in ("scale", "offset"):
        np.testing.assert_allclose(one[name], two[name], rtol=1e-6, atol=1e-9)
