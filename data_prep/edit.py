"""New stores made of old ones: merged, filtered, or with more particles. No image is made again.

Stores never change: each function here writes another one (`copying.py`), complete or absent like any store. Called by
`spire-dist merge`, `filter` and `add`.
"""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data_prep.convert import begin, begun_attributes, complete
from data_prep.copying import copy_rows
from data_prep.plan import Inputs, Options
from data_prep.processes import in_processes
from data_prep.query import by_query
from data_prep.recipe import SAME_EXTENT
from data_prep.shards import read_attributes, size_and_hash
from data_prep.stacks import STACK_SUFFIXES
from data_prep.subset import in_file, in_rows, stack_paths, with_labels
from spire_dist.data.store import ParticleStore, map_table
from spire_dist.errors import ConfigError, SpireError, Stopped, StoreError
from spire_dist.files import remove
from spire_dist.machine import cores
from spire_dist.schema import MANIFEST_NAME

ALIKE = {
    "box": "prepare one of them again with the other's box",
    "dtype": "prepare one of them again with the other's dtype",
    "images_per_chunk": "prepare one of them again",
    "images_per_shard": "prepare one of them again with the other's images_per_shard",
    "normalised": "prepare one of them again with the other's normalise",
    "has_poses": "prepare that without poses again with poses",
    "has_ctf": "prepare one of them again with the other's no_ctf",
}
"""Attributes that stores side by side must share, and what helps."""


def merge(stores: Sequence[Path], out: Path, *, allow_duplicates: bool = False) -> str:
    """One store of the particles of several; returns what was done, in a line.

    Full shards are linked, only the stores' short last ones are copied together into new ones. An image that two stores
    share is refused by name unless `allow_duplicates` (particles expanded by symmetry share theirs). Equal particle files,
    stacks and optics groups become one; labels and uids stay where every store has them. Raises `StoreError` or
    `ConfigError` in one line.
    """
    opened = [ParticleStore.open(path) for path in stores]
    if len(opened) < 2:
        raise ConfigError(f"merge: {len(opened)} store(s) given; at least two are needed")
    _refuse_unlike([(store.path, store.attributes) for store in opened])
    if not allow_duplicates:
        _refuse_shared_images([(store.path, store.path) for store in opened])
    did = " merged with ".join(f"{store.count} particles of {store.path.name}" for store in opened)
    return _merge(opened, Path(out), did)


def filter_store(
    store: Path,
    out: Path,
    *,
    star: Path | None = None,
    rows: Path | None = None,
    label: Sequence[int] | None = None,
    query: str | None = None,
    invert: bool = False,
) -> str:
    """A store of those particles of another for which every given condition holds; returns what was done, in a line.

    Args:
        store: the store to choose from; it stays as it is.
        out: the store to make, in the order of the old one.
        star: RELION .star or cryoSPARC .cs/.csg that lists the particles (`subset.in_file`).
        rows: .npy, .pkl or text of rows of the input, from 0, as cryoDRGN's --ind takes (`source_index`).
        label: true states.
        query: expression on columns (`query.columns_of`), e.g. "defocus_a < 20000 and label == 3".
        invert: those for which not all of that holds.

    Raises `ConfigError`, `SourceError` or `StoreError` in one line, also where nothing would be kept.

    """
    old = ParticleStore.open(store)
    conditions = []
    if star is not None:
        conditions.append(in_file(old, Path(star)))
    if rows is not None:
        conditions.append(in_rows(old, Path(rows)))
    if label:
        conditions.append(with_labels(old, label))
    if query is not None:
        conditions.append(by_query(old, query))
    if not conditions:
        raise ConfigError("filter: no condition; give a STAR or .cs file, rows, labels or a query")
    kept = np.logical_and.reduce([condition for condition, _ in conditions])
    text = " and ".join(words for _, words in conditions)
    if invert:
        kept, text = ~kept, f"not ({text})"
    if not kept.any():
        raise ConfigError(f"{old.path}: none of its {old.count} particles is kept by: {text}")
    did = f"{kept.sum()} of {old.count} particles kept: {text}"
    copy_rows([old], [(0, np.flatnonzero(kept))], Path(out), did)
    return did


