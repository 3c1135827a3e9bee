"""Which particles of a store a user means: those of a STAR or .cs file, rows of the input, or labels.

Called by `edit.py`. A subset file may name its stacks by other folders than the store was made from: a stack that is not
where prep would look for it is recognised by the end of its path, and that is said.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_prep.cryosparc import images_of, uids_of
from data_prep.cs_files import read_columns
from data_prep.locate import PARENTS_SEARCHED
from data_prep.stacks import STACK_SUFFIXES
from spire_dist.data.store import ParticleStore
from spire_dist.errors import ConfigError, SourceError
from spire_dist.numpy_pickle import load_numbers
from spire_dist.schema import STACKS_NAME
from spire_dist.star import read_blocks

Kept = NDArray[np.bool_]
"""[N], which rows of the store."""
WHOLE_STACK = -1
"""Slice of a name without "@": a file of one image, or all tilts of a particle."""


def in_file(store: ParticleStore, path: Path) -> tuple[Kept, str]:
    """The particles that a STAR, .cs or .csg file lists, and what to say of it.

    A .cs file is matched by cryoSPARC's uid where the store has it too, all else by stack and slice; a name without "@"
    means every image of its stack. Particles that the store lacks are counted, the first by name. Raises `SourceError`
    where the file cannot be read or a stack of it may be either of two.
    """
    kind = path.suffix.lower()
    if kind == ".star":
        files, names, slices = _star_images(path)
    elif kind in (".cs", ".csg"):
        columns, _ = read_columns(path, ())
        uids = uids_of(path, columns)
        if store.uid is not None and uids is not None:
            lacking = np.flatnonzero(~np.isin(uids, store.uid))
            first = [f"uid {uids[row]}" for row in lacking[:1]]
            return np.isin(store.uid, uids), _of_file(path, len(uids), lacking, first)
        if not {"blob/path", "blob/idx"} <= set(columns):
            raise SourceError(f"{path}: no columns blob/path and blob/idx, and no uid that the store has too")
        files, names, slices = images_of(path, columns)
    else:
        raise SourceError(
            f"{path}: unknown kind {path.suffix!r}; a subset is a RELION .star or a cryoSPARC .cs or .csg"
        )
    own = stack_paths(store.path)
    found, guessed = match_stacks(path, names, own)
    places = found[files]
    known, whole = places >= 0, slices == WHOLE_STACK
    wanted, held = _image(places[known & ~whole], slices[known & ~whole]), _image(store.stack, store.slice)
    kept = np.isin(held, wanted) | np.isin(store.stack, places[known & whole])
    lacking = np.flatnonzero(
        ~np.where(whole, np.isin(places, store.stack), known & np.isin(_image(places, slices), held))
    )
    first = [("" if whole[row] else f"{slices[row] + 1:06d}@") + names[files[row]] for row in lacking[:1]]
    said = _of_file(path, len(slices), lacking, first)
    if guessed.size:
        name, stack = names[guessed[0]], own[found[guessed[0]]]
        said += f" ({guessed.size} of its {len(names)} stacks known by the end of the path: {name} is {stack})"
    return kept, said


def in_rows(store: ParticleStore, path: Path) -> tuple[Kept, str]:
    """The particles from rows of the input (`source_index`, from 0), as cryoDRGN's --ind files list them.

    path  .npy, pickle, or text of integers
    """
    if len(store.sources) > 1:
        raise ConfigError(
            f"{path}: rows of which file? {store.path} holds particles of {len(store.sources)}; filter before merging"
        )
    rows = load_numbers(path, np.int64)
    if rows.ndim != 1 or rows.dtype.kind not in "iu":
        raise SourceError(f"{path}: {rows.dtype} of shape {rows.shape}; expected a list of rows of the input, from 0")
    lacking = np.flatnonzero(~np.isin(rows, store.source_index))
    names = [f"row {rows[i]} (from 0) of {store.sources[0].name}" for i in lacking[:1]]
    return np.isin(store.source_index, rows), _of_file(path, len(rows), lacking, names)


def with_labels(store: ParticleStore, labels: Sequence[int]) -> tuple[Kept, str]:
    """The particles whose true state is one of `labels`."""
    if store.label is None:
        raise ConfigError(f"label: {store.path} has no labels; prep takes them from a file")
    known = np.unique(store.label)
    for label in labels:
        if label not in known:
            raise ConfigError(f"label: no particle of {store.path} has {label}; it has {_some(known.tolist())}")
    return np.isin(store.label, labels), f"label {' or '.join(map(str, labels))}"


def match_stacks(
    path: Path, names: Sequence[str], stacks: Sequence[Path]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(entry [len(names)] of `stacks` that each stack named by a file `path` is, -1 where none; which names were guessed).

    A name is a path from the file's folder or one above it. Where that leads to no stack of the store, its end decides:
    both must share the file's name (.mrc and .mrcs are taken as equal) and, where several do, more folders before it than
    any other pair. Raises `SourceError` where two fit equally well.
    """
    by_path = {os.path.normpath(stack): place for place, stack in enumerate(stacks)}
    parents = list(path.absolute().parents)[:PARENTS_SEARCHED]
    found = np.full(len(names), -1, dtype=np.int64)
    for i, name in enumerate(names):
        exact = (by_path.get(os.path.normpath(parent / name)) for parent in parents)
        found[i] = next((place for place in exact if place is not None), -1)
    by_stem: dict[str, list[int]] = {}
    for place in set(range(len(stacks))) - set(found.tolist()):
        by_stem.setdefault(_stem(stacks[place].name), []).append(place)
    best: dict[int, tuple[int, int]] = {}
    for i in np.flatnonzero(found < 0).tolist():
        name = names[i]
        scores = {place: _common_end(name, stacks[place]) for place in by_stem.get(_stem(PurePosixPath(name).name), ())}
        top = [place for place, score in scores.items() if score == max(scores.values())]
        if len(top) > 1:
            either = " or ".join(str(stacks[place]) for place in top[:2])
            raise SourceError(f"{path}: {name} may be {either}; give the subset with more folders in its paths")
        for place in top:
            score, other = best.get(place, (0, -1))
            if score == scores[place]:
                raise SourceError(
                    f"{path}: {names[other]} and {name} both may be {stacks[place]}; give the subset with the paths of prep"
                )
            if score < scores[place]:  # else the other name fits it better, and this one is of no stack here
                best[place] = scores[place], i
    for place, (_, i) in best.items():
        found[i] = place
    return found, np.array([i for _, i in best.values()], dtype=np.int64)


