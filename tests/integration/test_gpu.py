"""What only a GPU can show; skipped without one. scripts/gpu_check.sh runs these, among other things.

With ORION_TEST_DEVICE=cpu they compare the CPU with itself, which shows that the tests run, and nothing about a GPU.
"""

import os
import signal
import time

import numpy as np
import pytest
import torch
from tiny_runs import differing, losses, read_metrics, weights

from orion_unet.data.device_batches import AHEAD, DeviceBatches
from orion_unet.data.loaders import BatchLoader, TrainingOrder, TrainingSamples
from orion_unet.data.normalization import fit_normalization
from orion_unet.data.transforms import BatchTransform, turn, turn_batch
from orion_unet.metrics import MarkerSums
from orion_unet.training import build
from orion_unet.training.engine import Precision
from orion_unet.training.loop import Loop

pytestmark = pytest.mark.gpu

# Batches enough to fill every slot of a loader several times.
PATCH, BATCH, PATCHES_PER_CORE = 32, 4, 32
# Of the images in [0, 1].
TOLERANCE = 1e-6
# Read once by the process, at its first matrix product on a GPU; needed by the deterministic kernels.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture
def device():
    name = os.environ.get("ORION_TEST_DEVICE", "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU, and torch sees none here")
    return torch.device("cuda", 0) if name == "cuda" else torch.device(name)


@pytest.fixture
def gpu(device):
    if device.type != "cuda":
        pytest.skip("needs a CUDA GPU: a CPU has no memory of its own")
    return device


