"""What is quantified: images, and for each its label image and its measured markers; found and checked before work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from orion_unet.command_options import QuantifyOptions
from orion_unet.data.channels import NAMES_FILE, channel_names
from orion_unet.data.panels import PANELS_FILE, markers_of
from orion_unet.data.split import GROUPS_FILE, read_groups
from orion_unet.data.stain import StainJudgement
from orion_unet.errors import InputError
from orion_unet.inference.outputs import RESULT_SUFFIX, SPREAD
from orion_unet.inference.stain_table import read_stain
from orion_unet.inference.trust import MarkerTrust
from orion_unet.inference.verdict_table import read_verdicts
from orion_unet.slides.markers import MarkerImage
from orion_unet.slides.open import is_zarr_image, open_labels, open_markers

LABELS_ENDING, MEASURED_ENDING = "_LABELS", "_ORION"
# Endings of the files of a folder, after the name of the image.
LABEL_SUFFIXES = (".npy", ".tif", ".tiff", ".ome.tif", ".ome.tiff", ".zarr", ".ome.zarr")


@dataclass(frozen=True)
class Source:
    """An image, its name without endings, the files that belong to it, and what predict says of its H&E's stain."""

    name: str
    image: Path
    labels: Path | None
    measured: Path | None
    stain: StainJudgement | None = None


def find_sources(options: QuantifyOptions) -> list[Source]:
    """The images of ``--image`` or ``--predictions`` with their files; raises InputError that lists what is missing."""
    if (options.image is None) == (options.predictions is None):
        raise InputError("give either --image FILE or --predictions DIR")
    if options.image is not None:
        images = [options.image]
    else:
        assert options.predictions is not None, "one of both is given"
        images = _predictions(options.predictions)
    for option, path in (("labels", options.labels), ("measured", options.measured)):
        if path is not None and len(images) > 1 and not _is_folder(path):
            raise InputError(f"--{option} {path}: is one file for {len(images)} images; give a folder")
    sources, problems = [], []
    stains: dict[Path, dict[str, StainJudgement]] = {}
    for image in images:
        name = image_name(image)
        found: dict[str, Path | None] = {}
        for option, given, ending in (
            ("labels", options.labels, LABELS_ENDING),
            ("measured", options.measured, MEASURED_ENDING),
        ):
            found[option] = given
            if given is not None and _is_folder(given):
                places = [given / f"{name}{middle}{suffix}" for middle in (ending, "") for suffix in LABEL_SUFFIXES]
                found[option] = next((path for path in places if path.exists()), None)
                if found[option] is None:
                    problems.append(f"--{option} {given}: has no {name}{ending}.npy, .tif or .zarr for {image.name}")
        if image.parent not in stains:
            stains[image.parent] = read_stain(image.parent)
        stain = None if _is_measured(image) else stains[image.parent].get(name)
        sources.append(Source(name, image, found["labels"], found["measured"], stain))
    if len(problems) == 1:
        raise InputError(problems[0])
    if problems:
        raise InputError.listing("these files are missing:", problems)
    return sources


def _is_folder(path: Path) -> bool:
    """A folder of images, not one that is an image."""
    return path.is_dir() and not is_zarr_image(path)


def _predictions(folder: Path) -> list[Path]:
    try:
        files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    except OSError as error:
        raise InputError(f"--predictions {folder}: cannot be read ({error.strerror or error})") from None
    images = [path for path in files if path.name.endswith(tuple(RESULT_SUFFIX.values()))]
    images = [path for path in images if not _stem(path).endswith(("_HE", LABELS_ENDING, MEASURED_ENDING))]
    stems = {_stem(path) for path in images}
    images = [path for path in images if _stem(path).removesuffix(SPREAD) not in stems - {_stem(path)}]
    if not images:
        raise InputError(f"--predictions {folder}: contains no prediction ({', '.join(RESULT_SUFFIX.values())})")
    names = [image_name(path) for path in images]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"--predictions {folder}: has two files for {', '.join(twice)}; keep one of them")
    return images


def image_name(path: Path) -> str:
    """Name of an image without its endings: core_1 of core_1.ome.tiff and of core_1_ORION.npy."""
    return _stem(path).removesuffix(MEASURED_ENDING) or _stem(path)


