"""The split: no tissue on both sides, as near to val_split as whole groups allow, the same for the same seed."""

import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orion_unet.config import DataOptions
from orion_unet.data.pairs import RECORD, PairTable, find_pairs
from orion_unet.data.split import make_split
from orion_unet.errors import InputError


def table_of(cores, folder=Path("/nowhere")):
    names = np.array([f"core_{index:03d}" for index in range(cores)])
    return PairTable(folder, names, np.zeros(cores, RECORD), np.zeros(cores, RECORD), ("a",), (0,))


def write_groups(path, groups):
    with open(path, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["core", "group"])
        rows.writerows((f"core_{index:03d}", group) for index, group in enumerate(groups))


@given(cores=st.integers(2, 300), val_split=st.floats(0.01, 0.99), seed=st.integers(0, 2**63 - 1))
def test_cores_are_parted_as_near_to_the_fraction_as_whole_cores_allow(cores, val_split, seed):
    split, _ = make_split(table_of(cores), DataOptions(val_split=val_split), seed)
    assert sorted([*split.train.tolist(), *split.val.tolist()]) == list(range(cores))
    wanted = min(max(val_split * cores, 1), cores - 1)
    assert abs(len(split.val) - wanted) <= 0.5 + 1e-9
    again, _ = make_split(table_of(cores), DataOptions(val_split=val_split), seed)
    assert again.val.tolist() == split.val.tolist()


@settings(max_examples=150)
@given(
    groups=st.lists(st.sampled_from("ABCDEFGH"), min_size=2, max_size=60).filter(lambda g: len(set(g)) > 1),
    val_split=st.floats(0.05, 0.95),
    seed=st.integers(0, 2**63 - 1),
)
def test_a_group_is_never_on_both_sides(tmp_path_factory, groups, val_split, seed):
    folder = tmp_path_factory.mktemp("groups")
    write_groups(folder / "groups.csv", groups)
    split, warnings = make_split(table_of(len(groups), folder), DataOptions(val_split=val_split), seed)
    train, val = ({groups[core] for core in side} for side in (split.train.tolist(), split.val.tolist()))
    assert train
    assert val
    assert not train & val
    assert train | val == set(groups)
    sizes = sorted(Counter(groups).values())
    wanted = min(max(val_split * len(groups), sizes[0]), len(groups) - sizes[0])
    assert abs(len(split.val) - wanted) <= sizes[-1]
    assert bool(warnings) == (abs(len(split.val) / len(groups) - val_split) > 0.1)


def test_another_seed_holds_out_other_cores():
    held = {tuple(make_split(table_of(40), DataOptions(), seed)[0].val.tolist()) for seed in range(20)}
    assert len(held) > 15


def test_every_core_is_held_out_about_equally_often():
    counts = np.zeros(10)
    for seed in range(400):
        counts[make_split(table_of(10), DataOptions(val_split=0.3), seed)[0].val] += 1
    # 400 draws of probability 0.3: mean 120, standard deviation 9.2.
    assert np.abs(counts - 120).max() < 5 * 9.2


def test_the_groups_csv_given_wins_over_the_folder_and_may_come_from_a_spreadsheet(tmp_path):
    write_groups(tmp_path / "groups.csv", "AABB")
    given_file = tmp_path / "mine.csv"
    text = "core, slide, group\ncore_000, x, P\ncore_001, x, Q\ncore_002, x, P\ncore_003, x, Q\ncore_999, x, R\n,,\n"
    given_file.write_text("\N{BYTE ORDER MARK}" + text, encoding="utf-8")
    split, _ = make_split(table_of(4, tmp_path), DataOptions(val_split=0.5, groups_csv=str(given_file)), 0)
    assert split.groups == ("P", "Q", "P", "Q")
    assert split.val.tolist() in ([0, 2], [1, 3])
    assert make_split(table_of(4, tmp_path), DataOptions(val_split=0.5), 0)[0].groups == ("A", "A", "B", "B")


@pytest.mark.parametrize(
    ("content", "culprits"),
    [
        (b"", ["core,group"]),
        (b"core,group\n", ["core,group"]),
        (b"name,patient\ncore_000,A\n", ["core,group"]),
        (b"\xff\xfe\x00\x01", ["cannot be read"]),
        (b"core,group\ncore_000,A\ncore_001,B\n", ["core_002: has no row", "core_003: has no row"]),
        (
            b"core,group\ncore_000,A\ncore_000,B\ncore_001,\ncore_002,A\ncore_003\n",
            ["core_000: is in two groups, A and B", "core_001: has no group", "core_003: has no group"],
        ),
    ],
)
def test_a_groups_csv_at_fault_names_every_core(tmp_path, content, culprits):
    (tmp_path / "groups.csv").write_bytes(content)
    with pytest.raises(InputError, match=r"groups\.csv") as caught:
        make_split(table_of(4, tmp_path), DataOptions(), 0)
    for culprit in culprits:
        assert culprit in str(caught.value)


def test_a_missing_groups_csv_is_named(tmp_path):
    with pytest.raises(InputError, match=r"gone\.csv: cannot be read"):
        make_split(table_of(4), DataOptions(groups_csv=str(tmp_path / "gone.csv")), 0)


