"""What the device waits for, by a clock that is made here."""

from dataclasses import dataclass

import pytest

from orion_unet.data.device_batches import DeviceGaps


@dataclass
class Event:
    """Stands for a CUDA event that happens at a time [ms]."""

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
