"""A run's logs as a file store of MLflow, which ``mlflow ui --backend-store-uri FOLDER`` shows."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from orion_unet.extras import needed
from orion_unet.monitor.export_logs import Logs, scalars, seconds

EXPERIMENT = "orion-unet"
# MLflow takes so many numbers, and so many options, in one call.
METRICS_A_CALL, PARAMS_A_CALL = 1000, 100
# Its limits for the length of names and of the values of options.
NAME_CHARS, VALUE_CHARS = 250, 500
# What its names may contain; a slash parts a group from the name.
_FOREIGN = re.compile(r"[^\w .:-]", re.ASCII)
# Names of states of a run that MLflow has; any other state is that of a run that ended otherwise.
_STATES = {"finished": "FINISHED", "early_stopped": "FINISHED", "failed": "FAILED", "diverged": "FAILED"}
# Without these it refuses a file store, and asks a server whether it may report its use.
_ENVIRONMENT = {"MLFLOW_ALLOW_FILE_STORE": "true", "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}


def mlflow_writer() -> Callable[[Logs, Path, Path], None]:
    """What writes a file store. Raises InputError without the package mlflow-skinny (or mlflow)."""
    os.environ.update(_ENVIRONMENT)
    mlflow = needed("mlflow", "mlflow-skinny", extra="mlflow")
    entities = needed("mlflow.entities", "mlflow-skinny", extra="mlflow")

    def write(logs: Logs, folder: Path, final: Path) -> None:
        """Write into ``folder``, which is moved to ``final`` afterwards."""
        client = mlflow.MlflowClient(folder.as_uri())
        place = (final / "artifacts").as_uri()
        experiment = client.create_experiment(EXPERIMENT, artifact_location=place)
        # Its experiment 0 would name the folder from before the move.
        shutil.rmtree(folder / "0", ignore_errors=True)
        times = [round(1000 * seconds(row["time"])) for row in logs.epochs]
        start = times[0] - round(1000 * (logs.epochs[0]["duration_s"] or 0)) if times else None
        run = client.create_run(experiment, start_time=start, run_name=logs.name).info.run_id
        names = _Names()
        batch: list[Any] = []
        for step, when, tagged in scalars(logs):
            batch += [entities.Metric(names.of(tag), value, round(1000 * when), step) for tag, value in tagged.items()]
            if len(batch) >= METRICS_A_CALL:
                client.log_batch(run, metrics=batch[:METRICS_A_CALL])
                batch = batch[METRICS_A_CALL:]
        while batch:
            client.log_batch(run, metrics=batch[:METRICS_A_CALL])
            batch = batch[METRICS_A_CALL:]
        for part in _parts(logs.options, PARAMS_A_CALL):
            client.log_batch(run, params=[entities.Param(names.of(name), _value(value)) for name, value in part])
        client.set_terminated(run, _STATES.get(logs.state, "KILLED"), times[-1] if times else None)

    return write


class _Names:
    """Names that MLflow takes: what it does not allow becomes an underscore; two that become alike are numbered."""

    def __init__(self) -> None:
        self._of: dict[str, str] = {}
        self._taken: set[str] = set()

    def of(self, tag: str) -> str:
        """The same name for the same tag, and another for another."""
        if tag not in self._of:
            group, slash, name = tag.partition("/")
            plain = f"{self._plain(group)}{slash}{self._plain(name)}" if slash else self._plain(group)
            number, found = 1, plain
            while found in self._taken:
                number += 1
                found = f"{plain}_{number}"
            self._taken.add(found)
            self._of[tag] = found
        return self._of[tag]

    @staticmethod
    def _plain(text: str) -> str:
        plain = _FOREIGN.sub("_", text)[: NAME_CHARS // 2 - 5]
        # A name of dots, or none, would be another folder's.
        return plain if plain.strip(". ") else f"_{len(plain)}"


def _parts(options: Mapping[str, Any], size: int) -> Iterator[list[tuple[str, Any]]]:
    items = list(options.items())
    return (items[at : at + size] for at in range(0, len(items), size))


def _value(value: Any) -> str:
    return (value if isinstance(value, str) else json.dumps(value))[:VALUE_CHARS]