def test_one_core_or_one_group_cannot_be_split(tmp_path):
    with pytest.raises(InputError, match="only one core"):
        make_split(table_of(1), DataOptions(), 0)
    write_groups(tmp_path / "groups.csv", "AAAA")
    with pytest.raises(InputError, match="only one group"):
        make_split(table_of(4, tmp_path), DataOptions(), 0)


def test_a_split_file_gives_the_same_split_whatever_seed_and_fraction(write_pairs, tmp_path):
    folder = write_pairs(cores=7)
    write = dict(zip([f"core_{i:02d}" for i in range(7)], "AABBCCD", strict=True))
    (folder / "groups.csv").write_text("core,group\n" + "".join(f"{c},{g}\n" for c, g in write.items()))
    options = DataOptions(pairs_dir=str(folder), patch_size=16)
    table = find_pairs(options)
    split, _ = make_split(table, options, 5)
    document = split.document(table)
    assert {row["core"]: row["group"] for side in ("train", "val") for row in document[side]} == write
    file = tmp_path / "split.json"
    file.write_text(json.dumps(document, allow_nan=False))
    reused = DataOptions(pairs_dir=str(folder), patch_size=16, split_file=str(file), val_split=0.9)
    again, warnings = make_split(table, reused, 99)
    assert again.train.tolist() == split.train.tolist()
    assert again.val.tolist() == split.val.tolist()
    assert warnings == []
    resumed, _ = make_split(table, DataOptions(val_split=0.9), 99, earlier=document)
    assert resumed.document(table) == document


def sides(train, val):
    return {side: [{"core": core} for core in cores] for side, cores in (("train", train), ("val", val))}


def test_cores_a_split_file_does_not_know_are_left_out_and_named(tmp_path):
    file = tmp_path / "split.json"
    file.write_text(json.dumps(sides(["core_003"], ["core_000"])))
    split, (warning,) = make_split(table_of(5), DataOptions(split_file=str(file)), 0)
    assert split.train.tolist() == [3]
    assert split.val.tolist() == [0]
    for core in ("core_001", "core_002", "core_004"):
        assert core in warning


@pytest.mark.parametrize(
    ("content", "culprits"),
    [
        ("", ["is not the split.json"]),
        ("[" * 50_000, ["is not the split.json"]),
        ("[]", ["is not the split.json"]),
        ('{"train": []}', ["is not the split.json"]),
        ('{"train": "core_000", "val": ["core_001"]}', ["is not the split.json"]),
        (json.dumps(sides([], ["core_000"])), ["no core on the train side"]),
        (json.dumps(sides(["core_000"], [])), ["no core on the val side"]),
        (json.dumps(sides(["core_000", "core_001"], ["core_001"])), ["core_001: is on both sides"]),
        (json.dumps(sides(["core_000", "x"], ["core_001", "y"])), ["x: is not among", "y: is not among"]),
        (json.dumps(sides(["core_000"], ["core_001"])), ["group A: is on both sides"]),
    ],
)
def test_a_bad_split_file_is_refused(tmp_path, content, culprits):
    write_groups(tmp_path / "groups.csv", "AAB")
    file = tmp_path / "split.json"
    file.write_text(content)
    with pytest.raises(InputError, match=f"--split_file {file}") as caught:
        make_split(table_of(3, tmp_path), DataOptions(split_file=str(file)), 0)
    for culprit in culprits:
        assert culprit in str(caught.value)


def test_a_missing_split_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"--split_file .*gone\.json: cannot be read"):
        make_split(table_of(3), DataOptions(split_file=str(tmp_path / "gone.json")), 0)


@given(
    groups=st.lists(st.sampled_from("ABCDEFGHIJ"), min_size=3, max_size=60).filter(lambda g: len(set(g)) > 2),
    count=st.integers(2, 5),
    seed=st.integers(0, 2**63 - 1),
)
def test_folds_hold_out_every_group_once_in_parts_of_like_size(tmp_path_factory, groups, count, seed):
    folder = tmp_path_factory.mktemp("folds")
    write_groups(folder / "groups.csv", groups)
    count = min(count, len(set(groups)))
    held = []
    for number in range(1, count + 1):
        split, _ = make_split(table_of(len(groups), folder), DataOptions(fold=f"{number}/{count}"), seed)
        assert sorted([*split.train.tolist(), *split.val.tolist()]) == list(range(len(groups)))
        assert not {groups[core] for core in split.train} & {groups[core] for core in split.val}
        held.append(split.val.tolist())
    assert sorted(core for cores in held for core in cores) == list(range(len(groups)))
    sizes = [len(cores) for cores in held]
    # Each group joined the smallest part, so no part is ahead by more than its last group.
    assert max(sizes) - min(sizes) <= max(Counter(groups).values())


def test_another_seed_makes_other_folds_and_the_same_seed_the_same():
    held = [tuple(make_split(table_of(12), DataOptions(fold="1/3"), seed)[0].val.tolist()) for seed in (0, 0, 1, 2)]
    assert held[0] == held[1]
    assert len(set(held)) == 3


def test_more_folds_than_groups_are_refused_in_one_sentence(tmp_path):
    write_groups(tmp_path / "groups.csv", "AABBCC")
    with pytest.raises(InputError, match="4 folds need at least 4 groups, and there are 3; ask for fewer folds"):
        make_split(table_of(6, tmp_path), DataOptions(fold="1/4"), 0)
