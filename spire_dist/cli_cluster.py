"""The verbs of a cluster's user: `submit`, `status`, `monitor`, `doctor` and `sweep`; each is one public function."""

from pathlib import Path
from typing import Annotated

import typer

verbs = typer.Typer()

Runs = Annotated[list[Path] | None, typer.Argument(help="Run directories, or folders that hold some [here].")]


@verbs.command()
def submit(
    config: Annotated[Path, typer.Argument(help="TOML file, as for train; its [job] says what Slurm is asked for.")],
    run: Annotated[Path, typer.Option(help="Run directory.")] = Path("run"),
    cluster: Annotated[str, typer.Option(help="slurm, or local to try it out on this machine.")] = "slurm",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value, repeatable; e.g. job.nodes=2.")
    ] = None,
    sbatch: Annotated[
        list[str] | None, typer.Option(help="Any further option of sbatch as key=value or flag, repeatable; wins.")
    ] = None,
) -> None:
    """Queue `train` on a Slurm cluster and return at once with the job id. slurm/train.sh starts the same job by hand."""
    from cluster.submit import submit as queue

    print(queue(config, run, cluster=cluster, settings=settings or (), sbatch=sbatch or ()))  # type: ignore[arg-type]


@verbs.command()
def status(
    runs: Runs = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again and again, until Ctrl-C.")] = False,
    seconds: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks of --watch.")] = 5.0,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: one JSON list.")] = False,
) -> None:
    """Show how runs are doing: state, step, speed, time left, restarts, slowest rank. Reads their directories only."""
    from cluster import status as module

    if watch:
        module.watch(runs or [Path()], seconds)
        return
    states = module.read_states(runs or [Path()])
    print(module.as_json(states) if as_json else module.table(states))


@verbs.command()
def monitor(
    runs: Runs = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; beyond this machine a token is asked for.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8321,
    token: Annotated[str | None, typer.Option(help="What the page asks for [SPIRE_TOKEN, else made up].")] = None,
    metrics_file: Annotated[
        Path | None, typer.Option(help="Also write Prometheus metrics here (.prom), for node_exporter.")
    ] = None,
) -> None:
    """Serve a live page of runs, read-only, and Prometheus metrics at /metrics, until Ctrl-C."""
    from cluster.monitor import serve

    serve(runs or [Path()], host=host, port=port, token=token, metrics_file=metrics_file)


@verbs.command()
def doctor(
    config: Annotated[Path | None, typer.Argument(help="TOML file to check too: its store, its [job].")] = None,
    run: Annotated[Path | None, typer.Option(help="Run directory to be: its file system is checked.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: one JSON list.")] = False,
) -> None:
    """Check what a cluster gets wrong, each with its fix. In a job, `srun spire-dist doctor` checks its nodes."""
    from cluster import doctor as module

    checks = module.examine(config, run)
    if checks:  # else another task of the job tells it for all
        print(module.as_json(checks) if as_json else module.table(checks))
    if any(check.level == "MISS" for check in checks):
        raise typer.Exit(2)


@verbs.command()
def sweep(
    space: Annotated[Path, typer.Argument(help="TOML file: a configuration and what to vary; see docs/sweeps.md.")],
    out: Annotated[Path, typer.Argument(help="Folder of the sweep to make, or to go on with.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what a killed sweep left.")] = False,
    ray_address: Annotated[
        str | None, typer.Option(help="auto, host:port or ray://host:port [RAY_ADDRESS, else its own cluster].")
    ] = None,
) -> None:
    """Train many configurations and keep the best: ASHA or population-based, on Ray. Ends with a table, a plot, best.toml."""
    from cluster.sweep import sweep as run_sweep

    print(run_sweep(space, out, resume=resume, ray_address=ray_address))
