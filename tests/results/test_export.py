"""What export writes is read back by the libraries of the field: mrcfile, starfile, gemmi, pandas."""

import dataclasses
import pickle
from pathlib import Path
from types import SimpleNamespace

import gemmi
import mrcfile
import numpy as np
import pandas as pd
import pytest
import starfile
from scipy.spatial.transform import Rotation

from data_prep.convert import prepare
from spire_dist.data.store import ParticleStore
from spire_dist.errors import ConfigError, SourceError
from spire_dist.physics.poses import random_rotations
from spire_dist.results import tables
from spire_dist.results.export import export
from spire_dist.star import read_blocks


@pytest.fixture(scope="module")
def exported(standin, tmp_path_factory):
    out = tmp_path_factory.mktemp("export")
    export(standin, out, frames=5, clusters=3, particles=[7])
    return out


def test_every_file_named_is_there_and_no_partial_one(standin, tmp_path):
    written = export(standin, tmp_path, frames=3)
    assert all(path.is_file() for path in written)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == set(written)


def test_maps_have_pixel_size_and_the_origin_of_the_consensus(standin, exported):
    for path in sorted((exported / "volumes").glob("*.mrc")):
        with mrcfile.open(path) as mrc:
            assert mrc.voxel_size.tolist() == (6.0, 6.0, 6.0)
            assert mrc.header.origin.tolist() == (0.0, 0.0, 0.0)
            assert (mrc.header.nxstart, mrc.header.nystart, mrc.header.nzstart) == (0, 0, 0)
            assert mrcfile.validate(path)


def test_map_of_a_particle_is_the_one_at_its_latent(standin, exported):
    row = np.flatnonzero(standin.store.source_index == 7)[0]
    with mrcfile.open(exported / "volumes/particle_0000007.mrc") as mrc:
        np.testing.assert_array_equal(mrc.data, standin.volume(standin.latents[row]))
    table = pd.read_csv(exported / "volumes.csv").set_index("map")
    assert table.loc["volumes/particle_0000007.mrc", "nearest_source_row"] == 7


def test_export_into_the_run_itself_leaves_its_consensus_alone(standin):
    before = standin.consensus.stat().st_mtime_ns
    written = export(standin, standin.directory, frames=2)
    assert standin.consensus in written
    assert standin.consensus.stat().st_mtime_ns == before


def test_atoms_lie_on_the_map_in_its_own_frame(standin, exported):
    structure = gemmi.read_structure(str(exported / "parts.cif"))
    assert len(structure) == 5
    found = np.array([[*atom.atom.pos.tolist()] for atom in structure[0].all()])
    table = pd.read_csv(exported / "volumes.csv")
    centres, _ = standin.decode(table.loc[[0], ["z1", "z2", "z3"]].to_numpy(np.float32))
    np.testing.assert_allclose(found, centres[0] + 16 * 6.0, atol=2e-3)  # middle of the box: voxel 16 at 6 Å
    with mrcfile.open(exported / "volumes/path_000.mrc") as mrc:
        nearest = np.rint(found / 6.0).astype(int)
        inside = mrc.data[nearest[:, 2], nearest[:, 1], nearest[:, 0]]
        assert inside.min() > 5 * np.median(mrc.data)


def test_atoms_carry_part_as_chain_and_b_factor(standin, exported):
    model = gemmi.read_structure(str(exported / "parts.cif"))[2]
    assert [chain.name for chain in model] == ["A", "B"]
    assert [len(chain) for chain in model] == [60, 30]
    assert {atom.atom.b_iso for atom in model.all() if atom.chain.name == "B"} == {1.0}
    script = (exported / "parts.cxc").read_text()
    assert "color #1/B" in script
    assert "volumes/path_004.mrc" in script


def test_latents_table_is_in_the_input_s_order(standin, exported):
    table = pd.read_csv(exported / "latents.csv")
    assert table["source_row"].tolist() == list(range(120))
    rows = np.argsort(standin.store.source_index)
    np.testing.assert_allclose(table[["z1", "z2", "z3"]], standin.latents[rows], rtol=1e-6)
    np.testing.assert_array_equal(np.load(exported / "latents.npy"), standin.latents)


