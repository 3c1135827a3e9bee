"""Do ASHA and population-based search find more than chance does with the same number of steps?

    python -m benchmarks.sweep OUT [--seeds 3]

Step sizes over three orders of magnitude, on simulated particles. For each seed ASHA draws its configurations;
random search then gets the first of the same ones, as many as whole trainings hold at least the steps that ASHA made; a
population has the same number of members and so of steps. What is compared is the loss of held-out particles at the end.
"""

import csv
import math
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.machine import describe_machine, machine_line
from benchmarks.tables import table, write

SPACE = """
[base]
threads = 1
features = 12
[base.data]
store = "{store}"
[base.latent]
dimension = 2
[base.stage1]
gaussians = 256
epochs = 12
batch = 32
hidden = 16
[base.stage2]
gaussians = 512
epochs = 3
batch = 32
layers = 1
hidden = 16
anchor_hidden = 32
distil_steps = 50
[sweep]
search = "{search}"
trials = {trials}
seed = {seed}
grace = 0.11
reduction = 3
interval = 0.25
[space]
stage1.rates.centres_px = {{log = [0.0005, 0.5]}}
stage1.rates.widths = {{log = [0.0001, 0.1]}}
stage1.rates.amplitudes = {{log = [0.0002, 0.2]}}
stage1.rates.networks = {{log = [0.00005, 0.05]}}
stage1.rates.latents = {{log = [0.003, 3.0]}}
"""
"""Step sizes over three orders of magnitude. ASHA can judge them early: they are those of stage 1, most of the training."""


def main(
    out: Annotated[Path, typer.Argument(help="Folder for data and results.")],
    seeds: Annotated[int, typer.Option(help="How often to search anew.")] = 3,
    trials: Annotated[int, typer.Option(help="Configurations of ASHA.")] = 16,
    particles: Annotated[int, typer.Option(help="Simulated images.")] = 500,
) -> None:
    """Search, count, compare, print."""
    store = make_particles(out, particles)
    rows, found = [], []
    for seed in range(seeds):
        asha = search(out, store, "asha", trials, seed)
        members = math.ceil(asha["trainings"])
        others = [search(out, store, kind, members, seed) for kind in ("random", "pbt")]
        for one in (asha, *others):
            best = min(asha["loss"], *(other["loss"] for other in others)) == one["loss"]
            rows.append(
                [
                    f"{seed} {one['search']}",
                    str(one["trials"]),
                    str(one["steps"]),
                    f"{one['loss']:.6f}" + (" *" if best else "  "),
                    f"{100 * one['look_share']:.0f} %",
                    f"{one['seconds']:.0f}",
                ]
            )
        found.append([asha, *others])
    machine = describe_machine(1)
    header = ["seed, search", "configurations", "steps in all", "best held-out loss", "time looking", "their seconds"]
    wins = [sum(run[kind]["loss"] < run[1]["loss"] for run in found) for kind in (0, 2)]
    text = [
        *table(header, rows),
        "",
        f"Better than random search: asha {wins[0]}, pbt {wins[1]} of {seeds} times (*: the best of a seed).",
        machine_line(machine),
    ]
    print("\n".join(text))
    write(out, "sweep", {"machine": machine, "searches": found}, text)


def make_particles(out: Path, count: int) -> Path:
    """A store of simulated images of 32 px."""
    store = out / "store"
    if not store.exists():
        size = ["--particles", str(count), "--box", "32", "--pixel-size", "12", "--snr", "0.3", "--seed", "0"]
        command("simulate", str(out / "data"), *size)
        command("prep", str(out / "data" / "particles.star"), str(store))
    return store.absolute()


def search(out: Path, store: Path, kind: str, trials: int, seed: int) -> dict:
    """Run one sweep, where it has not been run, or go on with it; what its results.csv says."""
    folder, space = out / f"{kind}-{seed}", out / f"{kind}-{seed}.toml"
    space.write_text(SPACE.format(store=store, search=kind, trials=trials, seed=seed))
    if not (folder / "results.csv").exists():
        command("sweep", str(space), str(folder), *(["--resume"] if (folder / "sweep.json").exists() else []))
    with open(folder / "results.csv") as file:
        rows = list(csv.DictReader(file))
    trained, looked = (sum(float(row[name]) for row in rows) for name in ("train_s", "look_s"))
    return {
        "search": kind,
        "trials": len(rows),
        "trainings": sum(float(row["share"]) for row in rows),
        "steps": sum(int(row["steps"]) for row in rows),
        "loss": float(rows[0]["loss"]),
        "look_share": looked / (trained + looked),
        "seconds": trained + looked,
    }


def command(*words: str) -> None:
    """One verb of the program."""
    subprocess.run([sys.executable, "-m", "spire_dist.cli", *words], check=True)


if __name__ == "__main__":
    typer.run(main)
