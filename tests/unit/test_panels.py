"""Panels that differ: markers are read, normalised and fitted from the cores that have them; bad panels are refused."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pair_formats import rewrite
from panel_files import write_panels

from orion_unet.config import DataOptions
from orion_unet.data.camera_noise import look_for_noise
from orion_unet.data.colour_regression import NormalEquations, fit_colour_regression, held_out_correlations
from orion_unet.data.normalization import fit_normalization
from orion_unet.data.packing import pack
from orion_unet.data.pairs import find_pairs
from orion_unet.data.patches import PatchPlace
from orion_unet.data.split import Split
from orion_unet.data.transforms import BatchTransform
from orion_unet.errors import InputError
from orion_unet.quantification.sources import measured_channels
from orion_unet.training.prepare import check_markers, panels_digest

NAMES = ("Hoechst", "CD3", "CD8", "CD20")
PANELS = {"a": ("CD8", "Hoechst", "CD3"), "b": ("CD20", "Hoechst")}
# In the order of the alphabetically first panel, then what the other adds.
UNION = ("CD8", "Hoechst", "CD3", "CD20")
OF_CORE = "abba"
CPU = torch.device("cpu")


def keep_panels(folder, panels=PANELS, of_core=OF_CORE):
    """Leave in every core of a folder only the markers of its panel, in the panel's order."""
    for core, panel in enumerate(of_core):
        path = folder / f"core_{core:02d}_ORION.npy"
        stored = np.load(path)
        columns = [NAMES.index(name) for name in panels[panel]]
        np.save(path, np.take(stored, columns, axis=list(stored.shape).index(len(NAMES))))
    write_panels(folder, panels, of_core)
    return folder


def transform_of(opened, normalization):
    return BatchTransform(opened.table, opened.reader.formats, normalization, True, CPU)


@pytest.fixture
def complete(write_pairs):
    """Four cores of which every marker was measured."""
    folder = write_pairs("complete", channels=4)
    (folder / "channel_names.txt").write_text("\n".join(UNION))
    for path in folder.glob("*_ORION.npy"):
        np.save(path, np.load(path)[..., [NAMES.index(name) for name in UNION]])
    return folder


@pytest.mark.parametrize("form", ["hwc", "chw", "zstd", "mixed dtypes"])
def test_a_batch_has_every_marker_in_its_place_and_says_which_were_measured(write_pairs, open_pairs, complete, form):
    folder = keep_panels(write_pairs(channels=4, orion_layout="chw" if form == "chw" else "hwc"))
    if form == "zstd":
        tiled = rewrite(folder, folder.with_name("tiled"), "zstd", keep_npy=("core_03",))
        write_panels(tiled, PANELS, OF_CORE)
        folder = tiled
    if form == "mixed dtypes":
        path = folder / "core_01_ORION.npy"
        np.save(path, (np.load(path) / 65535).astype(np.float32))
    opened, reference = open_pairs(folder), open_pairs(complete)
    assert opened.table.channel_names == opened.table.kept_names == UNION
    normalization = fit_normalization(reference.table, reference.scales, np.arange(4), "dataset", "linear")
    places = [PatchPlace(core, 3 + core, 20 - core) for core in (0, 1, 2, 3)]
    made, expected = (
        transform_of(each, normalization)(each.reader.read(places), augment=False) for each in (opened, reference)
    )
    measured = torch.tensor([[name in PANELS[panel] for name in UNION] for panel in OF_CORE])
    assert torch.equal(made.measured, measured)
    assert expected.measured is None
    torch.testing.assert_close(made.target, expected.target * measured[:, :, None, None], atol=1e-6, rtol=0)
    assert torch.equal(made.he, expected.he)


def test_excluded_markers_are_neither_read_nor_counted(write_pairs, open_pairs):
    opened = open_pairs(keep_panels(write_pairs(channels=4)), exclude_channels="CD20,CD8")
    assert opened.table.kept_names == ("Hoechst", "CD3")
    assert opened.table.measured.tolist() == [[True, panel == "a"] for panel in OF_CORE]
    # What is left was measured everywhere: then there is no mask.
    assert open_pairs(opened.table.folder, exclude_channels="CD20,CD8,CD3").table.measured is None


def test_panels_that_do_not_differ_are_no_panels(complete, open_pairs):
    before = open_pairs(complete).table
    write_panels(complete, {"all": UNION}, ["all"] * 4)
    table = open_pairs(complete).table
    assert table.panels is None and table.measured is None
    assert table.channel_names == before.channel_names
    assert panels_digest(table, Split(np.array([0, 1]), np.array([2, 3]), ())) is None


