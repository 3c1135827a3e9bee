"""Does a run whose ranks are killed lose more than it must? KILL of a random rank at random moments, until it ends.

    python -m benchmarks.rank_kills OUT [--kills 100]

Runs of half a minute on two ranks that save every other second are started by `spire-dist train --processes 2`, which starts
again what dies. Of ten kills one comes while all start, three when a save is under way, two wait for part discovery; four
come at any time of training. After each, before anything starts again, the newest checkpoint is read. Each run must end in
the bytes of one that nobody disturbed, which it does not where a particle is seen twice or not at all.
"""

import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import psutil
import typer

from benchmarks.machine import describe_machine, machine_line
from benchmarks.tables import table, write
from spire_dist.config import RunConfig, dump_config, validate
from spire_dist.progress import progress
from spire_dist.training.saving import State, read_state

RANKS = 2
SAVE_S = 2.0
LONGEST_WAIT_S = 30.0
RESULTS = ("latents.npy", "parts.npy", "stage1/latents.npy")


def main(
    out: Annotated[Path, typer.Argument(help="Folder for data and results.")],
    kills: Annotated[int, typer.Option(help="How often to kill.")] = 100,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
) -> None:
    """Kill, read, go on, compare; print what was hit and what was lost."""
    config = make_particles(out)
    whole, moments = out / "whole", random.Random(seed)
    if not (whole / "latents.npy").exists():
        subprocess.run(command(config, whole), check=True, capture_output=True)
    expected = {name: (whole / name).read_bytes() for name in RESULTS}
    record = out / "hits.jsonl"  # with which the benchmark itself goes on where it was stopped
    hits: list[dict] = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    bar = iter(progress(range(kills - len(hits)), "kills"))
    while len(hits) < kills:
        run = out / f"run-{len(finished(out))}"
        process = subprocess.Popen(command(config, run), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(hits) < kills:
            hit = kill_one(process, run, moments)
            if hit is not None:
                hits.append(hit)
                with record.open("a") as file:
                    file.write(json.dumps(hit) + "\n")
                next(bar, None)
        if process.wait() != 0:
            raise RuntimeError(f"{run}: ended with {process.returncode}")
    runs = finished(out)
    same = sum(all((run / name).read_bytes() == content for name, content in expected.items()) for run in runs)
    machine = describe_machine(RANKS)
    lost = [hit["lost_s"] for hit in hits if hit["lost_s"] is not None]
    readable = sum(hit["readable"] for hit in hits)
    text = [
        f"{kills} kills in {len(runs)} runs: {readable} times the newest checkpoint could be read; {same} of {len(runs)} runs "
        f"ended in the bytes of an undisturbed one; work lost at most {max(lost, default=0.0):.1f} s, saved every {SAVE_S:g} s",
        machine_line(machine),
        "",
        *table(
            ["when it was killed", "times"], [[what, str(n)] for what, n in Counter(h["when"] for h in hits).items()]
        ),
    ]
    print("\n".join(text))
    write(out, "rank_kills", {"machine": machine, "hits": hits, "runs": len(runs), "same": same}, text)


def finished(out: Path) -> list[Path]:
    """Runs that have come to their end."""
    return [run for run in sorted(out.glob("run-*")) if (run / "report.html").exists()]


def make_particles(out: Path) -> Path:
    """A configuration file of a run of about half a minute on two ranks of two cores."""
    if not (out / "store").exists():
        for words in (("simulate", str(out / "data"), "--particles", "1000", "--box", "48", "--seed", "0"),
                      ("prep", str(out / "data" / "particles.star"), str(out / "store"))):  # fmt: skip
            subprocess.run([sys.executable, "-m", "spire_dist.cli", *words], check=True, capture_output=True)
    settings = {
        "threads": 1,
        "data": {"store": str((out / "store").absolute())},
        "stage1": {"gaussians": 1024, "epochs": 40},
        "stage2": {"gaussians": 2048, "epochs": 40, "layers": 1, "hidden": 32},
        "output": {"save_seconds": SAVE_S, "log_seconds": 0.1, "volumes": 2},
        "parallel": {"timeout_s": 30},
    }
    path = out / "config.toml"
    config: RunConfig = validate(settings, "benchmark")
    path.write_text(dump_config(config))
    return path


def command(config: Path, run: Path) -> list[str]:
    """What is started, and starts again."""
    words = ["train", str(config), "--run", str(run), "--processes", str(RANKS), "--restarts", "1000"]
    return [sys.executable, "-m", "spire_dist.cli", *words]


def kill_one(launcher: subprocess.Popen, run: Path, moments: random.Random) -> dict | None:
    """Kill a rank at a random moment; None where the run ended before. The launcher stands still while it is looked at."""
    kind, began = moments.choice(["start", *["any"] * 4, *["saving"] * 3, *["parts"] * 2]), time.time()

    def wait_for(condition: Callable[[], bool], longest_s: float) -> None:
        end = time.time() + longest_s
        while not condition() and time.time() < end and launcher.poll() is None:
            time.sleep(0.003)

    if kind == "start":
        time.sleep(moments.uniform(0, 8))
    else:
        wait_for(lambda: logged_after(run, began), 120.0)
        time.sleep(moments.uniform(0, 4))
    if kind == "saving":
        wait_for(lambda: any(path.stat().st_mtime > began for path in partials(run)), LONGEST_WAIT_S)
    if kind == "parts" and in_first_stage(run):
        wait_for(lambda: finding_parts(run), LONGEST_WAIT_S)
        time.sleep(moments.uniform(0, 0.5))
    if launcher.poll() is not None:
        return None
    parent = psutil.Process(launcher.pid)
    ranks = ranks_of(parent)
    if len(ranks) < RANKS:
        return None
    parent.suspend()
    when = phase(run, max(rank.create_time() for rank in ranks))
    victim = moments.choice(ranks)
    victim.kill()
    time.sleep(0.5)  # the other one may be writing still, until it notices
    try:
        state = read_state(run)
        readable = True
    except Exception as error:
        state, readable = None, False
        print(f"{run}: {error}", file=sys.stderr)
    parent.resume()
    return {
        "when": when,
        "readable": readable,
        "lost_s": lost_seconds(run, state) if state else None,
    }


def ranks_of(launcher: psutil.Process) -> list[psutil.Process]:
    """The ranks that run; some may end while one looks."""
    found = []
    for child in launcher.children():
        with suppress(psutil.Error):
            if "train" in child.cmdline() and child.status() != psutil.STATUS_ZOMBIE:
                found.append(child)
    return found


def phase(run: Path, started: float) -> str:
    """What a run is doing whose ranks were started at a time (Unix): by its files, of which some are of earlier lives."""
    if not (run / "latest").exists():
        return "before the first checkpoint"
    if any(path.stat().st_mtime > started for path in partials(run)):
        return "saving"
    if (run / "latents.npy").exists():
        return "writing results"
    if finding_parts(run):
        return "part discovery"
    return "training" if logged_after(run, started) else "starting again"


def logged_after(run: Path, moment: float) -> bool:
    """Whether the first rank has logged a step since then (Unix time)."""
    path = run / "ranks" / "rank-0000.jsonl"
    found = records(run, path) if path.exists() and path.stat().st_mtime > moment else []
    return bool(found) and found[-1]["time"] > moment


def in_first_stage(run: Path) -> bool:
    """Whether the last logged step is of stage 1."""
    found = records(run)
    return bool(found) and found[-1]["stage"] == 1


def partials(run: Path) -> list[Path]:
    """Checkpoints that are being written."""
    return list((run / "checkpoints").glob(".step-*.partial"))


def finding_parts(run: Path) -> bool:
    """Whether stage 1 has ended and stage 2 not begun."""
    metrics = records(run)
    ended = bool(metrics) and metrics[-1]["stage"] == 1 and metrics[-1]["left"] == 0
    return ended and not list((run / "checkpoints").glob("step-2*"))


def records(run: Path, path: Path | None = None) -> list[dict]:
    """What the first rank has logged of all ranks, or of itself."""
    path = path or run / "metrics.jsonl"
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        found.append(record | {"left": round(40 - record["epoch"], 3)})
    return found


def lost_seconds(run: Path, state: State) -> float | None:
    """Training time between a checkpoint and the last logged step of its stage; None where that has not one yet."""
    same = [record for record in records(run) if record["stage"] == state.stage]
    before = [record["elapsed_s"] for record in same if record["step"] <= state.step]
    return max(0.0, same[-1]["elapsed_s"] - before[-1]) if before else None


if __name__ == "__main__":
    typer.run(main)
