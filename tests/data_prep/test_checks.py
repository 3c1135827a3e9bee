"""Verify names what is wrong and only that; inspect says and shows what is there."""

import mrcfile
import numpy as np
import pytest
import starfile

from data_prep.checks import inspect_store, verify_store
from data_prep.convert import prepare
from data_prep.picture import average_view, viewing_groups
from spire_dist.data.store import ParticleStore
from spire_dist.errors import StoreError
from spire_dist.physics.poses import matrices_from_relion_angles


@pytest.fixture
def store(tmp_path, write_particles):
    return prepare(write_particles(tmp_path / "in"), tmp_path / "store", images_per_shard=64)


def test_a_good_store_has_no_problems(store):
    assert verify_store(store) == []


@pytest.mark.parametrize(("shard", "particles"), [(0, "0 to 63"), (2, "128 to 149")])
def test_a_flipped_byte_is_named_by_shard_and_particles(store, shard, particles):
    path = store / f"images/c/{shard}/0/0"
    content = bytearray(path.read_bytes())
    content[1234] ^= 0x10
    path.write_bytes(content)
    (problem,) = verify_store(store, source=False)
    for word in (str(path), "sha256", f"particles {particles}", "command that made it again"):
        assert word in problem
    assert "\n" not in problem


def test_the_remedy_that_verify_gives_mends_the_store(store, tmp_path):
    fingerprint = ParticleStore.open(store).fingerprint
    shard = store / "images/c/1/0/0"
    shard.write_bytes(bytes(len(shard.read_bytes())))
    assert len(verify_store(store, source=False)) == 1
    shard.unlink()
    (store / "manifest.json").unlink()
    prepare(tmp_path / "in/particles.star", store, images_per_shard=64)
    assert verify_store(store) == []
    assert ParticleStore.open(store).fingerprint == fingerprint


def test_missing_shards_and_a_changed_manifest_are_each_named(store):
    for shard in (0, 2):
        (store / f"images/c/{shard}/0/0").unlink()
    manifest = store / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"fingerprint": "', '"fingerprint": "0'))
    first, last, fingerprint = verify_store(store, source=False)
    assert "images/c/0/0/0: is missing: particles 0 to 63" in first
    assert "images/c/2/0/0: is missing: particles 128 to 149" in last
    assert "manifest.json: its fingerprint" in fingerprint


@pytest.mark.parametrize("damage", ["short", "gone", "changed"])
def test_a_damaged_table_is_named_and_never_read_as_zeros(store, refusal, damage):
    table = store / "ctf/c/0/0"
    content = table.read_bytes()
    table.unlink() if damage == "gone" else table.write_bytes(content[:-4] if damage == "short" else content[::-1])
    (problem,) = verify_store(store)
    assert str(table) in problem
    if damage != "changed":
        refusal(StoreError, [str(table), "verify"], lambda: ParticleStore.open(store))


def test_damaged_metadata_is_one_line(store, refusal):
    metadata = store / "shifts/zarr.json"
    metadata.write_text(metadata.read_text().replace("float32", "floatXX"))
    refusal(StoreError, [str(store), "damaged"], lambda: ParticleStore.open(store))


def test_a_source_that_changed_or_went_away_is_named(store, tmp_path):
    star, stack = tmp_path / "in/particles.star", tmp_path / "in/stacks/part01.mrcs"
    text = star.read_text()
    star.write_text(text.replace("opticsGroup1", "opticsGroup2"))
    (problem,) = verify_store(store)
    assert str(star) in problem
    assert "content changed" in problem
    star.write_text(text)
    stack.rename(stack.with_suffix(".gone"))
    (problem,) = verify_store(store)
    assert str(stack) in problem
    assert "gone" in problem
    assert verify_store(store, source=False) == []


def test_an_image_that_is_no_longer_what_was_stored_is_named_by_row(tmp_path, write_particles):
    source = write_particles(tmp_path / "in", count=50)  # few enough that verify compares all
    store = prepare(source, tmp_path / "store")
    with mrcfile.mmap(tmp_path / "in/stacks/part00.mrcs", mode="r+") as mrc:
        mrc.data[7, 3, 3] += 5.0
    (problem,) = verify_store(store)
    row = int(np.flatnonzero(ParticleStore.open(store).source_index == 7)[0])
    assert f"particle {row}, " in problem
    assert f"row 8 of {source}" in problem


