"""Tilt series: real stacks back-projected against Warp's own reconstruction, RELION's formulas, refusals by row."""

import pickle
from pathlib import Path

import mrcfile
import numpy as np
import pandas as pd
import pytest
import starfile
import torch
from scipy.spatial.transform import Rotation

from data_prep.convert import prepare
from data_prep.relion import read_star
from data_prep.sources import read_particles
from data_prep.tilt import with_slices
from spire_dist.data.store import ParticleStore
from spire_dist.errors import SourceError
from spire_dist.physics import kernels_cpu
from spire_dist.physics.ctf import contrast_transfer, frequency_grid, shift_phases
from spire_dist.training.consensus import _invert

DATA = "tilt/bpowell122+tomodrgn/testing/data"
WARP = "warptools_test_4-tomos_10-ptcls_box-32_angpix-12"
BOX, PIXEL_A = 32, 12.0


# --- Warp's stacks of 40 particles in 37 tilts ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def warp(shared_data):
    """(table with slices, images [N, 32, 32]) of the real set."""
    folder = shared_data / DATA
    table = read_star(folder / f"{WARP}.star", None, False)
    stacks = []
    for name in table.image_paths:
        with mrcfile.open(folder / name, permissive=True) as mrc:
            stacks.append(np.array(mrc.data, dtype=np.float32))
    table = with_slices(table, np.array([len(stack) for stack in stacks]))
    images = [stacks[file][index] for file, index in zip(table.image_file, table.slice_index, strict=True)]
    return table, np.stack(images)


def test_every_visible_tilt_is_an_image_and_no_other(shared_data, warp):
    table, images = warp
    particles = starfile.read(shared_data / DATA / f"{WARP}.star", always_dict=True)["particles"]
    visible = [np.array(flags.strip("[]").split(","), dtype=int) for flags in particles["rlnTomoVisibleFrames"]]
    assert len(table) == np.sum(visible) == 1430
    np.testing.assert_array_equal(table.source_index, np.repeat(np.arange(40), np.sum(visible, axis=1)))
    np.testing.assert_array_equal(table.slice_index, np.concatenate([np.flatnonzero(flags) for flags in visible]))
    assert images.std(axis=(1, 2)).min() > 0.1  # Warp fills the tilts that do not show the particle with zeros
    assert table.ctf_premultiplied
    np.testing.assert_array_equal(table.pixel_size_a, PIXEL_A)


def test_an_optimisation_set_and_its_particles_give_the_same(shared_data, warp):
    table = read_particles(shared_data / DATA / f"{WARP}_optimisation_set.star")
    assert table.source.name == f"{WARP}.star"
    assert [path.name for path in table.also_read] == [f"{WARP}_tomograms.star"]
    np.testing.assert_array_equal(table.rotations, warp[0].rotations)
    np.testing.assert_array_equal(table.ctf, warp[0].ctf)


