"""slide_files.csv: paths that survive a move, slides known by their content, and those opened once."""

import shutil

import numpy as np
import pytest

from orion_unet.data import file_states, slide_files
from orion_unet.data.slide_files import PIECE_BYTES, PIECES, content_state, open_slide, slide_file, write_slide_files
from orion_unet.errors import InputError


@pytest.fixture
def folder(tmp_path):
    """A folder of pairs with the slides A, beside it, and B, elsewhere."""
    rng = np.random.default_rng(0)
    for place in ("study/slides", "study/pairs", "archive"):
        (tmp_path / place).mkdir(parents=True)
    named = []
    for name, place in (("A", "study/slides"), ("B", "archive")):
        paths = [tmp_path / place / f"{name}_{kind}.npy" for kind in ("he", "orion")]
        np.save(paths[0], rng.integers(0, 256, (40, 50, 3), np.uint8))
        np.save(paths[1], rng.integers(0, 999, (2, 40, 50)).astype(np.uint16))
        named.append((name, *paths))
    write_slide_files(tmp_path / "study" / "pairs", named)
    return tmp_path / "study" / "pairs"


def test_slides_beside_the_folder_move_with_it_and_others_have_absolute_paths(folder, tmp_path):
    (tmp_path / "study").rename(tmp_path / "moved")
    moved = tmp_path / "moved" / "pairs"
    for name, place in (("A", tmp_path / "moved" / "slides"), ("B", tmp_path / "archive")):
        assert slide_file(moved, name, "he").path.resolve() == place / f"{name}_he.npy"
        assert open_slide(slide_file(moved, name, "he"), "he").shape == (40, 50)


def test_slides_that_are_not_prepared_again_stay_listed(folder, tmp_path):
    before = slide_file(folder, "A", "orion")
    np.save(tmp_path / "archive" / "B_he.npy", np.zeros((30, 30, 3), np.uint8))
    write_slide_files(folder, [("B", tmp_path / "archive" / "B_he.npy", tmp_path / "archive" / "B_orion.npy")])
    assert slide_file(folder, "A", "orion") == before
    assert open_slide(slide_file(folder, "B", "he"), "he").shape == (30, 30)


def test_a_copy_is_the_same_slide_and_a_changed_one_is_not(tmp_path):
    large = tmp_path / "large"
    large.write_bytes(np.random.default_rng(0).bytes(2 * PIECES * PIECE_BYTES))
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    for name in ("one", "inner/two"):
        (tmp_path / "folder" / name).write_text(name)
    (tmp_path / "small").write_bytes(b"slide")
    for name in ("large", "folder", "small"):
        copy = tmp_path / f"{name}_copy"
        (shutil.copytree if name == "folder" else shutil.copyfile)(tmp_path / name, copy)
        assert content_state(copy) == content_state(tmp_path / name)
    state = content_state(tmp_path / "folder")
    (tmp_path / "folder" / "one").rename(tmp_path / "folder" / "three")
    assert content_state(tmp_path / "folder")[0] == state[0] and content_state(tmp_path / "folder") != state
    state = content_state(tmp_path / "small")
    (tmp_path / "small").write_bytes(b"slidE")
    assert content_state(tmp_path / "small") != state
    state = content_state(large)
    content = large.read_bytes()
    large.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert content_state(large) != state


def test_an_open_slide_is_shared_and_one_that_has_changed_meanwhile_is_refused(folder, monkeypatch):
    monkeypatch.setattr(slide_files, "_OPEN", type(slide_files._OPEN)())
    file = slide_file(folder, "A", "he")
    assert open_slide(file, "he") is open_slide(slide_file(folder, "A", "he"), "he")
    np.save(file.path, np.zeros((40, 50, 3), np.uint8))
    monkeypatch.setattr(file_states, "_RECENT", {})
    with pytest.raises(InputError, match=r"slide A: .*A_he\.npy is not the file that the pairs were made from"):
        open_slide(file, "he")
