"""Real files of many programs: each is read right or refused by name. docs/formats.md tells the same of every one.

A file that comes into the folder and is not in this table fails the test, so that none is passed over.
"""

import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import pytest

from data_prep.cryodrgn import with_cryodrgn_ctf, with_cryodrgn_poses
from data_prep.sources import read_particles
from data_prep.stacks import open_stack, read_slices
from spire_dist.errors import SourceError

DOCS = Path(__file__).parents[2] / "docs" / "formats.md"
FOLDERS = ("metadata", "particles", "tilt")

NO_CTF = {"no_ctf": True}


@dataclass(frozen=True)
class Particles:
    """What a particle file must give."""

    images: int
    pixel_sizes: tuple[float, ...]
    box: int | None
    poses: bool = True
    groups: int = 1
    stacks: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    words: tuple[str, ...] = ()
    """Of the reason why there are no poses."""
    premultiplied: bool = False
    """Multiplied by their CTF: read, but no store is made of them."""


@dataclass(frozen=True)
class Refused:
    words: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Images:
    """What a stack must hold; its pixels are compared with mrcfile's."""

    count: int
    box: int
    mode: int = 2


@dataclass(frozen=True)
class CtfOf:
    """A cryoDRGN CTF pickle: the same CTF as the particle file has itself, to the last digits of float32."""

    particles: str
    columns: int = 7
    """How many of them the particle file has itself."""
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PosesOf:
    """A cryoDRGN pose pickle; the same poses as the particle file has, where it has any."""

    particles: str
    box: int
    options: Mapping[str, Any] = field(default_factory=dict)


NO_PARTICLES = Refused(("no particles", "rlnImageName"))
NO_KIND = Refused(("unknown kind '.pkl'",))
NO_CTF_COLUMN = Refused(("column rlnDefocusU is missing", "no_ctf"))
SUBTOMOGRAMS = Refused(("subtomograms",))
BARE_STACK = Refused(("stacks have no CTF", "no_ctf"))

CRYODRGN_METADATA = "metadata/ml-struct-bio+cryodrgn/tests/data/"
CRYODRGN = "particles/ml-struct-bio+cryodrgn/tests/data/"
ASPIRE = "particles/ComputationalCryoEM+ASPIRE-Python/"
SIMPLE = "particles/bogdantoader+simplecryoem/notebooks/comparisons/data/"
WARP = "tilt/bpowell122+tomodrgn/testing/data/warptools_test_"
PFCRT = f"{CRYODRGN_METADATA}FinalRefinement-OriginalParticles-PfCRT.star"
REFINED_CS = f"{CRYODRGN_METADATA}cryosparc_P12_J24_001_particles.cs"

