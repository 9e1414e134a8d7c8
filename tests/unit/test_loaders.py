"""Loaders: the same samples whatever the workers, ranks or restarts; every validation patch exactly once."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orion_unet.data.device_batches import DeviceBatches
from orion_unet.data.loaders import (
    BatchLoader,
    TrainingOrder,
    TrainingSamples,
    ValidationOrder,
    ValidationSamples,
    automatic_workers,
    epoch_order,
    slots_bytes,
)
from orion_unet.data.normalization import fit_normalization
from orion_unet.data.patches import PatchPlace, validation_patches
from orion_unet.data.randomness import ORDER, counter_rng
from orion_unet.data.transforms import BatchTransform

# The tests ask for more workers than small machines have cores.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")

CORES = np.array([0, 2, 3])


def training(opened, batch_size=4, rank=0, world_size=1, workers=0, seed=11, augment=True):
    dataset = TrainingSamples(opened.reader, CORES, patches_per_image=8, seed=seed, augment=augment)
    order = TrainingOrder(len(dataset), batch_size, rank, world_size, seed)
    return order, BatchLoader(dataset, order, batch_size, workers)


def epoch_of(order, loader, epoch, start_step=0):
    order.set_epoch(epoch, start_step)
    return [[tensor.clone() for tensor in batch] for batch in loader]


def assert_same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        for left, right in zip(a, b, strict=True):
            assert left.dtype == right.dtype
            np.testing.assert_array_equal(left.numpy(), right.numpy())


def differs(first, second):
    return any(not np.array_equal(a[0].numpy(), b[0].numpy()) for a, b in zip(first, second, strict=True))


@pytest.fixture
def opened(write_pairs, open_pairs):
    return open_pairs(write_pairs())


def mixed_folder(write_pairs):
    folder = write_pairs()
    for core, dtype in ((1, np.uint8), (2, np.float32)):
        for kind, white in (("HE", 255), ("ORION", 65535)):
            path = folder / f"core_{core:02d}_{kind}.npy"
            factor = 255 / white if dtype is np.uint8 else 1 / white
            np.save(path, np.ascontiguousarray((np.load(path) * factor).astype(dtype).transpose(2, 0, 1)))
    return folder


@pytest.mark.parametrize("folder", ["uint16", "float16", "mixed"])
def test_samples_are_the_same_with_0_1_and_3_workers_in_every_epoch(write_pairs, open_pairs, folder):
    path = mixed_folder(write_pairs) if folder == "mixed" else write_pairs(he_dtype=folder, orion_dtype=folder)
    opened = open_pairs(path)
    runs = []
    for workers in (0, 1, 3):
        order, loader = training(opened, workers=workers)
        runs.append([epoch_of(order, loader, epoch) for epoch in (1, 2)])
    for epoch in (0, 1):
        assert_same(runs[0][epoch], runs[1][epoch])
        assert_same(runs[0][epoch], runs[2][epoch])
    assert len(runs[0][0]) == 6
    assert differs(runs[0][0], runs[0][1])


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_ranks_of_a_step_together_are_the_batch_of_one_rank(opened, world_size):
    whole = epoch_of(*training(opened, batch_size=4 * world_size), epoch=3)
    parts = [epoch_of(*training(opened, 4, rank, world_size), epoch=3) for rank in range(world_size)]
    joined = [[torch.cat(fields) for fields in zip(*step, strict=True)] for step in zip(*parts, strict=True)]
    assert_same(joined, whole)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_taken_up_at_a_step_gives_its_tail_and_the_next_one_is_whole(opened, workers):
    whole, following = (epoch_of(*training(opened), epoch) for epoch in (5, 6))
    order, loader = training(opened, workers=workers)
    order.set_epoch(5, 4)
    assert len(loader) == 2
    assert_same(epoch_of(order, loader, 5, start_step=4), whole[4:])
    assert_same(epoch_of(order, loader, 6), following)
    assert epoch_of(order, loader, 5, start_step=6) == []


def test_another_seed_gives_other_samples(opened):
    assert differs(epoch_of(*training(opened, seed=11), 1), epoch_of(*training(opened, seed=12), 1))


def test_every_core_gives_its_share_of_samples(opened):
    cores = torch.cat([batch[2] for batch in epoch_of(*training(opened), 1)])
    assert torch.bincount(cores).tolist() == [8, 0, 8, 8]


@given(
    samples=st.integers(1, 200),
    batch_size=st.integers(1, 20),
    world_size=st.integers(1, 6),
    epoch=st.integers(0, 1000),
)
def test_training_ranks_share_an_epoch_without_overlap(samples, batch_size, world_size, epoch):
    drawn = []
    for rank in range(world_size):
        order = TrainingOrder(samples, batch_size, rank, world_size, seed=1)
        order.set_epoch(epoch)
        requests = list(order)
        assert len(requests) == len(order) == order.steps == samples // (batch_size * world_size)
        assert all(len(request.indices) == batch_size and request.epoch == epoch for request in requests)
        drawn += [index for request in requests for index in request.indices.tolist()]
    assert len(set(drawn)) == len(drawn)
    assert set(drawn) <= set(range(samples))


@given(samples=st.integers(0, 120), batch_size=st.integers(1, 20), world_size=st.integers(1, 140))
def test_validation_gives_every_patch_exactly_once_also_to_more_ranks_than_patches(samples, batch_size, world_size):
    seen = []
    for rank in range(world_size):
        order = ValidationOrder(samples, batch_size, rank, world_size)
        requests = list(order)
        assert len(requests) == len(order)
        assert all(0 < len(request.indices) <= batch_size for request in requests)
        seen += [index for request in requests for index in request.indices.tolist()]
    assert sorted(seen) == list(range(samples))


@pytest.mark.parametrize("workers", [0, 2])
def test_validation_patches_are_the_same_in_every_pass_and_not_augmented(opened, workers):
    places = validation_patches(opened.reader, np.array([1]), opened.options, seed=0)
    order = ValidationOrder(len(places), 3, rank=0, world_size=1)
    loader = BatchLoader(ValidationSamples(opened.reader, places), order, 3, workers)
    first, second = ([[tensor.clone() for tensor in batch] for batch in loader] for _ in range(2))
    assert_same(first, second)
    assert [len(batch[0]) for batch in first] == [3, 3, 2]
    expected = opened.reader.read([PatchPlace(*row) for row in places.tolist()])
    for index in (0, 1):
        assert torch.equal(torch.cat([batch[index] for batch in first]), expected[index])
    assert not any(batch[3].any() or batch[4].any() for batch in first)


def test_device_batches_are_transformed_and_the_wait_is_measured(opened):
    normalization = fit_normalization(opened.table, opened.scales, CORES, "dataset", "linear")
    transform = BatchTransform(opened.table, opened.reader.formats, normalization, False, torch.device("cpu"))
    order, loader = training(opened, augment=False)
    order.set_epoch(1)
    batches = DeviceBatches(loader, transform, augment=False)
    prepared = list(batches)
    assert len(prepared) == 6
    for batch, raw in zip(prepared, epoch_of(order, loader, 1), strict=True):
        np.testing.assert_allclose(batch.he.numpy(), raw[0].numpy().transpose(0, 3, 1, 2) / np.float32(255), rtol=1e-6)
        assert batch.target.shape == (4, 3, 16, 16)
        assert batch.core.tolist() == raw[2].tolist()
    assert 0 < batches.wait_s < 10


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_the_images_of_a_batch_hold_until_two_further_ones_have_been_taken(opened, workers):
    order, loader = training(opened, batch_size=2, workers=workers)
    order.set_epoch(1)
    expected = epoch_of(*training(opened, batch_size=2), 1)
    held = []
    for index, batch in enumerate(loader):
        held.append(batch)
        # Time enough for the workers to fill all that they may.
        time.sleep(0.05)
        for back in (0, 1)[: index + 1]:
            assert torch.equal(held[index - back].orion, expected[index - back][1])
    assert len(held) == 12


def test_memory_for_batches_is_made_once(opened):
    order, loader = training(opened, batch_size=2, workers=1)
    order.set_epoch(1)
    places = {batch.orion.data_ptr() for _ in range(3) for batch in loader}
    assert len(places) == 4


class Runtime:
    """A fake CUDA runtime that refuses to lock memory after a number of ranges."""

    def __init__(self, room):
        self.room = room
        self.locked = []
        self.asked = 0

    def cudaHostRegister(self, address, size, flags):
        self.asked += 1
        if len(self.locked) == self.room:
            return 2
        self.locked.append(address)
        return 0

    def cudaHostUnregister(self, address):
        self.locked.remove(address)
        return 0


@pytest.mark.parametrize(("room", "locked", "asked"), [(100, 4, 4), (1, 1, 2), (0, 0, 1)])
def test_memory_that_cannot_be_locked_is_asked_for_once_and_no_kernel_is_blamed(
    opened, monkeypatch, room, locked, asked
):
    runtime, blamed = Runtime(room), []

    def kernel(*words, device):
        blamed.append(device)
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch, "ones", kernel)
    dataset = TrainingSamples(opened.reader, CORES, patches_per_image=8, seed=11, augment=True)
    loader = BatchLoader(dataset, TrainingOrder(len(dataset), 4, 0, 1, 11), 4, 0, pin_bytes=1 << 30)
    assert len(list(loader)) == 6
    assert (len(runtime.locked), runtime.asked) == (locked, asked)
    # A refusal stays with the runtime until a kernel is started, which then fails for it.
    assert blamed == (["cuda"] if room < 4 else [])
    loader.close()
    assert runtime.locked == []


def test_no_more_memory_is_locked_than_allowed(opened, monkeypatch):
    runtime = Runtime(100)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    dataset = TrainingSamples(opened.reader, CORES, patches_per_image=8, seed=11, augment=True)

    def locked(pin_bytes):
        loader = BatchLoader(dataset, TrainingOrder(len(dataset), 4, 0, 1, 11), 4, 0, pin_bytes)
        assert len(list(loader)) == 6
        count = len(runtime.locked)
        loader.close()
        return count, loader.nbytes

    every, nbytes = locked(1 << 30)
    # Two slots of an H&E and a target each; the memory of a loader process has four.
    assert (every, nbytes) == (4, slots_bytes(opened.reader, 4) // 2)
    assert locked(nbytes)[0] == 4
    assert locked(nbytes - 1)[0] == 3
    assert locked(0)[0] == 0


def test_workers_share_the_cores_of_the_machine(monkeypatch):
    monkeypatch.setattr("orion_unet.data.loaders.usable_cores", lambda: 16)
    assert automatic_workers(1, on_gpu=True) == 8
    assert automatic_workers(4, on_gpu=True) == 3
    assert automatic_workers(16, on_gpu=True) == 1
    assert automatic_workers(1, on_gpu=False) == 1
    monkeypatch.setattr("orion_unet.data.loaders.usable_cores", lambda: 1)
    assert automatic_workers(1, on_gpu=False) == 0


def test_workers_leave_the_signals_of_the_terminal_and_the_cluster_to_their_rank(opened):
    order, loader = training(opened, workers=2)
    expected = epoch_of(*training(opened), 1)
    order.set_epoch(1)
    found = []
    for batch in loader:
        # With the second batch both workers have begun their work.
        if len(found) == 1:
            for worker in loader.worker_ids():
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
                    os.kill(worker, number)
        found.append([tensor.clone() for tensor in batch])
    assert_same(found, expected)


LOADING = """
import numpy as np
from orion_unet.config import DataOptions
from orion_unet.data import loaders
from orion_unet.data.loaders import BatchLoader, TrainingOrder, TrainingSamples
from orion_unet.data.pairs import find_pairs
from orion_unet.data.patches import PatchReader
from orion_unet.data.scale import measure_scales

