"""RECOVAR beside ours (`programs`): `pipeline` finds mean, covariance and latents, `compute_state` makes the map at a point
from the images nearest to it, with another pass over all of them.

Its licence forbids commercial use. Version 1.0.5 cannot be used on a CPU, where it puts the images into a grid of twice their
box without scaling them, so that its mean shows the molecule twice as large.

RUN/result/        its own
RUN/latents.npy    [N, L] of all images, in the order of the input file
RUN/trained.json   seconds of the pipeline; there when it is through
RUN/states/        maps by their point in latent space
"""

import pickle
import shutil
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spire_dist import numpy_pickle
from spire_dist.comparison.layout import ParticleFiles
from spire_dist.comparison.methods import Rival
from spire_dist.comparison.programs import Program, RivalModel, begin, in_rows, run_program
from spire_dist.data.store import ParticleStore
from spire_dist.errors import SourceError
from spire_dist.files import replacing, write_json
from spire_dist.maps import write_map
from spire_dist.results.runs import read_json
from spire_dist.results.truth import Truth
from spire_dist.star import read_blocks

CPU_GB = 3
"""What it may count with where there is no GPU; it takes 80 GB for granted then. Its batches and the number of principal
components go by it, 90 for 3 GB; at 64 px it then took 8.5 GB in truth."""

RUN = """
import importlib, sys
from recovar import output, utils
command, bound = sys.argv[1:3]
sys.argv[:3] = [command]
utils.GPU_MEMORY_LIMIT = float(bound) or None
save = output.save_covar_output_volumes
def save_those_there_are(folder, mean, components, *rest, **named):
    save(folder, mean, components, *rest, us_to_save=min(50, components.shape[-1]), **named)
output.save_covar_output_volumes = save_those_there_are
output.standard_pipeline_plots = lambda *given: None
importlib.import_module("recovar.commands." + command).main()
"""
"""Its command of the first word, with the second as its bound on memory (0: none). `compute_state` has no option for that,
and `pipeline` writes and draws fifty components, of which it has only thirty with `--very-low-memory-option`, and fails at its
end. Its plots are left out."""

LATENTS = (
    "import pickle, sys, numpy; found = pickle.load(open(sys.argv[1], 'rb'))['zs']; "
    "most = max(size for size in found if not isinstance(size, str)); "
    "numpy.save(sys.argv[2], numpy.asarray(found[most], numpy.float32))"
)
"""Run by its own Python: what it has pickled is not for ours to open. The most latent numbers that were asked for; beside
them "8_noreg" and the like."""


def train_recovar(
    program: Program, method: Rival, files: ParticleFiles, truth: Truth, store: ParticleStore, run: Path, *, seed: int
) -> float:
    """Run its pipeline on the input of the store, from the beginning where it was stopped; returns the seconds it took.

    It gets the mask of the set where there is one, else it makes one of its half-maps. Raises SourceError for what it cannot
    use, RunError where the program fails, Stopped on request.
    """
    poses, ctf = files.pickles(method.label)
    begin(run, {"options": method.options, "seed": seed, "particles": store.fingerprint, "version": program.version})
    if trained := read_json(run / "trained.json"):
        return trained["seconds"]
    mask = truth.mask()
    if mask is not None:
        write_map(run / "mask.mrc", mask, store.pixel_size)
    order = np.random.default_rng(seed).permutation(len(np.asarray(numpy_pickle.load(ctf))))
    halves = [np.sort(order[half::2]) for half in (0, 1)]
    with replacing(run / "halfsets.pkl") as path:
        path.write_bytes(pickle.dumps(halves))
    result = run / "result"
    shutil.rmtree(result, ignore_errors=True)
    words = [
        *_its("pipeline", program), files.particles.resolve(), *_stack_folder(files.particles),
        "--poses", poses.resolve(), "--ctf", ctf.resolve(), "--halfsets", (run / "halfsets.pkl").resolve(),
        "--mask", "from_halfmaps" if mask is None else (run / "mask.mrc").resolve(),
        *method.options, "--accept-cpu", "-o", result.resolve(),
    ]  # fmt: skip
    start = time.monotonic()
    run_program(program, "pipeline", words, run, _steps_told)
    seconds = time.monotonic() - start
    write_json(run / "trained.json", {"seconds": seconds})
    return seconds


def load_recovar(program: Program, run: Path, store: ParticleStore) -> RivalModel:
    """What its pipeline found. The maps that are asked for at a time are made by one call of `compute_state`, but for those
    that are there from before: without a GPU each takes minutes, so they are kept, also where it is stopped.
    """

    def decode(points: Path, maps: Path, count: int) -> list[Path]:
        lines = points.read_text().splitlines()
        paths = [run / "states" / f"{sha256(line.encode()).hexdigest()[:16]}.mrc" for line in lines]
        missing = {path: line for path, line in zip(paths, lines, strict=True) if not path.exists()}
        if not missing:
            return paths
        points.write_text("".join(f"{line}\n" for line in missing.values()))
        words = [*_its("compute_state", program), run / "result", "-o", maps, "--latent-points", points]
        try:
            run_program(program, "compute_state", words, run, lambda log: _maps_told(maps, len(missing)))
        finally:
            (run / "states").mkdir(exist_ok=True)
            for path, made in zip(missing, _finished(maps), strict=False):
                made.rename(path)
        return paths

    embeddings, path = run / "result" / "model" / "embeddings.pkl", run / "latents.npy"
    run_program(program, "latents", [program.python, "-c", LATENTS, embeddings, path], run)
    return RivalModel(run, store, in_rows(np.load(path), store, run), decode)


def _its(command: str, program: Program) -> list[Any]:
    """The words that start one of its commands, in place of its console script (`RUN`)."""
    return [program.python, "-c", RUN, command, 0 if torch.cuda.is_available() else CPU_GB]


def _stack_folder(particles: Path) -> list[str | Path]:
    """The option that says where the stacks of a STAR file are: it takes their names without folders."""
    if particles.suffix.lower() != ".star":
        return []
    names = read_blocks(particles, {"rlnImageName": tuple})["particles"]["rlnImageName"][:, 1]
    folders = {(particles.parent / name).parent.resolve() for name in set(names)}
    if len(folders) > 1:
        raise SourceError(
            f"{particles}: stacks in {len(folders)} folders; RECOVAR reads a STAR file whose stacks lie in one"
        )
    return ["--datadir", folders.pop()]


def _finished(maps: Path) -> list[Path]:
    """The maps that `compute_state` has made in this folder, in order; beside each it writes a last file when it is whole."""
    return [path.with_name("locres_filtered.mrc") for path in sorted(maps.glob("vol*/params.pkl"))]


def _maps_told(maps: Path, count: int) -> list[str]:
    return [f"{number}/{count} map(s)" for number, _ in enumerate(_finished(maps), start=1)]


def _steps_told(log: str) -> list[str]:
    return [line.rsplit(" - ", 1)[-1] for line in log.splitlines() if "time to" in line or "computed in" in line]
