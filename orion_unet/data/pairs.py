"""Finds and checks pairs of H&E and ORION files, without reading their pixels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from orion_unet.config import DataOptions
from orion_unet.data.channels import channel_names, excluded_channels
from orion_unet.errors import InputError
from orion_unet.run_log import open_regular

HE_SUFFIX = "_HE.npy"
ORION_SUFFIX = "_ORION.npy"
DTYPES = ("uint8", "uint16", "float16", "float32")
# One row per stored array. A NumPy table instead of a list of objects, so that a worker needs no more memory for
# 10,000 cores than for 10.
RECORD = np.dtype(
    [
        ("offset", "i8"),
        ("dtype", "U4"),
        ("layout", "U3"),
        ("fortran", "?"),
        ("height", "i4"),
        ("width", "i4"),
        ("channels", "i4"),
    ]
)


@dataclass
class PairTable:
    """The checked pairs of one folder.

    ``names`` (N,) are the cores in alphabetical order; ``he`` and ``orion`` (N,) say how their arrays are stored
    (``RECORD``). ``channel_names`` are the names of all stored ORION channels, ``kept_channels`` the indices of those
    that are trained on. ``warnings`` are sentences for the user.
    """

    folder: Path
    names: np.ndarray
    he: np.ndarray
    orion: np.ndarray
    channel_names: tuple[str, ...]
    kept_channels: tuple[int, ...]
    warnings: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays together."""
        return sum(
            int((rows["height"].astype(np.int64) * rows["width"] * rows["channels"] * itemsize(rows)).sum())
            for rows in (self.he, self.orion)
        )

    @property
    def kept_names(self) -> tuple[str, ...]:
        """Names of the channels that are trained on, in order."""
        return tuple(self.channel_names[index] for index in self.kept_channels)

    def path(self, core: int, modality: str) -> Path:
        """File of one core; modality is ``he`` or ``orion``."""
        return self.folder / (str(self.names[core]) + (HE_SUFFIX if modality == "he" else ORION_SUFFIX))

    def open(self, core: int, modality: str) -> np.ndarray:
        """Memory map of one core as stored; raises InputError if the file has changed since it was checked."""
        row = getattr(self, modality)[core]
        hwc = (int(row["height"]), int(row["width"]), int(row["channels"]))
        shape = hwc if row["layout"] == "hwc" else (hwc[2], hwc[0], hwc[1])
        path = self.path(core, modality)
        try:
            return np.memmap(
                path,
                dtype=str(row["dtype"]),
                mode="r",
                offset=int(row["offset"]),
                shape=shape,
                order="F" if row["fortran"] else "C",
            )
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read any more; it was changed or removed ({error})") from None


def itemsize(rows: np.ndarray) -> np.ndarray:
    """Bytes per value of each array in the rows of a table."""
    return np.array([np.dtype(text).itemsize for text in rows["dtype"].tolist()], np.int64)


def find_pairs(options: DataOptions) -> PairTable:
    """Find every pair in ``options.pairs_dir`` and check it by the headers of its files.

    Raises InputError with one message that names every bad file. Never unpickles: a file with Python objects is
    refused.
    """
    folder = Path(options.pairs_dir)
    he_names, orion_names = _scan(folder)
    paired = sorted(he_names & orion_names)
    unpaired = sorted(f"{name}{HE_SUFFIX}" for name in he_names - orion_names)
    unpaired += sorted(f"{name}{ORION_SUFFIX}" for name in orion_names - he_names)
    if not paired:
        seen = f"; unpaired: {', '.join(unpaired)}" if unpaired else ""
        raise InputError(
            f"--pairs_dir {folder}: has no pair of NAME{HE_SUFFIX} and NAME{ORION_SUFFIX}{seen}. "
            "Name the folder of your pairs, or try with `python -m orion_unet make-demo DIR`."
        )
    warnings = []
    if unpaired:
        warnings.append(f"{len(unpaired)} files without a partner are ignored: {', '.join(unpaired)}")

    problems: list[str] = []
    he, orion = np.zeros(len(paired), RECORD), np.zeros(len(paired), RECORD)
    for index, name in enumerate(paired):
        problems += _check_pair(folder, name, he[index : index + 1], orion[index : index + 1], options)
    problems += _unequal_channels(paired, orion["channels"])
    if problems:
        raise InputError.listing(
            f"--pairs_dir {folder}: these files cannot be used:",
            problems,
            "Repair them or move them out of the folder; nothing has been written.",
        )
    stored_names = channel_names(options.channel_names, folder, int(orion["channels"][0]))
    excluded = excluded_channels(options.exclude_channels, stored_names)
    kept = tuple(index for index in range(len(stored_names)) if index not in excluded)
    return PairTable(folder, np.array(paired), he, orion, stored_names, kept, warnings)


