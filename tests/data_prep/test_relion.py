"""RELION's STAR files: against what cryoDRGN made of the same files, against the file as written, and refusals by row."""

import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import starfile
from hypothesis import example, given
from hypothesis import strategies as st

from data_prep.relion import read_star
from data_prep.sources import read_particles
from spire_dist.errors import SourceError
from spire_dist.star import ROWS_AT_ONCE, Columns, numbers, read_blocks

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


def test_an_optics_group_that_is_listed_twice_is_refused(tmp_path, write_particles, refusal):
    def twice(blocks):
        blocks["optics"] = pd.concat([blocks["optics"]] * 2)

    star = _rewritten(write_particles(tmp_path, count=3), twice)
    refusal(SourceError, [str(star), "optics group 1 twice"], lambda: read_particles(star))


def test_a_defocus_without_its_second_axis_has_no_astigmatism(tmp_path, write_particles):
    def drop(blocks):
        blocks["particles"] = blocks["particles"].drop(columns=["rlnDefocusV", "rlnDefocusAngle"])

    ctf = read_particles(_rewritten(write_particles(tmp_path, count=3), drop)).ctf
    np.testing.assert_array_equal(ctf[:, 0], ctf[:, 1])
    np.testing.assert_array_equal(ctf[:, 2], 0)


def test_an_astigmatism_without_its_angle_is_refused(tmp_path, write_particles, refusal):
    def drop(blocks):
        particles = blocks["particles"].drop(columns=["rlnDefocusAngle"])
        blocks["particles"] = particles.assign(rlnDefocusU=[1e4, 1.2e4, 1e4], rlnDefocusV=1e4)

    star = _rewritten(write_particles(tmp_path, count=3), drop)
    words = [str(star), "rlnDefocusAngle is missing", "row 2", "12000", "10000"]
    refusal(SourceError, words, lambda: read_particles(star))
    assert len(read_particles(star, no_ctf=True)) == 3


def test_missing_origins_are_zero(tmp_path, write_particles):
    def drop(blocks):
        blocks["particles"] = blocks["particles"].drop(columns=["rlnOriginXAngst", "rlnOriginYAngst"])

    np.testing.assert_array_equal(read_particles(_rewritten(write_particles(tmp_path, count=3), drop)).shifts_a, 0)


def test_images_multiplied_by_their_ctf_are_marked(tmp_path, write_particles):
    def mark(blocks):
        blocks["optics"] = blocks["optics"].assign(rlnCtfDataAreCtfPremultiplied=1)

    star = write_particles(tmp_path, count=3)
    assert not read_particles(star).ctf_premultiplied
    assert read_particles(_rewritten(star, mark)).ctf_premultiplied


# --- how the file is written -----------------------------------------------------------------------------------------

TABLE = "data_particles\n\nloop_\n_rlnImageName #1\n_rlnDefocusU #2\n_rlnMicrographName #3\n"
ROWS = ["1@a.mrcs 10000.5 m1.mrc", "2@a.mrcs 20000 m1.mrc"]
PLAIN = TABLE + "\n".join(ROWS) + "\n"
LABELS: dict[str, type] = {"rlnImageName": str, "rlnDefocusU": float, "rlnMicrographName": str}


def _read(path: Path, content: str | bytes) -> Columns:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return next(iter(read_blocks(path, LABELS).values()))


@pytest.mark.parametrize(
    "content",
    [
        PLAIN,
        PLAIN.replace("\n", "\r\n"),
        PLAIN.removesuffix("\n"),
        "\ufeff" + PLAIN,
        "\n# version 30001\n\n" + PLAIN + "\n\n# version 30001\n\ndata_other\n\nloop_\n_a\n1\n",
        PLAIN.replace("data_particles\n", "data_particles\n# a comment\n"),
        PLAIN.replace("_rlnDefocusU", "# a comment\n\n_rlnDefocusU"),
        PLAIN.replace(" #1", "").replace(" #2", "").replace(" #3", ""),
        PLAIN.replace("data_particles", "data_").replace("loop_", "LOOP_ "),
        PLAIN.replace(" 10000.5 ", "\t 1.00005e4\t\t"),
        PLAIN.replace("\n2@", "\n\n   \n\t2@"),
        PLAIN.replace("1@a.mrcs", "'1@a.mrcs'").replace("m1.mrc", '"m1.mrc"'),
        PLAIN.replace("m1.mrc\n", "m1.mrc # a comment\n"),
    ],
    ids=[
        "plain", "crlf", "no final newline", "byte order mark", "version comments", "comment before loop",
        "comment and blank between labels", "no numbers", "unnamed block, loop in capitals", "tabs", "blank lines",
        "quoted", "comment after a row",
    ],
)  # fmt: skip
def test_every_way_to_write_a_table_gives_the_same(tmp_path, content):
    columns = _read(tmp_path / "a.star", content)
    assert {label: cells.tolist() for label, cells in columns.items()} == {
        "rlnImageName": ["1@a.mrcs", "2@a.mrcs"],
        "rlnDefocusU": [10000.5, 20000],
        "rlnMicrographName": ["m1.mrc", "m1.mrc"],
    }


