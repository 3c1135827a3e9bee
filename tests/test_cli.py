"""The command line: a user's mistake is one line and exit code 2; the whole way from a simulation to scores."""

import functools
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import starfile

from spire_dist import __version__
from spire_dist.cli import app, main
from spire_dist.results import report


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the console script's function; returns (exit code, standard output, standard error)."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["spire-dist", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            main()
        output, errors = capsys.readouterr()
        code = left.value.code
        return (code if isinstance(code, int) else 1 if code else 0), output, errors

    return run


@pytest.fixture
def mistake(command):
    """Runs a command that must end with code 2 and one line on standard error that holds all `expected`."""

    def run(words: list[object], *expected: object) -> None:
        code, _, errors = command(*words)
        assert code == 2, errors
        lines = errors.strip().splitlines()
        assert len(lines) == 1, errors
        assert lines[0].startswith("spire-dist: ")
        for word in expected:
            assert str(word) in lines[0]

    return run


def rewrite(star, change) -> None:
    """Change the particles table of a STAR file in place."""
    tables = starfile.read(star)
    tables["particles"] = change(tables["particles"])
    starfile.write(tables, star, overwrite=True)


def with_name(particles, row, name):
    particles.loc[row, "rlnImageName"] = name
    return particles


def with_value(particles, row, column, value):
    particles.loc[row, column] = value
    return particles


def test_the_version_is_told(command):
    assert command("--version")[:2] == (0, f"spire-dist {__version__}\n")


def test_every_verb_and_option_has_help(command):
    _, text, _ = command("--help")
    for verb in app.registered_commands:
        assert verb.callback is not None
        name = verb.name or verb.callback.__name__
        assert name in text
        code, own, _ = command(name, "--help")
        assert code == 0
        assert len(own) > 200


def test_an_unknown_option_is_told_without_traceback(command):
    code, _, errors = command("train", "--colour", "red")
    assert code == 2
    assert "--colour" in errors
    assert "Traceback" not in errors


SOURCE_MISTAKES = {
    "a missing stack": (lambda t: with_name(t, 3, "000001@stacks/none.mrcs"), ["none.mrcs"]),
    "a wrong slice": (lambda t: with_name(t, 3, "000099@stacks/part00.mrcs"), ["99", "part00.mrcs"]),
    "slice zero": (lambda t: with_name(t, 3, "000000@stacks/part00.mrcs"), ["0", "row 4"]),
    "a missing column": (lambda t: t.drop(columns="rlnDefocusU"), ["rlnDefocusU"]),
    "no image names": (lambda t: t.drop(columns="rlnImageName"), ["rlnImageName"]),
    "missing angles": (lambda t: t.drop(columns=["rlnAngleRot"]), ["rlnAngleRot"]),
    "a pose that is no number": (lambda t: with_value(t, 5, "rlnAngleTilt", np.nan), ["rlnAngleTilt", "row 6"]),
    "no rows": (lambda t: t.iloc[:0], []),
}


@pytest.mark.parametrize("name", SOURCE_MISTAKES)
def test_prep_tells_what_is_wrong_with_the_table(tmp_path, write_particles, mistake, name):
    change, words = SOURCE_MISTAKES[name]
    star = write_particles(tmp_path / "in")
    rewrite(star, change)
    mistake(["prep", star, tmp_path / "store"], "particles.star" if not words else "", *words)
    assert not (tmp_path / "store").exists()


