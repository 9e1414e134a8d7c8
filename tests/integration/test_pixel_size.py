"""The pixel size goes with the data: from dataset.json into the run, and from the run to what it predicts."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch
from tiny_runs import TINY

import orion_unet
from orion_unet.__main__ import dispatch
from orion_unet.cli.arguments import run_command
from orion_unet.command_options import PredictOptions
from orion_unet.config import TrainConfig
from orion_unet.data.dataset import pixel_size, stated_pixel_size
from orion_unet.demo.make import make_demo
from orion_unet.errors import InputError
from orion_unet.evaluation.scored_folder import FolderOptions, open_folder
from orion_unet.inference.model import load_trained
from orion_unet.inference.predict_files import predict_files
from orion_unet.inference.resampled import ResampledImage, on_model_grid
from orion_unet.slides.images import ArrayImage, level_factor
from orion_unet.slides.tiff import TiffImage
from orion_unet.training.loop import train


def array_image(array):
    return ArrayImage("made_HE.npy", lambda: array, "hwc")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on demo tissue of 0.325 µm, and its folder."""
    folder = tmp_path_factory.mktemp("pixel_size")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        make_demo(folder / "pairs", cores=4, size=128, seed=1)
        options = {**TINY, "pairs_dir": str(folder / "pairs"), "output_dir": str(folder / "run"), "epochs": 1}
        assert train(TrainConfig.from_options(options)) == 0
    return folder


