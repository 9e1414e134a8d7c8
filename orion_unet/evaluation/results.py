"""What an evaluation is asked for, and what it finds out: the files and the terminal show this."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from orion_unet.evaluation.baselines import Baselines
from orion_unet.evaluation.cell_scores import CellResult
from orion_unet.evaluation.patches import ScoredPatch
from orion_unet.evaluation.scorecard import Scorecard
from orion_unet.evaluation.scored_folder import FolderOptions, ScoredFolder


@dataclass(frozen=True)
class EvaluateOptions:
    """What ``evaluate`` is asked for. ``cells`` is None (no cells), "" (nuclei are found) or a folder of labels."""

    checkpoint: Path
    pairs_dir: Path
    split: str = "val"
    output_dir: Path | None = None
    positive_threshold: str | None = None
    cells: str | None = None
    nuclear_marker: str | None = None
    device: str = "auto"
    use_amp: bool = False
    overwrite: bool = False
    folder: FolderOptions = field(default_factory=FolderOptions)


@dataclass(frozen=True)
class Evaluation:
    """Everything that was found out.

    A pixel is positive above ``thresholds`` (C,). ``samples`` are the measured and the predicted values (C, n) of a
    ``share`` of the pixels, ``patches`` some of the scored patches, each with a word for it. ``no_interval`` says why
    there are no intervals; it is empty where there are some.
    """

    options: EvaluateOptions
    folder: ScoredFolder
    cores: tuple[int, ...]
    card: Scorecard
    baselines: Baselines
    thresholds: np.ndarray
    share: float
    samples: tuple[np.ndarray, np.ndarray]
    patches: list[tuple[str, ScoredPatch]]
    cells: CellResult | None
    no_interval: str
    warnings: tuple[str, ...]
