"""Finds the files that a particle file names, wherever they have been moved to. Called by `plan.py` and `tilt.py`.

A folder is listed once and then remembered, so that 50,000 stacks in a hundred folders of a network disk cost a hundred
questions for each place they may be in.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from os import listdir
from os.path import basename, dirname, isfile, join, normpath, splitext
from pathlib import Path, PurePosixPath

from spire_dist.errors import ConfigError, SourceError

PARENTS_SEARCHED = 4
"""A STAR file's paths are relative to its project, which is a few folders above (Refine3D/job012/run_data.star)."""
NAMES_SHOWN = 3
OTHER_SUFFIX = {".mrcs": ".mrc", ".mrc": ".mrcs"}
"""cryoSPARC and RELION end the same kind of file differently, and exports rename it."""


def find_stacks(
    names: Sequence[str], source: Path, datadir: Path | None = None, strip_prefix: str | None = None
) -> list[Path]:
    """The stacks called `names` in the particle file `source`, in their order.

    Looked for under `datadir` if given, with all of the name's folders, then without the first, and so on to its bare
    name; else at its absolute path, beside the source and in the folders above it. `strip_prefix` is removed from the
    beginning of the names first. What is not there is looked for as .mrc instead of .mrcs, and the other way round.

    Raises `SourceError` that counts the missing stacks and names the first, `ConfigError` where an option cannot be right.
    """
    found = _find(names, source, datadir, strip_prefix)
    if None in found:
        raise SourceError(_missing(names, found, source, datadir, strip_prefix))
    return [path for path in found if path is not None]


def find_stack(name: str, source: Path, datadir: Path | None = None, strip_prefix: str | None = None) -> Path:
    """The stack called `name`; see `find_stacks`."""
    return find_stacks([name], source, datadir, strip_prefix)[0]


def find_beside(name: str, source: Path) -> Path:
    """The file called `name` in `source`: at its absolute path, beside `source` or in the folders above it."""
    for path in map(Path, _places(name, _roots(source), None)):
        if path.is_file():
            return path
    raise SourceError(
        f"{source}: {name}, which it names, is neither beside it nor in the {PARENTS_SEARCHED} folders above"
    )


def renamed(names: Sequence[str], paths: Sequence[Path]) -> str:
    """A line on stacks that were found under the other ending; empty where there are none."""
    other = [(n, p) for n, p in zip(names, paths, strict=True) if PurePosixPath(n).suffix != p.suffix]
    return (
        f"{len(other)} of {len(names)} stacks found under another ending: {other[0][0]} is {other[0][1]}"
        if other
        else ""
    )


def check_paths(
    names: Sequence[str], source: Path, datadir: Path | None = None, strip_prefix: str | None = None
) -> list[str]:
    """What is wrong with the paths of a particle file, one line each; empty where every stack is there."""
    try:
        found = _find(names, source, datadir, strip_prefix)
    except (ConfigError, SourceError) as error:
        return [str(error)]
    if None not in found:
        return []
    missing = [name for name, path in zip(names, found, strict=True) if path is None]
    return [_missing(names, found, source, datadir, strip_prefix), *(f"missing: {name}" for name in missing)]


def _find(names: Sequence[str], source: Path, datadir: Path | None, strip_prefix: str | None) -> list[Path | None]:
    if datadir is not None and not datadir.is_dir():
        raise ConfigError(f"datadir: {datadir} is not a folder; give the one that holds the stacks of {source.name}")
    listing, roots = cache(_listing), _roots(source)
    found: list[Path | None] = []
    taken: dict[Path, tuple[str, bool]] = {}
    for name, stripped in zip(names, _stripped(names, source, strip_prefix), strict=True):
        there = (path for path in _candidates(stripped, roots, datadir) if basename(path) in listing(dirname(path)))
        path = next(map(Path, there), None)
        found.append(path)
        if path is None:
            continue
        exact = str(path).endswith(stripped)
        other, other_exact = taken.setdefault(path, (name, exact))
        if normpath(other) != normpath(name) and not (exact and other_exact):  # folders or an ending were passed over
            raise SourceError(
                f"{source}: {other} and {name} both lead to {path}; give the folder that tells them apart"
            )
    return found


def _listing(folder: str) -> frozenset[str]:
    try:
        return frozenset(listdir(folder))
    except (OSError, ValueError):  # ValueError: a byte that no name can have
        return frozenset()


def _stripped(names: Sequence[str], source: Path, prefix: str | None) -> list[str]:
    if not prefix:
        return list(names)
    if not any(name.startswith(prefix) for name in names):
        raise ConfigError(f"strip_prefix: no stack of {source} begins with {prefix!r}; the first is {names[0]}")
    return [name.removeprefix(prefix).lstrip("/") if name.startswith(prefix) else name for name in names]


def _roots(source: Path) -> list[str]:
    """The folders that names in `source` may be relative to."""
    return [str(parent) for parent in list(source.absolute().parents)[:PARENTS_SEARCHED]]


def _candidates(name: str, roots: list[str], datadir: Path | None) -> Iterator[str]:
    yield from _places(name, roots, datadir)
    stem, suffix = splitext(name)
    if suffix in OTHER_SUFFIX:
        yield from _places(stem + OTHER_SUFFIX[suffix], roots, datadir)


def _places(name: str, roots: list[str], datadir: Path | None) -> Iterator[str]:
    if datadir is not None:
        parts = [part for part in name.split("/") if part not in ("", ".", "..")]
        yield from (join(datadir, *parts[first:]) for first in range(len(parts)))
    else:
        yield from (join(root, name) for root in roots)  # the name itself where it is absolute


def _missing(
    names: Sequence[str], found: Sequence[Path | None], source: Path, datadir: Path | None, strip_prefix: str | None
) -> str:
    missing = [name for name, path in zip(names, found, strict=True) if path is None]
    where = f"in {datadir}" if datadir else f"beside {source.name} or in the {PARENTS_SEARCHED} folders above it"
    shown = ", ".join(missing[:NAMES_SHOWN]) + (", ..." if len(missing) > NAMES_SHOWN else "")
    what = f"stack {shown}" if len(names) == 1 else f"{len(missing)} of {len(names)} stacks ({shown})"
    remedy = "give the folder that holds " + ("it" if len(missing) == 1 else "them") + " as datadir"
    if not strip_prefix and not datadir and (prefix := _helpful_prefix(missing[0], source)):
        remedy += f", or strip_prefix {prefix!r}, after which the first is there"
    return f"{source}: {what} not found {where}; {remedy}"


def _helpful_prefix(name: str, source: Path) -> str:
    """The beginning of `name` without which it would be found; empty where none helps."""
    parts = PurePosixPath(name).parts
    for first in range(1, len(parts)):
        tail = "/".join(parts[first:])
        if name.endswith(tail) and any(isfile(p) for p in _candidates(tail, _roots(source), None)):
            return name[: -len(tail)]
    return ""
