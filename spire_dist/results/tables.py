"""The input's own particle file with the latents beside every row: STAR or .cs in, STAR out. Used by export.

RELION 3.1 to 5 warn of a label they do not know ("will ignore (but maintain) values for the unknown label"), keep its
column and write it out again, so `_rlnSpireLatent1` ... survive a selection or a refinement there. All else of a STAR
file is copied line by line: every block, comment and row in its order, numbers to the last digit.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
import starfile
from numpy.typing import NDArray

from spire_dist.data.store import ParticleStore
from spire_dist.errors import ConfigError, SourceError
from spire_dist.files import replacing
from spire_dist.star import is_heading, read_blocks, split_cells

LATENT_LABEL = "rlnSpireLatent"
"""Followed by 1, 2, ...; RELION's labels start with rln, so that its column reader and every STAR tool take it."""


def source_paths(store: ParticleStore, given: Sequence[Path] = ()) -> list[Path]:
    """The particle files the store was made from, or `given` in their order where they have moved; all must exist."""
    if given and len(given) != len(store.sources):
        raise ConfigError(f"source: {len(given)} files for a store made of {len(store.sources)}; give one for each")
    paths = list(given or store.sources)
    for path in paths:
        if not path.is_file():
            raise SourceError(f"{path}: the particles' own file is not there; name its new place with --source")
    return paths


def write_all_particles(out: Path, sources: list[Path], store: ParticleStore, latents: NDArray) -> list[Path]:
    """`particles.star` in the folder `out`, or particles-1.star, particles-2.star, ... of a store of several files."""
    names = (
        [out / "particles.star"]
        if len(sources) == 1
        else [out / f"particles-{i + 1}.star" for i in range(len(sources))]
    )
    for number, (name, source) in enumerate(zip(names, sources, strict=True)):
        of = np.flatnonzero(store.source == number)
        if source.suffix.lower() in (".star", ".cs"):
            write_particles(name, source, latents[of], store.source_index[of])
        else:
            _write_images(name, store, of, latents)
    return names


def _write_images(path: Path, store: ParticleStore, of: NDArray[np.int64], latents: NDArray) -> None:
    """STAR of the images `of` a store whose particle file is no table of its own (a .csg, a list of stacks, a stack)."""
    of = of[np.argsort(store.source_index[of], kind="stable")]
    stacks = [stack["path"] for stack in store.read_stacks()]
    table: dict[str, Any] = {"rlnImageName": [f"{store.slice[i] + 1:06d}@{stacks[store.stack[i]]}" for i in of]}
    if store.uid is not None:
        table["spireCryosparcUid"] = [str(uid) for uid in store.uid[of]]
    with replacing(path) as partial:
        starfile.write({"particles": pd.DataFrame(table | _latent_columns(latents[of]))}, partial)


def _latent_columns(latents: NDArray) -> dict[str, list[str]]:
    """Label -> values, as text, of latents [rows, L]."""
    return {f"{LATENT_LABEL}{i + 1}": [f"{value:.7g}" for value in column] for i, column in enumerate(latents.T)}


def write_particles(path: Path, source: Path, latents: NDArray, source_index: NDArray) -> None:
    """Write the rows of `source` (STAR or .cs) as STAR with the latents [N, L] of the store; rows in = rows out.

    source_index  [N], the input row of each latent; tilts of one particle share theirs, and it gets their mean; a row
                  that the store left out gets `nan`
    """
    from_cs = _cs_table(source) if source.suffix.lower() == ".cs" else None
    name, count = _particle_block(source) if from_cs is None else ("particles", len(from_cs))
    if source_index.size and source_index.max() >= count:
        raise SourceError(
            f"{source}: {count} particles, the store refers to row {source_index.max()}; it has changed since"
        )
    means, rows, _ = _per_particle(latents, source_index)
    columns = np.full((count, latents.shape[1]), np.nan, dtype=np.float32)
    columns[rows] = means
    with replacing(path) as partial:
        if from_cs is None:
            with open(source, "rb") as file, open(partial, "wb") as out:
                _copy_with_latents(file, out, name.encode(errors="surrogateescape"), columns)
        else:
            added = pd.DataFrame(_latent_columns(columns))
            starfile.write({name: pd.concat([from_cs, added], axis=1)}, partial)