def test_star_keeps_every_block_row_and_digit_and_adds_the_latents(standin, exported):
    source = standin.directory.parent / "truth" / "particles.star"
    text = {"rlnImageName", "rlnAngleRot", "rlnCtfMaxResolution", "rlnVoltage"}
    before, after = (
        starfile.read(p, always_dict=True, parse_as_string=list(text)) for p in (source, exported / "particles.star")
    )
    assert list(before) == list(after) == ["general", "optics", "particles"]
    assert after["general"] == before["general"]
    pd.testing.assert_frame_equal(after["optics"], before["optics"])
    pd.testing.assert_frame_equal(after["particles"][before["particles"].columns], before["particles"])
    columns = after["particles"][[f"rlnSpireLatent{i}" for i in (1, 2, 3)]]
    np.testing.assert_allclose(columns.to_numpy()[standin.store.source_index], standin.latents, rtol=1e-6)


def test_latents_of_an_earlier_export_are_replaced(standin, exported, tmp_path):
    tables.write_particles(
        tmp_path / "again.star", exported / "particles.star", standin.latents[:, :2], standin.store.source_index
    )
    again = starfile.read(tmp_path / "again.star", always_dict=True)["particles"]
    assert [c for c in again.columns if "Latent" in c] == ["rlnSpireLatent1", "rlnSpireLatent2"]


def test_rows_left_out_of_the_store_stay_in_the_star_without_a_latent(standin, tmp_path):
    source = standin.directory.parent / "truth" / "particles.star"
    tables.write_particles(tmp_path / "p.star", source, np.float32([[1], [2]]), np.array([5, 0]))
    column = starfile.read(tmp_path / "p.star", always_dict=True)["particles"]["rlnSpireLatent1"]
    assert (len(column), column[0], column[5], column.isna().sum()) == (120, 2, 1, 118)


UIDS = np.arange(70, dtype=np.uint64) + 2**63
CS_COLUMNS = {
    "uid": UIDS,
    "blob/path": np.array([b">stacks/part00.mrcs"] * 60 + [b"stacks/part01.mrcs"] * 10),
    "blob/idx": np.r_[0:60, 0:10].astype(np.uint32),
    "blob/psize_A": np.full(70, 2, dtype=np.float32),
    "alignments3D/pose": np.zeros((70, 3), dtype=np.float32),
    "alignments3D/shift": np.zeros((70, 2), dtype=np.float32),
    "alignments3D/psize_A": np.full(70, 2, dtype=np.float32),
}


def write_cs(path: Path, columns: dict[str, np.ndarray]) -> Path:
    rows = np.zeros(70, dtype=[(name, values.dtype, values.shape[1:]) for name, values in columns.items()])
    for name, values in columns.items():
        rows[name] = values
    with open(path, "wb") as file:
        np.save(file, rows)
    return path


@pytest.mark.filterwarnings("ignore:Stored array in format 2.0")
@pytest.mark.parametrize("kind", ["usual", "passthrough first", "long header", "wide text"])
def test_every_cs_file_that_prep_reads_becomes_a_star_of_its_images(tmp_path, write_particles, kind):
    folder = write_particles(tmp_path / "in").parent
    columns, passthrough = dict(CS_COLUMNS), []
    if kind == "passthrough first":
        blob = {name: columns.pop(name)[::-1] for name in list(columns) if name.startswith("blob")}
        passthrough = [write_cs(folder / "blob.cs", {"uid": UIDS[::-1]} | blob)]
    elif kind == "long header":
        columns |= {f"alignments_class_{i:03d}/cross_cor": np.zeros(70, dtype=np.float32) for i in range(400)}
    elif kind == "wide text":
        columns["blob/path"] = columns["blob/path"].astype(str)
    cs = write_cs(folder / "particles.cs", columns)
    options = {"passthrough": passthrough, "no_ctf": True, "sign": "+", "workers": 1}
    store = ParticleStore.open(prepare(cs, tmp_path / "store", **options))
    latents = np.stack([store.source_index, store.stack], axis=1).astype(np.float32)
    (tmp_path / "in/particles.cs").unlink()  # nothing is read from it again
    [path] = tables.write_all_particles(tmp_path, tables.source_paths(store), store, latents)
    written = starfile.read(path, parse_as_string=["spireCryosparcUid"])
    names = [f"{i + 1:06d}@{folder}/stacks/part{stack}.mrcs" for stack, n in (("00", 60), ("01", 10)) for i in range(n)]
    assert written["rlnImageName"].tolist() == names
    assert written["spireCryosparcUid"].tolist() == [str(uid) for uid in UIDS]
    assert written["rlnSpireLatent1"].tolist() == list(range(70))

    rotations, shifts = random_rotations(70, seed=1), np.random.default_rng(1).normal(0, 5, (70, 2))
    sources = tables.source_paths(store)
    [path] = tables.write_all_particles(tmp_path, sources, store, latents, (rotations, shifts.astype(np.float32)))
    again = ParticleStore.open(
        prepare(path, tmp_path / "again", no_ctf=True, sign="+", workers=1, pixel_size=2.0, shuffle=False)
    )
    order = np.argsort(store.source_index)
    np.testing.assert_allclose(again.rotations, rotations[order], atol=2e-6)
    np.testing.assert_allclose(again.shifts, shifts[order], rtol=1e-5, atol=1e-5)


