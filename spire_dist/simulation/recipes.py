"""`simulate`: a data set whose truth is known, laid out as the CryoBench benchmark's. Called by `spire-dist simulate`.

    particles.star            RELION 3.1, in order of the states; stack, pose, CTF of every particle
    images/NNN.mrcs           one stack per state, float32
    vols/{box}_org/NNN.mrc    the true map of each state, protein positive, molecule at voxel box // 2
    init_mask/mask.mrc        average of the true maps > 2 % of its maximum, grown by 2 voxels
    gt_latents.pkl            state of each particle, int [N]
    combined_poses.pkl        (R [N, 3, 3], t [N, 2]), cryoDRGN's: t centres the particle, in fractions of the box
    combined_ctfs.pkl         [N, 9], cryoDRGN's columns
    residues.npz              one atom per residue in every state, and the part it belongs to
    simulation.json           every parameter, and what was measured on the way

Every random number comes from one seed; the same call writes the same bytes.
"""

import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spire_dist.errors import ConfigError, SourceError
from spire_dist.physics.poses import random_rotations
from spire_dist.progress import progress
from spire_dist.schema import CTF_COLUMNS
from spire_dist.simulation import folder, imaging, molecules

CRYODRGN_CTF_COLUMNS = 9
"""Box (px), pixel size (Å), then the first seven of `schema.CTF_COLUMNS`."""
Chunk = tuple[int, slice, slice]
"""State, rows within its stack, rows of the whole set."""
Picture = Callable[..., Tensor]
"""(coordinates, weights, rotations, shifts, ctf) of some particles -> their noiseless images."""


def simulate(
    out: Path,
    *,
    model: Path | Sequence[Path] | None = None,
    rotate: str | None = None,
    axis: str | None = None,
    omit: Sequence[str] = (),
    states: int = 20,
    particles: int = 5000,
    proportions: Sequence[float] | None = None,
    box: int = 64,
    pixel_size: float = 6.0,
    resolution: float = 3.0,
    snr: float = 0.1,
    snr_at: Literal["after", "before"] = "after",
    shift_a: float = 30.0,
    ctf_table: Path | None = None,
    defocus_a: tuple[float, float] = (10000.0, 25000.0),
    astigmatism_a: float = 500.0,
    voltage_kv: float = 300.0,
    cs_mm: float = 2.7,
    amplitude_contrast: float = 0.1,
    b_factor: float = 0.0,
    sign: Literal["+", "-"] = "+",
    seed: int = 0,
) -> Path:
    """Simulate `particles` images of a molecule in several states, write them into the new folder `out` and return it.

    model         atomic model(s), PDB or mmCIF; None: an antibody-like molecule of beads
    rotate, axis  the part that turns in `states` equal steps of a full turn (`H:1-213,L`), about the line through two
                  residues (`H:213,H:244`)
    omit          instead: one selection per state, which that state lacks ("" lacks nothing)
    proportions   relative numbers of particles in the states; None: equal
    pixel_size    Å/px; resolution in Å, at which an atom has a σ of 0.225 × resolution
    snr           variance of the noiseless images (all pixels of the set) over that of the white noise; inf: no noise
    snr_at        "after": in the images as written; "before": in a box twice as large at half the pixel size, from
                  which the benchmark crops them in Fourier space, so that their own SNR is four times higher
    shift_a       Å; shifts are uniform within ± this in x and y
    ctf_table     .npy of cryoDRGN's nine CTF columns, from which rows are drawn; None: defocus uniform in `defocus_a`
                  (Å), U and V `astigmatism_a` (Å) apart at a random angle, `voltage_kv`, `cs_mm`, `amplitude_contrast`
    b_factor      Å², envelope exp(-B s² / 4);  sign "+" for bright protein, "-" for dark

    Raises ConfigError for a setting that cannot be used, SourceError for a file; `out` then does not appear.
    """
    settings = dict(locals())
    if seed < 0:
        raise ConfigError(f"seed: {seed}; give 0 or more")
    _check(out, states, particles, snr, snr_at, shift_a, sign, box=box, pixel_size=pixel_size, resolution=resolution)
    ensemble = _states(model, rotate, axis, omit, states, seed)
    _check_fits(ensemble, box, pixel_size, shift_a)
    counts = _counts(particles, proportions, len(ensemble.coordinates))
    optics = (voltage_kv, cs_mm, amplitude_contrast)
    ctf = _draw_ctfs(particles, ctf_table, defocus_a, astigmatism_a, optics, b_factor, seed)
    rotations = random_rotations(particles, seed=seed)
    shifts = np.random.default_rng([seed, 1]).uniform(-shift_a, shift_a, (particles, 2)).astype(np.float32)

    partial = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"out: {out} cannot be made ({error.strerror}); choose a place you may write to") from error
    try:
        for name in ("images", f"vols/{box}_org", "init_mask"):
            (partial / name).mkdir(parents=True)
        mask = _write_maps(partial, ensemble, box, pixel_size, resolution)
        chunks = list(_chunks(counts, imaging.images_per_chunk(len(ensemble.molecule.weights))))
        for state, count in enumerate(counts):
            folder.create_stack(_stack_path(partial, state), int(count), box, pixel_size)
        columns = (torch.from_numpy(rotations), torch.from_numpy(shifts), torch.from_numpy(ctf))
        picture = functools.partial(
            imaging.noiseless_images,
            resolution=resolution,
            box=box,
            pixel_size=pixel_size,
            sign=1 if sign == "+" else -1,
        )
        signal_std = _write_signal(partial, ensemble, chunks, columns, picture)
        snr_box = box if snr_at == "after" else 2 * box
        # The crop keeps the signal inside the band as it is and averages the noise of (snr_box / box)² pixels.
        noise_std = float(signal_std / np.sqrt(snr) * box / snr_box)
        if noise_std > 0:
            _add_noise(partial, chunks, box, noise_std, seed)
        folder.write_tables(partial, counts, rotations, shifts, ctf, box, pixel_size)
        folder.write_residues(partial / "residues.npz", ensemble)
        found = {
            "counts": counts.tolist(),
            "group_names": ensemble.group_names,
            "snr_box": snr_box,
            "signal_std": signal_std,
            "noise_std": noise_std,
            "mask_voxels": int(mask.sum()),
        }
        _write_report(partial / "simulation.json", settings, found)
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return out


