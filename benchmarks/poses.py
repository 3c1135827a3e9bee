"""What wrong poses cost and how much of that is found again: the IgG set with its true poses, with poses that are off, and
with these refined.

    python -m benchmarks.poses OUT [--turn-deg 2] [--shift-px 1] [--set poses.prior_deg=1 ...]

The set is that of `benchmarks.igg`, and OUT/run its run with the true poses. In a copy of the particle file every pose is then
turned about a random axis and shifted in a random direction, by normal errors of the root mean squares given; a run on that is
trained with and without `poses.refine`, and a last one, without, on the particles that this wrote. Settings hold for all four.
The errors that are told are those left when the model may turn and move as a whole, which no image can tell from all poses
being off by the same. OUT/poses.json holds every number printed.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import starfile
import typer
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from benchmarks.igg import CTF_TABLE, MODEL, make_set, means
from benchmarks.machine import describe_machine, machine_line
from benchmarks.tables import table, write
from spire_dist import cli
from spire_dist.config import load_config
from spire_dist.data.store import ParticleStore
from spire_dist.physics.poses import matrices_from_relion_angles, relion_angles_from_matrices
from spire_dist.training.run import load_run

Poses = tuple[NDArray, NDArray]
"""Rotations [N, 3, 3] and shifts [N, 2] Å, or px where that is said."""
RUNS = {"run": "true poses", "run-perturbed": "perturbed", "run-refined": "refined", "run-again": "again on these"}
ANGLES, ORIGINS = ["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"], ["rlnOriginXAngst", "rlnOriginYAngst"]


def main(
    out: Annotated[Path, typer.Argument(help="Folder for data/, stores, runs and poses.json.")],
    model: Annotated[Path, typer.Option(help="PDB or mmCIF file of 1HZH.")] = MODEL,
    ctf_table: Annotated[Path, typer.Option(help=".npy of CTF rows to draw from.")] = CTF_TABLE,
    preset: Annotated[str, typer.Option(help="Preset to train.")] = "demo",
    settings: Annotated[list[str] | None, typer.Option("--set", help="section.key=value, repeatable.")] = None,
    states: Annotated[int, typer.Option(help="Number of states.")] = 20,
    particles: Annotated[int, typer.Option(help="Images in all.")] = 5000,
    turn_deg: Annotated[float, typer.Option(help="Root mean square angle of the errors.")] = 2.0,
    shift_px: Annotated[float, typer.Option(help="Root mean square length of the errors.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the simulation and of the errors.")] = 0,
) -> None:
    """Simulate, put the poses off, train four times, evaluate; print and write what came of it."""
    data, store = make_set(out, model, ctf_table, states, particles, seed)
    pixel_size = ParticleStore.open(store).pixel_size
    if not (data / "perturbed.star").exists():  # it tells its date, and would be another to prep
        perturb(data / "particles.star", data / "perturbed.star", turn_deg, shift_px * pixel_size, seed + 1)
    wrong = out / "store-perturbed"
    cli.prep(data / "perturbed.star", wrong)
    for name in RUNS:
        if name == "run-again":  # the file names images by their place beside it
            (data / "refined.star").write_bytes((out / "run-refined" / "particles.star").read_bytes())
            cli.prep(data / "refined.star", out / "store-refined")
        own = {"run": store, "run-again": out / "store-refined"}.get(name, wrong)
        extra = ["poses.refine=true"] if name == "run-refined" else []
        cli.train(None, run=out / name, store=own, preset=preset, settings=[*(settings or []), *extra])
        cli.evaluate(out / name, data)
    result = {"turn_deg": turn_deg, "shift_px": shift_px} | collect(out, data)
    text = list(lines(result))
    write(out, "poses", result, text)
    print()
    print("\n".join(text))


def perturb(source: Path, out: Path, turn_deg: float, shift_a: float, seed: int) -> None:
    """A copy of a simulated STAR file whose poses are off by normal errors of these root mean squares."""
    rng = np.random.default_rng(seed)
    blocks: Any = starfile.read(source, always_dict=True)
    rows = blocks["particles"]
    true = matrices_from_relion_angles(*(rows[angle] for angle in ANGLES))
    turns = Rotation.from_rotvec(rng.normal(0, turn_deg / 3**0.5, (len(rows), 3)), degrees=True)
    rows[ANGLES] = relion_angles_from_matrices((turns * Rotation.from_matrix(true)).as_matrix())
    rows[ORIGINS] += rng.normal(0, shift_a / 2**0.5, (len(rows), 2))
    starfile.write(blocks, out, overwrite=True)


def pose_errors(found: Poses, true: Poses) -> dict[str, Any]:
    """`turn_deg` [N] and `shift` [N] (unit of the shifts) of the errors, without what a turn and a move of the model explain.

    The model seen in the poses found is Q x + d where the true one is x: R_found Q = R_true and R_found d + t_found = t_true
    for all particles. Q is their mean rotation, d the least-squares solution; `common_deg` and `common_shift` tell their sizes.
    """
    (rotations, shifts), (true_rotations, true_shifts) = found, true
    seen, expected = Rotation.from_matrix(rotations), Rotation.from_matrix(true_rotations)
    turn = (seen.inv() * expected).mean()
    planar = seen.as_matrix()[:, :2]
    move = np.linalg.lstsq(planar.reshape(-1, 3), (true_shifts - shifts).reshape(-1))[0]
    return {
        "turn_deg": np.degrees((seen * turn * expected.inv()).magnitude()),
        "shift": np.linalg.norm(true_shifts - shifts - planar @ move, axis=1),
        "common_deg": np.degrees(turn.magnitude()),
        "common_shift": np.linalg.norm(move),
    }


def in_order(store: ParticleStore, poses: Poses | None = None) -> Poses:
    """Poses of a store's rows, its own by default, as rotations and shifts in px in the order of the input."""
    rotations, shifts = poses or (store.rotations, store.shifts)
    order = np.argsort(store.source_index)
    return rotations[order], shifts[order] / store.pixel_size