def test_a_row_may_begin_like_a_block_or_a_label_later_on(tmp_path):
    text = "data_x\nloop_\n_rlnMicrographName\n_rlnDefocusU\ndata_2024/m1.mrc 1\n_scratch/m2.mrc 2\n"
    assert _read(tmp_path / "a.star", text)["rlnMicrographName"].tolist() == ["data_2024/m1.mrc", "_scratch/m2.mrc"]


def test_a_block_without_a_loop_is_one_row(tmp_path):
    columns = _read(tmp_path / "a.star", "data_\n_rlnImageName  'my dir/a.mrcs'\n_rlnDefocusU 3\n\ndata_b\n_a 1\n")
    assert (columns["rlnImageName"].tolist(), columns["rlnDefocusU"].tolist()) == (["my dir/a.mrcs"], [3.0])


@pytest.mark.parametrize("rows", [0, 1, *(n * ROWS_AT_ONCE + more for n in (1, 2, 4) for more in (-1, 0, 1))])
def test_a_table_of_any_length_is_read_whole(tmp_path, rows):
    names = [f"{i + 1}@a{i // 300}.mrcs" for i in range(rows)]
    (tmp_path / "a.star").write_text(TABLE + "".join(f"{name} {i}.5 m.mrc\n" for i, name in enumerate(names)))
    columns = read_blocks(tmp_path / "a.star", LABELS | {"rlnImageName": tuple})["particles"]
    assert ["".join(pair) for pair in columns["rlnImageName"]] == names
    assert columns["rlnDefocusU"].tolist() == [i + 0.5 for i in range(rows)]
    assert columns["rlnMicrographName"].tolist() == ["m.mrc"] * rows


def test_names_of_images_come_in_two_parts_and_equal_texts_are_one_object(tmp_path):
    (tmp_path / "a.star").write_text(PLAIN + "b@c@d.mrcs 1 m2.mrc\ne.mrcs 2 m1.mrc\n")
    labels = LABELS | {"rlnImageName": tuple, "rlnDefocusU": np.float32}
    columns = read_blocks(tmp_path / "a.star", labels)["particles"]
    assert columns["rlnImageName"].tolist() == [
        ["1@", "a.mrcs"], ["2@", "a.mrcs"], ["b@c@", "d.mrcs"], ["", "e.mrcs"]
    ]  # fmt: skip
    assert columns["rlnImageName"][0, 1] is columns["rlnImageName"][1, 1]
    assert columns["rlnDefocusU"].dtype == np.float32
    assert columns["rlnDefocusU"].tolist() == [10000.5, 20000, 1, 2]


@pytest.mark.parametrize("shared", [0, 3, 10**6])
def test_how_many_texts_are_remembered_does_not_show(tmp_path, monkeypatch, shared):
    monkeypatch.setattr("spire_dist.star.TEXTS_SHARED", shared)
    rows = [(f"{i + 1}@{i % 7}.mrcs", float(i), f"m{i % 11}.mrc") for i in range(5000)]
    columns = _read(tmp_path / "a.star", TABLE + "".join(f"{a} {b} {c}\n" for a, b, c in rows))
    assert list(zip(*(columns[label] for label in LABELS), strict=True)) == rows


CELLS = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1)