def smooth(side, seed=0, detail=8):
    """An H&E without detail finer than so many pixels, so that resampling loses nothing."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.random((1, 3, side // detail, side // detail)).astype(np.float32))
    fine = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic", align_corners=False)
    return (fine[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a dataset.json of schema 1"),
        ('{"schema": 2, "pixel_size_um": 0.5}', "is not a dataset.json of schema 1"),
        ('{"schema": 1, "pixel_size_um": "0.5"}', "not a number of micrometres"),
        ('{"schema": 1, "pixel_size_um": true}', "not a number of micrometres"),
        ('{"schema": 1, "pixel_size_um": NaN}', "not a number of micrometres"),
        ('{"schema": 1, "pixel_size_um": -0.5}', "microscopes have pixels of"),
        ('{"schema": 1, "pixel_size_um": 325}', "microscopes have pixels of"),
    ],
)
def test_a_dataset_json_that_cannot_be_used_is_refused(content, problem, tmp_path):
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(InputError, match=problem):
        stated_pixel_size(tmp_path)


def test_option_and_file_may_differ_by_rounding_only(tmp_path):
    table = SimpleNamespace(folder=tmp_path, factor=1.0, pixel_size_um=None)
    assert pixel_size(table, None) is None and pixel_size(table, 0.5) == 0.5
    (tmp_path / "dataset.json").write_text('{"schema": 1, "pixel_size_um": 0.325, "source": "x"}')
    assert pixel_size(table, None) == 0.325 and pixel_size(table, 0.3249) == 0.3249
    with pytest.raises(InputError, match=r"--pixel_size_um 0.5 contradicts the 0.325 of .*dataset.json"):
        pixel_size(table, 0.5)
    (tmp_path / "dataset.json").write_text('{"schema": 1, "source": "x"}')
    assert pixel_size(table, None) is None


def test_the_pixel_size_goes_into_run_and_checkpoint(trained):
    config = json.loads((trained / "run" / "config.json").read_text())
    assert config["options"]["pixel_size_um"] == 0.325
    assert load_trained(trained / "run").pixel_size_um == 0.325
    assert "pixel size      0.325 µm" in (trained / "run" / "train.log").read_text()


@pytest.mark.parametrize("factor", [2.0, 0.5, 1.3])
def test_a_blob_stays_where_it_is(factor):
    # A dark blob on white, centred at a point of the tissue; its centre of mass must not move by part of a pixel.
    side, centre = 96, np.array([40.0, 52.5])
    grid = np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="ij"), -1)
    blob = np.exp(-0.5 * ((grid - centre) ** 2).sum(-1) / 8**2)
    he = np.rint(255 * (1 - 0.8 * blob[..., None])).astype(np.uint8).repeat(3, axis=-1)
    image = ResampledImage(array_image(he), 0.5 * factor, 0.5)
    assert image.shape == (round(side * factor),) * 2 and image.pixel_size_um == 0.5
    dark = 1 - image.read(0, 0, *image.shape)[..., 0]
    points = np.stack(np.meshgrid(*[np.arange(size) for size in image.shape], indexing="ij"), -1)
    found = (points * dark[..., None]).sum((0, 1)) / dark.sum()
    np.testing.assert_allclose((found + 0.5) / factor - 0.5, centre, atol=0.05)
    # By region, as a whole.
    np.testing.assert_allclose(image.read(7, 5, 20, 30), image.read(0, 0, *image.shape)[7:27, 5:35], atol=1 / 255)


def test_an_image_of_finer_pixels_is_predicted_on_the_grid_of_the_training(trained, tmp_path, capsys):
    he = smooth(160)
    finer = torch.from_numpy(he.transpose(2, 0, 1).astype(np.float32))[None]
    finer = torch.nn.functional.interpolate(finer, scale_factor=2, mode="bicubic", align_corners=False)
    finer = finer[0].clamp(0, 255).round().byte().permute(1, 2, 0).numpy()
    tifffile.imwrite(tmp_path / "plain.tif", he, tile=(64, 64), photometric="rgb",
                     resolution=(1e4 / 0.325,) * 2, resolutionunit="CENTIMETER")  # fmt: skip
    tifffile.imwrite(tmp_path / "finer.tif", finer, tile=(64, 64), photometric="rgb",
                     resolution=(1e4 / 0.1625,) * 2, resolutionunit="CENTIMETER")  # fmt: skip
    model = load_trained(trained / "run", "cpu")
    options = PredictOptions(format="ome-tiff", dtype="float32", normalized=True, overview=False, tissue_only=False)
    assert predict_files(model, [tmp_path / "plain.tif", tmp_path / "finer.tif"], tmp_path / "out", options) == 0
    said = capsys.readouterr()
    assert "finer: resampled from 0.1625 to the 0.325 µm of the training, 160 x 160 pixels" in said.out + said.err
    plain, resampled = (tifffile.TiffFile(tmp_path / "out" / f"{name}.ome.tiff") for name in ("plain", "finer"))
    one, other = (file.series[0].asarray() for file in (plain, resampled))
    assert one.shape == other.shape == (20, 160, 160)
    # Rounding to 8 bits twice, and the smoothing before the image gets coarser.
    assert np.abs(one - other).mean() < 0.002 and np.abs(one - other).max() < 0.06
    assert 'PhysicalSizeX="0.325"' in resampled.ome_metadata and 'PhysicalSizeX="0.325"' in plain.ome_metadata


def test_of_a_pyramid_only_the_nearest_level_that_is_fine_enough_is_read(trained, tmp_path, monkeypatch):
    he = smooth(512, detail=64)
    half = he.reshape(256, 2, 256, 2, 3).mean((1, 3)).round().astype(np.uint8)
    quarter = he.reshape(128, 4, 128, 4, 3).mean((1, 3)).round().astype(np.uint8)
    kind = {"tile": (64, 64), "photometric": "rgb", "metadata": None}
    for name, levels in (("flat", []), ("pyramid", [half, quarter])):
        with tifffile.TiffWriter(tmp_path / f"{name}.tif") as file:
            file.write(he, resolution=(1e4 / 0.1,) * 2, resolutionunit="CENTIMETER", **kind)
            for level in levels:
                file.write(level, subfiletype=1, **kind)
    read, genuine = {}, TiffImage.stored

    def counted(image, y, x, height, width):
        read.setdefault(image.path.stem, {}).setdefault(image.shape, []).append(height * width)
        return genuine(image, y, x, height, width)

    monkeypatch.setattr(TiffImage, "stored", counted)
    model = load_trained(trained / "run", "cpu")
    options = PredictOptions(normalized=True, overview=False, tissue_only=False)
    assert predict_files(model, [tmp_path / "flat.tif", tmp_path / "pyramid.tif"], tmp_path / "out", options) == 0
    flat, pyramid = (np.load(tmp_path / "out" / f"{name}.npy") for name in ("flat", "pyramid"))
    # 0.1 µm to 0.325: the level of 0.2 µm is fine enough, that of 0.4 is not.
    assert flat.shape == pyramid.shape == (20, 158, 158)
    assert set(read["pyramid"]) == {(256, 256)}
    pixels = {name: sum(map(sum, of.values())) for name, of in read.items()}
    assert pixels["pyramid"] < pixels["flat"] / 3
    # The levels are means of squares, the full resolution is smoothed by a Gaussian.
    assert np.abs(flat - pyramid).mean() < 0.002 and np.abs(flat - pyramid).max() < 0.1


def test_python_predicts_pixels_of_another_size_on_the_grid_of_the_training(trained):
    he = smooth(64)
    finer = he.repeat(2, 0).repeat(2, 1)
    model = orion_unet.load_model(trained / "run", "cpu")
    plain = orion_unet.predict(he, model, normalized=True)
    found = orion_unet.predict(finer, model, normalized=True, pixel_size_um=0.1625)
    assert found.shape == plain.shape == (20, 64, 64)
    assert np.abs(found - plain).mean() < 0.005
    assert np.array_equal(orion_unet.predict(he, model, normalized=True, pixel_size_um=0.325), plain)
    for size, words in ((2.0, "more than a factor of 4"), (-1.0, "no length"), (float("nan"), "no length")):
        with pytest.raises(InputError, match=words):
            orion_unet.predict(he, model, pixel_size_um=size)


@pytest.mark.parametrize(
    ("full", "level", "factor"), [(1000, 250, 4), (1003, 250, 4), (1003, 251, 4), (1000, 300, 10 / 3), (7, 7, 1)]
)
def test_a_level_is_smaller_by_a_whole_number_where_its_side_was_rounded(full, level, factor):
    assert level_factor(full, level) == pytest.approx(factor)


def test_unknown_sizes_are_said_once_and_predicted_as_they_are(trained, tmp_path, capsys):
    np.save(tmp_path / "a_HE.npy", smooth(64))
    model = load_trained(trained / "run", "cpu")
    options = PredictOptions(overview=False)
    assert predict_files(model, [tmp_path / "a_HE.npy"], tmp_path / "out", options) == 0
    said = capsys.readouterr()
    assert (said.out + said.err).count("its pixel size is unknown, and taken to be the 0.325 µm of the training") == 1
    found = np.load(next((tmp_path / "out").glob("a*.npy")))
    assert found.shape == (20, 64, 64)


def test_a_factor_over_four_is_refused(trained):
    image = array_image(smooth(64))
    with pytest.raises(InputError, match=r"its pixels are 1.5 µm wide, those of the training 0.325 µm; more than a"):
        on_model_grid(image, 1.5, 0.325)
    with pytest.raises(InputError, match="more than a factor of 4"):
        on_model_grid(image, 0.08, 0.325)
    # Within 2 %, and where a size is unknown, nothing is resampled.
    for sizes in ((0.33, 0.325), (None, 0.325), (0.325, None)):
        assert on_model_grid(image, *sizes) is image


def test_the_dataset_json_beside_a_pair_states_the_pixel_size_of_its_he(trained, tmp_path, capsys):
    (tmp_path / "pairs").mkdir()
    np.save(tmp_path / "pairs" / "core_HE.npy", smooth(160))
    np.save(tmp_path / "pairs" / "other.npy", smooth(160))
    model, options = load_trained(trained / "run", "cpu"), PredictOptions(format="ome-tiff", overview=False)
    for um, size in ((0.325, 160), (0.65, 320)):
        (tmp_path / "pairs" / "dataset.json").write_text(json.dumps({"schema": 1, "pixel_size_um": um, "source": "x"}))
        assert predict_files(model, [tmp_path / "pairs" / "core_HE.npy"], tmp_path / f"{um}", options) == 0
        assert "its pixel size is unknown" not in capsys.readouterr().out
        with tifffile.TiffFile(tmp_path / f"{um}" / "core.ome.tiff") as file:
            assert file.series[0].shape == (20, size, size)
            assert 'PhysicalSizeX="0.325"' in file.ome_metadata
    # It says nothing of a file that is not of its pairs.
    assert predict_files(model, [tmp_path / "pairs" / "other.npy"], tmp_path / "other", options) == 0
    assert "other: its pixel size is unknown" in capsys.readouterr().out


def pairs_of_pixels(folder, um, he, markers):
    """A folder of one pair whose pixels have this size."""
    folder.mkdir()
    np.save(folder / "new_HE.npy", he)
    np.save(folder / "new_ORION.npy", markers)
    (folder / "dataset.json").write_text(json.dumps({"schema": 1, "pixel_size_um": um, "source": "x"}))
    shutil.copy(folder.parent / "names.txt", folder / "channel_names.txt")
    return folder


def coarser(image, factor=2):
    """An image (H, W, C) of which each pixel is the mean of several."""
    height, width = (side // factor for side in image.shape[:2])
    blocks = image[: height * factor, : width * factor].reshape(height, factor, width, factor, -1)
    return np.rint(blocks.mean(axis=(1, 3))).astype(image.dtype)


def test_evaluate_scores_pairs_of_another_pixel_size_as_they_were_measured(trained, tmp_path, capsys):
    shutil.copy(trained / "pairs" / "channel_names.txt", tmp_path / "names.txt")
    he = smooth(161, detail=23)
    markers = np.random.default_rng(0).integers(0, 60000, (161, 161, 20)).astype(np.uint16)
    fine = pairs_of_pixels(tmp_path / "fine", 0.325, he, markers)
    coarse = pairs_of_pixels(tmp_path / "coarse", 0.65, coarser(he), coarser(markers))
    model = load_trained(trained / "run", "cpu")
    one, other = (open_folder(model, folder, FolderOptions()).region(0) for folder in (fine, coarse))
    assert other.predicted.shape == other.measured.shape == (20, 80, 80)
    expected = one.predicted[:, :160, :160].unflatten(2, (80, 2)).mean(3).unflatten(1, (80, 2)).mean(2)
    # The coarse H&E is rounded to 8 bits and interpolated. The edge is left out: the images end at different places.
    difference = (other.predicted - expected).abs()[:, :-2, :-2]
    assert difference.mean() < 0.006 and difference.quantile(0.99) < 0.04
    # Validation's own steps on the pixels of the pairs, which nothing has touched.
    scales, normalization = open_folder(model, coarse, FolderOptions()).scales, model.normalization
    bounds = np.stack([normalization.lower, normalization.upper])
    told = bounds[1] > bounds[0]
    low, high = bounds[:, told]
    target = (coarser(markers)[..., told] / scales.white("orion", np.dtype("uint16")) - low) / (high - low)
    np.testing.assert_allclose(other.measured.permute(1, 2, 0).numpy()[..., told], target.clip(0, 1), atol=1e-4)
    words = ["evaluate", "--checkpoint", str(trained / "run"), "--pairs_dir", str(coarse), "--split", "all"]
    assert run_command(dispatch, [*words, "--output_dir", str(tmp_path / "out")]) == 0
    assert "pairs have pixels of 0.65 µm and the training had 0.325 µm" in " ".join(capsys.readouterr().out.split())


def test_evaluate_takes_the_folder_of_the_training_as_the_training_did(trained, tmp_path, capsys):
    folder = shutil.copytree(trained / "pairs", tmp_path / "pairs")
    (folder / "dataset.json").unlink()
    options = {**TINY, "pairs_dir": str(folder), "output_dir": str(tmp_path / "run"), "epochs": 1}
    assert train(TrainConfig.from_options({**options, "pixel_size_um": 0.325})) == 0
    # A pixel size written later contradicts that of the training, which counts in its own folder.
    (folder / "dataset.json").write_text('{"schema": 1, "pixel_size_um": 0.65, "source": "x"}')
    model = load_trained(tmp_path / "run", "cpu")
    assert open_folder(model, folder, FolderOptions()).pixel_size_um == 0.325
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert open_folder(model, tmp_path / "elsewhere", FolderOptions()).pixel_size_um == 0.65


def test_cores_of_the_training_at_another_pixel_size_are_known_by_their_names(trained, tmp_path):
    model = load_trained(trained / "run", "cpu")
    finer = tmp_path / "finer"
    finer.mkdir()
    shutil.copy(trained / "pairs" / "channel_names.txt", finer)
    for path in (trained / "pairs").glob("*.npy"):
        image = np.load(path)
        axes = (0, 1) if image.shape[2] in (3, 20) else (1, 2)
        np.save(finer / path.name, image.repeat(2, axes[0]).repeat(2, axes[1]))
    (finer / "dataset.json").write_text('{"schema": 1, "pixel_size_um": 0.1625, "source": "x"}')
    same, other = (open_folder(model, folder, FolderOptions()) for folder in (trained / "pairs", finer))
    assert other.known.train.tolist() == same.known.train.tolist() != []
    assert other.known.val.tolist() == same.known.val.tolist()
    assert any("have other pixels than the training and the names of cores" in text for text in other.warnings)
    # The stain is judged on the pixels of the training.
    assert other.he_for_model(0).shape == same.he(0).shape


def test_evaluate_refuses_pixels_more_than_a_factor_of_4_apart(trained, tmp_path, capsys):
    shutil.copy(trained / "pairs" / "channel_names.txt", tmp_path / "names.txt")
    other = pairs_of_pixels(tmp_path / "other", 1.5, smooth(64), np.ones((64, 64, 20), np.uint16))
    words = ["evaluate", "--checkpoint", str(trained / "run"), "--pairs_dir", str(other)]
    assert run_command(dispatch, [*words, "--output_dir", str(tmp_path / "out")]) == 2
    assert "state pixels of 1.5 µm, and the model was trained on 0.325 µm; more than a fact" in capsys.readouterr().err


@pytest.mark.parametrize("factor", [0.5, 1.3, 2.0])
def test_what_was_predicted_comes_back_to_the_place_it_was_predicted_for(factor):
    side, centre = 97, np.array([40.0, 52.5])
    image = ResampledImage(array_image(np.full((side, side, 3), 255, np.uint8)), 0.5 * factor, 0.5)
    points = np.stack(np.meshgrid(*[np.arange(size) for size in image.shape], indexing="ij"), -1)
    there = (centre + 0.5) * factor - 0.5
    blob = np.exp(-0.5 * ((points - there) ** 2).sum(-1) / (8 * factor) ** 2).astype(np.float32)
    back = image.back(torch.from_numpy(blob)[None])[0].numpy()
    assert back.shape == (side, side)
    grid = np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="ij"), -1)
    np.testing.assert_allclose((grid * back[..., None]).sum((0, 1)) / back.sum(), centre, atol=0.02)
    np.testing.assert_allclose(back, np.exp(-0.5 * ((grid - centre) ** 2).sum(-1) / 8**2), atol=0.02)
