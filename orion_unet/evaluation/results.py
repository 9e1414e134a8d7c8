"""What an evaluation is asked for, and what it finds out: the files and the terminal show this."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from orion_unet.command_options import EvaluateOptions
from orion_unet.data.stain import StainJudgement
from orion_unet.evaluation.baselines import Baselines
from orion_unet.evaluation.cell_scores import CellResult
from orion_unet.evaluation.patches import ScoredPatch
from orion_unet.evaluation.scorecard import Scorecard
from orion_unet.evaluation.scored_folder import ScoredFolder


@dataclass(frozen=True)
class Evaluation:
    """Everything that was found out.

    A pixel is positive above ``thresholds`` (C,). ``samples`` are the measured and the predicted values (C, n) of a
    ``share`` of the pixels, ``patches`` some of the scored patches, each with a word for it. ``no_interval`` says why
    there are no intervals; it is empty where there are some. ``stain`` compares each core's with the training's; it is
    empty where the checkpoint does not keep that.
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
    stain: tuple[StainJudgement, ...]
    no_interval: str
    warnings: tuple[str, ...]