def _back_projected(table, images, rotations) -> np.ndarray:
    """Map [32]³ from images that were multiplied by their CTF."""
    ctf = contrast_transfer(torch.tensor(table.ctf), *frequency_grid(BOX, PIXEL_A)).numpy().astype(np.float32)
    shifts_px = torch.tensor(table.shifts_a / PIXEL_A)
    centring = shift_phases(-(shifts_px + BOX // 2), *frequency_grid(BOX, 1.0)).numpy()
    numerator, weight = np.zeros((2 * BOX,) * 3, np.complex64), np.zeros((2 * BOX,) * 3, np.float32)
    transforms = (np.fft.rfft2(images) * centring).astype(np.complex64)
    kernels_cpu.insert_sections(transforms, ctf**2, rotations.astype(np.float32), 2.0, numerator, weight)
    return _invert(numerator, weight, BOX)


def _likeness(volume: np.ndarray, other: np.ndarray) -> float:
    """Correlation in a sphere of two maps whose shells 2 to 8 were given equal power (the envelope alone says little)."""
    axis = np.arange(BOX) - BOX // 2
    radius = np.sqrt(axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2)
    shell = np.rint(radius).astype(int)

    def whitened(volume: np.ndarray) -> np.ndarray:
        transform = np.fft.fftshift(np.fft.fftn(volume * (radius < 13)))
        power = np.bincount(shell.ravel(), np.abs(transform.ravel()) ** 2) / np.bincount(shell.ravel())
        transform = np.where((shell >= 2) & (shell <= 8), transform / np.sqrt(power[shell]), 0)
        return np.fft.ifftn(np.fft.ifftshift(transform)).real[radius < 11]

    return float(np.corrcoef(whitened(volume), whitened(other))[0, 1])


def test_the_poses_put_real_tilts_together_to_warps_own_map(shared_data, warp):
    """Warp's matrices for 2-D stacks describe its map mirrored in z (warpem/warp#227): the other hand is the right one.

    Seen: 0.79 with these poses; 0.15 to 0.38 where the tilts, the particles' angles or both are inverted or swapped.
    """
    table, images = warp
    with mrcfile.open(shared_data / DATA / "warptools_test_box-32_angpix-12_reconstruct.mrc", permissive=True) as mrc:
        theirs = np.roll(np.array(mrc.data)[::-1], 1, axis=0)
    particles = starfile.read(shared_data / DATA / f"{WARP}.star", always_dict=True)["particles"]
    angles = particles[["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]].to_numpy()
    particle = Rotation.from_euler("ZYZ", angles, degrees=True).inv().as_matrix()[table.source_index]
    tilt = table.rotations @ particle.transpose(0, 2, 1)

    assert _likeness(_back_projected(table, images, table.rotations), theirs) > 0.75
    mirror = np.diag([1, 1, -1])
    wrong = [
        tilt @ particle.transpose(0, 2, 1),
        tilt.transpose(0, 2, 1) @ particle,
        particle @ tilt,
        tilt @ mirror @ particle @ mirror,
        particle,
    ]
    assert max(_likeness(_back_projected(table, images, rotations), theirs) for rotations in wrong) < 0.5


# --- a set written here ----------------------------------------------------------------------------------------------

VISIBLE = [[1, 1, 1], [0, 1, 1]]
ANGLES = np.array([[10.0, 20.0, 30.0], [40.0, 50.0, 60.0]])
TILTS = np.array([[1.0, -40.0, 85.0], [0.0, 0.0, 86.0], [-1.0, 40.0, 87.0]])
DEFOCUS = np.array([[2e4, 1.9e4, 10.0], [2.1e4, 2e4, 11.0], [2.2e4, 2.1e4, 12.0]])


def _relion_5(folder: Path, edit=None) -> Path:
    """Two particles in three tilts as RELION 5 writes them: a table of tilts in its own file, angles, centred Å."""
    blocks = {
        "general": {"rlnTomoSubTomosAre2DStacks": 1},
        "optics": pd.DataFrame(
            {
                "rlnOpticsGroup": [1], "rlnOpticsGroupName": ["g"], "rlnSphericalAberration": [2.7], "rlnVoltage": [300],
                "rlnAmplitudeContrast": [0.1], "rlnTomoTiltSeriesPixelSize": [1.5], "rlnCtfDataAreCtfPremultiplied": [0],
                "rlnImageDimensionality": [2], "rlnImagePixelSize": [3.0], "rlnImageSize": [16],
            }
        ),
        "particles": pd.DataFrame(
            {
                "rlnTomoName": ["TS_1", "TS_1"],
                "rlnImageName": ["Extract/1_stack2d.mrcs", "Extract/2_stack2d.mrcs"],
                "rlnOpticsGroup": [1, 1],
                "rlnTomoVisibleFrames": [str(flags).replace(" ", "") for flags in VISIBLE],
                **{f"rlnAngle{name}": ANGLES[:, i] for i, name in enumerate(("Rot", "Tilt", "Psi"))},
                **{f"rlnTomoSubtomogram{name}": ANGLES[::-1, i] for i, name in enumerate(("Rot", "Tilt", "Psi"))},
                **{f"rlnOrigin{axis}Angst": [1.0 + i, -2.0 * i] for i, axis in enumerate("XYZ")},
                **{f"rlnCenteredCoordinate{axis}Angst": [100.0 * i, 300.0 - i] for i, axis in enumerate("XYZ")},
            }
        ),
    }  # fmt: skip
    tomograms = {
        "global": pd.DataFrame(
            {
                "rlnTomoName": ["TS_1"], "rlnTomoTiltSeriesStarFile": ["tilt_series/TS_1.star"],
                "rlnTomoTiltSeriesPixelSize": [1.5], "rlnTomoHand": [-1.0],
                "rlnTomoSizeX": [1000], "rlnTomoSizeY": [1200], "rlnTomoSizeZ": [400],
            }
        )
    }  # fmt: skip
    tilts = pd.DataFrame(
        {
            **{f"rlnTomo{name}": TILTS[:, i] for i, name in enumerate(("XTilt", "YTilt", "ZRot"))},
            **{f"rlnDefocus{name}": DEFOCUS[:, i] for i, name in enumerate(("U", "V", "Angle"))},
            "rlnCtfScalefactor": np.cos(np.deg2rad(TILTS[:, 1])),
            "rlnMicrographPreExposure": [6.0, 0.0, 3.0],
        }
    )
    if edit:
        edit(blocks, tomograms, tilts)
    (folder / "tilt_series").mkdir(parents=True, exist_ok=True)
    starfile.write({"TS_1": tilts}, folder / "tilt_series" / "TS_1.star")
    starfile.write(tomograms, folder / "tomograms.star")
    starfile.write(blocks, folder / "particles.star")
    return folder / "particles.star"


def _passive(angles: np.ndarray) -> np.ndarray:
    """RELION's matrix of its three angles, written out (docs of RELION: Rz(psi) Ry(tilt) Rz(rot), axes turned)."""

    def about_z(a: float) -> np.ndarray:
        return np.array([[np.cos(a), np.sin(a), 0], [-np.sin(a), np.cos(a), 0], [0, 0, 1]])

    rot, tilt, psi = np.deg2rad(angles)
    about_y = np.array([[np.cos(tilt), 0, -np.sin(tilt)], [0, 1, 0], [np.sin(tilt), 0, np.cos(tilt)]])
    return about_z(psi) @ about_y @ about_z(rot)


def _expected(particle: int, tilt: int) -> tuple[np.ndarray, np.ndarray, float]:
    """(rotation, shift, defocus U) of one image, from RELION's formulas for one particle and one tilt at a time."""
    x, y, z = np.deg2rad(TILTS[tilt])
    about_x = np.array([[1, 0, 0], [0, np.cos(x), -np.sin(x)], [0, np.sin(x), np.cos(x)]])
    about_y = np.array([[np.cos(y), 0, np.sin(y)], [0, 1, 0], [-np.sin(y), 0, np.cos(y)]])
    about_z = np.array([[np.cos(z), -np.sin(z), 0], [np.sin(z), np.cos(z), 0], [0, 0, 1]])
    projection = about_z @ about_y @ about_x
    subtomogram = _passive(ANGLES[1 - particle])
    origin = np.array([1.0 + i if particle == 0 else -2.0 * i for i in range(3)])
    position = np.array([100.0 * i if particle == 0 else 300.0 - i for i in range(3)])
    place = position - subtomogram @ origin
    shift = -(projection @ subtomogram @ origin)[:2]
    return projection @ subtomogram @ _passive(ANGLES[particle]), shift, DEFOCUS[tilt, 0] - (projection @ place)[2]


def test_relion_5_angles_origins_and_depth_follow_relions_formulas(tmp_path):
    table = read_particles(_relion_5(tmp_path))
    images = [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2)]
    assert table.tilt.tolist() == [[tilt, 3] for _, tilt in images]
    assert table.source_index.tolist() == table.image_file.tolist() == [particle for particle, _ in images]
    for row, (particle, tilt) in enumerate(images):
        rotation, shift, defocus = _expected(particle, tilt)
        np.testing.assert_allclose(table.rotations[row], rotation, atol=1e-6)
        np.testing.assert_allclose(table.shifts_a[row], shift, atol=1e-5)
        astigmatism = DEFOCUS[tilt, 0] - DEFOCUS[tilt, 1]
        expected = [defocus, defocus - astigmatism, DEFOCUS[tilt, 2], 300, 2.7, 0.1, 0, 0]
        np.testing.assert_allclose(table.ctf[row, :8], expected, rtol=1e-6)
        np.testing.assert_allclose(table.ctf[row, 8], np.cos(np.deg2rad(TILTS[tilt, 1])), rtol=1e-6)
    assert not table.ctf_premultiplied
    assert table.ignored == ["radiation damage"]
    assert [path.name for path in table.also_read] == ["tomograms.star", "TS_1.star"]


def test_projection_matrices_and_the_angles_they_come_from_give_the_same(tmp_path):
    def as_matrices(blocks, tomograms, tilts):
        matrices = Rotation.from_euler("xyz", TILTS, degrees=True).as_matrix() * 0.5  # of binned pixels
        for i, axis in enumerate("XYZ"):
            tilts[f"rlnTomoProj{axis}"] = [f"[{m[i, 0]},{m[i, 1]},{m[i, 2]},{7 * i}]" for m in matrices]
        tilts["rlnTomoProjW"] = "[0,0,0,1]"
        for name in ("rlnTomoXTilt", "rlnTomoYTilt", "rlnTomoZRot"):
            del tilts[name]
        tomograms["TS_1"] = tilts  # in the same file, as Warp writes it
        del tomograms["global"]["rlnTomoTiltSeriesStarFile"]

    one, other = read_particles(_relion_5(tmp_path / "a")), read_particles(_relion_5(tmp_path / "b", as_matrices))
    np.testing.assert_allclose(one.rotations, other.rotations, atol=1e-6)
    np.testing.assert_allclose(one.shifts_a, other.shifts_a, atol=1e-5)
    np.testing.assert_allclose(one.ctf, other.ctf, rtol=1e-6)


@pytest.mark.parametrize(("unit_a", "far"), [(1.5, 600.0), (3.0, 0.0)])
def test_coordinates_are_pixels_of_the_images_only_where_all_then_lie_in_the_tomogram(tmp_path, capsys, unit_a, far):
    """Warp counts pixels of the images (3 Å), RELION 4 those of the tilt series (1.5 Å); the tomogram is 600 Å deep."""

    def in_pixels(blocks, tomograms, tilts):
        centre_a = np.array([1000, 1200, 400]) * 1.5 / 2
        for i, axis in enumerate("XYZ"):
            centred = blocks["particles"].pop(f"rlnCenteredCoordinate{axis}Angst") + (far / 3 if axis == "Z" else 0)
            blocks["particles"][f"rlnCoordinate{axis}"] = (centred + centre_a[i]) / unit_a

    def centred(blocks, tomograms, tilts):
        blocks["particles"]["rlnCenteredCoordinateZAngst"] += far / 3

    one, other = (
        read_particles(_relion_5(tmp_path / "a", centred)),
        read_particles(_relion_5(tmp_path / "b", in_pixels)),
    )
    np.testing.assert_allclose(one.ctf, other.ctf, rtol=1e-6)
    (line,) = capsys.readouterr().err.splitlines()  # of the second: the first leaves nothing to choose
    assert f"{tmp_path / 'b' / 'particles.star'}: rlnCoordinateX, Y, Z are taken for pixels of the" in line
    assert ("pixels of the images" in line) == (unit_a == 3.0)
    assert ("pixels of the tilt series" in line) == (unit_a == 1.5)


def test_particles_of_tomograms_with_other_numbers_of_tilts_may_come_in_any_order(tmp_path):
    def two(blocks, tomograms, tilts):
        one = tomograms["global"]
        tomograms["global"] = pd.concat([one, one.assign(rlnTomoName="TS_2", rlnTomoHand=1.0)])
        tomograms["TS_2"] = tilts.iloc[[2, 0]].assign(rlnDefocusU=[5e3, 6e3])
        particles = blocks["particles"]
        other = particles.assign(rlnTomoName="TS_2", rlnTomoVisibleFrames=["[1,1]", "[0,1]"])
        blocks["particles"] = pd.concat([other, particles]).iloc[[0, 2, 1, 3]]

    def second(blocks, tomograms, tilts):
        two(blocks, tomograms, tilts)
        blocks["particles"] = blocks["particles"].query("rlnTomoName == 'TS_2'")

    both = read_particles(_relion_5(tmp_path / "both", two))
    first, other = read_particles(_relion_5(tmp_path / "a")), read_particles(_relion_5(tmp_path / "b", second))
    assert both.source_index.tolist() == [0, 0, 1, 1, 1, 2, 3, 3]
    assert both.tilt.tolist() == [[0, 2], [1, 2], [0, 3], [1, 3], [2, 3], [1, 2], [1, 3], [2, 3]]
    assert other.ctf[:, 0].max() < 7e3 < first.ctf[:, 0].min()
    for table, rows in ((first, [2, 3, 4, 6, 7]), (other, [0, 1, 5])):
        np.testing.assert_array_equal(both.ctf[rows], table.ctf)
        np.testing.assert_array_equal(both.rotations[rows], table.rotations)
        np.testing.assert_array_equal(both.shifts_a[rows], table.shifts_a)


def test_a_dose_with_a_b_factor_damps_the_ctf(tmp_path):
    def b_factor(blocks, tomograms, tilts):
        tomograms["global"]["rlnCtfBfactorPerElectronDose"] = 4.0

    table = read_particles(_relion_5(tmp_path, b_factor))
    np.testing.assert_array_equal(table.ctf[:, 7], [24, 0, 12, 0, 12])
    assert table.ignored == []


@pytest.mark.parametrize(("counts", "slices"), [([3, 2], [0, 1, 2, 0, 1]), ([3, 3], [0, 1, 2, 1, 2])])
def test_a_stack_may_hold_the_visible_tilts_or_all(tmp_path, counts, slices):
    table = read_particles(_relion_5(tmp_path))
    assert with_slices(table, np.array(counts)).slice_index.tolist() == slices


def test_a_stack_of_another_number_of_tilts_is_refused_by_row(tmp_path, refusal):
    table = read_particles(_relion_5(tmp_path))
    words = ["particles.star", "row 2", "2_stack2d.mrcs has 5 images", "2 (the visible tilts)", "3 (all tilts)"]
    refusal(SourceError, words, lambda: with_slices(table, np.array([3, 5])))


def test_tomograms_elsewhere_are_found_through_the_option(tmp_path, refusal):
    star = _relion_5(tmp_path / "a")
    lone = star.rename(tmp_path / "lone.star")
    refusal(SourceError, ["lone.star", "tomograms"], lambda: read_particles(lone))
    assert len(read_particles(lone, tomograms=tmp_path / "a" / "tomograms.star")) == 5


def test_an_optimisation_set_beside_the_particles_goes_before_a_usual_name(tmp_path):
    star = _relion_5(tmp_path)
    (tmp_path / "tomograms.star").rename(tmp_path / "refined.star")
    (tmp_path / "tomograms.star").write_text("data_\n")
    names = "data_\n\n_rlnTomoParticlesFile job3/particles.star\n_rlnTomoTomogramsFile refined.star\n"
    (tmp_path / "run_optimisation_set.star").write_text(names)
    assert [path.name for path in read_particles(star).also_read] == ["refined.star", "TS_1.star"]


def _set(block: str, column: str, row: int, value):
    def edit(blocks, tomograms, tilts):
        table = tilts if block == "tilts" else (tomograms if block == "global" else blocks)[block]
        table[column] = table[column].astype(object)
        table.loc[row, column] = value

    return edit


def _drop(block: str, column: str):
    def edit(blocks, tomograms, tilts):
        table = tilts if block == "tilts" else (tomograms if block == "global" else blocks)[block]
        del table[column]

    return edit


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (_set("particles", "rlnTomoVisibleFrames", 1, "[1,1]"), ["row 2", "rlnTomoVisibleFrames", "2", "3 tilts"]),
        (_set("particles", "rlnTomoVisibleFrames", 1, "[1,x,1]"), ["row 2", "rlnTomoVisibleFrames", "[1,x,1]"]),
        (_set("particles", "rlnTomoName", 1, "TS_9"), ["tomograms.star", "TS_9", "TS_1"]),
        (_set("particles", "rlnImageName", 0, "3@a.mrcs"), ["row 1", "3@a.mrcs", "all its tilts"]),
        (_set("particles", "rlnOriginZAngst", 1, "x"), ["row 2", "rlnOriginZAngst", "'x'"]),
        (_set("tilts", "rlnTomoYTilt", 2, "x"), ["TS_1.star", "row 3", "rlnTomoYTilt"]),
        (_set("global", "rlnTomoHand", 0, "left"), ["tomograms.star", "rlnTomoHand", "left"]),
        (_drop("tilts", "rlnDefocusU"), ["TS_1.star", "rlnDefocusU", "missing"]),
        (_drop("tilts", "rlnTomoZRot"), ["TS_1.star", "rlnTomoZRot", "missing"]),
        (_drop("global", "rlnTomoTiltSeriesStarFile"), ["tomograms.star", "data_TS_1"]),
        (_drop("global", "rlnTomoTiltSeriesPixelSize"), ["rlnTomoTiltSeriesPixelSize"]),
        (_drop("particles", "rlnTomoVisibleFrames"), ["rlnTomoVisibleFrames", "2-D stacks"]),
    ],
)
def test_a_set_that_lacks_something_is_refused_by_file_and_row(tmp_path, refusal, edit, words):
    star = _relion_5(tmp_path, edit)
    refusal(SourceError, words, lambda: read_particles(star))


def test_matrices_that_are_no_rotations_are_refused_by_tilt(tmp_path, refusal):
    def mirrored(blocks, tomograms, tilts):
        for i, axis in enumerate("XYZ"):
            tilts[f"rlnTomoProj{axis}"] = [str([float(i == j) for j in range(3)] + [0]).replace(" ", "")] * 3
        tilts.loc[1, "rlnTomoProjZ"] = "[0,0,-1,0]"

    star = _relion_5(tmp_path, mirrored)
    refusal(SourceError, ["TS_1.star", "tilt 2", "rotation"], lambda: read_particles(star))


# --- stores ----------------------------------------------------------------------------------------------------------


def _with_stacks(star: Path) -> Path:
    (star.parent / "Extract").mkdir()
    for number, count in (1, 3), (2, 2):
        with mrcfile.new(star.parent / f"Extract/{number}_stack2d.mrcs") as mrc:
            mrc.set_data(np.random.default_rng(number).standard_normal((count, 16, 16)).astype(np.float32))
    return star


def test_a_wrong_box_is_named_by_the_particles_row_not_by_the_images(tmp_path, refusal):
    def boxes(blocks, tomograms, tilts):
        blocks["particles"]["rlnImageSize"] = [16, 20]

    star = _with_stacks(_relion_5(tmp_path, boxes))
    refusal(SourceError, ["row 2 states", "20 px", "16 px"], lambda: prepare(star, tmp_path / "store", sign="+"))


@pytest.mark.parametrize("labels", [[7, 9], [7, 7, 7, 9, 9]])
def test_labels_are_for_each_particle_or_for_each_image(tmp_path, labels):
    np.save(tmp_path / "labels.npy", labels)
    options = {"labels": tmp_path / "labels.npy", "sign": "+", "shuffle": False}
    store = ParticleStore.open(prepare(_with_stacks(_relion_5(tmp_path)), tmp_path / "store", **options))
    assert store.label.tolist() == [7, 7, 7, 9, 9]


def test_labels_for_neither_particles_nor_images_are_refused(tmp_path, refusal):
    np.save(tmp_path / "labels.npy", [7, 8, 9])
    star, options = _with_stacks(_relion_5(tmp_path)), {"labels": tmp_path / "labels.npy", "sign": "+"}
    words = ["labels.npy", "(3,)", "5 integers (one for each image) or 2 (one for each particle)"]
    refusal(SourceError, words, lambda: prepare(star, tmp_path / "store", **options))


def test_poses_for_each_particle_are_refused_with_what_a_tilt_series_needs(tmp_path, refusal):
    (tmp_path / "poses.pkl").write_bytes(pickle.dumps(np.tile(np.eye(3), (2, 1, 1))))
    star, options = _with_stacks(_relion_5(tmp_path)), {"poses": tmp_path / "poses.pkl", "sign": "+"}
    words = ["poses.pkl", "2 poses, one for each particle", "each of its 5 images"]
    refusal(SourceError, words, lambda: prepare(star, tmp_path / "store", **options))
