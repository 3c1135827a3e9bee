"""2,000 damaged input files: each gives a verified store or one line of refusal, and never half a store.

The damage is what disks, editors and other programs do: bytes turned, files cut short, lines lost, doubled or swapped,
numbers that are huge, missing or no numbers. Every case is its number: `_damaged` makes it again.
"""

import hashlib
import pickle
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import starfile

from data_prep.checks import verify_store
from data_prep.convert import prepare
from spire_dist import files
from spire_dist.data.store import ParticleStore
from spire_dist.errors import SpireError

CASES = 2000
COUNT, BOX = 6, 16
Prepared = Callable[[Path, Path], object]

# --- the data set in every format ------------------------------------------------------------------------------------


def _write_all(folder: Path, star: Path) -> None:
    """The particles of a RELION 3.1 STAR file in every other format, in one folder with their stacks."""
    blocks = starfile.read(star, always_dict=True)
    particles = blocks["particles"]
    older = particles.drop(columns=["rlnOpticsGroup", "rlnOriginXAngst", "rlnOriginYAngst"]).assign(
        rlnOriginX=0.5, rlnOriginY=-1.5, rlnMagnification=1e4, rlnDetectorPixelSize=2.0, rlnVoltage=300.0,
        rlnSphericalAberration=2.7, rlnAmplitudeContrast=0.1, rlnPhaseShift=0.0,
    )  # fmt: skip
    starfile.write({"": older}, folder / "older.star")
    names = particles["rlnImageName"].str.split("@", expand=True)
    alignment = [("alignments3D/pose", "f4", 3), ("alignments3D/shift", "f4", 2), ("alignments3D/psize_A", "f4")]
    ctf = ["df1_A", "df2_A", "df_angle_rad", "accel_kv", "cs_mm", "amp_contrast", "phase_shift_rad"]
    blob = [
        ("blob/path", "S24"),
        ("blob/idx", "u4"),
        ("blob/shape", "u4", 2),
        ("blob/psize_A", "f4"),
        ("blob/sign", "f4"),
    ]
    rows = np.zeros(COUNT, dtype=[("uid", "u8"), *blob, *((f"ctf/{name}", "f4") for name in ctf), *alignment])
    rng = np.random.default_rng(0)
    rows["uid"] = rng.integers(2**63, size=COUNT)
    rows["blob/path"], rows["blob/idx"] = [f">{n}".encode() for n in names[1]], names[0].astype(int) - 1
    rows["blob/shape"], rows["blob/psize_A"], rows["blob/sign"] = BOX, 2.0, 1.0
    for name, value in zip(ctf, (15e3, 14e3, 0.5, 300, 2.7, 0.1, 0), strict=True):
        rows[f"ctf/{name}"] = value
    rows["alignments3D/pose"], rows["alignments3D/psize_A"] = rng.normal(size=(COUNT, 3)), 2.0
    own = [name for name in rows.dtype.names or () if not name.startswith("ctf/")]
    for name, table in (
        ("whole.cs", rows),
        ("main.cs", rows[own]),
        ("more.cs", rows[["uid", *(f"ctf/{n}" for n in ctf)]]),
    ):
        with open(folder / name, "wb") as file:
            np.save(file, np.array(table.tolist(), dtype=[(n, table.dtype[n]) for n in table.dtype.names or ()]))
    slots = {"blob": "main", "alignments3D": "main", "ctf": "more"}
    entries = "".join(
        f"  {slot}:\n    metafile: '>{file}.cs'\n    num_items: {COUNT}\n" for slot, file in slots.items()
    )
    (folder / "group.csg").write_text(
        f"created: 2024-03-27\ngroup:\n  name: particles\n  type: particle\nresults:\n{entries}"
    )
    (folder / "list.txt").write_text("\n".join(["# all stacks", *sorted(set(names[1]))]) + "\n")
    table = np.tile(np.float32([BOX, 2.0, 15e3, 14e3, 30, 300, 2.7, 0.1, 0]), (COUNT, 1))
    poses = (np.tile(np.eye(3, dtype=np.float32), (COUNT, 1, 1)), np.zeros((COUNT, 2), dtype=np.float32))
    (folder / "ctf.pkl").write_bytes(pickle.dumps(table, protocol=2))
    (folder / "poses.pkl").write_bytes(pickle.dumps(poses, protocol=4))


