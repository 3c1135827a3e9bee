"""The verb `benchmark`: one public function of `spire_dist.comparison`, on a store made by `data_prep`."""

from pathlib import Path
from typing import Annotated

import typer

verbs = typer.Typer()


@verbs.command()
def benchmark(
    data: Annotated[
        Path, typer.Argument(help="Set with known truth: CryoBench's as released, or one of `simulate --recipe`.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the store, the runs and the tables.")],
    methods: Annotated[
        str | None, typer.Option(help="Names from comparison/methods.toml, e.g. ours,no-hierarchy [all that can run].")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Each method is trained with every one of these.")] = "0",
    preset: Annotated[str, typer.Option(help="Preset of our runs: demo, cryobench or empiar.")] = "demo",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value for all our runs, repeatable.")
    ] = None,
    particles: Annotated[
        Path | None, typer.Option(help="List of particles [particles.star, or images/*/sorted_particles.*.txt].")
    ] = None,
    cryodrgn: Annotated[
        Path | None, typer.Option(help="Python of an environment with cryoDRGN, which then is compared with too.")
    ] = None,
    recovar: Annotated[Path | None, typer.Option(help="The same for RECOVAR, which is slow without a GPU.")] = None,
    epochs: Annotated[int, typer.Option(help="Epochs of cryoDRGN.")] = 20,
    minutes: Annotated[
        float | None, typer.Option(help="Instead: as many whole epochs as fit in, by the time of its first.")
    ] = None,
    conformations: Annotated[int | None, typer.Option(help="How many are scored, evenly spaced [all].")] = None,
    images: Annotated[int, typer.Option(help="About how many images the per-image score takes; 0: none.")] = 100,
) -> None:
    """Train and score several methods on the same images; print their table and the published one. It goes on after Ctrl-C."""
    from data_prep.convert import prepare
    from spire_dist.comparison.benchmark import Setting, check
    from spire_dist.comparison.benchmark import benchmark as run
    from spire_dist.comparison.layout import find_particles
    from spire_dist.comparison.methods import choose_methods, read_seeds

    given = {"cryodrgn": cryodrgn, "recovar": recovar}
    pythons = {name: python for name, python in given.items() if python is not None}
    chosen = choose_methods(methods.split(",") if methods else None, pythons)
    numbers = read_seeds(seeds)
    files = find_particles(data, particles)
    setting = Setting(
        data, out, out / "store", preset, settings or (), conformations, images, files, pythons, epochs, minutes
    )
    check(setting, chosen)
    poses, ctf = (files.poses or (), files.ctf) if files.needs_pickles else ((), None)
    prepare(files.particles, setting.store, poses=poses, ctf=ctf)
    print(run(setting, chosen, numbers))
