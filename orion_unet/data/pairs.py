"""Finds and checks pairs of H&E and ORION files, without reading their pixels."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from orion_unet.config import DataOptions
from orion_unet.data.channels import channel_names, excluded_channels
from orion_unet.data.headers import NPY, Header, Unusable, read_headers, stored_images
from orion_unet.data.panels import PANELS_FILE, Panels, find_panels
from orion_unet.data.slide_regions import REGION_SUFFIX, open_region
from orion_unet.errors import InputError
from orion_unet.slides.remote import beside, input_path, is_remote
from orion_unet.slides.stored import TILED_SUFFIXES, StoredImage, open_tiles
from orion_unet.slides.tiles import TileCache, TiledArray
from orion_unet.text import named

KINDS = {"he": "_HE", "orion": "_ORION"}
HE_SUFFIX, ORION_SUFFIX = (f"{kind}{NPY}" for kind in KINDS.values())
# In the order in which a name is tried.
SUFFIXES = (NPY, *TILED_SUFFIXES, REGION_SUFFIX)
NPY_ADVICE = (
    "Pairs on object storage are OME-Zarr or tiled OME-TIFF. Where the .npy files are on a disk: python -m orion_unet "
    "pack DIR --output_dir OUT --format ome-zarr, and upload OUT. "
)
# The pixel sizes that files state may differ by rounding, as a fraction.
ROUNDING = 0.01
# One row per stored array. A NumPy table instead of a list of objects, so that a worker needs no more memory for
# 10,000 cores than for 10.
RECORD = np.dtype(
    [
        ("suffix", "U12"),
        ("offset", "i8"),
        ("dtype", "U4"),
        ("layout", "U3"),
        ("fortran", "?"),
        ("height", "i4"),
        ("width", "i4"),
        ("channels", "i4"),
    ]
)


@dataclass
class PairTable:
    """The checked pairs of one folder.

    ``names`` (N,) are the cores in alphabetical order; ``he`` and ``orion`` (N,) say how their arrays are stored
    (``RECORD``; an offset of -1 means tiles). ``channel_names`` are the names of all ORION channels that any core
    stores, ``kept_channels`` the indices of those that are trained on. ``warnings`` are sentences for the user.
    ``level`` is the level of the pyramids, whose pixels are ``factor`` times those of level 0, and ``pixel_size_um``
    the side of a pixel there as the files state it, None if they do not. ``stated_names`` are the channel names that
    the files state, whether they are used or not; empty if they state none. ``panels`` say which of the channels each
    core's file has, and where; None where every file has all of them in order.
    """

    folder: Path
    names: np.ndarray
    he: np.ndarray
    orion: np.ndarray
    channel_names: tuple[str, ...]
    kept_channels: tuple[int, ...]
    warnings: list[str] = field(default_factory=list)
    level: int = 0
    factor: float = 1.0
    pixel_size_um: float | None = None
    stated_names: tuple[str, ...] = ()
    panels: Panels | None = None

    def __len__(self) -> int:
        return len(self.names)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays together, decoded."""
        return sum(
            int((rows["height"].astype(np.int64) * rows["width"] * rows["channels"] * itemsize(rows)).sum())
            for rows in (self.he, self.orion)
        )

    @property
    def kept_names(self) -> tuple[str, ...]:
        """Names of the channels that are trained on, in order."""
        return tuple(self.channel_names[index] for index in self.kept_channels)

    @property
    def measured(self) -> np.ndarray | None:
        """Whether each kept channel was measured in each core, (N, C) bool; None where every core has all of them."""
        if self.panels is None:
            return None
        measured: np.ndarray = self.panels.places[:, list(self.kept_channels)] >= 0
        return None if measured.all() else measured

    def measured_in(self, core: int) -> np.ndarray:
        """Whether each kept channel was measured in a core, (C,) bool."""
        measured: np.ndarray = self.places(core)[list(self.kept_channels)] >= 0
        return measured

    def never_measured(self, cores: Sequence[int]) -> list[str]:
        """The kept channels that were measured in none of the cores."""
        if self.measured is None:
            return []
        found = np.logical_or.reduce(self.measured[list(cores)], axis=0)
        return [name for index, name in enumerate(self.kept_names) if not found[index]]

    def places(self, core: int) -> np.ndarray:
        """Place of each of ``channel_names`` in the core's file, -1 where it was not measured."""
        return np.arange(len(self.channel_names)) if self.panels is None else self.panels.places[core]

    @property
    def every_place(self) -> list[list[int]] | None:
        """``places`` of all cores, by which a cache knows them; None where panels do not differ."""
        return None if self.panels is None else self.panels.places.tolist()

    def stored_names(self, core: int) -> tuple[str, ...]:
        """Names of the channels of a core's file, in their order."""
        return self.channel_names if self.panels is None else self.panels.markers[self.panels.of_core[core]]

    def lacking(self, channel: int) -> list[str]:
        """The cores in which one of ``channel_names`` was not measured."""
        if self.panels is None:
            return []
        return [str(name) for name in self.names[self.panels.places[:, channel] < 0]]

    def of(self, cores: Sequence[int]) -> PairTable:
        """The same for some of the cores."""
        index = list(cores)
        panels = None if self.panels is None else self.panels.of(index)
        return replace(self, names=self.names[index], he=self.he[index], orion=self.orion[index], panels=panels)

    def path(self, core: int, modality: str) -> Path:
        """File (of OME-Zarr: folder) of one core; modality is ``he`` or ``orion``."""
        return self.folder / f"{self.names[core]}{KINDS[modality]}{getattr(self, modality)[core]['suffix']}"

    def npy_name(self, core: int, modality: str) -> str:
        """Name of the .npy file that commands write for a core, whatever it is stored as here."""
        return f"{self.names[core]}{KINDS[modality]}{NPY}"

    def shape(self, core: int, modality: str) -> tuple[int, int, int]:
        """(H, W, C)."""
        row = getattr(self, modality)[core]
        return int(row["height"]), int(row["width"]), int(row["channels"])

    def open(self, core: int, modality: str, cache: TileCache | None = None) -> np.ndarray | TiledArray:
        """One core as stored: a memory map, or tiles, which are kept in ``cache``. Both are sliced alike.

        Raises InputError if the file has changed since it was checked.
        """
        row, path = getattr(self, modality)[core], self.path(core, modality)
        hwc = self.shape(core, modality)
        if row["offset"] < 0:
            if str(row["suffix"]) == REGION_SUFFIX:
                stored = open_region(path, modality, cache, (modality, core))
            else:
                tiles = open_tiles(path, modality, self.level)
                stored = TiledArray(tiles, str(row["layout"]), hwc[2], cache, (modality, core))
            if stored.tiles.shape != hwc[:2] or stored.dtype != np.dtype(str(row["dtype"])).newbyteorder("="):
                raise InputError(f"{path}: cannot be read any more; it was changed")
            return stored
        shape = hwc if row["layout"] == "hwc" else (hwc[2], hwc[0], hwc[1])
        try:
            return np.memmap(
                path,
                dtype=str(row["dtype"]),
                mode="r",
                offset=int(row["offset"]),
                shape=shape,
                order="F" if row["fortran"] else "C",
            )
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read any more; it was changed or removed ({error})") from None

    def image(self, core: int, modality: str) -> np.ndarray | TiledArray:
        """One core in the axis order (H, W, C), without a copy; ``open`` says the rest."""
        stored = self.open(core, modality)
        if getattr(self, modality)[core]["layout"] == "hwc":
            return stored
        return stored.channels_last() if isinstance(stored, TiledArray) else stored.transpose(1, 2, 0)

    def marker_rows(self, core: int, rows: np.ndarray, channels: Sequence[int]) -> np.ndarray:
        """Whole rows of pixels (R,) of some of ``channel_names``, (C, R, W); 0 where they were not measured."""
        stored, chosen = self.open(core, "orion"), self.places(core)[list(channels)]
        measured = chosen >= 0
        chosen = chosen[measured]
        if isinstance(stored, TiledArray):
            found = stored.rows(rows, chosen.tolist())
        elif self.orion[core]["layout"] == "hwc":
            found = stored[rows].transpose(2, 0, 1)[chosen]
        else:
            found = stored[chosen[:, None], rows]
        if measured.all():
            return found
        every = np.zeros((len(measured), *found.shape[1:]), found.dtype)
        every[measured] = found
        return every


