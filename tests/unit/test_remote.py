"""Objects by URL: named like paths, read by range, tried again, and never taken for zeros."""

import asyncio
import errno
import pickle
import threading
import time

import numpy as np
import pytest
from pair_formats import rewrite, write_tiff, write_zarr
from panel_files import write_panels

from orion_unet.cli.arguments import parse_train_config
from orion_unet.command_options import PredictRequest
from orion_unet.config import DataOptions, TrainConfig
from orion_unet.data.assignments import read_assignments
from orion_unet.data.measured import file_state
from orion_unet.data.pairs import find_pairs
from orion_unet.data.patches import PatchPlace, PatchReader
from orion_unet.errors import InputError, RunError
from orion_unet.inference.outputs import find_inputs, plan_jobs
from orion_unet.options import checked
from orion_unet.slides import remote, zarr_tiles
from orion_unet.slides.open import open_he, open_markers
from orion_unet.slides.remote import RemoteFile, RemotePath, input_path
from orion_unet.slides.stored import open_tiles, stored_image
from orion_unet.slides.tiles import TiledArray

pytest.importorskip("fsspec")
from stores import FaultyStore, clear, upload


@pytest.fixture(autouse=True)
def store(monkeypatch):
    """An empty store, whose objects are tried again at once."""
    monkeypatch.setattr(remote, "PAUSES_S", (0.0, 0.0, 0.0))
    remote._NOTED.clear()
    clear()
    yield FaultyStore
    clear()


@pytest.fixture
def put(tmp_path):
    """Put an image into the store in a format; returns the image and its path in a store that can fail."""

    def write(form, kind="ORION", size=(80, 72)):
        channels = 3 if kind == "HE" else 2
        image = np.random.default_rng(0).integers(1, 60000, (*size, channels)).astype(np.uint16)
        name = f"core_{kind}.ome.tif" if form == "tiff" else f"core_{kind}.ome.zarr"
        folder = tmp_path / form.replace(" ", "_")
        folder.mkdir()
        if form == "tiff":
            write_tiff(folder / name, image)
        elif form == "only zarr decodes":
            write_plain_zarr(folder / name, image)
        else:
            write_zarr(folder / name, image, shards=form == "shards")
        upload(folder, "memory://bucket/pairs")
        return image, input_path(f"faulty://bucket/pairs/{name}")

    return write


def write_plain_zarr(path, image):
    """OME-Zarr in an order of the axes in memory that is left to zarr."""
    import zarr

    group = zarr.open_group(str(path), mode="w", zarr_format=2)
    pixels = image.transpose(2, 0, 1)
    group.create_array("0", shape=pixels.shape, dtype=pixels.dtype, chunks=(1, 32, 32), order="F")[:] = pixels
    axes = [{"name": "c", "type": "channel"}, {"name": "y", "type": "space"}, {"name": "x", "type": "space"}]
    group.attrs["multiscales"] = [{"version": "0.4", "axes": axes, "datasets": [{"path": "0"}]}]


def failing(error, of="", what="read", times=10**9):
    """A fault of the objects whose path contains ``of``, the first ``times`` times."""

    def fault(asked, path, before):
        if asked == what and of in path and before < times:
            raise error

    return staticmethod(fault)


def pixels(path, level=0):
    """The whole image (H, W, C)."""
    image = stored_image(path, "orion", level)
    array = TiledArray(open_tiles(path, "orion", level), image.layout)
    return np.asarray(array.channels_last())


FORMS = ("shards", "chunks", "only zarr decodes", "tiff")


def test_a_url_is_named_and_joined_like_a_path():
    folder = input_path("s3://bucket/a folder/")
    path = folder / "core_HE.ome.zarr"
    assert str(path) == "s3://bucket/a folder/core_HE.ome.zarr"
    assert (path.name, path.stem, path.suffix, path.parent) == ("core_HE.ome.zarr", "core_HE.ome", ".zarr", folder)
    assert path == input_path(str(path)) == pickle.loads(pickle.dumps(path)) == path.resolve()  # noqa: S301
    assert str(path.with_name("x")) == "s3://bucket/a folder/x"
    assert hash(path) == hash(input_path(str(path)))
    assert isinstance(path, RemotePath) and not isinstance(input_path("bucket/x"), RemotePath)
    assert str(input_path("file:///data/pairs")) == "/data/pairs"


