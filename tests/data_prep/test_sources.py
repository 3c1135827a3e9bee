"""What is common to all particle files: the same particles agree, and what cannot be read is refused by name."""

import numpy as np
import pytest

from data_prep.sources import read_particles
from spire_dist.errors import ConfigError, SourceError

PARTICLES = "particles/ml-struct-bio+cryodrgn/tests/data"


def test_star_and_cs_of_the_same_particles_agree(shared_data):
    star = read_particles(shared_data / PARTICLES / "empiar_10076_7.star")
    cs = read_particles(shared_data / PARTICLES / "empiar_10076_7.cs")
    np.testing.assert_allclose(star.ctf, cs.ctf, rtol=1e-6)
    np.testing.assert_allclose(star.pixel_size_a, cs.pixel_size_a, rtol=1e-5)
    np.testing.assert_array_equal(star.slice_index, np.arange(7))
    np.testing.assert_array_equal(cs.slice_index, np.arange(7))
    assert star.image_paths == cs.image_paths == ["empiar_10076_7.mrc"]
    assert cs.sign_hint == -1


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
    refusal(ConfigError, ["tomograms", "no tilt series"], lambda: read_particles(star, tomograms=one))
