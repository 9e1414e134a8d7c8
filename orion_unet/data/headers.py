"""What the header of each file of a folder of pairs says: shape, dtype, axis order. Reads no pixels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from orion_unet.data.measured import file_state, fingerprint, reading_threads, recall, remember
from orion_unet.data.slide_regions import REGION_SUFFIX, region_image
from orion_unet.errors import InputError
from orion_unet.run_log import open_regular
from orion_unet.slides.remote import is_remote
from orion_unet.slides.stored import StoredImage, require_tiled_readers, stored_image

DTYPES = ("uint8", "uint16", "float16", "float32")
NPY = ".npy"


@dataclass(frozen=True)
class Header:
    """A file's dtype, offset of its pixels (-1: tiles), and the shapes (H, W, C) that it may have by axis order.

    The axis order of a .npy file may be either; ``shape`` is its own. ``stored`` says more of a TIFF or OME-Zarr.
    """

    dtype: str
    offset: int
    fortran: bool
    shape: tuple[int, ...]
    sizes: dict[str, tuple[int, int, int]]
    stored: StoredImage | None = None


class Unusable(Exception):
    """A file that cannot be used; the text says why."""


def read_headers(folder: Path, files: Sequence[tuple[str, str]], level: int) -> dict[str, Header | Unusable]:
    """The header of each file, given as (name, modality), at a level of its pyramid, or why it cannot be used.

    Headers of TIFF and OME-Zarr are read in threads and kept: later calls read only those of changed files. Raises
    InputError if a package is missing that reads one of them.
    """
    tiled = [(name, modality) for name, modality in files if not name.endswith(NPY)]
    require_tiled_readers([name for name, _ in tiled])
    found: dict[str, Header | Unusable] = {}
    for name, modality in files:
        if name.endswith(NPY):
            try:
                if is_remote(folder):
                    raise Unusable(f"{name}: is .npy, which is not read from object storage")
                found[name] = _npy(folder / name, modality, level)
            except Unusable as error:
                found[name] = error
    if not tiled:
        return found
    kept = _Kept(folder, level)
    with ThreadPoolExecutor(max_workers=2 * reading_threads(folder)) as pool:
        for (name, _), header in zip(tiled, pool.map(lambda file: kept.header(*file), tiled), strict=True):
            found[name] = header
    kept.store()
    return found


class _Kept:
    """The headers of a folder that an earlier call read, by file name and state."""

    def __init__(self, folder: Path, level: int) -> None:
        self._folder, self._level = folder, level
        self._name = fingerprint((), "headers", str(folder.resolve()), level)
        document = recall(self._name)
        stored = document.get("files") if isinstance(document, dict) else None
        self._before: dict[str, Any] = stored if isinstance(stored, dict) else {}
        self._now: dict[str, Any] = {}

    def header(self, name: str, modality: str) -> Header | Unusable:
        path = self._folder / name
        try:
            state = list(file_state(path))
            before = self._before.get(name)
            stored = None
            if isinstance(before, dict) and before.get("state") == state:
                with suppress(KeyError, TypeError, ValueError):
                    stored = _from_plain(before["image"])
            if stored is None:
                found = region_image if name.endswith(REGION_SUFFIX) else stored_image
                stored = found(path, modality, self._level)
        except InputError as error:
            return Unusable(str(error).replace(f"{path}: ", f"{name}: ", 1))
        self._now[name] = {"state": state, "image": asdict(stored)}
        dtype = np.dtype(stored.dtype)
        if dtype.newbyteorder("=").name not in DTYPES:
            return Unusable(f"{name}: has dtype {dtype}; use one of {', '.join(DTYPES)}")
        sizes = {stored.layout: stored.shape}
        return Header(stored.dtype, stored.offset, False, stored.shape, sizes, stored)

    def store(self) -> None:
        if self._now != self._before:
            remember(self._name, {"files": self._now})


def _from_plain(document: dict[str, Any]) -> StoredImage:
    height, width, channels = map(int, document["shape"])
    return StoredImage(**{**document, "shape": (height, width, channels), "names": tuple(document["names"])})


def _npy(path: Path, modality: str, level: int) -> Header:
    """The header of a .npy file, which is mapped and not unpickled."""
    try:
        open_regular(path).close()
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise Unusable(f"{path.name}: cannot be read ({error.strerror or error})") from None
    except Exception as error:
        # NumPy evaluates the header as a Python literal, so a broken header can raise almost any exception.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "pickle" in reason.lower() or "object" in reason.lower():
            reason = "it is pickled or not .npy; pickled data is never loaded, so save it as a plain numeric array"
        elif "mmap length" in reason or "No data" in reason or "EOF" in reason:
            reason = "it is truncated: shorter than its header says"
        else:
            reason = f"it is not a valid .npy file ({reason})"
        raise Unusable(f"{path.name}: {reason}") from None
    if not isinstance(array, np.memmap):
        array.close()
        raise Unusable(f"{path.name}: is an archive of arrays (.npz), not one array")
    if array.dtype.name not in DTYPES:
        raise Unusable(f"{path.name}: has dtype {array.dtype}; use one of {', '.join(DTYPES)}")
    if array.ndim != 3:
        raise Unusable(f"{path.name}: has shape {array.shape}; it needs three axes, (H, W, C) or (C, H, W)")
    if level:
        raise Unusable(f"{path.name}: has no level {level}; .npy has no pyramid, use --level 0")
    height, width, channels = array.shape
    sizes = {"hwc": (height, width, channels), "chw": (width, channels, height)}
    if modality == "he":
        sizes = {layout: size for layout, size in sizes.items() if size[2] == 3}
    fortran = array.flags.f_contiguous and not array.flags.c_contiguous
    return Header(array.dtype.str, int(array.offset), fortran, array.shape, sizes)


def stored_images(headers: Iterable[Header | Unusable]) -> list[StoredImage]:
    """Those of TIFF and OME-Zarr."""
    return [header.stored for header in headers if isinstance(header, Header) and header.stored is not None]
