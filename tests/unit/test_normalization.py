"""Quantile normalisation: NumPy's quantiles of the training cores alone, inverted exactly, in bounded memory."""

import json
import tracemalloc

import numpy as np
import pytest
import torch

from orion_unet.data import normalization
from orion_unet.data.normalization import Normalization, fit_normalization
from orion_unet.data.patches import PatchPlace, PatchReader
from orion_unet.data.transforms import BatchTransform
from orion_unet.errors import InputError

TRAIN = np.array([0, 2, 3])


def fit(opened, train=TRAIN, method="dataset", transform="linear", **extra):
    return fit_normalization(opened.table, opened.scales, train, method, transform, **extra)


def pixels(folder, core, channels=3):
    """Stored targets of one core, (pixels, C) float64."""
    array = np.load(folder / f"core_{core:02d}_ORION.npy").astype(np.float64)
    return (array if array.shape[2] == channels else array.transpose(1, 2, 0)).reshape(-1, channels)


def write_orion(folder, core, array):
    np.save(folder / f"core_{core:02d}_ORION.npy", array)


@pytest.mark.parametrize("layout", ["hwc", "chw"])
@pytest.mark.parametrize(("dtype", "white"), [("uint8", 255), ("uint16", 65535), (">u2", 65535), ("float32", 1)])
def test_bounds_are_numpys_quantiles_where_the_sample_is_everything(write_pairs, open_pairs, layout, dtype, white):
    folder = write_pairs(orion_layout=layout, orion_dtype=dtype)
    found = fit(open_pairs(folder))
    together = np.concatenate([pixels(folder, core) for core in TRAIN]) / white
    lower, upper = np.quantile(together, [0.01, 0.999], axis=0)
    np.testing.assert_allclose(found.lower, lower, rtol=1e-6)
    np.testing.assert_allclose(found.upper, upper, rtol=1e-6)
    assert found.white == white
    assert found.sampled_cores == 3
    assert found.sampled_pixels == 3 * 48 * 40


def test_a_validation_core_changes_nothing_and_a_training_core_does(write_pairs, open_pairs):
    folder = write_pairs()
    before = fit(open_pairs(folder)).document()
    write_orion(folder, 1, np.full((48, 40, 3), 65535, np.uint16))
    assert fit(open_pairs(folder)).document() == before
    write_orion(folder, 2, np.full((48, 40, 3), 65535, np.uint16))
    assert fit(open_pairs(folder)).document() != before


@pytest.mark.parametrize("method", ["dataset", "core", "none"])
@pytest.mark.parametrize("transform", ["linear", "log1p"])
def test_the_inverse_of_the_target_is_what_was_stored(write_pairs, open_pairs, method, transform):
    folder = write_pairs()
    opened = open_pairs(folder)
    found = fit(opened, method=method, transform=transform)
    reader = PatchReader(opened.table, opened.scales, 32)
    device = torch.device("cpu")
    transformed = BatchTransform(opened.table, reader.formats, found, False, device)
    for core in range(4):
        raw = reader.read([PatchPlace(core, 5, 3)])
        target = transformed(raw, augment=False).target
        back = found.inverse(target, f"core_{core:02d}")[0].numpy()
        stored = raw.orion[0].numpy().astype(np.float64).transpose(2, 0, 1)
        low, high = (bound[:, None, None] * 65535 for bound in found.bounds(f"core_{core:02d}"))
        np.testing.assert_allclose(back, np.clip(stored, low, high), rtol=1e-4, atol=1)
        assert target.min() >= 0
        assert target.max() <= 1


def test_an_empty_channel_becomes_zero_and_is_reported(write_pairs, open_pairs):
    folder = write_pairs()
    for core in range(4):
        array = np.load(folder / f"core_{core:02d}_ORION.npy")
        array[..., 1] = 700
        write_orion(folder, core, array)
    opened = open_pairs(folder, channel_names="DAPI,Blank,CD3")
    for method in ("dataset", "core"):
        found = fit(opened, method=method)
        assert found.empty == ["Blank"]
        assert found.document()["channels"][1]["empty"] is True
        batch = BatchTransform(opened.table, opened.reader.formats, found, False, torch.device("cpu"))(
            opened.reader.read([PatchPlace(0, 0, 0)]), augment=False
        )
        assert batch.target[:, 1].abs().max() == 0
        assert batch.target[:, 0].std() > 0.1
        np.testing.assert_allclose(found.inverse(batch.target)[:, 1].numpy(), 700, rtol=1e-5)


