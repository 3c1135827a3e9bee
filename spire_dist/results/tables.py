"""The input's own particle file with the latents beside every row: STAR or .cs in, STAR out. Used by export.

RELION 3.1 to 5 warn of a label they do not know ("will ignore (but maintain) values for the unknown label"), keep its
column and write it out again, so `_rlnSpireLatent1` ... survive a selection or a refinement there. All else of a STAR
file is copied as text: every block, every row in its order, numbers to the last digit.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import starfile
from numpy.typing import NDArray

from spire_dist.data.store import ParticleStore
from spire_dist.errors import SourceError
from spire_dist.files import replacing

LATENT_LABEL = "rlnSpireLatent"
"""Followed by 1, 2, ...; RELION's labels start with rln, so that its column reader and every STAR tool take it."""


def source_path(store: ParticleStore, given: Path | None = None) -> Path:
    """The file the store was made from, or `given` where it has moved; it must exist and be long enough."""
    path = given or Path(store.attributes["inputs"][0]["path"])
    if not path.is_file():
        raise SourceError(f"{path}: the particles' own file is not there; name its new place with --source")
    return path


def write_particles(path: Path, source: Path, latents: NDArray, source_index: NDArray) -> None:
    """Write the rows of `source` (STAR or .cs) as STAR with the latents [N, L] of the store; rows in = rows out.

    source_index  [N], the input row of each latent; a row that the store left out gets `nan`
    """
    if source.suffix == ".cs":
        blocks: dict[str, Any] = {"particles": _cs_table(source)}
        name = "particles"
    else:
        blocks, name = _read_star_as_text(source)
    rows = blocks[name]
    if source_index.max() >= len(rows):
        raise SourceError(
            f"{source}: {len(rows)} particles, the store refers to row {source_index.max()}; it has changed since"
        )
    columns = np.full((len(rows), latents.shape[1]), np.nan, dtype=np.float32)
    columns[source_index] = latents
    old = [column for column in rows.columns if column.startswith(LATENT_LABEL)]
    added = {f"{LATENT_LABEL}{i + 1}": [f"{value:.7g}" for value in column] for i, column in enumerate(columns.T)}
    blocks[name] = pd.concat([rows.drop(columns=old), pd.DataFrame(added, index=rows.index)], axis=1)
    with replacing(path) as partial:
        starfile.write(blocks, partial)


def write_latents_csv(path: Path, latents: NDArray, source_index: NDArray, label: NDArray | None) -> None:
    """One line per particle in the input's order: source_row (from 0), z1, z2, ..., and the label where it is known."""
    table = pd.DataFrame({"source_row": source_index} | {f"z{i + 1}": z for i, z in enumerate(latents.T)})
    if label is not None:
        table["label"] = label
    with replacing(path) as partial:
        table.sort_values("source_row").to_csv(partial, index=False, float_format="%.7g")


def _read_star_as_text(path: Path) -> tuple[dict[str, Any], str]:
    """All blocks of a STAR file, tables as text, and the name of the one that lists particles."""
    try:
        first: Any = starfile.read(path, always_dict=True)
        tables = {name: block for name, block in first.items() if isinstance(block, pd.DataFrame)}
        columns = sorted({column for block in tables.values() for column in block.columns})
        blocks: Any = starfile.read(path, always_dict=True, parse_as_string=columns)
    except Exception as error:  # starfile raises whatever its parser met
        raise SourceError(
            f"{path}: not a STAR file that can be read ({next(iter(str(error).splitlines()), 'damaged')})"
        ) from error
    named = [name for name, block in tables.items() if "rlnImageName" in block.columns]
    if not named:
        raise SourceError(f"{path}: no block with _rlnImageName; give the file the store was made from")
    return blocks, "particles" if "particles" in named else named[0]  # as prep chooses


def _cs_table(path: Path) -> pd.DataFrame:
    """The rows of a .cs file as STAR columns: the image in its stack (from 1, as RELION counts) and the uid."""
    try:
        rows = np.load(path, allow_pickle=False)
        paths, indices = rows["blob/path"], rows["blob/idx"]
    except (OSError, ValueError) as error:
        raise SourceError(
            f"{path}: not a .cs file with blob/path and blob/idx ({str(error).splitlines()[0]})"
        ) from error
    names = [f"{index + 1:06d}@{stack.decode().lstrip('>')}" for stack, index in zip(paths, indices, strict=True)]
    table = {"rlnImageName": names}
    if "uid" in (rows.dtype.names or ()):
        table["spireCryosparcUid"] = [str(uid) for uid in rows["uid"]]
    return pd.DataFrame(table)
