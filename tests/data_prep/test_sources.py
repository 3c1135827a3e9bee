"""Particle tables against what other programs made of the same files, and refusals of files that lack something."""

import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import starfile
from hypothesis import given
from hypothesis import strategies as st

from data_prep.relion import read_star
from data_prep.sources import read_particles
from spire_dist.errors import ConfigError, SourceError

PARTICLES = "particles/ml-struct-bio+cryodrgn/tests/data"
METADATA = "metadata/ml-struct-bio+cryodrgn/tests/data"
PFCRT = f"{METADATA}/FinalRefinement-OriginalParticles-PfCRT.star"


def _unpickle(path: Path):
    return pickle.loads(path.read_bytes())


def _rewritten(star: Path, edit) -> Path:
    """A STAR file beside `star` with blocks changed by `edit`."""
    blocks = starfile.read(star, always_dict=True)
    edit(blocks)
    path = star.with_name("edited.star")
    starfile.write(blocks, path)
    return path


# --- poses and CTF that cryoDRGN made of the same files --------------------------------------------------------------


def test_relion_3_0_poses_equal_cryodrgns(shared_data):
    table = read_particles(shared_data / PFCRT, no_ctf=True)  # this file has no amplitude contrast
    rotations, centring = _unpickle(shared_data / PARTICLES / "pose.star.pkl")
    np.testing.assert_allclose(table.rotations, rotations, atol=1e-6)
    np.testing.assert_allclose(table.pixel_size_a, 1.035)  # 1.035 µm / 10,000
    # cryoDRGN's t is the origin as a fraction of the 300 px box, ours is where the molecule lies, in Å
    np.testing.assert_allclose(table.shifts_a, -centring * 300 * 1.035, atol=1e-6)


def test_relion_ctf_equals_cryodrgns(shared_data, tmp_path):
    source = tmp_path / "PfCRT.star"
    source.write_bytes((shared_data / PFCRT).read_bytes())
    expected = _unpickle(shared_data / PARTICLES / "ctf1.pkl")  # made with the amplitude contrast given by hand

    def add_amplitude_contrast(blocks):
        blocks["images"]["rlnAmplitudeContrast"] = 0.1

    table = read_particles(_rewritten(source, add_amplitude_contrast))
    np.testing.assert_allclose(table.ctf[:, :7], expected[:, 2:], rtol=1e-6)


def test_star_without_numbers_after_its_labels_gives_cryodrgns_ctf(shared_data):
    table = read_particles(shared_data / PARTICLES / "toy_projections.star", pixel_size=1.0)
    expected = _unpickle(shared_data / PARTICLES / "test_ctf.pkl")
    np.testing.assert_allclose(table.ctf[:, :7], expected[:, 2:], rtol=1e-6)
    assert table.rotations is None


def test_star_and_cs_of_the_same_particles_agree(shared_data):
    star = read_particles(shared_data / PARTICLES / "empiar_10076_7.star")
    cs = read_particles(shared_data / PARTICLES / "empiar_10076_7.cs")
    np.testing.assert_allclose(star.ctf, cs.ctf, rtol=1e-6)
    np.testing.assert_allclose(star.pixel_size_a, cs.pixel_size_a, rtol=1e-5)
    np.testing.assert_array_equal(star.slice_index, np.arange(7))
    np.testing.assert_array_equal(cs.slice_index, np.arange(7))
    assert star.image_paths == cs.image_paths == ["empiar_10076_7.mrc"]
    assert cs.sign_hint == -1


# --- RELION 3.1 and 5 ------------------------------------------------------------------------------------------------


def _passive(axis: str, degrees: float) -> np.ndarray:
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    return np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]] if axis == "z" else [[c, 0, -s], [0, 1, 0], [s, 0, c]])