def itemsize(rows: np.ndarray) -> np.ndarray:
    """Bytes per value of each array in the rows of a table."""
    return np.array([np.dtype(text).itemsize for text in rows["dtype"].tolist()], np.int64)


def pair_file(name: str) -> str | None:
    """``he`` or ``orion`` for the name of a file of a pair; None for any other."""
    # Names that begin with a dot are left by copying tools (._NAME on macOS shares) and are never cores.
    if name.startswith("."):
        return None
    return next(
        (modality for modality, kind in KINDS.items() for suffix in SUFFIXES if name.endswith(kind + suffix)), None
    )


def find_pairs(options: DataOptions) -> PairTable:
    """Find every pair in ``options.pairs_dir`` and check it by the headers of its files.

    Raises InputError with one message that names every bad file. Never unpickles: a file with Python objects is
    refused.
    """
    folder = input_path(options.pairs_dir)
    suffixes = _scan(folder)
    paired = sorted(suffixes["he"].keys() & suffixes["orion"].keys())
    unpaired = sorted(
        f"{name}{kind}{suffix}"
        for modality, kind in KINDS.items()
        for name, found in suffixes[modality].items()
        if name not in suffixes["orion" if modality == "he" else "he"]
        for suffix in found
    )
    if not paired:
        seen = f"; unpaired: {', '.join(unpaired)}" if unpaired else ""
        raise InputError(
            f"--pairs_dir {folder}: has no pair of NAME{HE_SUFFIX} and NAME{ORION_SUFFIX} (or .ome.tif, "
            f".ome.zarr){seen}. "
            "Name the folder of your pairs, or try with `python -m orion_unet make-demo DIR`."
        )
    panels, warnings = find_panels(folder, paired, options.channel_names)
    if unpaired:
        warnings.append(f"{len(unpaired)} files without a partner are ignored: {named(unpaired)}")

    problems = list(_twice(paired, suffixes))
    he, orion = (np.zeros(len(paired), RECORD) for _ in KINDS)
    for rows, modality in ((he, "he"), (orion, "orion")):
        rows["suffix"] = [suffixes[modality][name][0] for name in paired]
    files = [
        (f"{name}{kind}{suffixes[modality][name][0]}", modality) for name in paired for modality, kind in KINDS.items()
    ]
    headers = read_headers(folder, files, options.level)
    for index, name in enumerate(paired):
        of_pair = [headers[file] for file, _ in files[2 * index : 2 * index + 2]]
        unusable = next((str(header) for header in of_pair if isinstance(header, Unusable)), None)
        if unusable is not None:
            # A slide that cannot be used is named once, not for each of its regions.
            problems += [unusable] if unusable not in problems else []
            continue
        he_header, orion_header = (header for header in of_pair if isinstance(header, Header))
        problems += _check_pair(
            name, (he_header, he[index : index + 1]), (orion_header, orion[index : index + 1]), options
        )
    problems += _wrong_channels(paired, orion, panels)
    images = stored_images(headers.values())
    problems += _unequal_levels(images)
    if problems:
        raise InputError.listing(
            f"--pairs_dir {folder}: these files cannot be used:",
            problems,
            (NPY_ADVICE if is_remote(folder) and any(".npy" in problem for problem in problems) else "")
            + "Repair them or move them out of the folder; nothing has been written.",
        )
    if striped := sum(image.striped for image in images):
        packed = beside(folder.resolve(), "_packed")
        warnings.append(
            f"{striped} files are compressed in strips, of which a patch decodes whole rows; reading is faster after: "
            f"python -m orion_unet pack {shlex.quote(str(folder))} --output_dir {shlex.quote(str(packed))}"
        )
    own_names, own_size = _stated(
        stored_images(headers[f] for f, modality in files if modality == "orion"), len(paired)
    )
    if panels is None:
        stored_names = channel_names(options.channel_names, folder, int(orion["channels"][0]), own_names)
    else:
        stored_names = panels.names
        panels = panels if panels.differ else None
    excluded = excluded_channels(options.exclude_channels, stored_names)
    kept = tuple(index for index in range(len(stored_names)) if index not in excluded)
    factor = next((image.factor for image in images), 1.0)
    return PairTable(
        folder,
        np.array(paired),
        he,
        orion,
        stored_names,
        kept,
        warnings,
        options.level,
        factor,
        own_size,
        own_names,
        panels,
    )


