"""The command line: one verb, one public function. Nothing is computed here.

A user's mistake prints one line and ends with exit code 2, a run stopped on request with 75; anything else is a bug and
keeps its traceback. Functions are imported inside the verbs, so that `--help` and mistakes in options answer at once.
"""

import os
import sys
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from spire_dist import __version__, cli_benchmark, cli_cluster
from spire_dist.errors import SpireError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # which would swallow the defaults in square brackets
    help="CryoSPIRE: see molecules move. Particles in; parts, a latent space and maps out.",
)

app.add_typer(cli_benchmark.verbs)
app.add_typer(cli_cluster.verbs)

Run = Annotated[Path, typer.Argument(help="Run directory of `spire-dist train`.")]
Store = Annotated[Path, typer.Argument(help="Particle store made by `spire-dist prep`.")]
Datadir = Annotated[Path | None, typer.Option(help="Folder the stacks' paths start from.")]
StripPrefix = Annotated[str | None, typer.Option(help="What to leave out at the beginning of the stacks' names.")]
Passthrough = Annotated[
    list[Path] | None, typer.Option(help="cryoSPARC .cs with further columns, joined by uid; repeatable.")
]
Tomograms = Annotated[
    Path | None, typer.Option(help="RELION's STAR of the tilt series, where not beside the particles.")
]
Poses = Annotated[
    list[Path] | None,
    typer.Option(help="cryoDRGN pose pickle instead of the file's poses; twice: rotations, then shifts."),
]
Ctf = Annotated[Path | None, typer.Option(help="cryoDRGN CTF pickle to use instead of the file's CTFs.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes [one per core].")]


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"spire-dist {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print it and leave.")
    ] = False,
) -> None:
    pass


@app.command()
def simulate(
    out: Annotated[Path, typer.Argument(help="New folder for particles, truth maps, labels and poses.")],
    recipe: Annotated[
        str | None,
        typer.Option(help="A benchmark set: igg-1d, igg-rl, tomotwin, ribosembly; options given beside it win."),
    ] = None,
    scale: Annotated[float | None, typer.Option(help="Share of the recipe's images; the states stay [1].")] = None,
    model: Annotated[
        list[Path] | None,
        typer.Option(help="Atomic model (PDB or mmCIF, .gz too), repeatable; default: a built-in molecule."),
    ] = None,
    rotate: Annotated[
        str | None, typer.Option(help="Part that turns full circle over the states, e.g. H:1-213,L.")
    ] = None,
    axis: Annotated[str | None, typer.Option(help="Two residues the axis goes through, e.g. H:213,H:244.")] = None,
    linker: Annotated[
        str | None, typer.Option(help="Instead of the axis: what the part hangs on, a random coil, e.g. H:232-238.")
    ] = None,
    omit: Annotated[
        list[str] | None,
        typer.Option(help='Instead: chains a state lacks; repeat it once per state ("" lacks nothing).'),
    ] = None,
    mixture: Annotated[
        bool | None, typer.Option("--mixture", help="Instead: each --model is a state of its own.")
    ] = None,
    states: Annotated[int | None, typer.Option(help="Number of states [20].")] = None,
    particles: Annotated[int | None, typer.Option(help="Images in all [5000].")] = None,
    proportions: Annotated[
        str | None, typer.Option(help="Relative numbers of particles per state, e.g. 3,1,2 [equal].")
    ] = None,
    box: Annotated[int | None, typer.Option(help="Image side, px [64].")] = None,
    pixel_size: Annotated[float | None, typer.Option(help="Å/px [6].")] = None,
    resolution: Annotated[float | None, typer.Option(help="Å; width of the atoms [3].")] = None,
    snr: Annotated[float | None, typer.Option(help="Signal variance over noise variance, whole images [0.1].")] = None,
    snr_at: Annotated[
        str | None,
        typer.Option(help="Box the SNR is meant in: `after` or `before` cropping from twice the box [after]."),
    ] = None,
    shift_a: Annotated[float | None, typer.Option(help="Å; shifts are uniform within ± this [30].")] = None,
    ctf_table: Annotated[
        Path | None, typer.Option(help=".npy of CTF rows (cryoDRGN's nine columns) to draw from.")
    ] = None,
    defocus_a: Annotated[
        tuple[float, float] | None, typer.Option(help="Å; range of the defocus, without a table [10000 25000].")
    ] = None,
    b_factor: Annotated[float | None, typer.Option(help="Å²; envelope exp(-B s²/4) [0].")] = None,
    hidden_b_factor: Annotated[
        float | None, typer.Option(help="Å²; another one, which the written CTFs do not tell of [0].")
    ] = None,
    sign: Annotated[str | None, typer.Option(help="+ for bright protein, - for dark [+].")] = None,
    seed: Annotated[int | None, typer.Option(help="Decides everything random [0].")] = None,
    device: Annotated[str | None, typer.Option(help="Where to project: auto, cpu or cuda [auto].")] = None,
) -> None:
    """Make a particle set with known truth, as the CryoBench benchmark does. The same command goes on after Ctrl-C."""
    from spire_dist.errors import ConfigError
    from spire_dist.simulation.recipes import recipe as read_recipe
    from spire_dist.simulation.simulate import simulate as run

    options = {
        "model": model, "rotate": rotate, "axis": axis, "linker": linker, "omit": omit, "mixture": mixture, "states": states,
        "particles": particles, "box": box, "pixel_size": pixel_size, "resolution": resolution, "snr": snr, "snr_at": snr_at,
        "shift_a": shift_a, "ctf_table": ctf_table, "defocus_a": defocus_a, "b_factor": b_factor,
        "hidden_b_factor": hidden_b_factor, "sign": sign, "seed": seed, "device": device,
        "proportions": None if proportions is None else _numbers("--proportions", proportions),
    }  # fmt: skip
    if scale is not None and recipe is None:
        raise ConfigError(f"--scale {scale}: of which recipe? give --recipe, or --particles instead")
    base = {} if recipe is None else read_recipe(recipe, 1.0 if scale is None else scale, len(model or ()))
    run(out, **(base | {name: value for name, value in options.items() if value is not None}))
    print(f"{out}: ready; next: spire-dist prep {out}/particles.star STORE")


