"""The particles with their latents, and their poses where these were refined, as STAR. Used by export.

RELION 3.1 to 5 warn of a label they do not know ("will ignore (but maintain) values for the unknown label"), keep its
column and write it out again, so `_rlnSpireLatent1` ... survive a selection or a refinement there. All else of an input
that is a STAR file is copied line by line: every block, comment and row in its order, numbers to the last digit. Of all
other inputs (.cs, .csg, stacks) the images in the store are listed: their stack, slice, latents and cryoSPARC's uid.

Refined poses stand in RELION's own columns, so that it goes on from them: in place of the numbers there, which remain in the
input, and at the end of the row where the input has no such column.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from spire_dist.data.store import ParticleStore
from spire_dist.errors import ConfigError, SourceError
from spire_dist.files import replacing
from spire_dist.physics.poses import relion_angles_from_matrices
from spire_dist.star import read_blocks, walk

LATENT_LABEL = "rlnSpireLatent"
"""Followed by 1, 2, ...; RELION's labels start with rln, so that its column reader and every STAR tool take it."""
ANGLES = ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi")
ORIGINS_A, ORIGINS_PX = ("rlnOriginXAngst", "rlnOriginYAngst"), ("rlnOriginX", "rlnOriginY")
Poses = tuple[NDArray, NDArray]
"""Rotations [N, 3, 3] and shifts [N, 2] Å, in the store's row order."""
Columns = Mapping[str, NDArray]
"""Label (without its underscore) -> numbers [rows]."""


