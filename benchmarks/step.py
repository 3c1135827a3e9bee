"""A whole training step beside cryoDRGN's, its memory, and the growth of the projector's cost.

    python -m benchmarks.step OUT [--peer-python PEER/bin/python] [--quick]

Our steps are `train_stage` on the IgG set of `benchmarks.igg`: data thread, latents, networks, projector, CTF, loss, gradients
and optimisers, all that a user's run does but its checkpoints. cryoDRGN trains on the same images (`benchmarks.peer`; without
--peer-python the table holds our speeds only). They take turns within a round, so that another load of the machine meets
all of them, and a ratio is the median of the rounds' ratios. OUT gets step.json, step.md and step.png.
"""

import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated

import matplotlib.pyplot as plt
import numpy as np
import torch
import typer

from benchmarks import growth, memory, peer
from benchmarks.igg import CTF_TABLE, MODEL, make_set
from benchmarks.machine import describe_machine, machine_line
from benchmarks.memory import begin_trainee
from benchmarks.tables import table, write
from spire_dist.config import HierarchyConfig, PartsConfig, RunConfig, StageConfig
from spire_dist.data.loader import BatchSource
from spire_dist.data.store import ParticleStore
from spire_dist.distributed.heartbeat import Heartbeat
from spire_dist.distributed.stopping import StopFlag
from spire_dist.model.latents import starting_latents
from spire_dist.model.mixtures import CoarseMixture
from spire_dist.training.consensus import back_project
from spire_dist.training.metrics import RunLog, say
from spire_dist.training.stages import find_parts, seed_coarse, seed_second
from spire_dist.training.train import SAMPLE_IMAGES, open_source, use_threads
from spire_dist.training.trainer import Trainee, train_stage

PAPER = RunConfig(stage1=StageConfig(gaussians=2048, layers=1, hidden=32, tries=0))
SMALL = RunConfig(
    stage1=StageConfig(gaussians=768, layers=2, hidden=64, tries=0),
    stage2=HierarchyConfig(gaussians=1536, layers=1, hidden=32, anchor_layers=2, anchor_hidden=64, tries=0),
    parts=PartsConfig(anchors=5),
)
"""Without tries of other particles' latents, which the method as published does not have."""
CASES = ("stage 1, 2,048 Gaussians, 1 × 32", "stage 1, 768 Gaussians, 2 × 64", "stage 2, 1,536 Gaussians, 5 anchors")
WARM_UP_EPOCHS = 4
"""Of each case before the first round: the widths settle, and with them the projector's share of the work."""


def main(
    out: Annotated[Path, typer.Argument(help="Folder for data/, store/, peer/ and the results.")],
    peer_python: Annotated[Path | None, typer.Option(help="Python of an environment with cryoDRGN.")] = None,
    model: Annotated[Path, typer.Option(help="PDB or mmCIF file of 1HZH.")] = MODEL,
    ctf_table: Annotated[Path, typer.Option(help=".npy of CTF rows to draw from.")] = CTF_TABLE,
    quick: Annotated[bool, typer.Option(help="Few images, small sizes, one round: a look, not a measurement.")] = False,
    rounds: Annotated[int, typer.Option(help="Timed rounds [1 if quick].")] = 3,
    peer_images: Annotated[int, typer.Option(help="Images of a timed epoch of the peer.")] = 500,
    threads: Annotated[int, typer.Option(help="CPU threads of every process; 0 takes all cores.")] = 0,
) -> None:
    """Time, weigh, print tables; write JSON, Markdown and a plot."""
    threads = use_threads(SMALL.model_copy(update={"threads": threads}), 64, torch.device("cpu"))
    machine = describe_machine(threads)
    peer_name = peer.versions(peer_python) if peer_python else None
    data, store = make_set(out, model, ctf_table, *((2, 128) if quick else (20, 5000)))
    source = open_source(SMALL, ParticleStore.open(store), torch.device("cpu"))
    timed: dict[str, Callable[[], float]] = {}
    if peer_python and peer_name:
        timed[peer_name] = partial(peer.images_per_s, peer_python, data, peer_images, out / "peer", threads)
    for name, (trainee, config) in begin(source, 1 if quick else WARM_UP_EPOCHS).items():
        timed[name] = partial(train_epochs, trainee, config, source, 1)
    rates = take_turns(timed, 1 if quick else rounds)
    result = {
        "machine": machine,
        "particles": source.store.count,
        "box": source.store.box,
        "batch": SMALL.stage1.batch,
        "peer": peer_name,
        "peer_images": peer_images,
        "images_per_s": rates,
        "times_peer": times(rates, peer_name) if peer_name else None,
        "memory": memory.measure(memory.QUICK_SIZES if quick else memory.SIZES, threads, full=not quick),
        "growth": growth.measure(1 if quick else 10),
    }
    text = list(lines(result))
    print("\n".join(("", *text)))
    write(out, "step", result, text)
    plot(result, out / "step.png")


def begin(source: BatchSource, epochs: int) -> dict[str, tuple[Trainee, RunConfig]]:
    """The cases by name, each begun as a run begins it and trained for some epochs; the hierarchy from the smaller stage 1."""
    found = back_project(source, SMALL.consensus.padding)
    assert found is not None
    volume, trainees, cpu = found[0], {}, torch.device("cpu")
    for name, config in zip(CASES, (PAPER, SMALL), strict=False):
        torch.manual_seed(config.seed)
        mixture = seed_coarse(volume, config, source.batch(np.arange(min(SAMPLE_IMAGES, source.store.count))))
        latents = starting_latents(source.store.count, config.latent.dimension, seed=0)
        trainee = begin_trainee(1, mixture, latents, config, cpu, source)
        train_epochs(trainee, config, source, epochs)
        trainees[name] = trainee, config
    coarse = trainees[CASES[1]][0]
    assert coarse.table is not None
    assert isinstance(coarse.mixture, CoarseMixture)
    coarse.table.come_home()
    values = coarse.table.home[:, 0].clone()
    mixture = seed_second(coarse.mixture, find_parts(coarse.mixture, values, SMALL)[0], values, SMALL, source.store.box)
    trainee = begin_trainee(2, mixture, values, SMALL, cpu, source)
    train_epochs(trainee, SMALL, source, epochs)
    return trainees | {CASES[2]: (trainee, SMALL)}


