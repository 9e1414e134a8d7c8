"""Pairs on object storage, by URL: the same runs as from a disk, and no failed read that passes for pixels."""

import pytest
from pair_formats import rewrite
from tiny_runs import differing, losses, weights

fsspec = pytest.importorskip("fsspec")

pytestmark = pytest.mark.slow


def upload(folder, url):
    """Every file of a folder below a URL, in a store of this process's memory."""
    store, _, start = fsspec.get_fs_token_paths(url)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            store.pipe_file(f"{start[0]}/{path.relative_to(folder)}", path.read_bytes())
    return url


@pytest.fixture
def memory():
    """The address of an empty store."""
    store = fsspec.filesystem("memory")
    store.store.clear()
    yield "memory://bucket"
    store.store.clear()


@pytest.mark.parametrize("form", ["v3 shards", "v2 blosc", "zstd", "plain"])
def test_a_run_from_a_store_is_that_from_a_disk_to_the_last_bit(train, pairs, memory, tmp_path, form):
    disk = rewrite(pairs, tmp_path / "disk", form)
    (disk / "channel_names.txt").write_text("DAPI\nCD3\nCD20\n")
    expected = train("expected", pairs_dir=str(disk))
    found = train("found", pairs_dir=upload(disk, f"{memory}/pairs"), num_workers=1)
    assert found.code == expected.code == 0
    assert losses(found.dir) == losses(expected.dir)
    assert differing(weights(found.dir), weights(expected.dir)) == []
