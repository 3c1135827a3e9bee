"""cryoSPARC's files as columns: .cs tables, passthrough files joined to them by uid, and .csg result groups.

A .cs file is a numpy structured array; a job spreads the columns of one particle over several, whose rows need not be in
the same order. Called by `cryosparc.py`. Columns are read through memory maps, so that only what is used is read, and a
header that promises more than the file holds is refused before anything is allocated.
"""

import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import yaml
from numpy.typing import NDArray

from spire_dist.errors import SourceError

Columns = dict[str, NDArray[Any]]
"""Name -> values [N, ...], the rows those of the first file."""

NUMPY_MAGIC, CSDAT_MAGIC = b"\x93NUMPY", b"\x94CSDAT"
LARGEST_HEADER = 10**6
"""Characters in a .cs file's list of columns; numpy's own limit, 10,000, is too small for ten classes."""
READ_HEADER = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
"""By the version of numpy's format; a later one would be for column names beyond ASCII."""
LARGEST_CSG = 10**6
"""Bytes; a result group is a page of text."""
SLOTS = r"blob|ctf|alignments2D|alignments3D|alignments3D_multi|alignments_class_\d+"
"""Results of a job that say something about a particle image: the first part of a column's name."""
USED = re.compile(rf"uid|({SLOTS})/(path|idx|shape|psize_A|sign|pose|shift|class_posterior)|ctf/\w+")
"""Columns worth taking from a file."""


def read_columns(source: Path, passthrough: Sequence[Path]) -> tuple[Columns, list[Path]]:
    """All columns of a .cs or .csg file and its passthrough files, and the files read beside `source`.

    Rows are those of the .cs file, or of the file that a .csg names for its images; other files are joined by uid. Where
    two files have a column, the earlier wins. Raises SourceError naming the file that lacks a particle, the particle's
    row and uid.
    """
    parts = _metafiles(source) if source.suffix.lower() == ".csg" else [(source, ("",))]
    parts += [(path, ("",)) for path in passthrough]
    first, rows, columns = parts[0][0], _read_cs(parts[0][0]), {}
    for path, prefixes in parts:
        more = rows if path is first else _read_cs(path)
        names = [
            name for name in more.dtype.names or () if USED.fullmatch(name) and name.startswith(("uid", *prefixes))
        ]
        places = slice(None) if path is first else _places(first, _uids(first, rows), path, _uids(path, more))
        columns |= {name: more[name][places] for name in names if name not in columns}
    return columns, [path for path in dict.fromkeys(path for path, _ in parts) if path != source]


def _read_cs(path: Path) -> NDArray[np.void]:
    """The rows [N] of one .cs file, mapped into memory; nothing in it is ever unpickled."""
    try:
        with open(path, "rb") as file:
            count, dtype, offset = _read_header(path, file)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror or error})") from error
    if dtype.hasobject:
        raise SourceError(f"{path}: holds Python objects, which could run code and are not read")
    if count < 1:
        raise SourceError(f"{path}: the table has no rows")
    if size < offset + count * dtype.itemsize:
        whole = max(size - offset, 0) // dtype.itemsize
        raise SourceError(f"{path}: truncated: {size} bytes hold {whole} of the {count} rows its header promises")
    return np.memmap(path, dtype, mode="r", offset=offset, shape=(count,))


def _read_header(path: Path, file: BinaryIO) -> tuple[int, np.dtype, int]:
    """Number of rows, columns, and the byte where the rows start, of a numpy file; leaves the errors of reading alone."""
    magic = file.read(len(NUMPY_MAGIC))
    if magic == CSDAT_MAGIC:
        remedy = "load it with cryosparc-tools and save it in the numpy format"
        raise SourceError(f"{path}: in cryoSPARC's stream format; {remedy}")
    if magic != NUMPY_MAGIC:
        raise SourceError(f"{path}: not a cryoSPARC table: no numpy array in it")
    file.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # files of cryoSPARC 2 were written by Python 2
            read = READ_HEADER[np.lib.format.read_magic(file)]
            shape, _, dtype = read(file, max_header_size=LARGEST_HEADER)
    except OSError:
        raise
    except Exception as error:  # a damaged header can raise nearly anything
        raise SourceError(f"{path}: not a cryoSPARC table: its header is damaged") from error
    if dtype.names is None or dtype.itemsize == 0 or len(shape) != 1:
        raise SourceError(f"{path}: not a cryoSPARC table: an array {shape} without named columns")
    return shape[0], dtype, file.tell()


def _metafiles(source: Path) -> list[tuple[Path, tuple[str, ...]]]:
    """The .cs files that a result group names, each with the prefixes of its columns; that of the images first."""
    try:
        if source.stat().st_size > LARGEST_CSG:
            raise SourceError(f"{source}: not a cryoSPARC result group: {source.stat().st_size} bytes")
        content = yaml.load(source.read_text(encoding="utf-8"), yaml.BaseLoader)  # text, lists and dictionaries only
        kind = content.get("group", {}).get("type", "particle")
        files = {
            slot: str(entry["metafile"]) for slot, entry in content["results"].items() if re.fullmatch(SLOTS, slot)
        }
    except OSError as error:
        raise SourceError(f"{source}: cannot be read ({error.strerror or error})") from error
    except (yaml.YAMLError, UnicodeError, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(f"{source}: not a cryoSPARC result group (no results with metafiles in it)") from error
    if kind != "particle":
        raise SourceError(f"{source}: a result group of type {kind!r}; one of particles is needed")
    if "blob" not in files:
        raise SourceError(f"{source}: names no images (blob), only {', '.join(files) or 'other results'}")
    slots: dict[str, list[str]] = {files["blob"]: []}
    for slot, file in files.items():
        slots.setdefault(file, []).append(f"{slot}/")
    return [(source.parent / file.removeprefix(">"), tuple(prefixes)) for file, prefixes in slots.items()]


def _uids(path: Path, rows: NDArray[np.void]) -> NDArray[np.uint64]:
    """[N]"""
    if "uid" not in (rows.dtype.names or ()) or rows.dtype["uid"].kind not in "iu":
        raise SourceError(f"{path}: column uid is missing, so the file cannot be joined with another")
    return rows["uid"].astype(np.uint64)


def _places(source: Path, wanted: NDArray[np.uint64], path: Path, uids: NDArray[np.uint64]) -> NDArray[np.int64]:
    """[N], the row of `path` that has each of the `wanted` uids."""
    order = np.argsort(uids, kind="stable")
    ordered = uids[order]
    twice = np.flatnonzero(ordered[1:] == ordered[:-1])
    if twice.size:
        one, other = order[twice[0]] + 1, order[twice[0] + 1] + 1
        raise SourceError(f"{path}: rows {one} and {other} have the same uid {ordered[twice[0]]}")
    places = np.minimum(np.searchsorted(ordered, wanted), len(ordered) - 1)
    missing = np.flatnonzero(ordered[places] != wanted)
    if missing.size:
        row = missing[0]
        raise SourceError(
            f"{path}: lacks {missing.size} of the {len(wanted)} particles of {source} (first: row {row + 1}, uid "
            f"{wanted[row]}); give the passthrough file of the same job"
        )
    return order[places]
