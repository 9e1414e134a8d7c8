"""The pixel size goes with the data: from dataset.json into the run, and from the run to what it predicts."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch
from tiny_runs import TINY

from orion_unet.__main__ import dispatch
from orion_unet.cli.arguments import run_command
from orion_unet.config import PredictOptions, TrainConfig
from orion_unet.data.dataset import pixel_size, stated_pixel_size
from orion_unet.demo.make import make_demo
from orion_unet.errors import InputError
from orion_unet.inference.model import load_trained
from orion_unet.inference.predict_files import predict_files
from orion_unet.inference.resampled import ResampledImage, on_model_grid
from orion_unet.slides.images import ArrayImage
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


def smooth(side, seed=0):
    """An H&E without detail finer than eight pixels, so that resampling loses nothing."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.random((1, 3, side // 8, side // 8)).astype(np.float32))
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


def test_evaluate_refuses_pairs_of_another_pixel_size(trained, tmp_path, capsys):
    make_demo(tmp_path / "other", cores=4, size=128, seed=1)
    (tmp_path / "other" / "dataset.json").write_text('{"schema": 1, "pixel_size_um": 0.65, "source": "x"}')
    words = ["evaluate", "--checkpoint", str(trained / "run"), "--pairs_dir", str(tmp_path / "other")]
    assert run_command(dispatch, [*words, "--output_dir", str(tmp_path / "out")]) == 2
    assert "states pixels of 0.65 µm, and the model was trained on 0.325 µm" in capsys.readouterr().err