def test_what_would_open_a_url_as_a_file_of_this_machine_is_refused_by_its_url():
    path = input_path("s3://bucket/x.png")
    for use in (open, np.load, lambda path: path.stat(), lambda path: path.open(), lambda path: path.mkdir()):
        with pytest.raises(InputError, match=r"s3://bucket/x\.png: is not a file of this machine"):
            use(path)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://", "names no object"),
        ("simplecache::s3://bucket/x", "chains of file systems"),
        ("s3://key:secret@bucket/x", "a URL with a password"),
    ],
)
def test_urls_that_cannot_be_used_are_refused(url, message):
    if "::" in url:
        url = "s3://bucket/x::" + url
    with pytest.raises(InputError, match=message) as caught:
        input_path(url)
    assert "secret" not in str(caught.value)


def test_an_output_is_never_a_url():
    with pytest.raises(InputError, match="--output_dir s3://bucket/run: is a URL"):
        TrainConfig.from_options({"output_dir": "s3://bucket/run"})
    with pytest.raises(InputError, match=r"--groups_csv s3://bucket/g\.csv: is a URL"):
        parse_train_config(["--groups_csv", "s3://bucket/g.csv"])
    given = {"checkpoint": (), "input": (input_path("s3://bucket/x.tif"),), "output_dir": input_path("s3://bucket/y")}
    with pytest.raises(InputError, match="--output_dir s3://bucket/y: is a URL"):
        checked(PredictRequest, given)
    assert parse_train_config(["--pairs_dir", "s3://bucket/pairs"]).data.pairs_dir == "s3://bucket/pairs"


@pytest.mark.parametrize("form", FORMS)
def test_an_image_in_a_store_is_that_on_the_disk(put, form):
    image, path = put(form)
    np.testing.assert_array_equal(pixels(path), image)
    with open_markers(path) as opened:
        np.testing.assert_array_equal(opened.read([1], 10, 20, 50, 40)[0], image[10:60, 20:60, 1])


@pytest.mark.parametrize("form", FORMS)
def test_reads_that_fail_for_a_while_are_tried_again(put, store, form, capfd):
    image, path = put(form)
    store.fault = failing(ConnectionError("reset"), times=3)
    np.testing.assert_array_equal(pixels(path), image)
    said = [line for line in capfd.readouterr().err.splitlines() if "is read again after an error" in line]
    objects = {path for what, path in store.asked if what == "read"}
    assert len(said) == min(len(objects), remote.NOTED) > 0
    assert len(remote._NOTED) >= len(objects)
    assert all("faulty://bucket/pairs/core_ORION" in line and "ConnectionError: reset" in line for line in said)


@pytest.mark.parametrize("form", FORMS)
def test_a_chunk_that_cannot_be_read_is_named_and_never_becomes_zeros(put, store, form):
    _, path = put(form)
    tiles = TiledArray(open_tiles(path, "orion", 0), "chw")
    part = "core_ORION.ome.tif" if form == "tiff" else "/0/"
    store.asked.clear()
    store.fault = failing(OSError(errno.EBUSY, "slow down"), of=part)
    with pytest.raises(RunError) as caught:
        tiles.read(32, 40, 10, 10, [1])
    text = str(caught.value)
    assert text.startswith("faulty://bucket/pairs/core_ORION.ome")
    assert form == "tiff" or "/0/" in text.partition(": ")[0]
    assert "tried 4 times" in text and "slow down" in text
    assert text.endswith("[level 0, row 32, column 32]")
    assert set(store.asked.values()) == {3}


@pytest.mark.parametrize("form", FORMS)
def test_a_chunk_that_may_not_be_read_is_named_at_once(put, store, form):
    _, path = put(form)
    tiles = TiledArray(open_tiles(path, "orion", 0), "chw")
    store.asked.clear()
    store.fault = failing(PermissionError("Access Denied"))
    with pytest.raises(InputError, match=r"faulty://bucket/pairs/core_ORION.*may not be read .*Access Denied.*row 32"):
        tiles.read(32, 40, 10, 10, [1])
    assert set(store.asked.values()) == {0}


@pytest.mark.parametrize("form", ["shards", "chunks", "only zarr decodes"])
def test_a_chunk_that_was_left_out_is_the_fill_value_and_one_that_has_gone_is_an_error(put, store, form):
    image, path = put(form)
    names = sorted(name for name in store.store if "/0/" in name and not name.rpartition("/")[2].startswith(("z", ".")))
    del store.store[names[0]]
    found = pixels(path)
    outside = found != 0
    assert not outside.all()
    np.testing.assert_array_equal(found[outside], image[outside])
    assert (~outside).sum() in (64 * 64, 32 * 32)

    tiles = TiledArray(open_tiles(path, "orion", 0), "chw")
    del store.store[names[-1]]
    with pytest.raises(InputError, match="is not there any more; it was removed or replaced"):
        np.asarray(tiles)


