"""Which cores of a folder a model was trained on, which it was validated on, and which are new to it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from orion_unet.data.digests import core_digests
from orion_unet.data.pairs import PairTable
from orion_unet.data.split import GROUPS_FILE, core_groups
from orion_unet.errors import InputError
from orion_unet.inference.model import TrainedModel
from orion_unet.text import named


@dataclass(frozen=True)
class KnownCores:
    """What a model knows of the N cores of a folder.

    ``names`` (N,) are their names in the training, None for new ones. ``train`` and ``val`` are indices: the cores
    that the model was trained on, and those that it can be judged by. ``groups`` (N,) are their patients or slides.
    ``matching`` is a sentence on how many were recognised, ``warnings`` are sentences for a person.
    """

    names: tuple[str | None, ...]
    train: np.ndarray
    val: np.ndarray
    groups: tuple[str, ...]
    matching: str
    warnings: tuple[str, ...]


def recognise_cores(
    model: TrainedModel, table: PairTable, groups_csv: str | None, other_pixels: bool = False
) -> KnownCores:
    """Recognise the cores of the training by their digests, in a checkpoint of version 0.1 by their names.

    With ``other_pixels``, pairs of another pixel size than the training, names count as well: no digest is the same
    where the tissue is.

    New cores can be judged by, unless their group was trained on. Cores that an earlier model was trained on, from
    whose weights this one started, cannot. Raises InputError.
    """
    try:
        sides = {side: {str(row["core"]): str(row["group"]) for row in model.split[side]} for side in ("train", "val")}
    except (KeyError, TypeError):
        raise InputError(f"{model.path}: is damaged, its split cannot be read") from None
    trained_on = sides["train"]
    group_of = trained_on | sides["val"]
    own = [str(name) for name in table.names]
    warnings = []
    if model.digests:
        digests = {name: digest for name, digest in model.digests.items() if name in group_of}
        found = core_digests(table, range(len(table)))
        known = _by_digest(digests, trained_on, own, found)
        namesakes = [name for name, same in zip(own, known, strict=True) if same is None and name in group_of]
        if other_pixels and namesakes:
            known = [name if name in namesakes else same for name, same in zip(own, known, strict=True)]
            warnings.append(
                f"{len(namesakes)} cores have other pixels than the training and the names of cores that it had; they "
                f"are taken for those: {named(namesakes)}. If they are others, give them other names"
            )
        seen = [core for core, name in enumerate(own) if found[name] in model.earlier_digests]
        matching = _matching(own, known, group_of)
    else:
        known = [name if name in group_of else None for name in own]
        seen = []
        matching = ""
        warnings.append(
            "the checkpoint is of version 0.1 and does not describe its cores: they are recognised by name alone, and "
            "a core of another folder that shares its name with one of them counts as that one"
        )
    if groups_csv or (table.folder / GROUPS_FILE).is_file():
        groups = core_groups(table, groups_csv)
        trained_groups = set(trained_on.values())
    else:
        groups = [group_of[name] if name else own_name for own_name, name in zip(own, known, strict=True)]
        trained_groups = set()
    train = [core for core, name in enumerate(known) if name in trained_on]
    related = [core for core, name in enumerate(known) if name is None and groups[core] in trained_groups]
    seen = sorted(set(seen) - set(train))
    val = sorted(set(range(len(table))) - set(train) - set(related) - set(seen))
    if seen:
        warnings.append(
            f"{len(seen)} cores were not trained on here, but by the model that this one started from "
            f"(--init_from); they do not count as held out: {named(own[core] for core in seen)}"
        )
    if related:
        warnings.append(
            f"{len(related)} cores are new, but in groups with the names of groups that were trained on; they do not "
            f"count as held out: {named(own[core] for core in related)}. If those are other patients, give the "
            "groups other names with --groups_csv"
        )
    return KnownCores(tuple(known), np.array(train, int), np.array(val, int), tuple(groups), matching, tuple(warnings))


def _by_digest(
    digests: dict[str, str], trained_on: dict[str, str], own: list[str], found: dict[str, str]
) -> list[str | None]:
    """Name in the training of each core: its own where that fits, else that of a core with the same digest."""
    of_digest: dict[str, str] = {}
    # Training cores last, so that they win: where tissue was on both sides, it was trained on.
    for name in sorted(digests, key=lambda name: name in trained_on):
        of_digest[digests[name]] = name
    return [name if digests.get(name) == found[name] else of_digest.get(found[name]) for name in own]


def _matching(own: list[str], known: list[str | None], group_of: dict[str, str]) -> str:
    same = sum(name is not None for name in known)
    renamed = sum(name is not None and name != before for name, before in zip(known, own, strict=True))
    namesakes = sum(name is None and before in group_of for name, before in zip(known, own, strict=True))
    parts = [f"{same} of {len(own)} cores are those of training"]
    if renamed:
        parts[0] += f" ({renamed} under another name)"
    if namesakes:
        shared = "shares only its name and counts" if namesakes == 1 else "share only their names and count"
        parts.append(f"{namesakes} {shared} as new")
    others = len(own) - same - namesakes
    if others:
        parts.append(f"{others} {'is' if others == 1 else 'are'} new")
    return ", ".join(parts)
