"""A model to predict with, made without training, and the predict command in this process."""

from types import SimpleNamespace

import numpy as np
import tiny_runs
import torch

from orion_unet import checkpoint
from orion_unet.__main__ import dispatch
from orion_unet.cli.arguments import run_command
from orion_unet.config import TrainConfig
from orion_unet.data.normalization import Normalization
from orion_unet.models.unet import SpatialUNet

NAMES = ("Hoechst", "CD3e", "Blank")
LOWER, UPPER, WHITE = np.array([0.01, 0.0, 0.2]), np.array([0.5, 0.25, 0.2]), 65535.0


def write_checkpoint(path, transform="linear", names=NAMES, stain=None, **options):
    """A network with random weights under a normalisation that can be inverted by hand; Blank is an empty channel."""
    config = TrainConfig.from_options({"base_features": 4, "depth": 2, "patch_size": 64, **options})
    torch.manual_seed(5)
    network = SpatialUNet.from_options(config.model, len(names))
    normalization = Normalization(names, LOWER, UPPER, np.zeros(3), WHITE, transform=transform)
    content = {
        "model": network.state_dict(),
        "options": config.options(),
        "normalization": normalization.document(),
        "channel_names": list(names),
        "split": {},
        "epoch": 7,
        "stain": stain,
    }
    checkpoint.save(path, content)
    return path


def image(height=150, width=170, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def contents(folder):
    """What a folder holds, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def predictor(model, folder, capsys):
    """A function that runs the command on its inputs: code, what was said, and the output folder."""

    def call(*inputs, out="out", checkpoint=model, **options):
        words = tiny_runs.command_line(options)
        argv = ["predict", "--checkpoint", checkpoint, "--output_dir", folder / out, *words, "--input", *inputs]
        code = run_command(dispatch, [str(word) for word in argv])
        said = capsys.readouterr()
        return SimpleNamespace(code=code, out=said.out, err=said.err, dir=folder / out)

    return call
