"""Pairs on object storage, by URL: the same runs as from a disk, and no failed read that passes for pixels."""

import errno
import json
import os
import socket
import subprocess
import sys
from contextlib import suppress

import numpy as np
import pytest
from pair_formats import rewrite, write_tiff, write_zarr
from tiny_runs import differing, free_port, losses, wait_for, weights

from orion_unet.cli import check_data, evaluate, pack, predict, prepare
from orion_unet.demo.make import draw_core
from orion_unet.errors import InputError, RunError
from orion_unet.slides import remote

fsspec = pytest.importorskip("fsspec")
from stores import FaultyStore, clear, upload  # noqa: E402 (needs fsspec)

pytestmark = pytest.mark.slow


@pytest.fixture
def memory(monkeypatch):
    """The address of an empty store in this process's memory, and in that of its loaders."""
    monkeypatch.setattr(remote, "PAUSES_S", (0.0, 0.0, 0.0))
    remote._NOTED.clear()
    clear()
    yield "memory://bucket"
    clear()


@pytest.mark.parametrize("form", ["v3 shards", "v2 blosc", "zstd", "plain"])
def test_a_run_from_a_store_is_that_from_a_disk_to_the_last_bit(train, pairs, memory, tmp_path, form):
    disk = rewrite(pairs, tmp_path / "disk", form)
    (disk / "channel_names.txt").write_text("DAPI\nCD3\nCD20\n")
    expected = train("expected", pairs_dir=str(disk))
    found = train("found", pairs_dir=upload(disk, f"{memory}/pairs"), num_workers=1)
    assert found.code == expected.code == 0
    assert losses(found.dir) == losses(expected.dir)
    assert differing(weights(found.dir), weights(expected.dir)) == []


@pytest.fixture
def s3(monkeypatch):
    """The address of an empty bucket of an S3 server on this machine, which ends with the test."""
    pytest.importorskip("s3fs")
    pytest.importorskip("moto.server")
    port = free_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def answers():
        assert server.poll() is None
        with suppress(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return True
        return False

    try:
        wait_for(answers, "the S3 server")
        fsspec.filesystem("s3", skip_instance_cache=True).mkdir("bucket")
        remote._STORES.clear()
        yield "s3://bucket"
    finally:
        remote._STORES.clear()
        server.kill()
        server.wait()


def test_a_run_from_an_s3_server_is_that_from_a_disk_to_the_last_bit(train, pairs, s3, tmp_path):
    disk = rewrite(pairs, tmp_path / "disk", "v3 shards")
    expected = train("expected", pairs_dir=str(disk))
    found = train("found", pairs_dir=upload(disk, f"{s3}/some/pairs"), num_workers=1)
    assert found.code == expected.code == 0
    assert losses(found.dir) == losses(expected.dir)
    assert differing(weights(found.dir), weights(expected.dir)) == []


def test_the_s3_server_says_what_is_missing_and_what_may_not_be_read(train, s3, monkeypatch):
    with pytest.raises(InputError, match="--pairs_dir s3://bucket/none: cannot be read"):
        train(pairs_dir=f"{s3}/none")
    with pytest.raises(InputError, match="--pairs_dir s3://other/pairs: cannot be read"):
        train(pairs_dir="s3://other/pairs")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    # Neither the user's own keys, nor those of a machine in the cloud.
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    remote._STORES.clear()
    with pytest.raises(InputError, match=r"s3://bucket/none: may not be listed .*AWS_ACCESS_KEY_ID"):
        train(pairs_dir=f"{s3}/none")


def test_a_server_that_does_not_answer_is_said_after_four_tries(train, monkeypatch):
    pytest.importorskip("s3fs")
    monkeypatch.setattr(remote, "PAUSES_S", (0.0, 0.0, 0.0))
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    remote._STORES.clear()
    with pytest.raises(RunError, match="s3://bucket/pairs: cannot be listed, tried 4 times"):
        train(pairs_dir="s3://bucket/pairs")
    remote._STORES.clear()


def test_a_run_whose_reads_fail_now_and_then_is_the_same(train, pairs, memory, tmp_path, capfd):
    disk = rewrite(pairs, tmp_path / "disk", "v3 shards")
    upload(disk, f"{memory}/pairs")

    def now_and_then(what, path, times):
        if times < 3:
            raise OSError(errno.EBUSY, "slow down")

    FaultyStore.fault = staticmethod(now_and_then)
    expected = train("expected", pairs_dir=str(disk))
    found = train("found", pairs_dir="faulty://bucket/pairs", num_workers=1)
    assert losses(found.dir) == losses(expected.dir)
    assert differing(weights(found.dir), weights(expected.dir)) == []
    assert "faulty://bucket/pairs/panels.csv: is read again" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (TimeoutError("no answer"), RunError, "cannot be read, tried 4 times"),
        (PermissionError("token expired"), InputError, "may not be read"),
    ],
)
def test_a_read_that_fails_in_a_loader_process_ends_the_run_and_names_the_object(
    train, pairs, memory, tmp_path, error, kind, says
):
    upload(rewrite(pairs, tmp_path / "disk", "v3 shards"), f"{memory}/pairs")
    begun = []
    # The run begins, so that its next reads are those of the loader.
    train(epochs=1, pairs_dir="faulty://bucket/pairs", num_workers=1)

    def in_the_loader(what, path, times):
        if what == "read" and "/c/" in path and os.getpid() != begun[0]:
            raise error

    begun.append(os.getpid())
    FaultyStore.fault = staticmethod(in_the_loader)
    with pytest.raises(kind, match=rf"^faulty://bucket/pairs/core_0\d_\w+\.ome\.zarr/0/c/\d/\d/\d: {says}.*\[level 0"):
        train("other", pairs_dir="faulty://bucket/pairs", num_workers=1)