@pytest.mark.parametrize("form", ["shards", "chunks", "only zarr decodes"])
def test_chunks_that_cannot_be_listed_are_not_taken_for_left_out(put, store, form):
    _, path = put(form)
    store.fault = failing(TimeoutError("no answer"), what="list", of="/0")
    with pytest.raises(RunError, match=r"core_ORION\.ome\.zarr: cannot be listed, tried 4 times.*no answer"):
        stored_image(path, "orion", 0)


def test_a_header_that_cannot_be_read_is_not_taken_for_damage(put, store):
    for form, part in (("tiff", "core_ORION.ome.tif"), ("shards", "zarr.json")):
        _, path = put(form)
        store.fault = failing(TimeoutError(), of=part)
        with pytest.raises(RunError, match=r"cannot be read, tried 4 times .*\(TimeoutError\)"):
            stored_image(path, "orion", 0)
        with pytest.raises(RunError, match="tried 4 times"):
            open_markers(path)


def test_later_headers_of_a_tiff_that_cannot_be_read_leave_out_no_page(tmp_path, store, monkeypatch):
    monkeypatch.setattr(remote, "BLOCK_BYTES", 256)
    image = np.random.default_rng(0).integers(0, 60000, (64, 64, 6)).astype(np.uint16)
    write_tiff(tmp_path / "core_ORION.ome.tif", image)
    upload(tmp_path, "memory://bucket")
    path = input_path("faulty://bucket/core_ORION.ome.tif")
    reads = 0

    def third_read_on(asked, path, before):
        nonlocal reads
        reads += asked == "read"
        if reads > 3:
            raise ConnectionError

    store.fault = staticmethod(third_read_on)
    with pytest.raises(RunError, match="tried 4 times"):
        stored_image(path, "orion", 0)


@pytest.mark.parametrize(
    ("error", "kind", "tries"),
    [
        (TimeoutError(), RunError, 4),
        (ConnectionResetError(), RunError, 4),
        (OSError(errno.EBUSY, "slow down"), RunError, 4),
        (OSError(errno.EIO, "who knows"), RunError, 4),
        (RuntimeError("of a library"), RunError, 4),
        (PermissionError("denied"), InputError, 1),
        (FileNotFoundError("gone"), FileNotFoundError, 1),
        (OSError(errno.EINVAL, "bad request"), InputError, 1),
        (ValueError("no such bucket name"), InputError, 1),
    ],
)
def test_only_errors_that_may_pass_are_tried_again(store, error, kind, tries):
    upload_one("memory://bucket/x.txt", b"content")
    store.fault = failing(error)
    with pytest.raises(kind):
        input_path("faulty://bucket/x.txt").read_bytes()
    assert store.asked["read", "/bucket/x.txt"] == tries - 1


class ResponseError(Exception):
    """As the clients of stores raise it."""

    def __init__(self, status):
        super().__init__(f"status {status}")
        self.status = status


@pytest.mark.parametrize(
    ("status", "kind", "tries"),
    [(503, RunError, 4), (429, RunError, 4), (401, InputError, 1), (403, InputError, 1), (400, InputError, 1)],
)
def test_the_status_of_an_answer_decides_whether_to_try_again(store, status, kind, tries):
    upload_one("memory://bucket/x.txt", b"content")
    store.fault = failing(ResponseError(status))
    with pytest.raises(kind, match=f"status {status}"):
        input_path("faulty://bucket/x.txt").read_bytes()
    assert store.asked["read", "/bucket/x.txt"] == tries - 1


@pytest.mark.parametrize(
    ("cause", "kind", "tries"),
    [
        (ResponseError(404), FileNotFoundError, 1),
        (KeyError("x"), FileNotFoundError, 1),
        (ResponseError(403), InputError, 1),
        (ResponseError(500), RunError, 4),
        (ConnectionRefusedError(), RunError, 4),
    ],
)
def test_what_a_client_calls_missing_is_judged_by_what_was_behind_it(store, cause, kind, tries):
    upload_one("memory://bucket/x.txt", b"content")
    error = FileNotFoundError("x.txt")
    error.__cause__ = cause
    store.fault = failing(error)
    with pytest.raises(kind):
        input_path("faulty://bucket/x.txt").read_bytes()
    assert store.asked["read", "/bucket/x.txt"] == tries - 1


class ClientPayloadError(Exception):
    """As aiohttp calls an answer that breaks off."""


