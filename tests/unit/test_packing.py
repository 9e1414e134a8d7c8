"""Packing: every stored form becomes plain (H, W, C), value for value, once, and only what is whole has a name."""

import fcntl
import itertools
import json
import os
import resource
import tracemalloc

import numpy as np
import pytest

from orion_unet.cli.arguments import run_command
from orion_unet.cli.pack import main
from orion_unet.config import DataOptions
from orion_unet.data import packing
from orion_unet.data.packing import RECORD_FILE, pack
from orion_unet.data.patches import PatchPlace
from orion_unet.errors import InputError, RunError

DTYPES = ["uint8", "uint16", "float16", "float32", ">u2", ">f2", ">f4"]
FORMS = list(itertools.product(("hwc", "chw"), ("hwc", "chw"), ("C", "F")))


def packed(folder, output, overwrite=False, **options):
    return pack(DataOptions(pairs_dir=str(folder), patch_size=16, **options), output, overwrite)


def refusal(*words, kind=InputError, **options):
    with pytest.raises(kind) as caught:
        packed(*words, **options)
    return str(caught.value)


def arrays(folder):
    return {path.name: np.load(path) for path in sorted(folder.glob("*.npy"))}


def identities(folder):
    """The inode of the file of each name; it changes when the file is written again."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.npy")}


def assert_packed(source, output):
    """Check that the output has every array of the source as (H, W, C), C order, little-endian, equal bit for bit."""
    before, after = arrays(source), arrays(output)
    assert before.keys() == after.keys()
    for name, stored in after.items():
        expected = before[name]
        if expected.shape[0] in (3, 5):
            expected = expected.transpose(1, 2, 0)
        assert stored.flags.c_contiguous
        assert stored.dtype == expected.dtype.newbyteorder("<")
        assert stored.dtype.str[0] in "<|"
        assert stored.shape == expected.shape
        assert stored.tobytes() == expected.astype(stored.dtype).tobytes(order="C")
    assert not [path.name for path in output.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_layout_order_and_dtype_keeps_its_values_to_the_bit(write_pairs, tmp_path, dtype):
    for number, (he_layout, orion_layout, order) in enumerate(FORMS):
        source = write_pairs(
            f"source_{number}",
            cores=2,
            channels=5,
            he_dtype=dtype,
            orion_dtype=dtype,
            he_layout=he_layout,
            orion_layout=orion_layout,
            order=order,
        )
        done = packed(source, tmp_path / f"packed_{number}")
        assert (done.cores, done.written, done.found) == (2, 4, 0)
        assert_packed(source, tmp_path / f"packed_{number}")


def test_values_that_compare_unequal_to_themselves_keep_their_bits_too(write_pairs, tmp_path):
    source = write_pairs(cores=1, channels=5, orion_dtype=">f4", orion_layout="chw")
    path = source / "core_00_ORION.npy"
    bits = np.random.default_rng(0).integers(0, 2**32, np.load(path).shape, dtype=np.uint32)
    np.save(path, bits.astype(">u4").view(">f4"))
    packed(source, tmp_path / "packed")
    result = np.load(tmp_path / "packed" / path.name)
    np.testing.assert_array_equal(result.view("<u4"), bits.transpose(1, 2, 0))


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("layout", ["hwc", "chw"])
def test_bands_and_blocks_that_do_not_divide_the_height_miss_no_row(write_pairs, tmp_path, monkeypatch, layout, order):
    source = write_pairs(cores=1, size=(47, 33), channels=5, he_layout=layout, orion_layout=layout, order=order)
    row = 33 * 5 * 2
    monkeypatch.setattr(packing, "BAND_BYTES", 10 * row + 7)
    monkeypatch.setattr(packing, "BLOCK_BYTES", 3 * row)
    packed(source, tmp_path / "packed")
    assert_packed(source, tmp_path / "packed")


def test_memory_stays_that_of_a_band_whatever_the_size_of_a_core(write_pairs, tmp_path, monkeypatch):
    source = write_pairs(cores=1, size=(1024, 256), channels=5, orion_layout="chw")
    monkeypatch.setattr(packing, "BAND_BYTES", 1 << 17)
    tracemalloc.start()
    try:
        packed(source, tmp_path / "packed")
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert np.load(source / "core_00_ORION.npy").nbytes > 2_500_000
    assert most < 1_000_000


@pytest.mark.parametrize("layout", ["hwc", "chw"])
@pytest.mark.parametrize("dtype", ["uint16", ">f4"])
def test_the_trainers_reader_gives_the_same_batches_from_both_folders(write_pairs, open_pairs, tmp_path, layout, dtype):
    source = write_pairs(
        cores=3, channels=5, he_layout=layout, orion_layout=layout, he_dtype=dtype, orion_dtype=dtype, order="F"
    )
    packed(source, tmp_path / "packed")
    places = [PatchPlace(core, y, x) for core, y, x in ((0, 0, 0), (2, 31, 23), (1, 9, 4), (0, 32, 24))]
    one, other = open_pairs(source), open_pairs(tmp_path / "packed")
    assert one.scales == other.scales
    before, after = one.reader.read(places), other.reader.read(places)
    for modality in ("he", "orion"):
        old, new = getattr(before, modality).numpy(), getattr(after, modality).numpy()
        if layout == "chw":
            old = old.transpose(0, 2, 3, 1)
        assert old.dtype == new.dtype
        assert old.tobytes(order="C") == new.tobytes(order="C")


def test_a_mixed_folder_comes_out_uniform(write_pairs, open_pairs, tmp_path):
    source = write_pairs("source", cores=1, channels=5)
    chw = write_pairs("other", cores=1, channels=5, he_layout="chw", orion_layout="chw", seed=1)
    for kind in ("HE", "ORION"):
        (chw / f"core_00_{kind}.npy").rename(source / f"core_01_{kind}.npy")
    packed(source, tmp_path / "packed")
    assert_packed(source, tmp_path / "packed")
    assert set(open_pairs(tmp_path / "packed").table.orion["layout"]) == {"hwc"}


def test_names_and_groups_come_along(write_pairs, open_pairs, tmp_path):
    source = write_pairs(cores=2, channels=2)
    (source / "channel_names.txt").write_text("Hoechst\nCD3e\n", encoding="utf-8")
    (source / "groups.csv").write_bytes(b"core,group\r\ncore_00,a\r\ncore_01,b\r\n")
    packed(source, tmp_path / "packed")
    assert open_pairs(tmp_path / "packed").table.channel_names == ("Hoechst", "CD3e")
    assert (tmp_path / "packed" / "groups.csv").read_bytes() == (source / "groups.csv").read_bytes()


@pytest.mark.parametrize("moment", ["_bands", "append_line", "replace"])
def test_an_interrupted_pack_goes_on_where_it_was_left(write_pairs, tmp_path, monkeypatch, moment):
    source, output = write_pairs(cores=3, channels=5, orion_layout="chw"), tmp_path / "packed"
    place = packing.os if moment == "replace" else packing
    whole = getattr(place, moment)
    calls = []

    def interrupted(*words):
        calls.append(words)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return whole(*words)

    with monkeypatch.context() as patch:
        patch.setattr(place, moment, interrupted)
        with pytest.raises(KeyboardInterrupt):
            packed(source, output)
    first = identities(output)
    assert len(first) == 3
    assert not [path.name for path in output.iterdir() if path.name.startswith(".")]
    # A killed process also leaves its temporary file and half a line behind.
    (output / ".core_02_HE.npy.partial").write_bytes(b"half")
    with open(output / RECORD_FILE, "a", encoding="utf-8") as file:
        file.write('{"file": "core_0')
    done = packed(source, output)
    assert (done.written, done.found) == (3, 3)
    assert first.items() <= identities(output).items()
    assert_packed(source, output)
    again = packed(source, output)
    assert (again.written, again.found) == (0, 6)


def test_new_cores_of_the_source_are_added(write_pairs, tmp_path):
    source, output = write_pairs(cores=2), tmp_path / "packed"
    packed(source, output)
    first = identities(output)
    more = write_pairs("more", cores=4, seed=3)
    for name in ("core_03_HE.npy", "core_03_ORION.npy"):
        (more / name).rename(source / name)
    assert packed(source, output).written == 2
    assert first.items() <= identities(output).items()


def test_a_changed_source_is_packed_anew_only_when_asked(write_pairs, tmp_path):
    source, output = write_pairs(cores=2), tmp_path / "packed"
    packed(source, output)
    path = source / "core_01_ORION.npy"
    old = np.load(output / path.name)
    np.save(path, np.load(path)[::-1])
    os.utime(path, ns=(0, 12345))
    message = refusal(source, output)
    assert "core_01_ORION.npy" in message and "--overwrite" in message and "core_00" not in message
    np.testing.assert_array_equal(np.load(output / path.name), old)
    assert packed(source, output, overwrite=True).written == 1
    np.testing.assert_array_equal(np.load(output / path.name), np.load(path))


@pytest.mark.parametrize("damage", ["truncated", "grown", "another dtype"])
def test_a_packed_file_that_is_not_whole_is_not_taken_for_done(write_pairs, tmp_path, damage):
    source, output = write_pairs(cores=2), tmp_path / "packed"
    packed(source, output)
    path = output / "core_00_ORION.npy"
    if damage == "another dtype":
        np.save(path, np.load(path).view(np.int16))
    else:
        content = path.read_bytes()
        path.write_bytes(content[:-1] if damage == "truncated" else content + b"\0")
    assert path.name in refusal(source, output)
    assert packed(source, output, overwrite=True).written == 1
    np.testing.assert_array_equal(np.load(path), np.load(source / path.name))


def test_a_set_of_equal_names_from_another_folder_is_not_taken_for_done(write_pairs, tmp_path):
    first, second, output = write_pairs("one", seed=0), write_pairs("two", seed=1), tmp_path / "packed"
    packed(first, output)
    for path in first.iterdir():
        # As a copying tool would leave them: even the times are equal.
        times = path.stat()
        os.utime(second / path.name, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert "differ from what packing these pairs gives" in refusal(second, output)


def test_cores_of_another_set_in_the_output_are_never_mixed_in_or_removed(write_pairs, tmp_path):
    source, output = write_pairs(cores=1), write_pairs("other", cores=3, seed=1)
    for overwrite in (False, True):
        before = identities(output)
        message = refusal(source, output, overwrite=overwrite)
        assert "core_01_HE.npy" in message and "choose another folder" in message
        assert identities(output) == before


def test_a_link_in_the_output_is_replaced_and_what_it_points_at_is_left_alone(write_pairs, tmp_path):
    source, output = write_pairs(cores=1, orion_layout="chw", channels=5), tmp_path / "packed"
    output.mkdir()
    (output / "core_00_ORION.npy").symlink_to(source / "core_00_ORION.npy")
    before = (source / "core_00_ORION.npy").read_bytes()
    assert "core_00_ORION.npy" in refusal(source, output)
    packed(source, output, overwrite=True)
    assert (source / "core_00_ORION.npy").read_bytes() == before
    assert_packed(source, output)


@pytest.mark.parametrize("form", ["itself", "with a dot", "by a link"])
def test_the_folder_of_the_pairs_itself_is_refused(write_pairs, tmp_path, form):
    source = write_pairs()
    (tmp_path / "link").symlink_to(source)
    output = {"itself": source, "with a dot": source / ".." / source.name, "by a link": tmp_path / "link"}[form]
    before = identities(source)
    assert "is the folder of the pairs itself" in refusal(source, output, overwrite=True)
    assert identities(source) == before


def test_pairs_that_training_would_refuse_are_refused_before_anything_is_made(write_pairs, tmp_path):
    source = write_pairs(cores=2)
    np.save(source / "core_01_ORION.npy", np.zeros((48, 41, 3), np.uint16))
    assert "core_01_ORION.npy" in refusal(source, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_an_output_that_is_a_file_is_refused(write_pairs, tmp_path):
    (tmp_path / "packed").write_text("", encoding="utf-8")
    assert "--output_dir" in refusal(write_pairs(), tmp_path / "packed")


def test_an_output_of_an_impossible_name_or_with_an_unreadable_record_is_refused(write_pairs, tmp_path):
    source = write_pairs()
    assert "--output_dir" in refusal(source, tmp_path / ("n" * 300))
    (tmp_path / "packed" / RECORD_FILE).mkdir(parents=True)
    assert RECORD_FILE in refusal(source, tmp_path / "packed")


def test_two_packs_never_write_to_one_folder(write_pairs, tmp_path):
    source, output = write_pairs(), tmp_path / "packed"
    output.mkdir()
    handle = os.open(output, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        assert "another pack is writing here" in refusal(source, output)
    finally:
        os.close(handle)
    packed(source, output)


def test_too_small_a_disk_is_reported_before_anything_is_written(write_pairs, tmp_path, monkeypatch):
    source, output = write_pairs(cores=2, size=(48, 40), channels=3), tmp_path / "packed"
    needed = 2 * (48 * 40 * 3 + 48 * 40 * 3 * 2)
    usage = packing.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(packing.shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    message = refusal(source, output, kind=RunError)
    assert "too little disk space" in message and "\n" not in message
    assert not output.exists()
    monkeypatch.setattr(packing.shutil, "disk_usage", lambda path: usage._replace(free=needed))
    packed(source, output)


def test_the_room_that_a_killed_pack_holds_is_given_back_first(write_pairs, tmp_path, monkeypatch):
    source, output = write_pairs(cores=1, size=(48, 40), channels=3), tmp_path / "packed"
    room = 48 * 40 * 3 + 48 * 40 * 3 * 2
    output.mkdir()
    (output / ".core_00_HE.npy.partial").write_bytes(b"half")
    usage = packing.shutil.disk_usage(tmp_path)

    def small_disk(path):
        return usage._replace(free=room - sum(file.stat().st_size for file in output.iterdir()))

    monkeypatch.setattr(packing.shutil, "disk_usage", small_disk)
    assert packed(source, output).written == 2
    assert_packed(source, output)


def test_a_write_that_fails_leaves_nothing_half_written_and_is_gone_on_with(write_pairs, tmp_path):
    source, output = write_pairs(cores=2, size=(96, 96), channels=5), tmp_path / "packed"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Enough for an H&E of 28 kB, not for an ORION core of 92 kB.
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        message = refusal(source, output, kind=RunError)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(output) in message and "1 of 4 files" in message
    assert sorted(path.name for path in output.iterdir()) == ["core_00_HE.npy", RECORD_FILE]
    assert packed(source, output).found == 1
    assert_packed(source, output)


def test_a_source_that_changes_meanwhile_is_not_given_a_name(write_pairs, tmp_path, monkeypatch):
    source, output = write_pairs(cores=1), tmp_path / "packed"
    bands = packing._bands

    def changing(table, job):
        yield from bands(table, job)
        os.utime(job.source, ns=(0, 1))

    monkeypatch.setattr(packing, "_bands", changing)
    assert "changed while it was being packed" in refusal(source, output)
    assert not list(output.iterdir())


def test_the_command_says_what_to_train_on(write_pairs, tmp_path, capsys):
    source, output = write_pairs(cores=2), tmp_path / "a folder"
    words = [str(source), "--output_dir", str(output), "--patch_size", "16", "--orion_layout", "hwc"]
    assert run_command(main, words) == 0
    said = capsys.readouterr().out
    assert "2 cores" in said and "4 files" in said
    assert f"--pairs_dir '{output}' --orion_layout hwc" in said
    assert [json.loads(line)["file"] for line in (output / RECORD_FILE).read_text().splitlines()] == sorted(
        path.name for path in source.glob("*.npy")
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["missing", "--output_dir", "out"], "missing"),
        (["missing"], "--output_dir"),
        (["missing", "--output_dir", "out", "--orion_layout", "cwh"], "--orion_layout"),
        (["missing", "--output_dir", "out", "--patch_size", "3"], "--patch_size"),
    ],
)
def test_bad_words_end_with_one_sentence_and_code_2(tmp_path, monkeypatch, capsys, words, expected):
    monkeypatch.chdir(tmp_path)
    assert run_command(main, words) == 2
    said = capsys.readouterr().err
    assert expected in said and "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_an_interrupt_says_that_the_same_command_goes_on(monkeypatch, capsys):
    def interrupted(*words):
        raise KeyboardInterrupt

    monkeypatch.setattr(packing, "pack", interrupted)
    assert run_command(main, ["pairs", "--output_dir", "packed"]) == 130
    assert "the same command goes on" in capsys.readouterr().err