def _scan(folder: Path) -> dict[str, dict[str, list[str]]]:
    """By modality and name of a core: the suffixes of its files."""
    try:
        files = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise InputError(f"--pairs_dir {folder}: cannot be read ({error.strerror})") from None
    found: dict[str, dict[str, list[str]]] = {modality: {} for modality in KINDS}
    for file in files:
        modality = pair_file(file)
        if modality is not None:
            name, _, suffix = file.rpartition(KINDS[modality])
            found[modality].setdefault(name, []).append(suffix)
    return found


def _twice(paired: Sequence[str], suffixes: dict[str, dict[str, list[str]]]) -> Iterator[str]:
    for name in paired:
        for modality, kind in KINDS.items():
            found = [f"{name}{kind}{suffix}" for suffix in suffixes[modality][name]]
            if len(found) > 1:
                yield f"{name}: has {' and '.join(found)}; keep one of them"


Side = tuple[Header, np.ndarray]


def _check_pair(name: str, he: Side, orion: Side, options: DataOptions) -> Iterator[str]:
    """Fill in the two rows of a pair, or yield its problems."""
    (he_header, he_row), (orion_header, orion_row) = he, orion
    he_file, orion_file = (
        f"{name}{kind}{row['suffix'][0]}" for kind, row in zip(KINDS.values(), (he_row, orion_row), strict=True)
    )
    matches = [
        (he_layout, orion_layout)
        for he_layout, he_size in he_header.sizes.items()
        for orion_layout, orion_size in orion_header.sizes.items()
        if he_size[:2] == orion_size[:2]
        and _allowed(he_header, he_layout, options.he_layout)
        and _allowed(orion_header, orion_layout, options.orion_layout)
    ]
    if not he_header.sizes:
        yield f"{he_file}: has shape {he_header.shape}; an H&E needs 3 channels, (H, W, 3) or (3, H, W)"
    elif not matches:
        yield (
            f"{orion_file}: has shape {orion_header.shape}, but the H&E has {he_header.shape}: "
            "height and width must be equal" + _forced(options)
        )
    elif len(matches) > 1:
        which = "--orion_layout" if len({match[0] for match in matches}) == 1 else "--he_layout"
        yield (
            f"{name}: the axis order of {he_header.shape} and {orion_header.shape} is ambiguous; add {which} hwc or "
            f"{which} chw"
        )
    else:
        for (header, row), layout in zip((he, orion), matches[0], strict=True):
            row["offset"], row["dtype"], row["fortran"] = header.offset, header.dtype, header.fortran
            row["layout"] = layout
            row["height"], row["width"], row["channels"] = header.sizes[layout]
        height, width = he_header.sizes[matches[0][0]][:2]
        if not orion_row["channels"][0]:
            yield f"{orion_file}: has shape {orion_header.shape}, so no channels"
        if min(height, width) < options.patch_size:
            yield f"{name}: is {height} x {width} pixels, smaller than --patch_size {options.patch_size}"


