"""Simulated data sets: every file against the others, and against the parameters asked for."""

import filecmp
import json
import pickle
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import roma
import starfile
import torch
from scipy import ndimage

from spire_dist.errors import ConfigError
from spire_dist.simulation.simulate import simulate

SMALL = {"states": 3, "particles": 60, "box": 48, "pixel_size": 8.0, "seed": 1}


def images_of(folder):
    return np.concatenate([mrcfile.read(path) for path in sorted((folder / "images").iterdir())])


def maps_of(folder):
    return np.stack([mrcfile.read(path) for path in sorted((folder / "vols/48_org").iterdir())])


def unpickled(path):
    return pickle.loads(path.read_bytes())


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    return simulate(tmp_path_factory.mktemp("noisy") / "set", **SMALL, snr=0.5, proportions=[1, 3, 2])


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return simulate(tmp_path_factory.mktemp("clean") / "set", **SMALL, snr=float("inf"), proportions=[1, 3, 2])


def test_particles_come_in_order_of_states_with_the_counts_asked_for(noisy):
    labels = unpickled(noisy / "gt_latents.pkl")
    np.testing.assert_array_equal(labels, np.repeat([0, 1, 2], [10, 30, 20]))
    names = starfile.read(noisy / "particles.star")["particles"]["rlnImageName"]
    assert [int(name.split("/")[-1].split(".")[0]) for name in names] == labels.tolist()
    assert [int(name.split("@")[0]) for name in names] == [*range(1, 11), *range(1, 31), *range(1, 21)]
    for state, count in enumerate([10, 30, 20]):
        with mrcfile.open(noisy / f"images/{state:03d}.mrcs") as stack:
            assert stack.data.shape == (count, 48, 48)
            assert stack.is_image_stack()
            assert stack.voxel_size.x == pytest.approx(8.0)
    assert all(mrcfile.validate(path, print_file=None) for path in noisy.rglob("*.mrc"))


