import errno

import pytest
import torch

from orion_unet.config import TrainConfig
from orion_unet.training import failures
from orion_unet.training.failures import note_failure, noted_failures, plain_failure


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "--batch_size (12 now"),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that shared memory"),
            "(DataLoader worker (pid 7) is killed by signal: Bus error): a file of --pairs_dir (core_patches_npy)",
        ),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), "lack of memory (lower --num_workers"),
        (RuntimeError("unable to allocate shared memory(shm) for file"), "/dev/shm"),
        (OSError(errno.ENOSPC, "No space left on device", "/runs/a/metrics.jsonl"), "/runs/a/metrics.jsonl"),
        (OSError(errno.EROFS, "Read-only file system", "/runs/a/status.json"), "Read-only file system"),
    ],
)
def test_a_failure_of_the_surroundings_says_what_to_change(error, advice, tmp_path):
    config = TrainConfig.from_options({"output_dir": str(tmp_path)})
    assert advice in str(plain_failure(error, config))


@pytest.mark.parametrize(
    "error", [RuntimeError("shape mismatch"), KeyError("x"), FileNotFoundError(errno.ENOENT, "No such file")]
)
def test_a_failure_of_the_program_keeps_its_traceback(error):
    assert plain_failure(error, TrainConfig()) is None


def test_a_lost_rank_is_told_as_such_only_where_there_are_ranks(monkeypatch):
    error = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4711")
    assert plain_failure(error, TrainConfig()) is None
    monkeypatch.setattr(failures, "world_size", lambda: 2)
    assert "lost another rank" in str(plain_failure(error, TrainConfig()))


@pytest.mark.parametrize(
    "text",
    [
        "NCCL error in: ProcessGroupNCCL.cpp:1, Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 1b000",
        "CUDA error: the launch timed out and was terminated",
        "gloo: unsupported layout",
        "out of resource: shared memory, Required: 107520, Hardware limit: 101376",
    ],
)
def test_an_error_of_the_device_or_its_library_is_not_taken_for_a_lost_rank(text, monkeypatch):
    monkeypatch.setattr(failures, "world_size", lambda: 2)
    assert plain_failure(RuntimeError(text), TrainConfig()) is None


LOST = [
    "[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4711",
    "[gloo/transport/tcp/pair.cc:547] Read error [10.0.0.2]:4711: Connection reset by peer",
    "ncclRemoteError: remote process exited or there was a network error",
    "[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 600000ms for recv operation to complete",
]


@pytest.mark.parametrize("text", LOST)
def test_a_lost_rank_keeps_the_original_message(text, monkeypatch):
    monkeypatch.setattr(failures, "world_size", lambda: 2)
    plain = str(plain_failure(RuntimeError(text), TrainConfig()))
    assert "rank" in plain
    assert text in plain


def test_a_rank_s_cause_is_found_once_by_rank_0(tmp_path, monkeypatch):
    monkeypatch.setattr(failures, "rank", lambda: 3)
    note_failure(tmp_path, ValueError("bad core"))
    assert noted_failures(tmp_path) == ["rank 3: ValueError: bad core"]
    assert noted_failures(tmp_path) == [] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", LOST)
def test_a_rank_that_lost_another_leaves_no_cause(text, tmp_path):
    note_failure(tmp_path, RuntimeError(text))
    assert list(tmp_path.iterdir()) == []