Outcome = Particles | Refused | Images | CtfOf | PosesOf
ZOO: dict[str, list[Outcome]] = {
    # particle files without their images
    "metadata/compSPI+ioSPI/tests/data/test.star": [Particles(452, (1.911,), 128, stacks=6)],
    PFCRT: [
        Refused(("rlnAmplitudeContrast is missing", "no_ctf")),
        Particles(5, (1.035,), None, options=NO_CTF),
    ],
    f"{CRYODRGN_METADATA}relion31.6opticsgroups.star": [Particles(139, (1.24, 1.25), 196, groups=6, stacks=139)],
    f"{CRYODRGN_METADATA}relion5.star": [Particles(17, (0.89,), 448, stacks=2)],
    f"{CRYODRGN_METADATA}cryosparc_J2_particles_exported.cs": [
        Particles(22, (1.345,), 300, poses=False, words=("2-D only", "alignments2D"))
    ],
    REFINED_CS: [Particles(2019, (2.95,), 180, stacks=50)],
    f"{CRYODRGN_METADATA}pose.cs.pkl": [NO_KIND, PosesOf(REFINED_CS, 180)],
    f"{CRYODRGN_METADATA}ctf2.pkl": [NO_KIND, CtfOf(REFINED_CS)],
    # STAR files of other things
    "metadata/scipion-em+scipion-em-relion/_history/relion/convert/mtfs/mtf_k3_standard_300kV.star": [NO_PARTICLES],
    "metadata/teamtomo+starfile/tests/data/loop_double_quote.star": [NO_PARTICLES],
    "metadata/teamtomo+starfile/tests/data/loop_single_quote.star": [NO_PARTICLES],
    "metadata/teamtomo+starfile/tests/data/postprocess.star": [NO_PARTICLES],
    "metadata/teamtomo+starfile/tests/data/two_single_line_loop_blocks.star": [NO_PARTICLES],
    # subtomograms and tilt series
    "metadata/EuanPyle+relion2dynamo/test_data/refine.star": [SUBTOMOGRAMS],
    "metadata/turonova+cryoCAT/tests/test_data/motl_data/relion_3.0.star": [
        SUBTOMOGRAMS,
        Refused(SUBTOMOGRAMS.words, NO_CTF),
    ],
    "metadata/turonova+cryoCAT/tests/test_data/motl_data/relion_3.1_optics2.star": [SUBTOMOGRAMS],
    "metadata/hanjinliu+cylindra/cylindra_builtins/relion/tests/test_jobs/Class3D/job_class3d/run_it025_data.star": [
        Refused(("tilt-series", "tomograms"))
    ],
    f"{WARP}4-tomos_10-ptcls_box-32_angpix-12.star": [
        Particles(1430, (12.0,), 32, groups=4, stacks=40, premultiplied=True)
    ],
    f"{WARP}4-tomos_10-ptcls_box-32_angpix-12_optimisation_set.star": [
        Particles(1430, (12.0,), 32, groups=4, stacks=40, premultiplied=True)
    ],
    f"{WARP}4-tomos_10-ptcls_box-32_angpix-12_tomograms.star": [NO_PARTICLES],
    f"{WARP}4-tomos_10-ptcls_box-32_angpix-12/Unt_???/Unt_???_12.00A_0000??.mrcs": [Images(37, 32, mode=12)],
    f"{WARP}box-32_angpix-12_reconstruct.mrc": [Images(32, 32)],
    # particle files with their images
    f"{CRYODRGN}relion31.star": [Particles(5, (2.806,), 256)],
    f"{CRYODRGN}relion31.v2.star": [Particles(5, (2.806,), 256)],
    f"{CRYODRGN}relion31.mrcs": [BARE_STACK, Images(5, 256)],
    f"{CRYODRGN}empiar_10076_7.star": [Particles(7, (1.3099979,), None, poses=False, words=("rlnAngleRot",))],
    f"{CRYODRGN}empiar_10076_7.cs": [Particles(7, (1.3099979,), 320, poses=False, words=("alignments3D/pose",))],
    f"{CRYODRGN}empiar_10076_7.mrc": [BARE_STACK, Images(7, 320)],
    f"{CRYODRGN}toy_projections.star": [
        Refused(("no pixel size", "pixel_size")),
        Particles(1000, (1.0,), None, poses=False, options={"pixel_size": 1.0}),
    ],
    f"{CRYODRGN}toy_projections_13.star": [Particles(13, (1.035,), 300, poses=False)],
    f"{CRYODRGN}toy_projections.mrcs": [
        BARE_STACK,
        Refused(("no pixel size", "headers say 1"), NO_CTF),
        Particles(1000, (1.5,), None, poses=False, options={"no_ctf": True, "pixel_size": 1.5}),
        Images(1000, 30),
    ],
    f"{CRYODRGN}toymodel_small_nocenter.mrc": [Images(30, 30)],
    f"{CRYODRGN}ctf1.pkl": [NO_KIND, CtfOf(PFCRT, 0, NO_CTF)],
    f"{CRYODRGN}pose.star.pkl": [NO_KIND, PosesOf(PFCRT, 300, NO_CTF)],
    f"{CRYODRGN}test_ctf.pkl": [NO_KIND, CtfOf(f"{CRYODRGN}toy_projections.star", options={"pixel_size": 1.0})],
    f"{CRYODRGN}toy_rot_trans.pkl": [NO_KIND, PosesOf(f"{CRYODRGN}toy_projections.star", 30, {"pixel_size": 1.0})],
    f"{ASPIRE}gallery/tutorials/data/clean70SRibosome_vol_65p.mrc": [Images(65, 65)],
    f"{ASPIRE}tests/saved_test_data/rln_proj_64.star": [
        Refused(("no pixel size",)),
        Particles(5, (5.0,), None, options={"no_ctf": True, "pixel_size": 5.0}),
    ],
    f"{ASPIRE}tests/saved_test_data/rln_proj_65.star": [
        Refused(("no pixel size",)),
        Particles(5, (5.0,), None, options={"no_ctf": True, "pixel_size": 5.0}),
    ],
    f"{ASPIRE}tests/saved_test_data/rln_proj_64_shifted.star": [
        NO_CTF_COLUMN,
        Particles(4, (1.0,), 64, options=NO_CTF),
    ],
    f"{ASPIRE}tests/saved_test_data/rln_proj_65_shifted.star": [
        NO_CTF_COLUMN,
        Particles(4, (1.0,), 65, options=NO_CTF),
    ],
    f"{ASPIRE}tests/saved_test_data/rln_proj_64.mrcs": [Images(5, 64)],
    f"{ASPIRE}tests/saved_test_data/rln_proj_64_shifted.mrcs": [Images(4, 64)],
    f"{ASPIRE}tests/saved_test_data/rln_proj_65.mrcs": [Images(5, 65)],
    f"{ASPIRE}tests/saved_test_data/rln_proj_65_shifted.mrcs": [Images(4, 65)],
    f"{SIMPLE}relion_proj_batch_pfac2.star": [Particles(24, (3.54,), 64)],
    f"{SIMPLE}relion_proj_batch_pfac2.mrcs": [Images(24, 64)],
    f"{SIMPLE}pointmass.mrc": [Images(64, 64)],
}
"""File, or pattern of alike files, and what becomes of it."""


