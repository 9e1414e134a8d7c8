"""python -m orion_unet quantify: images in, one row a cell out."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from orion_unet.__main__ import dispatch
from orion_unet.cli.arguments import run_command
from orion_unet.data.normalization import LOG_CURVATURE
from orion_unet.data.stain import FEATURES, StainJudgement
from orion_unet.data.zarr_writing import write_zarr
from orion_unet.inference.ome_tiff import write_ome_tiff
from orion_unet.inference.stain_table import add_stain
from orion_unet.inference.trust import MarkerTrust
from orion_unet.inference.verdict_table import verdicts_file

pytest.importorskip("skimage")
pytest.importorskip("imagecodecs")
from skimage.measure import regionprops
from skimage.segmentation import expand_labels
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

NAMES = ("DAPI", "CD3e", "CD20")
SIZE = (90, 110)
LABELS = "core_LABELS.npy"


@pytest.fixture
def labels():
    rng = np.random.default_rng(0)
    seeds = np.zeros(SIZE, np.int32)
    seeds[rng.integers(0, SIZE[0], 40), rng.integers(0, SIZE[1], 40)] = np.arange(1, 41) * 3
    return expand_labels(seeds, 5)


@pytest.fixture
def image(labels):
    """Markers (3, H, W) as uint16: nuclei in the first one, two that differ from cell to cell, and noise."""
    rng = np.random.default_rng(1)
    levels = rng.integers(2000, 40000, (3, labels.max() + 1))
    levels[0] = 30000
    levels[:, 0] = 1000
    return (levels[:, labels] + rng.integers(0, 500, (3, *SIZE))).astype(np.uint16)


@pytest.fixture
def files(tmp_path, image, labels):
    """A prediction as OME-TIFF and its cells."""
    write_ome_tiff(tmp_path / "core.ome.tiff", image / 65535, NAMES, pixel_size_um=0.5)
    np.save(tmp_path / "core_LABELS.npy", labels)
    return tmp_path


@pytest.fixture
def quantify(files, capsys):
    """Run the command on the image; returns exit code, its output and folder."""

    def run(*words, out="out", image="core.ome.tiff"):
        given = [] if image is None else ["--image", files / image]
        folder = files / out
        code = run_command(
            lambda argv: dispatch(argv), [*map(str, ["quantify", *given, "--output_dir", folder, *words])]
        )
        shown = capsys.readouterr()
        return SimpleNamespace(code=code, out=shown.out, err=shown.err, dir=folder)

    return run


def rows(folder):
    with open(folder / "cells.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def column(folder, name):
    return np.array([float(row[name] or "nan") for row in rows(folder)])


def document(folder):
    return json.loads((folder / "quantify.json").read_text(encoding="utf-8"))


def test_a_table_has_a_row_for_each_cell_with_the_numbers_of_scikit_image(quantify, files, image, labels):
    done = quantify("--labels", files / "core_LABELS.npy", "--rings", "3")
    assert done.code == 0, done.err
    table = rows(done.dir)
    means = [f"{name}_{kind}" for kind in ("mean", "ring_mean") for name in NAMES]
    assert list(table[0]) == ["image", "cell", "y", "x", "y_um", "x_um", "area_px", "area_um2", *means]
    regions = regionprops(labels, image.transpose(1, 2, 0))
    assert [int(row["cell"]) for row in table] == [region.label for region in regions]
    assert {row["image"] for row in table} == {"core"}
    np.testing.assert_allclose(column(done.dir, "y"), [region.centroid[0] for region in regions], atol=1e-4)
    np.testing.assert_allclose(column(done.dir, "x_um"), [region.centroid[1] * 0.5 for region in regions], atol=1e-4)
    np.testing.assert_array_equal(column(done.dir, "area_px"), [region.area for region in regions])
    np.testing.assert_allclose(column(done.dir, "area_um2"), [region.area * 0.25 for region in regions], atol=1e-4)
    found = np.stack([column(done.dir, f"{name}_mean") for name in NAMES], axis=1)
    np.testing.assert_allclose(found, [region.intensity_mean for region in regions], atol=1e-4)
    ring = np.where(labels == 0, expand_labels(labels, 3), 0)
    by_label = {region.label: region.intensity_mean[1] for region in regionprops(ring, image.transpose(1, 2, 0))}
    expected = [by_label.get(region.label, np.nan) for region in regions]
    np.testing.assert_allclose(column(done.dir, "CD3e_ring_mean"), expected, atol=1e-4)
    assert "No cell is called positive" in done.out
    assert document(done.dir)["cutoffs"] == {}


def test_the_stain_that_predict_found_foreign_goes_with_the_cells(quantify, files):
    numbers = np.full(len(FEATURES), 0.5)
    add_stain(files, "core", StainJudgement("outside", 4.5, 2.0, "", numbers))
    done = quantify("--labels", files / "core_LABELS.npy")
    assert done.code == 0, done.err
    assert {row["stain"] for row in rows(done.dir)} == {"outside"}
    assert "warning: core: H&E stain outside that of the training (distance 4.5, limit 2.0;" in done.out
    image = document(done.dir)["images"][0]
    assert (image["stain"], image["stain_distance"], image["stain_limit"]) == ("outside", 4.5, 2.0)


TRUST = {
    "DAPI": MarkerTrust(0.9, 0.8, 0.95, 0.7, "supported"),
    "CD3e": MarkerTrust(0.1, -0.1, 0.3, 0.2, "not supported"),
}


def verdicts_beside(folder):
    path, content = verdicts_file(folder, NAMES, TRUST)
    path.write_text(content)


def test_the_verdicts_of_predict_go_into_every_table(quantify, files, image):
    verdicts_beside(files)
    np.save(files / "core_ORION.npy", image)
    done = quantify(
        "--labels", files / LABELS, "--measured", files / "core_ORION.npy", "--positive", "CD3e=20000", "--no_h5ad"
    )
    assert done.code == 0, done.err
    with open(done.dir / "markers.csv", newline="") as file:
        table = {row["marker"]: row for row in csv.DictReader(file)}
    assert [row["verdict"] for row in table.values()] == ["supported", "not supported", "not judged"]
    assert (table["CD3e"]["pearson"], table["CD3e"]["pearson_low"]) == ("0.1", "-0.1")
    assert table["CD20"]["pearson"] == table["CD20"]["positive"] == table["CD20"]["cutoff_unit"] == ""
    positive = int((column(done.dir, "CD3e_mean") > 20000).sum())
    assert (table["CD3e"]["positive_cutoff"], table["CD3e"]["cutoff_unit"]) == ("20000", "as stored")
    assert (int(table["CD3e"]["positive"]), table["CD3e"]["cells"]) == (positive, "40")
    found = document(done.dir)["verdicts"]
    assert {name: entry["verdict"] for name, entry in found.items()} == {
        name: row["verdict"] for name, row in table.items()
    }
    assert "not supported" in next(line for line in done.out.splitlines() if "CD3e" in line)
    # Beside measured markers the same table says nothing.
    again = quantify("--labels", files / LABELS, out="measured", image="core_ORION.npy")
    assert again.code == 0, again.err
    assert document(again.dir)["verdicts"] is None
    assert "supported" not in again.out


def test_outlines_are_features_that_qupath_reads_and_cover_the_cells(quantify, files, labels):
    shapely = pytest.importorskip("shapely", reason="shapely is not installed")
    done = quantify("--labels", files / "core_LABELS.npy", "--positive", "CD3e=20000,CD20=20000")
    assert done.code == 0, done.err
    collection = json.loads((done.dir / "cells.geojson").read_text(encoding="utf-8"))
    assert collection["type"] == "FeatureCollection"
    table = {row["cell"]: row for row in rows(done.dir)}
    assert len(collection["features"]) == len(table)
    seen = set()
    for feature in collection["features"]:
        shape = shapely.geometry.shape(feature["geometry"])
        assert shape.is_valid
        properties = feature["properties"]
        row = table.pop(properties["name"])
        assert properties["objectType"] == "detection"
        assert shape.area == float(row["area_px"]) == (labels == int(row["cell"])).sum()
        assert shape.centroid.x == pytest.approx(float(row["x"]) + 0.5)
        assert properties["measurements"]["CD3e: mean"] == pytest.approx(float(row["CD3e_mean"]), rel=1e-5)
        assert properties["measurements"]["Area µm^2"] == pytest.approx(shape.area * 0.25)
        positive = [name for name in ("CD3e", "CD20") if row[f"{name}_positive"] == "1"]
        assert positive == [name for name in ("CD3e", "CD20") if float(row[f"{name}_mean"]) > 20000]
        assert properties["classification"]["name"] == (": ".join(positive) or "Negative")
        seen.add(properties["classification"]["name"])
        assert len(feature["id"]) == 36
    assert seen == {"Negative", "CD3e", "CD20", "CD3e: CD20"}


def test_an_anndata_has_the_means_and_the_places_of_the_cells(quantify, files):
    anndata = pytest.importorskip("anndata", reason="the extra cells is not installed")
    verdicts_beside(files)
    done = quantify("--labels", files / "core_LABELS.npy", "--positive", "CD3e=20000", "--rings", "2")
    table = anndata.read_h5ad(done.dir / "cells.h5ad")
    assert table.var_names.tolist() == list(NAMES)
    assert table.var["verdict"].tolist() == ["supported", "not supported", "not judged"]
    np.testing.assert_array_equal(table.var["pearson_low"], [0.8, -0.1, np.nan])
    np.testing.assert_array_equal(table.var["positive_cutoff"], [np.nan, 20000, np.nan])
    assert table.var.loc["CD3e", "positive"] == table.obs["CD3e_positive"].sum()
    assert table.uns["verdict_rule"].startswith("supported: ")
    np.testing.assert_allclose(table.X[:, 1], column(done.dir, "CD3e_mean"), rtol=1e-6)
    np.testing.assert_allclose(table.layers["ring"][:, 2], column(done.dir, "CD20_ring_mean"), rtol=1e-6)
    spatial = np.stack([column(done.dir, "x_um"), column(done.dir, "y_um")], axis=1)
    np.testing.assert_allclose(table.obsm["spatial"], spatial, rtol=1e-6)
    assert table.uns["spatial_unit"] == "um"
    np.testing.assert_array_equal(table.obs["CD3e_positive"], column(done.dir, "CD3e_positive") == 1)
    assert table.obs_names[0] == f"core_{rows(done.dir)[0]['cell']}"


def test_without_anndata_one_line_says_so_and_asking_for_it_names_the_extra(quantify, files, monkeypatch):
    monkeypatch.setitem(sys.modules, "anndata", None)
    monkeypatch.setattr("orion_unet.quantification.quantify.find_spec", lambda name: None)
    done = quantify("--labels", files / "core_LABELS.npy")
    assert done.code == 0
    assert 'no cells.h5ad, because anndata is not installed: pip install "orion-unet[cells]"' in done.out
    assert not (done.dir / "cells.h5ad").exists()
    done = quantify("--labels", files / "core_LABELS.npy", "--h5ad", out="other")
    assert done.code == 2
    assert 'anndata is needed for this: pip install "orion-unet[cells]"' in done.err
    assert not done.dir.exists()


def test_nuclei_are_found_in_the_nuclear_marker(quantify, image):
    done = quantify("--no_geojson", "--no_overview", "--no_h5ad")
    assert done.code == 0, done.err
    assert sorted(path.name for path in done.dir.iterdir()) == ["cells.csv", "markers.csv", "quantify.json"]
    assert "nuclei found in DAPI (in the range of its own quantiles)" in done.out
    table = rows(done.dir)
    assert len(table) > 5
    # Nuclei are 30000 bright and the background 1000; they are grown by three pixels, into what is between them.
    assert (column(done.dir, "DAPI_mean") > 10000).all()


def test_a_folder_of_predictions_is_one_table(quantify, files, image, labels):
    folder = files / "predictions"
    folder.mkdir()
    for name in ("one", "two"):
        write_ome_tiff(folder / f"{name}.ome.tiff", image / 65535, NAMES)
        np.save(files / f"{name}_LABELS.npy", labels if name == "one" else labels[::-1])
    done = quantify("--predictions", folder, "--labels", files, image=None)
    assert done.code == 0, done.err
    assert [row["image"] for row in rows(done.dir)] == ["one"] * 40 + ["two"] * 40
    expected = {"cells.csv", "markers.csv", "quantify.json"}
    expected |= {f"{name}_{file}" for name in ("one", "two") for file in ("cells.geojson", "overview.png")}
    assert {path.name for path in done.dir.iterdir()} - {"cells.h5ad"} == expected
    assert rows(done.dir)[0]["y_um"] == ""
    assert "its pixel size is unknown, so micrometres stay empty" in done.out
    assert [entry["cells"] for entry in document(done.dir)["images"]] == [40, 40]


def test_the_spread_of_an_ensemble_and_what_was_measured_are_no_predictions(quantify, files, image):
    folder = files / "predictions"
    folder.mkdir()
    for name in ("core", "core_spread", "core_ORION"):
        write_ome_tiff(folder / f"{name}.ome.tiff", image / 65535, NAMES)
    done = quantify("--predictions", folder, "--labels", files / LABELS, image=None)
    assert done.code == 0, done.err
    assert {row["image"] for row in rows(done.dir)} == {"core"}
    inside = quantify("--predictions", folder, "--labels", files / LABELS, image=None, out="predictions")
    assert inside.code == 2
    assert "is the folder of the predictions; name another" in inside.err


def test_measured_markers_may_be_ome_zarr_in_a_folder_with_panels(quantify, files, image):
    pytest.importorskip("zarr")
    folder = files / "pairs"
    folder.mkdir()
    planes = np.ascontiguousarray(image[[2, 0, 1]].transpose(1, 2, 0))
    about = {"names": ("CD20", "DAPI", "CD3e"), "pixel_size_um": None}
    write_zarr(folder / "core_ORION.ome.zarr", planes.shape, planes.dtype, iter([planes]), about)
    np.save(folder / "core_ORION.npy", planes)
    (folder / "panels.csv").write_text("core,panel\ncore,one\n")
    (folder / "panel_one.txt").write_text("CD20\nDAPI\nCD3e\n")
    (folder / "channel_names.txt").write_text("DAPI\nCD3e\nCD20\n")
    (folder / "dataset.json").write_text('{"schema": 1, "pixel_size_um": 0.25, "source": "x"}')
    (folder / "core_ORION.npy").rename(files / "kept.npy")
    done = quantify("--labels", files / LABELS, "--measured", folder, "--positive", "CD3e=20000")
    assert done.code == 0, done.err
    np.testing.assert_allclose(column(done.dir, "CD3e_measured_mean"), column(done.dir, "CD3e_mean"), rtol=1e-4)
    # The panel names a measured image that is quantified by itself, and dataset.json states its pixels.
    (files / "kept.npy").rename(folder / "core_ORION.npy")
    alone = quantify("--labels", files / LABELS, image="pairs/core_ORION.npy", out="alone")
    assert alone.code == 0, alone.err
    np.testing.assert_allclose(column(alone.dir, "CD3e_mean"), column(done.dir, "CD3e_measured_mean"), rtol=1e-6)
    np.testing.assert_allclose(column(alone.dir, "x_um"), column(alone.dir, "x") * 0.25, rtol=1e-6)


def test_what_an_earlier_call_left_of_other_images_does_not_stay(quantify, files, image, labels):
    assert quantify("--labels", files / LABELS).code == 0
    folder = files / "predictions"
    folder.mkdir()
    write_ome_tiff(folder / "other.ome.tiff", image / 65535, NAMES)
    np.save(files / "other_LABELS.npy", labels)
    assert quantify("--predictions", folder, "--labels", files, image=None).code == 2
    done = quantify("--predictions", folder, "--labels", files, "--overwrite", image=None)
    assert done.code == 0, done.err
    expected = {"cells.csv", "markers.csv", "quantify.json", "other_cells.geojson", "other_overview.png"}
    assert {path.name for path in done.dir.iterdir()} - {"cells.h5ad"} == expected
    assert set(document(done.dir)["files"]) - {"cells.h5ad"} == expected


def test_an_image_without_cells_adds_no_rows_to_the_others(quantify, files, image, labels):
    folder = files / "predictions"
    folder.mkdir()
    for name, cells in (("bare", labels * 0), ("full", labels)):
        write_ome_tiff(folder / f"{name}.ome.tiff", image / 65535, NAMES, pixel_size_um=0.5)
        np.save(files / f"{name}_LABELS.npy", cells)
    words = ["--predictions", folder, "--labels", files, "--rings", "2", "--positive", "CD3e=20000"]
    done = quantify(*words, "--measured", folder, image=None)
    assert done.code == 0, done.err
    assert [row["image"] for row in rows(done.dir)] == ["full"] * 40
    assert "bare: 0 cells" in done.out
    assert not (done.dir / "bare_cells.geojson").exists()
    # The measured markers are the image itself.
    assert document(done.dir)["agreement"]["CD3e"]["f1"] == 1


def test_what_fails_on_the_way_leaves_nothing(quantify, files, monkeypatch):
    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("orion_unet.quantification.quantify.write_csv", full)
    done = quantify("--labels", files / LABELS)
    assert done.code == 1
    assert "cannot be written (No space left on device)" in done.err
    assert not done.dir.exists()


def test_measured_markers_are_measured_in_the_same_cells_and_compared(quantify, files, image, labels):
    rng = np.random.default_rng(2)
    measured = np.clip(image + rng.normal(0, 8000, image.shape), 0, 65535).astype(np.uint16)[::-1]
    np.save(files / "core_ORION.npy", measured)
    (files / "channel_names.txt").write_text("CD20\nCD3e\nDAPI\n")
    done = quantify(
        "--labels", files / "core_LABELS.npy", "--measured", files / "core_ORION.npy", "--positive",
        "CD3e=21000,CD20=20000", "--measured_positive", "CD3e=24000",
    )  # fmt: skip
    assert done.code == 0, done.err
    regions = regionprops(labels, measured[::-1].transpose(1, 2, 0))
    truth = np.array([region.intensity_mean for region in regions])
    for index, (name, threshold, cutoff) in enumerate([("CD3e", 24000, 21000), ("CD20", 20000, 20000)], 1):
        np.testing.assert_allclose(column(done.dir, f"{name}_measured_mean"), truth[:, index], atol=1e-4)
        positive, predicted = truth[:, index] > threshold, column(done.dir, f"{name}_mean")
        scores = document(done.dir)["agreement"][name]
        assert scores["f1"] == pytest.approx(f1_score(positive, predicted > cutoff))
        assert scores["auc"] == pytest.approx(roc_auc_score(positive, predicted))
        assert scores["average_precision"] == pytest.approx(average_precision_score(positive, predicted))
        assert scores["pearson"] == pytest.approx(np.corrcoef(predicted, truth[:, index])[0, 1])
        assert document(done.dir)["cutoffs"][name]["unit"] == "as stored"
        assert np.sum(scores["confusion"]) == len(truth)
        assert scores["confusion"][1][1] == (positive & (predicted > cutoff)).sum()
    with open(done.dir / "comparison.csv", newline="") as file:
        assert [row["marker"] for row in csv.DictReader(file)] == ["CD3e", "CD20"]
    assert (done.dir / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert document(done.dir)["intervals"]["missing_because"].startswith("too few images (1)")
    assert document(done.dir)["agreement"]["DAPI"]["f1"] is None
    # Another call without --measured leaves nothing of this one.
    assert quantify("--labels", files / "core_LABELS.npy", "--overwrite").code == 0
    assert not (done.dir / "comparison.csv").exists()


def test_the_groups_of_measured_images_must_name_every_image(quantify, files, image):
    np.save(files / "core_ORION.npy", image)
    (files / "channel_names.txt").write_text("\n".join(NAMES))
    (files / "groups.csv").write_text("core,group\nother,a\n")
    done = quantify("--labels", files / "core_LABELS.npy", "--measured", files, "--positive", "CD3e=20000")
    assert done.code == 2
    assert "does not assign every core to one group" in done.err
    assert not done.dir.exists()
    (files / "groups.csv").write_text("core,group\ncore,a\n")
    done = quantify("--labels", files / "core_LABELS.npy", "--measured", files, "--positive", "CD3e=20000")
    assert done.code == 0, done.err
    with open(done.dir / "comparison.csv", newline="") as file:
        assert [row["group"] for row in csv.DictReader(file)] == ["a"]


def scores_json(folder, transform="linear", **changes):
    """What evaluate --cells leaves, with the parts that quantify reads."""
    content = {
        "target": {"white": 65535.0, "transform": transform},
        "markers": {"CD3e": {"range": [0.05, 0.6]}, "CD20": {"range": [0.0, 0.5]}, "Other": {"range": [0.0, 0.0]}},
        "cells": {
            "thresholds": "Otsu's threshold", "cutoffs": "the best F1",
            "markers": {
                "CD3e": {"measured_threshold": 0.4, "predicted_cutoff": 0.45},
                "CD20": {"measured_threshold": 0.3, "predicted_cutoff": None},
                "Other": {"measured_threshold": None, "predicted_cutoff": None},
            },
        },
        **changes,
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "scores.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("transform", ["linear", "log1p"])
def test_the_cutoffs_of_an_evaluation_are_those_of_values_in_the_range_of_training(
    transform, quantify, files, image, labels
):
    done = quantify(
        "--labels", files / "core_LABELS.npy", "--evaluation", scores_json(files / "evaluation", transform)
    )  # fmt: skip
    assert done.code == 0, done.err
    unit = np.clip((image[1] / 65535 - 0.05) / 0.55, 0, 1)
    if transform == "log1p":
        unit = np.log1p(LOG_CURVATURE * unit) / np.log1p(LOG_CURVATURE)
    expected = [region.intensity_mean > 0.45 for region in regionprops(labels, unit)]
    assert 0 < sum(expected) < len(expected)
    assert column(done.dir, "CD3e_positive").tolist() == [float(value) for value in expected]
    assert "CD20_positive" not in rows(done.dir)[0]
    found = document(done.dir)["cutoffs"]
    assert found["CD3e"]["origin"].endswith("the best F1; Otsu's threshold")
    assert found["CD3e"]["positive"] == sum(expected)
    assert found["CD20"]["predicted"] is None
    assert "Other" not in found
    # In the stored values of the same cells nothing changes.
    assert column(done.dir, "CD3e_mean").max() > 10000


def test_normalized_predictions_only_lack_the_scale_of_integers(quantify, files, image, labels):
    np.save(files / "unit.npy", (image / 65535).astype(np.float32))
    words = ["--labels", files / "core_LABELS.npy", "--evaluation", scores_json(files / "evaluation"), "--normalized"]
    done = quantify(*words, "--channel_names", ",".join(NAMES), image="unit.npy")
    assert done.code == 0, done.err
    expected = [region.intensity_mean > 0.45 for region in regionprops(labels, image[1] / 65535)]
    assert column(done.dir, "CD3e_positive").tolist() == [float(value) for value in expected]
    levels = quantify(*words, out="levels")
    assert column(levels.dir, "CD3e_positive").tolist() == column(done.dir, "CD3e_positive").tolist()


def small(files):
    np.save(files / "small.npy", np.ones((5, 5), np.int32))
    return files / "small.npy"


def empty(files):
    np.save(files / "empty.npy", np.zeros(SIZE, np.int32))
    return files / "empty.npy"


REFUSED = {
    "labels of another size": (lambda f: ["--labels", small(f)], "small.npy: has 5 x 5 pixels, core.ome.tiff"),
    "no cells": (lambda f: ["--labels", empty(f)], "empty.npy: holds no cell, all labels are 0"),
    "negative labels": (lambda f: ["--labels", negative(f)], "negative.npy: holds negative labels"),
    "missing labels": (lambda f: ["--labels", f / "none.npy"], "none.npy: cannot be read"),
    "folder without labels": (lambda f: ["--labels", f / "folder"], "folder: has no core_LABELS.npy, .tif or .zarr"),
    "no nuclear marker": (lambda f: ["--channel_names", "A,B,C"], "name one with --nuclear_marker, or give the cells"),
    "unknown nuclear marker": (lambda f: ["--nuclear_marker", "X"], "--nuclear_marker X: is not among the markers"),
    "unknown marker": (lambda f: ["--labels", f / LABELS, "--positive", "CD4=1"], "--positive: no marker CD4"),
    "no number": (lambda f: ["--labels", f / LABELS, "--positive", "CD3e=x"], "'CD3e=x': write MARKER=VALUE"),
    "measured of another size": (lambda f: ["--measured", measured(f, 5)], "m.npy: has 5 x 5 pixels"),
    "no evaluation": (lambda f: ["--evaluation", f / "no"], "no: cannot be read (No such file or directory)"),
    "evaluation without cells": (lambda f: ["--evaluation", scores_json(f / "e", cells=None)], "again with --cells"),
    "damaged evaluation": (lambda f: ["--evaluation", scores_json(f / "e", markers={"A": 1})], "is damaged"),
    "old evaluation": (lambda f: ["--evaluation", scores_json(f / "e", target={})], "of an older version"),
    "normalized alone": (lambda f: ["--normalized"], "--normalized: says how the cut-offs of --evaluation apply"),
    "nuclei of nothing": (lambda f: ["--nuclei_in", "measured"], "--nuclei_in measured: cannot be used"),
    "cut-off of nothing": (lambda f: ["--measured_positive", "CD3e=1"], "--measured_positive: is for --measured"),
    "both images": (lambda f: ["--predictions", f], "give either --image FILE or --predictions DIR"),
    "other verdicts": (lambda f: verdicts(f, "marker,verdict"), "is not a table that predict wrote"),
    "unknown verdict": (lambda f: verdicts(f, f"{COLUMNS}\nDAPI,good,,,,"), "is damaged, 'good' is none of supported"),
    "no number of a verdict": (lambda f: verdicts(f, f"{COLUMNS}\nDAPI,weak,x,,,"), "is damaged, ['x', "),
    "a cut-off in another unit": (
        lambda f: ["--evaluation", scores_json(f / "e"), "--measured", f / "core.ome.tiff", "--measured_positive",
                   "CD3e=9000"],
        "--measured_positive CD3e: give --positive for it, too",
    ),
    "cores normalised by themselves": (
        lambda f: ["--evaluation", scores_json(f / "e", target={"white": 65535.0, "normalization": "core",
                                                                "transform": "linear"}),
                   "--measured", f / "core.ome.tiff"],
        "its model normalised every core by itself",
    ),
    "rings below 0": (lambda f: ["--rings", "-1"], "--rings -1: must be at least 0"),
}  # fmt: skip


COLUMNS = "marker,verdict,pearson,pearson_low,pearson_high,regression_pearson"


def verdicts(files, content):
    (files / "marker_verdicts.csv").write_text(content + "\n")
    return ["--labels", files / LABELS]


def negative(files):
    np.save(files / "negative.npy", np.full(SIZE, -1, np.int32))
    return files / "negative.npy"


def measured(files, side):
    np.save(files / "m.npy", np.ones((3, side, side), np.uint16))
    return files / "m.npy"


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_sentence_and_nothing_is_written(case, quantify, files):
    (files / "folder").mkdir()
    words, message = REFUSED[case]
    done = quantify(*words(files))
    assert done.code == 2
    assert message in done.err
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    assert not done.dir.exists()


def test_a_damaged_image_leaves_the_earlier_results(quantify, files):
    assert quantify("--labels", files / LABELS).code == 0
    before = {path.name: path.read_bytes() for path in (files / "out").iterdir()}
    content = bytearray((files / "core.ome.tiff").read_bytes())
    content[len(content) // 4 : len(content) // 2] = bytes(len(content) // 2 - len(content) // 4)
    (files / "core.ome.tiff").write_bytes(content)
    done = quantify("--labels", files / LABELS, "--overwrite")
    assert done.code == 2
    assert "core.ome.tiff: is damaged" in done.err
    assert {path.name: path.read_bytes() for path in (files / "out").iterdir()} == before


def test_earlier_results_are_kept_unless_told_otherwise(quantify, files):
    words = ["--labels", files / LABELS]
    assert quantify(*words).code == 0
    done = quantify(*words)
    assert done.code == 2
    assert "already holds cells.geojson; add --overwrite" in done.err
    assert quantify(*words, "--overwrite", "--no_geojson").code == 0
    assert not (files / "out" / "cells.geojson").exists()


def test_names_of_images_that_are_no_names_stay_one_cell_of_the_table(quantify, files):
    strange = 'a,"100%"nan.ome.tiff'
    (files / "core.ome.tiff").rename(files / strange)
    done = quantify("--labels", files / LABELS, image=strange)
    assert done.code == 0, done.err
    assert {row["image"] for row in rows(done.dir)} == {'a,"100%"nan'}
    assert len(json.loads((done.dir / "cells.geojson").read_text())["features"]) == 40


@pytest.mark.slow
def test_the_scores_are_those_of_evaluate_on_the_same_cores(tmp_path, capsys):
    """One way in, from training through evaluate and predict, to the same nuclei, cut-offs and scores."""
    pairs = tmp_path / "demo"
    for words in (
        ["make-demo", pairs, "--cores", "5", "--size", "128"],
        ["train", "--pairs_dir", pairs, "--output_dir", tmp_path / "run", "--recipe", "demo", "--epochs", "2",
         "--gpus", "0", "--num_workers", "0", "--no_noise_removal", "--patches_per_image", "4", "--patch_size", "64",
         "--base_features", "4", "--sanity_check_freq", "0"],
        ["evaluate", "--checkpoint", tmp_path / "run", "--pairs_dir", pairs, "--cells"],
    ):  # fmt: skip
        assert run_command(dispatch, [*map(str, words)]) == 0, capsys.readouterr().err
    evaluation = tmp_path / "run" / "evaluation"
    scores = json.loads((evaluation / "scores.json").read_text())
    cores = [entry["core"] for entry in scores["cores"]]
    inputs = [pairs / f"{core}_HE.npy" for core in cores]
    for words in (
        ["predict", "--checkpoint", tmp_path / "run", "--input", *inputs, "--output_dir", tmp_path / "predictions"],
        ["quantify", "--predictions", tmp_path / "predictions", "--measured", pairs, "--nuclei_in", "measured",
         "--evaluation", evaluation, "--output_dir", tmp_path / "cells", "--no_overview"],
    ):  # fmt: skip
        assert run_command(dispatch, [*map(str, words)]) == 0, capsys.readouterr().err
    assert len(rows(tmp_path / "cells")) == scores["cells"]["count"] > 20
    for name, found in document(tmp_path / "cells")["agreement"].items():
        expected = scores["cells"]["markers"][name]
        for metric in ("pearson", "auc", "average_precision", "f1", "fraction_positive"):
            assert found[metric] == pytest.approx(expected[metric]["value"], abs=1e-4), (name, metric)


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path):
    root = Path(__file__).resolve().parents[2]
    words = [sys.executable, root / "benchmarks" / "quantify.py", "--quick", "--json", tmp_path / "found.json"]
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["speed"]["largest_relative_difference_of_means"] < 1e-4
    assert found["speed"]["largest_difference_of_centroids_px"] < 1e-4
    assert found["speed"]["cells"] > 100
    assert all(row["peak_mb"] > 50 and row["cells"] > 100 for row in found["memory"])