def _allowed(header: Header, layout: str, given: str) -> bool:
    """Whether an axis order may be that of a file: TIFF and OME-Zarr state theirs."""
    return header.stored is not None or given in ("auto", layout)


def _forced(options: DataOptions) -> str:
    given = [
        f"--{key} {value}"
        for key, value in (("he_layout", options.he_layout), ("orion_layout", options.orion_layout))
        if value != "auto"
    ]
    return f" (with {' and '.join(given)})" if given else ""


def _wrong_channels(names: Sequence[str], orion: np.ndarray, panels: Panels | None) -> Iterator[str]:
    files = [f"{name}{KINDS['orion']}{row['suffix']}" for name, row in zip(names, orion, strict=True)]
    counts = orion["channels"].tolist()
    if panels is not None:
        yield from panels.wrong_counts(files, counts)
        return
    # A pair that could not be read has 0 channels and is already reported.
    known = Counter(count for count in counts if count)
    usual = known.most_common(1)[0][0] if known else 0
    for file, count in zip(files, counts, strict=True):
        if count not in (0, usual):
            yield (
                f"{file}: has {count} channels, but the others have {usual} (if other markers were measured there, say "
                f"so in {PANELS_FILE})"
            )


def _unequal_levels(images: Sequence[StoredImage]) -> Iterator[str]:
    factors = sorted(image.factor for image in images)
    if factors and factors[-1] - factors[0] > ROUNDING * factors[0]:
        yield (
            f"at this --level, pixels are {factors[0]:g} times those of level 0 in one file and {factors[-1]:g} times "
            "in another; all must have the same size"
        )


def _stated(images: Sequence[StoredImage], pairs: int) -> tuple[tuple[str, ...], float | None]:
    """The channel names and the pixel size on which all ORION files agree; nothing where some state none."""
    names = {image.names for image in images}
    sizes = [image.pixel_size_um for image in images if image.pixel_size_um is not None]
    agreed = len(sizes) == pairs and max(sizes) - min(sizes) <= ROUNDING * min(sizes)
    return names.pop() if len(images) == pairs and len(names) == 1 else (), sizes[0] if agreed else None