def test_relion_5_poses_are_psi_tilt_rot_of_passive_turns(shared_data):
    table = read_particles(shared_data / METADATA / "relion5.star")
    row = 3  # 4@toy_images_a.mrcs: rot 68.363943, tilt 125.756961, psi 119.985176, origin (-0.45578, 3.516956) Å
    expected = _passive("z", 119.985176) @ _passive("y", 125.756961) @ _passive("z", 68.363943)
    assert len(table) == 17
    np.testing.assert_allclose(table.rotations[row], expected, atol=1e-6)
    np.testing.assert_allclose(table.shifts_a[row], [0.45578, -3.516956], atol=1e-6)
    np.testing.assert_allclose(
        table.ctf[row], [11928.543726, 11779.975684, 49.059993, 100, 1.6, 0.1, 0, 0, 1], rtol=1e-6
    )
    assert (table.slice_index[row], table.image_paths[table.image_file[row]]) == (3, "toy_images_a.mrcs")
    assert table.ignored == ["anisotropic magnification", "beam tilt", "even aberrations", "odd aberrations"]


def test_an_optics_table_after_the_particles_changes_nothing(shared_data):
    before = read_particles(shared_data / PARTICLES / "relion31.star")
    after = read_particles(shared_data / PARTICLES / "relion31.v2.star")
    np.testing.assert_array_equal(before.ctf, after.ctf)
    np.testing.assert_array_equal(before.rotations, after.rotations)
    np.testing.assert_array_equal(before.pixel_size_a, np.full(5, 2.806))
    np.testing.assert_array_equal(after.pixel_size_a, np.full(5, 2.806))


def test_six_optics_groups_give_each_particle_its_own_pixel_size_and_cs(shared_data):
    path = shared_data / METADATA / "relion31.6opticsgroups.star"
    table = read_particles(path)
    pixel_size = {1: 1.25, 2: 1.24, 3: 1.25, 4: 1.25, 5: 1.24, 6: 1.25}  # as read off the file
    cs_mm = {1: 2.7, 2: 2.7, 3: 2.7, 4: 2.6, 5: 2.7, 6: 2.7}
    numbers = starfile.read(path)["particles"]["rlnOpticsGroup"]
    assert len(set(numbers)) > 1
    np.testing.assert_allclose(table.pixel_size_a, numbers.map(pixel_size))
    np.testing.assert_allclose(table.ctf[:, 4], numbers.map(cs_mm), rtol=1e-6)
    names = ["opticsGroup5", "opticsGroup3", "opticsGroup2", "opticsGroup1", "opticsGroup4", "opticsGroup6"]
    assert [table.optics_names[g] for g in table.optics_group] == [names[n - 1] for n in numbers]


def test_optics_groups_are_joined_by_number_not_by_order(shared_data, tmp_path):
    source = tmp_path / "six.star"
    source.write_bytes((shared_data / METADATA / "relion31.6opticsgroups.star").read_bytes())

    def reverse(blocks):
        blocks["optics"] = blocks["optics"].iloc[::-1]

    one, other = read_particles(source), read_particles(_rewritten(source, reverse))
    np.testing.assert_array_equal(one.ctf, other.ctf)
    np.testing.assert_array_equal(one.pixel_size_a, other.pixel_size_a)


def test_origins_in_pixels_use_the_pixel_size_and_origins_in_angstrom_win(tmp_path, write_particles):
    star = write_particles(tmp_path, count=2, pixel_size=2.0)

    def pixels(blocks):
        particles = blocks["particles"].drop(columns=["rlnOriginXAngst", "rlnOriginYAngst"])
        blocks["particles"] = particles.assign(rlnOriginX=[3.0, 0.0], rlnOriginY=[-1.5, 0.0])

    def both(blocks):
        blocks["particles"] = blocks["particles"].assign(rlnOriginXAngst=1.0, rlnOriginYAngst=2.0, rlnOriginX=50.0)

    np.testing.assert_allclose(read_particles(_rewritten(star, pixels)).shifts_a[0], [-6.0, 3.0])
    np.testing.assert_allclose(read_particles(_rewritten(star, both)).shifts_a[0], [-1.0, -2.0])


@given(
    number=st.integers(1, 10**6),
    padded=st.booleans(),
    stack=st.text(st.characters(codec="utf-8", exclude_characters="\"'#", exclude_categories=["Z", "C"]), min_size=1),
)
def test_any_path_after_the_last_at_sign_is_the_stack(number, padded, stack, tmp_path_factory):
    stack = stack.replace("@", "at").lstrip("_;$") or "a"
    name = f"{number:06d}@dir/{stack}" if padded else f"{number}@dir/{stack}"
    star = tmp_path_factory.mktemp("paths") / "a.star"
    starfile.write(pd.DataFrame({"rlnImageName": [name]}), star)
    table = read_star(star, pixel_size=1.0, no_ctf=True)
    assert (table.slice_index[0], table.image_paths) == (number - 1, [f"dir/{stack}"])


