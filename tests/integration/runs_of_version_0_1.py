"""Two small runs of version 0.1, kept as test data, and the pairs they were trained on.

``python tests/integration/runs_of_version_0_1.py OUT.zip`` made ``data/runs_of_version_0_1.zip`` in a checkout of
commit 80329d3, the last one of version 0.1. Later versions must read these runs; they cannot make them.

The archive holds ``complete`` (two epochs, finished), ``interrupted`` (stopped in the middle of its second epoch), and
``expected.json``: what version 0.1 itself logged when it continued both, scored the first and predicted a core with it.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
ARCHIVE = Path(__file__).parent / "data" / "runs_of_version_0_1.zip"
COMMON = {
    "patch_size": 64, "patches_per_image": 4, "patches_per_image_val": 3, "batch_size": 2, "val_batch_size": 2,
    "base_features": 3, "depth": 2, "learning_rate": 1e-2, "num_workers": 0, "gpus": 0, "sanity_check_freq": 0,
    "pairs_dir": "pairs",
}  # fmt: skip
COMPLETE = {**COMMON, "epochs": 2, "use_boundary_guidance": True, "correlation_weight": 0.1, "scheduler": "constant"}
INTERRUPTED = {
    **COMMON, "epochs": 3, "dropout": 0.3, "ema_decay": 0.9, "accumulate_steps": 2, "warmup_epochs": 1.5,
    "lr_patience": 0, "norm": "batch", "channel_weights": "C1=2",
}  # fmt: skip


def write_pairs_of_version_0_1(folder):
    """Five cores of 144 x 136 pixels with three markers that follow from the colours of the H&E."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(7)
    for core in range(5):
        coarse = rng.random((3, 20, 20))
        field = np.repeat(np.repeat(coarse, 8, 1), 8, 2)[:, 3 : 3 + 144, 5 : 5 + 136]
        he = 230 - 150 * field + rng.normal(0, 6, field.shape)
        markers = np.stack([field[0] ** 2, field[0] * field[1], (field[2] > 0.8) * field[1]]) * (1 + core / 10)
        np.save(folder / f"core_{core}_HE.npy", he.transpose(1, 2, 0).clip(0, 255).round().astype(np.uint8))
        np.save(folder / f"core_{core}_ORION.npy", (markers * 30000).clip(0, 65535).astype(np.uint16))
    (folder / "channel_names.txt").write_text("Hoechst\nC1\nC2\n")


def words(options):
    """Options as words of a command line."""
    found = []
    for name, value in options.items():
        found += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return found


def losses(run_dir):
    """Train and validation loss and learning rate of every epoch, by its latest attempt."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return {str(r["epoch"]): [r["train"]["loss"], r["val"]["loss"], r["lr"]] for r in records}


def main(output):
    """Train, stop, continue and score with the version that is checked out; write the archive."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": f"{scratch}/cache"}

        def call(*arguments, code=0):
            done = subprocess.run([sys.executable, *map(str, arguments)], cwd=folder, env=env, check=False)
            assert done.returncode == code, done.returncode

        write_pairs_of_version_0_1(folder / "pairs")
        train = ["-m", "orion_unet", "train"]
        call(*train, *words(COMPLETE), "--output_dir", "complete")
        # Stops itself after the fourth step of the second epoch, as a scheduler would.
        stopper = (
            "import os, signal, sys; from orion_unet.training import run; from orion_unet.__main__ import main\n"
            "def on_step(self, epoch, done, before=run.Run._on_step):\n"
            "    before(self, epoch, done)\n"
            f"    if (epoch, done.step) == (2, 3): os.kill(os.getpid(), {int(signal.SIGTERM)})\n"
            "run.Run._on_step = on_step\nsys.exit(main())"
        )
        call("-c", stopper, "train", *words(INTERRUPTED), "--output_dir", "interrupted", code=143)
        written = [path for run in ("complete", "interrupted") for path in sorted((folder / run).rglob("*"))]
        kept = {path: path.read_bytes() for path in written if path.is_file() and path.name != "last_previous.pt"}
        call("-m", "orion_unet", "evaluate", "--checkpoint", "complete", "--pairs_dir", "pairs", "--split", "all")
        call("-m", "orion_unet", "predict", "--checkpoint", "complete", "--input", "pairs/core_0_HE.npy",
             "--output_dir", "predicted", "--no_overview")  # fmt: skip
        call(*train, *words({**COMPLETE, "epochs": 3}), "--output_dir", "complete", "--resume", "auto")
        call(*train, *words(INTERRUPTED), "--output_dir", "interrupted", "--resume", "auto")
        predicted = np.load(next((folder / "predicted").glob("*.npy")))
        expected = {
            "complete": losses(folder / "complete"),
            "interrupted": losses(folder / "interrupted"),
            "scores": json.loads((folder / "complete" / "evaluation" / "scores.json").read_text(encoding="utf-8")),
            "predicted": predicted[:, ::9, ::9].tolist(),
        }
        with zipfile.ZipFile(output, "w", zipfile.ZIP_DEFLATED) as archive:
            for path, content in kept.items():
                name = path.relative_to(folder).as_posix()
                if not name.endswith(".pt"):
                    content = content.replace(str(ROOT).encode(), b".").replace(socket.gethostname().encode(), b"host")
                archive.writestr(name, content)
            archive.writestr("expected.json", json.dumps(expected))


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