def test_stacks_with_blanks_or_other_letters_in_their_names_are_written(tmp_path):
    stacks = [{"path": "/my dir/a.mrcs"}, {"path": "/\udcff/\u00e5.mrcs"}]
    store = SimpleNamespace(
        sources=[Path("a.cs")], source=np.array([0, 0]), source_index=np.array([1, 0]), stack=np.array([0, 1]),
        slice=np.array([3, 4]), uid=None, read_stacks=lambda: stacks,
    )  # fmt: skip
    [path] = tables.write_all_particles(tmp_path, store.sources, store, np.float32([[1], [2]]))
    rows = path.read_bytes().splitlines()[-2:]
    assert rows == [b"000005@/\xff/\xc3\xa5.mrcs 2", b'"000004@/my dir/a.mrcs" 1']
    assert read_blocks(path, {"rlnImageName": str})["particles"]["rlnImageName"].tolist() == [
        "000005@/\udcff/\u00e5.mrcs", "000004@/my dir/a.mrcs"
    ]  # fmt: skip


def test_a_star_is_copied_to_the_byte_but_for_the_latents(tmp_path):
    """Comments, blanks, quotes, line ends, other blocks and what RELION does not know."""
    source, out = tmp_path / "in.star", tmp_path / "out.star"
    before = "# made by hand\n\ndata_optics\r\nloop_\n_rlnVoltage\n300.0 # volts?\n\ndata_particles\n\nloop_ \n"
    rows = ["'1@my dir/o\"brien.mrcs'   0.10\t", "2@a#b.mrcs 1e-3"]
    after = "\n\ndata_last\n\n_rlnNote 'two  words'"
    labels = "_rlnImageName #1\n_rlnOriginX #2\n"
    source.write_bytes((before + labels + rows[0] + "\r\n\n" + rows[1] + "\n" + after).encode())
    tables.write_particles(out, source, np.float32([[1], [2.5]]), np.array([1, 0]))
    expected = before + labels + "_rlnSpireLatent1 #3\n" + rows[0].rstrip() + " 2.5\n\n2@a#b.mrcs 1e-3 1\n" + after
    assert out.read_bytes() == expected.encode()
    tables.write_particles(tmp_path / "again.star", out, np.float32([[7], [8]]), np.array([0, 1]))
    again = (tmp_path / "again.star").read_text()
    assert "0.10 7\n" in again
    assert "1e-3 8\n" in again
    assert again.count("_rlnSpireLatent1 #3") == 1


def test_latents_reach_the_rows_however_the_table_is_written(tmp_path):
    latents, order = np.float32([[1, 2.5], [3, 4]]), np.array([0, 1])
    usual = "data_particles\n\nloop_\n_rlnImageName #1\n_rlnOriginX #2\n1@a.mrcs 0.5\n_2@a.mrcs 1e-3\n"
    source, out = tmp_path / "in.star", tmp_path / "out.star"
    for text in (usual, usual.replace("loop_", "LOOP_"), "\ufeff" + usual, usual.replace("data_", "DATA_")):
        source.write_text(text)
        tables.write_particles(out, source, latents, order)
        columns = read_blocks(out, dict.fromkeys(["rlnSpireLatent1", "rlnSpireLatent2"], float))["particles"]
        assert [column.tolist() for column in columns.values()] == [[1, 3], [2.5, 4]]
        assert out.read_text().endswith("1@a.mrcs 0.5 1 2.5\n_2@a.mrcs 1e-3 3 4\n")


