"""TensorBoard events beside the JSON log, if asked for."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from orion_unet.errors import InputError


class EventWriter:
    """Writes the record of an epoch as scalars; does nothing unless wanted."""

    def __init__(self, run_dir: Path, wanted: bool) -> None:
        self._writer: Any = None
        if wanted:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(run_dir / "tensorboard"))

    @staticmethod
    def check_available(wanted: bool) -> None:
        """Raises InputError if events are wanted and the package is missing."""
        if wanted and importlib.util.find_spec("tensorboard") is None:
            raise InputError("--tensorboard: the tensorboard package is not installed (pip install tensorboard)")

    def write(self, record: dict[str, Any]) -> None:
        """Write the scalars of one metrics.jsonl record, without those that are undefined."""
        if self._writer is None:
            return
        scalars = {"lr": record["lr"], "grad_norm": record["grad_norm"], "samples_per_s": record["samples_per_s"]}
        for side in ("train", "val"):
            scalars[f"loss/{side}"] = record[side]["loss"]
            scalars |= {f"{side}/{term}": value for term, value in record[side]["terms"].items()}
        scalars |= {f"metrics/{name}": value for name, value in record["val"]["metrics"].items()}
        for name, values in record["val"]["per_channel"].items():
            scalars[f"pearson/{name}"] = values["pearson"]
        for name, value in scalars.items():
            if value is not None:
                self._writer.add_scalar(name, value, record["epoch"])
        self._writer.flush()

    def close(self) -> None:
        """Finish the file."""
        if self._writer is not None:
            self._writer.close()
