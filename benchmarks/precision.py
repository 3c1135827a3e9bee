"""What the precision of stored images saves and costs: bytes, error, speed, and the score after training.

    python -m benchmarks.precision OUT [--seeds 0,1,2] [--set stage1.epochs=40 ...]

The set is that of `benchmarks.igg`. Every precision of `prep` is compared with float32 images, and beside them float16 images
rounded to fewer bits and compressed without further loss, which `prep` does not offer. float16 and compact stores are then
trained and scored with several seeds. OUT/precision.json holds every number, OUT/precision.md the text, OUT/precision.png a
picture; what is there already is used as it is.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
import typer
from numcodecs import BitRound, Shuffle, Zstd

from benchmarks.igg import CTF_TABLE, MODEL, make_set, means
from benchmarks.machine import describe_machine, machine_line, use_threads
from benchmarks.tables import table, write
from data_prep.convert import prepare
from data_prep.images import background_mask, background_statistics
from data_prep.shards import write_shard
from spire_dist import cli
from spire_dist.data.store import ParticleStore
from spire_dist.files import remove

PRECISIONS = ("float32", "float16", "compact")
TRAINED = ("float16", "compact")
KEPT_BITS = (6, 5, 4)
"""Of the mantissa of a float16, which has 10."""
REPEATS = 3


def main(
    out: Annotated[Path, typer.Argument(help="Folder for data/, stores, runs and results.")],
    seeds: Annotated[str, typer.Option(help="Seeds of the training, separated by commas.")] = "0,1,2",
    model: Annotated[Path, typer.Option(help="PDB or mmCIF file of 1HZH.")] = MODEL,
    ctf_table: Annotated[Path, typer.Option(help=".npy of CTF rows to draw from.")] = CTF_TABLE,
    preset: Annotated[str, typer.Option(help="Preset to train.")] = "demo",
    settings: Annotated[list[str] | None, typer.Option("--set", help="section.key=value, repeatable.")] = None,
    states: Annotated[int, typer.Option(help="Number of states.")] = 20,
    particles: Annotated[int, typer.Option(help="Images in all.")] = 5000,
) -> None:
    """Measure and train every precision; print and write what came of it."""
    data, half = make_set(out, model, ctf_table, states, particles)
    star = data / "particles.star"
    use_threads(1)
    stores = {"float16": half} | {name: prepare(star, out / name, dtype=name) for name in ("float32", "compact")}
    result: dict[str, Any] = {"machine": describe_machine(), "data": json.loads((data / "simulation.json").read_text())}
    result["precisions"] = [measure(name, stores[name], stores["float32"], star) for name in PRECISIONS]
    result["precisions"] += [measure_rounded(bits, stores["float32"], half) for bits in KEPT_BITS]
    result["auc"] = {
        name: {
            seed: train(out / f"run-{name}-{seed}", stores[name], data, preset, [*(settings or []), f"seed={seed}"])
            for seed in seeds.split(",")
        }
        for name in TRAINED
    }
    text = list(lines(result))
    write(out, "precision", result, text)
    draw(result["auc"], out / "precision.png")
    print()
    print("\n".join(text))


def measure(name: str, path: Path, reference: Path, star: Path) -> dict[str, Any]:
    """Bytes of a store's folder, its images' difference from `reference`, and its speed on one core, warm cache."""
    store, exact = ParticleStore.open(path), ParticleStore.open(reference)
    differences = np.concatenate([store.read(rows) - exact.read(rows) for rows in _chunks(store)])
    if not np.array_equal(store.source_index, exact.source_index):
        raise RuntimeError(f"{path}: its particles are not in the order of {reference}")
    return {
        "precision": name,
        "bytes_per_particle": _folder_bytes(path) / store.count,
        "of_float32": _folder_bytes(path) / store.count / (4 * store.box**2),
        "error_over_noise": float(np.sqrt(np.mean(differences.astype(np.float64) ** 2))) / _noise(exact),
        "images_written_per_s": store.count / min(_write_seconds(name, star, path) for _ in range(REPEATS)),
        "images_read_per_s": store.count / min(_read_seconds(path) for _ in range(REPEATS)),
    }


def measure_rounded(bits: int, reference: Path, half: Path) -> dict[str, Any]:
    """The same of float16 images with `bits` of their mantissa, bytes shuffled, zstd: bytes and error only."""
    store, exact = ParticleStore.open(half), ParticleStore.open(reference)
    rounding, shuffle, zstd = BitRound(keepbits=bits), Shuffle(elementsize=2), Zstd(level=3)
    size, squares = 0, 0.0
    for rows in _chunks(store):
        rounded = np.asarray(rounding.encode(store.read(rows).astype(np.float16))).view(np.float16)
        size += len(zstd.encode(shuffle.encode(rounded)))
        difference = rounded.reshape(len(rows), -1).astype(np.float64) - exact.read(rows).reshape(len(rows), -1)
        squares += float((difference**2).sum())
    stored = sum(path.stat().st_size for path in (half / "images" / "c").rglob("*") if path.is_file())
    size += _folder_bytes(half) - stored  # the tables stay
    return {
        "precision": f"float16, {bits} bits, zstd",
        "bytes_per_particle": size / store.count,
        "of_float32": size / store.count / (4 * store.box**2),
        "error_over_noise": float(np.sqrt(squares / (store.count * store.box**2))) / _noise(exact),
    }


def train(run: Path, store: Path, data: Path, preset: str, settings: list[str]) -> dict[str, float]:
    """Mean AUC of the FSC per conformation, masked and unmasked, of a run that is made unless it is there."""
    if not (run / "evaluation.json").exists():
        cli.train(None, run=run, store=store, preset=preset, settings=settings)
        cli.evaluate(run, data)
    return means(json.loads((run / "evaluation.json").read_text()), "model")


def lines(result: dict[str, Any]) -> Iterator[str]:
    """The result as text."""
    data = result["data"]
    yield "## Precision of stored images"
    yield ""
    yield machine_line(result["machine"])
    yield (
        f"{sum(data['counts'])} images of {data['box']} px, SNR {data['snr']}; bytes of the whole folder; error of a pixel, "
        "root mean square; speeds on one core, files in the page cache"
    )
    yield ""
    header = ("images", "bytes per particle", "of float32", "error / noise", "written per s", "read per s")
    yield from table(header, [_row(entry) for entry in result["precisions"]])
    for mask in ("masked", "unmasked"):
        scores = {name: [score[mask] for score in result["auc"][name].values()] for name in TRAINED}
        yield ""
        yield from table(
            (f"AUC per conformation, {mask}", *(f"seed {seed}" for seed in result["auc"]["float16"]), "mean"),
            [(name, *(f"{value:.4f}" for value in values), f"{mean(values):.4f}") for name, values in scores.items()],
        )
        low, high = min(scores["float16"]), max(scores["float16"])
        where = "inside" if inside_spread(scores["compact"], scores["float16"]) else "outside"
        yield ""
        yield f"Compact's mean, {mean(scores['compact']):.4f}, lies {where} float16's spread, {low:.4f} to {high:.4f}."


def inside_spread(ours: list[float], theirs: list[float]) -> bool:
    """Whether the mean of our scores is one that theirs reach by their seeds alone."""
    return min(theirs) <= mean(ours) <= max(theirs)


def draw(auc: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    """One point for each run, a line at the mean of each precision."""
    figure, axes = plt.subplots(1, 2, figsize=(6, 3), layout="constrained")
    for axis, mask in zip(axes, ("masked", "unmasked"), strict=True):
        for place, of_seed in enumerate(auc.values()):
            values = [score[mask] for score in of_seed.values()]
            axis.plot([place] * len(values), values, "o", color=f"C{place}")
            axis.plot([place - 0.2, place + 0.2], [mean(values)] * 2, "-", color=f"C{place}")
        axis.set(xticks=range(len(auc)), xticklabels=list(auc), xlim=(-0.5, len(auc) - 0.5), title=mask)
    axes[0].set_ylabel("AUC of the FSC per conformation")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _row(entry: dict[str, Any]) -> tuple[str, ...]:
    speeds = (entry.get(f"images_{done}_per_s") for done in ("written", "read"))
    return (
        entry["precision"],
        f"{entry['bytes_per_particle']:,.0f}",
        f"{entry['of_float32']:.3f}",
        f"{entry['error_over_noise']:.2g}",
        *("" if speed is None else f"{speed:,.0f}" for speed in speeds),
    )


def _write_seconds(precision: str, star: Path, beside: Path) -> float:
    """Of making and writing all shards, planning apart."""
    scratch, seconds = beside.with_name(f"{beside.name}-scratch"), 0.0
    remove(scratch)

    def timed(store: Path, shards: list[int]) -> Iterator[int]:
        nonlocal seconds
        for shard in shards:
            start = time.perf_counter()
            write_shard(store, shard)
            seconds += time.perf_counter() - start
            yield shard

    prepare(star, scratch, dtype=precision, engine=timed)
    remove(scratch)
    return seconds


def _read_seconds(path: Path) -> float:
    """Into float32, converted by torch as the loader does it."""
    store = ParticleStore.open(path)
    start = time.perf_counter()
    for rows in _chunks(store):
        images = torch.from_numpy(store.stored(rows)).to(torch.float32)
        if store.scale is not None:
            images *= torch.from_numpy(store.scale[rows])[:, None, None]
    return time.perf_counter() - start


def _chunks(store: ParticleStore) -> list[np.ndarray]:
    return np.split(np.arange(store.count), range(64, store.count, 64))


def _noise(store: ParticleStore) -> float:
    """Standard deviation of the background."""
    mask = background_mask(store.box, store.attributes["background_radius_a"] / store.pixel_size)
    deviations = np.concatenate([background_statistics(store.read(rows), mask)[1] for rows in _chunks(store)])
    return float(np.sqrt(np.mean(deviations.astype(np.float64) ** 2)))


def _folder_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


if __name__ == "__main__":
    typer.run(main)