def test_a_table_of_one_row_without_loop_takes_its_latents_as_pairs(tmp_path):
    source, out, again = tmp_path / "in.star", tmp_path / "out.star", tmp_path / "again.star"
    source.write_text("data_optics\n_rlnVoltage 300\n\ndata_particles\n\n_rlnImageName 1@a.mrcs\n_rlnOriginX 0.5\n")
    tables.write_particles(out, source, np.float32([[1, 2.5]]), np.array([0]))
    assert starfile.read(out, always_dict=True)["particles"] == {
        "rlnSpireLatent1": 1, "rlnSpireLatent2": 2.5, "rlnImageName": "1@a.mrcs", "rlnOriginX": 0.5
    }  # fmt: skip
    tables.write_particles(again, out, np.float32([[7]]), np.array([0]))
    assert again.read_text() == source.read_text().replace("_rlnImageName", "_rlnSpireLatent1 7\n_rlnImageName")


def test_a_star_that_grows_or_shrinks_while_it_is_copied_is_refused(tmp_path, refusal, monkeypatch):
    source, out = tmp_path / "in.star", tmp_path / "out.star"
    source.write_text("data_particles\nloop_\n_rlnImageName\n1@a.mrcs\n2@a.mrcs\n")
    for count in (1, 3):
        monkeypatch.setattr(tables, "_particle_block", lambda _, count=count: ("particles", count))
        refusal(SourceError, ["in.star", "changed"],
                lambda: tables.write_particles(out, source, np.float32([[1]]), np.array([0])))  # fmt: skip
        assert not out.exists()


ROW = {"rlnImageName": "a.mrcs", "rlnAngleRot": 1.0, "rlnAngleTilt": 2.0, "rlnAnglePsi": 3.0, "rlnNote": "'two words'"}
ORIGINS = {
    "angst": {"rlnOriginXAngst": 5.0, "rlnOriginYAngst": 6.0},
    "px": {"rlnOriginX": 5.0, "rlnOriginY": 6.0},
    "none": {},
}


