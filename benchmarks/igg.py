"""The whole way on a set with known truth: simulate an antibody with a turning arm, prepare, train, score, time it.

    python -m benchmarks.igg OUT [--set stage1.epochs=40 ...]

The set is the small IgG of the tests: PDB entry 1HZH, one Fab turned full circle about its hinge in 20 states, 5,000 images
of 64 px at 6 Å/px, SNR 0.1, defoci of a real data set. Every step is the verb of the command line that a user would type, so
the same command goes on where it was cut off. OUT/results.json holds every number printed.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

from benchmarks.machine import describe_machine, machine_line
from spire_dist import cli
from spire_dist.config import load_config
from spire_dist.results.evaluate import score
from spire_dist.training.run import load_run

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
MODEL = SHARED / "models" / "sarata00+SBI_Project" / "1hzh.pdb.gz"
CTF_TABLE = SHARED / "ctf" / "empiar10028_ctf.npy"


def main(
    out: Annotated[Path, typer.Argument(help="Folder for data/, store/, run/ and results.json.")],
    model: Annotated[Path, typer.Option(help="PDB or mmCIF file of 1HZH.")] = MODEL,
    ctf_table: Annotated[Path, typer.Option(help=".npy of CTF rows to draw from.")] = CTF_TABLE,
    preset: Annotated[str, typer.Option(help="Preset to train.")] = "demo",
    settings: Annotated[list[str] | None, typer.Option("--set", help="section.key=value, repeatable.")] = None,
    states: Annotated[int, typer.Option(help="Number of states.")] = 20,
    particles: Annotated[int, typer.Option(help="Images in all.")] = 5000,
    seed: Annotated[int, typer.Option(help="Seed of the simulation.")] = 0,
) -> None:
    """Simulate, prepare, train, evaluate; print and write what came of it."""
    data, store = make_set(out, model, ctf_table, states, particles, seed)
    run = out / "run"
    cli.train(None, run=run, store=store, preset=preset, settings=settings)
    cli.evaluate(run, data)

    result = collect(run, data)
    (out / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    print()
    print("\n".join(lines(result)))


def make_set(
    out: Path, model: Path, ctf_table: Path, states: int = 20, particles: int = 5000, seed: int = 0
) -> tuple[Path, Path]:
    """OUT/data, the simulated set, and OUT/store, made from it; what is there already is used as it is."""
    data, store = out / "data", out / "store"
    if not data.exists():  # it appears complete or not at all
        out.mkdir(parents=True, exist_ok=True)
        cli.simulate(
            data, model=[model], rotate="H:1-213,L", axis="H:213,H:244", states=states, particles=particles, box=64,
            pixel_size=6.0, snr=0.1, snr_at="after", ctf_table=ctf_table, seed=seed,
        )  # fmt: skip
    cli.prep(data / "particles.star", store)
    return data, store


def collect(run: Path, data: Path) -> dict:
    """Speed, time and scores of a finished and evaluated run, ready for JSON."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    final = json.loads((run / "evaluation.json").read_text())
    coarse, _ = score(load_run(run, stage=1), data, images=0)
    config = load_config(run / "config.toml")
    indices = ("unmerged", "merged", "merged_by_model")
    return {
        "machine": describe_machine(config.threads),
        "data": json.loads((data / "simulation.json").read_text()),
        "config": config.model_dump(mode="json"),
        "images_per_s": {
            f"stage {stage}": median(r["images_per_s"] for r in records if r["stage"] == stage) for stage in (1, 2)
        },
        "log_lines": {f"stage {stage}": sum(r["stage"] == stage for r in records) for stage in (1, 2)},
        "training_s": {
            "stage 1 with consensus": max(r["elapsed_s"] for r in records if r["stage"] == 1),
            "both stages": max(r["elapsed_s"] for r in records),
        },
        "ceiling": final["ceiling"],
        "auc": {"stage 1": means(coarse, "model"), "stage 2": means(final, "model")}
        | {name: means(final, name) for name in ("consensus", "average")},
        "adjusted_rand_index": {
            name: {index: final[key][index] for index in indices}
            for name, key in (("stage 1", "parts_of_stage_1"), ("stage 2", "parts"))
            if key in final
        },
    }


def lines(result: dict) -> Iterator[str]:
    """The result as text."""
    data = result["data"]
    yield machine_line(result["machine"])
    yield (
        f"{sum(data['counts'])} images in {len(data['counts'])} states, {data['box']} px × {data['pixel_size']} Å, "
        f"SNR {data['snr']} {data['snr_at']} cropping; {result['config']['stage1']['gaussians']} and "
        f"{result['config']['stage2']['gaussians']} Gaussians, {result['config']['stage1']['epochs']:g} and "
        f"{result['config']['stage2']['epochs']:g} epochs"
    )
    for stage, speed in result["images_per_s"].items():
        yield f"{stage}: {speed:.0f} images/s (median of {result['log_lines'][stage]} log lines)"
    times = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in result["training_s"].items())
    yield f"training: {times}"
    yield f"{'AUC per conformation, ceiling ' + format(result['ceiling'], '.4f'):44}{'masked':>10}{'unmasked':>10}"
    for name, means in result["auc"].items():
        yield f"{name:44}{means['masked']:10.4f}{means['unmasked']:10.4f}"
    for stage, index in result["adjusted_rand_index"].items():
        yield (
            f"parts of {stage} against truth, adjusted Rand index: {index['merged']:.3f} moving/fixed, "
            f"{index['merged_by_model']:.3f} by the model's own measure, {index['unmerged']:.3f} unmerged"
        )


def means(result: dict, name: str) -> dict[str, float]:
    """Mean AUC per conformation of a model, masked and unmasked, from a run's evaluation.json."""
    return {mask: result["scores"][f"per_conformation/{name}_{mask}"]["mean"] for mask in ("masked", "unmasked")}


if __name__ == "__main__":
    typer.run(main)
