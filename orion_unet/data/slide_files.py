"""slide_files.csv: where the slides of a folder of pairs are. And these slides, opened once for all their regions."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import posixpath
import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from orion_unet.data.file_states import State, recent_state
from orion_unet.errors import InputError, RunError
from orion_unet.extras import needed
from orion_unet.run_log import write_atomic
from orion_unet.slides.images import ArrayImage, HeImage
from orion_unet.slides.marker_zarr import zarr_image, zarr_tiles
from orion_unet.slides.markers import ArrayMarkers, MarkerImage
from orion_unet.slides.open import is_zarr_image, open_he, open_markers, require_readers
from orion_unet.slides.remote import RemotePath, input_path, is_remote, is_url, reading_pool
from orion_unet.slides.stored import find_tiles
from orion_unet.slides.tiles import TileCache, TiledArray, Tiles
from orion_unet.text import csv_bytes

SLIDE_FILES = "slide_files.csv"
COLUMNS = ("slide", "he", "he_bytes", "he_digest", "orion", "orion_bytes", "orion_digest")
# A slide is known by this many pieces of its files, of so many bytes each; a smaller one by all of them.
PIECES, PIECE_BYTES = 64, 1 << 14
# Hexadecimal digits of a digest.
DIGITS = 32
# Rows that are read at once where the format has no tiles.
BAND = 256
# Slides that a process has open at most. Each uses a file descriptor, often limited to 1,024.
OPEN_SLIDES = 256
TIFF_SUFFIXES = (".tif", ".tiff", ".svs")


@dataclass(frozen=True)
class SlideFile:
    """An image of a slide as slide_files.csv, here ``listed``, has it: its path, and what it is recognised by."""

    slide: str
    path: Path
    nbytes: int
    digest: str
    listed: Path

    def wrong(self, reason: str) -> InputError:
        """What to raise where the image cannot be used."""
        return self.refused(f"{self.path} {reason}")

    def refused(self, reason: str) -> InputError:
        """The same, of a reason that names the image."""
        return InputError(f"slide {self.slide}: {reason}; correct {self.listed}, or prepare the pairs again")


def write_slide_files(folder: Path, slides: Sequence[tuple[str, Path, Path]]) -> None:
    """Write slide_files.csv of slides (name, H&E, markers) into a folder of pairs; other slides in it stay.

    Slides under the parent of the folder have paths relative to the folder, so that both can be moved together; others
    have absolute paths. Raises OSError.
    """
    rows: dict[str, list[Any]] = {}
    with suppress(OSError, InputError):
        for (slide, _), file in _read(folder / SLIDE_FILES).items():
            rows.setdefault(slide, [slide]).extend((_written(file.path, folder), file.nbytes, file.digest))
    for slide, *paths in slides:
        rows[slide] = [slide, *(value for path in paths for value in (_written(path, folder), *content_state(path)))]
    write_atomic(folder / SLIDE_FILES, csv_bytes(COLUMNS, list(rows.values())))


def _written(path: Path, folder: Path) -> str:
    if is_remote(path):
        return str(path)
    path, folder = path.resolve(), folder.resolve()
    return os.path.relpath(path, folder) if path.is_relative_to(folder.parent) else str(path)


def content_state(path: Path) -> tuple[int, str]:
    """Size in bytes and digest of a file, or of an OME-Zarr folder with the names and sizes in it.

    Of a large one, pieces are read that are spread evenly. Times do not count, so a copy has the same, on object
    storage, too. Raises OSError, or for a store InputError and RunError.
    """
    if isinstance(path, RemotePath):
        inside = None if path.is_file() else path.sizes()
        size = path.size() if inside is None else 0
    else:
        inside = dict(_inside(path)) if path.is_dir() else None
        size = path.stat().st_size
    files = [("", size)] if inside is None else sorted(inside.items())
    total = sum(size for _, size in files)
    digest = hashlib.sha256(json.dumps([] if inside is None else files).encode())
    if total <= PIECES * PIECE_BYTES:
        pieces = [(name, 0, size) for name, size in files]
    else:
        chosen = np.linspace(0, len(files) - 1, min(PIECES, len(files))).round().astype(int).tolist()
        each = -(-PIECES // len(chosen))
        pieces = [
            (files[at][0], start, min(PIECE_BYTES, files[at][1]))
            for at in chosen
            for start in np.linspace(0, max(0, files[at][1] - PIECE_BYTES), each).astype(np.int64).tolist()
        ]
    read = partial(_piece, path)
    for data in reading_pool().map(read, pieces) if is_remote(path) else map(read, pieces):
        digest.update(data)
    return total, digest.hexdigest()[:DIGITS]


def _inside(folder: Path) -> Iterator[tuple[str, int]]:
    for where, _, names in os.walk(folder):
        for name in names:
            path = Path(where, name)
            yield path.relative_to(folder).as_posix(), path.stat().st_size


def _piece(path: Path, piece: tuple[str, int, int]) -> bytes:
    """Some bytes of a file, or of one inside a folder: its name there, where they begin, and how many."""
    name, start, length = piece
    file = path / name if name else path
    if isinstance(file, RemotePath):
        return file.read_range(start, length)
    with open(file, "rb", buffering=0) as handle:
        return os.pread(handle.fileno(), length, start)


def slide_file(folder: Path, slide: str, modality: str) -> SlideFile:
    """An image of a slide by slide_files.csv in a folder of pairs; modality is ``he`` or ``orion``.

    Raises InputError if that file cannot be used, or does not list the slide.
    """
    listed = folder / SLIDE_FILES
    try:
        state = recent_state(listed)
        known = _LISTED.get(listed)
        if known is None or known[0] != state:
            known = _LISTED[listed] = (state, _read(listed))
    except OSError as error:
        raise InputError(
            f"{listed}: cannot be read ({error.strerror or error}); it says where the slides of these pairs are: copy "
            "it with them, or prepare them again"
        ) from None
    if (slide, modality) not in known[1]:
        raise InputError(f"{listed}: does not list slide {slide}; add it, or prepare the pairs again")
    return known[1][slide, modality]


_LISTED: dict[Path, tuple[Hashable, dict[tuple[str, str], SlideFile]]] = {}


def _read(listed: Path) -> dict[tuple[str, str], SlideFile]:
    found = {}
    try:
        text = io.StringIO(listed.read_bytes().decode("utf-8-sig"), newline="")
        for row in csv.DictReader(text):
            for modality in ("he", "orion"):
                slide, path = row["slide"].strip(), row[modality].strip()
                nbytes, digest = int(row[f"{modality}_bytes"]), row[f"{modality}_digest"].strip()
                if not slide or not path:
                    raise ValueError("a slide or path is empty")
                found[slide, modality] = SlideFile(slide, _path(listed.parent, path), nbytes, digest, listed)
    except (OSError, InputError, RunError):
        raise
    except Exception as error:
        # What a person has edited can lack anything.
        reason = f"no column {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(
            f"{listed}: is damaged ({reason}); its columns are {', '.join(COLUMNS)}: correct it, or prepare the pairs "
            "again"
        ) from None
    return found


def _path(folder: Path, text: str) -> Path:
    """What a row of slide_files.csv in a folder names."""
    if is_url(text):
        return input_path(text)
    if not is_remote(folder) or text.startswith("/"):
        return Path(text) if text.startswith("/") else folder / text
    protocol, _, place = str(folder).partition("://")
    return input_path(f"{protocol}://{posixpath.normpath(f'{place}/{text}')}")


class SlideImage:
    """An image of a slide, read by region: by tile, where its format has tiles, and else through its reader.

    ``shape`` is (H, W), ``dtype`` that of its regions. ``side`` is that of its tiles, and ``striped`` says that these
    are strips.
    """

    def __init__(self, path: Path, modality: str, key: Hashable) -> None:
        self._path, self._modality, self._key = path, modality, key
        self._image: HeImage | MarkerImage | None = None
        self._process, self._lock = 0, threading.Lock()
        self.tiles = _tiles(path, modality)
        self.shape: tuple[int, int]
        self.side, self.striped = (BAND, BAND), False
        if self.tiles is not None:
            self.shape, self.channels, self.dtype = self.tiles.shape, self.tiles.channels, self.tiles.dtype
            self.side, self.striped = self.tiles.side, bool(getattr(self.tiles, "striped", False))
            return
        image = self._opened()
        if isinstance(image, MarkerImage):
            self.channels, *(height, width) = image.shape
            self.shape, self.dtype = (height, width), image.dtype
        else:
            self.shape, self.channels, self.dtype = image.shape, 3, image.stored(0, 0, 1, 1).dtype

    def read(self, y: int, x: int, height: int, width: int, channels: Sequence[int], cache: TileCache) -> np.ndarray:
        """A region as stored, (h, w, len(channels)), whose tiles are kept in ``cache``.

        Raises InputError if it is damaged.
        """
        if self.tiles is not None:
            layout = "hwc" if self.tiles.depth == self.tiles.channels else "chw"
            return TiledArray(self.tiles, layout, None, cache, self._key).read(y, x, height, width, channels)
        image = self._opened()
        if isinstance(image, MarkerImage):
            return image.read(channels, y, x, height, width).transpose(1, 2, 0)
        return image.stored(y, x, height, width)

    def _opened(self) -> HeImage | MarkerImage:
        """The image as this process has opened it: unlike an array, the threads of a reader do not survive a fork."""
        with self._lock:
            array = isinstance(self._image, ArrayImage | ArrayMarkers)
            if self._image is None or (self._process != os.getpid() and not array):
                opener = open_he if self._modality == "he" else open_markers
                self._image, self._process = opener(self._path), os.getpid()
            return self._image


def _tiles(path: Path, modality: str) -> Tiles | None:
    """The tiles of an image at full resolution; None if its format has none."""
    if is_zarr_image(path):
        needed("zarr")
        return zarr_tiles(path, zarr_image(path), 0)
    if path.suffix.lower() not in TIFF_SUFFIXES:
        return None
    require_readers([path])
    return find_tiles(path, modality, 0)


def slide_state(file: SlideFile) -> State:
    """The state of an image of a slide by which a change is noticed; raises InputError if it is gone."""
    try:
        return recent_state(file.path)
    except OSError as error:
        raise file.wrong(f"cannot be read ({error.strerror or error})") from None
    except InputError as error:
        raise file.refused(str(error)) from None


_OPEN: OrderedDict[Hashable, SlideImage] = OrderedDict()
_OPENING = threading.Lock()


def open_slide(file: SlideFile, modality: str) -> SlideImage:
    """An image of a slide, shared by all its regions in this process and those forked from it.

    Raises InputError if it is missing, or not the file that the pairs were made from.
    """
    key = (modality, file.path, file.nbytes, file.digest, slide_state(file))
    with _OPENING:
        if key not in _OPEN:
            try:
                known = content_state(file.path) == (file.nbytes, file.digest)
            except OSError as error:
                raise file.wrong(f"cannot be read ({error.strerror or error})") from None
            if not known:
                raise file.wrong("is not the file that the pairs were made from")
            _OPEN[key] = SlideImage(file.path, modality, key)
            if len(_OPEN) > OPEN_SLIDES:
                _OPEN.popitem(last=False)
        _OPEN.move_to_end(key)
        return _OPEN[key]