@app.command()
def prep(
    source: Annotated[
        Path, typer.Argument(help="RELION .star, cryoSPARC .cs or .csg, a .txt list of stacks or one stack.")
    ],
    store: Annotated[Path, typer.Argument(help="Store to make, or to finish where an earlier call was cut off.")],
    box: Annotated[int | None, typer.Option(help="px; Fourier-crop the images to this side.")] = None,
    datadir: Datadir = None,
    strip_prefix: StripPrefix = None,
    passthrough: Passthrough = None,
    tomograms: Tomograms = None,
    sign: Annotated[str, typer.Option(help="+ protein bright in the input, - dark, auto: find out.")] = "auto",
    radius_a: Annotated[
        float | None, typer.Option(help="Å; particle radius, outside it is background [0.4 of the side].")
    ] = None,
    pixel_size: Annotated[float | None, typer.Option(help="Å/px of the input, where the file does not say.")] = None,
    poses: Poses = None,
    ctf: Ctf = None,
    labels: Annotated[Path | None, typer.Option(help="True state of every particle (.npy or .pkl).")] = None,
    no_ctf: Annotated[bool, typer.Option(help="The images are projections without a CTF.")] = False,
    normalise: Annotated[bool, typer.Option(help="Bring every background to mean 0 and deviation 1.")] = True,
    allow_missing_poses: Annotated[bool, typer.Option(help="Make a store to look at, not to train on.")] = False,
    shuffle: Annotated[bool, typer.Option(help="Write particles in a seeded random order.")] = True,
    dtype: Annotated[str, typer.Option(help="float16, float32 or compact (8 bits, compressed) on disk.")] = "float16",
    images_per_shard: Annotated[int, typer.Option(help="Images in one file of the store.")] = 4096,
    workers: Workers = None,
    seed: Annotated[int, typer.Option(help="Seed of the order.")] = 0,
    only_check_paths: Annotated[bool, typer.Option("--check-paths", help="Only look for the stacks.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, say what it takes, write nothing.")
    ] = False,
    engine: Annotated[str, typer.Option(help="Who makes the images: local, ray or slurm; the same bytes.")] = "local",
    ray_address: Annotated[
        str | None, typer.Option(help="Ray: auto, host:port or ray://host:port [RAY_ADDRESS, else its own cluster].")
    ] = None,
    tasks: Annotated[int, typer.Option(help="Slurm: jobs that share the work, one core each.")] = 16,
    partition: Annotated[str | None, typer.Option(help="Slurm: partition.")] = None,
    time_min: Annotated[int, typer.Option(help="Slurm: time limit, minutes; what is left is queued again.")] = 60,
    sbatch: Annotated[
        list[str] | None, typer.Option(help="Slurm: any further sbatch option as key=value, repeatable.")
    ] = None,
    share: Annotated[
        str | None, typer.Option(help="K/N: make only the K-th of N shares, from 0; see slurm/prep.sh.")
    ] = None,
) -> None:
    """Convert particles once into a store that training can stream."""
    from data_prep.convert import check_paths, prepare
    from data_prep.plan import Inputs

    if only_check_paths:
        files = Inputs(
            particles=source,
            datadir=datadir,
            strip_prefix=strip_prefix,
            passthrough=tuple(passthrough or ()),
            tomograms=tomograms,
        )
        _end_with(check_paths(files), f"{source}: every stack is there")
        return
    made_by = stopping = part = None
    if engine != "local":
        from cluster.prep_jobs import choose_engine

        made_by = choose_engine(engine, ray_address, workers)
    if share:
        from cluster.prep_jobs import make_share, queued_again, read_share

        part, stopping = read_share(share, engine), queued_again()
    with stopping or nullcontext():
        prepare(
            source, store, box=box, datadir=datadir, strip_prefix=strip_prefix, passthrough=passthrough or (),
            tomograms=tomograms, sign=sign, radius_a=radius_a, pixel_size=pixel_size, poses=poses or (), ctf=ctf, labels=labels,
            no_ctf=no_ctf, normalise=normalise, allow_missing_poses=allow_missing_poses, shuffle=shuffle, dtype=dtype,
            images_per_shard=images_per_shard, workers=1 if share else workers, seed=seed, dry_run=dry_run, engine=made_by,
            only_begin=engine == "slurm" or bool(share),
        )  # fmt: skip
        left = make_share(store, *part) if part and not dry_run else 0
    if dry_run:
        return
    if left:
        print(f"{store}: share {share} is made; {left} shards are still to be made by others")
        return
    if engine == "slurm":
        from cluster.prep_jobs import queue_shards

        jobs = queue_shards(store, tasks=tasks, partition=partition, time_min=time_min, sbatch=sbatch or ())
        if jobs:
            print(f"{store}: ready when job {jobs[-1]} has ended; queued: {' '.join(jobs)}, logs in {store}.jobs")
            return
    print(f"{store}: ready; look at it with: spire-dist inspect {store}")