def test_prep_tells_what_is_wrong_with_files(tmp_path, write_particles, mistake):
    star, store = write_particles(tmp_path / "in"), tmp_path / "store"
    mistake(["prep", tmp_path / "none.star", store], "none.star")
    (tmp_path / "empty.star").write_text("")
    mistake(["prep", tmp_path / "empty.star", store], "empty.star")
    (tmp_path / "prose.star").write_text("this is no table\n")
    mistake(["prep", tmp_path / "prose.star", store], "prose.star")
    (tmp_path / "binary.cs").write_bytes(b"\x00\xff" * 50)
    mistake(["prep", tmp_path / "binary.cs", store], "binary.cs")
    mistake(["prep", star, store, "--poses", tmp_path / "none.pkl"], "none.pkl")
    mistake(["prep", star, store, "--box", 64], "box", "64", "16")
    mistake(["prep", star, store, "--dtype", "int8"], "int8", "float16")
    mistake(["prep", star, store, "--sign", "up"], "up")
    mistake(["prep", star, tmp_path / "empty.star" / "store"], "empty.star")
    stack = tmp_path / "in" / "stacks" / "part01.mrcs"
    whole = stack.read_bytes()
    stack.write_bytes(whole[: len(whole) // 2])
    mistake(["prep", star, store], "part01.mrcs")
    stack.write_bytes(b"")
    mistake(["prep", star, store], "part01.mrcs")
    assert not store.exists()


def test_a_dry_run_says_what_it_takes_and_writes_nothing(tmp_path, write_particles, command):
    star = write_particles(tmp_path / "in", count=150, box=16)
    code, output, errors = command(
        "prep", star, tmp_path / "store", "--dry-run", "--images-per-shard", 64, "--workers", 2
    )
    assert (code, output) == (0, "")
    for words in ("150 images of 16 px", "0.1 MiB in 3 shard(s)", "0.1 MiB in 3 stack(s) to read", "for 2 process(es)"):
        assert words in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_a_dry_run_finds_what_prep_would_refuse(tmp_path, write_particles, mistake):
    star = write_particles(tmp_path / "in", noise=1.0, contrast=0.0)
    mistake(["prep", star, tmp_path / "store", "--dry-run"], star, "give the sign")


def test_checking_paths_lists_every_missing_stack(tmp_path, write_particles, command):
    star = write_particles(tmp_path / "in", count=200)
    assert command("prep", star, tmp_path / "store", "--check-paths")[:2] == (0, f"{star}: every stack is there\n")
    for name in ("part00", "part02"):
        (star.parent / "stacks" / f"{name}.mrcs").unlink()
    code, output, _ = command("prep", star, tmp_path / "store", "--check-paths")
    assert code == 2
    assert "2 of 4 stacks" in output
    assert output.count("missing: stacks/part0") == 2
    assert not (tmp_path / "store").exists()


def test_stacks_of_different_boxes_are_told(tmp_path, write_particles, mistake):
    star = write_particles(tmp_path / "in")
    with mrcfile.new(tmp_path / "in" / "stacks" / "part02.mrcs", overwrite=True) as mrc:
        mrc.set_data(np.zeros((30, 20, 20), dtype=np.float32))
    mistake(["prep", star, tmp_path / "store"], "part02.mrcs", "20")


def test_stores_are_made_of_stores_the_new_one_named_last(tmp_path, write_particles, command, mistake):
    stars = [write_particles(tmp_path / name, seed=seed) for seed, name in enumerate("abc")]
    stores = [tmp_path / f"{star.parent.name}.zarr" for star in stars]
    for star, store in zip(stars[:2], stores, strict=False):
        assert command("prep", star, store, "--sign", "+", "--workers", 1)[0] == 0
    out = [tmp_path / name for name in ("merged", "added", "near")]
    code, output, errors = command("merge", *stores[:2], out[0])
    assert (code, output) == (0, f"{out[0]}: 150 particles of a.zarr merged with 150 particles of b.zarr\n"), errors
    code, output, errors = command("add", out[0], stars[2], out[1], "--workers", 1)
    assert (code, output) == (0, f"{out[1]}: {stars[2]} added to 300 particles of merged\n"), errors
    code, output, _ = command("filter", out[1], out[2], "--query", "source == 2 and source_index < 9")
    assert (code, output) == (0, f"{out[2]}: 9 of 450 particles kept: source == 2 and source_index < 9\n")
    mistake(["merge", stores[0], tmp_path / "alone"], "1 store")
    mistake(["merge", stores[0], stores[0], tmp_path / "twice"], "150 of its particles")


@pytest.mark.parametrize("verb", ["inspect", "verify"])
def test_what_is_no_store_is_told(tmp_path, mistake, verb):
    mistake([verb, tmp_path], tmp_path, "not a particle store")


@pytest.mark.parametrize(
    "words", [["evaluate", "RUN", "TRUTH"], ["validate", "RUN"], ["export", "RUN", "OUT"], ["report", "RUN"]]
)
def test_what_is_no_run_is_told(tmp_path, mistake, words):
    mistake(
        [tmp_path / "none" if word == "RUN" else tmp_path / word if word.isupper() else word for word in words], "none"
    )


def test_train_tells_what_is_wrong_with_its_settings(tmp_path, tiny_store, mistake):
    config = tmp_path / "run.toml"
    train = ["train", config, "--run", tmp_path / "run", "--store", tiny_store]
    mistake(train, config, "cannot be read")
    config.write_text("[stage1]\nepoch = 3\n")
    mistake(train, config, "stage1.epoch", "epochs", "gaussians")
    config.write_text("[stage1\n")
    mistake(train, config, "TOML")
    config.write_text("")
    mistake([*train, "--set", "stage1.epochs=many"], "stage1.epochs", "many")
    mistake([*train, "--set", "stage1.epochs"], "stage1.epochs", "section.key=value")
    mistake([*train, "--set", "stage3.epochs=1"], "stage3", "stage1")
    mistake([*train, "--preset", "enormous"], "enormous", "demo")
    mistake(["train", config, "--run", tmp_path / "run", "--store", tmp_path / "none"], "none", "not a particle store")
    mistake(["train", config, "--run", config / "run", "--store", tiny_store], "run.toml")
    assert not (tmp_path / "run").exists()


def test_simulate_tells_what_is_wrong(tmp_path, mistake):
    out = tmp_path / "set"
    mistake(["simulate", out, "--box", 8], "box")
    mistake(["simulate", out, "--states", 3, "--proportions", "1,x"], "--proportions", "1,x")
    mistake(["simulate", out, "--model", tmp_path / "none.pdb"], "none.pdb")
    mistake(["simulate", out, "--snr", 0], "snr")
    assert not out.exists()
    out.mkdir()
    (out / "mine").write_text("")
    mistake(["simulate", out], "not an empty folder")


def test_fsc_tells_what_is_wrong_with_maps(tmp_path, mistake):
    for name, side, pixel_size in (("a", 16, 2.0), ("box", 20, 2.0), ("pixel", 16, 3.0)):
        with mrcfile.new(tmp_path / f"{name}.mrc") as mrc:
            mrc.set_data(np.random.default_rng(0).normal(size=(side,) * 3).astype(np.float32))
            mrc.voxel_size = pixel_size
    first = tmp_path / "a.mrc"
    mistake(["fsc", first, tmp_path / "none.mrc"], "none.mrc")
    mistake(["fsc", first, tmp_path / "box.mrc"], "box.mrc", "20")
    mistake(["fsc", first, tmp_path / "pixel.mrc"], "pixel.mrc", "3")


@pytest.fixture(scope="module", autouse=True)
def small_pictures():
    """The report's animation is what takes longest, and has tests of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write_report", functools.partial(report.write_report, frames=3, pixels=64))
        yield


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    """The folder in which the whole way was gone, and what each verb printed."""
    folder, printed = tmp_path_factory.mktemp("flow"), {}
    truth, store, run = folder / "truth", folder / "store", folder / "run"
    small = ["stage1.gaussians=64", "stage1.epochs=4", "stage2.gaussians=96", "stage2.epochs=2", "output.volumes=3",
             "stage2.distil_steps=20", "latent.dimension=2", "threads=1", "device=cpu", "parts.anchors=3"]  # fmt: skip
    commands = {
        "simulate": [truth, "--states", 4, "--particles", 200, "--box", 24, "--pixel-size", 16, "--resolution", 30,
                     "--snr", 1, "--shift-a", 16],
        "prep": [truth / "particles.star", store, "--sign", "+", "--labels", truth / "gt_latents.pkl"],
        "inspect": [store],
        "verify": [store],
        "train": ["--preset", "demo", "--store", store, "--run", run, *(w for s in small for w in ("--set", s))],
        "evaluate": [run, truth, "--images", 8],
        "validate": [run],
        "export": [run, folder / "out", "--frames", 4, "--particles", "0,7"],
        "report": [run],
        "fsc": [run / "volumes" / "consensus_half1.mrc", run / "volumes" / "consensus_half2.mrc"],
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for verb, words in commands.items():
            patch.setattr(sys, "argv", ["spire-dist", verb, *map(str, words)])
            log = folder / f"{verb}.txt"
            with open(log, "w") as file:
                patch.setattr(sys, "stdout", file)
                with pytest.raises(SystemExit) as left:
                    main()
                patch.setattr(sys, "stdout", sys.__stdout__)
            printed[verb] = log.read_text()
            assert left.value.code in (0, None), (verb, printed[verb])
    return folder, printed


def test_the_flow_leaves_all_the_files_that_it_promises(flow):
    folder, _ = flow
    for name in ("truth/particles.star", "store/manifest.json", "store.png", "run/latents.npy", "run/parts.npy",
                 "run/particles.star", "run/report.html", "run/evaluation.json", "run/evaluation.png", "run/STATUS.json",
                 "run/validation.json", "run/validation.png", "run/halves/2/latents.npy",
                 "run/volumes.csv", "run/parts.cif", "run/parts.cxc", "out/particles.star", "out/latents.csv"):  # fmt: skip
        assert (folder / name).stat().st_size > 0, name
    assert not list(folder.rglob("*partial*"))


def test_the_flow_says_what_it_did_and_what_comes_next(flow):
    folder, printed = flow
    assert "spire-dist prep" in printed["simulate"]
    assert "spire-dist inspect" in printed["prep"]
    assert "24" in printed["inspect"]
    assert printed["verify"].strip() == f"{folder / 'store'}: good"
    assert "report.html" in printed["train"]
    assert "volumes/path_002.mrc" in printed["validate"]
    assert "has not seen" in printed["validate"]
    assert "Å" in printed["fsc"]


def test_the_exported_maps_open_with_their_pixel_size(flow):
    maps = sorted((flow[0] / "out" / "volumes").glob("*.mrc"))
    assert len(maps) >= 6  # four on the path, two particles
    for path in maps:
        with mrcfile.open(path) as mrc:
            assert mrc.data.shape == (24, 24, 24)
            assert mrc.voxel_size.x == pytest.approx(16.0)


def test_the_particles_go_back_to_relion_row_for_row(flow):
    folder, _ = flow
    given, found = (
        starfile.read(folder / name)["particles"] for name in ("truth/particles.star", "out/particles.star")
    )
    assert list(given["rlnImageName"]) == list(found["rlnImageName"])
    assert len([column for column in found if column not in given]) >= 2


def test_the_scores_of_maps_and_parts_are_finite_numbers(flow):
    result = json.loads((flow[0] / "run" / "evaluation.json").read_text())
    assert result["parts"]
    assert "nan" not in json.dumps(result).lower()


def test_train_on_its_run_alone_goes_on_with_it(flow, command):
    folder, _ = flow
    code, output, errors = command("train", "--run", folder / "run")
    assert code == 0, errors
    assert "complete" in output


def test_train_writes_its_report_where_the_particles_file_has_changed(flow, mistake):
    folder, _ = flow
    star, page = folder / "truth" / "particles.star", folder / "run" / "report.html"
    before = star.read_bytes()
    page.unlink()
    try:
        star.write_bytes(before + b"\n")
        mistake(["train", "--run", folder / "run"], star, "has changed")
    finally:
        star.write_bytes(before)
    assert page.stat().st_size > 0


def test_a_damaged_store_fails_verification(flow, tmp_path, command):
    store = tmp_path / "store"
    shutil.copytree(flow[0] / "store", store)
    shard = store / "images" / "c" / "0" / "0" / "0"
    raw = bytearray(shard.read_bytes())
    raw[1000] ^= 1
    shard.write_bytes(bytes(raw))
    code, output, errors = command("verify", store)
    assert code == 2
    assert str(shard.relative_to(store)) in output
    assert "Traceback" not in errors


def test_verbs_tell_what_is_wrong_with_a_finished_run_s_options(flow, tmp_path, mistake):
    run = flow[0] / "run"
    mistake(["export", run, tmp_path / "out", "--particles", "0,999"], "999")
    mistake(["export", run, tmp_path / "out", "--path", "axis-9"], "axis-9")
    mistake(["export", run, tmp_path / "out", "--latents", tmp_path / "none.npy"], "none.npy")
    mistake(["evaluate", run, tmp_path], tmp_path)
    (tmp_path / "file").write_text("")
    mistake(["export", run, tmp_path / "file" / "out"], "file")
    labels = tmp_path / "labels.pkl"
    labels.write_bytes(pickle.dumps(np.zeros(3)))
    star = flow[0] / "truth" / "particles.star"
    mistake(["prep", star, tmp_path / "store", "--labels", labels], "labels.pkl", "3", "200")


def test_another_package_named_cluster_is_named(tmp_path: Path):
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "__init__.py").touch()
    # The finder of an editable installation would find our modules all the same.
    program = (
        "import sys; sys.meta_path = [finder for finder in sys.meta_path if 'ditable' not in repr(finder)]; "
        f"sys.path[:0] = [{str(tmp_path)!r}, {str(Path(__file__).parents[1])!r}]; "
        "from spire_dist.cli import main; main()"
    )
    for verb in (["status"], ["submit", "c.toml"]):
        result = subprocess.run([sys.executable, "-c", program, *verb], capture_output=True, text=True, check=False)
        assert result.returncode == 2, result.stderr
        assert result.stderr.startswith(f"spire-dist: {tmp_path}/cluster/__init__.py: another package named cluster")
        assert len(result.stderr.splitlines()) == 1
