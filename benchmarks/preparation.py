"""How fast `prep` is beside merely reading the same bytes: mrcfile's memory map, cold and warm.

    python -m benchmarks.preparation OUT [--particles 32768] [--box 128]

Makes stacks of noise with a blob (2 GiB at the default size) in OUT, then times, round by round: reading every image of
every stack through mrcfile's memory map into memory, `prep` as the command line runs it (processes started, plan, sign,
conversion, hashes, flushing, manifest), without cropping and cropped to half, to a disk and to a memory file system, and
the floor a disk sets: writing as many bytes as the store has and waiting for them.
"""

import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import mrcfile
import numpy as np
import pandas as pd
import starfile
import typer

from benchmarks.loading import forget
from benchmarks.machine import describe_machine, machine_line
from benchmarks.tables import table, write

IMAGES_PER_STACK = 1024
MEMORY_FOLDER = Path("/dev/shm")


def main(
    out: Annotated[Path, typer.Argument(help="Folder for data and results.")],
    particles: Annotated[int, typer.Option(help="Images.")] = 32768,
    box: Annotated[int, typer.Option(help="Their side, px.")] = 128,
    rounds: Annotated[int, typer.Option(help="Of which the medians are taken; one more comes first.")] = 3,
    workers: Annotated[int, typer.Option(help="Processes of prep; 0: one per core.")] = 0,
) -> None:
    """Time everything and print one table."""
    star, stacks = make_particles(out / "input", particles, box)
    size = sum(stack.stat().st_size for stack in stacks)
    memory = MEMORY_FOLDER / f"spire-preparation-{os.getpid()}"
    cases: dict[str, Callable[[], float]] = {
        "mrcfile memory map, cold": lambda: read_all(stacks, cold=True),
        "mrcfile memory map, warm": lambda: read_all(stacks, cold=False),
        "prep, no crop, cold": lambda: prep(star, out / "store", workers, stacks),
        "prep, cropped 2×, cold": lambda: prep(star, out / "store", workers, stacks, box // 2),
        "prep, no crop, warm, to memory": lambda: prep(star, memory, workers, stacks, warm=True),
        "prep, cropped 2×, warm, to memory": lambda: prep(star, memory, workers, stacks, box // 2, warm=True),
        "prep, compact, cold": lambda: prep(star, out / "store", workers, stacks, dtype="compact"),
        "write and flush as many bytes as the store has": lambda: write_bytes(out / "bytes", size // 2),
    }
    times: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, run in cases.items():
            seconds = run()
            print(f"{name}: {seconds:.2f} s{'' if number else ' (not counted)'}", file=sys.stderr, flush=True)
            if number:  # a virtual machine's memory is slow the first time that it is touched
                times[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    cold, warm = medians["mrcfile memory map, cold"], medians["mrcfile memory map, warm"]
    rows = [
        [name, f"{seconds:.2f}", f"{size / seconds / 1e6:.0f}", f"{cold / seconds:.2f}", f"{warm / seconds:.2f}"]
        for name, seconds in medians.items()
    ]
    machine = describe_machine()
    lines = [
        f"{particles} images of {box} px, float32, {size / 2**30:.2f} GiB in {len(stacks)} stacks; medians of {rounds}",
        machine_line(machine),
        "",
        *table(["", "s", "MB/s of input", "× cold read", "× warm read"], rows),
    ]
    print("\n".join(lines))
    write(out, "preparation", {"machine": machine, "bytes": size, "seconds": times}, lines)


def make_particles(folder: Path, count: int, box: int) -> tuple[Path, list[Path]]:
    """A STAR file and its stacks, made once: a blob in noise, so that the contrast can be told."""
    star = folder / "particles.star"
    names = [f"stack{i:04d}.mrcs" for i in range(-(-count // IMAGES_PER_STACK))]
    stacks = [folder / name for name in names]
    if star.exists():
        return star, stacks
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    axis = np.arange(box) - box // 2
    blob = np.exp(-(axis[:, None] ** 2 + axis[None, :] ** 2) / (2 * (0.15 * box) ** 2)).astype(np.float32)
    images = []
    for i, stack in enumerate(stacks):
        held = min(IMAGES_PER_STACK, count - i * IMAGES_PER_STACK)
        with mrcfile.new(stack, overwrite=True) as mrc:
            mrc.set_data(rng.standard_normal((held, box, box), dtype=np.float32) + blob)
        images += [f"{k + 1:06d}@{stack.name}" for k in range(held)]
    optics = {
        "rlnOpticsGroup": [1],
        "rlnVoltage": [300.0],
        "rlnSphericalAberration": [2.7],
        "rlnAmplitudeContrast": [0.1],
    }
    optics |= {"rlnImagePixelSize": [2.0], "rlnImageSize": [box]}
    angles = {f"rlnAngle{name}": rng.uniform(0, 180, count) for name in ("Rot", "Tilt", "Psi")}
    defocus = {"rlnDefocusU": rng.uniform(1e4, 2e4, count), "rlnDefocusV": rng.uniform(1e4, 2e4, count)}
    rest = {"rlnDefocusAngle": np.zeros(count), "rlnOpticsGroup": np.ones(count, dtype=int)}
    columns = {"rlnImageName": images} | angles | defocus | rest
    starfile.write({"optics": pd.DataFrame(optics), "particles": pd.DataFrame(columns)}, star)
    os.sync()
    return star, stacks


def read_all(stacks: list[Path], *, cold: bool) -> float:
    """Seconds to copy every image out of mrcfile's memory map, in order."""
    if cold:
        forget(stacks)
    start = time.perf_counter()
    for stack in stacks:
        with mrcfile.mmap(stack) as mrc:
            data = mrc.data
            assert data is not None
            for first in range(0, len(data), 64):
                np.array(data[first : first + 64])
    return time.perf_counter() - start


def prep(
    star: Path,
    store: Path,
    workers: int,
    stacks: list[Path],
    box: int = 0,
    dtype: str = "float16",
    *,
    warm: bool = False,
) -> float:
    """Seconds of one `spire-dist prep`, start of the program included; none of the stacks is in the cache, or all are."""
    shutil.rmtree(store, ignore_errors=True)
    os.sync()
    if warm:
        read_all(stacks, cold=False)
    else:
        forget(stacks)
    arguments = ["prep", str(star), str(store), "--dtype", dtype]
    arguments += ["--box", str(box)] if box else []
    arguments += ["--workers", str(workers)] if workers else []
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "spire_dist.cli", *arguments], check=True, capture_output=True)
    seconds = time.perf_counter() - start
    shutil.rmtree(store)
    return seconds


def write_bytes(path: Path, count: int) -> float:
    """Seconds to write `count` bytes and wait until they are on the disk."""
    block = np.random.default_rng(0).bytes(2**24)
    start = time.perf_counter()
    with open(path, "wb") as file:
        for _ in range(0, count, len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    path.unlink()
    return seconds


if __name__ == "__main__":
    typer.run(main)
