"""Objects by URL (s3://, gs://, ...), read only, through fsspec: by range, with retries, and never as zeros.

https://filesystem-spec.readthedocs.io. Nothing is contacted but the stores that the user names.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from functools import partial
from pathlib import Path, PosixPath
from typing import Any, TypeVar

from orion_unet.errors import InputError, RunError
from orion_unet.extras import needed
from orion_unet.run_log import open_regular
from orion_unet.text import clean

T = TypeVar("T")

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# Pauses before a read is tried again [s]: four tries in all.
PAUSES_S = (0.5, 1.0, 2.0)
# Objects of which each is named when it is read again.
NOTED = 20
# Reads under way at a time, in one process: a store answers many at once, and each takes tens of milliseconds.
READERS = 32
# Images of which tiles are asked for at a time, in one process.
IMAGES = 16
# A file that is read like a local one (the headers of a TIFF) is fetched and kept in blocks [bytes, blocks].
BLOCK_BYTES, BLOCKS = 1 << 16, 256
# What another try cannot mend: a wrong request.
FINAL_ERRNOS = (errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.ENAMETOOLONG, getattr(errno, "EREMCHG", errno.EINVAL))
# What a store says of its objects, by which a changed one is recognised.
VERSIONS = ("ETag", "etag", "md5Hash", "generation", "VersionId", "LastModified", "last_modified", "mtime", "created")
# By protocol: where its credentials come from.
CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; for another store than Amazon's also "
    "AWS_ENDPOINT_URL; for public data FSSPEC_S3_ANON=true",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
SAME = {"s3a": "s3", "gcs": "gs", "abfs": "az", "abfss": "az"}


def is_url(text: str) -> bool:
    """Whether a word of the command line is a URL."""
    return URL.match(text) is not None


def input_path(given: str | Path) -> Path:
    """What an option names for reading: a path of this machine, or an object or folder of a store, by its URL.

    Contacts nothing. Raises InputError for a URL that cannot be used.
    """
    text = str(given)
    if isinstance(given, RemotePath) or not is_url(text):
        return given if isinstance(given, Path) else Path(given)
    protocol, _, rest = text.partition("://")
    if protocol.lower() == "file":
        return Path(rest)
    if not rest.strip("/"):
        raise InputError(f"{text}: names no object; write {protocol}://BUCKET/FOLDER")
    if "::" in text:
        raise InputError(f"{text}: chains of file systems are not read; give the URL of the folder or object itself")
    if re.match("[^/]*:[^/]*@", rest):
        raise InputError(
            f"{protocol}://...: a URL with a password in it would end up in logs; give credentials through the "
            "environment (docs/formats.md)"
        )
    return RemotePath(f"{protocol.lower()}:/{rest.lstrip('/')}")


def is_remote(path: Path) -> bool:
    """Whether a path is that of an object or folder of a store."""
    return isinstance(path, RemotePath)


def check_openable(path: Path) -> None:
    """Raise InputError where there is no such file, or where it may not be read."""
    try:
        if isinstance(path, RemotePath):
            path.size()
        else:
            open_regular(path).close()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None


def beside(folder: Path, ending: str) -> Path:
    """A folder to write what is made of another one, for advice: beside it; of a store's, in the current folder."""
    return Path(f"{folder.name}{ending}") if is_remote(folder) else folder.with_name(f"{folder.name}{ending}")