@given(cells=st.lists(st.tuples(CELLS, CELLS, st.floats(allow_nan=False)), min_size=1, max_size=8))
@example(cells=[("_", "0", 0.0)])
def test_cells_with_quotes_blanks_and_hashes_come_back_as_they_were(cells, tmp_path_factory):
    def quoted(cell: str) -> str:
        return f'"{cell}"' if cell[0] in "\"'#_" or " " in cell else cell

    cells = [(f"{a}- {b}", b, number) for a, b, number in cells]  # a quote before a blank ends a cell: none can hold it
    lines = [f"{quoted(a)} {quoted(b)} {number!r}" for a, b, number in cells]
    text = "data_x\nloop_\n_rlnImageName\n_rlnMicrographName\n_rlnDefocusU\n" + "\n".join(lines)
    columns = _read(tmp_path_factory.mktemp("cells") / "a.star", text)
    read = zip(columns["rlnImageName"], columns["rlnMicrographName"], columns["rlnDefocusU"], strict=True)
    assert list(read) == cells


@given(rows=st.integers(1, 1300), bad=st.data())
def test_a_row_with_a_cell_too_few_or_too_many_is_refused_by_its_line(rows, bad, tmp_path_factory):
    wrong = bad.draw(st.integers(0, rows - 1))
    change = bad.draw(st.sampled_from([lambda row: row.rsplit(" ", 1)[0], lambda row: row + " 5"]))
    lines = [f"{i + 1}@a.mrcs {i} m.mrc" for i in range(rows)]
    lines[wrong] = change(lines[wrong])
    path = tmp_path_factory.mktemp("ragged") / "a.star"
    path.write_text(TABLE + "\n".join(lines) + "\n")
    with pytest.raises(SourceError, match=rf"line {7 + wrong}: [24] values for the 3 columns of data_particles"):
        read_blocks(path, LABELS)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (TABLE.replace("_rlnMicrographName", "_rlnDefocusU"), ["line 6", "a second column rlnDefocusU"]),
        (PLAIN + PLAIN, ["line 9", "a second block data_particles"]),
        ("data_particles\n\n1@a.mrcs 3 m.mrc\n", ["line 3", "'1@a.mrcs'", "loop_"]),
        ("data_particles\n_rlnImageName\n", ["line 2", "'_rlnImageName'"]),
        (PLAIN + "loop_\n_rlnVoltage\n300\n", ["line 9", "1 values for the 3 columns"]),
        (PLAIN.replace("2@a", '"2@a'), []),  # an open quotation mark is a character of the name
    ],
)
def test_a_damaged_table_is_refused_by_line(tmp_path, refusal, content, words):
    path = tmp_path / "a.star"
    if words:
        refusal(SourceError, [str(path), *words], lambda: _read(path, content))
    else:
        assert _read(path, content)["rlnImageName"].tolist() == ["1@a.mrcs", '"2@a.mrcs']


@pytest.mark.parametrize("cell", ["x", "12,5", "None", "nan", "1e999", "--3"])
def test_a_cell_that_is_no_number_is_refused_by_row_and_column(tmp_path, refusal, cell):
    path = tmp_path / "a.star"
    columns = _read(path, PLAIN.replace("20000", cell))
    refusal(SourceError, [str(path), "rlnDefocusU", "row 2"], lambda: numbers(path, columns, "rlnDefocusU"))


def test_a_path_that_is_no_unicode_leads_to_the_file_of_that_name(tmp_path):
    name = b"1@caf\xe9.mrcs"
    columns = _read(tmp_path / "a.star", PLAIN.encode().replace(b"1@a.mrcs", name))
    assert columns["rlnImageName"][0].encode("utf-8", "surrogateescape") == name


@pytest.mark.parametrize(
    "name", ["0@a.mrcs", "-1@a.mrcs", "1.5@a.mrcs", "²@a.mrcs", "9" * 5000 + "@a.mrcs", "3@", "@a"]
)
def test_an_image_name_that_is_none_is_refused_by_row(tmp_path, refusal, name):
    path = tmp_path / "a.star"
    path.write_text(PLAIN.replace("2@a.mrcs", name))
    refusal(SourceError, [str(path), "row 2", "rlnImageName"], lambda: read_star(path, 1.0, True))


def test_an_image_without_a_number_is_the_first_of_its_file(tmp_path):
    path = tmp_path / "a.star"
    path.write_text(PLAIN.replace("2@a.mrcs", "'Extract job/one.mrc'"))
    table = read_star(path, 1.0, True)
    assert (table.slice_index.tolist(), table.image_paths) == ([0, 0], ["a.mrcs", "Extract job/one.mrc"])


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
