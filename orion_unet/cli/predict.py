"""predict: apply a trained model to H&E images and slides."""

from __future__ import annotations

import argparse
import logging
import math
from pathlib import Path

from orion_unet.cli.arguments import EXIT_OK, EXIT_USAGE, Parser
from orion_unet.errors import InputError

EXIT_INTERRUPTED = 130


def parser() -> Parser:
    """The command line of predict."""
    parser = Parser(
        prog="orion_unet predict",
        description="Predict the markers of H&E images and whole slides with a trained model.",
        epilog="Every on/off option has a --no_ form. An interrupted prediction goes on where it was left "
        "when the same command is given again.",
    )
    add = parser.add_argument
    add("--checkpoint", required=True, type=Path, metavar="FILE|RUN", help="best.pt or last.pt, or a run's folder")
    add(
        "--input",
        required=True,
        nargs="+",
        type=Path,
        metavar="FILE|DIR",
        help="images (.npy, .png, .jpg, .tif, .svs; .ndpi, .mrxs, .scn by OpenSlide); for a folder: its NAME_HE.npy "
        "files, otherwise every image",
    )
    add("--output_dir", required=True, type=Path, metavar="DIR", help="folder for the predictions; made if need be")

    output = parser.add_argument_group("output")
    add = output.add_argument
    add(
        "--format",
        choices=("npy", "ome-tiff"),
        default="npy",
        help="npy: (C, H, W) float32; ome-tiff: tiled and pyramidal, for QuPath and napari; default: npy",
    )
    add("--dtype", choices=("uint16", "float32"), help="pixels of an ome-tiff; default: uint16")
    add("--normalized", action="store_true", help="keep [0, 1]; default: the unit of the training data")
    add("--markers", metavar="NAME,...", help="write these markers only; default: all")
    add("--pixel_size_um", type=float, metavar="X", help="side of a pixel [micrometres]; default: the input's")
    _on_off(output, "overview", True, "draw NAME_overview.png, the H&E beside the markers; default: on")
    add("--overwrite", action="store_true", help="replace outputs that exist")

    how = parser.add_argument_group("prediction")
    add = how.add_argument
    _on_off(how, "tissue_only", None, "leave tiles without tissue empty; default: on for TIFF and slides")
    add("--tta", action="store_true", help="mean over the 8 flips and turns of each tile, 8 times the work")
    add("--tile", type=int, metavar="N", help="side of a tile [pixels]; default: by the network and the width")
    add("--overlap", type=int, metavar="N", help="overlap of tiles [pixels]; default: by the network's depth")
    add("--batch_size", type=int, metavar="N", help="tiles at a time; default: 1 on a CPU, 8 on a GPU")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N; default: auto")
    _on_off(how, "use_amp", False, "mixed precision on a GPU; default: off")
    return parser


def _on_off(group: argparse._ArgumentGroup, name: str, default: bool | None, text: str) -> None:
    group.add_argument(f"--{name}", action="store_true", default=default, help=text)
    group.add_argument(f"--no_{name}", dest=name, action="store_false", default=default, help=argparse.SUPPRESS)


def main(argv: list[str]) -> int:
    """Run predict. Returns the exit code; raises InputError for options or inputs that cannot be used."""
    options = vars(parser().parse_args(argv))
    size = options["pixel_size_um"]
    if size is not None and not (math.isfinite(size) and size > 0):
        raise InputError(f"--pixel_size_um {size:g}: must be a number above 0")
    if options["dtype"] and options["format"] == "npy":
        raise InputError(f"--dtype {options['dtype']}: is for --format ome-tiff; a .npy is float32")
    options["dtype"] = options["dtype"] or "uint16"
    # Only now: --help should not wait for torch.
    from orion_unet.inference.model import describe, load_trained
    from orion_unet.inference.predict_files import PredictOptions, predict_files

    # What it has to say about a damaged file is said in our own words.
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    output_dir, inputs = options.pop("output_dir"), options.pop("input")
    model = load_trained(options.pop("checkpoint"), options.pop("device"), options.pop("use_amp"))
    print(describe(model), flush=True)
    try:
        failed = predict_files(model, inputs, output_dir, PredictOptions(**options))
    except KeyboardInterrupt:
        print(f"\ninterrupted: what is done is kept in {output_dir}, and the same command goes on from there")
        return EXIT_INTERRUPTED
    if failed:
        print(f"{failed} of the images could not be predicted (see above); the same command tries them again")
        return EXIT_USAGE
    return EXIT_OK
