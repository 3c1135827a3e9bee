"""Rows of docs/results.md: an experiment makes its set and compares methods on it, with all seeds.

    python -m benchmarks.leaderboard igg-1d OUT [--cryodrgn PEER/bin/python] [--recovar PEER/bin/python] [--threads 1]

Experiments are the files of `benchmarks/experiments/`; each step is a verb of the command line, printed before it runs, so the
same command goes on where it was cut off. OUT/methods/benchmark.json, .md and .png hold the result, and `--publish` copies the
table and the picture for the documentation.
"""

import json
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.igg import CTF_TABLE, SHARED
from spire_dist.comparison.methods import RIVALS, Rival, choose_methods

EXPERIMENTS = Path(__file__).parent / "experiments"
DOCS = Path(__file__).resolve().parents[1] / "docs"
SIMULATION = ("recipe", "scale", "states", "particles", "box", "pixel_size", "snr", "snr_at", "seed")
"""What is published of how a set was made."""


def main(
    name: Annotated[str, typer.Argument(help="A file of benchmarks/experiments/, without its ending.")],
    out: Annotated[Path, typer.Argument(help="Folder for data/ and methods/.")],
    models: Annotated[Path, typer.Option(help="Folder of the structures that experiments name.")] = SHARED / "models",
    ctf_table: Annotated[Path, typer.Option(help=".npy of CTF rows to draw from.")] = CTF_TABLE,
    cryodrgn: Annotated[Path | None, typer.Option(help="Python of an environment with cryoDRGN [not run].")] = None,
    recovar: Annotated[Path | None, typer.Option(help="Python of an environment with RECOVAR [not run].")] = None,
    threads: Annotated[int, typer.Option(help="Threads of every method; 0: all cores.")] = 0,
    publish: Annotated[bool, typer.Option(help="Copy table and picture to docs/results/ and docs/images/.")] = False,
) -> None:
    """Run an experiment, or go on with it."""
    experiment = read_experiment(name)
    given = {"cryodrgn": cryodrgn, "recovar": recovar}
    pythons = {program: python for program, python in given.items() if python is not None}
    for words in commands(experiment, out, models, ctf_table, pythons, threads):
        print(shlex.join(["spire-dist", *words]), flush=True)
        code = subprocess.run([sys.executable, "-m", "spire_dist.cli", *words], check=False).returncode
        if code:  # the verb has said why
            raise typer.Exit(code)
    if publish:
        publish_result(name, out / "methods", DOCS)


def read_experiment(name: str) -> dict[str, Any]:
    """The table of an experiment. Raises typer.BadParameter with the names that exist."""
    path = EXPERIMENTS / f"{name}.toml"
    if not path.exists():
        there = ", ".join(sorted(file.stem for file in EXPERIMENTS.glob("*.toml")))
        raise typer.BadParameter(f"{name}: no such experiment; choose among {there}")
    return tomllib.loads(path.read_text())


def commands(
    experiment: dict[str, Any], out: Path, models: Path, ctf_table: Path, pythons: Mapping[str, Path], threads: int
) -> Iterator[list[str]]:
    """The words of every verb in turn; of a rival only where it can run."""
    data, structures = out / "data", experiment["models"]
    if not data.exists():
        files = [models / structures["folder"] / f"{name}.pdb.gz" for name in structures["names"]]
        options = [f"--{key}={value}" for key, value in experiment["simulate"].items()]
        yield ["simulate", str(data), *options, *(f"--model={file}" for file in files), f"--ctf-table={ctf_table}"]
    settings = [f"--set={setting}" for setting in (*experiment.get("settings", ()), f"threads={threads}")]
    for part in experiment["benchmark"]:
        programs = {m.program for m in choose_methods(part["methods"].split(","), RIVALS) if isinstance(m, Rival)}
        if not programs <= pythons.keys():
            continue
        how = [f"--{key}={value}" for key, value in part.items()]
        there = [f"--{program}={pythons[program]}" for program in sorted(programs)]
        yield ["benchmark", str(data), f"--out={out / 'methods'}", *settings, *how, *there]


def publish_result(name: str, methods: Path, docs: Path) -> None:
    """docs/results/NAME.json, rows and curves without what else is known of runs, and docs/images/leaderboard-NAME.png."""
    result = json.loads((methods / "benchmark.json").read_text())
    data = result["data"] | {"folder": name}
    data["simulation"] = {key: data["simulation"][key] for key in SIMULATION}  # not where its files lay
    kept = {"machine": result["runs"][0]["machine"], "data": data, "rows": result["rows"]}
    kept["curves"] = list(curves(result["runs"]))
    (docs / "results").mkdir(exist_ok=True)
    (docs / "results" / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n")
    shutil.copy(methods / "benchmark.png", docs / "images" / f"leaderboard-{name}.png")


def curves(runs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Of every run [seconds of training, masked AUC] on the way and at its end."""
    for run in runs:
        points = [
            [round(point["training_s"], 1), point["result"]["scores"]["per_conformation/model_masked"]["mean"]]
            for point in (*run["earlier"], run)
        ]
        yield {"method": run["method"], "seed": run["seed"], "points": points}


if __name__ == "__main__":
    typer.run(main)
