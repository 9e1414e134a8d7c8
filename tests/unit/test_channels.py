"""Channel names, excluded channels and channel weights: where they come from, and a message for every mistake."""

import pytest

from orion_unet.config import DataOptions
from orion_unet.data.channels import channel_names, excluded_channels, nuclear_channel, parse_channel_weights
from orion_unet.data.pairs import find_pairs
from orion_unet.errors import InputError

NAMES = ("Hoechst", "CD3e", "Pan-CK", "7")


def test_names_come_from_the_option_then_the_folder_then_the_index(tmp_path):
    assert channel_names(None, tmp_path, 3) == ("channel_00", "channel_01", "channel_02")
    (tmp_path / "channel_names.txt").write_text("A\n\n B \nC\n")
    assert channel_names(None, tmp_path, 3) == ("A", "B", "C")
    assert channel_names("x, y,z", tmp_path, 3) == ("x", "y", "z")


def test_names_may_come_from_a_file(tmp_path):
    file = tmp_path / "panel.txt"
    file.write_bytes("\N{BYTE ORDER MARK}Hoechst\r\nCD3ε, clone 2\r\n".encode())
    assert channel_names(str(file), tmp_path, 2) == ("Hoechst", "CD3ε, clone 2")


def test_a_list_longer_than_a_file_name_may_be_is_a_list(tmp_path):
    names = [f"a_rather_long_marker_name_{index}" for index in range(60)]
    assert channel_names(",".join(names), tmp_path, 60) == tuple(names)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("a,b", "has 2 names, but the ORION files have 3 channels"),
        ("a,b,c,d", "has 4 names"),
        ("panel.txt", "or no such file exists"),
        ("a,b,a", "a"),
        ("a,,c", "empty"),
        ("a,b,", "empty"),
    ],
)
def test_names_that_do_not_fit_are_refused(tmp_path, given, message):
    with pytest.raises(InputError, match="--channel_names") as caught:
        channel_names(given, tmp_path, 3)
    assert message in str(caught.value)


def test_a_names_file_at_fault_is_named(tmp_path):
    (tmp_path / "channel_names.txt").write_text("A\nB\n")
    with pytest.raises(InputError, match=r"channel_names\.txt: has 2 names"):
        channel_names(None, tmp_path, 3)
    (tmp_path / "channel_names.txt").write_bytes(b"\xff\xfe\x00A")
    with pytest.raises(InputError, match=r"channel_names\.txt: cannot be read"):
        channel_names(None, tmp_path, 3)


def test_channels_are_left_out_by_name_or_index_and_a_name_comes_first():
    assert excluded_channels(None, NAMES) == set()
    assert excluded_channels("CD3e, 0", NAMES) == {0, 1}
    assert excluded_channels("7", NAMES) == {3}
    assert excluded_channels("2,Pan-CK,", NAMES) == {2}


@pytest.mark.parametrize(
    ("given", "message"),
    [("CD4,cd3e", "CD4, cd3e"), ("4", "no channel 4"), ("-1", "no channel -1"), ("0,1,2,3", "leaves no channel")],
)
def test_unknown_or_all_channels_cannot_be_excluded(given, message):
    with pytest.raises(InputError, match="--exclude_channels") as caught:
        excluded_channels(given, NAMES)
    assert message in str(caught.value)


def test_a_table_keeps_the_other_channels_in_order(write_pairs):
    folder = write_pairs(channels=4)
    options = DataOptions(
        pairs_dir=str(folder), patch_size=16, channel_names=",".join(NAMES), exclude_channels="Hoechst,2"
    )
    table = find_pairs(options)
    assert table.channel_names == NAMES
    assert table.kept_channels == (1, 3)
    assert table.kept_names == ("CD3e", "7")


def test_weights_are_given_by_name_and_the_others_weigh_one():
    assert parse_channel_weights(None, NAMES) is None
    assert parse_channel_weights("CD3e=4, Pan-CK = 0.5", NAMES) == [1.0, 4.0, 0.5, 1.0]
    assert parse_channel_weights("a=b=2", ("a=b", "c")) == [2.0, 1.0]
    assert parse_channel_weights("Hoechst=0", NAMES) == [0.0, 1.0, 1.0, 1.0]


def test_every_weight_at_fault_is_named_in_one_message():
    with pytest.raises(InputError, match="--channel_weights") as caught:
        parse_channel_weights("CD4=2,CD3e,Hoechst=-1,Pan-CK=nan,7=inf,CD3e=x", NAMES)
    for culprit in ("CD4:", "'CD3e'", "'Hoechst=-1'", "'Pan-CK=nan'", "'7=inf'", "'CD3e=x'"):
        assert culprit in str(caught.value)


def test_weights_may_not_all_be_zero():
    with pytest.raises(InputError, match="all weights are 0"):
        parse_channel_weights("a=0,b=0", ("a", "b"))


@pytest.mark.parametrize(
    ("names", "expected"),
    [(["CD3", "Hoechst1"], 1), (["DAPI-2", "DNA"], 0), (["DNA_1", "DAPI"], 1), (["CD3", "CD4"], None)],
)
def test_the_nuclear_stain_is_known_by_its_name_the_surest_first(names, expected):
    assert nuclear_channel(names) == expected