@pytest.mark.parametrize("origins", ORIGINS)
@pytest.mark.parametrize("without", [(), ("rlnAngleTilt",)], ids=["all angles", "no tilt"])
def test_refined_poses_stand_in_their_own_columns(tmp_path, origins, without):
    """In place of the given ones, with the unit that the file has; a row that is not in the store keeps its cells."""
    rows = [{k: v for k, v in (ROW | ORIGINS[origins]).items() if k not in without}] * 3
    columns = list(rows[0])
    source, out = tmp_path / "in.star", tmp_path / "out.star"
    heading = "".join(f"_{label} #{i + 1}\n" for i, label in enumerate(columns))
    lines = [" ".join(str(row[c]) for c in columns) for row in rows]
    source.write_text(f"data_particles\n\nloop_\n{heading}" + "\n".join(lines) + "\n")
    rotations, shifts = random_rotations(2, seed=4), np.float32([[1, -2], [3, 4]])
    refined = tables.pose_columns(rotations, shifts, np.array([2.0, 4.0]))
    tables.write_particles(out, source, np.float32([[7], [8]]), np.array([2, 0]), refined)

    text = out.read_text().splitlines()
    assert text[-2].split()[: len(columns) + 1] == lines[1].split()[: len(columns) + 1]
    table = starfile.read(out, always_dict=True)["particles"]
    new = [*(["rlnAngleTilt"] if without else []), *(ORIGINS["angst"] if origins == "none" else [])]
    assert list(table.columns) == [*columns, *new, "rlnSpireLatent1"]
    angles = table[["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]].to_numpy()[[2, 0]]
    turned = Rotation.from_euler("ZYZ", angles, degrees=True).as_matrix().swapaxes(1, 2)
    np.testing.assert_allclose(turned, rotations, atol=1e-6)
    found = table[list(ORIGINS["px" if origins == "px" else "angst"])].to_numpy()[[2, 0]]
    np.testing.assert_allclose(found, -shifts / ([[2], [4]] if origins == "px" else 1), atol=1e-6)


def test_the_refined_pose_of_a_table_of_one_row_takes_the_place_of_the_given_one(tmp_path):
    source, out = tmp_path / "in.star", tmp_path / "out.star"
    source.write_text("data_particles\n\n_rlnImageName 1@a.mrcs\n_rlnAnglePsi 3\n_rlnAngleRot 1\n_rlnAngleTilt 2\n")
    angles = np.array([[10.0, 20, 30]])
    rotations = Rotation.from_euler("ZYZ", angles, degrees=True).as_matrix().swapaxes(1, 2)
    refined = tables.pose_columns(rotations, np.array([[1.5, 2.5]]), np.ones(1))
    tables.write_particles(out, source, np.float32([[7]]), np.array([0]), refined)
    assert starfile.read(out, always_dict=True)["particles"] == pytest.approx({
        "rlnOriginXAngst": -1.5, "rlnOriginYAngst": -2.5, "rlnSpireLatent1": 7, "rlnImageName": "1@a.mrcs",
        "rlnAnglePsi": 30, "rlnAngleRot": 10, "rlnAngleTilt": 20,
    })  # fmt: skip


def test_the_tilts_of_a_particle_give_it_their_mean(tmp_path):
    source = tmp_path / "in.star"
    starfile.write({"particles": pd.DataFrame({"rlnImageName": ["a.mrcs", "b.mrcs", "c.mrcs"]})}, source)
    latents = np.float32([[1, 0], [4, 2], [3, 4], [6, 6]])
    tables.write_particles(tmp_path / "out.star", source, latents, np.array([2, 0, 2, 2]))
    table = starfile.read(tmp_path / "out.star", always_dict=True)["particles"]
    np.testing.assert_allclose(table["rlnSpireLatent1"], [4, np.nan, 10 / 3], rtol=1e-6)
    np.testing.assert_allclose(table["rlnSpireLatent2"], [2, np.nan, 10 / 3], rtol=1e-6)


def test_a_store_of_several_files_gives_each_its_own_star(tmp_path, recorded):
    files = [tmp_path / "a.star", tmp_path / "b.star"]
    for path in files:
        starfile.write({"particles": pd.DataFrame({"rlnImageName": ["1@a.mrcs", "2@a.mrcs"]})}, path)
    store = SimpleNamespace(
        sources=files, source=np.array([1, 0, 1, 0]), source_index=np.array([0, 1, 1, 0]), label=np.array([5, 6, 7, 8]),
        attributes={"inputs": [recorded(path) for path in files]},
    )  # fmt: skip
    latents = np.float32([[10], [20], [30], [40]])
    written = tables.write_all_particles(tmp_path, tables.source_paths(store), store, latents)
    assert [path.name for path in written] == ["particles-1.star", "particles-2.star"]
    for path, column in zip(written, ([40, 20], [10, 30]), strict=True):
        assert starfile.read(path)["rlnSpireLatent1"].tolist() == column
    tables.write_latents_csv(tmp_path / "latents.csv", store, latents)
    table = pd.read_csv(tmp_path / "latents.csv")
    assert list(table.columns) == ["source", "source_row", "z1", "label"]
    assert table.to_numpy().tolist() == [[1, 0, 40, 8], [1, 1, 20, 6], [2, 0, 10, 5], [2, 1, 30, 7]]
    with pytest.raises(ConfigError, match="1 files for a store made of 2"):
        tables.source_paths(store, files[:1])


def test_input_that_moved_is_named_before_anything_is_written(standin, tmp_path):
    with pytest.raises(
        SourceError, match=r"gone\.star: the particles' own file is not there; name its new place with --source"
    ):
        export(standin, tmp_path / "out", source=tmp_path / "gone.star")
    assert not (tmp_path / "out").exists()


def test_input_that_changed_is_refused_and_an_equal_copy_is_not(standin, tmp_path, refusal):
    source = standin.store.sources[0]
    lines = source.read_text().splitlines(keepends=True)
    equal, swapped, longer = (tmp_path / f"{name}.star" for name in ("equal", "swapped", "longer"))
    equal.write_text("".join(lines))
    swapped.write_text("".join([*lines[:-2], lines[-1], lines[-2]]))
    longer.write_text("".join([*lines, lines[-1]]))
    for changed in (swapped, longer):
        words = [changed.name, "has changed", "--source", f"{source.stat().st_size} bytes"]
        refusal(SourceError, words, lambda changed=changed: export(standin, tmp_path / "out", source=changed))
        assert not (tmp_path / "out").exists()
    assert tables.source_paths(standin.store, [equal]) == [equal]


def test_all_but_the_star_is_written_where_the_input_has_changed_meanwhile(standin, tmp_path, refusal):
    changed, out = tmp_path / "changed.star", tmp_path / "out"
    changed.write_text(standin.store.sources[0].read_text() + "\n")
    refusal(SourceError, ["has changed"], lambda: export(standin, out, frames=2, star=None, source=changed))
    assert {path.name for path in out.iterdir()} == {
        "volumes", "volumes.csv", "latents.npy", "latents.csv", "parts.cif", "parts.cxc"
    }  # fmt: skip
    written = export(standin, tmp_path / "gone", frames=2, star=None, source=tmp_path / "gone.star")
    assert "particles.star" not in {path.name for path in written}


def test_rows_of_several_files_are_told_apart_or_refused(standin, tmp_path, refusal):
    index = standin.store.source_index
    two = SimpleNamespace(**vars(standin.store) | {
        "sources": [*standin.store.sources, Path("b.star")], "source": (index >= 60).astype(np.int32),
        "source_index": index % 60,
    })  # fmt: skip
    run = dataclasses.replace(standin, store=two)
    refusal(ConfigError, ["row 7", "which file", "2"],
            lambda: export(run, tmp_path / "out", particles=[7], star=False))  # fmt: skip
    np.save(tmp_path / "points.npy", standin.latents[index == 67])
    export(run, tmp_path / "out", path=None, latents=tmp_path / "points.npy", star=False, atoms=False)
    [row] = pd.read_csv(tmp_path / "out/volumes.csv").to_dict("records")
    assert (row["nearest_source"], row["nearest_source_row"]) == (2, 7)


def test_input_with_fewer_rows_than_the_store_is_refused(standin, tmp_path):
    short = tmp_path / "short.star"
    starfile.write({"particles": pd.DataFrame({"rlnImageName": ["1@a.mrcs", "2@a.mrcs"]})}, short)
    with pytest.raises(SourceError, match="2 particles, the store refers to row 119; it has changed since"):
        tables.write_particles(tmp_path / "p.star", short, standin.latents, standin.store.source_index)
    assert not (tmp_path / "p.star").exists()


def test_particle_outside_the_store_is_refused(standin, tmp_path):
    with pytest.raises(ConfigError, match="row 4000 is not in the store"):
        export(standin, tmp_path / "out", particles=[4000])


def test_particles_of_a_list_of_stacks_get_a_star_of_their_images(tmp_path, write_particles):
    star = write_particles(tmp_path / "in", count=130)
    (star.parent / "stacks.txt").write_text("stacks/part02.mrcs\nstacks/part00.mrcs\n")
    poses = np.tile(np.eye(3, dtype=np.float32), (70, 1, 1))
    with open(tmp_path / "poses.pkl", "wb") as file:
        pickle.dump(poses, file)
    store = ParticleStore.open(
        prepare(
            star.parent / "stacks.txt", tmp_path / "store", poses=tmp_path / "poses.pkl", no_ctf=True, pixel_size=2.0
        )
    )
    latents = np.stack([store.source_index, store.stack], axis=1).astype(np.float32)
    [path] = tables.write_all_particles(tmp_path, store.sources, store, latents)
    written = starfile.read(path)
    assert written["rlnSpireLatent1"].tolist() == list(range(70))
    paths = [f"{star.parent}/stacks/part{n}.mrcs" for n in ("02", "00")]
    expected = [f"{i + 1:06d}@{paths[0]}" for i in range(10)] + [f"{i + 1:06d}@{paths[1]}" for i in range(60)]
    assert written["rlnImageName"].tolist() == expected
