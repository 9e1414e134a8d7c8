"""The panels of held-out patches, measured beside predicted."""

import torch
from matplotlib.image import imread
from torch import nn

from orion_unet.data.normalization import Normalization
from orion_unet.data.transforms import BatchTransform
from orion_unet.training.sanity import SanityPanel


def test_names_that_are_no_formula_are_drawn(write_pairs, open_pairs, tmp_path):
    """matplotlib would refuse what stands between the dollar signs, and end the training with it."""
    name = r"core $\frac$"
    folder = write_pairs(cores=2)
    for kind in ("HE", "ORION"):
        (folder / f"core_00_{kind}.npy").rename(folder / f"{name}_{kind}.npy")
    opened = open_pairs(folder, channel_names=rf"DAPI,{name},CD3")
    names = opened.table.kept_names
    plain = Normalization(names, torch.zeros(3).numpy(), torch.ones(3).numpy(), 1.0, "none")
    transform = BatchTransform(opened.table, opened.reader.formats, plain, False, torch.device("cpu"))
    places = torch.tensor([[core, 8 * y, 0] for core in range(2) for y in range(4)])
    panel = SanityPanel(opened.reader, transform, places, names)
    assert any(name.replace("$", r"\$") in label for label in panel.labels)
    drawn = imread(panel.draw(nn.Conv2d(3, 3, 1), tmp_path, 1))
    assert min(drawn.shape[:2]) > 300
