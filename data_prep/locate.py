"""Finds the stacks that a particle file names, wherever they have been moved to. Called by `plan.py`."""

from pathlib import Path

from spire_dist.errors import SourceError

PARENTS_SEARCHED = 4
"""A STAR file's paths are relative to its project, which is a few folders above (Refine3D/job012/run_data.star)."""


def find_stack(name: str, source: Path, datadir: Path | None) -> Path:
    """The stack called `name` in `source`.

    Looked for under `datadir` (with its folders, then by its bare name) if given; else at its absolute path, beside the
    source and in the folders above it.
    """
    parents = list(source.absolute().parents)[:PARENTS_SEARCHED]
    candidates = [datadir / name, datadir / Path(name).name] if datadir else [parent / name for parent in parents]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    where = f"in {datadir}" if datadir else f"beside {source.name} or in the {len(parents)} folders above it"
    raise SourceError(f"{source}: stack {name} not found {where}; give the folder that holds it as datadir")
