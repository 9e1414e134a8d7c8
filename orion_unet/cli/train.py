"""Train: one rank under a launcher, or the launcher of this machine's ranks."""

from __future__ import annotations

import os
from pathlib import Path

from orion_unet.cli.arguments import parse_train_config
from orion_unet.config import TrainConfig


def main(argv: list[str], prog: str | None = None) -> int:
    """Parse the options and train; with several GPUs and no launcher, start a rank for each."""
    config = parse_train_config(argv, prog)
    # Threads that spin while they wait take cores from the loader and from other programs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if "RANK" not in os.environ:
        ranks = _wanted_ranks(config)
        if ranks > 1:
            from orion_unet.cli.launch import launch

            # The ranks must import this very package, whatever the current folder is.
            root = str(Path(__file__).resolve().parents[2])
            os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
            return launch(["--standalone", f"--nproc_per_node={ranks}", "-m", "orion_unet", "train", *argv])
    from orion_unet.training.loop import train

    return train(config)


def _wanted_ranks(config: TrainConfig) -> int:
    if config.runtime.gpus is not None:
        return config.runtime.gpus
    import torch

    return torch.cuda.device_count()