def _check(out: Path, states, particles, snr, snr_at, shift_a, sign, **positive: float) -> None:
    """Settings that are wrong whatever the molecule."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"out: {out} exists and is not an empty folder; choose a new one or remove it")
    for name, value in positive.items():
        if not 0 < value < np.inf:
            raise ConfigError(f"{name}: {value}; give a positive number")
    if positive["box"] < 8:
        raise ConfigError(f"box: {positive['box']} px; give 8 or more")
    if states < 1 or particles < 1:
        raise ConfigError(f"states, particles: {states}, {particles}; give at least 1 of each")
    if not snr > 0:
        raise ConfigError(f"snr: {snr}; give a positive number, inf for images without noise")
    if not 0 <= shift_a < np.inf:
        raise ConfigError(f"shift_a: {shift_a} Å; give 0 or a positive number")
    if snr_at not in ("after", "before"):
        raise ConfigError(f"snr_at: {snr_at!r}; give 'after' or 'before' (the Fourier crop)")
    if sign not in ("+", "-"):
        raise ConfigError(f"sign: {sign!r}; give '+' for bright protein or '-' for dark")


def _write_report(path: Path, settings: dict, found: dict) -> None:
    """Settings as given (files by their path, an infinite SNR as null, which JSON can hold) and what came of them."""
    report = {name: value for name, value in settings.items() if name != "out"}
    report["model"] = None if report["model"] is None else [str(p) for p in _paths(report["model"])]
    if report["ctf_table"] is not None:  # then the ranges were not used
        ranges = ("defocus_a", "astigmatism_a", "voltage_kv", "cs_mm", "amplitude_contrast")
        report |= {"ctf_table": str(report["ctf_table"])} | dict.fromkeys(ranges)
    report["snr"] = report["snr"] if np.isfinite(report["snr"]) else None
    report["states"] = len(found["counts"])
    path.write_text(json.dumps(report | found, indent=2) + "\n")


def _paths(model: Path | Sequence[Path]) -> list[Path]:
    return [model] if isinstance(model, Path) else list(model)


def _states(
    model: Path | Sequence[Path] | None,
    rotate: str | None,
    axis: str | None,
    omit: Sequence[str],
    count: int,
    seed: int,
) -> molecules.States:
    """The molecule in its states; exactly one of rotate and omit says how they differ."""
    molecule = molecules.procedural_antibody(seed) if model is None else molecules.read_molecule(_paths(model))
    if omit:
        if rotate is not None:
            raise ConfigError(f"rotate and omit: both given ({rotate!r}, {list(omit)}); choose one")
        return molecules.assembly_states(molecule, omit)
    if model is None and rotate is None:
        points = np.array(molecules.PROCEDURAL_AXIS)
        return molecules.turning_states(molecule, molecules.PROCEDURAL_ARM, points, count)
    if rotate is None:
        raise ConfigError("rotate: not given, nor omit; name the part that moves (H:1-213,L) or what each state lacks")
    if axis is None:
        raise ConfigError(f"axis: not given for rotate {rotate!r}; name two residues, as in H:213,H:244")
    return molecules.turning_states(molecule, rotate, molecules.axis_points(molecule, axis), count)


def _check_fits(ensemble: molecules.States, box: int, pixel_size: float, shift_a: float) -> None:
    """A molecule that leaves the box would be cut off in ways that no reconstruction could explain."""
    radius = float(np.linalg.norm(ensemble.coordinates[ensemble.present], axis=1).max())
    room = (box // 2 - 1) * pixel_size
    if radius + shift_a > room:
        needed = 2 * int(np.ceil((radius + shift_a) / pixel_size) + 1)
        raise ConfigError(
            f"box: {box} px of {pixel_size} Å cannot hold a radius of {radius:.0f} Å plus shifts of {shift_a:.0f} Å; "
            f"give a box of {needed} or more, larger pixels or smaller shifts"
        )


def _counts(particles: int, proportions: Sequence[float] | None, states: int) -> NDArray[np.int64]:
    """Particles of each state: their sum is exact, no state is more than one away from its share."""
    shares = np.ones(states) if proportions is None else np.asarray(proportions, dtype=float)
    if len(shares) != states or not (shares > 0).all():
        raise ConfigError(f"proportions: {shares.tolist()} for {states} states; give one positive number for each")
    counts = np.diff(np.round(np.cumsum(shares) / shares.sum() * particles).astype(np.int64), prepend=0)
    if counts.min() < 1:
        raise ConfigError(f"particles: {particles} leave state {int(counts.argmin())} without any; give more")
    return counts


def _draw_ctfs(count, ctf_table, defocus_a, astigmatism_a, optics, b_factor, seed) -> NDArray[np.float32]:
    """Rows [count, 9] of `schema.CTF_COLUMNS`, from the table or from the ranges."""
    rng = np.random.default_rng([seed, 2])
    ctf = np.zeros((count, len(CTF_COLUMNS)), dtype=np.float32)
    if ctf_table is not None:
        table = _read_ctf_table(ctf_table)
        ctf[:, :7] = table[rng.choice(len(table), count, replace=count > len(table)), 2:]
    else:
        low, high = defocus_a
        if not 0 <= low <= high:
            raise ConfigError(f"defocus_a: {low} to {high} Å; give the smaller one first, both positive (underfocus)")
        mean = rng.uniform(low, high, count)
        ctf[:, 0], ctf[:, 1] = mean + astigmatism_a / 2, mean - astigmatism_a / 2
        ctf[:, 2] = rng.uniform(0, 180, count)
        ctf[:, 3:6] = optics
    ctf[:, 7], ctf[:, 8] = b_factor, 1.0
    return ctf


def _read_ctf_table(path: Path) -> NDArray[np.float32]:
    if not path.is_file():
        raise SourceError(f"ctf_table: {path}: no such file; give a .npy of cryoDRGN's nine CTF columns")
    try:
        table = np.load(path, allow_pickle=False)
    except ValueError as error:
        raise SourceError(f"ctf_table: {path}: not a plain .npy array ({error})") from error
    if table.ndim != 2 or table.shape[1] != CRYODRGN_CTF_COLUMNS or not np.isfinite(table).all():
        raise SourceError(f"ctf_table: {path}: shape {table.shape}; give finite numbers [rows, {CRYODRGN_CTF_COLUMNS}]")
    return table.astype(np.float32)


def _write_maps(out: Path, ensemble: molecules.States, box: int, pixel_size: float, resolution: float) -> NDArray:
    """The true map of each state, and the mask of their average, which is returned."""
    average = np.zeros((box, box, box), dtype=np.float32)
    total = len(ensemble.coordinates)
    for state in progress(range(total), "true maps", unit="map"):
        volume = imaging.true_volume(*_atoms(ensemble, state), resolution, box, pixel_size).numpy()
        folder.write_map(out / "vols" / f"{box}_org" / f"{state:03d}.mrc", volume, pixel_size)
        average += volume / total
    mask = folder.average_mask(average)
    folder.write_map(out / "init_mask" / "mask.mrc", mask, pixel_size)
    return mask


def _atoms(ensemble: molecules.States, state: int) -> tuple[NDArray, NDArray]:
    there = ensemble.present[state]
    return ensemble.coordinates[state, there], ensemble.molecule.weights[there]


def _chunks(counts: NDArray[np.int64], size: int) -> Iterator[Chunk]:
    """The particles in order, at most `size` of one state at a time."""
    for state, (start, count) in enumerate(zip(np.cumsum(counts) - counts, counts, strict=True)):
        for first in range(0, count, size):
            last = min(first + size, count)
            yield state, slice(first, last), slice(start + first, start + last)


def _write_signal(
    out: Path,
    ensemble: molecules.States,
    chunks: list[Chunk],
    particles: tuple[Tensor, Tensor, Tensor],
    picture: Picture,
) -> float:
    """Write what `picture` makes of (rotations, shifts, ctf) and return the standard deviation of all pixels."""
    sums = np.zeros(3)
    for state, here, rows in progress(chunks, "projections", unit="chunk"):
        images = picture(*_atoms(ensemble, state), *(column[rows] for column in particles)).double()
        folder.add_images(_stack_path(out, state), here, images.numpy())
        sums += [images.numel(), float(images.sum()), float(images.square().sum())]
    return float(np.sqrt(sums[2] / sums[0] - (sums[1] / sums[0]) ** 2))


def _add_noise(out: Path, chunks: list[Chunk], box: int, noise_std: float, seed: int) -> None:
    for state, here, rows in progress(chunks, "noise", unit="chunk"):
        rng = np.random.default_rng([seed, 3, rows.start])
        noise = rng.standard_normal((here.stop - here.start, box, box), dtype=np.float32)
        folder.add_images(_stack_path(out, state), here, noise_std * noise)


def _stack_path(out: Path, state: int) -> Path:
    return out / "images" / f"{state:03d}.mrcs"