def add(
    store: Path,
    source: Path,
    out: Path,
    *,
    datadir: Path | None = None,
    strip_prefix: str | None = None,
    passthrough: Sequence[Path] = (),
    tomograms: Path | None = None,
    poses: Sequence[Path] = (),
    ctf: Path | None = None,
    labels: Path | None = None,
    sign: str | None = None,
    allow_duplicates: bool = False,
    workers: int | None = None,
) -> str:
    """A store of a store's particles and those of another particle file; returns what was done, in a line.

    The new particles are prepared as the old ones were, with the box and the options that the store recorded, in a folder
    beside `out` that goes away afterwards. `sign` replaces the recorded option ("auto" finds it out from the new images);
    the other arguments are those of `prepare`. Raises `StoreError` where the pixel size would come out different.
    """
    old, source, out = ParticleStore.open(store), Path(os.path.abspath(source)), Path(out)
    inputs = Inputs(
        particles=source,
        datadir=datadir,
        strip_prefix=strip_prefix,
        passthrough=tuple(passthrough),
        tomograms=tomograms,
        poses=tuple(poses),
        ctf=ctf,
        labels=labels,
    )
    options = Options(**old.attributes["options"] | {"box": old.box} | ({"sign": sign} if sign else {}))
    did, new = f"{source} added to {old.count} particles of {old.path.name}", out.with_name(f".{out.name}.new")
    if begun := begun_attributes(out):
        last = begun.get("history", [{"did": ""}])[-1]
        if not (last["did"].startswith(did) and last["fingerprints"][0] == old.fingerprint):
            raise StoreError(f"{out}: there is another store already; give another name")
        if (out / MANIFEST_NAME).exists():
            _refuse_changed(source, begun, out)
            remove(new)
            return last["did"]
    workers = workers or cores()
    try:
        _begin(inputs, options, new, workers)
        _refuse_unlike([(old.path, old.attributes), (source, read_attributes(new))])
        if not allow_duplicates:
            _refuse_shared_images([(old.path, old.path), (source, new)])
        complete(new, partial(in_processes, workers=workers))
        did = _merge([old, ParticleStore.open(new)], out, did)
    except Stopped:  # the next call goes on
        raise
    except SpireError:
        remove(new)
        raise
    remove(new)
    return did


def _begin(inputs: Inputs, options: Options, new: Path, workers: int) -> None:
    """`begin`, and again where what stands there is of another call that was cut off."""
    try:
        begin(inputs, options, new, workers)
    except StoreError:
        if not new.exists():
            raise
        remove(new)
        begin(inputs, options, new, workers)


def _merge(stores: list[ParticleStore], out: Path, did: str) -> str:
    lost = [name for name in ("label", "uid") if len({getattr(store, name) is None for store in stores}) > 1]
    if lost:
        did += f"; without {' and '.join(lost)}, which not all have"
    full = [store.count // store.images_per_shard * store.images_per_shard for store in stores]
    pieces = [(number, np.arange(end)) for number, end in enumerate(full)]
    pieces += [(n, np.arange(end, store.count)) for n, (end, store) in enumerate(zip(full, stores, strict=True))]
    copy_rows(stores, pieces, out, did)
    return did


def _refuse_unlike(stores: Sequence[tuple[Path, dict[str, Any]]]) -> None:
    """Stores (name, attributes) whose images or tables would not mean the same side by side."""
    (first, ours), *others = stores
    for path, theirs in others:
        for name, remedy in ALIKE.items():
            if ours[name] != theirs[name]:
                raise StoreError(f"{path}: {name} is {theirs[name]}, in {first} it is {ours[name]}; {remedy}")
        size, expected = theirs["pixel_size_a"], ours["pixel_size_a"]
        if abs(size / expected - 1) > SAME_EXTENT:
            raise StoreError(
                f"{path}: images of {ours['box']} px at {size:.6g} Å/px, in {first} at {expected:.6g} Å/px; only images of "
                "one pixel size can be in one store"
            )


def _refuse_shared_images(stores: Sequence[tuple[Path, Path]]) -> None:
    """The same image in two stores (name, folder), finished or begun: the same place of a stack, or the same row of a
    particle file wherever that lies.
    """
    numbers: dict[str, int] = {}

    def numbered(names: Sequence[object]) -> NDArray[np.int64]:
        return np.array([numbers.setdefault(str(name), len(numbers)) for name in names])

    places, rows = [], []
    for _, store in stores:
        stack, slices, source, index = (map_table(store, name) for name in ("stack", "slice", "source", "source_index"))
        files = [entry for entry in read_attributes(store)["inputs"] if entry["role"] == "particles"]
        hashes = [entry["sha256"] or entry["path"] for entry in files]  # a stack has none
        places.append(_keys(numbered(stack_paths(store))[stack], slices))
        rows.append(_keys(numbered(hashes)[source], index, slices))
    for keys in (places, rows):
        distinct, count = np.unique(np.concatenate([np.unique(of_store) for of_store in keys]), return_counts=True)
        shared = distinct[count > 1]
        if shared.size == 0:
            continue
        first, second, *_ = (n for n, of_store in enumerate(keys) if shared[0] in of_store)
        (one, _), (other, folder) = stores[first], stores[second]
        both = np.flatnonzero(np.isin(keys[second], keys[first]))
        stack, number = (
            stack_paths(folder)[map_table(folder, "stack")[both[0]]],
            map_table(folder, "slice")[both[0]] + 1,
        )
        raise StoreError(
            f"{other}: {both.size} of its particles are also in {one} (one is image {number} of {stack}); filter them out of "
            "one of the two, or allow duplicates to have them twice"
        )


def _keys(*columns: ArrayLike) -> NDArray[np.void]:
    """Some columns [N] of integers as one whose values [N] can be compared: the bytes of each row."""
    rows = np.stack([np.asarray(column, dtype=np.int64) for column in columns], axis=1)
    return rows.view(np.dtype((np.void, rows.strides[0]))).ravel()


def _refuse_changed(source: Path, begun: dict[str, Any], out: Path) -> None:
    known = {entry["sha256"] for entry in begun["inputs"]}
    if not (source.is_file() and (source.suffix.lower() in STACK_SUFFIXES or size_and_hash(source)["sha256"] in known)):
        raise StoreError(f"{source}: not the file whose particles {out} has; give another name")
