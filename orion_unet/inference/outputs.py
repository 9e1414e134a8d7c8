"""The files of predict: its inputs, its outputs, and the record of what an interrupted command has finished."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from orion_unet.data.channels import NAMES_FILE
from orion_unet.data.dataset import stated_pixel_size
from orion_unet.data.measured import file_state
from orion_unet.data.pairs import pair_file
from orion_unet.errors import InputError, RunError
from orion_unet.run_log import fsync_folder, read_document, write_atomic, write_json
from orion_unet.slides.open import SUFFIXES, is_zarr_image
from orion_unet.slides.remote import input_path

RESULT_SUFFIX = {"npy": ".npy", "ome-tiff": ".ome.tiff"}
SPREAD = "_spread"
RECORD_FILE = ".predict.partial.json"


@dataclass(frozen=True)
class Job:
    """One input and its outputs. ``fingerprint`` is everything that decides the values of the prediction.

    ``pixel_size_um`` comes from the command line. It is written to an output and does not change its values.
    ``stated_pixel_size_um`` is that of the dataset.json beside the H&E of a pair, which wins over the file's own.
    """

    source: Path
    name: str
    result: Path
    overview: Path | None
    fingerprint: dict[str, Any]
    pixel_size_um: float | None = None
    spread: Path | None = None
    stated_pixel_size_um: float | None = None

    @property
    def outputs(self) -> list[Path]:
        """Every file that becomes of the input."""
        return [path for path in (self.result, self.spread, self.overview) if path is not None]

    @property
    def done(self) -> dict[str, Any]:
        """What identifies a finished output."""
        return {**self.fingerprint, "pixel_size_um": self.pixel_size_um}


def find_inputs(given: Sequence[str | Path]) -> list[Path]:
    """The given files, and of folders their ``NAME_HE`` files (.npy, .ome.tif or .ome.zarr), otherwise every image.

    Raises InputError that lists everything that is missing or empty.
    """
    found: list[Path] = []
    problems = []
    for path in map(input_path, given):
        try:
            images = _images(path) if path.is_dir() and not is_zarr_image(path) else [path]
        except OSError as error:
            problems.append(f"{path}: cannot be read ({error.strerror})")
            continue
        if not images:
            problems.append(f"{path}: contains no image ({', '.join(SUFFIXES)})")
        elif not images[0].exists():
            problems.append(f"{path}: does not exist")
        found += images
    if problems:
        raise InputError.listing("--input cannot be used:", problems)
    return list(dict.fromkeys(found))


def _images(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    readable = [path for path in found if path.suffix.lower() in SUFFIXES and (path.is_file() or is_zarr_image(path))]
    return [path for path in readable if pair_file(path.name) == "he"] or [
        path for path in readable if pair_file(path.name) is None
    ]


def output_name(source: Path) -> str:
    """Name of an image without its endings: core_1 of core_1_HE.npy, slide of slide.ome.tif."""
    name = source.stem
    if name.lower().endswith(".ome"):
        name = name[: -len(".ome")]
    return name.removesuffix("_HE") or name


def plan_jobs(
    sources: Sequence[Path],
    output_dir: Path,
    kind: str,
    overview: bool,
    decisive: dict[str, Any],
    pixel_size_um: float | None = None,
    spread: bool = False,
) -> list[Job]:
    """A job for each input. ``decisive`` are the options and the checkpoint that decide the values.

    With ``spread``, each also has an output NAME_spread.

    Raises InputError if two inputs would have the same output, or an output would replace an input.
    """
    jobs, problems = [], []
    taken: dict[str, Path] = {}
    inputs = {path.resolve() for path in sources}
    for source in sources:
        name = output_name(source)
        if name in taken:
            problems.append(f"{taken[name]} and {source}: both would become {name}; predict them into two folders")
            continue
        taken[name] = source
        nbytes, modified, _ = file_state(source)
        stated = stated_pixel_size(source.parent) if pair_file(source.name) == "he" else None
        seen = {"file": source.name, "bytes": nbytes, "modified_ns": modified, "stated_pixel_size_um": stated}
        result = output_dir / f"{name}{RESULT_SUFFIX[kind]}"
        if result.resolve() in inputs:
            problems.append(f"{result}: is an input, and would be replaced; name another --output_dir")
        extra = output_dir / f"{name}{SPREAD}{RESULT_SUFFIX[kind]}" if spread else None
        if extra and extra.resolve() in inputs:
            problems.append(f"{extra}: is an input, and would be replaced; name another --output_dir")
        drawn = output_dir / f"{name}_overview.png" if overview else None
        if drawn and drawn.resolve() in inputs:
            problems.append(f"{drawn}: is an input, and would be replaced; name another --output_dir")
        # Through JSON and back, because it is compared with what was stored as JSON.
        fingerprint = json.loads(json.dumps({"input": seen, **decisive}))
        jobs.append(Job(source, name, result, drawn, fingerprint, pixel_size_um, extra, stated))
    if problems:
        raise InputError.listing("--input cannot be used:", problems)
    return jobs


class Record:
    """Which of several inputs are done, kept in the folder until all are, so that the same command can continue."""

    def __init__(self, output_dir: Path) -> None:
        self.path = output_dir / RECORD_FILE
        self._finished: dict[str, Any] = {}
        with suppress(OSError):
            document, _ = read_document(self.path)
            finished = (document or {}).get("finished")
            self._finished = finished if isinstance(finished, dict) else {}

    def has(self, job: Job) -> bool:
        """Whether an interrupted command has finished this job, and its outputs still exist."""
        return self._finished.get(job.result.name) == job.done and all(path.exists() for path in job.outputs)

    def add(self, job: Job) -> None:
        """Record a finished job."""
        self._finished[job.result.name] = job.done
        try:
            write_json(self.path, {"finished": self._finished})
        except OSError as error:
            raise RunError(f"{self.path}: cannot be written ({error.strerror or error})") from error

    def close(self) -> None:
        """Delete the record: everything is done."""
        self.path.unlink(missing_ok=True)


def prepare_folder(output_dir: Path) -> None:
    """Make the folder; raises InputError if that fails or nothing can be written there."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output_dir {output_dir}: cannot be made ({error.strerror})") from None
    if not os.access(output_dir, os.W_OK | os.X_OK):
        raise InputError(f"--output_dir {output_dir}: cannot be written to")