# --- refusals --------------------------------------------------------------------------------------------------------


def _without(block, column):
    def edit(blocks):
        blocks[block] = blocks[block].drop(columns=column)

    return edit


def _with(block, column, row, value):
    def edit(blocks):
        blocks[block] = blocks[block].assign(**{column: blocks[block][column].astype(object)})
        blocks[block].loc[row, column] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (_without("particles", "rlnDefocusU"), ["rlnDefocusU", "missing"]),
        (_without("optics", "rlnVoltage"), ["rlnVoltage", "missing"]),
        (_without("optics", "rlnSphericalAberration"), ["rlnSphericalAberration", "missing"]),
        (_without("particles", "rlnImageName"), ["no particles", "data_optics"]),
        (_without("optics", "rlnImagePixelSize"), ["no pixel size", "pixel_size"]),
        (_with("particles", "rlnAngleTilt", 6, "nan"), ["rlnAngleTilt", "row 7"]),
        (_with("particles", "rlnDefocusV", 3, "inf"), ["rlnDefocusV", "row 4"]),
        (_with("particles", "rlnOpticsGroup", 2, 9), ["row 3", "optics group 9", "lists 1"]),
        (_with("particles", "rlnImageName", 1, "0@a.mrcs"), ["row 2", "'0@a.mrcs'"]),
        (_with("particles", "rlnImageName", 1, "x@a.mrcs"), ["row 2", "'x@a.mrcs'"]),
        (_with("optics", "rlnImagePixelSize", 0, 0.002), ["pixel size 0.002", "row 1"]),
    ],
)
def test_a_star_file_that_lacks_something_is_refused_by_column_or_row(tmp_path, write_particles, refusal, edit, words):
    star = _rewritten(write_particles(tmp_path, count=10), edit)
    refusal(SourceError, [str(star), *words], lambda: read_particles(star))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["no particles"]),
        ("data_particles\n\nloop_\n_rlnImageName #1\n_rlnDefocusU #2\n", ["no "]),
        ("this is not a STAR file\n", ["no particles"]),
    ],
)
def test_an_empty_star_file_is_refused(tmp_path, refusal, text, words):
    star = tmp_path / "empty.star"
    star.write_text(text)
    refusal(SourceError, [str(star), *words], lambda: read_particles(star))


def test_subtomograms_are_refused_by_name(shared_data, refusal):
    volumes = shared_data / "metadata/turonova+cryoCAT/tests/test_data/motl_data/relion_3.1_optics2.star"
    refusal(SourceError, ["rlnImageDimensionality", "subtomograms"], lambda: read_particles(volumes))


def test_a_star_file_without_amplitude_contrast_is_refused_by_that_name(shared_data, refusal):
    refusal(SourceError, ["rlnAmplitudeContrast", "missing"], lambda: read_particles(shared_data / PFCRT))


@pytest.mark.parametrize(
    ("name", "words"), [("a.pdf", ["unknown kind '.pdf'", ".star", ".mrcs"]), ("b.cs", ["not a cryoSPARC table"])]
)
def test_a_file_of_another_kind_is_refused(tmp_path, refusal, name, words):
    path = tmp_path / name
    path.write_text("hello")
    refusal(SourceError, [str(path), *words], lambda: read_particles(path))


def test_a_source_that_does_not_exist_is_refused(tmp_path, refusal):
    refusal(SourceError, ["no such file"], lambda: read_particles(tmp_path / "absent.star"))


def test_the_ending_of_a_name_may_be_in_capitals(tmp_path, write_particles):
    star = write_particles(tmp_path, count=3)
    assert len(read_particles(star.rename(star.with_suffix(".STAR")))) == 3


def test_options_that_do_not_go_together_are_refused(tmp_path, write_particles, refusal):
    star = write_particles(tmp_path, count=3)
    one, two = tmp_path / "a.cs", tmp_path / "ctf.pkl"
    refusal(ConfigError, ["passthrough", "particles.star"], lambda: read_particles(star, passthrough=[one]))
    refusal(ConfigError, ["ctf", "no_ctf"], lambda: read_particles(star, ctf=two, no_ctf=True))
