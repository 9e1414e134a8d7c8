"""What a rank trains on: the type of mixed precision that is wanted, and that the GPU has."""

import subprocess
import sys

import pytest
import torch

from orion_unet.config import RuntimeOptions, TrainConfig
from orion_unet.errors import InputError
from orion_unet.training import build, devices
from orion_unet.training.devices import autocast_dtype, choose_device, device_warning

GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """Pretend to have a GPU with or without bfloat16; at most its kind is asked for."""

    def pretend(bfloat16):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bfloat16)
        for name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)

    return pretend


@pytest.mark.parametrize(
    ("wanted", "has_bfloat16", "expected"),
    [
        ("auto", True, torch.bfloat16),
        ("auto", False, torch.float16),
        ("float16", True, torch.float16),
        ("float16", False, torch.float16),
        ("bfloat16", True, torch.bfloat16),
    ],
)
def test_the_type_is_the_one_wanted_and_auto_is_the_best_of_the_gpu(wanted, has_bfloat16, expected, gpu, monkeypatch):
    gpu(has_bfloat16)
    assert autocast_dtype(RuntimeOptions(use_amp=True, amp_dtype=wanted), GPU) == expected
    assert autocast_dtype(RuntimeOptions(use_amp=False, amp_dtype=wanted), GPU) is None
    assert autocast_dtype(RuntimeOptions(use_amp=True, amp_dtype=wanted), torch.device("cpu")) is None
    made = []
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *given, **named: made.append((given, named)) or "scaler")
    precision = build._precision(TrainConfig(runtime=RuntimeOptions(use_amp=True, amp_dtype=wanted)), GPU)
    assert precision.dtype == expected
    # Only float16 has gradients too small for it.
    assert precision.scaler == ("scaler" if expected == torch.float16 else None)
    assert made == ([(("cuda",), {"init_scale": 8192.0})] if expected == torch.float16 else [])


def test_a_type_that_the_gpu_lacks_is_refused_before_anything_is_read(gpu, monkeypatch):
    gpu(bfloat16=False)
    assert choose_device(RuntimeOptions(use_amp=True)) == GPU
    with pytest.raises(InputError, match="--amp_dtype bfloat16: Old GPU does not have it; use float16 or auto"):
        choose_device(RuntimeOptions(use_amp=True, amp_dtype="bfloat16"))
    assert choose_device(RuntimeOptions(use_amp=False, amp_dtype="bfloat16")) == GPU
    monkeypatch.setattr(devices.torch.cuda, "device_count", lambda: 0)
    assert choose_device(RuntimeOptions(use_amp=True, amp_dtype="bfloat16")) == torch.device("cpu")


@pytest.mark.parametrize(
    ("gpu_there", "built", "gpus", "warned"),
    [(True, False, None, True), (True, False, 0, False), (True, True, None, False), (False, False, None, False)],
)
def test_a_cpu_build_of_torch_beside_a_gpu_is_warned_of(gpu_there, built, gpus, warned, monkeypatch, tmp_path):
    node = tmp_path / "nvidia0"
    if gpu_there:
        node.touch()
    monkeypatch.setattr(devices, "NVIDIA_DEVICE", node)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: built)
    said = device_warning(torch.device("cpu"), RuntimeOptions(gpus=gpus))
    assert bool(said) == warned
    assert not said or "install a CUDA build of torch" in said[0]


COUNT_PAGE_FAULTS = """
import resource, torch
from orion_unet.patch_sums import patch_sums
from orion_unet.training.devices import keep_freed_memory

keep_freed_memory(torch.device("cpu"))
torch.set_num_threads(2)
images = torch.rand(4, 20, 256, 256)
for turn in range(8):
    if turn == 4:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    patch_sums(images, images)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks glibc")
def test_the_memory_freed_by_threads_is_used_again():
    ran = subprocess.run([sys.executable, "-c", COUNT_PAGE_FAULTS], capture_output=True, text=True, check=True)
    # Given back, it would be cleared again in each of the four last turns: 200 to 400 MB were measured.
    assert int(ran.stdout) < 60e6