@pytest.mark.parametrize("name", ZOO)
def test_file_is_read_right_or_refused_by_name(shared_data: Path, refusal, name: str):
    paths = sorted(shared_data.glob(name)) if "?" in name else [shared_data / name]
    assert paths
    for path in paths:
        for outcome in ZOO[name]:
            _check(shared_data, path, outcome, refusal)


def _check(folder: Path, path: Path, outcome: Outcome, refusal) -> None:
    match outcome:
        case Refused(words, options):
            refusal(SourceError, [str(path), *words], lambda: read_particles(path, **options))
        case Particles():
            _check_particles(path, outcome)
        case Images(count, box, mode):
            stack = open_stack(path)
            assert (stack.count, stack.box) == (count, box)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # headers without the MAP word
                with mrcfile.open(path, permissive=True) as mrc:
                    assert mrc.header.mode == mode
                    np.testing.assert_array_equal(read_slices(stack, np.arange(count)), mrc.data.astype(np.float32))
        case CtfOf(particles, columns, options):
            own = read_particles(folder / particles, **options)
            pickled = with_cryodrgn_ctf(own, path)
            np.testing.assert_allclose(pickled.ctf[:, :columns], own.ctf[:, :columns], rtol=1e-6)
            np.testing.assert_array_equal(pickled.ctf[:, :7], pickle.loads(path.read_bytes())[:, 2:])
        case PosesOf(particles, box, options):
            own = read_particles(folder / particles, **options)
            posed = with_cryodrgn_poses(own, path, box * own.pixel_size_a)
            rotations, centring = pickle.loads(path.read_bytes())
            np.testing.assert_array_equal(posed.rotations, rotations.astype(np.float32))
            np.testing.assert_allclose(posed.shifts_a, -centring * box * own.pixel_size_a[:, None], atol=1e-4)
            if own.rotations is not None:
                np.testing.assert_allclose(posed.rotations, own.rotations, atol=1e-6)
                np.testing.assert_allclose(posed.shifts_a, own.shifts_a, atol=1e-4)


def _check_particles(path: Path, expected: Particles) -> None:
    table = read_particles(path, **expected.options)
    assert len(table) == expected.images
    assert len(table.image_paths) == len(np.unique(table.image_file)) == expected.stacks
    assert len(np.unique(table.optics_group)) == expected.groups
    np.testing.assert_allclose(np.unique(table.pixel_size_a), expected.pixel_sizes, rtol=1e-6)
    if expected.box is None:
        assert table.stated_box is None
    else:
        np.testing.assert_array_equal(table.stated_box, expected.box)
    assert np.isfinite(table.ctf).all()
    assert table.ctf_premultiplied is expected.premultiplied
    assert (table.rotations is not None) is expected.poses
    for word in expected.words:
        assert word in table.missing_poses
    if table.rotations is not None and table.shifts_a is not None:
        products = table.rotations @ np.swapaxes(table.rotations, 1, 2)
        np.testing.assert_allclose(products, np.broadcast_to(np.eye(3), products.shape), atol=1e-5)
        assert np.isfinite(table.shifts_a).all()


def test_no_file_is_left_out(shared_data: Path):
    files = [
        path.relative_to(shared_data) for name in FOLDERS for path in (shared_data / name).rglob("*") if path.is_file()
    ]
    assert len(files) > 80
    unknown = [str(path) for path in files if not any(fnmatch(str(path), name) for name in ZOO)]
    assert unknown == []


def test_the_documentation_tells_of_every_file():
    page = DOCS.read_text()
    assert [name for name in ZOO if f"`{name.rpartition('/')[2]}`" not in page] == []
