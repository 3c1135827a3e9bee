"""cryoDRGN's inputs: stacks and .txt lists of stacks as particle tables, and its pickles of poses and CTF.

Its pose and CTF pickles fit any other particle file too, row for row. Called by `sources.py` and `plan.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.stacks import STACK_SUFFIXES, Stack, open_stack
from data_prep.table import ParticleTable, finite, sane_pixel_sizes
from spire_dist import numpy_pickle
from spire_dist.errors import SourceError
from spire_dist.schema import NO_CTF


def read_stacks(
    source: Path, pixel_size: float | None, no_ctf: bool, ctf: Path | None, find: Callable[[Sequence[str]], list[Path]]
) -> ParticleTable:
    """The images of a stack, or of all stacks of a .txt list in its order; see `sources.read_particles`.

    Such a file says nothing but where the images are: the CTF is that of `ctf`, a cryoDRGN pickle, unless `no_ctf`; the
    pixel size too, unless `pixel_size` (Å/px) is given.
    """
    names = _listed_stacks(source) if source.suffix.lower() == ".txt" else [source.name]
    stacks = [open_stack(path) for path in find(names)]
    if ctf is None and not no_ctf:
        raise SourceError(f"{source}: stacks have no CTF; give cryoDRGN's ctf pickle, or no_ctf for images without one")
    counts = [stack.count for stack in stacks]
    boxes, count = np.repeat([stack.box for stack in stacks], counts), sum(counts)
    return ParticleTable(
        source=source,
        image_paths=names,
        image_file=np.repeat(np.arange(len(stacks), dtype=np.int32), counts),
        slice_index=np.concatenate([np.arange(n, dtype=np.int64) for n in counts]),
        rotations=None,
        shifts_a=None,
        ctf=np.tile(np.array(NO_CTF, dtype=np.float32), (count, 1)),
        optics_group=np.zeros(count, dtype=np.int32),
        optics_names=["opticsGroup1"],
        pixel_size_a=_pixel_sizes(source, boxes, pixel_size, ctf, stacks),
        stated_box=None,
        sign_hint=None,
        ignored=[],
        missing_poses="a stack has none",
    )


def with_cryodrgn_ctf(table: ParticleTable, ctf: Path) -> ParticleTable:
    """The table with the CTF of a cryoDRGN pickle [N, 9], whose last seven columns are the first of ours.

    cryoDRGN's CTF has the opposite sign of RELION's; its parameters mean the same.
    """
    values = _ctf_rows(ctf, len(table), table.source)
    parameters = np.tile(np.array(NO_CTF, dtype=np.float32), (len(table), 1))  # no envelope, scale 1
    parameters[:, :7] = values[:, 2:]
    return replace(table, ctf=parameters)


def with_cryodrgn_poses(table: ParticleTable, poses: Path | Sequence[Path], extent_a: NDArray) -> ParticleTable:
    """The table with the poses of a cryoDRGN pickle: (R [N, 3, 3], t [N, 2]), or R alone, or a file for each of the two.

    cryoDRGN's R is RELION's. Its t is the shift that centres the particle, as a fraction of the image's side
    `extent_a` [N] Å, hence the minus.
    """
    files = [poses] if isinstance(poses, Path) else list(poses)
    contents: list[Any] = [numpy_pickle.load(path) for path in files]
    if len(contents) == 1 and isinstance(contents[0], tuple | list):
        contents = list(contents[0])
    if len(contents) not in (1, 2):
        raise SourceError(f"{files[0]}: {len(contents)} entries; expected rotations, or rotations and shifts")
    count, last = len(table), files[-1]
    if table.tilt is not None and getattr(contents[0], "shape", ())[:1] == (table.source_rows,) != (count,):
        raise SourceError(
            f"{files[0]}: {table.source_rows} poses, one for each particle; a tilt series needs one for each of its {count} "
            "images, or those of its STAR file"
        )
    rotations = _numbers(files[0], "rotations", contents[0], (count, 3, 3), table.source)
    with np.errstate(over="ignore", invalid="ignore"):
        products = rotations @ np.swapaxes(rotations, 1, 2)
        wrong = np.abs(products - np.eye(3)).max(axis=(1, 2)) + np.abs(np.linalg.det(rotations) - 1)
    bad = np.flatnonzero(~(wrong <= 1e-3))
    if bad.size:
        raise SourceError(f"{files[0]}: row {bad[0] + 1} is not a rotation matrix; expected R @ R.T = 1")
    shifts = np.zeros((count, 2))
    if len(contents) == 2:
        shifts = _numbers(last, "shifts", contents[1], (count, 2), table.source)
    far = np.flatnonzero(np.abs(shifts).max(axis=1) > 1)
    if far.size:
        raise SourceError(
            f"{last}: shift {shifts[far[0]]} in row {far[0] + 1}; cryoDRGN's are fractions of the box, at most 1"
        )
    shifts_a = -shifts * np.asarray(extent_a)[:, None]
    return replace(table, rotations=rotations.astype(np.float32), shifts_a=shifts_a.astype(np.float32))


def _listed_stacks(source: Path) -> list[str]:
    """Names in a .txt list, one on each line; empty lines and comments left out."""
    try:
        lines = source.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise SourceError(f"{source}: not a list of stacks ({' '.join(str(error).split())})") from error
    line_of: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        name = line.partition("#")[0].strip()
        if not name:
            continue
        if Path(name).suffix.lower() not in STACK_SUFFIXES or not name.isprintable():
            raise SourceError(f"{source}: line {number} is {name[:200]!r}; a .txt source lists .mrcs or .mrc stacks")
        if name in line_of:
            raise SourceError(f"{source}: lines {line_of[name]} and {number} name the same stack {name}")
        line_of[name] = number
    if not line_of:
        raise SourceError(f"{source}: lists no stack; expected one .mrcs or .mrc on each line")
    return list(line_of)


def _pixel_sizes(
    source: Path, boxes: NDArray[np.int64], pixel_size: float | None, ctf: Path | None, stacks: list[Stack]
) -> NDArray[np.float64]:
    """[N] Å/px; cryoDRGN's CTF table states it for a box D, which the images may have been cropped from since."""
    if pixel_size is not None:
        return sane_pixel_sizes(source, np.full(len(boxes), float(pixel_size)))
    if ctf is None:
        found = sorted({round(stack.header_pixel_size, 4) for stack in stacks})
        headers = ", ".join(f"{size:g}" for size in found[:4])
        raise SourceError(f"{source}: no pixel size; give pixel_size in Å (the stacks' headers say {headers})")
    values = _ctf_rows(ctf, len(boxes), source)
    return sane_pixel_sizes(ctf, values[:, 0] * values[:, 1] / boxes)


def _ctf_rows(path: Path, count: int, source: Path) -> NDArray[np.float64]:
    """[N, 9]: box D (px), Å/px, defocus U, V (Å), angle (deg), kV, Cs (mm), amplitude contrast, phase shift (deg)."""
    values = _numbers(path, "CTF parameters", numpy_pickle.load(path), (count, 9), source)
    bad = np.flatnonzero(~((values[:, 0] >= 1) & (values[:, 0] < 2**16)))
    if bad.size:
        raise SourceError(
            f"{path}: a box of {values[bad[0], 0]:g} px in row {bad[0] + 1}; expected cryoDRGN's ctf table"
        )
    return values


def _numbers(path: Path, what: str, content: Any, shape: tuple[int, ...], source: Path) -> NDArray[np.float64]:
    if not isinstance(content, np.ndarray) or content.dtype.kind not in "fiu" or content.shape != shape:
        found = f"{content.dtype} {content.shape}" if isinstance(content, np.ndarray) else type(content).__name__
        raise SourceError(f"{path}: {what}: found {found}; {source.name} needs {shape}")
    return finite(path, what, content)