def _from_star(folder: Path, store: Path) -> object:
    return prepare(folder / "particles.star", store, sign="+", workers=1)


def _from_older_star(folder: Path, store: Path) -> object:
    return prepare(folder / "older.star", store, sign="+", workers=1)


def _from_cs(folder: Path, store: Path) -> object:
    return prepare(folder / "whole.cs", store, sign="+", workers=1)


def _from_joined_cs(folder: Path, store: Path) -> object:
    return prepare(folder / "main.cs", store, sign="+", workers=1, passthrough=[folder / "more.cs"])


def _from_group(folder: Path, store: Path) -> object:
    return prepare(folder / "group.csg", store, sign="+", workers=1)


def _from_list(folder: Path, store: Path) -> object:
    pickles = {name: folder / f"{name}.pkl" for name in ("poses", "ctf")}
    return prepare(folder / "list.txt", store, sign="+", workers=1, **pickles)


STACK_HEADER = 1024
KINDS: dict[str, tuple[str, Prepared, int | None]] = {
    "star": ("particles.star", _from_star, None),
    "older star": ("older.star", _from_older_star, None),
    "cs": ("whole.cs", _from_cs, None),
    "cs header": ("whole.cs", _from_cs, 900),
    "passthrough": ("more.cs", _from_joined_cs, None),
    "csg": ("group.csg", _from_group, None),
    "list": ("list.txt", _from_list, None),
    "stack header": ("stacks/part00.mrcs", _from_star, STACK_HEADER),
    "poses": ("poses.pkl", _from_list, None),
    "ctf": ("ctf.pkl", _from_list, None),
}
"""The file to damage, how a store is made from it, and, where only its beginning is damaged, how many bytes that is."""

# --- damage ----------------------------------------------------------------------------------------------------------

WORDS = [b"nan", b"inf", b"-1e400", b"1e30", b"0", b"-1", b"9" * 20, b'""', b"'a b'", b"<NA>", b"\xc3\xa5\xe2\x80\xa8"]
WORDS += [b"_rlnImageName", b"data_", b"#", b"loop_", b"\0", b"\xff"]
PATTERNS = [
    b"\xff" * 4,
    b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\x7f",
    b"\x80\0\0\0",
    b"\0" * 4,
    b"\0\0\xc0\x7f",
    b"\0\0\x80\x7f",
    b"\n\r\n\r",
]


def _turn_bytes(rng: np.random.Generator, content: bytes) -> bytes:
    damaged = bytearray(content)
    for place in rng.integers(len(content), size=rng.integers(1, 9)):
        damaged[place] ^= 1 << int(rng.integers(8))
    return bytes(damaged)


