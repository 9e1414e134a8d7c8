"""The chunks of one level of an OME-Zarr image, of version 2 or 3, plain or in shards.

Chunks of the common codecs (blosc, zstd, gzip and those of numcodecs) are read and decoded here, in a fraction of the
time that zarr takes for one; any other array is read through zarr. The formats: https://zarr-specs.readthedocs.io.
"""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from orion_unet.errors import InputError
from orion_unet.slides.remote import reading_pool
from orion_unet.slides.tiles import LARGEST_SEGMENT, Place, Tiles

# In the index of a shard: a chunk that is left out.
LEFT_OUT = 2**64 - 1
# Chunks of a shard on object storage that are no further apart are read in one request [bytes]: what lies between them
# takes less time than another request.
GAP_BYTES = 1 << 16

Decode = Callable[[bytes], bytes]
T = TypeVar("T")


class Located(NamedTuple):
    """Where the bytes of a chunk are in its shard."""

    start: int
    end: int
    place: Place


class ZarrTiles(Tiles):
    """One level of an image with the axes c, y, x; others must have one position.

    Chunks that are left out have the array's fill value. ``channels_last`` is True where c is the last axis. Raises
    InputError if not one chunk is there, or if one is too large for memory.
    """

    def __init__(self, path: Path, array: Any, axes: str, level: int = 0) -> None:
        sides = dict(zip(axes, array.shape, strict=True))
        fill = array.fill_value
        super().__init__(path, level, 0 if fill is None else fill)
        self.shape, self.channels = (sides["y"], sides["x"]), sides.get("c", 1)
        self.dtype = np.dtype(array.dtype).newbyteorder("=")
        chunk = dict(zip(axes, array.chunks, strict=True))
        self.side, self.depth = (chunk["y"], chunk["x"]), chunk.get("c", 1)
        self.channels_last = axes.endswith("c")
        self._array, self._axes, self._chunk = array, axes, tuple(array.chunks)
        self._shard = None if array.shards is None else tuple(array.shards)
        if int(np.prod(self._chunk)) * self.dtype.itemsize > LARGEST_SEGMENT:
            raise InputError(
                f"{path}: level {level} is stored in chunks of {self._chunk}, too large to be read by region: save it "
                "in smaller ones"
            )
        # Text: joining paths would take longer than reading a small chunk.
        if self.remote:
            self._folder = f"{array.path}/" if array.path else ""
        else:
            self._folder = str(Path(str(array.store_path.store.root)) / array.store_path.path)
        self._key: Callable[[tuple[int, ...]], str] = array.metadata.encode_chunk_key
        self._codecs = _codecs(array)
        self._indices: dict[str, np.ndarray] = {}
        self._single_tiles = False
        self._per_shard = [outer // inner for outer, inner in zip(self._shard or self._chunk, self._chunk, strict=True)]
        # A shard's index is fetched by one thread, and waited for by the others.
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        if not (self._lists_chunks() if self.remote else _has_chunks(Path(self._folder))):
            raise InputError(
                f"{path}: has no pixels at level {level}: not one chunk of the array {array.path or '.'} is there; "
                "copy it again"
            )

    def expect_single_tiles(self) -> None:
        self._single_tiles = True

    def _lists_chunks(self) -> bool:
        """Whether the list of a store has a chunk or shard of this array."""
        names = (
            name[len(self._folder) :] for name in self._array.store_path.store.sizes if name.startswith(self._folder)
        )
        return any(name != "zarr.json" and not name.rpartition("/")[2].startswith(".") for name in names)

    def tile(self, place: Place) -> np.ndarray | None:
        if self.remote and self._shard is not None and self._codecs is not None:
            return self.fetched([place])[place]
        coordinates = self._coordinates(place)
        try:
            chunk = self._through_zarr(coordinates) if self._codecs is None else self._chunk_at(coordinates)
        except Exception as error:
            # On damaged bytes a decoder can raise almost anything.
            raise self.damaged(place, error) from None
        return None if chunk is None else self._as_tile(chunk)

    def fetched(self, places: Sequence[Place]) -> dict[Place, np.ndarray | None]:
        if self._shard is None or self._codecs is None:
            return super().fetched(places)
        of_shard: defaultdict[str, list[tuple[Place, tuple[int, ...]]]] = defaultdict(list)
        for place in places:
            key, inside = self._in_shard(self._coordinates(place))
            of_shard[self._folder + key].append((place, inside))
        found: dict[Place, np.ndarray | None] = dict.fromkeys(places)
        pieces = [piece for part in _each(self._pieces, of_shard.items()) for piece in part]
        for tiles in _each(self._piece, pieces):
            found |= tiles
        return found

    def _pieces(self, shard: tuple[str, list[tuple[Place, tuple[int, ...]]]]) -> list[tuple[str, list[Located]]]:
        """What to read of a shard for some chunks: chunks that lie close together, in the order of their bytes."""
        name, wanted = shard
        store = self._array.store_path.store
        if name not in store.sizes:
            return []
        try:
            with self._locks[name]:
                if name not in self._indices:
                    self._indices[name] = self._index(partial(store.read, name), store.sizes[name])
        except Exception as error:
            raise self.damaged(wanted[0][0], error) from None
        chunks = []
        for place, inside in wanted:
            offset, length = (int(value) for value in self._indices[name][inside])
            if LEFT_OUT in (offset, length):
                continue
            if offset + length > store.sizes[name]:
                raise self.damaged(place, ValueError("the object ends here"))
            chunks.append(Located(offset, offset + length, place))
        pieces: list[tuple[str, list[Located]]] = []
        for chunk in sorted(chunks):
            if pieces and chunk.start - pieces[-1][1][-1].end <= GAP_BYTES:
                pieces[-1][1].append(chunk)
            else:
                pieces.append((name, [chunk]))
        return pieces

    def _piece(self, piece: tuple[str, list[Located]]) -> dict[Place, np.ndarray | None]:
        name, chunks = piece
        first, place = chunks[0].start, chunks[0].place
        found: dict[Place, np.ndarray | None] = {}
        try:
            data = self._array.store_path.store.read(name, first, max(chunk.end for chunk in chunks) - first)
            for start, end, place in chunks:
                found[place] = self._as_tile(self._decoded(data[start - first : end - first]))
        except Exception as error:
            # On damaged bytes a decoder can raise almost anything.
            raise self.damaged(place, error) from None
        return found

    def _coordinates(self, place: Place) -> tuple[int, ...]:
        """A chunk's place in the array's axes."""
        row, group, column = place
        position = {"y": row, "x": column, "c": group}
        return tuple(position.get(axis, 0) for axis in self._axes)

    def _in_shard(self, coordinates: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        """The name of a chunk's shard, and its place there."""
        per_shard = self._per_shard
        key = self._key(tuple(at // count for at, count in zip(coordinates, per_shard, strict=True)))
        return key, tuple(at % count for at, count in zip(coordinates, per_shard, strict=True))

    def _as_tile(self, chunk: np.ndarray) -> np.ndarray:
        """A chunk in the array's axes as (h, w, depth)."""
        kept = [axis for axis in self._axes if axis in "yxc"]
        chunk = chunk.reshape([side for axis, side in zip(self._axes, chunk.shape, strict=True) if axis in "yxc"])
        if "c" not in kept:
            chunk, kept = chunk[..., None], [*kept, "c"]
        return chunk.transpose([kept.index(axis) for axis in "yxc"])

    def _through_zarr(self, coordinates: tuple[int, ...]) -> np.ndarray:
        box = tuple(slice(at * side, (at + 1) * side) for at, side in zip(coordinates, self._chunk, strict=True))
        return np.asarray(self._array[box], self.dtype)

    def _chunk_at(self, coordinates: tuple[int, ...]) -> np.ndarray | None:
        data = self._encoded(coordinates)
        return None if data is None else self._decoded(data)

    def _decoded(self, data: bytes) -> np.ndarray:
        """A chunk from its bytes as stored."""
        assert self._codecs is not None
        for decode in self._codecs.decoders:
            data = decode(data)
        chunk = np.frombuffer(data, self._codecs.dtype).reshape(self._chunk)
        return chunk.astype(self.dtype, copy=False)

    def _encoded(self, coordinates: tuple[int, ...]) -> bytes | None:
        """The bytes of a chunk as stored; None if it is left out."""
        if self.remote:
            whole: bytes | None = self._array.store_path.store.read(self._folder + self._key(coordinates))
            return whole
        try:
            if self._shard is None:
                with open(f"{self._folder}/{self._key(coordinates)}", "rb", buffering=0) as file:
                    return file.readall()
            key, inside = self._in_shard(coordinates)
            handle = os.open(f"{self._folder}/{key}", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            if self._single_tiles:
                with suppress(AttributeError, OSError):
                    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_RANDOM)
            if key not in self._indices:
                size = os.fstat(handle).st_size
                self._indices[key] = self._index(lambda at, length: _exactly(handle, at, length), size)
            offset, length = (int(value) for value in self._indices[key][inside])
            if LEFT_OUT in (offset, length):
                return None
            return _exactly(handle, offset, length)
        finally:
            os.close(handle)

    def _index(self, read: Callable[[int, int], bytes], size: int) -> np.ndarray:
        """Offset and length of every chunk of a shard of so many bytes, (..., 2)."""
        import google_crc32c

        count = int(np.prod(self._per_shard))
        if size < 16 * count + 4:
            raise ValueError("the shard is shorter than its index")
        at_end = self._codecs is None or self._codecs.index_at_end
        stored = read(size - (16 * count + 4) if at_end else 0, 16 * count + 4)
        if google_crc32c.value(stored[:-4]) != int.from_bytes(stored[-4:], "little"):
            raise ValueError("the index of the shard is damaged")
        return np.frombuffer(stored[:-4], "<u8").reshape(*self._per_shard, 2)


def _each(call: Callable[[Any], T], given: Iterable[Any]) -> Iterable[T]:
    """What a call gives for each, at the same time; of one, without another thread."""
    given = list(given)
    return reading_pool().map(call, given) if len(given) > 1 else map(call, given)


def _exactly(handle: int, offset: int, length: int) -> bytes:
    data = os.pread(handle, length, offset) if offset >= 0 else b""
    if len(data) < length:
        raise ValueError("the file ends here")
    return data


def _has_chunks(folder: Path) -> bool:
    """Whether an array has a chunk or shard: a file that is no metadata."""
    for where, _, files in os.walk(folder):
        if any(not name.startswith(".") and not (name == "zarr.json" and Path(where) == folder) for name in files):
            return True
    return False


class _Codecs:
    """How a chunk is decoded: the decoders in turn, then the dtype of the bytes."""

    def __init__(self, dtype: np.dtype[Any], decoders: list[Decode], index_at_end: bool = True) -> None:
        self.dtype, self.decoders, self.index_at_end = dtype, decoders, index_at_end


def _codecs(array: Any) -> _Codecs | None:
    """How the chunks of an array are decoded; None if only zarr can."""
    stored = array.metadata.to_dict()
    if stored["zarr_format"] == 2:
        if stored["order"] != "C" or stored["filters"]:
            return None
        compressors = [_blosc if codec.codec_id == "blosc" else codec.decode for codec in array.compressors]
        return _Codecs(np.dtype(stored["dtype"]), compressors)
    codecs, at_end = list(stored["codecs"]), True
    if array.shards is not None:
        outer = codecs.pop(0)["configuration"]
        index = [codec["name"] for codec in outer["index_codecs"]]
        if codecs or index != ["bytes", "crc32c"] or outer["index_codecs"][0]["configuration"]["endian"] != "little":
            return None
        codecs, at_end = list(outer["codecs"]), outer["index_location"] == "end"
    decoders = _decoders(codecs[1:])
    if not codecs or codecs[0]["name"] != "bytes" or decoders is None:
        return None
    endian = (codecs[0].get("configuration") or {}).get("endian")
    return _Codecs(np.dtype(array.dtype).newbyteorder(">" if endian == "big" else "<"), decoders, at_end)


def _decoders(codecs: list[dict[str, Any]]) -> list[Decode] | None:
    """Decoders of the codecs from bytes to bytes, the last first; None if one is not among the common ones."""
    import numcodecs

    known: dict[str, Callable[[], Decode]] = {
        "zstd": lambda: numcodecs.Zstd().decode,
        "blosc": lambda: _blosc,
        "gzip": lambda: numcodecs.GZip().decode,
        "crc32c": lambda: _checked,
    }
    if any(codec["name"] not in known for codec in codecs):
        return None
    return [known[codec["name"]]() for codec in reversed(codecs)]


def _blosc(data: bytes) -> bytes:
    import numcodecs

    # The decoder trusts the length in the header, and would read past the end of a truncated chunk.
    if len(data) < 16 or int.from_bytes(data[12:16], "little") != len(data):
        raise ValueError("its length is not that in its header")
    # One thread: loader processes are forked, and each has a core.
    numcodecs.blosc.use_threads = False
    decoded: bytes = numcodecs.Blosc().decode(data)
    return decoded


def _checked(data: bytes) -> bytes:
    """Bytes without the checksum behind them."""
    import google_crc32c

    if google_crc32c.value(data[:-4]) != int.from_bytes(data[-4:], "little"):
        raise ValueError("its checksum is another")
    return data[:-4]