def summary(errors: dict[str, Any]) -> dict[str, float]:
    """Medians and root mean squares."""
    values = {f"{name}_median": np.median(errors[name]) for name in ("turn_deg", "shift")}
    values |= {f"{name}_rms": np.sqrt(np.mean(errors[name] ** 2)) for name in ("turn_deg", "shift")}
    values |= {name: errors[name] for name in ("common_deg", "common_shift")}
    return {name: float(value) for name, value in values.items()}


def collect(out: Path, data: Path) -> dict:
    """Scores, speeds and errors of the runs, ready for JSON."""
    true = in_order(ParticleStore.open(out / "store"))
    refined = load_run(out / "run-refined")
    runs = {}
    for name in RUNS:
        records = [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
        evaluation = json.loads((out / name / "evaluation.json").read_text())
        runs[name] = {
            "auc": means(evaluation, "model"),
            "consensus": means(evaluation, "consensus"),
            "stage2_images_per_s": float(np.median([r["images_per_s"] for r in records if r["stage"] == 2])),
        }
    config = load_config(out / "run-refined" / "config.toml")
    return {
        "machine": describe_machine(config.threads),
        "data": json.loads((data / "simulation.json").read_text()),
        "config": config.model_dump(mode="json"),
        "ceiling": evaluation["ceiling"],
        "runs": runs,
        "errors": {
            "run-perturbed": summary(pose_errors(in_order(refined.store), true)),
            "run-refined": summary(pose_errors(in_order(refined.store, refined.poses), true)),
        },
    }


def lines(result: dict) -> Iterator[str]:
    """The result as text."""
    data, stage2 = result["data"], result["config"]["stage2"]
    yield machine_line(result["machine"])
    yield (
        f"{sum(data['counts'])} images in {len(data['counts'])} states, {data['box']} px × {data['pixel_size']} Å, "
        f"SNR {data['snr']}; {stage2['gaussians']} Gaussians, {stage2['epochs']:g} epochs of stage 2; "
        f"poses off by {result['turn_deg']:g}° and {result['shift_px']:g} px (root mean square)"
    )
    header = ("", "angle, median", "rms", "shift, median", "rms", "AUC masked", "unmasked", "consensus", "images/s")
    rows = []
    for name, run in result["runs"].items():
        own = result["errors"].get(name)
        keys = (("turn_deg_median", "°"), ("turn_deg_rms", "°"), ("shift_median", " px"), ("shift_rms", " px"))
        errors = [f"{own[key]:.2f}{unit}" for key, unit in keys] if own else [""] * 4
        scores = [f"{value:.4f}" for value in (*run["auc"].values(), run["consensus"]["masked"])]
        rows.append((RUNS[name], *errors, *scores, f"{run['stage2_images_per_s']:.0f}"))
    yield from table(header, rows)
    common = result["errors"]["run-refined"]
    yield f"the refined model as a whole: turned by {common['common_deg']:.2f}°, moved by {common['common_shift']:.2f} px"


if __name__ == "__main__":
    typer.run(main)