def refuse_existing(jobs: Sequence[Job], tables: Sequence[tuple[Path, str]] = ()) -> None:
    """Raise InputError that lists every output that exists; ``tables`` are files with the content they should have,
    nothing for one that should not exist."""
    found = [str(path) for job in jobs for path in job.outputs if path.exists()]
    for path, content in tables:
        if path.exists() and _text(path) != content:
            found.append(f"{path} (of other markers)" if path.name == NAMES_FILE else f"{path} (of another scorecard)")
    if found:
        raise InputError.listing(
            "these outputs exist:", found, "Add --overwrite to replace them, or name another --output_dir.", limit=10
        )


def names_file(output_dir: Path, names: Sequence[str]) -> tuple[Path, str]:
    """The file that names the channels of .npy outputs, as training reads it, and its content."""
    return output_dir / NAMES_FILE, "".join(f"{name}\n" for name in names)


def write_npy(path: Path, image: np.ndarray) -> None:
    """Write ``image`` (C, H, W), perhaps a memory map, channel by channel; raises RunError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            header = {"descr": np.lib.format.dtype_to_descr(image.dtype), "fortran_order": False, "shape": image.shape}
            np.lib.format.write_array_header_1_0(file, header)
            for channel in image:
                channel.tofile(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_folder(path.parent)
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_table(path: Path, content: str) -> None:
    """Write a text file unless it already has this content, and remove one without content; raises RunError."""
    if _text(path) == content:
        return
    try:
        if content:
            write_atomic(path, content.encode())
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror or error})") from error


def read_table(path: Path, columns: Sequence[str]) -> list[list[str]] | None:
    """The rows of a CSV file that predict wrote; None where there is none. Raises InputError for any other file."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    try:
        header, *rows = list(csv.reader(io.StringIO(text))) or [[]]
    except csv.Error as error:
        raise InputError(f"{path}: cannot be read as CSV ({error})") from None
    if header != list(columns) or any(len(row) != len(columns) for row in rows):
        raise InputError(f"{path}: is not a table that predict wrote; move it away, or name another folder")
    return rows


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