@app.command()
def inspect(
    store: Store,
    picture: Annotated[Path | None, typer.Option(help="PNG with sample images and averages [STORE.png].")] = None,
) -> None:
    """Show what a store holds: units, optics groups, poses, sample images."""
    from data_prep.checks import inspect_store

    store = store.resolve()
    print(inspect_store(store, picture or store.with_name(store.name + ".png")))


@app.command()
def verify(
    store: Store,
    source: Annotated[bool, typer.Option(help="Also compare with the files it was made from.")] = True,
) -> None:
    """Check a store against its hashes and its source."""
    from data_prep.checks import verify_store

    _end_with(verify_store(store, source=source), f"{store}: good")


@app.command("filter")
def filter_(
    store: Store,
    out: Annotated[Path, typer.Argument(help="Store to make of the particles that are kept.")],
    star: Annotated[
        Path | None, typer.Option(help="Those that a RELION .star or cryoSPARC .cs or .csg file lists.")
    ] = None,
    rows: Annotated[
        Path | None, typer.Option(help="Those of these rows of the input, from 0 (cryoDRGN's --ind: .npy, .pkl, text).")
    ] = None,
    label: Annotated[list[int] | None, typer.Option(help="Those of this true state; repeatable.")] = None,
    query: Annotated[str | None, typer.Option(help='Those for which it holds, e.g. "defocus_a < 20000".')] = None,
    invert: Annotated[bool, typer.Option("--invert", help="All others instead.")] = False,
) -> None:
    """Make a store of some particles of another: those for which all conditions hold. Images are copied as they are."""
    from data_prep.edit import filter_store

    print(f"{out}: {filter_store(store, out, star=star, rows=rows, label=label, query=query, invert=invert)}")