@pytest.fixture(autouse=True)
def full_float32():
    """TF32 would round the products of convolutions to ten bits."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def made(write_pairs, open_pairs):
    """Factory: the loader of a generated folder, and the transform of its batches for a device."""
    loaders = []

    def make(workers=2, pin_bytes=0, method="dataset", curve="linear", exclude=None, noise_removal=False, **pairs):
        opened = open_pairs(write_pairs(size=(48, 48), **pairs), patch_size=PATCH, exclude_channels=exclude)
        samples = TrainingSamples(opened.reader, np.arange(3), PATCHES_PER_CORE, seed=5, augment=True)
        order = TrainingOrder(len(samples), BATCH, 0, 1, seed=5)
        loaders.append(BatchLoader(samples, order, BATCH, workers, pin_bytes))
        fitted = fit_normalization(opened.table, opened.scales, np.arange(3), method, curve)

        def transform(device, layout=torch.contiguous_format):
            return BatchTransform(opened.table, opened.reader.formats, fitted, noise_removal, device, layout)

        return loaders[-1], order, transform

    yield make
    for loader in loaders:
        loader.close()


def on_device(device, work_s):
    """Keep the device busy for about so long, without waiting for it."""
    if device.type == "cuda":
        # Cycles of a clock between 1 and 2 GHz.
        torch.cuda._sleep(int(work_s * 1.5e9))
    else:
        time.sleep(work_s)


def test_page_locked_batches_are_the_plain_ones(gpu, made):
    plain, order, _ = made()
    whole = plain.nbytes
    for pin_bytes in (10**9, whole // 2):
        locked, locked_order, _ = made(pin_bytes=pin_bytes)
        for epoch in (1, 2):
            order.set_epoch(epoch)
            locked_order.set_epoch(epoch)
            pinned = 0
            for first, second in zip(plain, locked, strict=True):
                copied = [tensor.to(gpu, non_blocking=True).cpu() for tensor in second]
                assert all(torch.equal(one, two) for one, two in zip(first, copied, strict=True))
                pinned += second.he.is_pinned() + second.orion.is_pinned()
            assert pinned == 2 * len(order) if pin_bytes > whole else 0 < pinned < 2 * len(order)


FOLDERS = {
    "uint8, uint16": {},
    "channels first": {"he_layout": "chw", "orion_layout": "chw"},
    "float16": {"he_dtype": "float16", "orion_dtype": "float16"},
    "uint16, float32": {"he_dtype": "uint16", "orion_dtype": "float32"},
    "every core by itself, log1p": {"method": "core", "curve": "log1p"},
    "noise removal, a marker left out": {"noise_removal": True, "exclude": "1"},
}


@pytest.mark.parametrize(
    ("layout", "pin_bytes"),
    [(torch.contiguous_format, 0), (torch.channels_last, 10**9)],
    ids=["contiguous, plain", "channels last, page-locked"],
)
@pytest.mark.parametrize("folder", FOLDERS.values(), ids=FOLDERS)
def test_the_batches_of_the_other_stream_are_those_of_the_cpu(folder, pin_bytes, layout, device, made):
    loader, order, transform = made(pin_bytes=pin_bytes if device.type == "cuda" else 0, **folder)
    for augment in (True, False):
        order.set_epoch(1)
        expected = [transform(torch.device("cpu"))(raw, augment) for raw in loader]
        order.set_epoch(1)
        feed, found = DeviceBatches(loader, transform(device, layout), augment), []
        for batch in feed:
            found.append(batch)
            # The next batches are copied and transformed meanwhile.
            on_device(device, 0.001)
        assert len(found) == len(expected) == len(order)
        for one, two in zip(found, expected, strict=True):
            assert one.he.device == one.target.device == one.boundary.device == device
            assert one.he.is_contiguous(memory_format=layout)
            torch.testing.assert_close(one.he.cpu(), two.he, atol=TOLERANCE, rtol=0)
            torch.testing.assert_close(one.target.cpu(), two.target, atol=TOLERANCE, rtol=0)
            # A gradient within rounding of the threshold may fall on either side.
            assert (one.boundary.cpu() != two.boundary).float().mean() < 1e-3
            assert torch.equal(one.core, two.core)


def test_images_are_turned_alike(device):
    images = torch.rand(8, 5, 24, 24)
    geometry = torch.tensor([[bool(index & bit) for bit in (1, 2, 4)] for index in range(8)])
    expected = torch.stack([turn(image, row) for image, row in zip(images, geometry.tolist(), strict=True)])
    assert torch.equal(turn_batch(images.to(device), geometry.to(device)).cpu(), expected)


class Paced:
    """A loader that takes a time of its own for every batch."""

    def __init__(self, loader, load_s):
        self.loader, self.load_s = loader, load_s

    def __iter__(self):
        for raw in self.loader:
            time.sleep(self.load_s)
            yield raw


@pytest.mark.parametrize(("load_s", "step_s"), [(0.03, 0.002), (0.0, 0.03)], ids=["slow loader", "fast loader"])
def test_the_wait_is_that_for_the_loader(load_s, step_s, device, made):
    loader, order, transform = made()
    feed = DeviceBatches(Paced(loader, load_s), transform(device), augment=True)
    for epoch in (1, 2):
        order.set_epoch(epoch)
        started = time.perf_counter()
        for _ in feed:
            on_device(device, step_s)
        waited, passed = feed.wait_s, time.perf_counter() - started
    # Of the second pass, whose workers are there already.
    slow = len(order) * (load_s - step_s)
    assert 0.8 * slow < waited < passed if slow > 0 else waited < 0.3 * passed


def test_a_host_that_runs_ahead_does_not_fill_the_memory(gpu, made):
    loader, order, transform = made(channels=20)
    feed = DeviceBatches(loader, transform(gpu), augment=False)
    order.set_epoch(1)
    sizes = [sum(t.nbytes for t in (batch.he, batch.target, batch.boundary)) for batch in feed]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in feed:
        on_device(gpu, 0.02)
    # Each batch as stored, as a float and on its way through the transforms.
    assert torch.cuda.max_memory_allocated() - before < 3 * (AHEAD + 3) * sizes[0] < len(order) * sizes[0]


def test_metrics_are_those_of_the_cpu(device):
    rng = torch.Generator().manual_seed(3)
    both = [MarkerSums(4, place) for place in ("cpu", device)]
    for _ in range(3):
        target = torch.rand(5, 4, 48, 40, generator=rng) ** 3
        target[:, 3] = 0.25
        prediction = (0.7 * target + 0.2 * torch.rand(5, 4, 48, 40, generator=rng)).clamp(0, 1)
        for sums in both:
            sums.update(prediction.to(sums.state.device), target.to(sums.state.device))
    (overall, per_marker), (overall_there, per_marker_there) = (sums.compute("ABCD") for sums in both)
    assert per_marker["A"]["pearson"] > 0.5 and per_marker["D"]["pearson"] is None
    assert overall_there == pytest.approx(overall, abs=1e-6)
    for name, values in per_marker.items():
        assert per_marker_there[name] == pytest.approx(values, abs=1e-6)


def gpus(device):
    return 1 if device.type == "cuda" else 0


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_an_epoch_is_close_to_that_of_the_cpu(norm, device, train):
    options = {"epochs": 1, "learning_rate": 1e-3, "norm": norm, "correlation_weight": 0.1, "num_workers": 1}
    on_cpu = train("cpu", **options, gpus=0)
    there = train("there", **options, gpus=gpus(device))
    assert there.code == on_cpu.code == 0
    (expected,), (found,) = read_metrics(on_cpu.dir), read_metrics(there.dir)
    for side in ("train", "val"):
        # Adam's first steps have the size of the rate, whatever the gradient: its rounding counts.
        assert found[side]["loss"] == pytest.approx(expected[side]["loss"], rel=0.01)
        terms = {name: value for name, value in expected[side]["terms"].items() if value is not None}
        assert {name: found[side]["terms"][name] for name in terms} == pytest.approx(terms, rel=0.03, abs=1e-4)
    assert found["val"]["metrics"]["psnr_db"] == pytest.approx(expected["val"]["metrics"]["psnr_db"], rel=0.01)
    assert found["skipped_steps"] == 0


def has_bfloat16(device):
    return device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)


PRECISIONS = {"float32": {}, "bfloat16": {"amp_dtype": "bfloat16"}, "float16": {"amp_dtype": "float16"}}


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
def test_a_resumed_run_equals_the_uninterrupted_one_with_deterministic_kernels(precision, device, train, monkeypatch):
    if precision.get("amp_dtype") == "bfloat16" and not has_bfloat16(device):
        pytest.skip("this GPU has no bfloat16")
    options = {
        "deterministic": True,
        "gpus": gpus(device),
        "use_amp": bool(precision),
        "dropout": 0.3,
        "ema_decay": 0.9,
        "correlation_weight": 0.1,
        "num_workers": 1,
        "epochs": 2,
        **precision,
    }
    straight = train("straight", **options)
    progress = Loop._progress

    def interrupt(self, **fields):
        progress(self, **fields)
        if (self.state.epoch, fields.get("step")) == (1, 2):
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Loop, "_progress", interrupt)
        assert train("resumed", **options).code == 143
    resumed = train("resumed", **options, resume="auto")
    assert (straight.code, resumed.code) == (0, 0)
    assert losses(resumed.dir) == losses(straight.dir)
    for part in (("last.pt", "model"), ("last.pt", "ema"), ("best.pt", "model")):
        assert differing(weights(resumed.dir, *part), weights(straight.dir, *part)) == []


def test_an_overflow_of_float16_skips_a_step_and_is_no_failure(device, train, monkeypatch, capsys):
    # A scale that the first gradients overflow with, and that is halved until they do not.
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**24)
    monkeypatch.setattr(build, "_precision", lambda config, device: Precision(torch.float16, scaler))
    made = train(epochs=2, patches_per_image=8, gpus=gpus(device), learning_rate=1e-3)
    said = capsys.readouterr().out
    assert made.code == 0
    assert "AMP float16" in said and "not finite" not in said
    first, second = read_metrics(made.dir)
    assert 1 <= first["skipped_steps"] <= 8
    assert (second["skipped_steps"], scaler.get_scale()) == (0, 2.0 ** (24 - first["skipped_steps"]))
    assert second["train"]["loss"] < first["train"]["loss"]