class RemotePath(PosixPath):
    """The path of an object or folder of a store. Made by ``input_path``.

    It is named, joined and read like any Path. What would open it as a file of this machine raises InputError with its
    URL. Every read is tried four times, where trying again may help; then it raises RunError. What is missing raises
    FileNotFoundError, what may not be read InputError. Each process has connections of its own.
    """

    def __str__(self) -> str:
        return super().__str__().replace(":/", "://", 1)

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __fspath__(self) -> str:
        raise InputError(f"{self}: is not a file of this machine, which is needed here; copy it to a disk first")

    @property
    def protocol(self) -> str:
        """What stands before :// in the URL."""
        return str(self).partition("://")[0]

    def resolve(self, strict: bool = False) -> RemotePath:
        return self

    def absolute(self) -> RemotePath:
        return self

    def samefile(self, other: Any) -> bool:
        return isinstance(other, RemotePath) and self == other

    def exists(self, **_: Any) -> bool:
        return self._info() is not None

    def is_file(self, **_: Any) -> bool:
        return (self._info() or {}).get("type") == "file"

    def is_dir(self, **_: Any) -> bool:
        return (self._info() or {}).get("type") == "directory"

    def iterdir(self) -> Generator[RemotePath, None, None]:
        self._needs_listing()
        found = _tried(self, "listed", lambda store: store.ls(_own_name(store, self), detail=False))
        yield from sorted(self / str(name).rstrip("/").rpartition("/")[2] for name in found)

    def glob(self, pattern: str) -> Generator[RemotePath, None, None]:
        """Of the names in this folder alone."""
        yield from (path for path in self.iterdir() if fnmatch(path.name, pattern))

    def read_bytes(self) -> bytes:
        return _tried(self, "read", lambda store: bytes(store.cat_file(_own_name(store, self))))

    def read_text(self, encoding: str | None = None, errors: str | None = None) -> str:
        with io.TextIOWrapper(io.BytesIO(self.read_bytes()), encoding or "utf-8", errors) as file:
            return file.read()

    def size(self) -> int:
        """Bytes of an object; raises FileNotFoundError where there is none."""
        info = self._info()
        if info is None or info.get("type") != "file":
            raise FileNotFoundError(errno.ENOENT, "there is no such object", str(self))
        if info.get("size") is None:
            raise InputError(f"{self}: its server does not say how large it is, so it cannot be read by range")
        return int(info["size"])

    def read_range(self, offset: int, length: int) -> bytes:
        """So many bytes of an object that is known to exist. Raises InputError where it has gone."""
        if length <= 0:
            return b""

        def read(store: Any) -> bytes:
            data = bytes(store.cat_file(_own_name(store, self), start=offset, end=offset + length))
            if len(data) != length:
                raise ConnectionError(f"{len(data)} bytes came of the {length} from {offset} on")
            return data

        try:
            return _tried(self, "read", read)
        except FileNotFoundError:
            raise InputError(f"{self}: is not there any more; it was removed or replaced") from None

    def sizes(self) -> dict[str, int]:
        """Bytes of every object below a folder, by its name there."""
        return {name: int(info.get("size") or 0) for name, info in self._below().items()}

    def state(self) -> tuple[int, int, int]:
        """Size and a digest of the versions of an object, or of everything below a folder, and 0: a changed one is
        recognised by it. Raises InputError where it is gone."""
        alone = None if self.suffix.lower() == ".zarr" else self._info()
        if alone is not None and alone.get("type") == "file":
            found = {"": alone}
        else:
            try:
                found = self._below()
            except FileNotFoundError:
                found = {}
        if not found:
            raise InputError(f"{self}: cannot be read (there is no such object or folder)")
        digest = hashlib.sha256()
        for name, info in sorted(found.items()):
            digest.update(repr((name, info.get("size"), *(str(info.get(key)) for key in VERSIONS))).encode())
        return sum(int(info.get("size") or 0) for info in found.values()), int(digest.hexdigest()[:12], 16), 0

    def _info(self) -> dict[str, Any] | None:
        """What the store says of an object or folder; None where there is none."""
        try:
            return _tried(self, "read", lambda store: dict(store.info(_own_name(store, self))))
        except FileNotFoundError:
            return None

    def _below(self) -> dict[str, dict[str, Any]]:
        """What the store says of every object below a folder; raises FileNotFoundError where there is none."""
        from fsspec import AbstractFileSystem
        from fsspec.asyn import AsyncFileSystem

        self._needs_listing()
        store = _store(self)
        kind, start = type(store), _own_name(store, self).rstrip("/")
        if kind.find is AbstractFileSystem.find or getattr(kind, "_find", None) is AsyncFileSystem._find:
            # One listing for each folder. fsspec's own walk leaves out the folders that it fails to list.
            found, folders = {}, [start]
            while folders:
                inside: list[dict[str, Any]] = _tried(self, "listed", partial(kind.ls, path=folders.pop(), detail=True))
                for info in inside:
                    name = info["name"].rstrip("/")
                    if info["type"] != "directory":
                        found[name] = info
                    elif name != start:
                        folders.append(name)
        else:
            found = _tried(self, "listed", lambda store: store.find(start, detail=True))
        below = {name[len(start) + 1 :]: info for name, info in found.items() if name.startswith(f"{start}/")}
        if not below:
            raise FileNotFoundError(errno.ENOENT, "there is no such folder", str(self))
        return below

    def _needs_listing(self) -> None:
        if self.protocol in ("http", "https"):
            raise InputError(
                f"{self}: {self.protocol}:// does not say what is in a folder; use the store's own protocol (s3://, "
                "gs://, az://), or copy the folder to a disk"
            )


