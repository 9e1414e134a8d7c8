"""The transfer benchmark: its quick form end to end, and what it repeats."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from orion_unet.config import DataOptions
from orion_unet.data.pairs import find_pairs

ROOT = Path(__file__).resolve().parents[2]


def quick(output, *words):
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "transfer.py"), "--quick", "--output_dir", str(output), *words],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )


@pytest.mark.slow
def test_the_quick_form_reports_every_way_and_repeats_only_what_is_missing(tmp_path, write_pairs):
    pairs = write_pairs("pairs", cores=6, size=(48, 48), channels=2)
    groups = [f"core_{core:02d},{'new' if core < 3 else 'source'}" for core in range(6)]
    (pairs / "groups.csv").write_text("\n".join(["core,group", *groups]))
    words = ("--pairs", str(pairs), "--targets", "1")
    done = quick(tmp_path / "out", *words)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out" / "transfer.md").read_text()
    assert done.stdout.strip() == text.strip()
    assert "## pairs, new is new: 3 cores of the source, 1 core to train on, 2 to score, 1 seed" in text
    trials = tmp_path / "out" / "trials.json"
    document = json.loads(trials.read_text())
    ways = document["settings"]["ways"]
    assert len(document["trials"]) == 2 * len(ways)
    assert all(text.count(f"| {way} |") == 3 for way in ways)

    lost = "generated | 0 | init_from, encoder frozen"
    found = document["trials"].pop(lost)
    trials.write_text(json.dumps(document))
    # A seed of which a way is missing is not in a report.
    partial = quick(tmp_path / "out", *words, "--report")
    assert partial.returncode == 0
    assert "## generated" not in partial.stdout and "## pairs, new is new" in partial.stdout
    again = quick(tmp_path / "out", *words)
    assert again.stderr.splitlines() == ["generated, seed 0: init_from, encoder frozen"]
    # A training is a function of its seed: repeated, it comes to the same numbers.
    assert json.loads(trials.read_text())["trials"][lost] == found
    assert again.stdout == done.stdout


@pytest.mark.slow
def test_each_way_of_the_panels_trains_on_its_cores_and_markers_and_only_missing_ones_are_repeated(
    tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import transfer

    trained = []

    def fit(run, pairs, train_cores, val_cores, seed, size, epochs, patches, words):
        run.mkdir(parents=True)
        table = find_pairs(DataOptions(pairs_dir=str(pairs), patch_size=32, exclude_channels=(words or [None])[-1]))
        trained.append((pairs.name, {core[0] for core in train_cores}, table.kept_names, patches))
        measured = table.measured
        assert (measured is None) == (pairs.name == "complete")
        if measured is not None:
            assert measured[[table.names.tolist().index(core) for core in val_cores]].all()
        return [dict.fromkeys(table.kept_names, 0.5)]

    monkeypatch.setattr(transfer, "fit", fit)
    size = replace(transfer.QUICK, side=64)
    text = transfer.mixed_panels(tmp_path, size, 1, False)
    everything, patches = transfer.ALL_MARKERS, 2 * size.patches
    assert trained == [
        ("panels", {"a"}, transfer.SOURCE_PANEL, patches),
        ("panels", {"b"}, tuple(name for name in everything if name in transfer.NEW_PANEL), patches),
        ("panels", {"a"}, transfer.SOURCE_PANEL, 2 * patches),
        ("panels", {"b"}, tuple(name for name in everything if name in transfer.NEW_PANEL), 2 * patches),
        ("panels", {"a", "b"}, everything, patches),
        ("panels", {"a", "b"}, everything, 2 * patches),
        ("complete", {"a", "b"}, everything, patches),
        ("complete", {"a", "b"}, everything, 2 * patches),
    ]
    assert "| a model for panel A | 8 | 0.500 (0.50) | 0.500 (0.50) | - |" in text
    assert transfer.mixed_panels(tmp_path, size, 1, False) == text
    assert len(trained) == len(transfer.PANEL_WAYS)