def train_epochs(trainee: Trainee, config: RunConfig, source: BatchSource, epochs: int) -> float:
    """Go on for some epochs; images/s as the run's own log counts them."""
    stage = config.stage1 if trainee.stage == 1 else config.stage2
    end = trainee.step / source.order(stage.batch, config.seed).steps_per_epoch + epochs
    with TemporaryDirectory() as folder, StopFlag() as stop:
        never = math.inf  # but at the end
        log = RunLog(Path(folder), never, torch.device("cpu"), (trainee.stage, trainee.step))
        longer = config.model_copy(update={f"stage{trainee.stage}": stage.model_copy(update={"epochs": end})})
        beat = Heartbeat(Path(folder), trainee.mesh, (trainee.stage, trainee.step))
        train_stage(trainee, source, longer, log, beat, stop, save=lambda: None)
        log.close()
        return json.loads((Path(folder) / "metrics.jsonl").read_text())["images_per_s"]


def take_turns(timed: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each of `timed` returns in every round."""
    values: dict[str, list[float]] = {name: [] for name in timed}
    for number in range(rounds):
        for name, measure in timed.items():
            values[name].append(measure())
            say(f"round {number + 1}/{rounds}  {name}: {values[name][-1]:.1f} images/s")
    return values


def times(rates: dict[str, list[float]], peer_name: str) -> dict[str, float]:
    """How many times the peer's images/s each does: median of the rounds' ratios."""
    peers = rates[peer_name]
    return {name: median(a / b for a, b in zip(own, peers, strict=True)) for name, own in rates.items()}


def lines(result: dict) -> Iterator[str]:
    """The result as Markdown that also reads well in a terminal, ratios first."""
    rates, ratios = result["images_per_s"], result["times_peer"]
    yield "## A whole training step"
    yield ""
    yield machine_line(result["machine"])
    yield ""
    rows = [
        (name, f"{ratios[name]:.1f}" if ratios else "-", f"{median(r):,.0f}", f"{min(r):,.0f} - {max(r):,.0f}")
        for name, r in rates.items()
    ]
    yield from table(("whole training step", "times cryoDRGN", "images/s", "over the rounds"), rows)
    yield ""
    yield (
        f"{result['particles']:,} images of {result['box']} px; our batch {result['batch']}, {SMALL.latent.dimension} latent "
        f"numbers; one epoch in each of {len(next(iter(rates.values())))} rounds, medians."
    )
    if result["peer"]:
        yield (
            f"cryoDRGN: `train_vae {' '.join(peer.NETWORK)}` (256 × 3), on the same cores, in the same rounds, on "
            f"{min(result['peer_images'], result['particles'])} of the images; the second epoch's time by its own log, which "
            "leaves out imports, preprocessing and the evaluation of latents."
        )
    else:
        yield "cryoDRGN was not measured: no --peer-python was given."
    for part in (memory.lines(result["memory"]), growth.lines(result["growth"])):
        yield ""
        yield from part


def plot(result: dict, path: Path) -> None:
    """Speeds, memory over the size of a step, and the projector's time per pair over images and Gaussians."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    rates, ratios = result["images_per_s"], result["times_peer"]
    heights = [median(values) for values in rates.values()]
    labels = [f"{h:,.0f}" + (f"  ({ratios[n]:.0f}×)" if ratios else "") for n, h in zip(rates, heights, strict=True)]
    bars = left.barh(range(len(rates)), heights, color=["C7" if name == result["peer"] else "C0" for name in rates])
    left.bar_label(bars, labels, padding=3)
    left.set_yticks(range(len(rates)), [name.replace(", ", "\n", 1).replace(" (", "\n(") for name in rates])
    left.invert_yaxis()
    left.set(xlabel="images/s of training", xlim=(0, 1.45 * max(heights)))

    rows, full = result["memory"]["sizes"], memory.FULL_SIZE[0] * memory.FULL_SIZE[1]
    middle.loglog([r["images"] * r["gaussians"] for r in rows], [r["bytes"] for r in rows], "o", label="measured")
    middle.loglog(full, result["memory"]["full_predicted"]["bytes"], "x", color="C0", label="by the formula")
    if result["memory"]["full_measured"]:
        middle.loglog(full, result["memory"]["full_measured"]["bytes"], "o", color="C0")
    middle.axhline(memory.TARGET_BYTES, color="C7", linestyle="--", label="1 GB")
    middle.set(xlabel="images × Gaussians of a step, 3 × 128", ylabel="bytes above parameters")
    middle.legend(frameon=False)

    for varied, style in (("images", "o-"), ("Gaussians", "s--")):
        series = result["growth"][varied.lower()]
        pairs = [size * series["fixed"] for size in series["sizes"]]
        right.loglog(pairs, series["ms"], style, label=f"{varied} vary: exponent {series['exponent']:.2f}")
    right.set(xlabel="images × Gaussians", ylabel="ms of the projector, forward + backward")
    right.legend(frameon=False)
    threads = result["machine"]["threads"]
    left.set_title(f"{threads} thread{'s' if threads > 1 else ''}, {result['machine']['processor']}", fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    typer.run(main)