def _star_images(path: Path) -> tuple[NDArray[np.int64], list[str], NDArray[np.int64]]:
    """As `cryosparc.images_of`, of a STAR file's particles; the slice of a name without "@" is `WHOLE_STACK`."""
    blocks = {
        name: block for name, block in read_blocks(path, {"rlnImageName": str}).items() if "rlnImageName" in block
    }
    if not blocks:
        raise SourceError(f"{path}: no column rlnImageName, by which particles are recognised")
    names = (blocks.get("particles") or next(iter(blocks.values())))["rlnImageName"].tolist()
    parts = [name.rpartition("@") for name in names]
    for row, (number, at, stack) in enumerate(parts):
        if not stack or (at and not (number.isdecimal() and 0 < int(number) < 2**31)):
            raise SourceError(f"{path}: row {row + 1} has rlnImageName {names[row]!r}; expected like 000001@stack.mrcs")
    slices = [int(number) - 1 if at else WHOLE_STACK for number, at, _ in parts]
    files, stacks = pd.factorize(np.array([stack for _, _, stack in parts], dtype=object))
    return files, [str(stack) for stack in stacks], np.array(slices, dtype=np.int64)


def _image(stack: NDArray, slices: NDArray) -> NDArray[np.int64]:
    """One number for each image."""
    return stack.astype(np.int64) * 2**32 + slices


def _stem(name: str) -> str:
    suffix = PurePosixPath(name).suffix
    return name.removesuffix(suffix) if suffix.lower() in STACK_SUFFIXES else name


def _common_end(name: str, path: Path) -> int:
    """Parts at the end of two paths that are equal; the file's name counts for one whatever its ending."""
    one, other = PurePosixPath(name).parts[-2::-1], path.parts[-2::-1]
    same = (a == b for a, b in zip(one, other, strict=False))
    return 1 + next((i for i, equal in enumerate(same) if not equal), min(len(one), len(other)))


def stack_paths(store: Path) -> list[Path]:
    """The stacks that a store, finished or begun, is made from, in the order that its `stack` counts them."""
    return [Path(stack["path"]) for stack in json.loads((store / STACKS_NAME).read_text())]


def _of_file(path: Path, count: int, lacking: NDArray[np.int64], first: list[str]) -> str:
    if lacking.size == 0:
        return path.name
    return f"{path.name} ({lacking.size} of its {count} rows not in the store, first row {lacking[0] + 1}: {first[0]})"


def _some(values: list[Any]) -> str:
    return ", ".join(map(str, values[:12])) + (", ..." if len(values) > 12 else "")
