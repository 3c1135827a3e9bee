"""Prep from real files of several programs, and refused where the input is wrong."""

import hashlib
import json
import pickle
import shutil
from collections import namedtuple
from pathlib import Path

import mrcfile
import numpy as np
import pandas as pd
import pytest
import starfile
from scipy import ndimage

from data_prep import plan
from data_prep.convert import prepare
from spire_dist.data.store import ParticleStore
from spire_dist.errors import ConfigError, SourceError, StoreError

CRYODRGN = "particles/ml-struct-bio+cryodrgn/tests/data"


def _contents(store: Path) -> dict[str, str]:
    """Hash of every file of a store."""
    files = sorted(path for path in store.rglob("*") if path.is_file())
    return {str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _edited(star: Path, block: str, **columns) -> Path:
    blocks = starfile.read(star, always_dict=True)
    blocks[block] = blocks[block].assign(**columns)
    path = star.with_name("edited.star")
    starfile.write(blocks, path)
    return path


# --- what is stored --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("contrast", [4.0, -4.0])
def test_stored_images_are_the_inputs_normalised_by_their_background_with_protein_positive(
    tmp_path, write_particles, contrast
):
    source = write_particles(tmp_path / "in", contrast=contrast, box=24)
    store = ParticleStore.open(prepare(source, tmp_path / "store", dtype="float32", radius_a=18.0))
    names = starfile.read(source)["particles"]["rlnImageName"]
    axis = (np.arange(24) - 12) * 2.0  # Å
    background = np.hypot(axis[:, None], axis[None, :]) > 18.0
    for row in (0, 77, 149):
        number, stack = names[store.source_index[row]].split("@")
        with mrcfile.open(source.parent / stack) as mrc:
            image = np.sign(contrast) * mrc.data[int(number) - 1].astype(np.float64)
        expected = (image - image[background].mean()) / image[background].std()
        np.testing.assert_allclose(store.read([row])[0], expected, atol=1e-4)
    assert store.attributes["sign"]["applied"] == np.sign(contrast)
    assert store.attributes["sign"]["found_by"] == "images"


def test_poses_and_ctf_follow_their_images_through_the_shuffle(tmp_path, write_particles):
    source = write_particles(tmp_path / "in")
    shuffled = ParticleStore.open(prepare(source, tmp_path / "a", seed=3))
    plain = ParticleStore.open(prepare(source, tmp_path / "b", shuffle=False))
    np.testing.assert_array_equal(plain.source_index, np.arange(150))
    assert (shuffled.source_index != plain.source_index).any()
    for name in ("rotations", "shifts", "ctf"):
        np.testing.assert_array_equal(getattr(shuffled, name), getattr(plain, name)[shuffled.source_index])
    np.testing.assert_array_equal(shuffled.read(np.arange(150)), plain.read(shuffled.source_index))


def test_the_seed_decides_the_order_and_the_fingerprint_names_the_content(tmp_path, write_particles):
    source = write_particles(tmp_path / "in")
    moved = Path(shutil.copytree(source.parent, tmp_path / "moved")) / source.name
    stores = [
        ParticleStore.open(prepare(*a, **k))
        for a, k in [
            ((source, tmp_path / "a"), {"seed": 1}),
            ((moved, tmp_path / "b"), {"seed": 1}),
            ((source, tmp_path / "c"), {"seed": 2}),
            ((source, tmp_path / "d"), {"seed": 1, "pixel_size": 2.5}),
        ]
    ]
    assert stores[0].fingerprint == stores[1].fingerprint
    assert len({store.fingerprint for store in stores}) == 3


def test_a_star_and_a_cs_file_of_the_same_dark_particles_give_the_same_images(shared_data, tmp_path):
    stores = {}
    for kind in ("star", "cs"):
        source = shared_data / CRYODRGN / f"empiar_10076_7.{kind}"
        stores[kind] = ParticleStore.open(prepare(source, tmp_path / kind, box=128, allow_missing_poses=True))
        assert stores[kind].attributes["sign"]["applied"] == -1  # the ribosomes are dark in the micrographs
        assert stores[kind].pixel_size == pytest.approx(1.31 * 320 / 128, rel=1e-5)
        assert not stores[kind].has_poses
    shard = "images/c/0/0/0"
    assert (tmp_path / "star" / shard).read_bytes() == (tmp_path / "cs" / shard).read_bytes()
    np.testing.assert_allclose(stores["star"].ctf, stores["cs"].ctf, rtol=1e-6)


def test_the_star_files_pixel_size_wins_over_the_stacks_header(shared_data, tmp_path):
    source = shared_data / CRYODRGN / "relion31.star"
    store = ParticleStore.open(prepare(source, tmp_path / "store", box=128, sign="+"))
    assert store.attributes["header_pixel_sizes_a"] == [1.0]
    assert store.pixel_size == pytest.approx(2 * 2.806)
    images = store.read(np.arange(5))
    axis = np.arange(128) - 64
    outside = np.hypot(axis[:, None], axis[None, :]) > 0.4 * 128
    np.testing.assert_allclose(images[:, outside].mean(axis=1), 0, atol=2e-3)
    np.testing.assert_allclose(images[:, outside].std(axis=1), 1, atol=2e-3)


def test_projecting_the_volume_by_the_stored_poses_gives_the_stored_images(shared_data, tmp_path):
    folder = shared_data / CRYODRGN
    rotations, _ = pickle.loads((folder / "toy_rot_trans.pkl").read_bytes())  # its shifts are not in these images
    (tmp_path / "rotations.pkl").write_bytes(pickle.dumps(rotations))
    source = folder / "toy_projections.star"
    options = {"poses": tmp_path / "rotations.pkl", "normalise": False}
    store = ParticleStore.open(prepare(source, tmp_path / "store", pixel_size=3.0, **options))
    with mrcfile.open(folder / "toymodel_small_nocenter.mrc", permissive=True) as mrc:
        z, y, x = np.nonzero(mrc.data)
        mass = mrc.data[z, y, x]
    centres = np.stack([x, y, z], axis=1) - 15.0
    for row in range(0, 1000, 50):
        placed = np.rint((centres @ store.rotations[row].T)[:, :2] + 15).astype(int)
        projection = np.zeros((30, 30))
        np.add.at(projection, (placed[:, 1], placed[:, 0]), mass)
        smooth = [ndimage.gaussian_filter(image, 1.0).ravel() for image in (projection, store.read([row])[0])]
        assert np.corrcoef(*smooth)[0, 1] > 0.99


def test_two_pixel_sizes_are_brought_to_one_grid(tmp_path):
    """The same spots, seen at 1.0 Å/px × 64 px and at 1.24 Å/px × 60 px, land in the same pixels of the store."""
    spots_a = np.array([[0.0, 0.0], [12.0, -7.0], [-15.0, 4.0]])
    optics, rows = [], []
    for group, (pixel_size, box) in enumerate([(1.0, 64), (1.24, 60)], start=1):
        axis = (np.arange(box) - box // 2) * pixel_size
        spots = [np.exp(-((axis[:, None] - y) ** 2 + (axis[None, :] - x) ** 2) / (2 * 3.0**2)) for x, y in spots_a]
        with mrcfile.new(tmp_path / f"{group}.mrcs") as mrc:
            mrc.set_data(np.array(spots, dtype=np.float32))
        optics.append({"rlnOpticsGroup": group, "rlnImagePixelSize": pixel_size, "rlnImageSize": box})
        rows += [{"rlnImageName": f"{i}@{group}.mrcs", "rlnOpticsGroup": group} for i in (1, 2, 3)]
    particles = pd.DataFrame(rows).assign(rlnAngleRot=0.0, rlnAngleTilt=0.0, rlnAnglePsi=0.0)
    starfile.write({"optics": pd.DataFrame(optics), "particles": particles}, tmp_path / "a.star")
    options = {"no_ctf": True, "normalise": False, "shuffle": False, "sign": "+", "dtype": "float32"}
    store = ParticleStore.open(prepare(tmp_path / "a.star", tmp_path / "store", **options))
    # 64 Å of the finer images in pixels no finer than the coarser ones': 50 px of 1.28 Å
    assert (store.box, store.pixel_size) == (50, pytest.approx(1.28))
    images = store.read(np.arange(6))
    np.testing.assert_allclose(images[:3], images[3:], atol=2e-3)
    axis = (np.arange(50) - 25) * 1.28
    for image, (x, y) in zip(images[:3], spots_a, strict=True):
        expected = np.exp(-((axis[:, None] - y) ** 2 + (axis[None, :] - x) ** 2) / (2 * 3.0**2))
        np.testing.assert_allclose(image, expected, atol=2e-3)


def test_pixel_sizes_that_differ_in_their_last_digits_share_a_grid(tmp_path):
    """100 px of 1.3099979 Å and 120 px of 1.31 Å: the field of view is 99.99984 of the coarser pixels, which is 100."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((2, 120, 120)).astype(np.float32)
    optics, rows = [], []
    for group, (pixel_size, box) in enumerate([(1.3099979, 100), (1.31, 120)], start=1):
        with mrcfile.new(tmp_path / f"{group}.mrcs") as mrc:
            mrc.set_data(images[:, 60 - box // 2 : 60 + box // 2, 60 - box // 2 : 60 + box // 2].copy())
        optics.append({"rlnOpticsGroup": group, "rlnImagePixelSize": pixel_size, "rlnImageSize": box})
        rows += [{"rlnImageName": f"{i}@{group}.mrcs", "rlnOpticsGroup": group} for i in (1, 2)]
    particles = pd.DataFrame(rows).assign(rlnAngleRot=0.0, rlnAngleTilt=0.0, rlnAnglePsi=0.0)
    starfile.write({"optics": pd.DataFrame(optics), "particles": particles}, tmp_path / "a.star")
    options = {"no_ctf": True, "normalise": False, "shuffle": False, "sign": "+", "dtype": "float32"}
    store = ParticleStore.open(prepare(tmp_path / "a.star", tmp_path / "store", **options))
    assert (store.box, store.pixel_size) == (100, pytest.approx(1.3099979))
    stored = store.read(np.arange(4))
    np.testing.assert_array_equal(stored[:2], images[:, 10:110, 10:110])
    # White noise loses its waves beyond the new Nyquist, which are none here: the same pixels, cut out.
    np.testing.assert_allclose(stored[2:], images[:, 10:110, 10:110], atol=1e-4)


@pytest.mark.parametrize("kind", ["npy", "pkl"])
def test_labels_follow_their_particles(tmp_path, write_particles, kind):
    labels = np.arange(150) % 7
    path = tmp_path / f"labels.{kind}"
    np.save(path, labels) if kind == "npy" else path.write_bytes(pickle.dumps(labels))
    store = ParticleStore.open(prepare(write_particles(tmp_path / "in"), tmp_path / "store", labels=path))
    np.testing.assert_array_equal(store.label, labels[store.source_index])


def test_a_shard_that_would_be_too_large_takes_fewer_images(tmp_path, write_particles, monkeypatch):
    monkeypatch.setattr(plan, "LARGEST_SHARD_BYTES", 2 * 64 * 16 * 16 * 2)  # two chunks of this set
    store = ParticleStore.open(prepare(write_particles(tmp_path / "in"), tmp_path / "store"))
    assert store.images_per_shard == 128
    assert len(list((store.path / "images/c").iterdir())) == 2


# --- refusals: one line, nothing left behind -------------------------------------------------------------------------


def _refuse_prep(refusal, kind, words, source, store, **options):
    message = refusal(kind, words, lambda: prepare(source, store, **options))
    assert not store.exists()
    assert not list(store.parent.glob(f".{store.name}*"))
    return message


def test_a_missing_stack_is_refused_by_name(tmp_path, write_particles, refusal):
    source = write_particles(tmp_path / "in")
    (tmp_path / "in/stacks/part02.mrcs").unlink()
    _refuse_prep(refusal, SourceError, [str(source), "part02.mrcs", "datadir"], source, tmp_path / "store")


def test_wrong_slice_number_names_file_and_row(tmp_path, write_particles, refusal):
    source = write_particles(tmp_path / "in", count=5)
    names = starfile.read(source)["particles"]["rlnImageName"].tolist()
    edited = _edited(source, "particles", rlnImageName=[*names[:3], "000006@stacks/part00.mrcs", names[4]])
    _refuse_prep(refusal, SourceError, ["row 4", "image 6", "part00.mrcs", "has 5"], edited, tmp_path / "store")


def test_a_truncated_stack_is_refused(tmp_path, write_particles, refusal):
    source = write_particles(tmp_path / "in")
    stack = tmp_path / "in/stacks/part01.mrcs"
    stack.write_bytes(stack.read_bytes()[:-100])
    _refuse_prep(refusal, SourceError, [str(stack), "truncated", "59 of the 60"], source, tmp_path / "store")


def test_a_box_that_is_not_the_stacks_is_refused(tmp_path, write_particles, refusal, shared_data):
    source = _edited(write_particles(tmp_path / "in"), "optics", rlnImageSize=20)
    _refuse_prep(refusal, SourceError, ["row 1", "20 px", "16 px", "part00.mrcs"], source, tmp_path / "store")
    real = shared_data / CRYODRGN / "toy_projections_13.star"  # says 300 px, the stack has 30
    _refuse_prep(refusal, SourceError, ["row 1", "300 px", "30 px"], real, tmp_path / "store")


def test_a_finer_grid_than_the_images_is_refused_with_the_finest_there_is(tmp_path, write_particles, refusal):
    source = write_particles(tmp_path / "in")
    _refuse_prep(refusal, ConfigError, ["box: 20 px", "2 Å/px", "at most 16 px"], source, tmp_path / "store", box=20)


def test_missing_poses_are_refused(shared_data, tmp_path, refusal):
    source = shared_data / CRYODRGN / "empiar_10076_7.star"
    _refuse_prep(refusal, SourceError, [str(source), "no poses", "rlnAngleRot"], source, tmp_path / "store")


def test_a_contrast_that_cannot_be_told_is_refused(tmp_path, write_particles, refusal):
    source = write_particles(tmp_path / "in", contrast=0.0)
    _refuse_prep(refusal, ConfigError, ["150 images", "bright or dark", "sign"], source, tmp_path / "store")
    assert ParticleStore.open(prepare(source, tmp_path / "store", sign="+")).attributes["sign"]["applied"] == 1


def test_a_blob_sign_that_the_images_contradict_is_refused(shared_data, tmp_path, refusal):
    rows = np.load(shared_data / CRYODRGN / "empiar_10076_7.cs")
    rows["blob/sign"] = 1
    source = tmp_path / "wrong.cs"
    with open(source, "wb") as file:
        np.save(file, rows)
    options = {"datadir": shared_data / CRYODRGN, "allow_missing_poses": True}
    _refuse_prep(refusal, ConfigError, [str(source), "blob/sign is +1", "dark"], source, tmp_path / "store", **options)


def test_blob_sign_decides_where_the_images_cannot(shared_data, tmp_path):
    noise = np.random.default_rng(0).standard_normal((7, 320, 320)).astype(np.float32)
    with mrcfile.new(tmp_path / "empiar_10076_7.mrc") as mrc:
        mrc.set_data(noise)
    options = {"datadir": tmp_path, "allow_missing_poses": True, "box": 32}
    store = prepare(shared_data / CRYODRGN / "empiar_10076_7.cs", tmp_path / "store", **options)
    sign = ParticleStore.open(store).attributes["sign"]
    assert (sign["applied"], sign["found_by"]) == (-1, "blob/sign")


def test_noise_free_images_are_refused_unless_normalising_is_off(tmp_path, write_particles, refusal):
    source = write_particles(tmp_path / "in", noise=0.0)
    with mrcfile.open(tmp_path / "in/stacks/part00.mrcs", mode="r+") as mrc:
        mrc.data[0] = 1.0
    options = {"sign": "+", "shuffle": False}
    refusal(
        SourceError,
        ["part00.mrcs: image 1", "flat background", "normalise off"],
        lambda: prepare(source, tmp_path / "store", **options),
    )
    prepare(source, tmp_path / "other", normalise=False, **options)


def test_values_that_float16_cannot_hold_are_refused(tmp_path, write_particles, refusal):
    source = write_particles(tmp_path / "in", contrast=1e6)
    call = {"sign": "+", "normalise": False}
    refusal(SourceError, ["too large for float16", "float32"], lambda: prepare(source, tmp_path / "a", **call))
    prepare(source, tmp_path / "b", dtype="float32", **call)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.arange(149), ["(149,)", "150 integers"]),
        (np.ones(150), ["float64", "150 integers"]),
        (np.arange(150) + 2**31 - 3, ["label 2147483648 in row 4", "to 2147483647"]),
        (np.array([0] * 149 + [2**64 - 1], dtype=np.uint64), ["label 18446744073709551615 in row 150"]),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path, write_particles, refusal, labels, words):
    np.save(tmp_path / "labels.npy", labels)
    source, options = write_particles(tmp_path / "in"), {"labels": tmp_path / "labels.npy"}
    _refuse_prep(refusal, SourceError, ["labels.npy", *words], source, tmp_path / "store", **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sign": "up"}, ["sign", "'up'", "auto"]),
        ({"dtype": "int8"}, ["dtype", "'int8'", "float16"]),
        ({"images_per_shard": 100}, ["images_per_shard", "100", "multiple of 64"]),
        ({"box": 4}, ["box", "4 px", "at least 8"]),
        ({"radius_a": -1.0}, ["radius_a", "-1 Å"]),
        ({"radius_a": 30.0}, ["radius_a", "30 Å", "32 Å"]),
        ({"pixel_size": 500.0}, ["500 Å"]),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(tmp_path, write_particles, refusal, options, words):
    source = write_particles(tmp_path / "in", count=5)
    _refuse_prep(refusal, (ConfigError, SourceError), words, source, tmp_path / "store", **options)


def test_a_place_that_cannot_be_written_to_is_refused_in_one_line(tmp_path, write_particles, refusal):
    source = write_particles(tmp_path / "in")
    (tmp_path / "file").write_text("in the way")
    refusal(ConfigError, ["cannot be made", "file"], lambda: prepare(source, tmp_path / "file" / "store"))
    refusal(ConfigError, ["exists and is not a particle store"], lambda: prepare(source, tmp_path / "file"))
    refusal(ConfigError, ["exists and is not a particle store"], lambda: prepare(source, tmp_path / "in"))
    assert (tmp_path / "in/particles.star").exists()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc, where not even root can make a folder")
def test_a_folder_without_permission_is_refused_in_one_line(tmp_path, write_particles, refusal, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 0, 2**40))
    source = write_particles(tmp_path / "in")
    refusal((ConfigError, StoreError), ["/proc/nowhere"], lambda: prepare(source, Path("/proc/nowhere/store")))


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    tmp_path, write_particles, refusal, monkeypatch
):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 1000, 1000))
    source = write_particles(tmp_path / "in")
    _refuse_prep(refusal, ConfigError, ["150 images of 16 px", "0.1 MiB", "free"], source, tmp_path / "store")


def test_a_store_of_another_version_is_not_continued(tmp_path, write_particles, refusal):
    source = write_particles(tmp_path / "in")
    store = prepare(source, tmp_path / "store")
    metadata = json.loads((store / "zarr.json").read_text())
    metadata["attributes"]["schema_version"] = 99
    (store / "zarr.json").write_text(json.dumps(metadata))
    refusal(StoreError, [str(store), "version 99"], lambda: prepare(source, store))
