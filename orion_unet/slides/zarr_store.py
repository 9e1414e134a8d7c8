"""An OME-Zarr folder on object storage, as zarr reads it: no failed read becomes a fill value."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

from zarr.abc.store import OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest

from orion_unet.slides.remote import RemotePath


class RemoteStore(Store):
    """The objects below ``root``. ``sizes`` are their bytes by name, listed once.

    What is not in that list is left out of the image, and has its fill value. What is in it and cannot be read raises
    an error: a failed read never becomes a fill value.
    """

    supports_writes = supports_deletes = supports_partial_writes = False
    supports_listing = True

    def __init__(self, root: RemotePath, sizes: dict[str, int] | None = None) -> None:
        super().__init__(read_only=True)
        self.root = root
        self.sizes = root.sizes() if sizes is None else sizes

    def with_read_only(self, read_only: bool = False) -> RemoteStore:
        return self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemoteStore) and self.root == other.root

    def __hash__(self) -> int:
        return hash(self.root)

    def __str__(self) -> str:
        return str(self.root)

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes | None:
        """Bytes of an object, all of them for a length of None; None where the folder has none of that name."""
        size = self.sizes.get(name)
        if size is None:
            return None
        return (self.root / name).read_range(offset, size - offset if length is None else length)

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
        size = self.sizes.get(key, 0)
        start, end = 0, size
        if isinstance(byte_range, RangeByteRequest):
            start, end = byte_range.start, min(size, byte_range.end)
        elif isinstance(byte_range, OffsetByteRequest):
            start = byte_range.offset
        elif isinstance(byte_range, SuffixByteRequest):
            start = max(0, size - byte_range.suffix)
        # The store is waited for in a thread: zarr asks for several objects at a time.
        data = await asyncio.to_thread(self.read, key, start, end - start)
        return None if data is None else prototype.buffer.from_bytes(data)

    async def get_partial_values(self, prototype: Any, key_ranges: Iterable[tuple[str, Any]]) -> list[Any]:
        return list(await asyncio.gather(*(self.get(key, prototype, asked) for key, asked in key_ranges)))

    async def exists(self, key: str) -> bool:
        return key in self.sizes

    async def set(self, key: str, value: Any) -> None:
        self._check_writable()

    async def delete(self, key: str) -> None:
        self._check_writable()

    async def list(self) -> AsyncIterator[str]:
        for name in self.sizes:
            yield name

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        for name in self.sizes:
            if name.startswith(prefix):
                yield name

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        start = f"{prefix.rstrip('/')}/" if prefix else ""
        for name in sorted({name[len(start) :].partition("/")[0] for name in self.sizes if name.startswith(start)}):
            yield name
