"""Object storage in this process's memory, and stores that fail on request."""

from __future__ import annotations

import os

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class FaultyStore(MemoryFileSystem):
    """What memory:// holds, as faulty://: before a read or a listing, ``fault(what, path, times)`` may raise an error.

    ``times`` is how often this process has asked the same before. Processes that are forked later have the same faults.
    """

    protocol = "faulty"
    fault = staticmethod(lambda what, path, times: None)
    find = fsspec.AbstractFileSystem.find
    # Of all its objects.
    asked: dict = {}  # noqa: RUF012
    process = [os.getpid()]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(str(path).replace("faulty://", "memory://"))

    def _may(self, what, path):
        if self.process[0] != os.getpid():
            self.asked.clear()
            self.process[0] = os.getpid()
        times = self.asked[what, path] = self.asked.get((what, path), -1) + 1
        type(self).fault(what, path, times)

    def cat_file(self, path, start=None, end=None, **given):
        self._may("read", self._strip_protocol(path))
        return super().cat_file(path, start, end, **given)

    def ls(self, path, detail=True, **given):
        self._may("list", self._strip_protocol(path))
        return super().ls(path, detail, **given)

    def info(self, path, **given):
        self._may("info", self._strip_protocol(path))
        return super().info(path, **given)


def upload(folder, url):
    """Every file of a folder below a URL; returns the URL."""
    store, _, start = fsspec.get_fs_token_paths(url)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            store.pipe_file(f"{start[0]}/{path.relative_to(folder)}", path.read_bytes())
    return url


def clear():
    """Forget every object in memory, and every fault."""
    fsspec.register_implementation("faulty", FaultyStore, clobber=True)
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    FaultyStore.fault = staticmethod(lambda what, path, times: None)
    FaultyStore.asked.clear()