def test_channel_names_decide_the_order_and_other_orders_are_read_right(write_pairs, open_pairs):
    """Every core has every marker, in another order: nothing is masked, and every marker is in its place."""
    panels = {"a": NAMES, "b": NAMES[::-1]}
    folder = keep_panels(write_pairs(channels=4), panels)
    (folder / "channel_names.txt").write_text("\n".join(sorted(NAMES)))
    opened, plain = open_pairs(folder), open_pairs(write_pairs("plain", channels=4))
    assert opened.table.channel_names == tuple(sorted(NAMES))
    assert opened.table.measured is None
    places = [PatchPlace(core, 0, 0) for core in range(4)]
    columns = [NAMES.index(name) for name in sorted(NAMES)]
    assert torch.equal(opened.reader.read(places).orion, plain.reader.read(places).orion[..., columns])


@pytest.mark.parametrize("method", ["dataset", "core"])
def test_bounds_are_the_quantiles_of_the_cores_in_which_the_marker_was_measured(
    write_pairs, open_pairs, complete, method
):
    opened = open_pairs(keep_panels(write_pairs(channels=4)))
    train = np.array([0, 1, 3])
    found = fit_normalization(opened.table, opened.scales, train, method, "linear")
    for channel, name in enumerate(UNION):
        cores = [core for core in train if name in PANELS[OF_CORE[core]]]
        values = np.concatenate(
            [np.load(complete / f"core_{core:02d}_ORION.npy")[..., channel].ravel() for core in cores]
        )
        expected = np.quantile(values / 65535, [0.01, 0.999])
        assert (found.lower[channel], found.upper[channel]) == pytest.approx(tuple(expected), rel=1e-6)
        target = np.clip((values / 65535 - expected[0]) / (expected[1] - expected[0]), 0, 1)
        assert found.target_mean[channel] == pytest.approx(target.mean(), rel=1e-5)
        if method == "core":
            own = np.load(complete / "core_02_ORION.npy")[..., channel] / 65535
            bounds = np.quantile(own, [0.01, 0.999]) if name in PANELS["b"] else expected
            assert found.per_core["core_02"][:, channel] == pytest.approx(bounds, rel=1e-6)


def test_a_marker_is_camera_noise_by_the_cores_that_have_it(write_pairs, open_pairs):
    folder = write_pairs(channels=4, size=(96, 96))
    rng = np.random.default_rng(0)
    for core in range(4):
        path = folder / f"core_{core:02d}_ORION.npy"
        stored = np.load(path)
        stored[..., NAMES.index("CD20")] = rng.normal(300, 12, stored.shape[:2])
        np.save(path, stored)
    opened = open_pairs(keep_panels(folder))
    found = fit_normalization(opened.table, opened.scales, np.arange(4), "dataset", "linear")
    assert found.noise == ["CD20"]


def test_a_core_without_a_marker_adds_nothing_to_the_evidence_on_it():
    rows = np.random.default_rng(0).normal(0.1, 0.002, (2, 30, 64)).astype(np.float32)
    both = look_for_noise(rows)
    absent = look_for_noise(rows[:1] * 2).placed(np.array([True, False]))
    assert both.joined(absent).record(1) == absent.joined(both).record(1) == both.record(1)
    assert absent.joined(both).record(0)["sd"] > both.record(0)["sd"]


def test_the_baselines_of_a_marker_are_fitted_to_the_cores_that_have_it(write_pairs, open_pairs):
    opened = open_pairs(keep_panels(write_pairs(channels=4)))
    train = np.arange(4)
    normalization = fit_normalization(opened.table, opened.scales, train, "dataset", "linear")
    transform = BatchTransform(opened.table, opened.reader.formats, normalization, False, CPU)
    found = fit_colour_regression(opened.table, opened.scales, transform, train, 16)
    for channel, name in enumerate(UNION):
        cores = [core for core in train.tolist() if name in PANELS[OF_CORE[core]]]
        equations = NormalEquations(1)
        for core in cores:
            for y in (0, 16, 32):
                for x in (0, 16, 24):
                    batch = transform(opened.reader.read([PatchPlace(core, y, x)]), augment=False)
                    equations.add(batch.he[0], batch.target[0, [channel]])
        assert found.mean[channel] == pytest.approx(equations.mean()[0], rel=1e-9)
        assert found.coefficients[:, channel] == pytest.approx(equations.solve()[:, 0], abs=1e-8)
    places = np.array([[core, 8, 8] for core in range(4)])
    options = DataOptions(pairs_dir=str(opened.table.folder), patch_size=16, noise_removal=False)
    reached = held_out_correlations(found, opened.table, opened.scales, normalization, places, options)
    batch = transform(opened.reader.read([PatchPlace(*place) for place in places[[1, 2]].tolist()]), augment=False)
    made = torch.stack([found.predict(he) for he in batch.he])
    expected = np.corrcoef(made[:, 3].ravel(), batch.target[:, 3].ravel())[0, 1]
    assert reached["CD20"] == pytest.approx(expected, abs=1e-5)
    only_a = held_out_correlations(found, opened.table, opened.scales, normalization, places[[0, 3]], options)
    assert only_a["CD20"] is None and only_a["CD3"] is not None


