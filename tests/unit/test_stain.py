"""The stain of an H&E in numbers, and which images are foreign to a training."""

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from scipy.stats import t

from orion_unet.data.scale import he_image
from orion_unet.data.split import Split
from orion_unet.data.stain import (
    FEATURES,
    NOT_JUDGED,
    OUTSIDE,
    WITHIN,
    StainJudgement,
    StainProfile,
    known_stain,
    measure_stain,
    student_quantile,
)
from orion_unet.errors import InputError
from orion_unet.inference.stain_table import STAIN_FILE, add_stain, read_stain
from orion_unet.registration.stains import STAINS
from orion_unet.slides.images import ArrayImage

VECTORS = np.array(STAINS) / np.linalg.norm(STAINS, axis=1, keepdims=True)


def stained(haematoxylin, eosin):
    """An H&E (H, W, 3) in [0, 1] of these densities (H, W), by the Beer-Lambert law."""
    return np.exp(-(haematoxylin[..., None] * VECTORS[0] + eosin[..., None] * VECTORS[1])).astype(np.float32)


def measured(he):
    found = measure_stain(ArrayImage(Path("he"), lambda: he))
    return None if found is None else dict(zip(FEATURES, [*np.exp(found[:-1]), found[-1]], strict=True))


@pytest.fixture
def tissue():
    """Densities (128, 192): three quarters pale with eosin alone, one quarter nuclei, in blocks of 2 x 2 pixels."""
    rng = np.random.default_rng(0)
    nuclei = np.kron(rng.permuted(np.arange(64 * 96) % 4 == 0).reshape(64, 96), np.ones((2, 2), bool))
    return np.where(nuclei, 1.2, 0.0), np.where(nuclei, 0.0, 0.5)


def test_densities_and_colours_are_those_that_the_image_was_made_of(tissue):
    he = stained(*tissue)
    found = measured(he)
    assert found["haematoxylin"] == pytest.approx(0.3, rel=1e-4)
    assert found["haematoxylin spread"] == pytest.approx(1.2 * math.sqrt(0.25 * 0.75), rel=1e-4)
    assert found["eosin"] == pytest.approx(0.375, rel=1e-4)
    assert found["eosin spread"] == pytest.approx(0.5 * math.sqrt(0.25 * 0.75), rel=1e-4)
    assert found["blue of pale tissue"] == pytest.approx(VECTORS[1, 2] / VECTORS[1].sum(), rel=1e-4)
    assert found["blue of dark tissue"] == pytest.approx(VECTORS[0, 2] / VECTORS[0].sum(), rel=1e-4)
    assert found["brightness"] == pytest.approx(he.mean(), rel=1e-4)


def test_sharpness_falls_with_blur_and_does_not_depend_on_contrast(tissue):
    rng = np.random.default_rng(1)
    density = 0.8 + 0.2 * gaussian_filter(rng.standard_normal((128, 128)), 0.7)
    sharp = measured(stained(density, np.zeros_like(density)))["sharpness"]
    strong = measured(stained(1.5 * density, np.zeros_like(density)))["sharpness"]
    blurred = measured(stained(gaussian_filter(density, 1.0), np.zeros_like(density)))["sharpness"]
    steps = [np.diff(density, axis=axis) for axis in (0, 1)]
    far = [density[4:] - density[:-4], density[:, 4:] - density[:, :-4]]
    near, distant = (sum((part**2).sum() for part in parts) / sum(p.size for p in parts) for parts in (steps, far))
    # Differences across the borders of patches are not counted.
    assert sharp == pytest.approx(near / distant, rel=0.05)
    assert strong == pytest.approx(sharp, rel=1e-3)
    assert blurred < 0.6 * sharp


def test_glass_black_fill_and_the_type_of_the_file_change_nothing(tissue):
    he = stained(*tissue)
    plain = measured(he)
    framed = np.full((384, 320, 3), 0.95, np.float32)
    framed[320:] = 0.0
    # On the grid of patches, so that the same patches are found.
    framed[64:192, 64:256] = he
    assert measured(framed) == pytest.approx(plain, rel=1e-5)
    assert measured(np.rint(he * 65535).astype(np.uint16)) == pytest.approx(plain, rel=1e-3)
    assert measured(np.rint(framed * 255).astype(np.uint8).transpose(2, 0, 1)) == pytest.approx(plain, rel=0.03)


def test_an_image_of_glass_has_no_stain():
    assert measured(np.full((200, 200, 3), 240, np.uint8)) is None


@pytest.mark.parametrize("degrees", [3, 5, 10, 40, 400])
def test_student_quantiles_are_those_of_scipy(degrees):
    assert student_quantile(0.995, degrees) == pytest.approx(t.ppf(0.995, degrees), rel=0.015)


def drawn(rng, groups, of_groups=0.1, cores=2, within=0.05):
    """Correlated features of several cores of each group, and the groups."""
    mix = np.eye(len(FEATURES)) + 0.5
    values = (
        rng.normal(0, of_groups, (groups, 1, len(FEATURES))) + rng.normal(0, within, (groups, cores, len(FEATURES)))
    ) @ mix
    names = tuple(f"patient {group}" for group in range(groups) for _ in range(cores))
    return values.reshape(-1, len(FEATURES)), names