def _stem(path: Path) -> str:
    name = path.stem
    return name[: -len(".ome")] if name.lower().endswith(".ome") else name


def _is_measured(path: Path) -> bool:
    return _stem(path).endswith(MEASURED_ENDING)


def find_trust(sources: Sequence[Source]) -> dict[str, MarkerTrust] | None:
    """The verdicts that predict wrote beside its images, by marker; None for measured images and where there are none.

    Raises InputError where the table is damaged.
    """
    image = sources[0].image
    return None if _is_measured(image) else read_verdicts(image.parent)


def image_groups(sources: Sequence[Source], measured: Path | None) -> list[str]:
    """Patient or slide of each image, from the groups.csv in the folder of the measured markers; without one, each
    image is its own group. Raises InputError where it does not name every image."""
    names = [source.name for source in sources]
    if measured is None or not (measured / GROUPS_FILE).is_file():
        return names
    return read_groups(measured / GROUPS_FILE, names)


def names_of(image: MarkerImage, given: str | None) -> tuple[str, ...]:
    """Names of the channels: as given, else those of a measured image's panel, else as the file or a channel_names.txt
    beside it states."""
    if given is None and _is_measured(image.path) and (panel := _panel_of(image)):
        return panel
    if given is None and image.channel_names:
        return image.channel_names
    return channel_names(given, image.path.parent, image.shape[0])


def _panel_of(image: MarkerImage) -> tuple[str, ...]:
    """The markers of a measured image by the panels.csv of its folder; none without one. Raises InputError."""
    folder = image.path.parent
    panel = markers_of(folder, image_name(image.path))
    if panel and len(panel) != image.shape[0]:
        raise InputError(
            f"{image.path}: has {image.shape[0]} channels, but its panel by {folder / PANELS_FILE} has {len(panel)} "
            "markers"
        )
    return panel


def measured_channels(measured: MarkerImage, names: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs of a channel of the image (of these names) and the channel of the measured image with the same name.

    Names are those of its panel where its folder has a panels.csv, else its own, else those of channel_names.txt. A
    measured image without names has the image's channels. Raises InputError where they have none in common.
    """
    folder = measured.path.parent
    panel = _panel_of(measured)
    own = panel or measured.channel_names
    if not own and (folder / NAMES_FILE).is_file():
        own = channel_names(None, folder, measured.shape[0])
    if not own:
        if measured.shape[0] != len(names):
            raise InputError(
                f"--measured {measured.path}: does not name its {measured.shape[0]} channels, and the image has "
                f"{len(names)}; put a {NAMES_FILE} beside it"
            )
        own = tuple(names)
    common = [(index, own.index(name)) for index, name in enumerate(names) if name in own]
    if not common:
        raise InputError(
            f"--measured {measured.path}: has none of the image's markers; it has {', '.join(own)}, the image "
            f"{', '.join(names)}"
        )
    return common


def check_sources(sources: Sequence[Source], given_names: str | None) -> tuple[str, ...]:
    """The names of the markers, after opening every file once; raises InputError for one that cannot be used."""
    names: tuple[str, ...] = ()
    for source in sources:
        with open_markers(source.image) as image:
            size = image.shape[1:]
            found = names_of(image, given_names)
        if names and found != names:
            raise InputError(
                f"{source.image}: has the markers {', '.join(found)}, other images {', '.join(names)}; quantify them "
                "into two folders"
            )
        names = found
        if source.labels is not None:
            with open_labels(source.labels) as labels:
                _check_size(labels, size, source, "labels")
        if source.measured is not None:
            with open_markers(source.measured) as measured:
                _check_size(measured, size, source, "measured")
                measured_channels(measured, names)
    return names


def _check_size(other: MarkerImage, size: tuple[int, ...], source: Source, option: str) -> None:
    if other.shape[1:] != size:
        raise InputError(
            f"--{option} {other.path}: has {other.shape[2]:,} x {other.shape[1]:,} pixels, {source.image.name} has "
            f"{size[1]:,} x {size[0]:,}; both must show the same pixels"
        )