def _put_pattern(rng: np.random.Generator, content: bytes) -> bytes:
    place = int(rng.integers(max(len(content) // 4, 1))) * 4
    return content[:place] + PATTERNS[rng.integers(len(PATTERNS))] + content[place + 4 :]


def _cut(rng: np.random.Generator, content: bytes) -> bytes:
    return content[: rng.integers(len(content))]


def _lose_bytes(rng: np.random.Generator, content: bytes) -> bytes:
    place = int(rng.integers(len(content)))
    return content[:place] + content[place + int(rng.integers(1, 40)) :]


def _double_bytes(rng: np.random.Generator, content: bytes) -> bytes:
    place = int(rng.integers(len(content)))
    return content[: place + int(rng.integers(1, 40))] + content[place:]


def _edit_lines(rng: np.random.Generator, content: bytes) -> bytes:
    lines = content.split(b"\n")
    one, other = (int(i) for i in rng.integers(len(lines), size=2))
    match rng.integers(4):
        case 0:
            del lines[one]
        case 1:
            lines.insert(other, lines[one])
        case 2:
            lines[one], lines[other] = lines[other], lines[one]
        case 3:
            lines[one] = lines[one].replace(b" ", b"\t").rstrip() + b"\r"
    return b"\n".join(lines)


def _edit_words(rng: np.random.Generator, content: bytes) -> bytes:
    lines = content.split(b"\n")
    long = [i for i, line in enumerate(lines) if len(line.split()) > 1]
    if not long:
        return _turn_bytes(rng, content)
    one = long[int(rng.integers(len(long)))]
    words = lines[one].split()
    place, other = (int(i) for i in rng.integers(len(words), size=2))
    if rng.integers(3):
        words[place] = WORDS[rng.integers(len(WORDS))]
    else:
        words[place], words[other] = words[other], words[place]
    lines[one] = b" ".join(words)
    return b"\n".join(lines)


DAMAGES = (_turn_bytes, _put_pattern, _cut, _lose_bytes, _double_bytes, _edit_lines, _edit_words, _edit_words)


def _damaged(kind: str, number: int, content: bytes) -> bytes:
    """What case `number` makes of the file of `kind`."""
    rng = np.random.default_rng([list(KINDS).index(kind), number])
    length = KINDS[kind][2]
    first, rest = (content, b"") if length is None else (content[:length], content[length:])
    return DAMAGES[rng.integers(len(DAMAGES))](rng, first) + rest


# --- the test --------------------------------------------------------------------------------------------------------


def _outcome(make: Prepared, folder: Path, store: Path) -> str:
    """Empty where the case went as it must, else what went wrong."""
    try:
        make(folder, store)
    except SpireError as error:
        if "\n" in str(error) or "\r" in str(error) or not str(error):
            return f"not one line: {str(error)!r}"
        return "a store was left" if store.exists() else ""
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    particles = ParticleStore.open(store)
    problems = verify_store(store)
    if not np.isfinite(particles.read(np.arange(particles.count))).all():
        problems.append("images that are not finite")
    for name in ("rotations", "shifts", "ctf"):
        if not np.isfinite(getattr(particles, name)).all():
            problems.append(f"{name} that are not finite")
    return "; ".join(problems)


@pytest.fixture(scope="module")
def intact(tmp_path_factory, write_particles) -> Path:
    star = write_particles(tmp_path_factory.mktemp("fuzz") / "intact", count=COUNT, box=BOX, per_stack=4)
    _write_all(star.parent, star)
    return star.parent


@pytest.mark.parametrize("kind", KINDS)
def test_the_intact_file_gives_a_store(intact, tmp_path, kind):
    KINDS[kind][1](intact, tmp_path / "store")
    assert ParticleStore.open(tmp_path / "store").count == COUNT


@pytest.mark.parametrize(
    ("kind", "read"),
    [("csg", {"group.csg", "main.cs", "more.cs"}), ("list", {"list.txt", "poses.pkl", "ctf.pkl"})],
)
def test_every_file_that_was_read_is_recorded_with_its_hash(intact, tmp_path, kind, read):
    KINDS[kind][1](intact, tmp_path / "store")
    inputs = ParticleStore.open(tmp_path / "store").attributes["inputs"]
    assert {Path(entry["path"]).name for entry in inputs} == read
    for entry in inputs:
        assert hashlib.sha256(Path(entry["path"]).read_bytes()).hexdigest() == entry["sha256"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_gives_a_verified_store_or_one_line(intact, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(files, "flush", lambda path: None)  # waiting for the disk, ten thousand times
    name, make, _ = KINDS[kind]
    folder, store = Path(shutil.copytree(intact, tmp_path / "in")), tmp_path / "store"
    content = (folder / name).read_bytes()
    wrong, stores, memory = [], 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(CASES // len(KINDS)):
        (folder / name).write_bytes(_damaged(kind, number, content))
        if problem := _outcome(make, folder, store):
            wrong.append(f"{kind} {number}: {problem}")
        stores += store.exists()
        shutil.rmtree(store, ignore_errors=True)
    assert wrong == []
    assert 0 < stores < CASES // len(KINDS)  # the damage is neither always fatal nor never felt
    if sys.platform == "linux":  # elsewhere in other units
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
        assert grown < 300 * 2**10, f"{grown / 2**10:.0f} MiB more for six tiny images"