def test_pickles_say_what_the_star_file_says_in_cryodrgns_conventions(noisy):
    star = starfile.read(noisy / "particles.star")
    optics, particles = star["optics"].iloc[0], star["particles"]
    rotations, translations = unpickled(noisy / "combined_poses.pkl")
    angles = torch.from_numpy(particles[["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]].to_numpy())
    expected = roma.euler_to_rotmat("ZYZ", angles, degrees=True).transpose(1, 2)
    np.testing.assert_allclose(rotations, expected, atol=1e-5)
    # Both RELION's origin and cryoDRGN's translation centre the particle: equal signs.
    origins = particles[["rlnOriginXAngst", "rlnOriginYAngst"]].to_numpy()
    np.testing.assert_allclose(translations, origins / (48 * 8.0), atol=1e-7)
    assert 20 < np.abs(origins).max() <= 30
    ctf = unpickled(noisy / "combined_ctfs.pkl")
    own = [optics[f"rln{k}"] for k in ("ImageSize", "ImagePixelSize")]
    beam = [optics[f"rln{k}"] for k in ("Voltage", "SphericalAberration", "AmplitudeContrast")]
    assert own == [48, 8.0]
    columns = ["rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle", "rlnPhaseShift"]
    u_v_angle_phase = particles[columns].to_numpy()
    np.testing.assert_allclose(ctf[:, :2], np.tile(own, (60, 1)))
    np.testing.assert_allclose(ctf[:, 2:5], u_v_angle_phase[:, :3], rtol=1e-6)
    np.testing.assert_allclose(ctf[:, 5:8], np.tile(beam, (60, 1)), rtol=1e-6)
    np.testing.assert_allclose(ctf[:, 8], u_v_angle_phase[:, 3])
    assert ctf.dtype == np.float32


def test_images_show_the_true_maps_in_the_written_poses(clean):
    """Poses as cryoDRGN reads them, maps turned by scipy; without CTF, which would hide a hand or a sign in ripples."""
    rotations, translations = unpickled(clean / "combined_poses.pkl")
    labels, images, maps = unpickled(clean / "gt_latents.pkl"), images_of(clean), maps_of(clean)
    for i in (0, 12, 45):
        back = rotations[i].T[::-1, ::-1].astype(float)
        turned = ndimage.affine_transform(maps[labels[i]], back, offset=24 - back @ np.full(3, 24), order=3)
        projection = ndimage.shift(turned.sum(0), -translations[i, ::-1] * 48, order=3)
        low = np.abs(np.fft.fftfreq(48, 8.0)) < 0.008  # 1/Å: before the first zero of the CTF at 2.5 µm, 1/70 Å
        keep = low[:, None] & low
        found, expected = (np.fft.fft2(a)[keep] for a in (images[i], projection))
        found[0] = expected[0] = 0  # the mean
        cosine = (found.conj() * expected).sum().real / np.linalg.norm(found) / np.linalg.norm(expected)
        assert cosine > 0.95


def test_noise_has_the_stated_ratio_over_the_whole_set_and_is_white(noisy, clean):
    signal, noise = images_of(clean), images_of(noisy) - images_of(clean)
    report = json.loads((noisy / "simulation.json").read_text())
    assert signal.var() / noise.var() == pytest.approx(0.5, rel=0.02)
    assert report["noise_std"] == pytest.approx(noise.std(), rel=0.01)
    assert report["signal_std"] == pytest.approx(signal.std(), rel=1e-5)
    assert report["snr_box"] == 48
    power = np.abs(np.fft.fft2(noise)) ** 2
    assert power[:, :12, :12].mean() == pytest.approx(power[:, 18:30, 18:30].mean(), rel=0.05)
    per_image = noise.std(axis=(1, 2))
    assert per_image.std() / per_image.mean() < 0.03  # one σ for all, not one for each


def test_ratio_before_the_crop_is_four_times_higher_after_it(tmp_path, clean):
    out = simulate(tmp_path / "set", **SMALL, snr=0.1, snr_at="before", proportions=[1, 3, 2])
    signal, noise = images_of(clean), images_of(out) - images_of(clean)
    assert signal.var() / noise.var() == pytest.approx(0.4, rel=0.02)
    assert json.loads((out / "simulation.json").read_text())["snr_box"] == 96


def test_dark_protein_is_the_negative_of_bright(tmp_path, clean):
    dark = simulate(tmp_path / "set", **SMALL, snr=float("inf"), proportions=[1, 3, 2], sign="-")
    np.testing.assert_array_equal(images_of(dark), -images_of(clean))
    np.testing.assert_array_equal(maps_of(dark), maps_of(clean))


def test_mask_is_the_average_above_two_percent_grown_by_two_voxels(noisy):
    average = maps_of(noisy).mean(axis=0)
    mask = mrcfile.read(noisy / "init_mask/mask.mrc")
    expected = ndimage.distance_transform_edt(average <= 0.02 * average.max()) <= 2
    np.testing.assert_array_equal(mask, expected)
    assert 0 < mask.sum() < 0.2 * mask.size


def test_residues_lie_in_the_density_of_their_own_state(noisy):
    residues, maps = np.load(noisy / "residues.npz"), maps_of(noisy)
    coordinates, group = residues["coordinates"], residues["group"]
    assert residues["group_names"].tolist() == ["fixed", "A"]
    assert residues["present"].all()
    density = np.array(
        [
            [ndimage.map_coordinates(v, c[group == 1].T[::-1] / 8.0 + 24, order=1).mean() for c in coordinates]
            for v in maps
        ]
    )  # [map, coordinates]
    assert (np.diag(density) > 2 * (density.sum(1) - np.diag(density)) / 2).all()
    assert not np.allclose(coordinates[0, group == 1], coordinates[1, group == 1], atol=10)
    np.testing.assert_array_equal(coordinates[0, group == 0], coordinates[1, group == 0])


def test_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path, noisy):
    again = simulate(tmp_path / "again", **SMALL, snr=0.5, proportions=[1, 3, 2])
    files = sorted(path.relative_to(noisy) for path in noisy.rglob("*") if path.is_file())
    assert len(files) == 3 + 3 + 1 + 6
    _, different, missing = filecmp.cmpfiles(noisy, again, files, shallow=False)
    assert (different, missing) == ([], [])
    other = simulate(tmp_path / "other", **(SMALL | {"seed": 2}), snr=0.5, proportions=[1, 3, 2])
    assert filecmp.cmpfiles(noisy, other, ["particles.star", "images/000.mrcs"], shallow=False)[0] == []


def test_ribosome_states_lack_their_blocks(tmp_path, shared_data):
    """Like Ribosembly: blocks of several files, left out in some states, with unequal counts."""
    models = [
        shared_data / f"models/lkinman+MAVEn/protocol_examples/{name}.pdb.gz" for name in ("RNA_5S", "prots2", "RNA1")
    ]
    out = simulate(
        tmp_path / "set", model=models, omit=["", "RNA_5S.A,RNA_5S.B", "prots2.A"], proportions=[1, 2, 5], particles=16,
        box=48, pixel_size=8.0, shift_a=10, seed=3,
    )  # fmt: skip
    report = json.loads((out / "simulation.json").read_text())
    assert report["counts"] == [2, 4, 10]
    assert report["states"] == 3
    residues = np.load(out / "residues.npz")
    chains = residues["chain"]
    assert not residues["present"][1][np.isin(chains, ["RNA_5S.A", "RNA_5S.B"])].any()
    assert residues["present"][1][~np.isin(chains, ["RNA_5S.A", "RNA_5S.B"])].all()
    maps = maps_of(out)
    difference = maps[0] - maps[1]
    where = np.round(residues["coordinates"][0][np.isin(chains, ["RNA_5S.A", "RNA_5S.B"])] / 8.0 + 24).astype(int)
    core = np.zeros((48,) * 3, dtype=bool)
    core[where[:, 2], where[:, 1], where[:, 0]] = True
    near = ndimage.binary_dilation(core, iterations=3)
    assert difference[near].sum() > 0.98 * difference.sum() > 0


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"box": 20}, ConfigError, ["box", "20 px", "give a box of"]),
        ({"snr": 0}, ConfigError, ["snr", "0"]),
        ({"snr_at": "during"}, ConfigError, ["snr_at", "'during'", "before"]),
        ({"sign": "x"}, ConfigError, ["sign", "'x'"]),
        ({"pixel_size": -1.0}, ConfigError, ["pixel_size", "-1.0"]),
        ({"shift_a": -5.0}, ConfigError, ["shift_a", "-5.0"]),
        ({"particles": 2}, ConfigError, ["particles", "2", "state"]),
        ({"proportions": [1, 2]}, ConfigError, ["proportions", "3 states"]),
        ({"proportions": [1, 2, -3]}, ConfigError, ["proportions", "-3"]),
        ({"defocus_a": (2.0e4, 1.0e4)}, ConfigError, ["defocus_a", "20000"]),
        ({"rotate": "A"}, ConfigError, ["axis", "H:213"]),
        ({"rotate": "Z", "axis": "A:1,A:9"}, ConfigError, ["'Z'", "A, B, F"]),
        ({"rotate": "A", "omit": ["", "B"]}, ConfigError, ["rotate and omit"]),
        ({"rotate": "A", "axis": "A:1,A:9", "linker": "F:1-3"}, ConfigError, ["axis and linker", "choose one"]),
        ({"linker": "F:1-3"}, ConfigError, ["linker", "without rotate"]),
        ({"ctf_box": -96}, ConfigError, ["ctf_box", "-96"]),
        ({"mixture": True}, ConfigError, ["mixture", "no model"]),
        ({"device": "tpu"}, ConfigError, ["device", "'tpu'", "auto"]),
        ({"box": 8192, "pixel_size": 1.0}, ConfigError, ["GiB", "free"]),
    ],
)
def test_setting_that_cannot_be_used_is_refused_before_anything_is_written(tmp_path, refusal, options, error, words):
    refusal(error, words, lambda: simulate(tmp_path / "set", **(SMALL | options)))
    assert list(tmp_path.iterdir()) == []


def test_folder_with_something_in_it_is_left_alone(tmp_path, refusal):
    (tmp_path / "thesis.txt").write_text("42")
    refusal(ConfigError, [str(tmp_path), "not an empty folder"], lambda: simulate(tmp_path, **SMALL))
    assert (tmp_path / "thesis.txt").read_text() == "42"


@pytest.mark.parametrize("name", [".", ".."])
def test_folder_without_a_name_is_refused(tmp_path, refusal, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    refusal(ConfigError, ["out", "name one in it"], lambda: simulate(Path(name), **SMALL))