class RemoteFile(io.RawIOBase):
    """An object as a file for readers of headers. ``failure`` is the error of a read that failed: such readers may take
    it for damage, and go on without what they did not get."""

    def __init__(self, path: RemotePath) -> None:
        self.name = path.name
        self.failure: Exception | None = None
        self._path, self._size, self._at = path, path.size(), 0
        self._blocks: OrderedDict[int, bytes] = OrderedDict()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer).cast("B")
        count = max(0, min(len(target), self._size - self._at))
        if count:
            first, last = self._at // BLOCK_BYTES, (self._at + count - 1) // BLOCK_BYTES
            blocks = self._held(first, last)
            start = self._at - first * BLOCK_BYTES
            target[:count] = b"".join(blocks)[start : start + count]
            self._at += count
        return count

    def _held(self, first: int, last: int) -> list[bytes]:
        """Blocks in a row; those between the first and the last one that are missing are fetched in one piece."""
        missing = [block for block in range(first, last + 1) if block not in self._blocks]
        found = {block: self._blocks[block] for block in range(first, last + 1) if block in self._blocks}
        if missing:
            start = missing[0] * BLOCK_BYTES
            end = min(self._size, (missing[-1] + 1) * BLOCK_BYTES)
            try:
                data = self._path.read_range(start, end - start)
            except (InputError, RunError) as error:
                self.failure = error
                raise
            for block in range(missing[0], missing[-1] + 1):
                at = block * BLOCK_BYTES - start
                found[block] = self._blocks[block] = data[at : at + BLOCK_BYTES]
        for block in range(first, last + 1):
            self._blocks.move_to_end(block) if block in self._blocks else None
        while len(self._blocks) > BLOCKS:
            self._blocks.popitem(last=False)
        return [found[block] for block in range(first, last + 1)]


def reading_pool() -> ThreadPoolExecutor:
    """The threads of this process that wait for stores."""
    return _pool("objects", READERS)


def image_pool() -> ThreadPoolExecutor:
    """The threads of this process that read several images at a time, and wait for those of ``reading_pool``."""
    return _pool("images", IMAGES)


def _pool(name: str, threads: int) -> ThreadPoolExecutor:
    key = (os.getpid(), name)
    return _POOLS.get(key) or _POOLS.setdefault(key, ThreadPoolExecutor(max_workers=threads))


# By process: threads and connections do not survive a fork. Those of the parent are kept, unused: closing them in the
# child could end them for the parent.
_POOLS: dict[tuple[int, str], ThreadPoolExecutor] = {}
_STORES: dict[tuple[int, str], Any] = {}
_NOTED: set[str] = set()


def _store(path: RemotePath) -> Any:
    """The file system of a path, with connections of this process."""
    key = (os.getpid(), path.protocol)
    found = _STORES.get(key)
    return _STORES.setdefault(key, _new_store(path)) if found is None else found


