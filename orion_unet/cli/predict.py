"""predict: apply a trained model to H&E images and slides."""

from __future__ import annotations

import logging

from orion_unet.cli.arguments import EXIT_OK, EXIT_USAGE, Parser, add_options
from orion_unet.command_options import DeviceOptions, PredictOptions, PredictRequest
from orion_unet.errors import InputError
from orion_unet.options import checked

EXIT_INTERRUPTED = 130


def parser() -> Parser:
    """The command line of predict."""
    parser = Parser(
        prog="orion_unet predict",
        description="Predict the markers of H&E images and whole slides with a trained model.",
        epilog="Every on/off option has a --no_ form. The same command continues an interrupted prediction. "
        "image_stain.csv says whether each H&E is stained like those of the training.",
    )
    for group in (PredictRequest, PredictOptions, DeviceOptions):
        add_options(parser, group)
    return parser


def main(argv: list[str]) -> int:
    """Run predict. Returns the exit code; raises InputError for options or inputs that cannot be used."""
    given = vars(parser().parse_args(argv))
    request, options = checked(PredictRequest, given), checked(PredictOptions, given)
    where = checked(DeviceOptions, given)
    if "dtype" in given and options.format == "npy":
        raise InputError(f"--dtype {options.dtype}: is for --format ome-tiff; a .npy is float32")
    # Only now: --help should not wait for torch.
    from orion_unet.inference.ensemble import load_models, members_of
    from orion_unet.inference.model import describe
    from orion_unet.inference.predict_files import predict_files

    # What it has to say about a damaged file is said in our own words.
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    model = load_models(request.checkpoint, where.device, where.use_amp, options.spread, where.encoder_weights)
    for member in members_of(model):
        print(describe(member), flush=True)
    if len(members_of(model)) > 1:
        print(f"ensemble        the mean intensity of {len(members_of(model))} models", flush=True)
    try:
        failed = predict_files(model, request.input, request.output_dir, options)
    except KeyboardInterrupt:
        print(f"\ninterrupted: what is done is kept in {request.output_dir}, and the same command continues from there")
        return EXIT_INTERRUPTED
    if failed:
        print(f"{failed} of the images could not be predicted (see above); the same command tries them again")
        return EXIT_USAGE
    return EXIT_OK