def test_an_answer_that_breaks_off_is_tried_again(store):
    upload_one("memory://bucket/x.txt", b"content")
    error = ClientPayloadError("not enough data")
    error.__cause__ = ResponseError(400)
    store.fault = failing(error, times=2)
    assert input_path("faulty://bucket/x.txt").read_bytes() == b"content"


def upload_one(url, content):
    import fsspec

    store, _, (path,) = fsspec.get_fs_token_paths(url)
    store.pipe_file(path, content)


def test_an_answer_that_is_cut_short_is_tried_again(store, monkeypatch):
    upload_one("memory://bucket/x.bin", bytes(range(100)))
    whole = FaultyStore.cat_file

    def cut(self, path, start=None, end=None):
        data = whole(self, path, start, end)
        return data if self.asked["read", "/bucket/x.bin"] else data[:-1]

    monkeypatch.setattr(FaultyStore, "cat_file", cut)
    assert input_path("faulty://bucket/x.bin").read_range(10, 5) == bytes(range(10, 15))
    assert store.asked["read", "/bucket/x.bin"] == 1


def test_a_file_is_read_in_blocks_as_it_is_on_the_disk(store, monkeypatch):
    monkeypatch.setattr(remote, "BLOCK_BYTES", 16)
    monkeypatch.setattr(remote, "BLOCKS", 2)
    content = np.random.default_rng(0).bytes(1000)
    upload_one("memory://bucket/x.bin", content)
    file = RemoteFile(input_path("faulty://bucket/x.bin"))
    for offset, count in ((0, 4), (990, 100), (15, 2), (3, 200), (1000, 1), (2000, 5), (40, 0)):
        file.seek(offset)
        assert file.read(count) == content[offset : offset + count]
    assert file.seek(-5, 2) == 995
    assert file.read() == content[-5:]


def test_missing_objects_are_told_from_those_that_may_not_be_read(store):
    upload_one("memory://bucket/pairs/groups.csv", "core,group\nä,1\n".encode())
    folder = input_path("faulty://bucket/pairs")
    assert (folder / "groups.csv").is_file() and not (folder / "panels.csv").exists() and folder.is_dir()
    assert [path.name for path in folder.iterdir()] == ["groups.csv"]
    assert read_assignments(folder / "groups.csv", ["ä"], "group") == ["1"]
    assert [path.name for path in folder.glob("g*.csv")] == ["groups.csv"] and not list(folder.glob("panel_*"))
    store.fault = failing(PermissionError("denied"), what="info")
    with pytest.raises(InputError, match=r"faulty://bucket/pairs/panels\.csv: may not be read"):
        (folder / "panels.csv").exists()


def test_a_changed_object_has_another_state(put):
    for form in ("tiff", "shards"):
        _, path = put(form)
        before = file_state(path)
        assert file_state(path) == before
        name = "" if form == "tiff" else "/zarr.json"
        url = f"memory:/{str(path).removeprefix('faulty:/')}{name}"
        content = (path / "zarr.json" if name else path).read_bytes()
        upload_one(url, content[:-1] + b" ")
        assert file_state(path) != before
    with pytest.raises(InputError, match="there is no such object or folder"):
        file_state(input_path("faulty://bucket/pairs/other.ome.zarr"))


def test_an_he_in_ome_zarr_is_read_and_predicted_by_its_url(put, tmp_path):
    image, path = put("shards", "HE")
    with open_he(path) as he:
        np.testing.assert_array_equal(he.stored(5, 7, 60, 50), image[5:65, 7:57])
    assert find_inputs(["faulty://bucket/pairs"]) == [path]
    (job,) = plan_jobs([path], tmp_path, "npy", False, {})
    assert (job.name, job.fingerprint["input"]["bytes"]) == ("core", file_state(path)[0])


def test_npy_is_refused_with_what_to_do(write_pairs):
    url = upload(write_pairs(cores=2), "memory://bucket/pairs")
    with pytest.raises(InputError, match=r"core_00_HE\.npy: is \.npy, which is not read from object storage") as caught:
        find_pairs(DataOptions(pairs_dir=url))
    assert "pack DIR --output_dir OUT --format ome-zarr" in str(caught.value)


def test_a_folder_that_is_not_there_and_a_protocol_without_a_package_are_said():
    with pytest.raises(InputError, match="--pairs_dir memory://bucket/none: cannot be read"):
        find_pairs(DataOptions(pairs_dir="memory://bucket/none"))
    with pytest.raises(InputError, match=r"nosuch://bucket/pairs: cannot be read .*nosuch"):
        find_pairs(DataOptions(pairs_dir="nosuch://bucket/pairs"))
    with pytest.raises(InputError, match="https:// does not say what is in a folder"):
        find_pairs(DataOptions(pairs_dir="https://127.0.0.1/pairs"))