def refusal(folder):
    with pytest.raises(InputError) as caught:
        find_pairs(DataOptions(pairs_dir=str(folder), patch_size=16))
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: (f / "panels.csv").write_text("core,panel\ncore_00,a\n"), "core_03: has no row"),
        (lambda f: (f / "panels.csv").open("a").write("\nghost,a"), "ghost: is not among the pairs"),
        (lambda f: (f / "panels.csv").open("a").write("\ncore_00,b"), "core_00: is in two panels, a and b"),
        (lambda f: (f / "panels.csv").write_text("core,group\n"), "needs a header line core,panel"),
        (lambda f: (f / "panel_b.txt").unlink(), "panel_b.txt: is missing"),
        (lambda f: (f / "panel_b.txt").write_text("\n"), "panel_b.txt: names no marker"),
        (lambda f: (f / "panel_b.txt").write_text("CD20\nCD20"), "duplicate or empty: ['CD20']"),
        (
            lambda f: (f / "panel_b.txt").write_text("CD20"),
            "core_01_ORION.npy: has 2 channels, but panel_b.txt names 1",
        ),
        (lambda f: (f / "channel_names.txt").write_text("\n".join([*NAMES, "CD99"])), "CD99: is listed, but no panel"),
        (
            lambda f: (f / "channel_names.txt").write_text("\n".join(NAMES[:3])),
            "CD20: is measured by panel_b.txt, but not",
        ),
        (lambda f: write_panels(f, {}, ["../a", "b", "b", "b"]), "usable as part of a file name"),
    ],
)
def test_panels_that_contradict_the_folder_are_refused_by_name(write_pairs, change, words):
    folder = keep_panels(write_pairs(channels=4))
    change(folder)
    assert words in refusal(folder)


def test_without_panels_csv_another_number_of_channels_is_refused_and_panel_files_are_pointed_out(write_pairs):
    folder = keep_panels(write_pairs(channels=4))
    (folder / "panels.csv").unlink()
    assert "say so in panels.csv" in refusal(folder)
    plain = write_pairs("plain")
    (plain / "panel_a.txt").write_text("x")
    assert (
        "without panels.csv, panel_a.txt have no effect"
        in find_pairs(DataOptions(pairs_dir=str(plain), patch_size=16)).warnings
    )


def test_a_marker_needs_a_training_core_and_without_a_validation_core_there_is_a_warning(write_pairs, open_pairs):
    table = open_pairs(keep_panels(write_pairs(channels=4))).table

    def split(train, val):
        return Split(np.array(train), np.array(val), ())

    assert check_markers(table, split([0, 1], [2, 3])) == []
    with pytest.raises(InputError, match=r'measured in no training core.*: CD20\..*--exclude_channels "CD20"'):
        check_markers(table, split([0, 3], [1, 2]))
    (warning,) = check_markers(table, split([0, 1, 2], [3]))
    assert warning.startswith("measured in no validation core") and "CD20" in warning
    bare = open_pairs(table.folder, exclude_channels="Hoechst,CD20").table
    with pytest.raises(InputError, match="none of the markers that are trained on:\n  - core_01\n  - core_02"):
        check_markers(bare, split([0, 1], [2, 3]))


def test_the_digest_follows_what_was_measured_in_the_cores_of_the_split_alone(write_pairs, open_pairs):
    folder = keep_panels(write_pairs(channels=4))
    split = Split(np.array([0, 1]), np.array([2]), ())
    before = panels_digest(open_pairs(folder).table, split)
    write_panels(folder, {**PANELS, "c": PANELS["a"]}, "abbc")
    assert panels_digest(open_pairs(folder).table, split) == before
    write_panels(folder, {**PANELS, "b": PANELS["b"][::-1]}, OF_CORE)
    assert panels_digest(open_pairs(folder).table, split) != before


def test_packing_carries_the_panels_and_each_cores_own_channels(write_pairs, open_pairs):
    folder = keep_panels(write_pairs(channels=4, orion_layout="chw"))
    options = DataOptions(pairs_dir=str(folder), patch_size=16)
    pack(options, folder.with_name("packed"))
    packed, plain = open_pairs(folder.with_name("packed")), open_pairs(folder)
    assert packed.table.channel_names == UNION
    places = [PatchPlace(core, 5, 6) for core in range(4)]
    assert torch.equal(packed.reader.read(places).orion, plain.reader.read(places).orion.permute(0, 2, 3, 1))


def test_quantify_knows_the_measured_channels_of_a_core_by_its_panel(write_pairs):
    folder = keep_panels(write_pairs(channels=4))
    core = SimpleNamespace(path=folder / "core_01_ORION.npy", channel_names=(), shape=(2, 48, 40))
    assert measured_channels(core, UNION) == [(1, 1), (3, 0)]
    core.path = folder / "core_00_ORION.npy"
    with pytest.raises(InputError, match=r"has 2 channels, but its panel by .*panels.csv has 3 markers"):
        measured_channels(core, UNION)