table = find_pairs(DataOptions(pairs_dir={folder!r}, patch_size=16))
reader = PatchReader(table, measure_scales(table, False), 16)
dataset = TrainingSamples(reader, np.arange(4), 8, seed=0, augment=True)
loader = BatchLoader(dataset, TrainingOrder(32, 4, 0, 1, seed=0), 4, 2)
"""


def run_loading(folder, script):
    """Exit code, output and errors of a process with the loader above, once nothing it has started holds them open."""
    words = [sys.executable, "-c", LOADING.format(folder=str(folder)) + textwrap.dedent(script)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(words, text=True, start_new_session=True, **pipes) as process:
        try:
            out, err = process.communicate(timeout=120)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, err


def test_a_process_that_fails_in_an_epoch_ends_though_its_workers_hear_no_signal(write_pairs):
    code, _, err = run_loading(
        write_pairs(),
        """
        for kept in loader:
            raise RuntimeError("the network failed")
        """,
    )
    assert code == 1
    assert "the network failed" in err


def test_workers_end_although_their_process_was_killed_before_they_had_begun(write_pairs):
    # A worker begins by leaving signals to its rank; here it waits with that until the rank is gone.
    code, out, _ = run_loading(
        write_pairs(),
        """
        import os, signal, time
        rank, leave = os.getpid(), signal.signal
        def leave_late(*given):
            while os.getppid() == rank:
                time.sleep(0.01)
            return leave(*given)
        loaders.signal.signal = leave_late
        print("before", flush=True)
        iterator = iter(loader._loader)
        os.kill(rank, signal.SIGKILL)
        """,
    )
    assert (code, out) == (-signal.SIGKILL, "before\n")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere torch ends them, within 5 s")
def test_workers_end_with_their_process_at_once_and_close_what_they_share_with_it(write_pairs):
    # The pipe to this test is open in the workers as a rank's connections to other ranks are.
    code, out, _ = run_loading(
        write_pairs(),
        """
        import os, signal, time
        iterator = iter(loader)
        # With the second batch both workers have begun their work.
        next(iterator), next(iterator)
        print(time.time(), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
        """,
    )
    assert code == -signal.SIGKILL
    assert time.time() - float(out) < 3.5


def test_a_mixed_order_has_every_sample_once_and_few_cores_at_a_time():
    for cores, mixed in ((12, 4), (10, 4), (5, 8), (6, 6)):
        orders = [epoch_order(cores * 3, 7, epoch, 3, mixed) for epoch in (1, 1, 2)]
        assert sorted(orders[0].tolist()) == list(range(cores * 3))
        np.testing.assert_array_equal(orders[0], orders[1])
        assert (orders[0] != orders[2]).any()
        drawn = (orders[0] // 3).tolist()
        windows = [set(drawn[start : start + 3 * mixed]) for start in range(0, cores * 3, 3 * mixed)]
        assert [len(window) for window in windows] == [min(mixed, cores - start) for start in range(0, cores, mixed)]
        # Within a window the samples of different cores are mixed.
        assert len(set(drawn[:6])) > 2


def test_the_order_of_all_cores_is_that_of_a_permutation():
    np.testing.assert_array_equal(epoch_order(40, 3, 2), counter_rng(3, ORDER, 2).permutation(40))