def test_every_command_that_reads_pairs_takes_a_url(train, pairs, memory, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (pairs / "channel_names.txt").write_text("DAPI\nCD3\nCD20\n")
    (pairs / "dataset.json").write_text(json.dumps({"schema": 1, "pixel_size_um": 0.5, "source": "test"}))
    (pairs / "groups.csv").write_text("core,group\n" + "".join(f"core_0{n},patient_{n}\n" for n in range(4)))
    disk = rewrite(pairs, tmp_path / "disk", "zstd")
    url = upload(disk, f"{memory}/pairs")
    train("run", pairs_dir=url, epochs=1)
    looked, scores = [], []
    for number, folder in enumerate((str(disk), url)):
        capsys.readouterr()
        assert check_data.main([folder, "--json", "--patch_size", "64"]) == 0
        looked.append(json.loads(capsys.readouterr().out))
        words = ["--checkpoint", "run", "--pairs_dir", folder, "--output_dir", f"scores_{number}"]
        assert evaluate.main([*words, "--device", "cpu"]) == 0
        scores.append((tmp_path / f"scores_{number}" / "scores.csv").read_text())
    assert looked[1]["pairs_dir"] == url and looked[0]["cores"] == looked[1]["cores"]
    assert looked[0]["channels"] == looked[1]["channels"]
    assert scores[0] == scores[1]

    assert pack.main([url, "--output_dir", "packed", "--patch_size", "64"]) == 0
    for path in pairs.glob("*.npy"):
        np.testing.assert_array_equal(np.load(tmp_path / "packed" / path.name), np.load(path))
    assert (tmp_path / "packed" / "groups.csv").read_text() == (pairs / "groups.csv").read_text()
    assert pack.main([url, "--output_dir", "packed", "--patch_size", "64"]) == 0

    for number, source in enumerate((str(disk / "core_00_HE.ome.tif"), url)):
        words = [
            "--checkpoint",
            "run",
            "--input",
            source,
            "--no_overview",
            "--output_dir",
            f"predicted_{number}",
            "--device",
            "cpu",
        ]
        assert predict.main(words) == 0
    predicted = [np.load(tmp_path / f"predicted_{number}" / "core_00.npy") for number in range(2)]
    np.testing.assert_array_equal(predicted[0], predicted[1])
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("memory")]


def test_prepare_takes_slides_by_their_urls(memory, tmp_path):
    he, orion = draw_core(5, 384)
    disk = tmp_path / "slides"
    disk.mkdir()
    write_tiff(disk / "slide_HE.ome.tif", he, tile=(128, 128))
    write_zarr(disk / "slide_ORION.ome.zarr", orion, chunk=128)
    (tmp_path / "markers.csv").write_text("\n".join(f"marker_{n}" for n in range(orion.shape[2])))
    tables = []
    for name, folder in (("disk", str(disk)), ("store", upload(disk, f"{memory}/slides"))):
        slides = tmp_path / f"{name}.csv"
        slides.write_text(
            "slide,he,orion,he_pixel_size_um,orion_pixel_size_um\n"
            f"A,{folder}/slide_HE.ome.tif,{folder}/slide_ORION.ome.zarr,0.5,0.5\n"
        )
        words = [str(slides), "--output_dir", str(tmp_path / name), "--register", "off", "--jobs", "1"]
        words += ["--regions", "whole", "--region_size", "192", "--markers", str(tmp_path / "markers.csv")]
        assert prepare.main(words) == 0
        tables.append((tmp_path / name / "regions.csv").read_text())
        # What is done is found again.
        assert prepare.main(words) == 0
    assert tables[0] == tables[1]
    pairs = sorted((tmp_path / "disk").glob("*.npy"))
    assert len(pairs) >= 2
    for path in pairs:
        np.testing.assert_array_equal(np.load(path), np.load(tmp_path / "store" / path.name))
