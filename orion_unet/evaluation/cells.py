"""Cells: nuclei found in the measured nuclear marker or given as label files, and the mean intensity of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from orion_unet.errors import InputError
from orion_unet.evaluation.scored_folder import Region, ScoredFolder
from orion_unet.run_log import open_regular
from orion_unet.segmentation import nuclear_marker, segment_nuclei

LABEL_SUFFIXES = ("_LABELS.npy", "_LABELS.tif")
# What to do where no marker is named like a nuclear stain.
INSTEAD = "give the folder of label files as --cells DIR"


@dataclass(frozen=True)
class Cells:
    """Cells of some cores: ``measured`` and ``predicted`` (n, C) mean intensities in [0, 1], ``core`` (n,) which.

    ``measured`` is NaN for markers that were not measured in the core.
    """

    measured: np.ndarray
    predicted: np.ndarray
    core: np.ndarray

    @classmethod
    def joined(cls, parts: Sequence[Cells], markers: int) -> Cells:
        """The cells of all parts; the k-th part's are of core k."""
        empty = np.empty((0, markers))
        return cls(
            np.concatenate([empty, *(part.measured for part in parts)]),
            np.concatenate([empty, *(part.predicted for part in parts)]),
            np.repeat(np.arange(len(parts)), [len(part.core) for part in parts]),
        )


def label_file(folder: Path, name: str) -> Path | None:
    """NAME_LABELS.npy or NAME_LABELS.tif of a core, None where there is neither."""
    paths = (folder / f"{name}{suffix}" for suffix in LABEL_SUFFIXES)
    return next((path for path in paths if path.is_file()), None)


def reads_images(given: str) -> bool:
    """Whether the folder that ``--cells`` names has label files that are images."""
    return bool(given) and any(Path(given).glob(f"*{LABEL_SUFFIXES[1]}"))


def load_labels(path: Path, size: tuple[int, int]) -> np.ndarray:
    """Labels (H, W) of a core, numbered from 1 and 0 outside of cells, from any integers; raises InputError."""
    try:
        open_regular(path).close()
        if path.suffix == ".npy":
            labels = np.load(path, allow_pickle=False)
        else:
            import tifffile

            labels = tifffile.imread(path)
    except Exception as error:
        # Both readers raise nearly anything on damaged bytes.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: cannot be read as labels ({reason})") from None
    if not isinstance(labels, np.ndarray) or labels.dtype.kind not in "ui" or labels.shape != size:
        seen = f"{labels.dtype} {labels.shape}" if isinstance(labels, np.ndarray) else "an archive"
        raise InputError(f"{path}: holds {seen}; labels are integers of the core's height and width, {size}")
    if labels.size and labels.min() < 0:
        raise InputError(f"{path}: holds negative labels; 0 is outside of cells")
    numbers = np.unique(labels, return_inverse=True)[1].reshape(size)
    return numbers if (labels == 0).any() else numbers + 1


def cell_means(labels: np.ndarray, images: Tensor) -> np.ndarray:
    """Mean (n, C) of images (C, H, W) in each of the n cells of labels (H, W), numbered 1 to n."""
    flat = labels.ravel()
    pixels = np.bincount(flat)[1:]
    sums = [np.bincount(flat, image.flatten().double().cpu().numpy())[1:] for image in images]
    return np.stack(sums, axis=1) / pixels[:, None]


def measure_cells(labels: np.ndarray, region: Region) -> Cells:
    """The cells of one core, given the whole of it."""
    found = cell_means(labels, region.measured)
    found[:, ~region.present] = np.nan
    return Cells(found, cell_means(labels, region.predicted), np.zeros(len(found), int))


class CellFinder:
    """The cells of a core: nuclei of the measured nuclear marker, or those of its label file.

    ``given`` is "" or the folder of the label files. Raises InputError where no marker shows nuclei, or where one of
    the ``cores`` has no label file, or lacks the marker.
    """

    def __init__(self, folder: ScoredFolder, given: str, nuclear: str | None, cores: Sequence[int]) -> None:
        self.folder = folder
        self.labels = Path(given) if given else None
        # A marker is needed only where nuclei are to be found in it.
        self.nuclear = 0 if self.labels else nuclear_marker(folder.names, nuclear, INSTEAD)
        self.source = f"labels from {self.labels}" if self.labels else f"nuclei found in {folder.names[self.nuclear]}"
        lacking = [str(folder.table.names[core]) for core in cores if not self.knows(core)]
        if lacking and self.labels is None:
            raise InputError.listing(
                f"--cells: {folder.names[self.nuclear]} was not measured in these cores, so nuclei cannot be found:",
                lacking,
                "Choose another --nuclear_marker, or give the folder of label files as --cells DIR.",
            )
        if lacking:
            raise InputError.listing(
                f"--cells {self.labels}: lacks the labels of these cores:",
                [" or ".join(f"{name}{suffix}" for suffix in LABEL_SUFFIXES) for name in lacking],
            )

    def knows(self, core: int) -> bool:
        """Whether the cells of a core can be found."""
        if self.labels is None:
            return bool(self.folder.table.measured_in(core)[self.nuclear])
        return label_file(self.labels, str(self.folder.table.names[core])) is not None

    def find(self, core: int, region: Region) -> Cells:
        """The cells of a core, given the whole of it."""
        if self.labels is None:
            labels = segment_nuclei(region.measured[self.nuclear].cpu().numpy())
        else:
            path = label_file(self.labels, str(self.folder.table.names[core]))
            assert path is not None, "the constructor and the callers have looked"
            labels = load_labels(path, self.folder.size(core))
        return measure_cells(labels, region)
