"""Finding pairs: every layout and dtype reads the same, every bad file is refused by name, nothing is unpickled."""

import io
import itertools
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest

from orion_unet.config import DataOptions
from orion_unet.data.pairs import find_pairs
from orion_unet.data.patches import PatchPlace
from orion_unet.errors import InputError

LAYOUTS = list(itertools.product(("hwc", "chw"), ("hwc", "chw")))
DTYPES = ["uint8", "uint16", "float16", "float32", ">u2", ">f2", ">f4"]


def refusal(folder, patch_size=16, **options):
    with pytest.raises(InputError) as caught:
        find_pairs(DataOptions(pairs_dir=str(folder), patch_size=patch_size, **options))
    return str(caught.value)


def crops(opened, core, y, x):
    """H&E and ORION of one patch as intensities in [0, 1], channels first."""
    batch = opened.reader.read([PatchPlace(core, y, x)])
    result = []
    for modality, stored in (("he", batch.he), ("orion", batch.orion)):
        shape = opened.reader.formats[modality]
        values = stored[0].numpy().astype(np.float64) / shape.white
        result.append(values.transpose(2, 0, 1) if shape.layout == "hwc" else values)
    return result


@pytest.fixture
def reference(write_pairs, open_pairs):
    folder = write_pairs("reference", cores=2)
    arrays = [np.load(folder / f"core_01_{kind}.npy").astype(np.float64) for kind in ("HE", "ORION")]
    return [
        (values / white)[9:25, 21:37].transpose(2, 0, 1) for values, white in zip(arrays, (255, 65535), strict=True)
    ]


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize(("he_layout", "orion_layout"), LAYOUTS)
def test_every_layout_gives_the_same_crops(write_pairs, open_pairs, reference, he_layout, orion_layout, order):
    folder = write_pairs(cores=2, he_layout=he_layout, orion_layout=orion_layout, order=order)
    he, orion = crops(open_pairs(folder), 1, 9, 21)
    np.testing.assert_array_equal(he, reference[0])
    np.testing.assert_array_equal(orion, reference[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ["C", "F"])
def test_every_dtype_and_byte_order_gives_the_same_crops(write_pairs, open_pairs, reference, dtype, order):
    folder = write_pairs(cores=2, he_dtype=dtype, orion_dtype=dtype, order=order)
    tolerance = 2**-11 if np.dtype(dtype).itemsize == 2 and np.dtype(dtype).kind == "f" else 1e-7
    for found, expected in zip(crops(open_pairs(folder), 1, 9, 21), reference, strict=True):
        np.testing.assert_allclose(found, expected, atol=tolerance, rtol=0)


def test_a_folder_may_mix_layouts_dtypes_and_sizes(write_pairs, open_pairs):
    expected = {}
    for index, ((he_layout, orion_layout), dtype) in enumerate(zip(LAYOUTS, DTYPES[:4], strict=True)):
        size = (40 + index, 50 - index)
        rng_args = {"size": size, "seed": index, "cores": 1}
        plain = open_pairs(write_pairs(f"plain_{index}", **rng_args))
        mixed = write_pairs(
            "mixed_one", he_layout=he_layout, orion_layout=orion_layout, he_dtype=dtype, orion_dtype=dtype, **rng_args
        )
        for kind in ("HE", "ORION"):
            target = mixed.parent / "mixed" / f"core_{index:02d}_{kind}.npy"
            target.parent.mkdir(exist_ok=True)
            (mixed / f"core_00_{kind}.npy").rename(target)
        expected[index] = crops(plain, 0, 11, 13)
    opened = open_pairs(mixed.parent / "mixed")
    assert opened.table.orion["width"].tolist() == [50, 49, 48, 47]
    for index, pair in expected.items():
        for found, right in zip(crops(opened, index, 11, 13), pair, strict=True):
            np.testing.assert_allclose(found, right, atol=2**-11, rtol=0)


def test_cores_are_in_alphabetical_order_and_hidden_files_are_no_cores(write_pairs):
    folder = write_pairs(cores=3)
    (folder / "._core_00_HE.npy").write_bytes(b"finder")
    (folder / "notes.txt").write_text("not a core")
    table = find_pairs(DataOptions(pairs_dir=str(folder), patch_size=16))
    assert table.names.tolist() == ["core_00", "core_01", "core_02"]
    assert table.warnings == []


def test_unpaired_files_are_left_out_with_a_warning_that_names_them(write_pairs):
    folder = write_pairs(cores=3)
    (folder / "core_00_ORION.npy").unlink()
    (folder / "core_02_HE.npy").unlink()
    table = find_pairs(DataOptions(pairs_dir=str(folder), patch_size=16))
    assert table.names.tolist() == ["core_01"]
    (warning,) = table.warnings
    assert "core_00_HE.npy" in warning
    assert "core_02_ORION.npy" in warning


def test_an_ambiguous_layout_is_settled_by_the_option_that_the_error_names(tmp_path, store, open_pairs):
    levels = np.random.default_rng(0).integers(0, 256, (32, 32, 32))
    store(tmp_path / "a_HE.npy", levels[..., :3], "uint8")
    store(tmp_path / "a_ORION.npy", levels, "uint8")
    message = refusal(tmp_path)
    assert "--orion_layout hwc" in message
    assert "--orion_layout chw" in message
    as_hwc = crops(open_pairs(tmp_path, orion_layout="hwc"), 0, 5, 7)[1]
    as_chw = crops(open_pairs(tmp_path, orion_layout="chw"), 0, 5, 7)[1]
    np.testing.assert_array_equal(as_hwc, levels[5:21, 7:23].transpose(2, 0, 1) / 255)
    np.testing.assert_array_equal(as_chw, levels[:, 5:21, 7:23] / 255)


def test_an_ambiguous_he_names_its_own_option(tmp_path):
    np.save(tmp_path / "a_HE.npy", np.zeros((3, 3, 3), np.uint8))
    np.save(tmp_path / "a_ORION.npy", np.zeros((3, 3, 5), np.uint8))
    assert "--he_layout hwc" in refusal(tmp_path)
    assert "smaller than --patch_size" in refusal(tmp_path, he_layout="chw")


class Payload:
    """Unpickling this makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def npz(array):
    buffer = io.BytesIO()
    np.savez(buffer, array=array)
    return buffer.getvalue()


def with_header(text, body=b"\0" * 30_000):
    header = text.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + body


def with_shape(shape, descr="'|u1'"):
    return with_header(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}")


WHOLE = npy(np.zeros((48, 40, 3), np.uint8))
MALFORMED = {
    "empty": b"",
    "text": b"this is no array",
    "half the magic": WHOLE[:4],
    "half the header": WHOLE[:40],
    "no data": WHOLE[:128],
    "last byte missing": WHOLE[:-1],
    "unknown version": b"\x93NUMPY\x09\x00" + WHOLE[8:],
    "unterminated header": with_header("{'descr': '|u1', 'shape': (48, 40, 3"),
    "unterminated string": with_header("'''descr"),
    "header of code": with_header("__import__('os').getcwd()"),
    "header of another kind": with_header("[1, 2]"),
    "header without keys": with_header("{'shape': (48, 40, 3)}"),
    "header with odd keys": with_header("{1: 2, 'shape': (48, 40, 3)}"),
    "deep header": with_header("(" * 3000 + ")" * 3000),
    "long header": with_header(" " * 12_000 + "{}"),
    "unknown dtype": with_shape("(48, 40, 3)", "'<q9'"),
    "negative size": with_shape("(-48, 40, 3)"),
    "size past any file": with_shape("(4294967296, 4294967296, 3)"),
    "size past any integer": with_shape(f"({10**30}, 40, 3)"),
    "archive": npz(np.zeros((48, 40, 3), np.uint8)),
    "truncated archive": npz(np.zeros((48, 40, 3), np.uint8))[:300],
    "float64": npy(np.zeros((48, 40, 3))),
    "int16": npy(np.zeros((48, 40, 3), np.int16)),
    "bool": npy(np.zeros((48, 40, 3), bool)),
    "complex": npy(np.zeros((48, 40, 3), np.complex64)),
    "structured": npy(np.zeros((48, 40, 3), [("a", "u1"), ("b", "u1")])),
    "text array": npy(np.zeros((48, 40, 3), "U4")),
    "two axes": npy(np.zeros((48, 40), np.uint8)),
    "four axes": npy(np.zeros((1, 48, 40, 3), np.uint8)),
    "no axis": npy(np.uint8(1)),
    "other size": npy(np.zeros((47, 40, 3), np.uint8)),
    "turned by a quarter": npy(np.zeros((40, 48, 3), np.uint8)),
    "no rows": npy(np.zeros((0, 40, 3), np.uint8)),
}
ORION_ONLY = {"no channels": npy(np.zeros((48, 40, 0), np.uint8))}
HE_ONLY = {
    "one channel": npy(np.zeros((48, 40, 1), np.uint8)),
    "four channels": npy(np.zeros((48, 40, 4), np.uint8)),
    "smaller than a patch": npy(np.zeros((12, 40, 3), np.uint8)),
}
CASES = [(kind, name, content) for name, content in MALFORMED.items() for kind in ("HE", "ORION")]
CASES += [("ORION", name, content) for name, content in ORION_ONLY.items()]
CASES += [("HE", name, content) for name, content in HE_ONLY.items()]


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("kind", "content"), [pytest.param(k, c, id=f"{k}: {n}") for k, n, c in CASES])
def test_a_malformed_file_is_refused_by_name(write_pairs, kind, content):
    folder = write_pairs(cores=2)
    (folder / f"core_01_{kind}.npy").write_bytes(content)
    message = refusal(folder)
    assert "core_01" in message
    assert "core_00" not in message


@pytest.mark.parametrize("kind", ["HE", "ORION"])
@pytest.mark.parametrize("form", ["object array", "bare pickle", "archive"])
def test_pickled_data_is_refused_and_never_executed(write_pairs, tmp_path, kind, form):
    folder, evidence = write_pairs(cores=2), tmp_path / "executed"
    array = np.empty((48, 40, 3), object)
    array[:] = Payload(evidence)
    content = {
        "object array": lambda: npy(array),
        "bare pickle": lambda: pickle.dumps(Payload(evidence)),
        "archive": lambda: npz(array),
    }[form]()
    (folder / f"core_01_{kind}.npy").write_bytes(content)
    message = refusal(folder)
    assert f"core_01_{kind}.npy" in message
    assert ("archive" if form == "archive" else "pickled") in message
    assert not evidence.exists()


@pytest.mark.parametrize("kind", ["HE", "ORION"])
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: path.symlink_to("nowhere")])
def test_what_is_no_file_is_refused_without_waiting(write_pairs, kind, make):
    folder = write_pairs(cores=2)
    path = folder / f"core_01_{kind}.npy"
    path.unlink()
    make(path)
    assert f"core_01_{kind}.npy: cannot be read" in refusal(folder)


def test_one_message_names_every_bad_file_and_no_good_one(write_pairs):
    folder = write_pairs(cores=12)
    bad = [f"core_{core:02d}" for core in range(1, 12, 2)]
    contents = [WHOLE[:-5], b"", b"text", npz(np.zeros(3)), npy(np.zeros((9, 9, 9), np.uint8)), WHOLE]
    for core, content in zip(bad, contents, strict=True):
        (folder / f"{core}_ORION.npy").write_bytes(content)
    # The last one is a valid file with too few channels; the same message names it too.
    (folder / f"{bad[-1]}_ORION.npy").write_bytes(npy(np.zeros((48, 40, 2), np.uint8)))
    message = refusal(folder)
    assert [f"core_{core:02d}" for core in range(12) if f"core_{core:02d}" in message] == bad
    assert all(message.count(core) == 1 for core in bad)
    assert f"{bad[-1]}_ORION.npy: has 2 channels, but the others have 3" in message


def test_an_image_smaller_than_a_patch_is_refused_with_both_sizes(write_pairs):
    message = refusal(write_pairs(size=(48, 40)), patch_size=41)
    assert "48 x 40" in message
    assert "--patch_size 41" in message
    assert message.count("core_0") == 4


def test_a_forced_layout_that_does_not_fit_is_refused(write_pairs):
    message = refusal(write_pairs(orion_layout="chw", cores=1), orion_layout="hwc")
    assert "core_00_ORION.npy" in message
    assert "--orion_layout hwc" in message


@pytest.mark.parametrize("kind", ["missing", "a file", "empty", "unpaired only"])
def test_a_folder_without_pairs_is_refused_with_advice(tmp_path, kind):
    folder = tmp_path / "cores"
    if kind == "a file":
        folder.write_text("")
    elif kind != "missing":
        folder.mkdir()
    if kind == "unpaired only":
        (folder / "lonely_HE.npy").write_bytes(WHOLE)
    message = refusal(folder)
    assert f"--pairs_dir {folder}" in message
    assert ("lonely_HE.npy" in message) == (kind == "unpaired only")
    assert ("make-demo" in message) == (kind in ("empty", "unpaired only"))


def test_a_file_that_shrank_after_the_check_is_refused(write_pairs, open_pairs):
    folder = write_pairs()
    opened = open_pairs(folder)
    path = folder / "core_01_HE.npy"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(InputError, match=r"core_01_HE.npy: cannot be read any more"):
        opened.reader.read([PatchPlace(1, 0, 0)])


def test_the_archive_cases_are_what_they_say():
    assert zipfile.is_zipfile(io.BytesIO(MALFORMED["archive"]))
    assert not zipfile.is_zipfile(io.BytesIO(MALFORMED["truncated archive"]))