def test_images_of_other_kinds_are_refused_by_url():
    upload_one("memory://bucket/x.png", b"x")
    with pytest.raises(InputError, match=r"memory://bucket/x\.png: cannot be read by its URL; a TIFF or OME-Zarr can"):
        open_he("memory://bucket/x.png")
    with pytest.raises(InputError, match=r"memory://bucket/x\.npy: cannot be read by its URL"):
        open_markers("memory://bucket/x.npy")


PLACES = [PatchPlace(core, y, x) for core, y, x in ((0, 3, 5), (1, 40, 20), (2, 64, 56), (0, 30, 31), (2, 3, 5))]


def batch_of(reader, channels):
    batch = reader.read(PLACES)
    return batch.he.numpy(), batch.orion.numpy()[:, channels]


@pytest.mark.parametrize("form", ["v3", "v3 shards", "v2 zlib", "zstd"])
@pytest.mark.parametrize("cache_bytes", [1, 20_000, 10**8])
@pytest.mark.parametrize("panels", [False, True])
def test_a_batch_from_a_store_is_that_from_the_disk_with_any_cache(
    write_pairs, open_pairs, tmp_path, form, cache_bytes, panels
):
    folder = write_pairs(cores=3, size=(80, 72), channels=4)
    if panels:
        names = ["A", "B", "C", "D"]
        write_panels(folder, {"one": names, "two": [*"DCE", "F"]}, ["one", "two", "one"])
    options = {"exclude_channels": "1"}
    disk = rewrite(folder, tmp_path / "disk", form)
    expected = open_pairs(disk, **options)
    found = open_pairs(upload(disk, "memory://bucket/pairs"), **options)
    reader = PatchReader(found.table, found.scales, 16, cache_bytes)
    kept = list(expected.table.kept_channels)
    for _ in range(2):
        for one, other in zip(batch_of(reader, kept), batch_of(expected.reader, kept), strict=True):
            np.testing.assert_array_equal(one, other)


def test_the_tiles_of_a_batch_are_asked_for_at_the_same_time_and_once(write_pairs, open_pairs, tmp_path, store):
    folder = rewrite(write_pairs(cores=3, size=(80, 72), channels=4), tmp_path / "disk", "v3")
    upload(folder, "memory://bucket/pairs")
    reader = open_pairs("faulty://bucket/pairs").reader
    under_way, most, lock = set(), [0], threading.Lock()

    def slow(what, path, times):
        with lock:
            under_way.add(threading.get_ident())
            most[0] = max(most[0], len(under_way))
        time.sleep(0.02)
        with lock:
            under_way.discard(threading.get_ident())

    store.fault = staticmethod(slow)
    store.asked.clear()
    reader.read(PLACES)
    chunks = [times for (what, path), times in store.asked.items() if what == "read" and "/c/" in path]
    assert len(chunks) > 20 and set(chunks) == {0}
    assert most[0] > 8
    store.asked.clear()
    reader.read(PLACES)
    assert not store.asked
    # Without room in the cache, what a patch needs is fetched once, when it is read.
    reader.cache.limit = 1
    reader.cache.clear()
    reader.read(PLACES[:1])
    assert set(store.asked.values()) == {0}


def test_chunks_of_a_shard_that_lie_close_together_are_read_in_one_request(put, store, monkeypatch):
    image, path = put("shards")
    for gap, requests in ((1 << 16, 1), (-1, 4)):
        monkeypatch.setattr(zarr_tiles, "GAP_BYTES", gap)
        tiles = TiledArray(open_tiles(path, "orion", 0), "hwc", 2)
        # The index of the shard is read first.
        tiles.read(0, 0, 1, 1, [0])
        store.asked.clear()
        tiles = TiledArray(tiles.tiles, "hwc", 2)
        np.testing.assert_array_equal(tiles.read(10, 10, 50, 50, [0])[..., 0], image[10:60, 10:60, 0])
        assert [times + 1 for (what, _), times in store.asked.items() if what == "read"] == [requests]


def test_a_store_is_never_written_to(put):
    from orion_unet.slides.zarr_store import RemoteStore

    _, path = put("shards")
    store = RemoteStore(path)
    for write in (store.set("zarr.json", b"{}"), store.delete("zarr.json")):
        with pytest.raises(ValueError, match="read-only"):
            asyncio.run(write)
