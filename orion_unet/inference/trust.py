"""How far each marker of a model can be trusted: a verdict from held-out tissue, kept beside the checkpoint."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orion_unet.run_log import CHECKPOINT_DIR, read_document, utc_now, write_json

SCORECARD_FILE = "scorecard.json"
SCHEMA = 1
SUPPORTED, WEAK, NOT_SUPPORTED, NOT_JUDGED = "supported", "weak", "not supported", "not judged"
VERDICTS = (SUPPORTED, WEAK, NOT_SUPPORTED, NOT_JUDGED)
RULE = (
    "supported: the lower end of the 95 % interval of the marker's Pearson correlation on held-out tissue is above 0 "
    "and above the correlation of the regression from colours; weak: above 0, but not above that of the regression, or "
    "there is no regression; not supported: not above 0; not judged: there is no interval"
)


@dataclass(frozen=True)
class MarkerTrust:
    """Pearson correlation of a marker on held-out tissue, the ends of its interval, that of the regression from
    colours (NaN where undefined), and the verdict that follows by RULE."""

    pearson: float
    low: float
    high: float
    regression: float
    verdict: str

    def sentence(self) -> str:
        """The verdict with its numbers."""
        if self.verdict == NOT_JUDGED:
            return self.verdict
        against = f"; regression from colours {self.regression:.3f}" if math.isfinite(self.regression) else ""
        interval = f"95 % interval {self.low:.3f} to {self.high:.3f}"
        return f"{self.verdict}: Pearson {self.pearson:.3f}, {interval}{against}"


UNKNOWN = MarkerTrust(math.nan, math.nan, math.nan, math.nan, NOT_JUDGED)


def judge_marker(low: float, regression: float | None) -> str:
    """The verdict of RULE from the lower end of the interval of a marker's correlation.

    ``regression`` is the correlation that the regression from colours reaches: None where there is no regression, NaN
    where its prediction is constant, which counts as 0.
    """
    if not math.isfinite(low):
        return NOT_JUDGED
    if low <= 0:
        return NOT_SUPPORTED
    if regression is None:
        return WEAK
    return SUPPORTED if low > (regression if math.isfinite(regression) else 0.0) else WEAK


def run_folder_of(checkpoint: Path) -> Path:
    """The run folder of a checkpoint file, or the folder itself."""
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    return folder.parent if folder.name == CHECKPOINT_DIR else folder


def file_digest(path: Path) -> str:
    """SHA-256 of a file. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_scorecard(checkpoint: Path, markers: Mapping[str, MarkerTrust], source: Mapping[str, Any]) -> Path:
    """Write the verdicts beside a checkpoint file, as scorecard.json of its run folder; returns the path.

    ``source`` says what the verdicts come from: command, pairs, units. Raises OSError.
    """
    path = run_folder_of(checkpoint) / SCORECARD_FILE
    document = {
        "schema": SCHEMA,
        "created": utc_now(),
        "checkpoint": {"name": checkpoint.name, "sha256": file_digest(checkpoint)},
        "source": dict(source),
        "rule": RULE,
        "markers": {name: asdict(found) for name, found in markers.items()},
    }
    write_json(path, document)
    return path


def read_scorecard(checkpoint: Path) -> tuple[dict[str, MarkerTrust] | None, str]:
    """The verdicts by marker that belong to a checkpoint file; None, and a sentence that says why, without any."""
    path = run_folder_of(checkpoint) / SCORECARD_FILE
    missing = f"no verdict on the markers: {path} does not exist; evaluate or crossval write it"
    try:
        document, _ = read_document(path)
    except FileNotFoundError:
        return None, missing
    except OSError as error:
        return None, f"no verdict on the markers: {path} cannot be read ({error.strerror or error})"
    try:
        if document is None or document["schema"] != SCHEMA:
            raise ValueError
        same = document["checkpoint"]["sha256"] == file_digest(checkpoint)
        found = {str(name): _marker(values) for name, values in document["markers"].items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        return None, f"no verdict on the markers: {path} is no scorecard of this version"
    if not same:
        return None, f"no verdict on the markers: {path} is of another checkpoint than {checkpoint}; evaluate it again"
    return found, ""


def _marker(values: Mapping[str, Any]) -> MarkerTrust:
    pearson, low, high, regression = (
        math.nan if values[name] is None else float(values[name]) for name in ("pearson", "low", "high", "regression")
    )
    if values["verdict"] not in VERDICTS:
        raise ValueError
    return MarkerTrust(pearson, low, high, regression, values["verdict"])


def summary(markers: Mapping[str, MarkerTrust], names: Sequence[str]) -> str:
    """One line: which of the named markers have which verdict."""
    parts = []
    for verdict in VERDICTS:
        listed = [name for name in names if markers.get(name, UNKNOWN).verdict == verdict]
        if listed:
            parts.append(f"{verdict}: {', '.join(listed)}")
    return f"On held-out tissue {'; '.join(parts)}"


def verdict_mark(name: str, markers: Mapping[str, MarkerTrust] | None) -> str:
    """What follows the name of a marker in a picture: its verdict in brackets, nothing where it is supported or there
    are no verdicts."""
    verdict = SUPPORTED if markers is None else markers.get(name, UNKNOWN).verdict
    return "" if verdict == SUPPORTED else f" ({verdict})"
