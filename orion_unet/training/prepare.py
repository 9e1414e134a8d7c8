"""What must be known and right before a run may begin: pairs, split, scales, normalisation, validation patches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from orion_unet.config import TrainConfig
from orion_unet.data.alignment import alignment_warning
from orion_unet.data.channels import listed_channels, parse_channel_weights
from orion_unet.data.colour_regression import ColourRegression, held_out_correlations, known_colour_regression
from orion_unet.data.dataset import pairs_at_size, pixel_size
from orion_unet.data.digests import core_digests
from orion_unet.data.normalization import Normalization, known_normalization
from orion_unet.data.pairs import PairTable
from orion_unet.data.panels import PANELS_FILE
from orion_unet.data.patches import PatchReader, validation_patches
from orion_unet.data.scale import Progress, Scales, measure_scales, no_progress
from orion_unet.data.split import Split, make_split
from orion_unet.data.stain import known_stain
from orion_unet.distributed import world_size
from orion_unet.errors import InputError
from orion_unet.training.transfer import Source, source_warnings


@dataclass
class Prepared:
    """What rank 0 finds out about the data, for all ranks.

    ``digests`` of the training and validation cores by name, ``colour_regression``, the document of the baselines
    fitted to the training cores, and ``stain``, that of their stain, go into every checkpoint.
    ``regression_pearson`` is the correlation that the regression reaches on the validation cores, marker by marker,
    None where undefined. ``panels`` is the digest of which markers were measured in the cores of the split, None where
    panels do not differ.
    """

    table: PairTable
    split: Split
    scales: Scales
    normalization: Normalization
    validation: np.ndarray
    channel_weights: list[float] | None
    digests: dict[str, str]
    colour_regression: dict[str, Any]
    stain: dict[str, Any]
    regression_pearson: dict[str, float | None]
    warnings: list[str] = field(default_factory=list)
    pixel_size_um: float | None = None
    panels: str | None = None


def prepare_data(
    config: TrainConfig,
    ranks: int,
    earlier: dict[str, Any] | None = None,
    source: Source | None = None,
    progress: Progress = no_progress,
) -> Prepared:
    """Check the data and fit the normalisation; cheap checks first, so that a mistake shows at once.

    ``earlier`` is the checkpoint of a run that is continued: its split and normalisation are kept. ``source`` is the
    model that a new run starts from. Raises InputError.
    """
    data = config.data
    table = pairs_at_size(data)
    size_um = pixel_size(table, data.pixel_size_um)
    split, warnings = make_split(table, data, config.optimisation.seed, earlier["split"] if earlier else None)
    channel_weights = parse_channel_weights(config.loss.channel_weights, table.kept_names)
    _check_batches(config, split, ranks)
    if earlier and list(table.kept_names) != earlier["channel_names"]:
        raise InputError(
            f"the run to resume was trained on the channels {', '.join(earlier['channel_names'])}; "
            f"the data and options give {', '.join(table.kept_names)}"
        )
    panels = panels_digest(table, split)
    if earlier and panels != earlier.get("panels"):
        raise InputError(
            f"{table.folder / PANELS_FILE}: says of the cores of the run to resume that other markers were measured in "
            "them than when it began; restore the panels, or start another run in another --output_dir"
        )
    warnings += check_markers(table, split)
    names = table.kept_names
    keep = [names[channel] for channel in sorted(listed_channels("keep_channels", data.keep_channels, names))]
    if source is not None:
        source.check_markers(table.kept_names, config.transfer.init_partial)
    scales = measure_scales(table, data.target_normalization == "none", progress)
    if earlier:
        normalization = Normalization.from_document(earlier["normalization"])
    else:
        normalization = known_normalization(
            table, scales, split.train, data.target_normalization, data.target_transform, progress, keep
        )
    if constant := [name for name in normalization.empty if name not in normalization.noise]:
        warnings.append(f"no signal in the training cores, trained as empty: {', '.join(constant)}")
    if noise := normalization.noise:
        warnings.append(
            f"nothing but camera noise in the training cores, trained as empty: {', '.join(noise)}; the evidence is in "
            f'normalization.json. To train on them all the same: --keep_channels "{",".join(noise)}"'
        )
    if not earlier and (misaligned := alignment_warning(table, scales)):
        warnings.append(misaligned)
    reader = PatchReader(table, scales, data.patch_size)
    places = validation_patches(reader, split.val, data, config.optimisation.seed)
    digests = core_digests(table, [*split.train.tolist(), *split.val.tolist()])
    regression = known_colour_regression(table, scales, normalization, split.train, data, progress)
    stain = known_stain(table, scales, split, progress)
    reached = held_out_correlations(
        ColourRegression.from_document(regression), table, scales, normalization, places, data
    )
    if source is not None:
        validated = {name: digests[name] for name in table.names[split.val].astype(str)}
        warnings += source_warnings(source, data.target_transform, size_um, table.kept_names, validated)
    warnings = table.warnings + warnings
    return Prepared(
        table,
        split,
        scales,
        normalization,
        places,
        channel_weights,
        digests,
        regression,
        stain,
        reached,
        warnings,
        size_um,
        panels,
    )


def panels_digest(table: PairTable, split: Split) -> str | None:
    """Digest of the markers that were measured in the cores of the split; None where panels do not differ."""
    if table.panels is None:
        return None
    return table.panels.digest(table.names.tolist(), np.sort(np.concatenate([split.train, split.val])).tolist())


def check_markers(table: PairTable, split: Split) -> list[str]:
    """A warning where markers were measured in no validation core: they are trained, and nothing judges them.

    Raises InputError where markers were measured in no training core, or where cores have none of the markers.
    """
    if table.measured is None:
        return []
    panels = table.folder / PANELS_FILE
    if untrained := table.never_measured(split.train.tolist()):
        raise InputError(
            f"{panels}: measured in no training core, so that nothing can be learned of it: {', '.join(untrained)}. "
            f'Leave it out with --exclude_channels "{",".join(untrained)}", or train on cores that have it (another '
            "--split_file, --seed or fold)"
        )
    used = np.sort(np.concatenate([split.train, split.val]))
    bare = [str(name) for name in table.names[used[~table.measured[used].any(axis=1)]]]
    if bare:
        raise InputError.listing(
            f"{panels}: these cores have none of the markers that are trained on:",
            bare,
            "Leave them out of the split (--split_file), or exclude fewer channels.",
        )
    if not (unjudged := table.never_measured(split.val.tolist())):
        return []
    return [
        f"measured in no validation core, so that nothing shows how well it is predicted: {', '.join(unjudged)} "
        "(another --split_file or --seed can change that)"
    ]


def check_folds(configs: Sequence[TrainConfig]) -> None:
    """Raise InputError where the training of a fold of one folder would be refused for its panels."""
    table = pairs_at_size(configs[0].data)
    for config in configs:
        try:
            check_markers(table, make_split(table, config.data, config.optimisation.seed)[0])
        except InputError as error:
            raise InputError(f"--fold {config.data.fold}: {error}") from None


def _check_batches(config: TrainConfig, split: Split, ranks: int) -> None:
    samples = len(split.train) * config.data.patches_per_image
    batch = config.optimisation.batch_size
    if samples < batch * ranks:
        needed = math.ceil(batch * ranks / len(split.train))
        raise InputError(
            f"{len(split.train)} training cores x --patches_per_image {config.data.patches_per_image} give {samples} "
            f"patches, too few for one batch of {batch} on each of {ranks} rank{'s' if ranks > 1 else ''}: lower "
            f"--batch_size to {max(1, samples // ranks)} or raise --patches_per_image to {needed}"
        )


def planned_steps(config: TrainConfig, prepared: Prepared) -> int:
    """Optimiser steps of the whole run."""
    options = config.optimisation
    batches = len(prepared.split.train) * config.data.patches_per_image // (options.batch_size * world_size())
    return math.ceil(batches / options.accumulate_steps) * options.epochs