def source_paths(store: ParticleStore, given: Sequence[Path] = ()) -> list[Path]:
    """The particle files the store was made from, or `given` in their order where they have moved.

    Those that are STAR files must be there, and as they were: another row order would give each latent to another particle.
    """
    if given and len(given) != len(store.sources):
        raise ConfigError(f"source: {len(given)} files for a store made of {len(store.sources)}; give one for each")
    paths = list(given or store.sources)
    recorded = [entry for entry in store.attributes["inputs"] if entry["role"] == "particles"]
    for path, entry in zip(paths, recorded, strict=True):
        if not _is_star(path):
            continue
        if not path.is_file():
            raise SourceError(f"{path}: the particles' own file is not there; name its new place with --source")
        with open(path, "rb") as file:
            found = {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
        if any(found[key] != entry[key] for key in found):
            was, now = (f"{one['bytes']} bytes, sha256 {one['sha256'][:12]}" for one in (entry, found))
            raise SourceError(f"{path}: has changed since the store was made of it ({was}; now {now}); name an unchanged "
                              "copy with --source, or leave out the STAR")  # fmt: skip
    return paths


def write_all_particles(
    out: Path, sources: list[Path], store: ParticleStore, latents: NDArray, poses: Poses | None = None
) -> list[Path]:
    """`particles.star` in the folder `out`, or particles-1.star, particles-2.star, ... of a store of several files.

    poses  where they are others than the input's
    """
    refined = {} if poses is None else pose_columns(*poses, store.input_pixel_size)
    names = (
        [out / "particles.star"]
        if len(sources) == 1
        else [out / f"particles-{i + 1}.star" for i in range(len(sources))]
    )
    for number, (name, source) in enumerate(zip(names, sources, strict=True)):
        of = np.flatnonzero(store.source == number)
        if _is_star(source):
            own = {label: values[of] for label, values in refined.items()}
            write_particles(name, source, latents[of], store.source_index[of], own)
        else:
            _write_images(name, store, of, latents, refined)
    return names


def pose_columns(rotations: NDArray, shifts_a: NDArray, pixel_sizes_a: NDArray) -> dict[str, NDArray]:
    """RELION's columns of poses, with origins both in Å and, as before RELION 3.1, in pixels of `pixel_sizes_a` [N]."""
    angles = relion_angles_from_matrices(rotations)
    return (
        dict(zip(ANGLES, angles.T, strict=True))
        | dict(zip(ORIGINS_A, -shifts_a.T, strict=True))
        | dict(zip(ORIGINS_PX, -shifts_a.T / pixel_sizes_a, strict=True))
    )


def _is_star(path: Path) -> bool:
    return path.suffix.lower() == ".star"


def _write_images(path: Path, store: ParticleStore, of: NDArray[np.int64], latents: NDArray, refined: Columns) -> None:
    """STAR of the images `of` a store, in the order of their particle file."""
    columns = {label: refined[label] for label in (*ANGLES, *ORIGINS_A) if label in refined} | _latent_columns(latents)
    of = of[np.argsort(store.source_index[of], kind="stable")]
    stacks = [stack["path"] for stack in store.read_stacks()]
    uid = [] if store.uid is None else ["_spireCryosparcUid"]
    with replacing(path) as partial, open(partial, "wb") as out:
        labels = ["_rlnImageName", *uid, *(f"_{label}" for label in columns)]
        heading = "".join(f"{label} #{i + 1}\n" for i, label in enumerate(labels))
        out.write(f"data_particles\n\nloop_\n{heading}".encode())
        for row in of:
            name = f"{store.slice[row] + 1:06d}@{stacks[store.stack[row]]}"
            cell = f'"{name}"' if len(name.split()) > 1 else name
            number = b"" if store.uid is None else b" %d" % store.uid[row]
            out.write(cell.encode(errors="surrogateescape") + number + _cells(columns, row) + b"\n")


def _latent_columns(latents: NDArray) -> dict[str, NDArray]:
    """Latents [rows, L] by their labels."""
    return {f"{LATENT_LABEL}{i + 1}": column for i, column in enumerate(latents.T)}


def _cells(columns: Columns, row: int) -> bytes:
    """The cells of a row, a blank before each."""
    return b"".join(b" %.7g" % values[row] for values in columns.values())


def write_particles(
    path: Path, source: Path, latents: NDArray, source_index: NDArray, refined: Columns | None = None
) -> None:
    """Copy the STAR file `source` with the latents [N, L] of the store; rows in = rows out.

    source_index  [N], the input row of each latent; tilts of one particle share theirs, and it gets their mean; a row
                  that the store left out gets `nan`
    refined       `pose_columns` [N] to write where the input has such columns, or beside the latents; a row that the store
                  left out keeps its pose
    """
    name, count = _particle_block(source)
    if source_index.size and source_index.max() >= count:
        raise SourceError(
            f"{source}: {count} particles, the store refers to row {source_index.max()}; it has changed since"
        )
    means, rows, _ = _per_particle(latents, source_index)
    columns = np.full((count, latents.shape[1]), np.nan, dtype=np.float32)
    columns[rows] = means
    changed, added = {}, {}
    if refined:
        there = read_blocks(source, dict.fromkeys(refined, np.float32))[name]
        origins = ORIGINS_PX if there.keys() & set(ORIGINS_PX) else ORIGINS_A
        for label, values in refined.items():
            column = np.full(count, np.nan)
            column[source_index] = values
            if label in there:
                changed[label] = column
            elif label in (*ANGLES, *origins):
                added[label] = column
    with replacing(path) as partial, open(partial, "wb") as out:
        out.writelines(_with_columns(source, name, count, added | _latent_columns(columns), changed))


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


def _with_columns(source: Path, block: str, count: int, added: Columns, changed: Columns) -> Iterator[bytes]:
    """The lines of a STAR file whose `block` has `count` rows, with columns `added` at the end of them and others `changed`.

    Latents that are there give way to the new ones. Where a number of `changed` is NaN, the cell stays as it is.
    """
    rows = iter(range(count))
    different = SourceError(f"{source}: changed while it was copied; export again")
    dropped: set[int] = set()
    places: dict[int, NDArray] = {}
    has_labels = False
    for _, line, cells, table, is_row in walk(source, {}, quoted=True):
        if table is None or table.name != block or not (is_row or (cells and cells[0].startswith(b"_"))):
            yield line
            continue
        if (is_row or not table.is_loop) and not has_labels:
            if table.is_loop:
                first = len(table.labels) - len(dropped) + 1
                yield from (f"_{label} #{first + i}\n".encode() for i, label in enumerate(added))
                places = {i: changed[label] for i, label in enumerate(table.labels) if label in changed}
            elif (row := next(rows, None)) is not None:  # a table of one row: each label with its value
                yield from (b"_%s %.7g\n" % (label.encode(), values[row]) for label, values in added.items())
            has_labels = True
        if is_row:
            if (row := next(rows, None)) is None:
                raise different
            for place, values in places.items():
                if not np.isnan(values[row]):
                    cells[place] = b"%.7g" % values[row]
            as_it_is = not dropped and not places and b"#" not in line
            kept = line.rstrip() if as_it_is else b" ".join(cell for i, cell in enumerate(cells) if i not in dropped)
            yield kept + _cells(added, row) + b"\n"
        elif cells[0].startswith(f"_{LATENT_LABEL}".encode()):
            dropped.add(len(table.labels) - 1)
        elif table.is_loop:
            yield b"%s #%d\n" % (cells[0], len(table.labels) - len(dropped))
        else:
            own = changed.get(table.labels[-1], np.full(1, np.nan))[0]
            yield line if np.isnan(own) else b"%s %.7g\n" % (cells[0], own)
    if next(rows, None) is not None:
        raise different