@app.command()
def merge(
    stores: Annotated[list[Path], typer.Argument(help="Stores of one box and pixel size, two or more.")],
    out: Annotated[Path, typer.Argument(help="Store to make.")],
    allow_duplicates: Annotated[
        bool, typer.Option("--allow-duplicates", help="Images that two stores share may be there twice.")
    ] = False,
) -> None:
    """Make one store of several; their full shards are linked, not copied."""
    from data_prep.edit import merge as run

    print(f"{out}: {run(stores, out, allow_duplicates=allow_duplicates)}")


@app.command()
def add(
    store: Store,
    source: Annotated[Path, typer.Argument(help="Particle file with the new particles, as for prep.")],
    out: Annotated[Path, typer.Argument(help="Store to make of the old and the new particles.")],
    datadir: Datadir = None,
    strip_prefix: StripPrefix = None,
    passthrough: Passthrough = None,
    tomograms: Tomograms = None,
    poses: Poses = None,
    ctf: Ctf = None,
    labels: Annotated[Path | None, typer.Option(help="True state of every new particle (.npy or .pkl).")] = None,
    sign: Annotated[
        str | None, typer.Option(help="+ protein bright in the input, - dark, auto: find out [as for the store].")
    ] = None,
    allow_duplicates: Annotated[
        bool, typer.Option("--allow-duplicates", help="Images that the store has may be there twice.")
    ] = False,
    workers: Workers = None,
) -> None:
    """Make a store of another one and further particles, prepared in the same way."""
    from data_prep.edit import add as run

    done = run(
        store, source, out, datadir=datadir, strip_prefix=strip_prefix, passthrough=passthrough or (),
        tomograms=tomograms, poses=poses or (), ctf=ctf, labels=labels, sign=sign,
        allow_duplicates=allow_duplicates, workers=workers,
    )  # fmt: skip
    print(f"{out}: {done}")


