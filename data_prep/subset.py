"""Which particles of a store a user means: those of a STAR or .cs file, rows of the input, labels, or a query on columns.

Called by `edit.py`. A subset file may name its stacks by other folders than the store was made from: a stack that is not
where prep would look for it is recognised by the end of its path, and that is said.
"""

import ast
import os
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_prep.cs_files import read_columns
from data_prep.locate import PARENTS_SEARCHED
from spire_dist import numpy_pickle
from spire_dist.data.store import ParticleStore
from spire_dist.errors import ConfigError, SourceError
from spire_dist.physics.poses import relion_angles_from_matrices
from spire_dist.schema import CTF_COLUMNS
from spire_dist.star import read_blocks

Kept = NDArray[np.bool_]
"""[N], which rows of the store."""
WHOLE_STACK = -1
"""Slice of a name without "@": a file of one image, or all tilts of a particle."""
STACK_SUFFIXES = (".mrc", ".mrcs")
ALLOWED = (
    *(ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.Invert, ast.USub, ast.UAdd),
    *(ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Mod, ast.Pow, ast.BitAnd, ast.BitOr),
    *(ast.Compare, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.In, ast.NotIn),
    *(ast.Name, ast.Load, ast.Constant, ast.List, ast.Tuple),
)
"""What a query is made of: no call, attribute or index, so that it can do nothing but compare."""


def in_file(store: ParticleStore, path: Path) -> tuple[Kept, str]:
    """The particles that a STAR, .cs or .csg file lists, and what to say of it.

    A .cs file is matched by cryoSPARC's uid where the store has it too, all else by stack and slice; a name without "@"
    means every image of its stack. Particles that the store lacks are counted, the first by name. Raises `SourceError`
    where the file cannot be read or a stack of it may be either of two.
    """
    kind = path.suffix.lower()
    if kind == ".star":
        stacks, slices = _star_images(path)
    elif kind in (".cs", ".csg"):
        columns, _ = read_columns(path, ())
        if store.uid is not None and "uid" in columns:
            uids = columns["uid"].astype(np.uint64)
            lacking = np.flatnonzero(~np.isin(uids, store.uid))
            names = [f"uid {uids[row]}" for row in lacking[:1]]
            return np.isin(store.uid, uids), _of_file(path, len(uids), lacking, names)
        if not {"blob/path", "blob/idx"} <= set(columns):
            raise SourceError(f"{path}: no columns blob/path and blob/idx, and no uid that the store has too")
        stacks = [name.decode(errors="replace").removeprefix(">") for name in columns["blob/path"].tolist()]
        slices = columns["blob/idx"].astype(np.int64)
    else:
        raise SourceError(
            f"{path}: unknown kind {path.suffix!r}; a subset is a RELION .star or a cryoSPARC .cs or .csg"
        )
    files, names = pd.factorize(np.array(stacks, dtype=object))
    own = stack_paths(store)
    found, guessed = match_stacks(path, [str(name) for name in names], own)
    places = found[files]
    known, whole = places >= 0, slices == WHOLE_STACK
    wanted, held = _image(places[known & ~whole], slices[known & ~whole]), _image(store.stack, store.slice)
    kept = np.isin(held, wanted) | np.isin(store.stack, places[known & whole])
    lacking = np.flatnonzero(
        ~np.where(whole, np.isin(places, store.stack), known & np.isin(_image(places, slices), held))
    )
    first = [stacks[row] if whole[row] else f"{slices[row] + 1:06d}@{stacks[row]}" for row in lacking[:1]]
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
    if not path.is_file():
        raise SourceError(f"{path}: no such file; give rows of the input as .npy, .pkl or text")
    try:
        if path.suffix == ".npy":
            rows = np.load(path, allow_pickle=False)
        else:
            rows = numpy_pickle.load(path) if path.suffix == ".pkl" else np.loadtxt(path, dtype=np.int64, ndmin=1)
    except (OSError, ValueError) as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(f"{path}: not rows of the input ({' '.join(str(error).split())})") from error
    rows = np.asarray(rows)
    if rows.ndim != 1 or rows.dtype.kind not in "iu" or rows.size == 0:
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


