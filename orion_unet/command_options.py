"""Options of the commands other than training, declared once: one dataclass per concern."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from orion_unet.config import OutputOptions
from orion_unet.options import option

# The options of training that decide how a folder of pairs is read; other commands take them, too.
READING = ("channel_names", "exclude_channels", "groups_csv", "he_layout", "orion_layout", "level")


@dataclass(frozen=True)
class PredictRequest:
    """task: which model, which images, where to"""

    checkpoint: tuple[Path, ...] = option(
        None,
        "best.pt or last.pt, or a run's folder; several are averaged",
        metavar="FILE|RUN",
        required=True,
    )
    input: tuple[Path, ...] = option(
        None,
        "images (.npy, .png, .jpg, .tif, .svs, .zarr; .ndpi, .mrxs, .scn with the extra openslide); for a folder: its "
        "NAME_HE files (.npy, .ome.tif, .ome.zarr), otherwise every image; TIFF and OME-Zarr also by URL, on "
        "object storage",
        metavar="FILE|DIR",
        required=True,
        url=True,
    )
    output_dir: Path = option(None, "folder for the predictions; made if need be", metavar="DIR", required=True)


@dataclass(frozen=True)
class DeviceOptions:
    """device: where a trained model runs"""

    device: str = option("auto", "auto, cpu, cuda or cuda:N", metavar="NAME")
    use_amp: bool = option(False, "mixed precision on a GPU")
    encoder_weights: Path | None = option(
        None,
        "weights of a frozen timm encoder, which its checkpoint leaves out; default: the file that the training read",
        metavar="FILE",
    )


@dataclass(frozen=True)
class PredictOptions:
    """prediction: how to predict"""

    format: str = option(
        "npy",
        "npy: (C, H, W) float32; ome-tiff: tiled and pyramidal, for QuPath and napari",
        choices=("npy", "ome-tiff"),
        section="output",
    )
    dtype: str = option("uint16", "pixels of an ome-tiff", choices=("uint16", "float32"), section="output")
    normalized: bool = option(False, "keep [0, 1] instead of the unit of the training data", section="output")
    markers: str | None = option(None, "write these markers only; default: all", metavar="NAME,...", section="output")
    pixel_size_um: float | None = option(
        None, "side of a pixel of the input; default: as its file states", unit="micrometres", above=0, section="input"
    )
    spread: bool = option(
        False, "also write NAME_spread, the standard deviation over several checkpoints", section="output"
    )
    overview: bool = option(True, "draw NAME_overview.png, the H&E beside the markers", section="output")
    overwrite: bool = option(False, "replace outputs that exist", section="output")
    tissue_only: bool | None = option(
        None, "skip tiles of blank glass, which become background; default: on for TIFF and whole slides"
    )
    tta: bool = option(False, "mean over the 8 flips and turns of each tile, 8 times the work")
    tile: int | None = option(None, "side of a tile; default: by the network and the width", unit="pixels")
    overlap: int | None = option(None, "overlap of tiles; default: by the network's depth", unit="pixels")
    batch_size: int | None = option(None, "tiles at a time; default: 1 on a CPU, 8 on a GPU", minimum=1)


@dataclass(frozen=True)
class EvaluateOptions:
    """evaluation: which model, on which cores, by which measures"""

    checkpoint: tuple[Path, ...] = option(
        None, "a run folder (its best.pt), or a .pt file; several are averaged", metavar="RUN|FILE", required=True
    )
    pairs_dir: Path = option(
        None,
        "folder of pairs NAME_HE / NAME_ORION: .npy, .ome.tif or .ome.zarr, or its URL",
        metavar="DIR",
        required=True,
        url=True,
    )
    split: str = option(
        "val",
        "cores to score: held out (those new to the model included), trained on, or all; cores of the training are "
        "recognised by their H&E, whatever their names",
        choices=("val", "train", "all"),
    )
    output_dir: Path | None = option(
        None, "where scores and figures go; default: the folder evaluation in the run", metavar="DIR"
    )
    positive_threshold: str | None = option(
        None,
        "a pixel or cell is positive above it, in the normalised range; default: 0.5 for pixels, for cells Otsu's "
        "threshold of the training cells",
        metavar="X|NAME=X,...",
    )
    cells: str | None = option(
        None,
        "also score cells: nuclei found in the measured nuclear marker, or with DIR those of its label files "
        "NAME_LABELS.npy or NAME_LABELS.tif, integers (H, W)",
        metavar="DIR",
        const="",
    )
    nuclear_marker: str | None = option(None, "marker that shows nuclei; default: found by its name", metavar="NAME")
    overwrite: bool = option(False, "replace an earlier evaluation in the output folder")


@dataclass(frozen=True)
class QuantifyOptions:
    """quantification: which images, which cells, and what is written"""

    image: Path | None = option(
        None, "a marker image, predicted or measured: .npy, .tif (OME-TIFF) or .zarr (OME-Zarr)", metavar="FILE"
    )
    predictions: Path | None = option(None, "a folder that predict wrote: all of its images", metavar="DIR")
    output_dir: Path = option(None, "folder for the tables; made if need be", metavar="DIR", required=True)
    channel_names: str | None = option(
        None,
        "marker names in channel order, separated by commas, or a text file with one name a line; default: those of "
        "the file, or of channel_names.txt beside it",
        metavar="NAMES",
    )
    pixel_size_um: float | None = option(
        None, "side of a pixel of the images; default: as their files state", unit="micrometres", above=0, maximum=20
    )
    labels: Path | None = option(
        None,
        "label image of the cells (.npy, .tif, .zarr; integers, 0 outside), or a folder of NAME_LABELS.npy, .tif or "
        ".zarr; default: nuclei are found in the nuclear marker, as evaluate finds them",
        metavar="FILE|DIR",
        section="cells",
    )
    nuclear_marker: str | None = option(
        None, "marker that shows nuclei; default: found by its name", metavar="NAME", section="cells"
    )
    nuclei_in: str = option(
        "image",
        "where nuclei are found: in the image, or in --measured",
        choices=("image", "measured"),
        section="cells",
    )
    rings: int = option(
        0,
        "also measure a ring of this width around each cell, for membranes and cytoplasm; 0 = none",
        unit="pixels",
        minimum=0,
        maximum=100,
        section="cells",
    )
    evaluation: Path | None = option(
        None,
        "a folder that evaluate --cells wrote: its cut-offs say which cells are positive",
        metavar="DIR",
        section="positive cells",
    )
    positive: str | None = option(
        None,
        "a cell is positive if its mean is above this, in the unit of the image",
        metavar="NAME=X,...",
        section="positive cells",
    )
    normalized: bool = option(
        False,
        "with --evaluation: the images are in [0, 1], as predict --normalized writes them",
        section="positive cells",
    )
    measured: Path | None = option(
        None,
        "measured markers of the same pixels, or a folder of NAME_ORION.npy: also measured in the same cells, and "
        "compared with the image in comparison.csv and comparison.png",
        metavar="FILE|DIR",
        section="measured markers",
    )
    measured_positive: str | None = option(
        None,
        "a cell is positive if its measured mean is above this, in the unit of --measured; default: as --positive",
        metavar="NAME=X,...",
        section="measured markers",
    )
    geojson: bool = option(True, "write the outlines of the cells, for QuPath", section="output")
    h5ad: bool | None = option(
        None,
        "write cells.h5ad, for scanpy and squidpy (needs anndata); default: where it is installed",
        section="output",
    )
    overview: bool = option(True, "draw the markers with their positive cells", section="output")
    overwrite: bool = option(False, "replace the files of an earlier quantify", section="output")


@dataclass(frozen=True)
class CrossvalOptions:
    """cross-validation: how many trainings, and where they go"""

    folds: int = option(None, "parts of the groups, each held out by one training", minimum=2, required=True)
    output_dir: Path = option(
        None, "folder of the runs fold_1, fold_2, ... and of the scores", metavar="DIR", required=True
    )
    fold: int | None = option(
        None, "train this fold only and score nothing, for a job array; default: all", minimum=1, metavar="K"
    )


@dataclass(frozen=True)
class FindRateOptions:
    """range test: the rates that are tried, evenly spaced in their logarithm"""

    lowest_rate: float = option(1e-5, "learning rate of the first step", above=0, maximum=1)
    highest_rate: float = option(1e-1, "learning rate of the last step", above=0, maximum=1)
    steps: int = option(120, "optimiser steps of the test, one at each rate", minimum=20, maximum=100_000)


@dataclass(frozen=True)
class CheckDataOptions:
    """inspection: what to look at, and what to write"""

    folder: str = option(
        None,
        "folder of pairs NAME_HE / NAME_ORION: .npy, .ome.tif or .ome.zarr, or its URL",
        metavar="DIR",
        positional=True,
        url=True,
    )
    output_dir: Path | None = option(
        None, "also write channels.csv, cores.csv, check_data.json and contact sheets of all cores", metavar="OUT"
    )
    nuclear_marker: str | None = option(
        None,
        "channel of the nuclear stain; default: the first named like one (Hoechst, DAPI, DRAQ5, ...)",
        metavar="NAME",
    )
    json: bool = option(False, "print one JSON document instead of tables")


@dataclass(frozen=True)
class PackOptions:
    """packing: what to rewrite, and where to"""

    folder: str = option(
        None,
        "folder of pairs NAME_HE / NAME_ORION: .npy, .ome.tif or .ome.zarr, or its URL",
        metavar="DIR",
        positional=True,
        url=True,
    )
    output_dir: Path = option(None, "folder to fill; made if it does not exist", metavar="OUT", required=True)
    format: str = option("npy", "how the pairs are stored in OUT", choices=("npy", "ome-zarr"))
    overwrite: bool = option(False, "replace files of the same names in OUT, and nothing else there")


@dataclass(frozen=True)
class PrepareOptions:
    """preparation: which slides, and where the pairs go"""

    slides: Path = option(
        None,
        "CSV with columns slide,he,orion and, if needed, patient,markers,he_pixel_size_um,orion_pixel_size_um; "
        "its paths are relative to it; images may be TIFF or OME-Zarr on object storage, by their URLs",
        metavar="SLIDES.csv",
        positional=True,
    )
    output_dir: Path = option(None, "folder of pairs; made if it does not exist", metavar="PAIRS", required=True)
    markers: Path | None = option(
        None,
        "names of the channels: MCMICRO's markers.csv (columns marker_name and, optionally, remove), or one a line; "
        "default: those of the OME metadata",
        metavar="FILE",
    )
    pixel_size_um: float | None = option(
        None, "side of a pixel of the pairs; default: the ORION image's own", unit="micrometres", above=0
    )
    regions: str = option(
        "tissue",
        "what becomes a pair: squares of tissue, cores of a microarray, or the whole slide in squares",
        choices=("tissue", "tma", "whole"),
        section="regions",
    )
    region_size: int = option(
        2048, "side of a region", unit="pixels of the pairs", minimum=128, maximum=16384, section="regions"
    )
    regions_per_slide: int | None = option(
        None,
        "at most so many regions, spread over the tissue; default: all",
        minimum=1,
        metavar="N",
        section="regions",
    )
    seed: int = option(42, "seed of the choice of regions", minimum=0, maximum=2**63 - 1, section="regions")
    register: str = option(
        "auto",
        "auto: move the H&E onto the markers; check: only reject misaligned regions; off: use the pixel sizes alone",
        choices=("auto", "check", "off"),
        section="registration",
    )
    register_on: str | None = option(
        None,
        "channel of the nuclear stain; default: the first named like one (Hoechst, DAPI, DRAQ5, ...)",
        metavar="MARKER",
        section="registration",
    )
    min_correlation: float = option(
        0.2,
        "correlation of haematoxylin and nuclear marker that a region must reach",
        minimum=-1,
        maximum=1,
        section="registration",
    )
    format: str = option(
        "npy",
        "how the pairs are stored; none: not at all, training reads them from the slides and moves the H&E as it goes",
        choices=("npy", "ome-zarr", "none"),
        section="output",
    )
    jobs: int | None = option(
        None, "processes; auto = the usable cores of the machine", minimum=1, metavar="N|auto", section="output"
    )
    dask_scheduler: str | None = option(
        None,
        "scheduler of a Dask cluster, tcp://HOST:8786, whose workers do the work in place of --jobs processes; they "
        "must have this package, and see the files under the same paths",
        metavar="ADDRESS",
        section="output",
    )
    dry_run: bool = option(False, "say what would be made and how large it is, and make nothing", section="output")
    skip_bad: bool = option(False, "go on without slides that cannot be used; exit with 2 at the end", section="output")
    overwrite: bool = option(False, "replace the pairs of an earlier prepare with other options", section="output")


@dataclass(frozen=True)
class RegisterOptions:
    """registration: which pairs, by which marker, and what is kept"""

    folder: str = option(
        None,
        "folder of pairs NAME_HE / NAME_ORION: .npy, .ome.tif or .ome.zarr, or its URL",
        metavar="DIR",
        positional=True,
        url=True,
    )
    output_dir: Path = option(None, "folder to fill; made if it does not exist", metavar="OUT", required=True)
    register_on: str | None = option(
        None,
        "channel of the nuclear stain; default: the first named like one (Hoechst, DAPI, DRAQ5, ...)",
        metavar="MARKER",
    )
    min_correlation: float = option(
        0.2, "correlation of haematoxylin and nuclear marker that a core must reach", minimum=-1, maximum=1
    )
    max_shift: float = option(64.0, "longest shift of a core", unit="pixels", above=0)
    jobs: int | None = option(None, "processes; auto = the usable cores of the machine", minimum=1, metavar="N|auto")
    overwrite: bool = option(False, "register again what OUT holds, and replace it")


@dataclass(frozen=True)
class DemoOptions:
    """demo: generated tissue"""

    folder: Path = option(None, "folder to fill; made if it does not exist", metavar="DIR", positional=True)
    cores: int = option(12, "cores, two a patient")
    size: int = option(512, "side of a core", unit="pixels")
    seed: int = option(0, "seed of the tissue")
    overwrite: bool = option(False, "replace demo data made earlier in this folder, never anything else")


@dataclass(frozen=True)
class MonitorOptions:
    """monitor: which run, and how to show it"""

    output_dir: Path = option(Path(OutputOptions.output_dir), "the run folder", metavar="RUN")
    watch: bool = option(False, "stay, and follow the run until it ends or Ctrl-C", section="mode")
    until_finished: bool = option(
        False,
        "like --watch, but follow a run that was interrupted or has crashed to its next attempt; with --runs until "
        "every run is over",
        section="mode",
    )
    runs: Path | None = option(
        None, "show every run below this folder, one line each, in place of one run", metavar="DIR", section="mode"
    )
    serve: int | None = option(
        None,
        "stay, and show the page on http://127.0.0.1:PORT/ (0: any free port) until Ctrl-C; other machines cannot "
        "reach it",
        minimum=0,
        maximum=65535,
        metavar="PORT",
        section="mode",
    )
    interval: float = option(10.0, "time between polls", unit="seconds", minimum=0.1, maximum=86400, section="mode")
    compare: tuple[Path, ...] = option((), "compare with these runs; default: none", metavar="RUN", section="mode")
    json: bool = option(False, "strict JSON on standard output; with --watch one line a change", section="output")
    html: Path | None = option(
        None, "also write a self-contained page, refreshed by --watch", metavar="FILE", section="output"
    )
    figure: Path | None = option(
        None,
        "the figure; default: training_progress.png (or .svg, .pdf; with --compare, comparison.png) in the run folder",
        metavar="FILE",
        section="output",
    )
    format: str | None = option(
        None,
        "form of the figure; default: the ending of --figure, or png",
        choices=("png", "svg", "pdf"),
        section="output",
    )
    x: str = option(
        "epoch",
        "what the curves are drawn over; epochs where the run does not say enough",
        choices=("epoch", "step", "patches", "hours"),
        section="output",
    )
    notify: str | None = option(
        None,
        "with --watch: run this command, split into words like in a shell but run without one, when a warning appears "
        "or a run ends; it gets the JSON on standard input",
        metavar="COMMAND",
        section="output",
    )
    show: bool = option(False, "open the figure in a window, where there is a display", section="output")
    fail_on: str | None = option(
        None,
        "exit with 4 when there is a warning (or any finding, on the configuration too)",
        choices=("warning", "notice"),
        section="output",
    )


@dataclass(frozen=True)
class ExportOptions:
    """export: which run, and for which program"""

    run: Path = option(None, "the run folder", metavar="RUN", positional=True)
    to: str = option(
        None,
        "csv: epochs.csv, markers.csv and steps.csv; tensorboard: an event file; mlflow: a file store",
        choices=("csv", "tensorboard", "mlflow"),
        required=True,
    )
    output_dir: Path = option(None, "folder to make, or an empty one", metavar="DIR", required=True)
