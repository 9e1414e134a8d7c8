"""Checkpoints: written completely or not at all, never executed, and named when they cannot be used."""

import io
import json
import os
import pickle
import subprocess
import sys
import textwrap
import zipfile

import pytest
import torch

from orion_unet import checkpoint
from orion_unet.checkpoint import BEST, LAST, PREVIOUS, SaveError, checkpoint_path, load, load_last, save
from orion_unet.errors import InputError


def content(epoch=1, **changes):
    return {
        "model": {"weight": torch.full((4, 3), float(epoch)), "steps": torch.arange(5)},
        "options": {"epochs": 30, "use_amp": False, "split_file": None},
        "normalization": {"channels": [{"name": "DAPI", "lower": 0.1}]},
        "channel_names": ["DAPI", "CD3ε"],
        "epoch": epoch,
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999)}]},
        "schedule": {"best": 0.5},
        "early_stopping": {"waited": 2},
        "split": {"train": [{"core": "a", "group": "a"}]},
        "attempt": 1,
        "step": 0,
        "global_batch": 12,
        **changes,
    }


def same(first, second):
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second) and first.dtype == second.dtype
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second and type(first) is type(second)


class Payload:
    """Unpickling this makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "checkpoints" / LAST


def test_what_was_saved_is_loaded_with_weights_only(path):
    save(path, content())
    assert same(load(path, to_resume=True), {"kind": checkpoint.KIND, "schema": 1, **content()})
    plain = torch.load(path, weights_only=True)
    assert same(plain["model"], content()["model"])


def test_nothing_but_the_checkpoint_is_left_in_the_folder(path):
    for epoch in (1, 2, 3):
        save(path, content(epoch))
    assert os.listdir(path.parent) == [LAST]
    assert load(path)["epoch"] == 3


def test_the_checkpoint_before_is_kept_where_asked(path):
    for epoch in (1, 2, 3):
        save(path, content(epoch), keep_previous=True)
    assert sorted(os.listdir(path.parent)) == sorted([LAST, PREVIOUS])
    assert load(path)["epoch"] == 3
    assert load(path.with_name(PREVIOUS))["epoch"] == 2


def test_tensors_on_any_device_come_back_on_the_cpu(path):
    model = {"weight": torch.nn.Parameter(torch.ones(2)), "half": torch.ones(2, dtype=torch.bfloat16)}
    save(path, content(model=model))
    back = load(path)["model"]
    assert back["weight"].device.type == "cpu"
    assert back["half"].dtype == torch.bfloat16


def test_a_run_without_checkpoints_has_none(tmp_path):
    assert load_last(tmp_path) == (None, "")


def test_the_last_checkpoint_is_the_one_to_go_on_from(tmp_path):
    for epoch in (1, 2):
        save(checkpoint_path(tmp_path, LAST), content(epoch), keep_previous=True)
    found, warning = load_last(tmp_path)
    assert found["epoch"] == 2
    assert warning == ""


def truncate(path):
    path.write_bytes(path.read_bytes()[:-200])


def flip_a_bit_of_a_weight(path):
    stored = bytearray(path.read_bytes())
    with zipfile.ZipFile(io.BytesIO(stored)) as archive:
        entry = max(archive.infolist(), key=lambda entry: (entry.filename.endswith("data/0"), entry.file_size))
    assert entry.file_size == 4 * 3 * 4
    stored[stored.index(torch.full((4, 3), 2.0).numpy().tobytes())] ^= 1
    path.write_bytes(stored)


DAMAGES = {
    "truncated": truncate,
    "empty": lambda path: path.write_bytes(b""),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "text": lambda path: path.write_text("not a checkpoint"),
    "a flipped bit": flip_a_bit_of_a_weight,
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_last_checkpoint_gives_way_to_the_one_before_with_a_warning(tmp_path, damage):
    last = checkpoint_path(tmp_path, LAST)
    for epoch in (1, 2):
        save(last, content(epoch), keep_previous=True)
    DAMAGES[damage](last)
    with pytest.raises(InputError, match=str(last)):
        load(last)
    found, warning = load_last(tmp_path)
    assert found["epoch"] == 1
    assert str(last) in warning
    assert PREVIOUS in warning


def test_two_damaged_checkpoints_are_an_error_that_names_a_file(tmp_path):
    last = checkpoint_path(tmp_path, LAST)
    for epoch in (1, 2):
        save(last, content(epoch), keep_previous=True)
    truncate(last)
    truncate(last.with_name(PREVIOUS))
    with pytest.raises(InputError, match=PREVIOUS):
        load_last(tmp_path)


def test_every_truncation_is_noticed(tmp_path):
    path = tmp_path / LAST
    save(path, content())
    whole = path.read_bytes()
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=LAST):
            load(path)


@pytest.mark.parametrize("form", ["plain pickle", "legacy torch file", "torch archive", "archive by hand"])
def test_a_malicious_payload_is_refused_and_never_executed(tmp_path, form):
    path, evidence = tmp_path / "evil.pt", tmp_path / "executed"
    evil = {**content(), "kind": checkpoint.KIND, "schema": 1, "model": {"weight": Payload(evidence)}}
    if form == "plain pickle":
        path.write_bytes(pickle.dumps(evil))
    elif form == "archive by hand":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("evil/data.pkl", pickle.dumps(evil, protocol=2))
            archive.writestr("evil/version", "3\n")
    else:
        torch.save(evil, path, _use_new_zipfile_serialization=form == "torch archive")
    with pytest.raises(InputError, match=str(path)):
        load(path)
    assert not evidence.exists()


@pytest.mark.parametrize("key", [*checkpoint.MODEL_KEYS])
def test_a_checkpoint_that_lacks_a_part_is_damaged(path, key):
    lacking = {name: value for name, value in content().items() if name != key}
    for broken in (lacking, {**content(), key: "text"}):
        save(path, broken)
        with pytest.raises(InputError, match=f"{path}: is damaged: {key} is missing"):
            load(path)


@pytest.mark.parametrize("key", [*checkpoint.RESUME_KEYS])
def test_a_model_to_predict_with_is_no_run_to_continue(path, key):
    best = path.with_name(BEST)
    save(best, {name: value for name, value in content().items() if name != key})
    assert load(best)["epoch"] == 1
    with pytest.raises(InputError, match=f"{best}: .*{LAST}"):
        load(best, to_resume=True)


@pytest.mark.parametrize("foreign", [{"state_dict": {}}, [1, 2], torch.ones(3), {"kind": "another toolkit"}])
def test_a_torch_file_of_another_program_is_refused(tmp_path, foreign):
    path = tmp_path / "foreign.pt"
    torch.save(foreign, path)
    with pytest.raises(InputError, match=f"{path}: is not a checkpoint of this toolkit"):
        load(path)


def test_a_whole_pickled_model_is_refused(tmp_path):
    path = tmp_path / "model.pt"
    torch.save(torch.nn.Linear(2, 2), path)
    with pytest.raises(InputError, match=str(path)):
        load(path)


def test_another_schema_is_refused_with_both_numbers(path):
    save(path, content(schema=7))
    with pytest.raises(InputError, match=f"{path}: has schema 7, but this version reads schema 1"):
        load(path)


@pytest.mark.parametrize("kind", ["missing", "folder"])
def test_a_file_that_cannot_be_read_is_refused(tmp_path, kind):
    path = tmp_path / "x.pt"
    if kind == "folder":
        path.mkdir()
    with pytest.raises(InputError, match=f"{path}: cannot be read"):
        load(path)


def test_a_target_that_cannot_be_made_is_a_save_error_with_the_path(tmp_path):
    (tmp_path / "file").write_text("in the way")
    path = tmp_path / "file" / LAST
    with pytest.raises(SaveError, match=str(path)):
        save(path, content())
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_rename_that_fails_leaves_the_earlier_checkpoint_and_no_temporary_file(path, monkeypatch):
    save(path, content(1))

    def refuse(*_):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(type(path), "replace", refuse)
        with pytest.raises(SaveError, match="Input/output error"):
            save(path, content(2), keep_previous=True)
    assert os.listdir(path.parent) == [LAST]
    assert load(path)["epoch"] == 1


def test_a_full_disk_leaves_the_earlier_checkpoint_loadable(tmp_path):
    """A limit on the size of files, in a process of its own, ends the write part-way as a full disk does."""
    path = checkpoint_path(tmp_path, LAST)
    save(path, content(1), keep_previous=True)
    script = f"""
        import json, resource, torch
        from pathlib import Path
        from orion_unet import checkpoint
        path = Path({str(path)!r})
        earlier = checkpoint.load(path, to_resume=True)
        big = {{**earlier, "epoch": 2, "model": {{"weight": torch.zeros(2_000_000)}}}}
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
        try:
            checkpoint.save(path, big, keep_previous=True)
        except checkpoint.SaveError as error:
            print(json.dumps(str(error)))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60, check=True
    )
    message = json.loads(done.stdout)
    assert message.startswith(f"{path}: cannot be written")
    assert "bytes free" in message
    # 2,000,000 weights and 3 of the optimiser, 4 bytes each.
    assert "about 8000012 bytes needed" in message
    assert os.listdir(path.parent) == [LAST]
    found, warning = load_last(tmp_path)
    assert found["epoch"] == 1
    assert warning == ""