def write_latents_csv(path: Path, store: ParticleStore, latents: NDArray) -> None:
    """One line per particle in the input's order: source_row (from 0), z1, z2, ..., and the label where it is known.

    A store of several particle files has a column `source` (from 1) before them.
    """
    many = len(store.sources) > 1
    rows = np.stack([store.source, store.source_index], axis=1) if many else store.source_index
    means, rows, first = _per_particle(latents, rows)
    table = pd.DataFrame({f"z{i + 1}": z for i, z in enumerate(means.T)})
    table.insert(0, "source_row", rows[:, 1] if many else rows)
    if many:
        table.insert(0, "source", rows[:, 0] + 1)
    if store.label is not None:
        table["label"] = store.label[first]
    with replacing(path) as partial:
        table.to_csv(partial, index=False, float_format="%.7g")


def _per_particle(latents: NDArray, rows: NDArray) -> tuple[NDArray, NDArray, NDArray[np.int64]]:
    """(mean latents [P, L], distinct rows [P, ...] in order, one store row of each [P])."""
    distinct, first, particle, shared = np.unique(
        rows, axis=0, return_index=True, return_inverse=True, return_counts=True
    )
    if len(distinct) == len(rows):  # the usual case keeps every bit
        return latents[first], distinct, first
    sums = np.zeros((len(distinct), latents.shape[1]))
    np.add.at(sums, particle.reshape(-1), latents)
    return sums / shared[:, None], distinct, first


def _particle_block(path: Path) -> tuple[str, int]:
    """Name and number of rows of the block of a STAR file that lists particles, chosen as prep does."""
    blocks = read_blocks(path, {"rlnImageName": str})
    named = [name for name, columns in blocks.items() if "rlnImageName" in columns]
    if not named:
        raise SourceError(f"{path}: no block with _rlnImageName; give the file the store was made from")
    name = "particles" if "particles" in named else named[0]
    return name, len(blocks[name]["rlnImageName"])


def _copy_with_latents(lines: BinaryIO, out: BinaryIO, block: bytes, latents: NDArray[np.float32]) -> None:
    """Copy a STAR file with the latents [rows, L] at the end of the rows of a block, in place of such columns there."""
    rows: Iterator[NDArray[np.float32]] = iter(latents)
    inside = in_loop = in_rows = False
    labels = 0
    dropped: set[int] = set()
    for line in lines:
        cells = split_cells(line, quoted=True)
        if is_heading(cells):
            inside, in_loop, in_rows = cells[0][5:] == block, False, False
        if not inside or not cells or not in_loop:
            out.write(line)
            in_loop = inside and (in_loop or cells == [b"loop_"])
        elif not in_rows and cells[0].startswith(b"_"):
            if cells[0].startswith(f"_{LATENT_LABEL}".encode()):
                dropped.add(labels)
            else:
                out.write(b"%s #%d\n" % (cells[0], labels - len(dropped) + 1))
            labels += 1
        else:
            if not in_rows:
                first = labels - len(dropped) + 1
                out.writelines(
                    b"_%s%d #%d\n" % (LATENT_LABEL.encode(), i + 1, first + i) for i in range(latents.shape[1])
                )
                in_rows = True
            as_it_is = not dropped and b"#" not in line
            kept = line.rstrip() if as_it_is else b" ".join(cell for i, cell in enumerate(cells) if i not in dropped)
            out.write(kept + b"".join(b" %.7g" % value for value in next(rows)) + b"\n")


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
    table: dict[str, Any] = {"rlnImageName": names}
    if "uid" in (rows.dtype.names or ()):
        table["spireCryosparcUid"] = [str(uid) for uid in rows["uid"]]
    return pd.DataFrame(table)
