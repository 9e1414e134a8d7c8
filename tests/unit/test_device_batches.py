"""What the device waits for, by a clock that is made here."""

from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from orion_unet.data.device_batches import DeviceBatches, DeviceGaps
from orion_unet.data.transforms import Batch


@dataclass
class Event:
    """In place of a CUDA event: records a given time [ms]."""

    at: float
    happened: bool = True

    def query(self):
        return self.happened

    def synchronize(self):
        self.happened = True

    def elapsed_time(self, later):
        assert self.happened and later.happened
        return later.at - self.at


def test_only_the_time_between_a_step_and_a_later_batch_counts():
    gaps = DeviceGaps()
    # The first batch is ready 30 ms after the start, the second before the first step ends, the third 5 ms after.
    for ended, ready in ((0.0, 30.0), (100.0, 60.0), (200.0, 205.0)):
        gaps.add(Event(ended), Event(ready))
    assert gaps.total_s() == pytest.approx(0.035)


def test_a_host_that_runs_ahead_is_no_wait():
    # As on a GPU whose host is two steps ahead: batches are ready long before the steps that come before them end.
    gaps = DeviceGaps()
    for step in range(10):
        gaps.add(Event(100.0 * step, happened=False), Event(100.0 * step - 150.0, happened=False))
    assert gaps.total_s() == 0.0


def test_events_that_have_not_happened_are_not_waited_for_until_the_end():
    gaps, late = DeviceGaps(), Event(10.0, happened=False)
    gaps.add(Event(0.0), late)
    gaps.add(Event(20.0), Event(24.0))
    assert not late.happened
    assert gaps.total_s() == pytest.approx(0.014)
    assert late.happened


class SimulatedGPU:
    """Streams and events of a device whose clock is the host's: work takes its turn on its stream."""

    def __init__(self):
        self.now = 0.0
        self.training = self.Stream()
        self.current = self.training

    def install(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self.Stream())
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: self.Event())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.on)
        return self

    @contextmanager
    def on(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def Stream(self):
        gpu = self

        class Stream:
            free_at = 0.0

            def work(self, seconds):
                self.free_at = max(self.free_at, gpu.now) + seconds
                return self.free_at

            def record_event(self, event):
                event.at = max(self.free_at, gpu.now)

            def wait_stream(self, other):
                self.free_at = max(self.free_at, other.free_at)

            def synchronize(self):
                gpu.now = max(gpu.now, self.free_at)

        return Stream()

    def Event(self):
        gpu = self

        class Event:
            at = 0.0

            def query(self):
                return gpu.now >= self.at

            def synchronize(self):
                gpu.now = max(gpu.now, self.at)

            def elapsed_time(self, later):
                assert self.query() and later.query()
                return 1e3 * (later.at - self.at)

        return Event()

    def batches(self, count, load_s, copy_s):
        """Batches of a loader, of which each takes the host and then the device's other stream so long."""
        gpu = self

        class Loader:
            closed_at = None

            def __iter__(self):
                for index in range(count):
                    gpu.now += load_s
                    yield index

            def close(self):
                self.closed_at = gpu.now

        def transform(raw, augment):
            gpu.current.work(copy_s)
            image = SimpleNamespace(record_stream=lambda stream: None)
            return Batch(image, image, image, raw)

        transform.device = torch.device("cuda")
        return DeviceBatches(Loader(), transform, augment=False)


@pytest.fixture
def gpu(monkeypatch):
    return SimulatedGPU().install(monkeypatch)


def consume(gpu, batches, step_s):
    """Launch a step on every batch and wait for none; the largest number of batches whose step has not ended."""
    ends, most = [], 0
    for _ in batches:
        most = max(most, 1 + sum(end > gpu.now for end in ends))
        ends.append(gpu.training.work(step_s))
    return most


def test_a_slow_loader_is_waited_for_by_the_device(gpu):
    batches = gpu.batches(10, load_s=0.05, copy_s=0.002)
    consume(gpu, batches, step_s=0.01)
    # A batch is ready 52 ms after the start, then 50 ms after the one before it, with a step of 10 ms between.
    assert batches.wait_s == pytest.approx(0.052 + 9 * 0.04)


def test_the_wait_so_far_is_known_during_a_pass_without_waiting_for_the_device(gpu):
    batches = gpu.batches(10, load_s=0.05, copy_s=0.002)
    so_far = []
    for _ in batches:
        so_far.append(batches.wait_s)
        before = gpu.now
        gpu.training.work(0.01)
        assert gpu.now == before
    # The batch that has just been prepared is not ready yet, the one before it is.
    assert so_far == pytest.approx([0.0, *(0.052 + 0.04 * done for done in range(9))])


def test_a_fast_loader_is_waited_for_only_once(gpu):
    batches = gpu.batches(10, load_s=0.001, copy_s=0.002)
    consume(gpu, batches, step_s=0.02)
    assert batches.wait_s == pytest.approx(0.003)
    # A second pass whose first batch is ready before the last step of the first has ended waits for nothing.
    consume(gpu, batches, step_s=0.02)
    assert batches.wait_s == 0.0
    gpu.training.synchronize()
    consume(gpu, batches, step_s=0.02)
    assert batches.wait_s == pytest.approx(0.003)


@pytest.mark.parametrize("load_s", [0.0, 0.001, 0.05])
def test_a_host_that_waits_for_nothing_does_not_fill_the_memory_with_batches(gpu, load_s):
    # As in validation. Two steps that the device still has to do, and the batch of the next.
    assert consume(gpu, gpu.batches(50, load_s, copy_s=0.001), step_s=0.02) <= 3


def test_the_memory_of_a_batch_is_copied_before_the_second_batch_after_it_is_taken(gpu):
    batches = gpu.batches(6, load_s=0.0, copy_s=0.1)
    taken = [gpu.now for _ in batches]
    assert all(later >= index * 0.1 + 0.1 - 1e-9 for index, later in enumerate(taken[2:]))


def test_loaders_end_only_when_their_last_copies_have(gpu):
    batches = gpu.batches(6, load_s=0.0, copy_s=0.1)
    next(iter(batches))
    batches.close()
    assert batches.loader.closed_at == pytest.approx(0.1)