@pytest.fixture
def noisy(write_pairs, open_pairs):
    """Pairs whose channel Blank shows nothing but the noise of a camera."""
    folder, rng = write_pairs(cores=4, size=(200, 300)), np.random.default_rng(1)
    for core in range(4):
        array = np.load(folder / f"core_{core:02d}_ORION.npy")
        array[..., 1] = np.rint(rng.normal(300, 8, array.shape[:2]))
        write_orion(folder, core, array)
    return open_pairs(folder, channel_names="DAPI,Blank,CD3")


@pytest.mark.parametrize("method", ["dataset", "core"])
def test_camera_noise_becomes_zero_with_its_evidence_unless_it_is_kept(noisy, method):
    found = fit(noisy, method=method)
    assert found.empty == found.noise == ["Blank"]
    np.testing.assert_allclose(found.bounds("core_00")[:, 1] * 65535, 300, atol=1)
    seen = found.document()["channels"][1]["evidence"]
    assert seen["noise"] and abs(seen["correlation"]) < 0.05 and seen["bright_pieces"] < 3
    assert seen["sd"] * 65535 == pytest.approx(8, rel=0.05)
    assert Normalization.from_document(found.document()).noise == ["Blank"]

    kept = fit(noisy, method=method, keep=["Blank"])
    assert kept.empty == kept.noise == []
    low, high = kept.bounds("core_00")[:, 1] * 65535
    assert low == pytest.approx(300 - 2.33 * 8, abs=1.5) and high == pytest.approx(300 + 3.09 * 8, abs=3)


def test_fixed_bounds_stay_as_they_are_whatever_a_channel_shows(noisy):
    assert fit(noisy, method="none").empty == []


def test_a_document_without_evidence_is_read(noisy):
    document = fit(noisy).document()
    for channel in document["channels"]:
        del channel["evidence"]
    assert Normalization.from_document(document).noise == []


def test_a_sparse_marker_on_a_clean_background_is_not_empty(write_pairs, open_pairs):
    folder = write_pairs(cores=4, size=(60, 50))
    for core in range(4):
        array = np.zeros((60, 50, 3), np.uint16)
        array[10, 10, 0] = 1000 * (core + 1)
        write_orion(folder, core, array)
    found = fit(open_pairs(folder))
    assert found.empty == ["channel_01", "channel_02"]
    assert found.lower[0] == 0
    np.testing.assert_allclose(found.upper[0] * 65535, np.quantile([1000, 3000, 4000], 0.999), rtol=1e-6)


@pytest.mark.parametrize("layout", ["hwc", "chw"])
@pytest.mark.parametrize("budget", [3, 11, 90, 400])
def test_the_sample_stays_within_its_budget_however_wide_the_cores(
    write_pairs, open_pairs, monkeypatch, layout, budget
):
    monkeypatch.setattr(normalization, "SAMPLED_PIXELS", budget)
    found = fit(open_pairs(write_pairs(orion_layout=layout)))
    assert budget - 2 <= found.sampled_pixels <= budget
    assert np.all((found.lower >= 0) & (found.lower <= found.upper) & (found.upper <= 1))


def test_memory_does_not_grow_with_the_number_of_cores(write_pairs, open_pairs, monkeypatch):
    monkeypatch.setattr(normalization, "SAMPLED_PIXELS", 2_000)
    opened = open_pairs(write_pairs(cores=40, size=(16, 3000), channels=2))
    fit(opened, train=np.arange(2))
    tracemalloc.start()
    fit(opened, train=np.arange(40))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # One row of each core alone would be 40 x 3000 x 2 float32 values, 960 kB.
    assert peak < 400_000


def test_many_channels_share_the_memory(write_pairs, open_pairs, monkeypatch):
    monkeypatch.setattr(normalization, "SAMPLED_VALUES", 3 * 600)
    assert fit(open_pairs(write_pairs())).sampled_pixels == 600


def test_a_part_of_the_pixels_gives_nearly_the_bounds_of_all(write_pairs, open_pairs, monkeypatch):
    # A ramp from top to bottom: rows drawn from strata see all of it.
    folder = write_pairs(size=(400, 100), channels=1)
    ramp = np.linspace(0, 60_000, 400).astype(np.uint16)
    for core in range(4):
        write_orion(folder, core, np.broadcast_to(ramp[:, None, None], (400, 100, 1)))
    monkeypatch.setattr(normalization, "SAMPLED_PIXELS", 3 * 100 * 100)
    found = fit(open_pairs(folder))
    assert found.sampled_pixels == 30_000
    np.testing.assert_allclose(found.lower * 65535, np.quantile(ramp, 0.01), atol=60_000 / 100)
    np.testing.assert_allclose(found.upper * 65535, np.quantile(ramp, 0.999), atol=60_000 / 100)