def _new_store(path: RemotePath) -> Any:
    fsspec: Any = needed("fsspec", extra="remote")
    # A listing that is kept would hide what has changed since.
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if path.protocol in ("s3", "s3a"):
        # Tries are counted here alone: those of its two layers below would multiply them.
        given = dict(fsspec.config.conf.get("s3", {}).get("config_kwargs", {}))
        once = {"retries": {"total_max_attempts": 1}, "max_pool_connections": 2 * READERS}
        options["config_kwargs"] = {**once, **given}
    try:
        store = fsspec.filesystem(path.protocol, **options)
    except ImportError as error:
        raise InputError(
            f"{path}: the package that reads {path.protocol}:// is needed ({error}); for s3: pip install "
            '"orion-unet[remote]"'
        ) from None
    except Exception as error:
        raise InputError(f"{path}: cannot be read ({_reason(error)})") from None
    if hasattr(store, "retries"):
        store.retries = 1
    return store


def _own_name(store: Any, path: RemotePath) -> str:
    """A path as its store writes it."""
    return str(store._strip_protocol(str(path)))


def _tried(path: RemotePath, done: str, call: Callable[[Any], T]) -> T:
    """What a call of the store gives, tried again after errors that may pass."""
    store = _store(path)
    for number, pause in enumerate((*PAUSES_S, None), 1):
        try:
            found = call(store)
        except Exception as error:
            if (final := _final(path, done, error)) is not None:
                raise final from None
            if pause is None:
                raise RunError(
                    f"{path}: cannot be {done}, tried {number} times ({_reason(error)}). Its store or the network has "
                    "failed; once it answers again, the same command goes on (a training with --resume auto)"
                ) from None
            _note(path, error)
            time.sleep(pause)
        else:
            return found
    raise AssertionError("the last try has ended")


def _note(path: RemotePath, error: Exception) -> None:
    """One line for every object whose read is tried again; of many, for every hundredth."""
    if str(path) in _NOTED:
        return
    _NOTED.add(str(path))
    count = len(_NOTED)
    if count <= NOTED or count % 100 == 0:
        # One write, line end included: threads would mix their lines.
        sys.stderr.write(
            f"warning: {clean(str(path), None)}: is read again after an error ({_reason(error)}); objects that this "
            f"process had to read again: {count}\n"
        )
        sys.stderr.flush()


def _final(path: RemotePath, done: str, error: Exception) -> Exception | None:
    """What to raise at once; None for an error that may pass."""
    if isinstance(error, InputError | RunError):
        return error
    kind, status, cause = type(error).__name__, _status(error), error.__cause__
    # Some clients call any failure a missing file; what was behind it says more.
    missing = isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
    if missing and status is None and (cause is None or isinstance(cause, LookupError)):
        status = 404
    if missing and status == 404:
        return FileNotFoundError(errno.ENOENT, "there is no such object or folder", str(path))
    if isinstance(error, PermissionError) or status in (401, 403) or "Credential" in kind or "Profile" in kind:
        means = CREDENTIALS.get(SAME.get(path.protocol, path.protocol), "")
        return InputError(
            f"{path}: may not be {done} ({_reason(error)}). Give credentials that may read it through the environment"
            f"{f': {means}' if means else ''} (docs/formats.md)"
        )
    if status == 404:
        return FileNotFoundError(errno.ENOENT, "there is no such object or folder", str(path))
    # An answer that breaks off is a bad message to aiohttp, and so has the status 400.
    passing = isinstance(error, TimeoutError | ConnectionError) or "Payload" in kind
    passing = passing or status in (408, 429) or (status or 0) >= 500
    wrong = isinstance(error, ValueError | TypeError | NotImplementedError | AttributeError | ImportError)
    wrong = wrong or (isinstance(error, OSError) and error.errno in FINAL_ERRNOS) or 400 <= (status or 0) < 500
    if wrong and not passing:
        return InputError(f"{path}: cannot be {done} ({_reason(error)}); is the URL right, and the store's address?")
    return None


def _status(error: BaseException | None) -> int | None:
    """The HTTP status behind an error, where there is one."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:
            status = next((getattr(error, name, None) for name in ("status", "status_code", "code")), None)
        if isinstance(status, int) and 100 <= status < 600:
            return status
        error = error.__cause__
    return None


def _reason(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError):
        error = error.__cause__ or error
    text = str(error).strip()
    return f"{type(error).__name__}: {clean(text.splitlines()[0], 300)}" if text else type(error).__name__