def _scan(folder: Path) -> tuple[set[str], set[str]]:
    try:
        files = [entry.name for entry in folder.iterdir()]
    except OSError as error:
        raise InputError(f"--pairs_dir {folder}: cannot be read ({error.strerror})") from None
    # Names that begin with a dot are left by copying tools (._NAME on macOS shares) and are never cores.
    visible = [name for name in files if not name.startswith(".")]
    he = {name.removesuffix(HE_SUFFIX) for name in visible if name.endswith(HE_SUFFIX)}
    orion = {name.removesuffix(ORION_SUFFIX) for name in visible if name.endswith(ORION_SUFFIX)}
    return he, orion


def _check_pair(folder: Path, name: str, he: np.ndarray, orion: np.ndarray, options: DataOptions) -> Iterator[str]:
    """Fill in the two rows of a pair, or yield its problems."""
    try:
        he_map = _header(folder / (name + HE_SUFFIX), he)
        orion_map = _header(folder / (name + ORION_SUFFIX), orion)
    except _Unusable as error:
        yield str(error)
        return
    he_shape, orion_shape = he_map.shape, orion_map.shape
    matches = [
        (he_layout, orion_layout, size)
        for he_layout, size in _he_sizes(he_shape)
        for orion_layout in ("hwc", "chw")
        if (orion_shape[:2] if orion_layout == "hwc" else orion_shape[1:]) == size
        and options.he_layout in ("auto", he_layout)
        and options.orion_layout in ("auto", orion_layout)
    ]
    if not _he_sizes(he_shape):
        yield f"{name}{HE_SUFFIX}: has shape {he_shape}; an H&E needs 3 channels, (H, W, 3) or (3, H, W)"
    elif not matches:
        yield (
            f"{name}{ORION_SUFFIX}: has shape {orion_shape}, but the H&E has {he_shape}: "
            "height and width must be equal" + _forced(options)
        )
    elif len(matches) > 1:
        which = "--orion_layout" if len({match[0] for match in matches}) == 1 else "--he_layout"
        yield (f"{name}: the axis order of {he_shape} and {orion_shape} is ambiguous; add {which} hwc or {which} chw")
    else:
        he_layout, orion_layout, (height, width) = matches[0]
        for row, layout, shape in ((he, he_layout, he_shape), (orion, orion_layout, orion_shape)):
            row["layout"], row["height"], row["width"] = layout, height, width
            row["channels"] = shape[2] if layout == "hwc" else shape[0]
        if not orion["channels"][0]:
            yield f"{name}{ORION_SUFFIX}: has shape {orion_shape}, so no channels"
        if min(height, width) < options.patch_size:
            yield f"{name}: is {height} x {width} pixels, smaller than --patch_size {options.patch_size}"


def _forced(options: DataOptions) -> str:
    given = [
        f"--{key} {value}"
        for key, value in (("he_layout", options.he_layout), ("orion_layout", options.orion_layout))
        if value != "auto"
    ]
    return f" (with {' and '.join(given)})" if given else ""


class _Unusable(Exception):
    """A file that cannot be used; the text says why."""


def _header(path: Path, row: np.ndarray) -> np.ndarray:
    """Map a file without unpickling anything, and fill in its row."""
    try:
        open_regular(path).close()
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise _Unusable(f"{path.name}: cannot be read ({error.strerror or error})") from None
    except Exception as error:
        # NumPy evaluates the header as a Python literal, so a broken header can raise almost any exception.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "pickle" in reason.lower() or "object" in reason.lower():
            reason = "it is pickled or not .npy; pickled data is never loaded, so save it as a plain numeric array"
        elif "mmap length" in reason or "No data" in reason or "EOF" in reason:
            reason = "it is truncated: shorter than its header says"
        else:
            reason = f"it is not a valid .npy file ({reason})"
        raise _Unusable(f"{path.name}: {reason}") from None
    if not isinstance(array, np.memmap):
        array.close()
        raise _Unusable(f"{path.name}: is an archive of arrays (.npz), not one array")
    if array.dtype.name not in DTYPES:
        raise _Unusable(f"{path.name}: has dtype {array.dtype}; use one of {', '.join(DTYPES)}")
    if array.ndim != 3:
        raise _Unusable(f"{path.name}: has shape {array.shape}; it needs three axes, (H, W, C) or (C, H, W)")
    row["offset"], row["dtype"] = array.offset, array.dtype.str
    row["fortran"] = array.flags.f_contiguous and not array.flags.c_contiguous
    return array


def _he_sizes(shape: Sequence[int]) -> list[tuple[str, tuple[int, int]]]:
    sizes = []
    if shape[2] == 3:
        sizes.append(("hwc", (shape[0], shape[1])))
    if shape[0] == 3:
        sizes.append(("chw", (shape[1], shape[2])))
    return sizes


def _unequal_channels(names: Sequence[str], channels: np.ndarray) -> Iterator[str]:
    # A pair that could not be read has 0 channels and is already reported.
    known = Counter(count for count in channels.tolist() if count)
    usual = known.most_common(1)[0][0] if known else 0
    for name, count in zip(names, channels.tolist(), strict=True):
        if count not in (0, usual):
            yield f"{name}{ORION_SUFFIX}: has {count} channels, but the others have {usual}"
