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

Every random number comes from one seed; the same call writes the same bytes (on a GPU: the same to float32 rounding), also
where it was interrupted and called again (`workplace`). A mixture has no residues.npz: its states have no parts in common.
"""

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import mrcfile
import numpy as np
import torch
from numpy.typing import NDArray

from spire_dist import __version__
from spire_dist.errors import ConfigError
from spire_dist.files import replacing
from spire_dist.physics.poses import random_rotations
from spire_dist.progress import progress
from spire_dist.simulation import ctfs, folder, imaging, molecules
from spire_dist.simulation import states as ensembles
from spire_dist.simulation.linkers import random_linkers
from spire_dist.simulation.stacks import add_noise, chunks_of, write_signal
from spire_dist.simulation.workplace import refuse_full_disk, refuse_taken, workplace

BYTES_PER_ROW = 1000
"""Of particles.star and the pickles, per particle, at most."""


def simulate(
    out: Path,
    *,
    model: Path | Sequence[Path] | None = None,
    rotate: str | None = None,
    axis: str | None = None,
    linker: str | None = None,
    omit: Sequence[str] = (),
    mixture: bool = False,
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
    ctf_per_state: bool = False,
    table_voltage_kv: float | None = None,
    ctf_box: int | None = None,
    defocus_a: tuple[float, float] = (10000.0, 25000.0),
    astigmatism_a: float = 500.0,
    voltage_kv: float = 300.0,
    cs_mm: float = 2.7,
    amplitude_contrast: float = 0.1,
    b_factor: float = 0.0,
    hidden_b_factor: float = 0.0,
    sign: Literal["+", "-"] = "+",
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    recipe: str | None = None,
    scale: float = 1.0,
) -> Path:
    """Simulate `particles` images of a molecule in several states, write them into the new folder `out` and return it.

    model         atomic model(s), PDB or mmCIF; None: an antibody-like molecule of beads
    rotate, axis  the part that turns in `states` equal steps of a full turn (`H:1-213,L`), about the line through two
                  residues (`H:213,H:244`)
    linker        instead of the axis: the residues that `rotate` hangs on, a random coil in each of `states` (`H:232-238`)
    omit          instead: one selection per state, which that state lacks ("" lacks nothing)
    mixture       instead: each model is a state of its own
    proportions   relative numbers of particles in the states; None: equal
    pixel_size    Å/px; resolution in Å, at which an atom has a σ of 0.225 × resolution
    snr           variance of the noiseless images (all pixels of the set) over that of the white noise; inf: no noise
    snr_at        "after": in the images as written; "before": in a box twice as large at half the pixel size, from
                  which the benchmark crops them in Fourier space, so that their own SNR is four times higher
    shift_a       Å; shifts are uniform within ± this in x and y
    ctf_table     .npy of cryoDRGN's nine CTF columns, from which rows are drawn; None: defocus uniform in `defocus_a`
                  (Å), U and V `astigmatism_a` (Å) apart at a random angle, `voltage_kv`, `cs_mm`, `amplitude_contrast`
    ctf_per_state draw each state's rows from the whole table again; `table_voltage_kv` in place of the table's voltages
    ctf_box       px that combined_ctfs.pkl is written for, the width staying the same; None: `box`
    b_factor      Å², envelope exp(-B s² / 4), which the tables tell of; `hidden_b_factor` another one, which they do not
    sign          "+" for bright protein, "-" for dark
    device        where images are projected; "auto": on a GPU if there is one. Maps and noise are made on the CPU
    recipe, scale where the settings came from (`recipes`); only noted in simulation.json

    A call that was interrupted goes on where it was when repeated with the same settings.

    Raises ConfigError for a setting that cannot be used, SourceError for a file; `out` then does not appear. Stopped on Ctrl-C.
    """
    settings = dict(locals())
    if seed < 0:
        raise ConfigError(f"seed: {seed}; give 0 or more")
    lengths = {"box": box, "pixel_size": pixel_size, "resolution": resolution, "ctf_box": ctf_box or box}
    _check(out, states, particles, snr, snr_at, shift_a, sign, **lengths)
    settings["device"] = _device(device)
    ensemble = _states(model, rotate, axis, linker, omit, mixture, states, seed)
    _check_fits(ensemble, box, pixel_size, shift_a)
    counts = _counts(particles, proportions, len(ensemble.coordinates))
    if ctf_table is not None:
        ctf = ctfs.ctfs_from_table(counts, ctf_table, table_voltage_kv, ctf_per_state, seed)
    else:
        optics = (voltage_kv, cs_mm, amplitude_contrast)
        ctf = ctfs.ctfs_from_ranges(particles, defocus_a, astigmatism_a, optics, seed)
    told, used = ctfs.with_envelope(ctf, b_factor), ctfs.with_envelope(ctf, b_factor + hidden_b_factor)
    rotations = random_rotations(particles, seed=seed)
    shifts = np.random.default_rng([seed, 1]).uniform(-shift_a, shift_a, (particles, 2)).astype(np.float32)
    # The stacks, one of them twice while it gets its noise; the true maps and the mask; the tables.
    images, maps = particles + int(counts.max()), len(counts) + 1
    refuse_full_disk(out, 4 * (images * box**2 + maps * box**3) + particles * BYTES_PER_ROW)

    report = _report(settings, len(counts))
    inputs = {"version": __version__, "contents of the input files": _hashes(model, ctf_table)}
    with workplace(out, report | inputs) as place:
        made = place / "set"
        for name in ("images", f"vols/{box}_org", "init_mask"):
            (made / name).mkdir(parents=True, exist_ok=True)
        mask = _write_maps(made, ensemble, box, pixel_size, resolution)
        chunks = list(chunks_of(counts, imaging.images_per_chunk(int(ensemble.present.sum(axis=1).max()))))
        columns = [torch.from_numpy(column).to(settings["device"]) for column in (rotations, shifts, used)]
        picture = functools.partial(
            imaging.noiseless_images,
            resolution=resolution,
            box=box,
            pixel_size=pixel_size,
            sign=1 if sign == "+" else -1,
        )
        signal_std = write_signal(place, ensemble, counts, chunks, columns, picture, pixel_size)
        snr_box = box if snr_at == "after" else 2 * box
        # The crop keeps the signal inside the band as it is and averages the noise of (snr_box / box)² pixels.
        noise_std = float(signal_std / np.sqrt(snr) * box / snr_box)
        add_noise(place, chunks, noise_std, pixel_size, seed)
        folder.write_tables(made, counts, rotations, shifts, told, box, pixel_size, ctf_box or box)
        if not mixture:
            folder.write_residues(made / "residues.npz", ensemble)
        found = {
            "counts": counts.tolist(),
            "group_names": ensemble.group_names,
            "snr_box": snr_box,
            "signal_std": signal_std,
            "noise_std": noise_std,
            "mask_voxels": int(mask.sum()),
        }
        (made / "simulation.json").write_text(json.dumps(report | found, indent=2) + "\n")
    return out


def _check(out: Path, states, particles, snr, snr_at, shift_a, sign, **positive: float) -> None:
    """Settings that are wrong whatever the molecule."""
    refuse_taken(out)
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


def _device(wanted: str) -> str:
    able = torch.cuda.is_available()
    if wanted not in ("auto", "cpu", "cuda") or (wanted == "cuda" and not able):
        raise ConfigError(f"device: {wanted!r}; give 'auto', 'cpu'{' or cuda' if able else ' (no CUDA device here)'}")
    return "cuda" if able and wanted != "cpu" else "cpu"


def _report(settings: dict[str, Any], states: int) -> dict[str, Any]:
    """Settings as given (files by their path, an infinite SNR as null, which JSON can hold)."""
    report = {name: value for name, value in settings.items() if name != "out"}
    report["model"] = None if report["model"] is None else [str(p) for p in _paths(report["model"])]
    if report["ctf_table"] is not None:  # then the ranges were not used
        ranges = ("defocus_a", "astigmatism_a", "voltage_kv", "cs_mm", "amplitude_contrast")
        report |= {"ctf_table": str(report["ctf_table"])} | dict.fromkeys(ranges)
    report["snr"] = report["snr"] if np.isfinite(report["snr"]) else None
    report["states"] = states
    return report


def _hashes(model: Path | Sequence[Path] | None, ctf_table: Path | None) -> list[str]:
    paths = [*([] if model is None else _paths(model)), *([] if ctf_table is None else [ctf_table])]
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


def _paths(model: Path | Sequence[Path]) -> list[Path]:
    return [model] if isinstance(model, Path) else list(model)


def _states(
    model: Path | Sequence[Path] | None,
    rotate: str | None,
    axis: str | None,
    linker: str | None,
    omit: Sequence[str],
    mixture: bool,
    count: int,
    seed: int,
) -> ensembles.States:
    """The molecule in its states; exactly one of rotate, omit and mixture says how they differ."""
    ways = {"rotate": rotate, "omit": list(omit) or None, "mixture": mixture or None}
    given = {name: value for name, value in ways.items() if value is not None}
    if linker is not None and rotate is None:
        raise ConfigError(f"linker: {linker!r} given without rotate; name the part that hangs on it, as in H:1-230,L")
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)}: both given ({', '.join(map(repr, given.values()))}); choose one")
    if mixture:
        if model is None:
            raise ConfigError("mixture: no model given; name one atomic model for each state")
        paths = _paths(model)
        complexes = [molecules.read_molecule([path]) for path in paths]
        return ensembles.mixture_states(complexes, [path.name.split(".")[0] for path in paths])
    molecule = molecules.procedural_antibody(seed) if model is None else molecules.read_molecule(_paths(model))
    if omit:
        return ensembles.assembly_states(molecule, omit)
    if model is None and rotate is None:
        points = np.array(molecules.PROCEDURAL_AXIS)
        return ensembles.turning_states(molecule, molecules.PROCEDURAL_ARM, points, count)
    if rotate is None:
        raise ConfigError("rotate: not given, nor omit; name the part that moves (H:1-213,L) or what each state lacks")
    if linker is not None:
        if axis is not None:
            raise ConfigError(f"axis and linker: both given ({axis!r}, {linker!r}); choose one")
        return random_linkers(molecule, rotate, linker, count, seed)
    if axis is None:
        raise ConfigError(
            f"axis: not given for rotate {rotate!r}; name two residues, as in H:213,H:244, or the linker it hangs on"
        )
    return ensembles.turning_states(molecule, rotate, molecules.axis_points(molecule, axis), count)


def _check_fits(ensemble: ensembles.States, box: int, pixel_size: float, shift_a: float) -> None:
    """A molecule that leaves the box would be cut off in ways that no reconstruction could explain."""
    farthest = (np.linalg.norm(ensemble.atoms(state)[0], axis=1).max() for state in range(len(ensemble.present)))
    radius = float(max(farthest))
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


def _write_maps(
    out: Path, ensemble: ensembles.States, box: int, pixel_size: float, resolution: float
) -> NDArray[np.float32]:
    """The true map of each state, and the mask of their average, which is returned; maps that are there are kept."""
    average = np.zeros((box, box, box), dtype=np.float32)
    total = len(ensemble.coordinates)
    for state in progress(range(total), "true maps", unit="map"):
        path = out / "vols" / f"{box}_org" / f"{state:03d}.mrc"
        if not path.exists():
            volume = imaging.true_volume(*ensemble.atoms(state), resolution, box, pixel_size).numpy()
            with replacing(path, flushed=True) as partial:
                folder.write_map(partial, volume, pixel_size)
        average += mrcfile.read(path) / total
    mask = folder.average_mask(average)
    folder.write_map(out / "init_mask" / "mask.mrc", mask, pixel_size)
    return mask