def by_query(store: ParticleStore, query: str) -> tuple[Kept, str]:
    """The particles for which an expression on the columns of `columns_of` is true, in the syntax of pandas.

    Raises `ConfigError` naming a column that is not there, or what cannot be evaluated.
    """
    columns = columns_of(store)
    try:
        nodes = list(ast.walk(ast.parse(query.strip(), mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(f"query: {query!r} cannot be read; expected like defocus_a < 20000 and label == 3") from error
    for node in nodes:
        if not isinstance(node, ALLOWED):
            what = type(node).__name__
            raise ConfigError(
                f"query: {query!r} holds {what}; comparisons, arithmetic, and, or, not and in are allowed"
            )
        if isinstance(node, ast.Name) and node.id not in columns:
            raise ConfigError(f"query: no column {node.id}; {store.path} has {', '.join(columns)}")
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    if not used:
        raise ConfigError(f"query: {query!r} names no column; {store.path} has {', '.join(columns)}")
    table = pd.DataFrame({name: columns[name]() for name in used})
    try:
        kept = table.eval(query.strip(), engine="python")
    except Exception as error:  # pandas raises whatever its columns do
        raise ConfigError(f"query: {query!r} cannot be evaluated ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(kept, pd.Series) or kept.dtype != bool:
        raise ConfigError(f"query: {query!r} is not true or false for each particle; expected like defocus_a < 20000")
    return kept.to_numpy(), query.strip()


def columns_of(store: ParticleStore) -> dict[str, Callable[[], Any]]:
    """What a query may name: column -> function that gives its N values. Lengths in Å, angles in degrees."""
    names = ("optics_group", "source", "source_index", "stack", "slice", "input_pixel_size", "uid", "label")
    columns: dict[str, Callable[[], Any]] = {
        name: lambda name=name: getattr(store, name) for name in names if getattr(store, name) is not None
    }
    columns["optics_group_name"] = lambda: _named(
        store.optics_group, [g["name"] for g in store.attributes["optics_groups"]]
    )
    columns["stack_name"] = lambda: _named(store.stack, [path.name for path in stack_paths(store)])
    if store.attributes["has_ctf"]:
        columns |= {name: lambda i=i: store.ctf[:, i] for i, name in enumerate(CTF_COLUMNS)}
        columns["defocus_a"] = lambda: (store.ctf[:, 0] + store.ctf[:, 1]) / 2
    if store.has_poses:
        columns |= {name: lambda i=i: store.shifts[:, i] for i, name in enumerate(("shift_x", "shift_y"))}
        angles = ("rot", "tilt", "psi")
        columns |= {n: lambda i=i: relion_angles_from_matrices(store.rotations)[:, i] for i, n in enumerate(angles)}
    return columns


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


def _star_images(path: Path) -> tuple[list[str], NDArray[np.int64]]:
    """(stack, slice from 0 or `WHOLE_STACK`) of each row of a STAR file's particles."""
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
    return [stack for _, _, stack in parts], np.array(slices, dtype=np.int64)


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


def stack_paths(store: ParticleStore) -> list[Path]:
    """The stacks that a store was made from, in the order that its `stack` counts them."""
    return [Path(stack["path"]) for stack in store.read_stacks()]


def _named(numbers: NDArray[np.int32], names: list[str]) -> pd.Categorical:
    distinct, places = np.unique(names, return_inverse=True)
    return pd.Categorical.from_codes(places[numbers], [str(name) for name in distinct])


def _of_file(path: Path, count: int, lacking: NDArray[np.int64], first: list[str]) -> str:
    if lacking.size == 0:
        return path.name
    return f"{path.name} ({lacking.size} of its {count} rows not in the store, first row {lacking[0] + 1}: {first[0]})"


def _some(values: list[Any]) -> str:
    return ", ".join(map(str, values[:12])) + (", ..." if len(values) > 12 else "")