@pytest.mark.parametrize("groups", [4, 6, 12, 40])
def test_images_of_other_patients_stained_alike_are_rarely_called_foreign(groups):
    rng = np.random.default_rng(groups)
    alarms, drawings = 0, 60
    for _ in range(drawings):
        profile = StainProfile(*drawn(rng, groups))
        alarms += sum(profile.judge(values).state == OUTSIDE for values in drawn(rng, 10, cores=1)[0])
    assert alarms <= 0.02 * 10 * drawings


def test_a_foreign_stain_is_named_with_its_number():
    values, groups = drawn(np.random.default_rng(0), 40)
    profile = StainProfile(values, groups)
    usual = np.median(values, axis=0)
    assert profile.judge(usual).state == WITHIN
    usual[2] += 3.0
    found = profile.judge(usual)
    assert found.state == OUTSIDE
    assert found.distance > found.limit == profile.limit
    low, high = np.exp(values[:, 2].min()), np.exp(values[:, 2].max())
    assert f"above all its eosin of {np.exp(usual[2]):.3g}, in the training {low:.3g} to {high:.3g}" in found.sentence()


def test_the_distance_is_the_mahalanobis_distance_where_groups_are_many():
    values, groups = drawn(np.random.default_rng(1), 600, cores=1)
    found = StainProfile(values, groups).judge(values[0] + 0.3)
    off = values[0] + 0.3 - np.median(values, axis=0)
    expected = math.sqrt(off @ np.linalg.inv(np.cov(values.T)) @ off / len(FEATURES))
    assert found.distance == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("groups", [0, 1, 3])
def test_fewer_than_four_groups_judge_nothing(groups):
    found = StainProfile(*drawn(np.random.default_rng(0), groups, cores=9)).judge(np.full(len(FEATURES), 9.0))
    assert found.state == NOT_JUDGED
    assert "too few for a limit (4)" in found.sentence()


def test_cores_that_are_all_alike_leave_room_for_one_per_cent():
    profile = StainProfile(np.ones((8, len(FEATURES))), tuple("abcdefgh"))
    assert profile.judge(np.ones(len(FEATURES))).state == WITHIN
    assert profile.judge(np.full(len(FEATURES), 1.5)).state == OUTSIDE


def test_a_profile_goes_through_a_checkpoint_and_damage_is_noticed():
    profile = StainProfile(*drawn(np.random.default_rng(0), 6))
    document = profile.document()
    again = StainProfile.from_document(document)
    assert again.limit == profile.limit
    for damage in ({"values": [[1.0]]}, {"features": ["hue"]}, {"groups": ["a"]}, {"values": [[math.nan] * 8] * 12}):
        with pytest.raises(InputError, match="the stain of the training is damaged"):
            StainProfile.from_document({**document, **damage})
    with pytest.raises(InputError, match="damaged"):
        StainProfile.from_document(3)


def test_the_cores_of_several_models_count_once():
    values, groups = drawn(np.random.default_rng(0), 6)
    parts = [StainProfile(values[rows], groups[rows]) for rows in (slice(0, 8), slice(4, 12))]
    joined = StainProfile.joined(parts)
    assert joined.groups == groups
    assert joined.limit == StainProfile(values, groups).limit


def test_training_cores_are_measured_once_with_their_groups(write_pairs, open_pairs):
    found = open_pairs(write_pairs("pairs", cores=4, size=(160, 160)))
    split = Split(np.array([0, 2, 3]), np.array([1]), ("a", "b", "c", "c"))
    document = known_stain(found.table, found.scales, split)
    assert document["groups"] == ["a", "c", "c"]
    own = measure_stain(he_image(found.table, found.scales, 2))
    assert document["values"][1] == own.tolist()
    assert known_stain(found.table, found.scales, split) == document


def test_the_table_keeps_a_row_for_each_image(tmp_path):
    profile = StainProfile(*drawn(np.random.default_rng(0), 8))
    inside, outside = profile.judge(np.zeros(len(FEATURES))), profile.judge(np.full(len(FEATURES), 3.0))
    for image, found in (("a, b", inside), ("c", inside), ("d", profile.judge(None)), ("c", outside)):
        add_stain(tmp_path, image, found)
    read = read_stain(tmp_path)
    assert [found.state for found in read.values()] == [WITHIN, OUTSIDE, NOT_JUDGED]
    assert list(read) == ["a, b", "c", "d"]
    assert read["c"].distance == pytest.approx(outside.distance, rel=1e-4)
    assert math.isnan(read["d"].distance)


@pytest.mark.parametrize("content", ["image,path\na,b\n", "a", '"', "\0"])
def test_another_table_of_that_name_is_not_touched(tmp_path, content):
    (tmp_path / STAIN_FILE).write_text(content)
    with pytest.raises(InputError, match="is not a table that predict wrote"):
        add_stain(tmp_path, "a", StainProfile(*drawn(np.random.default_rng(0), 8)).judge(None))
    assert (tmp_path / STAIN_FILE).read_text() == content


def test_processes_that_predict_into_one_folder_keep_each_others_rows(tmp_path):
    found = StainJudgement("within", 1.0, 2.0, "", np.full(len(FEATURES), 0.5))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda at: add_stain(tmp_path, f"image_{at}", found), range(60)))
    assert set(read_stain(tmp_path)) == {f"image_{at}" for at in range(60)}