def test_an_unfinished_store_cannot_be_verified(store, refusal):
    (store / "manifest.json").unlink()
    refusal(StoreError, ["unfinished"], lambda: verify_store(store))
    refusal(StoreError, ["unfinished"], lambda: inspect_store(store, None))


def test_inspect_says_what_the_store_holds(store, tmp_path):
    text = inspect_store(store, None)
    particles = ParticleStore.open(store)
    for words in (
        "150, 0.07324 MiB as float16",
        "16 px at 2 Å/px = 32 Å",
        "contrast was kept as it was (found from the centres of 150 images",
        "normalised outside 12.8 Å of the centre: mean 0.00, standard deviation 1.00",
        "known; shifts",
        "300 kV, Cs 2.7 mm, amplitude contrast 0.1, phase shift 0°",
        "opticsGroup1: 150 particles, 16 px at 2 Å/px",
        str(tmp_path / "in/particles.star"),
        particles.fingerprint,
    ):
        assert words in text


def test_inspect_says_what_the_image_model_leaves_out(tmp_path, write_particles):
    source = write_particles(tmp_path / "in", count=5)
    blocks = starfile.read(source, always_dict=True)
    blocks["optics"] = blocks["optics"].assign(rlnBeamTiltX=0.3, rlnBeamTiltY=0.0, rlnOddZernike="[0,0.1,0]")
    starfile.write(blocks, source)
    text = inspect_store(prepare(source, tmp_path / "store", sign="+"), None)
    assert "beam tilt, odd aberrations" in text


@pytest.mark.parametrize("options", [{}, {"no_ctf": True}])
def test_the_picture_is_a_png(tmp_path, write_particles, options):
    store = prepare(write_particles(tmp_path / "in"), tmp_path / "store", **options)
    picture = tmp_path / "new" / "store.png"
    assert str(picture) in inspect_store(store, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_store_of_two_particles_without_poses_has_a_picture_too(tmp_path, write_particles):
    source = write_particles(tmp_path / "in", count=2)
    blocks = starfile.read(source, always_dict=True)
    blocks["particles"] = blocks["particles"].drop(columns="rlnAngleRot")
    starfile.write(blocks, source)
    store = prepare(source, tmp_path / "store", sign="+", allow_missing_poses=True)
    text = inspect_store(store, tmp_path / "store.png")
    assert "not for training" in text
    assert (tmp_path / "store.png").stat().st_size > 1000


def test_averages_bring_every_view_of_a_molecule_onto_its_reference(tmp_path, write_particles):
    """Two spots of a rigid molecule, drawn by poses and shifts; averages show both where the reference does."""
    count, box, pixel_size = 400, 32, 3.0
    source = write_particles(tmp_path / "in", count=count, box=box, pixel_size=pixel_size, per_stack=count)
    blocks = starfile.read(source, always_dict=True)
    particles = blocks["particles"]
    rotations = matrices_from_relion_angles(*(particles[f"rlnAngle{name}"] for name in ("Rot", "Tilt", "Psi")))
    shifts_a = -particles[["rlnOriginXAngst", "rlnOriginYAngst"]].to_numpy()
    molecule_a = np.array([[18.0, 0.0, 0.0], [-6.0, 12.0, 3.0]])
    axis = (np.arange(box) - box // 2) * pixel_size
    images = np.zeros((count, box, box), dtype=np.float32)
    for point, height in zip(molecule_a, (2.0, 1.0), strict=True):
        x, y = ((rotations @ point)[:, :2] + shifts_a).T
        along = [np.exp(-((axis[None, :] - c[:, None]) ** 2) / (2 * 5.0**2)) for c in (y, x)]
        images += height * along[0][:, :, None] * along[1][:, None, :]
    with mrcfile.new(tmp_path / "in/stacks/part00.mrcs", overwrite=True) as mrc:
        mrc.set_data(images)
    options = {"no_ctf": True, "normalise": False, "sign": "+"}
    store = ParticleStore.open(prepare(source, tmp_path / "store", **options))
    rows, groups = viewing_groups(store)
    assert len(rows) == 8
    assert min(len(group) for group in groups) > 1
    for row, group in zip(rows, groups, strict=True):
        assert group[0] == row
        reference = average_view(store, group[:1])
        average = average_view(store, group)
        assert np.corrcoef(reference.ravel(), average.ravel())[0, 1] > 0.97