@app.command()
def train(
    config: Annotated[Path | None, typer.Argument(help="TOML file; see docs/config.md.")] = None,
    run: Annotated[Path, typer.Option(help="Run directory to make or to go on with.")] = Path("run"),
    store: Annotated[Path | None, typer.Option(help="Particle store (data.store).")] = None,
    preset: Annotated[str | None, typer.Option(help="demo, cryobench or empiar: values under the file's.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="section.key=value, repeatable; wins.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Ranks to start on this machine, one for each GPU.")] = 1,
    restarts: Annotated[int, typer.Option(min=0, help="How often to start them again after a crash.")] = 3,
) -> None:
    """Train both stages; then write maps, latents, parts and the report. Ctrl-C saves; the same command goes on."""
    from spire_dist.config import load_config
    from spire_dist.training.train import train as train_run

    if processes > 1 and "RANK" not in os.environ:
        from spire_dist.distributed.launch import launch

        raise typer.Exit(launch([sys.executable, "-m", "spire_dist.cli", *sys.argv[1:]], processes, restarts))
    again = config is None and preset is None and (run / "config.toml").exists()
    overrides = [*(settings or []), *([f"data.store={str(store.resolve())!r}"] if store else [])]
    loaded = load_config(run / "config.toml" if again else config, preset, overrides)
    if loaded.data.loader == "ray":
        from cluster.ray_loader import READERS, ray_blocks

        batch = max(loaded.stage1.batch, loaded.stage2.batch)
        with ray_blocks(loaded.data.store, run, batch, loaded.data.workers or READERS) as blocks:
            first = train_run(loaded, run, blocks)
    else:
        first = train_run(loaded, run)
    if not first or not loaded.output.report:
        return
    from spire_dist.results.export import export  # seconds that no other rank should wait for
    from spire_dist.results.report import write_report

    refused = None
    try:
        export(run, run, frames=loaded.output.volumes, star=None)
    except SpireError as error:  # such as particles' own file that has changed: the report can do without
        refused = error
    print(f"{write_report(run)}: the report; score a run against a known truth with: spire-dist evaluate {run} TRUTH")
    if refused:
        raise refused


@app.command()
def evaluate(
    run: Run,
    truth: Annotated[Path, typer.Argument(help="Folder with vols/, labels and mask as `simulate` writes it.")],
    conformations: Annotated[int | None, typer.Option(help="How many, evenly spaced [all].")] = None,
    images: Annotated[int, typer.Option(help="About how many images the per-image score takes.")] = 100,
    masked: Annotated[bool, typer.Option(help="Also score inside the truth's mask.")] = True,
) -> None:
    """Score a run by the benchmark's per-conformation and per-image FSC, and its parts against the truth."""
    from spire_dist.results import evaluate as module
    from spire_dist.results.report import write_report

    print(module.table(module.evaluate(run, truth, conformations=conformations, images=images, masked=masked)))
    print(f"{write_report(run)}: the report, scores included")


@app.command()
def validate(
    run: Run,
    processes: Annotated[int, typer.Option(min=1, help="Ranks to start on this machine for each half.")] = 1,
) -> None:
    """Train a finished run again on each half of its particles and compare the two. The same command goes on after Ctrl-C."""
    from spire_dist.results import validate as module
    from spire_dist.results.report import write_report

    print(module.table(module.validate(run, processes)))
    print(f"{write_report(run)}: the report, validation included")


@app.command()
def fsc(
    first: Annotated[Path, typer.Argument(help="Map (.mrc).")],
    second: Annotated[Path, typer.Argument(help="Map of the same box and pixel size.")],
    mask: Annotated[Path | None, typer.Option(help="Mask both are multiplied by.")] = None,
) -> None:
    """Compare two maps: FSC and the resolutions at 0.5 and 0.143 in Å."""
    from spire_dist.results.evaluate import compare_maps
    from spire_dist.results.fsc import describe

    print(describe(compare_maps(first, second, mask)))


@app.command()
def export(
    run: Run,
    out: Annotated[Path, typer.Argument(help="Folder to write into.")],
    path: Annotated[
        str, typer.Option(help="Maps along loop, axis-1, axis-2, ..., a file of points, or none.")
    ] = "loop",
    frames: Annotated[int, typer.Option(help="Maps along the path.")] = 20,
    clusters: Annotated[int, typer.Option(help="Also maps at this many k-means centres.")] = 0,
    particles: Annotated[str | None, typer.Option(help="Also maps at these rows of the input, e.g. 0,17.")] = None,
    latents: Annotated[Path | None, typer.Option(help="Also maps at the latents of a .npy or text file.")] = None,
    atoms: Annotated[bool, typer.Option(help="Write the Gaussians as pseudo-atoms, coloured by part.")] = True,
    star: Annotated[
        bool, typer.Option(help="Write particles.star with latent columns; the input must be unchanged.")
    ] = True,
    source: Annotated[
        list[Path] | None, typer.Option(help="The input STAR, where it has moved; once for each of several.")
    ] = None,
) -> None:
    """Write maps, latents, parts and a particles STAR for ChimeraX and RELION."""
    from spire_dist.results.export import export as run_export

    rows = [int(row) for row in _numbers("--particles", particles)] if particles else []
    written = run_export(
        run, out, path=None if path == "none" else path, frames=frames, clusters=clusters, particles=rows, latents=latents,
        atoms=atoms, star=star, source=source or (),
    )  # fmt: skip
    print(
        f"{out}: {len(written)} files, {written[0].name} to {written[-1].name}"
        if written
        else f"{out}: nothing asked for"
    )


@app.command()
def report(run: Run) -> None:
    """Write the run's self-contained HTML report (again)."""
    from spire_dist.results.report import write_report

    print(write_report(run))


def _end_with(problems: list[str], good: str) -> None:
    """Print the problems and leave with exit code 2, or say that all is good."""
    print("\n".join(problems) or good)
    if problems:
        raise typer.Exit(2)


def _numbers(option: str, text: str) -> list[float]:
    from spire_dist.errors import ConfigError

    try:
        return [float(item) for item in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{option} {text}: not numbers separated by commas, for example 1,2,3") from error


def main() -> None:
    """The console script."""
    try:
        app()
    except SpireError as error:
        if str(error):  # else another rank has said it
            print(f"spire-dist: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except ImportError as error:
        if stranger := _strange_cluster(error):
            print(f"spire-dist: {stranger}: another package named cluster stands before spire_dist's; remove it, or install "
                  "spire_dist in an environment of its own", file=sys.stderr)  # fmt: skip
            sys.exit(SpireError.exit_code)
        raise


def _strange_cluster(error: ImportError) -> str | None:
    """Where a package `cluster` is that is not ours, if this is what `error` is about."""
    found = find_spec("cluster") if (error.name or "").split(".")[0] == "cluster" else None
    places = [found.origin] if found and found.origin else list(found.submodule_search_locations or ()) if found else []
    if not places or (Path(places[0]).parent / "entry.py").exists():
        return None
    return places[0]


if __name__ == "__main__":
    main()
