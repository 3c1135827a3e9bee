"""`export`: what other programs open. Called by `spire-dist export`.

    volumes/*.mrc         maps along a path, at cluster centres, at particles, at given latents, and the consensus;
                          origin 0 as RELION's and cryoSPARC's, middle of the box at voxel D // 2: they lie on the
                          input map and on models fitted to it
    volumes.csv           latent of every map, and the input row of the particle nearest to it (and of several files which)
    latents.npy .csv      [N, L] in store order; the table in the input's order, with the input row
    parts.cif parts.cxc   Gaussians along the path as pseudo-atoms (chain = part), and a ChimeraX script that shows all
    particles.star        the input's own rows with the latents as extra columns, and refined poses in place of the given
                          ones (particles-1.star ... of several files); where the input is no STAR file, the images in
                          the store: rows that it left out are not there

Every file appears whole or not at all.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from spire_dist.errors import ConfigError
from spire_dist.files import replacing
from spire_dist.maps import read_map, write_map
from spire_dist.progress import progress
from spire_dist.results import latent_paths
from spire_dist.results.pseudo_atoms import write_chimerax_script, write_pseudo_atoms
from spire_dist.results.runs import decode_in_batches
from spire_dist.results.tables import source_paths, write_all_particles, write_latents_csv
from spire_dist.training.run import FinishedRun, load_run

CONTOUR_QUANTILE = 0.99
"""Of the first map's voxels: the contour level in the ChimeraX script, a start for the slider."""


def export(
    run: Path | FinishedRun,
    out: Path,
    *,
    path: str | None = "loop",
    frames: int = 20,
    clusters: int = 0,
    particles: Sequence[int] = (),
    latents: Path | None = None,
    atoms: bool = True,
    star: bool | None = True,
    source: Path | Sequence[Path] = (),
    seed: int = 0,
) -> list[Path]:
    """Write the results of `run`, a run directory or an open run, into the folder `out`; returns the files written.

    path       maps along `loop` (a closed curve through the data), `axis-1`, `axis-2`, ... (straight, 5th to 95th
               percentile) or a file of points to go through; None: no path.  frames: how many maps on it
    clusters   also maps at this many k-means centres (each at the nearest particle)
    particles  also maps at these particles, by row in the input file (from 0); not for a store of several files
    latents    also maps at the latents of a .npy or text file
    atoms      write parts.cif and parts.cxc
    star       write particles.star; a STAR input must be there and unchanged, or nothing at all is written. None: write
               it where the input is there; one that has changed is refused (`SourceError`) when all else is written
    source     the particle files the store was made from, in its order, where they have moved
    """
    run = load_run(run) if isinstance(run, Path) else run
    given = [source] if isinstance(source, Path) else list(source)
    particle_files = source_paths(run.store, given) if star else []
    wanted: dict[str, NDArray] = {}
    if path is not None:
        wanted |= _numbered("path", latent_paths.named_path(run.latents, path, frames, seed))
    if clusters:
        wanted |= _numbered("cluster", latent_paths.cluster_centres(run.latents, clusters, seed)[0])
    wanted |= {f"particle_{row:07d}": run.latents[_store_row(run, row)] for row in particles}
    if latents is not None:
        wanted |= _numbered("given", latent_paths.read_points(latents, run.latents.shape[1]))

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{out}: cannot be made ({error.strerror}); choose a folder you may write to") from error
    written, level = [], 0.0
    for name, z in progress(wanted.items(), "maps", total=len(wanted), unit="map"):
        volume = run.volume(z)
        level = level or float(np.quantile(volume, CONTOUR_QUANTILE))
        written.append(out / "volumes" / f"{name}.mrc")
        write_map(written[-1], volume, run.pixel_size)
    for stale in (out / "volumes").glob("path_*.mrc"):  # of a longer path: it would join the series in ChimeraX
        if path is not None and stale not in written:
            stale.unlink()
    if wanted:
        written.append(out / "volumes.csv")
        _write_volume_table(written[-1], run, wanted)
    written.append(out / "volumes" / "consensus.mrc")
    if written[-1].resolve() != run.consensus.resolve():
        write_map(written[-1], read_map(run.consensus)[0], run.pixel_size)
    written += _write_latents(run, out)
    if atoms:
        written += _write_atoms(run, out, wanted, level)
    if star is None and all(path.is_file() for path in given or run.store.sources):
        particle_files = source_paths(run.store, given)
    return written + write_all_particles(out, particle_files, run.store, run.latents, run.poses)


def _numbered(name: str, points: NDArray) -> dict[str, NDArray]:
    return {f"{name}_{number:03d}": z for number, z in enumerate(points)}


def _store_row(run: FinishedRun, source_row: int) -> int:
    if len(run.store.sources) > 1:
        held = f"{run.store.path} holds particles of {len(run.store.sources)}"
        raise ConfigError(f"particles: row {source_row} of which file? {held}; give their latents in a file instead")
    found = np.flatnonzero(run.store.source_index == source_row)
    if not len(found):
        last = int(run.store.source_index.max())
        raise ConfigError(f"particles: row {source_row} is not in the store; rows of the input go from 0 to {last}")
    return int(found[0])


def _write_volume_table(path: Path, run: FinishedRun, wanted: dict[str, NDArray]) -> None:
    points = np.stack(list(wanted.values()))
    squared = np.stack([((run.latents - z) ** 2).sum(axis=1) for z in points])
    nearest = squared.argmin(axis=1)
    source = {"nearest_source": run.store.source[nearest] + 1} if len(run.store.sources) > 1 else {}
    table = pd.DataFrame(
        {"map": [f"volumes/{name}.mrc" for name in wanted]}
        | {f"z{i + 1}": column for i, column in enumerate(points.T)}
        | source
        | {"nearest_source_row": run.store.source_index[nearest], "distance": np.sqrt(squared.min(axis=1))}
    )
    with replacing(path) as partial:
        table.to_csv(partial, index=False, float_format="%.7g")


def _write_latents(run: FinishedRun, out: Path) -> list[Path]:
    with replacing(out / "latents.npy") as partial:
        np.save(partial, run.latents)
    write_latents_csv(out / "latents.csv", run.store, run.latents)
    return [out / "latents.npy", out / "latents.csv"]


def _write_atoms(run: FinishedRun, out: Path, wanted: dict[str, NDArray], level: float) -> list[Path]:
    """Pseudo-atoms at the path's latents; at the mean latent where no path was asked for."""
    on_path = {name: z for name, z in wanted.items() if name.startswith("path_")}
    points = np.stack(list(on_path.values())) if on_path else run.latents.mean(axis=0, keepdims=True)
    centres, amplitudes = decode_in_batches(run, points)
    write_pseudo_atoms(out / "parts.cif", centres, amplitudes, run.parts, run.box, run.pixel_size)
    maps = [f"volumes/{name}.mrc" for name in on_path]
    write_chimerax_script(out / "parts.cxc", "parts.cif", run.parts, float(np.median(run.widths)), maps, level)
    return [out / "parts.cif", out / "parts.cxc"]