def test_a_part_of_a_row_is_drawn_from_all_of_its_length(write_pairs, open_pairs, monkeypatch):
    folder = write_pairs(size=(16, 2000), channels=1)
    ramp = np.linspace(0, 60_000, 2000).astype(np.uint16)
    for core in range(4):
        write_orion(folder, core, np.broadcast_to(ramp[:, None], (16, 2000, 1)))
    monkeypatch.setattr(normalization, "SAMPLED_PIXELS", 3 * 200)
    found = fit(open_pairs(folder))
    assert found.sampled_pixels == 600
    np.testing.assert_allclose(found.upper * 65535, np.quantile(ramp, 0.999), rtol=0.01)
    np.testing.assert_allclose(found.lower * 65535, np.quantile(ramp, 0.01), atol=600)


def test_with_method_core_each_core_is_measured_by_itself(write_pairs, open_pairs):
    folder = write_pairs()
    write_orion(folder, 1, np.load(folder / "core_01_ORION.npy") // 10)
    found = fit(open_pairs(folder), method="core")
    for core in range(4):
        expected = np.quantile(pixels(folder, core) / 65535, [0.01, 0.999], axis=0)
        np.testing.assert_allclose(found.bounds(f"core_{core:02d}"), expected, rtol=1e-6)
    together = np.concatenate([pixels(folder, core) for core in TRAIN]) / 65535
    np.testing.assert_allclose(found.bounds("elsewhere"), np.quantile(together, [0.01, 0.999], axis=0), rtol=1e-6)


def test_only_the_kept_channels_are_measured(write_pairs, open_pairs):
    folder = write_pairs()
    whole = fit(open_pairs(folder))
    part = fit(open_pairs(folder, exclude_channels="1"))
    assert part.names == ("channel_00", "channel_02")
    np.testing.assert_array_equal(part.lower, whole.lower[[0, 2]])
    np.testing.assert_array_equal(part.upper, whole.upper[[0, 2]])


def test_mixed_dtypes_are_measured_as_intensities(write_pairs, open_pairs):
    folder = write_pairs()
    plain = fit(open_pairs(folder))
    write_orion(folder, 2, (np.load(folder / "core_02_ORION.npy") // 257).astype(np.uint8))
    mixed = fit(open_pairs(folder))
    np.testing.assert_allclose(mixed.lower, plain.lower, rtol=1e-6)
    np.testing.assert_allclose(mixed.upper, plain.upper, rtol=1e-6)


@pytest.mark.parametrize("method", ["dataset", "core", "none"])
def test_the_document_is_strict_json_and_comes_back_whole(write_pairs, open_pairs, method):
    found = fit(open_pairs(write_pairs(), channel_names="DAPI,CD3ε,Pan-CK"), method=method, transform="log1p")
    document = found.document()
    assert [channel["name"] for channel in document["channels"]] == ["DAPI", "CD3ε", "Pan-CK"]
    back = Normalization.from_document(json.loads(json.dumps(document, allow_nan=False)))
    assert back.document() == document
    np.testing.assert_array_equal(back.bounds("core_01"), found.bounds("core_01"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda document: document.pop("white"),
        lambda document: document.pop("channels"),
        lambda document: document.pop("method"),
        lambda document: document.update(white=None),
        lambda document: document.update(channels=3),
        lambda document: document.update(cores=None),
        lambda document: document["channels"][1].pop("upper"),
        lambda document: document["channels"][1].update(lower="much"),
    ],
)
def test_a_damaged_document_is_refused(write_pairs, open_pairs, damage):
    document = fit(open_pairs(write_pairs())).document()
    Normalization.from_document(document)
    damage(document)
    with pytest.raises(InputError, match="normalisation is damaged"):
        Normalization.from_document(document)


def test_progress_counts_every_core_read(write_pairs, open_pairs):
    calls = []

    def progress(total, text):
        calls.append(total)
        return lambda: calls.append("step")

    fit(open_pairs(write_pairs()), method="core", progress=progress)
    assert calls == [3 + 4] + ["step"] * 7


def test_the_same_cores_give_the_same_numbers(write_pairs, open_pairs, monkeypatch):
    monkeypatch.setattr(normalization, "SAMPLED_PIXELS", 500)
    folder = write_pairs()
    assert fit(open_pairs(folder)).document() == fit(open_pairs(folder)).document()
